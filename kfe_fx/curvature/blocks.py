"""Blocks: which entries of which parameters share one Kronecker structure, and what is left out.

Each parameter is claimed once: its entries belong to blocks with Kronecker factors, or to one with a diagonal, or it is
named as left out. Weights that are used several times (tied) have one block; a packed weight has one per part.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from kfe_fx import taps
from kfe_fx.curvature.operands import Operand, canonical_names
from kfe_fx.curvature.pairings import Pairing
from kfe_fx.curvature.sites import Look, Site
from kfe_fx.program import Program, copy_graph
from kfe_fx.recurrent.opened import open_layers

__all__ = ["Block", "Blocks", "LeftOut", "Site", "Use", "find_blocks", "opened"]


@dataclass(frozen=True)
class Use:
    """A block's part in one site.

    ``column``: this use has the bias that is the block's last column (True), or has none (False), or the block has no
    such column (None). ``transposed``: the weight is used as its transpose.
    """

    site: Site
    operand: Operand
    column: bool | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Block:
    """Entries of parameters with one structure, as a matrix of [K, o, i] (K groups, each with factors of its own).

    ``kind`` is "kronecker", or "diagonal" for what has no pairs of rows: then K = o = 1. ``entries`` tells where the
    weight's part of the matrix lies in the parameter (None: all of it, in its order), ``bias_entries`` the last column.
    ``uses`` are by mode ("eval", "train").
    """

    name: str
    kind: str
    shape: tuple[int, int, int]
    weight: str
    bias: str | None = None
    uses: dict[str, tuple[Use, ...]] = field(default_factory=dict, repr=False)
    entries: Tensor | None = field(default=None, repr=False)
    bias_entries: Tensor | None = field(default=None, repr=False)
    pairing: Pairing | None = field(default=None, repr=False)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters it holds entries of."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def partial(self) -> bool:
        """Whether it holds some entries of a parameter, and not all."""
        return self.entries is not None or self.bias_entries is not None

    @property
    def batched(self) -> dict[str, bool]:
        """By mode, whether all uses tell the examples of a batch apart."""
        return {mode: all(use.site.batched for use in uses) for mode, uses in self.uses.items()}

    def matrix(self, values: dict[str, Tensor]) -> Tensor:
        """Gather [K, o, i] from tensors of the parameters' shapes, by name."""
        if self.kind == "diagonal":
            return values[self.weight].reshape(1, 1, -1)
        weight = values[self.weight]
        if self.entries is None:
            assert self.pairing is not None
            made = self.pairing.matrix(weight)
        else:
            made = weight.reshape(-1)[self.entries.to(weight.device)]
        if self.bias is None:
            return made
        given = values[self.bias].reshape(-1)
        column = (
            given.reshape(self.shape[:2]) if self.bias_entries is None else given[self.bias_entries.to(given.device)]
        )
        return torch.cat([made, column.unsqueeze(-1)], -1)

    def put(self, matrix: Tensor, values: dict[str, Tensor]) -> None:
        """Write [K, o, i] into tensors of the parameters' shapes, in place: undoes ``matrix``."""
        if self.kind == "diagonal":
            values[self.weight].copy_(matrix.reshape(values[self.weight].shape))
            return
        weight, target = matrix if self.bias is None else matrix[..., :-1], values[self.weight]
        if self.entries is None:
            assert self.pairing is not None
            target.copy_(self.pairing.tensor(weight, tuple(target.shape)))
        else:
            _write(target, self.entries, weight)
        if self.bias is not None:
            column, target = matrix[..., -1], values[self.bias]
            if self.bias_entries is None:
                target.copy_(column.reshape(target.shape))
            else:
                _write(target, self.bias_entries, column)


def _write(target: Tensor, entries: Tensor, values: Tensor) -> None:
    """Set entries of a tensor, numbered in row-major order whatever its strides."""
    flat = target.reshape(-1)  # a copy, or not
    flat[entries.reshape(-1).to(target.device)] = values.reshape(-1)
    target.copy_(flat.view(target.shape))


@dataclass(frozen=True)
class LeftOut:
    """A parameter that no statistics exist for, and why."""

    parameter: str
    reason: str


@dataclass(frozen=True)
class Blocks:
    """All blocks of a Program, the sites to tap by mode, and what is left out."""

    blocks: tuple[Block, ...]
    sites: dict[str, tuple[Site, ...]]
    left_out: tuple[LeftOut, ...]

    def taps(self, mode: str) -> list[tuple[str, list[str]]]:
        """Return what ``taps.insert`` takes."""
        return [(site.name, [node.name for node in site.inputs]) for site in self.sites.get(mode, ())]


def opened(graph: fx.Graph, wanted: Collection[str] | None = None) -> fx.Graph:
    """Return a copy of a graph in the form that taps are set on: without any, recurrent layers open.

    Names of nodes are the same each time. With ``wanted`` those layers alone are open that get one of these names.
    """
    made = copy_graph(graph)
    if taps.tapped(made):
        taps.strip(made)
        made = copy_graph(made)  # a graph remembers names that it had
    open_layers(made, wanted)
    return made


def find_blocks(program: Program) -> Blocks:
    """Find the blocks of all parameters of a Program, with or without taps in its graphs."""
    from kfe_fx.curvature.claims import Claims

    canonical = canonical_names(program)
    named = dict(program.module().named_parameters(remove_duplicate=False))
    own = {name: value for name, value in named.items() if canonical[name] == name}
    reasons = {name: f"is {_kind(value)}" for name, value in own.items() if not value.is_floating_point()}
    trained = own.keys() - reasons.keys()
    sites: dict[str, tuple[Site, ...]] = {}
    idle: dict[str, str] = {}
    for mode in sorted(program.graphs):
        graph = opened(program.graphs[mode])
        look = Look(program, graph, mode, trained)
        sites[mode] = tuple(look.sites(reasons.setdefault))
        idle |= look.idle
    blocks = Claims(program, sites, [name for name in own if name not in reasons]).blocks()
    claimed = {name for block in blocks for name in block.parameters}
    reasons = dict.fromkeys(own, "never reaches an output") | idle | reasons
    left = tuple(LeftOut(name, reasons[name]) for name in own if name not in claimed)
    return Blocks(tuple(blocks), sites, left)


def _kind(value: Tensor) -> str:
    return "complex" if value.is_complex() else f"of whole numbers ({str(value.dtype).removeprefix('torch.')})"
