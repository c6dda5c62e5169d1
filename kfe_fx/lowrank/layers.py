"""What can be decomposed: linear layers and plain convolutions, as the one to three operations that they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kfe_fx.cost.multiplications import aten
from kfe_fx.cost.steps import matches
from kfe_fx.errors import UsageError

LINEAR = aten.linear.default

Step = tuple[str, int, int]  # "before", "core" or "after", its inputs and its outputs


@dataclass(frozen=True)
class Op:
    """One weight and the nodes that apply it, by name and graph; a layer that is called twice has two in each."""

    weight: str
    shape: tuple[int, ...]
    nodes: Mapping[str, tuple[str, ...]]

    @property
    def pointwise(self) -> bool:
        """Whether it is a matrix at each position."""
        return math.prod(self.shape[2:]) == 1


@dataclass(frozen=True)
class Layer:
    """A layer as up to three operations: ``before`` (C_in -> c), ``core``, ``after`` (r -> C_out).

    The outer two are matrices at each position; a layer that nobody decomposed is its core alone. Of a convolution of
    more than one tap the core lies between the two and ``columns`` and ``rows`` count its input and output channels. Of
    a linear layer or a 1x1 convolution two factors are enough, ``core`` and ``after``: what has c of its columns and r
    of its rows left has the rank k = min(c, r), and k (C_in + C_out) is never more than c C_in + r c + r C_out.
    ``positions`` counts, by operation, where it is applied at batch 1 in the evaluation graph.
    """

    name: str
    core: Op
    before: Op | None
    after: Op | None
    positions: Mapping[str, int]
    last: bool = False

    @property
    def ops(self) -> tuple[Op, ...]:
        """The operations that there are, in order."""
        return tuple(op for op in (self.before, self.core, self.after) if op is not None)

    @property
    def pointwise(self) -> bool:
        """Whether it is a matrix at each position."""
        return self.core.pointwise

    @property
    def kernel(self) -> tuple[int, ...]:
        """Sizes of the kernel of the core, () of a linear layer."""
        return self.core.shape[2:]

    @property
    def taps(self) -> int:
        """How many elements a kernel of the core has."""
        return math.prod(self.kernel)

    @property
    def measured(self) -> Op:
        """The operation whose statistics tell what can go: the core, of a matrix in two factors the last one."""
        return self.after if self.pointwise and self.after is not None else self.core

    @property
    def columns(self) -> int:
        """How many columns may stay, the most that ``c`` can be."""
        return self.measured.shape[1]

    @property
    def rows(self) -> int:
        """How many rows may stay, the most that ``r`` can be."""
        return self.measured.shape[0]

    @property
    def decomposed(self) -> bool:
        """Whether it is in factors already."""
        return len(self.ops) > 1

    def steps(self, c: int, r: int) -> list[Step]:
        """List the operations when ``c`` columns and ``r`` rows stay, with their inputs and outputs."""
        first, last = self.ops[0].shape[1], self.ops[-1].shape[0]
        if self.pointwise:
            if self.after is None and (c, r) == (self.columns, self.rows):
                return [("core", first, last)]
            return [("core", first, min(c, r)), ("after", min(c, r), last)]
        made: list[Step] = [("core", c, r)]
        if self.before is not None or c < self.columns:
            made.insert(0, ("before", first, c))
        if self.after is not None or r < self.rows:
            made.append(("after", r, last))
        return made

    def weights(self, c: int, r: int) -> int:
        """Count the weights when ``c`` columns and ``r`` rows stay; the bias is not among them."""
        return sum(each * made * self._taps(role) for role, each, made in self.steps(c, r))

    def macs(self, c: int, r: int) -> int:
        """Count the multiply-accumulates at batch 1 when ``c`` columns and ``r`` rows stay."""
        return sum(self.positions[role] * each * made * self._taps(role) for role, each, made in self.steps(c, r))

    def _taps(self, role: str) -> int:
        return self.taps if role == "core" else 1


@dataclass(frozen=True)
class Found:
    """The layers of a Program, and by name of the others why they are none."""

    layers: tuple[Layer, ...]
    refused: Mapping[str, str]

    def matching(self, glob: str) -> Found:
        """Return what a glob means: names of layers, of their modules or of their weights.

        Raises:
            UsageError: it means nothing here.
        """
        layers = tuple(
            layer
            for layer in self.layers
            if matches(f"{layer.name}.weight", glob) or any(matches(op.weight, glob) for op in layer.ops)
        )
        refused = {name: why for name, why in self.refused.items() if matches(f"{name}.weight", glob)}
        if not layers and not refused:
            raise UsageError(f"layers={glob!r} matches no layer with weights; kfe-fx inspect lists their names")
        return Found(layers, refused)


def base_of(weight: str) -> str:
    """Return the name of the layer that a weight belongs to: "conv" for "conv.weight", else the weight's own."""
    path, _, leaf = weight.rpartition(".")
    return path if path and leaf == "weight" else weight


def pointwise_target(kernel: tuple[int, ...]) -> Any:
    """Return the operation that applies a matrix at each position, for a layer with a kernel of this rank."""
    return LINEAR if not kernel else getattr(aten, f"conv{len(kernel)}d").default
