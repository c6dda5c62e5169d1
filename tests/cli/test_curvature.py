"""`curvature` on a small network: the table, the file with the statistics, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kfe_fx
from kfe_fx.cli.main import run
from kfe_fx.passes.capture_curvature import CaptureCurvature

NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.LayerNorm(16), nn.Linear(16, 3)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.head(self.norm(self.conv(x).flatten(2)).mean(1))


def factory():
    torch.manual_seed(0)
    return Net(), torch.randn(2, 1, 6, 6)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a network, with taps and without, and data."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "net.py").write_text(NET)
    assert run(["capture", f"{folder / 'net.py'}:factory", "-o", str(folder / "model.pt"), "-q"]) == 0
    kfe_fx.save(CaptureCurvature().run(kfe_fx.load(folder / "model.pt")).program, folder / "tapped.pt")
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(20, 1, 6, 6)).astype(np.float32), draw.integers(0, 3, 20)
    np.savez(folder / "data.npz", x=x, y=y)
    np.savez(folder / "labels.npz", x=x, y=y + 1)
    np.savez(folder / "blind.npz", x=x)
    return folder


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fails(capsys: pytest.CaptureFixture[str], *args: object, code: int) -> str:
    before = sorted(Path().iterdir())
    assert run([str(arg) for arg in args]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("kfe-fx: error: ")
    assert err.count("\n") == 1
    assert "bug" not in err
    assert sorted(Path().iterdir()) == before
    return err


def answer(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    assert run([*map(str, args), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out, parse_constant=pytest.fail)


@pytest.mark.parametrize("name", ["model.pt", "tapped.pt"])
def test_the_table(made: Path, name: str, capsys: pytest.CaptureFixture[str]):
    assert run(["curvature", str(made / name)]) == 0
    out = capsys.readouterr().out
    assert "125 parameters, 98.4% with curvature: 91 in Kronecker blocks, 32 with a diagonal, 2 left out" in out
    for text in (
        "4x1x3x3   Kronecker [1, 4, 10]",
        "A 10x10, G 4x4   batched",
        "by block conv.weight (bias of)",
        "diagonal",
        "left out: never reaches an output",
    ):
        assert text in out
    assert list(Path().iterdir()) == []


def test_the_table_as_json(made: Path, capsys: pytest.CaptureFixture[str]):
    told = answer(capsys, "curvature", made / "model.pt")
    rows = {row["parameter"]: row for row in told["parameters"]}
    assert rows["head.weight"]["blocks"] == rows["head.bias"]["blocks"] == ["head.weight"]
    assert rows["unused"]["status"] == "left out"
    assert told["entries"] == {"kronecker": 91, "diagonal": 32, "left out": 2}
    assert told["files"] == []


def test_statistics_are_written(made: Path, capsys: pytest.CaptureFixture[str]):
    options = ("--source", "empirical", "--statistics", "ekfac", "--statistics", "diagonal", "--batch-size", 8)
    told = answer(capsys, "curvature", made / "model.pt", "--data", made / "data.npz", *options)
    assert told["files"] == ["model.curvature.safetensors"]
    assert [path.name for path in Path().iterdir()] == ["model.curvature.safetensors"]
    store = kfe_fx.curvature.Store.load("model.curvature.safetensors")
    program = kfe_fx.load(made / "model.pt")
    store.check(program, weights=True)
    assert (told["source"], told["sharing"], told["examples"]) == ("empirical", "expand", 20)
    blocks = {row["block"]: row for row in told["measured"]}
    for name, block in store.blocks.items():
        whole = block.D
        assert whole is not None
        assert blocks[name]["trace"] == pytest.approx(float(whole.sum()), rel=1e-4)
        assert (blocks[name]["examples"], blocks[name]["nonfinite"], blocks[name]["fallback"]) == (20, 0, "")
    assert told["trace"] == pytest.approx(sum(row["trace"] for row in told["measured"]))
    data = np.load(made / "data.npz")
    norm = kfe_fx.curvature.fisher_rao.fisher_rao_norm(
        program, (torch.from_numpy(data["x"]), torch.from_numpy(data["y"])), source="empirical"
    )
    assert told["fisher_rao"]["norm"] == pytest.approx(norm.norm, rel=1e-5)


def test_what_is_shown(made: Path, capsys: pytest.CaptureFixture[str]):
    args = ["curvature", str(made / "model.pt"), "--data", str(made / "blind.npz"), "-o", "out.safetensors"]
    assert run(args) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for text in ("20 examples, source exact, sharing expand", "trace of all blocks: ", "Fisher-Rao norm"):
        assert text in out
    assert out.splitlines()[-1] == "wrote out.safetensors"
    assert "--force" in fails(capsys, *args, code=2)
    assert run([*args, "--force", "-q", "--statistics", "kfac", "--sharing", "reduce"]) == 0
    assert capsys.readouterr() == ("", "")


def test_bad_data(made: Path, capsys: pytest.CaptureFixture[str]):
    model = made / "model.pt"
    assert "label 3 at" in fails(capsys, "curvature", model, "--data", made / "labels.npz", code=6)
    assert "needs targets" in fails(
        capsys, "curvature", model, "--data", made / "blind.npz", "--source", "empirical", code=6
    )
    assert "output equal to input" in fails(
        capsys, "curvature", model, "--data", made / "data.npz", "-o", model, "--force", code=2
    )


@pytest.mark.parametrize(
    "command", [("inspect",), ("export", "-q"), ("prune", "--budget=0.5", "--metric=widths", "-q")]
)
def test_the_other_commands_take_a_tapped_file(made: Path, command: tuple[str, ...]):
    assert run([*command, str(made / "tapped.pt")]) == 0
