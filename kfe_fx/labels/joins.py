"""Joins: where a constant can stand in for a branch, and where nothing at all can."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kfe_fx.errors import PlanError
from kfe_fx.labels.registry import overloads

aten = torch.ops.aten

SUMS = (aten.add.Tensor, aten.sub.Tensor)
JOINS = (*SUMS, aten.mul.Tensor, aten.div.Tensor)  # in-place ones are made pure when a network is captured
CATS = tuple(overloads(aten, "cat.default", "concat.default"))


class NoBranch(PlanError):
    """Say why units do not make a branch that a constant can replace."""


@dataclass(frozen=True)
class Join:
    """An operand that goes: number ``position`` of ``node`` (of a cat: of its list), which ``source`` computed.

    ``constant`` is the place in ``Branch.constants`` of what stands there instead; None: nothing does.
    """

    node: str
    position: int
    source: str
    constant: int | None


def operands(node: fx.Node) -> list[Any]:
    """Return the operands that ``Join.position`` counts."""
    return list(node.args[0] if node.target in CATS else node.args)  # type: ignore[arg-type]


def inputs_left(node: fx.Node, lost: Collection[int]) -> list[fx.Node]:
    """Return what a join still reads without its operands number ``lost``."""
    return [arg for place, arg in enumerate(operands(node)) if place not in lost and isinstance(arg, fx.Node)]


def where(node: fx.Node) -> str:
    """Return the line of the user's code that a node is from, or its name."""
    return str(node.meta.get("source") or node.name)


def check_join(node: fx.Node, position: int, value: Tensor, shapes: Iterable[Mapping[Any, Any]]) -> None:
    """Check that a constant can be an operand of a join in place of what had all dims.

    Raises:
        NoBranch: only the branch had some dim in full size, or a product would be zero whatever the input.
    """
    if node.target not in SUMS and not value.any():
        raise NoBranch(f"{where(node)}: {node.target} would take a factor of zero")
    other = node.args[1 - position]
    for fakes in shapes:
        beside = fakes[other].shape if isinstance(other, fx.Node) else ()
        if torch.broadcast_shapes(beside, value.shape) != fakes[node].shape:
            raise NoBranch(f"{where(node)}: the branch alone gives {node.target} its shape")


def is_needless(node: fx.Node, position: int, value: Tensor, fakes: Mapping[Any, Any]) -> bool:
    """Tell whether a join with a constant is its other operand: x + 0, x - 0, x * 1, x / 1."""
    plain = len(node.args) == 2 and not node.kwargs  # no alpha, no rounding mode
    commutes = node.target is aten.mul.Tensor or node.target is aten.add.Tensor
    if not plain or not (position == 1 or commutes) or not bool((value == (node.target not in SUMS)).all()):
        return False
    other, result = fakes[node.args[1 - position]], fakes[node]
    return other.shape == result.shape and other.dtype == result.dtype
