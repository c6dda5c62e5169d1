"""`kfe-fx sparsify` as it is typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import kfe_fx
from kfe_fx.cli import sparsify as cli_sparsify
from kfe_fx.cli.main import run
from kfe_fx.cli.options import CRITERIA, WEIGHT_CRITERIA
from kfe_fx.criteria import names
from kfe_fx.passes.sparse_rounds import NO_TIME
from tests.processes import torchrun

TOTAL = 72 + 288 + 24


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6)),
    )
    kfe_fx.save(net.eval(), torch.randn(2, 1, 6, 6), path=folder / "model.pt")
    rng = np.random.default_rng(0)
    np.savez(folder / "data.npz", x=rng.standard_normal((40, 1, 6, 6), np.float32), y=rng.integers(0, 6, 40))
    np.savez(folder / "bare.npz", x=rng.standard_normal((40, 1, 6, 6), np.float32))
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(capsys: pytest.CaptureFixture[str], *args: object, code: int = 2) -> str:
    before = sorted(Path().rglob("*"))
    assert run([*map(str, args)]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("kfe-fx: error: ")
    assert err.count("\n") == 1
    assert sorted(Path().rglob("*")) == before
    return err


def test_three_files_and_what_they_say(made: Path, capsys: pytest.CaptureFixture[str]):
    args = ["--sparsity", "0.8", "--criterion", "qm", "--rounds", "3", "--data", made / "data.npz", "--epochs", "1"]
    assert run([*map(str, ["sparsify", made / "model.pt", *args, "-o", "out", "--json"])]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    names = [f"model.sparse.pruned.{ending}" for ending in ("onnx", "pt", "json")]
    assert [Path(path).name for path in told["files"]] == names
    assert sorted(path.name for path in Path("out").iterdir()) == sorted(names)
    assert told["before"]["weights"] == TOTAL
    assert told["after"]["zeros"] == round(0.8 * TOTAL)
    assert [entry["predicted"] is not None for entry in told["rounds"]] == [True] * 3
    assert NO_TIME in told["notes"]
    arrays = [onnx.numpy_helper.to_array(t) for t in onnx.load("out/model.sparse.pruned.onnx").graph.initializer]
    assert sum(int((array == 0).sum()) for array in arrays if array.ndim > 1) == round(0.8 * TOTAL)
    assert run(["verify", "out"]) == 0
    assert "equal" in capsys.readouterr().out
    assert "exists already" in refused(capsys, "sparsify", made / "model.pt", *args, "-o", "out")


def test_the_table_is_honest_about_time(made: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["sparsify", str(made / "model.pt"), "--sparsity", "0.5"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"note: {NO_TIME}" in shown
    assert "sparsity: 0.5000 of the ranked weights; asked for 0.5" in shown
    assert "wrote model.sparse.pruned.json" in shown
    assert run(["sparsify", str(made / "model.pt"), "--sparsity", "0.5", "-f", "-q"]) == 0
    assert capsys.readouterr().out == ""


def test_help_says_what_saves_time(capsys: pytest.CaptureFixture[str]):
    assert run(["sparsify", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "This makes no network faster" in shown
    assert "`kfe-fx prune` removes whole units, which does save time" in shown


def test_many_rounds_are_thinned_out_to_the_last(made: Path, capsys: pytest.CaptureFixture[str]):
    args = ["--criterion", "random", "--rounds", "40", "--schedule", "equal", "--data", str(made / "data.npz")]
    assert run(["sparsify", str(made / "model.pt"), "--sparsity", "0.5", "--epochs", "0", *args]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    rounds = [int(line[0]) for line in shown if len(line) == 4 and line[1].endswith("%")]
    assert rounds == list(range(1, 41, 3))
    assert len(rounds) <= cli_sparsify.ROWS
    certificate = json.loads(Path("model.sparse.pruned.json").read_text())["certificate"]
    assert len(certificate["rounds"]) == 40


OWN = """
import torch
from kfe_fx.criteria import Criterion


class Last(Criterion):
    name = "last"

    def score(self, context):
        raise NotImplementedError

    def weights(self, context):
        return {name: torch.arange(value.numel()).view_as(value) for name, value in context.weights().items()}


class Units(Criterion):
    name = "units"

    def score(self, context):
        raise NotImplementedError
"""


def test_criteria_are_those_of_python(made: Path, capsys: pytest.CaptureFixture[str]):
    assert names(weights=True) == WEIGHT_CRITERIA
    assert set(WEIGHT_CRITERIA) < set(CRITERIA) == set(names())
    Path("own.py").write_text(OWN)
    settings = ("sparsify", made / "model.pt", "--sparsity", "0.5", "--rounds", "1")
    assert run([*map(str, settings), "--criterion", "own.py:Last", "-q"]) == 0
    assert bool((kfe_fx.load("model.sparse.pruned.pt").tensor("0.weight").flatten()[:70] == 0).all())
    told = refused(capsys, *settings, "-f", "--criterion", "own.py:Units")
    assert f"'units' scores units, not single weights; choose {', '.join(WEIGHT_CRITERIA)}, or" in told
    assert "'kfe' scores units, not single" in refused(capsys, *settings, "-f", "--criterion", "kfe")
    assert run(["sparsify", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(name in shown for name in ("fisher, lamp, lm", "or file.py:Class"))
    assert "without the scale of the batch norm" in shown


@pytest.mark.parametrize(
    "option",
    [
        *(("--sparsity", value) for value in ("0", "1", "-0.5", "1.5", "nan", "most", "90")),
        ("--criterion", "luck"),
        ("--rounds", "0"),
        ("--schedule", "cosine"),
        *(("--penalty", value) for value in ("-1", "nan", "inf", "much")),
        ("--epochs", "-1"),
        ("--lr", "0"),
        ("--optimizer", "ekfac"),
        ("--batch-size", "0"),
        ("--seed", "-1"),
        ("--eval", ":metric"),
    ],
)
def test_options_that_mean_nothing(option: tuple[str, str], made: Path, capsys: pytest.CaptureFixture[str]):
    assert option[0] in refused(capsys, "sparsify", made / "model.pt", "--sparsity", "0.5", *option)


def test_what_is_missing(made: Path, capsys: pytest.CaptureFixture[str]):
    model = made / "model.pt"
    assert "--sparsity" in refused(capsys, "sparsify", model)
    assert "gone.pt: no such file" in refused(capsys, "sparsify", "gone.pt", "--sparsity", "0.5")
    qm = ("sparsify", model, "--sparsity", "0.5", "--criterion", "qm")
    assert "needs targets" in refused(capsys, *qm)
    assert "needs targets" in refused(capsys, *qm, "--data", made / "bare.npz")
    assert "matches no parameter" in refused(capsys, "sparsify", model, "--sparsity", "0.5", "--keep", "tail")
    Path("file").write_text("")
    assert "not a folder" in refused(capsys, "sparsify", model, "--sparsity", "0.5", "-o", "file")


@pytest.mark.parametrize("criterion", ["magnitude", "qm"])
@pytest.mark.xdist_group("processes")
def test_two_processes(made: Path, criterion: str):
    """Scores, fine-tuning and statistics of a batch norm are those of one process; rank 1 prints and writes nothing."""
    args = ["sparsify", made / "model.pt", "--sparsity", "0.6", "--criterion", criterion, "--rounds", "2"]
    # AdamW makes whole steps of what rounding leaves of the gradient of a bias before a batch norm
    args += ["--data", made / "data.npz", "--epochs", "2", "--optimizer", "sgd", "--json"]
    assert run([*map(str, args), "-o", "alone"]) == 0
    told = json.loads(torchrun(*args, "-o", "both"))
    assert len(told["files"]) == 3
    one, both = (kfe_fx.load(f"{place}/model.sparse.pruned.pt").state_dict() for place in ("alone", "both"))
    for name, value in one.items():
        assert torch.equal(value == 0, both[name] == 0)
        torch.testing.assert_close(both[name], value, rtol=1e-3, atol=1e-5)
