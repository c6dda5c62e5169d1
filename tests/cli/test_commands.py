"""The commands on a small network: what they write, what they say, and how bad files end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import kfe_fx
from kfe_fx.cli.main import run

NET = """
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))


def factory():
    return build(), torch.randn(2, 3, 6, 6)


def broken():
    raise ValueError("no weights today")
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source of a network, its program file and its state dict."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "net.py").write_text(NET)
    assert run(["capture", f"{folder / 'net.py'}:factory", "-o", str(folder / "model.pt"), "-q"]) == 0
    torch.save(kfe_fx.load(folder / "model.pt").module().state_dict(), folder / "weights.pt")
    return folder


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fails(capsys: pytest.CaptureFixture[str], *args: object, code: int) -> str:
    before = sorted(Path().rglob("*"))
    assert run([str(arg) for arg in args]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("kfe-fx: error: ")
    assert err.count("\n") == 1
    assert sorted(Path().rglob("*")) == before
    return err


def test_capture_with_weights_from_a_state_dict(made: Path, capsys: pytest.CaptureFixture[str]):
    args = ["capture", f"{made / 'net.py'}:build", "--state", str(made / "weights.pt"), "-o", "m.pt"]
    assert run([*args, "--input", "input=float32[b,3,6,6]"]) == 0
    assert "wrote m.pt" in capsys.readouterr().out
    ours, theirs = kfe_fx.load("m.pt").module().state_dict(), torch.load(made / "weights.pt", weights_only=True)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_inspect(made: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["inspect", str(made / "model.pt")]) == 0
    shown = capsys.readouterr().out
    assert "0.weight" in shown
    assert "4x3x3x3" in shown
    assert "4 units that can be removed" in shown


def test_inspect_as_json(made: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["inspect", str(made / "weights.pt"), "--arch", f"{made / 'net.py'}:factory", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["units"] == 4
    layers = {layer["parameter"]: layer for layer in facts["layers"]}
    assert layers["0.weight"]["units"] == [4, 0, 0, 0]
    assert layers["4.weight"] == {"parameter": "4.weight", "shape": [5, 64], "units": [0, 4]}
    assert any(item["parameter"] == "4.weight" and item["dim"] == 0 and item["why"] for item in facts["frozen"])


def test_export_and_bench(made: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["export", str(made / "model.pt"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["files"] == ["model.onnx"]
    assert report["parity"]["ok"]
    assert [path.name for path in Path().iterdir()] == ["model.onnx"]
    assert "--force" in fails(capsys, "export", made / "model.pt", code=2)
    assert run(["bench", "model.onnx", "model.onnx", "--seconds", "0.1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len(rows) == 2
    assert rows[0]["ratio"] == 1.0
    assert run(["bench", "model.onnx", "--seconds", "0.1", "--batch", "3"]) == 0
    assert "model.onnx" in capsys.readouterr().out


def test_export_that_fails_its_proof_writes_nothing(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object) -> None:
        raise kfe_fx.VerificationFailed("output 'output' differs")

    monkeypatch.setattr("kfe_fx.runtime.parity.verify", refuse)
    Path("model.onnx").write_text("of yesterday")
    assert "differs" in fails(capsys, "export", made / "model.pt", "--force", code=5)
    assert Path("model.onnx").read_text() == "of yesterday"


@pytest.mark.parametrize("command", [("inspect",), ("export",), ("prune", "--budget=0.5")])
@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"PK\x03\x04 cut off", b"\x7fELF", b"{}"])
def test_foreign_files(command: tuple[str, ...], content: bytes, capsys: pytest.CaptureFixture[str]):
    Path("model.pt").write_bytes(content)
    assert "model.pt" in fails(capsys, *command, "model.pt", code=2)


def test_no_example_inputs(made: Path, capsys: pytest.CaptureFixture[str]):
    err = fails(capsys, "capture", f"{made / 'net.py'}:build", "-o", "m.pt", code=2)
    assert all(name in err for name in ("example_inputs", "--input", "--data"))


def test_factories_that_do_not_work(made: Path, capsys: pytest.CaptureFixture[str]):
    assert "no weights today" in fails(capsys, "capture", f"{made / 'net.py'}:broken", "-o", "m.pt", code=2)
    assert "nothing" in fails(capsys, "capture", f"{made / 'net.py'}:nothing", "-o", "m.pt", code=2)
    assert "gone.py" in fails(capsys, "capture", "gone.py:build", "-o", "m.pt", code=2)


@pytest.mark.parametrize("text", ["length", "length=", "=3", "length=0", "length=-1", "length=x"])
def test_axis_sizes(made: Path, text: str, capsys: pytest.CaptureFixture[str]):
    assert "--axis" in fails(capsys, "bench", made / "model.pt", "--axis", text, code=2)


def test_user_functions(made: Path, capsys: pytest.CaptureFixture[str]):
    (made / "loss.py").write_text("VALUE = 3\ndef good(a, b): return a\n")
    (made / "raises.py").write_text("import no_such_package\n")
    prune = ("prune", made / "model.pt", "--budget", "0.5", "--loss")
    assert "gone.py" in fails(capsys, *prune, "gone.py:good", code=2)
    assert "VALUE: int, not a function" in fails(capsys, *prune, f"{made}/loss.py:VALUE", code=2)
    assert "no_such_package" in fails(capsys, *prune, f"{made}/raises.py:good", code=2)
