"""The file of a store: what is written is read, and what is damaged is refused in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from kfe_fx.curvature import Store
from kfe_fx.curvature.store_file import _checksum
from kfe_fx.errors import BadFile

from .dense import FAMILIES, case, store

KINDS = ("diagonal", "kfac", "ekfac")


def refused(path: Path) -> str:
    """Return the one line that a file is refused with."""
    with pytest.raises(BadFile) as caught:
        Store.load(path)
    told = str(caught.value)
    assert "\n" not in told
    assert told.startswith(f"{path}: ")
    return told


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_saved_is_loaded(name: str, tmp_path: Path) -> None:
    made, held = case(name), store(name)
    path = held.save(tmp_path / "curvature.safetensors")
    found = Store.load(str(path))
    assert (found.graph, found.weights, found.facts) == (held.graph, held.weights, held.facts)
    assert list(found.blocks) == list(held.blocks)
    for block_name, block in held.blocks.items():
        other = found.blocks[block_name]
        assert (other.kind, other.shape, other.parameters) == (block.kind, block.shape, block.parameters)
        assert (other.counts, other.fallback) == (block.counts, block.fallback)
        for mine, theirs in ((block.sums, other.sums), (block.basis, other.basis)):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    found.check(made.program, weights=True)
    for kind in KINDS:
        assert torch.equal(found.operator(made.program, kind).dense(), held.operator(made.program, kind).dense())
    assert sorted(os.listdir(tmp_path)) == ["curvature.safetensors"]
    assert found.merge(found).facts["examples"] == 2 * held.facts["examples"]


def test_equal_stores_give_equal_files(tmp_path: Path) -> None:
    held = store("conv2d")
    first, second = held.save(tmp_path / "a"), held.save(tmp_path / "b")
    again = Store.load(first).save(tmp_path / "c")
    assert first.read_bytes() == second.read_bytes() == again.read_bytes()


def test_a_file_that_cannot_be_written_leaves_what_is_there(tmp_path: Path) -> None:
    held = store("linear")
    with pytest.raises(BadFile, match="a folder or device is in the way"):
        held.save(tmp_path)
    with pytest.raises(BadFile, match="cannot be written"):
        held.save(tmp_path / "nowhere" / "curvature.safetensors")
    assert os.listdir(tmp_path) == []


def test_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "missing")
    assert "no regular file" in refused(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "no regular file" in refused(tmp_path / "pipe")
    for content in (b"", b"PK\x03\x04 something else", os.urandom(200), b"\xff" * 64):
        (tmp_path / "other").write_bytes(content)
        refused(tmp_path / "other")
    (tmp_path / "other").write_bytes(save({"weight": torch.zeros(2)}))
    assert "holds no curvature statistics" in refused(tmp_path / "other")


@settings(max_examples=60)
@given(st.data())
def test_a_damaged_file_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whichever byte is changed, wherever it is cut off."""
    folder = tmp_path_factory.mktemp("damaged")
    content = bytearray(store("linear").save(folder / "whole").read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        # the first bytes are the header's, where most can go wrong
        place = data.draw(st.integers(0, 1200) | st.integers(0, len(content) - 1))
        content[place] ^= data.draw(st.integers(1, 255))
    (folder / "damaged").write_bytes(content)
    refused(folder / "damaged")


Change = Callable[[dict[str, Any], dict[str, Tensor]], Any]
HOSTILE: dict[str, Change] = {
    "another format": lambda told, _: told["facts"].update(format=99),
    "no format": lambda told, _: told["facts"].pop("format"),
    "facts are a list": lambda told, _: told.update(facts=[]),
    "no blocks": lambda told, _: told.pop("blocks"),
    "blocks are a number": lambda told, _: told.update(blocks=3),
    "a block is a text": lambda told, _: told["blocks"].append("layer"),
    "a block twice": lambda told, _: told["blocks"].append(told["blocks"][0]),
    "a shape of two": lambda told, _: told["blocks"][0].update(shape=[1, 2]),
    "a shape of texts": lambda told, _: told["blocks"][0].update(shape=["1", "2", "3"]),
    "a negative size": lambda told, _: told["blocks"][0].update(shape=[1, -3, 5]),
    "another shape": lambda told, _: told["blocks"][0].update(shape=[1, 7, 7]),
    "a kind of its own": lambda told, _: told["blocks"][0].update(kind="dense"),
    "counts are a list": lambda told, _: told["blocks"][0].update(counts=[1]),
    "a negative count": lambda told, _: told["blocks"][0]["counts"].update(rows=-1),
    "a count that is a text": lambda told, _: told["blocks"][0]["counts"].update(rows="many"),
    "an unknown count": lambda told, _: told["blocks"][0]["counts"].update(others=1),
    "parameters are a text": lambda told, _: told["blocks"][0].update(parameters="layer.weight"),
    "a hash that is a number": lambda told, _: told.update(graph=3),
    "more fields": lambda told, _: told.update(extra=1),
    "an unknown tensor": lambda _, tensors: tensors.update({"0/sums/Z": torch.zeros(1)}),
    "a tensor of no block": lambda _, tensors: tensors.update({"99/sums/S": torch.zeros(1)}),
    "a tensor without a place": lambda _, tensors: tensors.update(S=torch.zeros(1)),
    "a tensor of a negative block": lambda _, tensors: tensors.update({"-1/sums/S": torch.zeros(1)}),
    "a tensor of integers": lambda _, tensors: tensors.update({"0/sums/S": tensors["0/sums/S"].long()}),
    "a tensor of another shape": lambda _, tensors: tensors.update({"0/sums/S": torch.zeros(2, 2)}),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_what_makes_no_sense_is_refused(fault: str, tmp_path: Path) -> None:
    """Also where the checksum is right: whoever changes the file can write a new one."""
    path = store("linear").save(tmp_path / "curvature")
    tensors = load(path.read_bytes())
    length = int.from_bytes(path.read_bytes()[:8], "little")
    metadata = json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]
    told = json.loads(metadata["kfe_fx_curvature"].partition(" ")[2])
    HOSTILE[fault](told, tensors)
    words = json.dumps(told)
    path.write_bytes(save(tensors, {"kfe_fx_curvature": f"{_checksum(words, tensors)} {words}"}))
    assert "damaged" in refused(path)


@pytest.mark.parametrize("words", ["", "[]", "{", "null", '{"graph": NaN}', '{"graph": 1, "graph": 2}', "[" * 5000])
def test_metadata_that_are_no_json_are_refused(words: str, tmp_path: Path) -> None:
    path = tmp_path / "curvature"
    path.write_bytes(save({}, {"kfe_fx_curvature": f"{_checksum(words, {})} {words}"}))
    assert "damaged" in refused(path)
