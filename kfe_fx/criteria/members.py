"""Which units own which rows and columns of a block of curvature, and on which side of it units are made or read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kfe_fx.curvature.blocks import Block, Blocks, find_blocks
from kfe_fx.curvature.pairings import Embedding, TransposedConvolution
from kfe_fx.labels.analysis import Analysis
from kfe_fx.program import Program

ROWS, COLUMNS = "rows", "columns"
_OTHER = {ROWS: COLUMNS, COLUMNS: ROWS}


@dataclass(frozen=True)
class Sets:
    """Sets of equally many lines (rows, or columns) of a block that go together.

    Set n holds the lines ``lines[n]`` of the group ``groups[n]``, all that the unit ``units[n]`` owns there.
    """

    groups: Tensor  # [n]
    lines: Tensor  # [n, r]
    units: Tensor  # [n]


@dataclass(frozen=True)
class Members:
    """The units of one block with Kronecker factors; see ``Block`` for its shape [K, o, i].

    Attributes:
        block: the block.
        rows: layers of unit ids [K, o], -1 for none; a row goes when the unit of any layer does.
        columns: layers of unit ids [K, i]; the column of the bias belongs to none.
        carried: layers of unit ids [K] that own whole groups, as in a depthwise convolution: what is read and what is
            made are the same units there, so that the block makes none of its own.
        outputs: the sides along which some use of the weight makes its output: the rows, but the columns of an
            embedding or a transposed convolution, or of a weight that is used as its transpose.
        inputs: the sides along which some use reads; a tied weight may have one side in both.
    """

    block: Block
    rows: tuple[np.ndarray, ...]
    columns: tuple[np.ndarray, ...]
    carried: tuple[np.ndarray, ...]
    outputs: frozenset[str]
    inputs: frozenset[str]

    def sets(self, side: str) -> Iterator[Sets]:
        """Yield the lines of one side ("rows" or "columns") by unit and group, those with equally many together."""
        found = []
        for ids in self.rows if side == ROWS else self.columns:
            groups, lines = np.nonzero(ids >= 0)
            found.append(np.stack([groups, ids[groups, lines], lines], 1))
        if not found:
            return
        table = np.unique(np.concatenate(found), axis=0)  # by group, then unit; a line of two layers counts once
        starts = np.flatnonzero(np.r_[True, (table[1:, :2] != table[:-1, :2]).any(1)] if len(table) else [])
        counts = np.diff(starts, append=len(table))
        for count in np.unique(counts):
            first = starts[counts == count]
            lines = table[first[:, None] + np.arange(count), 2]
            yield Sets(*map(torch.from_numpy, (table[first, 0], lines, table[first, 1])))


def find_members(program: Program, analysis: Analysis, blocks: Blocks | None = None) -> list[Members]:
    """Find the units of every block with Kronecker factors that evaluation uses.

    A dim of a parameter lies along the rows of a block if gathering the number of each index along it gives the same
    number all along each row, along the columns likewise; so no operation is known by name here.

    Args:
        program: the network.
        analysis: its units.
        blocks: those of ``find_blocks`` where they are known already.
    """
    found = find_blocks(program) if blocks is None else blocks
    wanted = [block for block in found.blocks if block.kind == "kronecker" and block.uses.get("eval")]
    return [_members(block, program, analysis) for block in wanted]


def gathered(block: Block, values: Tensor) -> Tensor:
    """Gather a tensor of the weight's shape as the block's matrix without the column of the bias, [K, o, i]."""
    if block.bias is None:
        return block.matrix({block.weight: values})
    groups, rows, _ = block.shape
    count = groups * rows if block.bias_entries is None else int(block.bias_entries.max()) + 1
    return block.matrix({block.weight: values, block.bias: values.new_zeros(count)})[..., :-1]


def _members(block: Block, program: Program, analysis: Analysis) -> Members:
    weight = program.tensor(block.weight)
    sides: dict[str, list[np.ndarray]] = {ROWS: [], COLUMNS: [], "carried": []}
    for dim, layers in enumerate(analysis.params.get(program.names_of(block.weight)[0], ())):
        if not layers:
            continue
        shape = [-1 if place == dim else 1 for place in range(weight.dim())]
        index = gathered(block, torch.arange(weight.shape[dim]).reshape(shape).expand(weight.shape)).numpy()
        side = _side(index)
        for layer in layers:
            ids = layer[index]
            if len(ids) > 1 and bool((ids == ids[:, :1, :1]).all()):
                sides["carried"].append(ids[:, 0, 0])
            elif side == ROWS:
                sides[ROWS].append(ids[..., 0])
            elif side == COLUMNS:
                bias = np.full((len(ids), int(block.bias is not None)), -1)
                sides[COLUMNS].append(np.concatenate([ids[:, 0], bias], 1))
    outputs = outputs_of(block)
    return Members(
        block,
        tuple(sides[ROWS]),
        tuple(sides[COLUMNS]),
        tuple(sides["carried"]),
        outputs,
        frozenset(_OTHER[side] for side in outputs),
    )


def _side(index: np.ndarray) -> str:
    """Return the side that a dim lies along, given the number [K, o, i] of each entry along it; "" for neither."""
    rows, columns = bool((index == index[..., :1]).all()), bool((index == index[:, :1]).all())
    if rows and columns:  # a part of a weight that has one index of the dim: all of it is one row, or one column
        return COLUMNS if index.shape[1] > index.shape[2] == 1 else ROWS
    return ROWS if rows else COLUMNS if columns else ""


def outputs_of(block: Block) -> frozenset[str]:
    """Return the sides of a block ("rows", "columns") along which evaluation uses of its weight make their outputs."""
    found = set()
    for use in block.uses["eval"]:
        swapped = isinstance(use.site.pairing, Embedding | TransposedConvolution)
        found.add(COLUMNS if swapped != use.transposed else ROWS)
    return frozenset(found)
