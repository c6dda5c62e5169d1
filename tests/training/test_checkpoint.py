"""Checkpoint files: read without running code, and refused in one line where they are not what they should be."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfe_fx
from kfe_fx.data.dataset import ArrayData
from kfe_fx.errors import BadFile
from kfe_fx.frontend.capture import capture
from kfe_fx.program import Program
from kfe_fx.training.checkpoint import data_hash, load_checkpoint


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return capture(nn.Linear(3, 2), torch.randn(2, 3))


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    return x, (x[:, 0] > 0).long()


@pytest.fixture(scope="module")
def written(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run of two epochs."""
    place = tmp_path_factory.mktemp("run") / "run.checkpoint"
    kfe_fx.train(program.copy(), data(), optimizer="adamw", epochs=2, batch_size=8, threads=1, checkpoint=place)
    return place


def test_it_holds_plain_values(written: Path):
    found = load_checkpoint(written)
    assert found["run"]["settings"]["optimizer"] == "adamw"
    assert found["record"]["epochs"] == 2
    assert set(found["tensors"]) == {"weight", "bias"}
    assert list(written.parent.iterdir()) == [written]


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("ran"),)  # pyright: ignore[reportReturnType]


def test_files_that_are_none(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    whole = written.read_bytes()
    torch.save(nn.Linear(2, 2).state_dict(), "state.pt")
    torch.save({"format": "kfe-fx training checkpoint", "version": 99}, "newer.pt")
    for name, content in {
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "foreign": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "text": b"hello",
        "hostile": pickle.dumps(Hostile()),
    }.items():
        Path(name).write_bytes(content)
    before = sorted(Path().iterdir())
    for name in ("empty", "cut", "foreign", "text", "hostile", "state.pt", "newer.pt", "gone"):
        with pytest.raises(BadFile, match=name) as caught:
            load_checkpoint(Path(name))
        assert "\n" not in str(caught.value)
    assert sorted(Path().iterdir()) == before


def test_parts_that_are_missing_or_do_not_fit(program: Program, written: Path, tmp_path: Path):
    def spoil(change: Any) -> None:
        document = torch.load(written, weights_only=True)
        change(document)
        torch.save(document, tmp_path / "bad.checkpoint")

    for change in (
        lambda d: d.pop("run"),
        lambda d: d.pop("random"),
        lambda d: d["record"].pop("losses"),
        lambda d: d["tensors"].update(weight=torch.zeros(5, 5)),
        lambda d: d["tensors"].update(other=torch.zeros(1)),
        lambda d: d["optimizer"]["param_groups"].pop(),
        lambda d: d["random"][0].update(cpu=torch.zeros(3, dtype=torch.uint8)),
    ):
        spoil(change)
        with pytest.raises(BadFile, match="the checkpoint is damaged"):
            kfe_fx.train(
                program.copy(), data(), optimizer="adamw", epochs=2, batch_size=8, threads=1, resume=True,
                checkpoint=tmp_path / "bad.checkpoint",
            )  # fmt: skip


def test_hashes_of_data():
    x, y = data()
    one = data_hash(ArrayData((x,), y))
    assert one == data_hash(ArrayData((x.clone(),), y.clone()))
    assert one != data_hash(ArrayData((x + 1e-7,), y))
    assert one != data_hash(ArrayData((x,), 1 - y))
    assert one != data_hash(ArrayData({"x": x}, y))
    assert data_hash([1, 2]) == data_hash([3, 4]) != data_hash([1])
    assert data_hash(None) == data_hash(None)
