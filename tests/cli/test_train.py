"""`train` on a small network: the file it writes, what it says, resuming after a kill, several processes, errors."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch

import kfe_fx
from kfe_fx.cli.main import cli, run
from kfe_fx.training import checkpoint, close_optimizer, make_optimizer

NET = """
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def factory():
    return build(), torch.randn(2, 1, 6, 6)
"""


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a network, and data that it learns in a few steps."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "net.py").write_text(NET)
    assert run(["capture", f"{folder / 'net.py'}:factory", "-o", str(folder / "model.pt"), "-q"]) == 0
    torch.save(kfe_fx.load(folder / "model.pt").module().state_dict(), folder / "weights.pt")
    draw = np.random.default_rng(0)
    y = draw.integers(0, 3, 120)
    x = (draw.normal(size=(120, 1, 6, 6)) + y.reshape(-1, 1, 1, 1) - 1).astype(np.float32)
    np.savez(folder / "data.npz", x=x, y=y)
    np.savez(folder / "labels.npz", x=x, y=y + 1)
    np.savez(folder / "blind.npz", x=x)
    np.savez(folder / "large.npz", x=(x * 1e12).astype(np.float32), y=x[:, 0, 0, :3])
    return folder


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fails(capsys: pytest.CaptureFixture[str], *args: object, code: int) -> str:
    before = {path: sha256(path) for path in Path().iterdir()}
    assert run([str(arg) for arg in args]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("kfe-fx: error: ")
    assert err.count("\n") == 1
    assert "bug" not in err
    assert {path: sha256(path) for path in Path().iterdir()} == before
    return err


def answer(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    assert run([*map(str, args), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out, parse_constant=pytest.fail)


@pytest.mark.parametrize("optimizer", ["ekfac", "kfac", "adamw", "sgd"])
def test_it_learns_and_leaves_one_file(made: Path, optimizer: str, capsys: pytest.CaptureFixture[str]):
    before = sha256(made / "model.pt")
    options = ("--optimizer", optimizer, "--epochs", "8", "--batch-size", "16", "--lr", "0.02")
    told = answer(capsys, "train", made / "model.pt", "--data", made / "data.npz", *options)
    assert sha256(made / "model.pt") == before
    assert [path.name for path in Path().iterdir()] == ["model.trained.pt"]
    assert told["path"] == "model.trained.pt"
    assert (told["optimizer"], told["loss"], told["epochs"], told["steps"]) == (optimizer, "cross-entropy", 8, 48)
    assert max(told["judged"]) > 0.7
    old, new = kfe_fx.load(made / "model.pt"), kfe_fx.load("model.trained.pt")
    assert new.hash() == old.hash()
    assert not torch.equal(new.tensor("0.weight"), old.tensor("0.weight"))


def test_what_is_shown(made: Path, capsys: pytest.CaptureFixture[str]):
    args = ["train", str(made / "model.pt"), "--data", str(made / "data.npz"), "--epochs", "2", "--optimizer", "sgd"]
    assert run(args) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for text in ("data.npz: 96 to train on, 24 held out (seed 0)", "sgd, lr 0.01, 2 steps", "training loss", "kept: "):
        assert text in out
    assert out.splitlines()[-1] == "wrote model.trained.pt"
    assert "--force" in fails(capsys, *args, code=2)
    assert run([*args, "--force", "-q"]) == 0
    assert capsys.readouterr() == ("", "")


def test_every_option_arrives(made: Path, capsys: pytest.CaptureFixture[str]):
    options = "--optimizer ekfac --steps 4 --lr 0.05 --batch-size 30 --schedule constant --loss cross-entropy "
    options += "--eval accuracy --damping 0.2 --refresh 2 --rank 3 --group-lasso 0.01 --seed 7 -o out.pt"
    loading = ("--arch", f"{made}/net.py:build", "--input", "input=float32[b,1,6,6]")
    data = ("--data", made / "data.npz", "--val", made / "data.npz")
    told = answer(capsys, "train", made / "weights.pt", *loading, *data, *options.split())
    assert (told["lr"], told["seed"], told["steps"], told["path"]) == (0.05, 7, 4, "out.pt")
    assert "(120) held out" in told["data"]
    lasso = told["group_lasso"]
    assert (lasso["lambda"], lasso["units"], lasso["excluded"]) == (0.01, 4, [])
    assert lasso["groups"] == [{"name": "0", "units": 4, "near_zero": lasso["near_zero"]}]
    assert kfe_fx.load("out.pt").axes == {"input": {0: "b"}}


def test_group_lasso_says_how_many_units_are_near_zero(made: Path, capsys: pytest.CaptureFixture[str]):
    args = ["train", made / "model.pt", "--data", made / "data.npz", "--optimizer", "sgd", "--steps", "200"]
    assert run([str(arg) for arg in [*args, "--lr", "0.05", "--group-lasso", "1"]]) == 0
    out, _ = capsys.readouterr()
    assert "kept: the last epoch; group lasso 1: 4 of 4 units near zero" in out
    assert "note: every unit of 1 groups (0) is near zero: lower group lasso to keep some" in out
    assert "number above zero" in fails(capsys, *args, "--force", "--group-lasso", "0", code=2)


def test_the_command_and_the_function_have_the_same_options():
    command = cli.get_command(click.Context(cli), "train")
    assert command is not None
    given = command.make_context("train", ["model.pt", "--data", "data.npz"]).params
    known = inspect.signature(kfe_fx.train).parameters
    for name in known.keys() - {"program", "data", "checkpoint", "threads", "progress"}:
        assert given[name] == known[name].default, name


def test_the_help_says_the_learning_rates(made: Path):
    command = cli.get_command(click.Context(cli), "train")
    assert command is not None
    told = next(param.help for param in command.params if isinstance(param, click.Option) and param.name == "lr")
    program = kfe_fx.load(made / "model.pt")
    rates = {}
    for name in ("ekfac", "kfac", "adamw", "sgd"):
        optimizer = make_optimizer(program, name)
        rates[name] = optimizer.param_groups[0]["lr"]
        close_optimizer(optimizer)
    assert rates["ekfac"] == rates["kfac"]
    assert told is not None
    assert f"[default: {rates['ekfac']:g}; adamw {rates['adamw']:g}, sgd {rates['sgd']:g}]" in told


class Killed(BaseException):
    pass


def kill_after(monkeypatch: pytest.MonkeyPatch, epochs: int) -> None:
    """Die right after so many checkpoints, as a process that is killed does: nothing is cleaned up."""
    kept = checkpoint.save_checkpoint
    seen = []

    def save(*args: Any) -> None:
        kept(*args)
        seen.append(1)
        if len(seen) == epochs:
            raise Killed

    monkeypatch.setattr(sys.modules["kfe_fx.training.train"], "save_checkpoint", save)


def test_resume_after_a_kill(made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    args = ["train", str(made / "model.pt"), "--data", str(made / "data.npz"), "--epochs", "4", "--batch-size", "16"]
    assert run([*args, "-o", "whole.pt", "-q"]) == 0
    with monkeypatch.context() as patched:
        kill_after(patched, 2)
        with pytest.raises(Killed):
            run([*args, "-o", "cut.pt", "-q"])
    assert sorted(path.name for path in Path().iterdir()) == ["cut.pt.checkpoint", "whole.pt"]
    args += ["-o", "cut.pt"]
    assert "--resume" in fails(capsys, *args, code=2)
    assert "has steps 24, not 30" in fails(capsys, *args[:5], "5", *args[6:], "--resume", code=2)
    assert "has seed 0, not 1" in fails(capsys, *args, "--seed", "1", "--resume", code=2)
    told = answer(capsys, *args, "--resume")
    assert told["resumed"] == 2
    assert sorted(path.name for path in Path().iterdir()) == ["cut.pt", "whole.pt"]
    assert sha256(Path("cut.pt")) == sha256(Path("whole.pt"))
    assert "no checkpoint to go on from" in fails(capsys, *args, "--resume", "--force", code=2)


def test_force_starts_anew(made: Path, capsys: pytest.CaptureFixture[str]):
    Path("model.trained.pt.checkpoint").write_bytes(b"of yesterday")
    args = ["train", str(made / "model.pt"), "--data", str(made / "data.npz"), "--steps", "1", "--optimizer", "sgd"]
    assert "not finished" in fails(capsys, *args, code=2)
    assert "damaged" in fails(capsys, *args, "--resume", code=2)
    assert run([*args, "--force", "-q"]) == 0
    assert [path.name for path in Path().iterdir()] == ["model.trained.pt"]


def test_errors_leave_nothing(made: Path, capsys: pytest.CaptureFixture[str]):
    model = made / "model.pt"
    assert "label 3 at" in fails(capsys, "train", model, "--data", made / "labels.npz", code=6)
    assert "needs targets" in fails(capsys, "train", model, "--data", made / "blind.npz", code=6)
    assert "gone.npz" in fails(capsys, "train", model, "--data", "gone.npz", code=6)
    assert "adamw takes no rank" in fails(
        capsys, "train", model, "--data", made / "data.npz", "--optimizer", "adamw", "--rank", 3, code=2
    )
    both = ("--epochs", 1, "--steps", 1)
    assert "not both" in fails(capsys, "train", model, "--data", made / "data.npz", *both, code=2)
    assert "--arch" in fails(capsys, "train", made / "weights.pt", "--data", made / "data.npz", code=2)
    assert "output equal to input" in fails(
        capsys, "train", model, "--data", made / "data.npz", "-o", model, "--force", code=2
    )


def test_a_loss_that_is_not_finite_says_what_to_lower(made: Path, capsys: pytest.CaptureFixture[str]):
    args = ("train", made / "model.pt", "--data", made / "large.npz", "--optimizer", "sgd", "--epochs", "9")
    assert "lower --lr (now 0.01)" in fails(capsys, *args, "--batch-size", "96", code=2)


def test_two_processes(made: Path):
    code = "from kfe_fx.cli.main import main; main()"
    args = [str(made / "model.pt"), "--data", str(made / "data.npz"), "--epochs", "2", "--json"]
    script = Path("run.py")
    script.write_text(code)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, "train", *args], capture_output=True, text=True, check=False, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)  # one object: rank 1 prints nothing
    assert told["processes"] == 2
    assert sorted(path.name for path in Path().iterdir()) == ["model.trained.pt", "run.py"]
    kfe_fx.load("model.trained.pt")
