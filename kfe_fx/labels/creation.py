"""Tensors made in the graph: fills are alike along every dim and take any width; counters do not."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from kfe_fx.labels.registry import overloads, relocator, rule
from kfe_fx.labels.relocate import Relocation
from kfe_fx.labels.tracker import Dims, Tracker

aten = torch.ops.aten

_LIKE = overloads(
    aten,
    *[
        "zeros_like",
        "ones_like",
        "full_like",
        "empty_like",
        "rand_like",
        "randn_like",
        "fill.Scalar",
        "fill.Tensor",
        "zero",
    ],
)
_SIZED = {  # operation -> place of its size argument
    **dict.fromkeys(overloads(aten, *["zeros", "ones", "empty.memory_format", "full", "rand", "randn"]), 0),
    **dict.fromkeys(overloads(aten, *["new_zeros", "new_ones", "new_empty", "new_full"]), 1),
}
_COUNTERS = overloads(
    aten,
    *[
        "arange",
        "arange.start",
        "arange.start_step",
        "linspace",
        "scalar_tensor",
        "eye",
        "eye.m",
        "one_hot",
        "randint",
        "randint.low",
    ],
)


@rule(*_LIKE, *_SIZED)
def filled(tracker: Tracker, node: fx.Node) -> Dims:
    """Trace a fill: every dim takes the width of what it meets."""
    return tuple(tracker.free(size) for size in tracker.shape(node))


@rule(*_COUNTERS)
def counted(tracker: Tracker, node: fx.Node) -> Dims:
    """Trace a counter or a tensor of values by position: its dims stay."""
    return tuple(() for _ in tracker.shape(node))


@relocator(*_SIZED)
def resize(moved: Relocation, node: fx.Node) -> None:
    """Rewrite the size of a fill."""
    place = _SIZED[node.target]
    sizes: list[Any] = list(node.args[place])  # type: ignore[arg-type]
    for dim in range(len(sizes)):
        if moved.changed(node, dim):
            sizes[dim] = moved.size_after(node, dim)
    node.update_arg(place, sizes)
