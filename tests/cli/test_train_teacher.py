"""`train --teacher`: unlabelled examples, what is told, and errors that leave nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import kfe_fx
from kfe_fx.cli.main import run

NET = """
import torch
from torch import nn


def net(seed, classes):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, classes)), torch.randn(2, 4)


def small():
    return net(0, 3)


def teacher():
    return net(1, 3)


def other():
    return net(1, 2)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    (folder / "net.py").write_text(NET)
    for name in ("small", "teacher", "other"):
        assert run(["capture", f"{folder / 'net.py'}:{name}", "-o", str(folder / f"{name}.pt"), "-q"]) == 0
    x = np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32)
    np.savez(folder / "data.npz", x=x, y=(x[:, 0] > 0).astype(np.int64))
    np.savez(folder / "blind.npz", x=x)
    return folder


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_it_learns_from_unlabelled_examples(made: Path, capsys: pytest.CaptureFixture[str]):
    args = ["train", made / "small.pt", "--data", made / "blind.npz", "--teacher", made / "teacher.pt"]
    args += [
        "--optimizer",
        "adamw",
        "--lr",
        "0.02",
        "--steps",
        "300",
        "--batch-size",
        "20",
        "--loss",
        "cross-entropy",
        "--temperature",
        "2",
    ]
    assert run([*map(str, args), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["distillation"].items() >= {"weight": 1.0, "temperature": 2.0, "match": "cross-entropy"}.items()
    assert told["last_loss"] < 0.1 * told["first_loss"]
    x = torch.from_numpy(np.load(made / "blind.npz")["x"])
    small, teacher = kfe_fx.load("small.trained.pt"), kfe_fx.load(made / "teacher.pt")
    assert float((small(x).argmax(1) == teacher(x).argmax(1)).float().mean()) > 0.9


def test_what_is_shown(made: Path, capsys: pytest.CaptureFixture[str]):
    args = ["train", made / "small.pt", "--data", made / "data.npz", "--teacher", made / "teacher.pt", "--steps", "2"]
    assert run([*map(str, args), "--distil", "0.25"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "teacher: 0.25 of the loss, compared by cross-entropy, temperature 1\n" in out


def test_features_are_compared_too(made: Path, capsys: pytest.CaptureFixture[str]):
    args = ["train", made / "small.pt", "--data", made / "data.npz", "--teacher", made / "teacher.pt", "--steps", "5"]
    told = []
    for features in ([], ["--feature", "1"], ["--feature", "0", "--feature", "[01]"]):
        assert run([*map(str, args), *features, "--json", "-f"]) == 0
        told.append(json.loads(capsys.readouterr().out))
    assert [len(one["distillation"]["features"]) for one in told] == [0, 1, 2]
    assert len({one["last_loss"] for one in told}) == 3
    program, teacher = kfe_fx.load(made / "small.pt"), kfe_fx.load(made / "teacher.pt")
    x, y = (torch.from_numpy(array) for array in np.load(made / "data.npz").values())
    facts = kfe_fx.train(program, (x, y), teacher=teacher, features=["1"], steps=5)
    assert facts["last_loss"] == told[1]["last_loss"]


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (["--data", "data.npz", "--distil", "0.5"], 2, "distil goes with a teacher"),
        (["--data", "data.npz", "--temperature", "2"], 2, "temperature goes with a teacher"),
        (["--data", "data.npz", "--feature", "1"], 2, "features goes with a teacher"),
        (["--data", "data.npz", "--teacher", "teacher.pt", "--feature", "9"], 2, "no activation is called '9'"),
        (["--data", "data.npz", "--teacher", "teacher.pt", "--distil", "1.5"], 2, "1.5 is not in the range"),
        (["--data", "data.npz", "--teacher", "teacher.pt", "--temperature", "0"], 2, "not a number above zero"),
        (["--data", "data.npz", "--teacher", "gone.pt"], 2, "gone.pt: no such file"),
        (["--data", "data.npz", "--teacher", "other.pt"], 2, "the teacher's output is"),
        (["--data", "blind.npz", "--teacher", "teacher.pt", "--distil", "0.5"], 6, "leaves the rest of the loss to"),
        (["--data", "blind.npz", "--teacher", "teacher.pt", "--temperature", "3"], 2, "temperature softens classes"),
        (["--data", "data.npz", "--teacher", "teacher.pt", "-o", "teacher.pt", "--force"], 2, "output equal to input"),
        (["--data", "blind.npz"], 6, "needs targets or a teacher"),
    ],
)
def test_errors_leave_nothing(made: Path, options: list[str], code: int, told: str, capsys: pytest.CaptureFixture[str]):
    args = [str(made / word) if word.endswith((".npz", ".pt")) else word for word in options]
    before = {path: path.read_bytes() for path in made.iterdir()}
    assert run(["train", str(made / "small.pt"), *args]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("kfe-fx: error: ")
    assert err.count("\n") == 1
    assert told in err
    assert not list(Path().iterdir())
    assert before == {path: path.read_bytes() for path in made.iterdir()}
