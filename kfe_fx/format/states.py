"""Check the section "states" of a program file: what is left of resized states of recurrent layers."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from kfe_fx.format.fields import Malformed, integer, items, record, table

LARGEST = 2**31


def check_states(value: Any, examples: dict[str, torch.Tensor]) -> None:
    """Check ``{"inputs": {name: {"width", "kept"}}, "outputs": {place: ...}}`` against the example inputs.

    Raises:
        Malformed: it is not such a record, or does not fit the inputs.
    """
    where = "sections.states"
    if not table(value, where):
        return
    sides = record(value, where, ("inputs", "outputs"))
    for name, entry in table(sides["inputs"], where).items():
        kept = _kept(entry, where)
        example = examples.get(name)
        if example is None or not example.dim() or example.shape[-1] != kept:
            raise Malformed(f"{where}: {name[:40]!r} is not an input of {kept} units")
    for place, entry in table(sides["outputs"], where).items():
        if not (place.isascii() and place.isdigit()):
            raise Malformed(f"{where}: {place[:40]!r} is not the place of an output")
        _kept(entry, where)


def _kept(value: Any, where: str) -> int:
    found = record(value, where, ("width", "kept"))
    width = integer(found["width"], where, 1, LARGEST)
    kept = [integer(index, where, 0, width - 1) for index in items(found["kept"], where)]
    if any(after <= before for before, after in pairwise(kept)):
        raise Malformed(f"{where}: the indices that are kept must ascend")
    return len(kept)
