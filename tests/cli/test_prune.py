"""What `prune` and `demo` hand to the library and show of its answer, with the library stood in for."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import kfe_fx
from kfe_fx.cli.main import run


class Certificate:
    def to_json(self) -> dict[str, Any]:
        return {"latency_ratio": 0.5, "drift": float("nan")}

    def table(self) -> list[tuple[str, str, str]]:
        return [("latency", "2.00 ms", "1.00 ms")]


class Result:
    certificate = Certificate()

    def write(self, directory: Path, stem: str, force: bool = False) -> list[Path]:
        return [directory / f"{stem}.pruned.{suffix}" for suffix in ("onnx", "pt", "json")]


@dataclass
class Library:
    """Remembers how it was called."""

    loaded: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)
    pruned: list[dict[str, Any]] = field(default_factory=list)

    def load(self, path: Path, **options: Any) -> str:
        self.loaded.append((path, options))
        return "program"

    def prune(self, program: str, **options: Any) -> Result:
        assert program == "program"
        self.pruned.append(options)
        return Result()


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Library:
    monkeypatch.chdir(tmp_path)
    Path("model.pt").write_bytes(b"")
    stand_in = Library()
    monkeypatch.setitem(vars(kfe_fx), "load", stand_in.load)
    monkeypatch.setitem(vars(kfe_fx), "prune", stand_in.prune)
    return stand_in


def test_table_and_files(library: Library, capsys: pytest.CaptureFixture[str]):
    assert run(["prune", "model.pt", "--budget", "0.5", "-o", "out"]) == 0
    out, err = capsys.readouterr()
    assert "2.00 ms" in out
    assert "wrote out/model.pruned.onnx" in out
    assert err == ""


def test_json_is_all_there_is_on_stdout(library: Library, capsys: pytest.CaptureFixture[str]):
    assert run(["prune", "model.pt", "--budget", "0.5", "--json"]) == 0
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert answer["latency_ratio"] == 0.5
    assert answer["drift"] is None
    assert answer["files"] == ["model.pruned.onnx", "model.pruned.pt", "model.pruned.json"]
    assert err == ""


def test_quiet(library: Library, capsys: pytest.CaptureFixture[str]):
    assert run(["prune", "model.pt", "--budget", "0.5", "-q"]) == 0
    assert capsys.readouterr() == ("", "")


def test_defaults(library: Library):
    assert run(["prune", "model.pt", "--budget", "0.5", "-q"]) == 0
    ((path, loading),) = library.loaded
    assert path == Path("model.pt")
    assert loading == {"arch": None, "trust": False, "inputs": (), "data": None}
    assert library.pruned == [
        {
            "budget": 0.5,
            "metric": "latency",
            "criterion": "fisher",
            "data": None,
            "val": None,
            "evaluate": None,
            "loss": None,
            "epochs": None,
            "lr": None,
            "batch_size": 64,
            "optimizer": "adamw",
            "rounds": None,
            "multiple_of": None,
            "threads": None,
            "batch": 1,
            "keep": (),
            "seed": 0,
            "progress": None,
        }
    ]


def test_every_option_arrives(library: Library):
    options = "--metric macs --criterion taylor --epochs 0 --lr 1e-3 --batch-size 8 --optimizer sgd --rounds 2"
    options += " --multiple-of 8 --threads 2 --batch 4 --keep head --keep layer4.* --seed 3 --arch net.py:build"
    options += " --trust --input x=float32[b,3,8,8]"
    assert run(["prune", "model.pt", "--budget", "0.25", "-q", *options.split()]) == 0
    ((_, loading),) = library.loaded
    assert loading == {"arch": "net.py:build", "trust": True, "inputs": ("x=float32[b,3,8,8]",), "data": None}
    (given,) = library.pruned
    assert (given["budget"], given["metric"], given["criterion"]) == (0.25, "macs", "taylor")
    assert (given["epochs"], given["lr"], given["batch_size"], given["optimizer"]) == (0, 1e-3, 8, "sgd")
    assert (given["rounds"], given["multiple_of"], given["threads"], given["batch"]) == (2, 8, 2, 4)
    assert (given["keep"], given["seed"]) == (("head", "layer4.*"), 3)


def test_force_is_what_lets_it_run_twice(library: Library, capsys: pytest.CaptureFixture[str]):
    Path("model.pruned.pt").touch()
    assert run(["prune", "model.pt", "--budget", "0.5"]) == 2
    assert library.loaded == []
    assert run(["prune", "model.pt", "--budget", "0.5", "--force", "-q"]) == 0
