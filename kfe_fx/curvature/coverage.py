"""Completeness: for each parameter which statistics exist, in which block, or why there are none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from kfe_fx.curvature.blocks import Block, Blocks, Use, find_blocks, opened
from kfe_fx.curvature.layout import rows
from kfe_fx.curvature.operands import canonical_names
from kfe_fx.curvature.statistics import empty_factors
from kfe_fx.labels.analysis import analysis_sizes
from kfe_fx.program import Program
from kfe_fx.shapes import propagate_all

KRONECKER, DIAGONAL, LEFT_OUT = "kronecker", "diagonal", "left out"


@dataclass(frozen=True)
class CoveredBlock:
    """What the statistics of one block are like.

    ``shape`` is [K, o, i]; ``A`` and ``G`` the shapes of its factors (a diagonal has two dims), None for a diagonal
    block. ``positions`` is R, how many rows each example gives at the sizes of the analysis. ``batched`` says by mode
    whether the examples of a batch are told apart; where they are not, they are taken one at a time.
    """

    name: str
    kind: str
    shape: tuple[int, int, int]
    A: tuple[int, ...] | None
    G: tuple[int, ...] | None
    positions: int
    uses: int
    batched: dict[str, bool]

    def factors(self) -> str:
        """Write the sizes of the factors, as in "A 10x10, G 8 (diagonal)"."""
        if self.A is None or self.G is None:
            return "-"
        groups = f"{self.shape[0]} x " if self.shape[0] > 1 else ""
        told = (f"{key} {_factor(size)}" for key, size in (("A", self.A), ("G", self.G)))
        return f"{groups}({', '.join(told)})" if groups else ", ".join(told)

    def pace(self) -> str:
        """Say how examples are taken: "batched", "one at a time", or which mode does which."""
        if len(set(self.batched.values())) <= 1:
            return "batched" if all(self.batched.values()) else "one at a time"
        return "one at a time in " + ", ".join(mode for mode, batched in self.batched.items() if not batched)


@dataclass(frozen=True)
class CoveredParameter:
    """One parameter: ``status`` is "kronecker", "diagonal" or "left out"; ``told`` says it in words.

    ``owner`` is false where another row stands for its statistics: a bias that is a column of its weight's block, a
    second name of a tied parameter.
    """

    name: str
    shape: tuple[int, ...]
    status: str
    told: str
    blocks: tuple[str, ...] = ()
    owner: bool = True


@dataclass(frozen=True)
class Coverage:
    """The completeness table of a Program."""

    parameters: tuple[CoveredParameter, ...]
    blocks: dict[str, CoveredBlock] = field(default_factory=dict)
    entries: dict[str, int] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """The share of all entries of parameters that statistics exist for."""
        total = sum(self.entries.values())
        return (total - self.entries[LEFT_OUT]) / total if total else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the table as plain values."""
        return {
            "entries": dict(self.entries),
            "covered": self.share,
            "parameters": [
                {
                    "parameter": row.name,
                    "shape": list(row.shape),
                    "status": row.status,
                    "statistics": row.told,
                    "blocks": list(row.blocks),
                }
                for row in self.parameters
            ],
            "blocks": [
                {
                    "block": block.name,
                    "kind": block.kind,
                    "shape": list(block.shape),
                    "A": None if block.A is None else list(block.A),
                    "G": None if block.G is None else list(block.G),
                    "positions": block.positions,
                    "uses": block.uses,
                    "batched": dict(block.batched),
                }
                for block in self.blocks.values()
            ],
        }


def cover(program: Program, blocks: Blocks | None = None) -> Coverage:
    """Say for each parameter of a Program which statistics exist; ``blocks`` are those of ``find_blocks``, if known."""
    found = find_blocks(program) if blocks is None else blocks
    sizes = _Sizes(program)
    described = {block.name: _describe(block, sizes) for block in found.blocks}
    reasons = {left.parameter: left.reason for left in found.left_out}
    canonical = canonical_names(program)
    table: list[CoveredParameter] = []
    entries: dict[str, int] = {KRONECKER: 0, DIAGONAL: 0, LEFT_OUT: 0}
    for name, value in program.module().named_parameters(remove_duplicate=False):
        row = _row(name, canonical[name], tuple(value.shape), found, reasons)
        table.append(row)
        if canonical[name] == name:
            entries[row.status] += value.numel()
    return Coverage(tuple(table), described, entries)


def _row(name: str, canonical: str, shape: tuple[int, ...], found: Blocks, reasons: dict[str, str]) -> CoveredParameter:
    own = [block for block in found.blocks if block.weight == canonical]
    owners = [block for block in found.blocks if block.bias == canonical]
    names = tuple(block.name for block in (*own, *owners))
    if not names:
        reason = reasons.get(canonical, "not of a floating-point type")
        return CoveredParameter(name, shape, LEFT_OUT, f"left out: {reason}")
    status = (own or owners)[0].kind
    if name != canonical:
        return CoveredParameter(name, shape, status, f"by block {names[0]} (tied to {canonical})", names, False)
    if not own:
        told = f"by block {names[0]} (bias of)" if len(names) == 1 else f"by {len(names)} blocks (bias of)"
        return CoveredParameter(name, shape, status, told, names, False)
    if status == DIAGONAL:
        return CoveredParameter(name, shape, status, "diagonal", names)
    sizes = list(dict.fromkeys(str(list(block.shape)) for block in own))
    shown = ", ".join(sizes[:2]) + (", ..." if len(sizes) > 2 else "")
    kinds = f"Kronecker {shown}" if len(own) == 1 else f"{len(own)} Kronecker {shown}"
    uses = max(len(block.uses[mode]) for block in own for mode in block.uses)
    return CoveredParameter(name, shape, status, f"{kinds}{f', {uses} uses' * (uses > 1)}", names)


def _describe(block: Block, sizes: _Sizes) -> CoveredBlock:
    mode = "eval" if "eval" in block.uses else next(iter(block.uses))
    uses = block.uses[mode]
    if block.kind == DIAGONAL:
        return CoveredBlock(block.name, block.kind, block.shape, None, None, 1, len(uses), block.batched)
    empty = empty_factors(block, torch.empty(0, device="meta"))
    positions = sum(sizes.positions(block, use, mode) for use in uses)
    return CoveredBlock(
        block.name,
        block.kind,
        block.shape,
        tuple(empty.A.shape),
        tuple(empty.G.shape),
        positions,
        len(uses),
        block.batched,
    )


class _Sizes:
    """Shapes of the nodes of a Program, with its batch of the analysis and with one example."""

    def __init__(self, program: Program) -> None:
        self.program = program.sharing()
        for mode, graph in self.program.graphs.items():
            self.program.graphs[mode] = opened(graph)
        self.sizes = analysis_sizes(program)
        self._known: dict[bool, dict[str, dict[str, Any]]] = {}

    def _shape(self, name: str, mode: str, *, alone: bool) -> torch.Tensor:
        if alone not in self._known:
            batch = dict.fromkeys(self.program.batch_axes(), 1) if alone else {}
            found = propagate_all(self.program, sorted(self.program.graphs), self.sizes | batch)
            self._known[alone] = {
                graph: {node.name: value for node, value in values.items()} for graph, values in found.items()
            }
        return self._known[alone][mode][name].to("meta")

    def positions(self, block: Block, use: Use, mode: str) -> int:
        """Count the rows that one example gives through one use."""
        site, pairing = use.site, use.site.pairing
        assert pairing is not None
        alone = not site.batched
        names = (pairing.data.name, site.name)
        batch = 1 if alone else next((self.sizes[axis] for axis in self.program.batch_axes()), 1)
        values = [self._shape(name, mode, alone=alone) for name in names]
        data, out = (
            rows(None if alone else site.layouts[name], value, batch) for name, value in zip(names, values, strict=True)
        )
        groups, high, wide = block.shape
        return pairing.positions(data[0], out[0], groups * (wide if use.transposed else high))


def _factor(size: tuple[int, ...]) -> str:
    return f"{size[1]}x{size[2]}" if len(size) == 3 else f"{size[1]} (diagonal)"
