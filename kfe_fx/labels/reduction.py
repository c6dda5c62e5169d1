"""Reductions: a label vanishes over a dim that is summed; a mean is compensated; what ranks or normalises freezes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from kfe_fx.labels.registry import overloads, relocator, rule
from kfe_fx.labels.relocate import Relocation
from kfe_fx.labels.tracker import Dims, Tracker
from kfe_fx.program import argument

aten = torch.ops.aten

# zero adds nothing to these, so a removed unit may be missing from them
_SUMS = overloads(aten, "sum.default", "sum.dim_IntList", "mean.default", "mean.dim", "linalg_vector_norm.default")
_NORMS = overloads(aten, "norm.ScalarOpt_dim", "norm.Scalar", "norm.ScalarOpt_dim_dtype")
_EXTREMES = overloads(
    aten,
    *[
        "amax",
        "amin",
        "max",
        "min",
        "max.dim",
        "min.dim",
        "argmax",
        "argmin",
        "prod",
        "prod.dim_int",
        "var.dim",
        "var.correction",
        "std.dim",
        "std.correction",
        "var_mean.correction",
        "std_mean.correction",
        "var",
        "std",
        "all.dim",
        "any.dim",
        "all",
        "any",
        "median.dim",
        "mode",
        "logsumexp",
        "aminmax",
        "kthvalue",
    ],
)
_SCANS = overloads(
    aten,
    *[
        "cumsum",
        "cumprod",
        "logcumsumexp",
        "cummax",
        "cummin",
        "softmax.int",
        "log_softmax.int",
        "_softmax",
        "sort",
        "topk",
        "flip",
    ],
)


def reduced_dims(tracker: Tracker, node: fx.Node) -> tuple[tuple[int, ...], bool]:
    """Return the dims that a reduction runs over and whether they stay with size 1."""
    schema = node.target._schema  # type: ignore[union-attr]
    rank = len(tracker.shape(node.args[0]))
    named = {argument.name: place for place, argument in enumerate(schema.arguments)}
    dim: Any = argument(node, named["dim"], "dim") if "dim" in named else None
    keep = bool(argument(node, named["keepdim"], "keepdim", False)) if "keepdim" in named else False
    if dim is None or dim == []:
        return tuple(range(rank)), keep
    dims = dim if isinstance(dim, list | tuple) else [dim]
    return tuple(int(each) % max(rank, 1) for each in dims), keep


def _left(tracker: Tracker, node: fx.Node, over: tuple[int, ...], keep: bool) -> Dims:
    dims = tracker.dims(node.args[0])
    return tuple(() if axis in over else layers for axis, layers in enumerate(dims) if keep or axis not in over)


@rule(*_SUMS, *_NORMS)
def summed(tracker: Tracker, node: fx.Node) -> Dims:
    """Trace a sum, mean or p-norm (p > 0): a removed unit is zero and adds nothing."""
    over, keep = reduced_dims(tracker, node)
    if node.args[0] in tracker.static or _order(tracker, node) <= 0:
        for axis in over:
            tracker.freeze(tracker.dims(node.args[0])[axis], node, "is reduced over")
    return _left(tracker, node, over, keep)


def _order(tracker: Tracker, node: fx.Node) -> float:
    if node.target in _NORMS or node.target is aten.linalg_vector_norm.default:
        order = argument(node, 1, "ord" if "linalg" in str(node.target) else "p", 2)
        return float(2 if order is None else order)
    return 1.0


@rule(*_EXTREMES)
def ranked(tracker: Tracker, node: fx.Node) -> Any:
    """Freeze the dims that an extreme, a product or a variance runs over."""
    over, keep = reduced_dims(tracker, node)
    for axis in over:
        tracker.freeze(tracker.dims(node.args[0])[axis], node, "is reduced over by an operation that sees zeros")
    dims = _left(tracker, node, over, keep)
    outputs = tracker.fakes[node]
    return [dims for _ in outputs] if isinstance(outputs, list | tuple) else dims


@rule(*(each for each in _SCANS if each is not aten.flip.default))
def scanned(tracker: Tracker, node: fx.Node) -> Any:
    """Freeze the dim that a softmax, a running sum or a sort runs over; the shape stays (top-k apart)."""
    dims = list(tracker.dims(node.args[0]))
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    place = names.index("dim")
    dim = int(argument(node, place, "dim", -1)) % max(len(dims), 1)
    if dims:
        tracker.freeze(dims[dim], node, "is normalised or ordered over")
        dims[dim] = ()
    outputs = tracker.fakes[node]
    return [tuple(dims) for _ in outputs] if isinstance(outputs, list | tuple) else tuple(dims)


@relocator(*overloads(aten, "mean.default", "mean.dim"))
def compensate(moved: Relocation, node: fx.Node) -> None:
    """Keep a mean over removed units what it was: mean * left / before, since the removed ones were zero."""
    over, _ = reduced_dims(moved.tracker, node)
    before = after = 1
    for axis in over:
        before *= moved.size_before(node.args[0], axis)
        after *= moved.size_after(node.args[0], axis)
    if before == after:
        return
    with moved.graph.inserting_after(node):
        scaled = moved.graph.call_function(aten.mul.Tensor, (node, after / before))
    scaled.meta = dict(node.meta)
    node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
