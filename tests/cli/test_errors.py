"""Bad command lines: one line on stderr, the right exit code, no file left behind. No model is needed."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import click
import pytest

from kfe_fx import errors
from kfe_fx.cli import main as cli_main
from kfe_fx.cli.main import run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A file that exists; whatever is wrong with it is found later than what is tested here."""
    path = tmp_path / "model.pt"
    path.write_bytes(b"nothing")
    return path


def fails(capsys: pytest.CaptureFixture[str], *args: object, code: int = 2) -> str:
    before = sorted(Path().rglob("*"))
    assert run([str(arg) for arg in args]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("kfe-fx: error: ")
    assert err.count("\n") == 1
    assert sorted(Path().rglob("*")) == before
    return err


@pytest.mark.parametrize("budget", ["0", "1.5", "-1", "nan", "abc", "inf", "-0.5", "", "12 parsecs", "1e-400"])
def test_budgets_that_mean_nothing(budget: str, model: Path, capsys: pytest.CaptureFixture[str]):
    err = fails(capsys, "prune", model, f"--budget={budget}")
    assert "more than 0 and at most 1" in err
    assert repr(budget) in err


def test_negative_budget_as_a_word(model: Path, capsys: pytest.CaptureFixture[str]):
    assert "more than 0" in fails(capsys, "prune", model, "--budget", "-1")


@pytest.mark.parametrize("budget", ["1", "1.0", "1e0"])
def test_budget_one_is_nothing_to_do(budget: str, model: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["prune", str(model), "--budget", budget]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("nothing to do")
    assert err == ""
    assert list(Path().iterdir()) == [Path("model.pt")]


def test_budget_one_as_json(model: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["prune", str(model), "--budget", "1", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["modified"] is False
    assert answer["files"] == []


def test_budget_is_required(model: Path, capsys: pytest.CaptureFixture[str]):
    assert "--budget" in fails(capsys, "prune", model)


@pytest.mark.parametrize(
    "option",
    [
        ("--epochs", "-1"),
        ("--lr", "0"),
        ("--lr", "nan"),
        ("--lr", "fast"),
        ("--batch-size", "0"),
        ("--rounds", "0"),
        ("--multiple-of", "0"),
        ("--threads", "0"),
        ("--batch", "0"),
        ("--metric", "watts"),
        ("--criterion", "luck"),
        ("--optimizer", "adam"),
        ("--seed", "-1"),
        ("--loss", "loss.py"),
        ("--eval", ":metric"),
        ("--arch", "net.py:"),
    ],
)
def test_options_that_mean_nothing(option: tuple[str, str], model: Path, capsys: pytest.CaptureFixture[str]):
    err = fails(capsys, "prune", model, "--budget", "0.5", *option)
    assert option[0] in err


def test_the_command_that_was_meant(capsys: pytest.CaptureFixture[str]):
    assert "'prune'" in fails(capsys, "prnue")


def test_the_option_that_was_meant(model: Path, capsys: pytest.CaptureFixture[str]):
    assert "--budget" in fails(capsys, "prune", model, "--bugdet", "0.5")


def test_missing_model(capsys: pytest.CaptureFixture[str]):
    assert "gone.pt: no such file" in fails(capsys, "prune", "gone.pt", "--budget", "0.5")


@pytest.mark.parametrize(
    "option",
    [
        ("--epochs", "0"),
        ("--steps", "-1"),
        ("--lr", "0"),
        ("--batch-size", "0"),
        ("--optimizer", "lion"),
        ("--schedule", "linear"),
        ("--damping", "nan"),
        ("--refresh", "0"),
        ("--rank", "0"),
        ("--seed", "-1"),
        ("--loss", "loss.py"),
        ("--eval", ":metric"),
    ],
)
def test_options_of_train_that_mean_nothing(option: tuple[str, str], model: Path, capsys: pytest.CaptureFixture[str]):
    assert option[0] in fails(capsys, "train", model, "--data", "data.npz", *option)


@pytest.mark.parametrize(
    "option",
    [("--source", "all"), ("--sharing", "both"), ("--statistics", "mean"), ("--samples", "0"), ("--seed", "x")],
)
def test_options_of_curvature_that_mean_nothing(
    option: tuple[str, str], model: Path, capsys: pytest.CaptureFixture[str]
):
    assert option[0] in fails(capsys, "curvature", model, *option)


def test_curvature_without_data_writes_nothing(model: Path, capsys: pytest.CaptureFixture[str]):
    assert "--data" in fails(capsys, "curvature", model, "-o", "statistics.safetensors")


def test_data_is_required_to_train(model: Path, capsys: pytest.CaptureFixture[str]):
    assert "--data" in fails(capsys, "train", model)


@pytest.mark.parametrize(
    "args",
    [
        ("prune", "{}", "--budget", "0.5"),
        ("inspect", "{}"),
        ("export", "{}"),
        ("bench", "{}"),
        ("train", "{}", "--data", "data.npz"),
        ("curvature", "{}"),
    ],
)
def test_folder_and_device_as_model(args: tuple[str, ...], capsys: pytest.CaptureFixture[str]):
    Path("folder").mkdir()
    for place in ("folder", "/dev/null"):
        err = fails(capsys, *(arg.format(place) for arg in args))
        assert "not a regular file" in err


def test_file_names_cannot_break_the_line(capsys: pytest.CaptureFixture[str]):
    err = fails(capsys, "inspect", "a\nb\x1b[31m.pt")
    assert "\x1b" not in err
    assert "a b\\x1b[31m.pt" in err


def test_targets_that_exist(model: Path, capsys: pytest.CaptureFixture[str]):
    Path("model.pruned.json").write_text("{}")
    assert "--force" in fails(capsys, "prune", model, "--budget", "0.5")


def test_output_folder_is_a_file(model: Path, capsys: pytest.CaptureFixture[str]):
    assert "not a folder" in fails(capsys, "prune", model, "--budget", "0.5", "-o", model)
    assert "not a folder" in fails(capsys, "prune", model, "--budget", "0.5", "-o", model / "deeper")


def test_output_folder_is_missing(model: Path, capsys: pytest.CaptureFixture[str]):
    assert "no such folder" in fails(capsys, "export", model, "-o", "out/model.onnx")


def test_output_folder_is_not_writable(model: Path, capsys: pytest.CaptureFixture[str]):
    # not even root writes there
    assert "not writable" in fails(capsys, "prune", model, "--budget", "0.5", "-o", "/proc/nowhere")
    assert "not writable" in fails(capsys, "export", model, "-o", "/proc/model.onnx")


def test_output_equal_to_input(model: Path, capsys: pytest.CaptureFixture[str]):
    assert "output equal to input" in fails(capsys, "export", model, "-o", model, "--force")
    Path("other.pt").symlink_to(model)
    assert "output equal to input" in fails(capsys, "export", model, "-o", "other.pt", "--force")


def test_output_equal_to_the_data(model: Path, capsys: pytest.CaptureFixture[str]):
    Path("model.pruned.json").write_text("{}")
    for option in ("--data", "--plan", "--store", "--target"):
        args = ("prune", model, "--budget", "0.5", "--force", option, "model.pruned.json")
        assert "output equal to input" in fails(capsys, *args)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.KfeError("x"), 1),
        (errors.UsageError("x"), 2),
        (errors.BadFile("x"), 2),
        (errors.UnsupportedModel("x"), 3),
        (errors.InfeasibleBudget("x"), 4),
        (errors.VerificationFailed("x"), 5),
        (errors.BadData("two\nlines"), 6),
        (errors.MissingDependency("x"), 7),
        (OSError(errno.ENOSPC, "x", "file"), 2),
        (MemoryError("x"), 2),
        (ZeroDivisionError("x"), 1),
    ],
)
def test_exit_codes(error: Exception, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    @click.command("inspect")
    def command() -> None:
        raise error

    monkeypatch.setattr(cli_main.LazyGroup, "get_command", lambda self, ctx, name: command)
    err = fails(capsys, "inspect", code=code)
    assert ("bug" in err) == isinstance(error, ZeroDivisionError)
    monkeypatch.setenv("KFE_FX_TRACEBACK", "1")
    assert run(["inspect"]) == code
    assert "Traceback (most recent call last)" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["before", "after"])
def test_traceback_on_request(place: str, capsys: pytest.CaptureFixture[str]):
    args = ["--traceback", "inspect", "gone.pt"] if place == "before" else ["inspect", "gone.pt", "--traceback"]
    assert run(args) == 2
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-1] == "kfe-fx: error: gone.pt: no such file"


def test_interrupt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    @click.command("inspect")
    def command() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_main.LazyGroup, "get_command", lambda self, ctx, name: command)
    assert run(["inspect"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_closed_pipe_is_quiet():
    code = (
        "import sys, click\n"
        "from kfe_fx.cli import main\n"
        "@click.command('inspect')\n"
        "def command():\n"
        "    for _ in range(100000): click.echo('line')\n"
        "main.LazyGroup.get_command = lambda self, ctx, name: command\n"
        "sys.argv[1:] = ['inspect']\n"
        "main.main()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 141
    assert err == b""


def test_terminate_runs_the_cleanup(tmp_path: Path):
    code = (
        "import sys, time, click\n"
        "from pathlib import Path\n"
        "from kfe_fx.cli import main\n"
        "@click.command('inspect')\n"
        "def command():\n"
        "    try:\n"
        "        print('ready', flush=True); time.sleep(60)\n"
        "    finally:\n"
        f"        Path({str(tmp_path / 'cleaned')!r}).touch()\n"
        "main.LazyGroup.get_command = lambda self, ctx, name: command\n"
        "sys.argv[1:] = ['inspect']\n"
        "main.main()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.terminate()
        assert process.wait(timeout=60) == 143
    assert (tmp_path / "cleaned").exists()
