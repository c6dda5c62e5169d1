"""Pointwise operations: dims broadcast and merge. What is pointwise is read from the operation's tag."""

from __future__ import annotations

import operator

import torch
from torch import fx

from kfe_fx import taps
from kfe_fx.labels.registry import overloads, rule
from kfe_fx.labels.tracker import Dims, Layers, Tracker

aten = torch.ops.aten

# pointwise, but without the tag in torch 2.13
_UNTAGGED = overloads(
    aten,
    *[
        "hardswish",
        "hardsigmoid",
        "hardtanh",
        "relu6",
        "dropout",
        "feature_dropout",
        "alpha_dropout",
        "feature_alpha_dropout",
        "to.dtype",
        "to.device",
        "to.dtype_layout",
        "to.other",
        "_to_copy",
        "contiguous",
        "clone",
        "detach",
        "alias",
        "rrelu",
        "silu",
        "celu",
        "selu",
        "mish",
        "copy",
        "masked_fill.Scalar",
        "masked_fill.Tensor",
        "where.self",
        "where.ScalarSelf",
        "where.ScalarOther",
        "where.Scalar",
        "bernoulli",
        "bernoulli.p",
        "float_power.Tensor_Scalar",
        "logit",
        "nan_to_num",
        "square",
        "clip",
        "softsign",
        "log_sigmoid",
        "tanhshrink",
        "hardshrink",
    ],
)


def is_pointwise(target: object) -> bool:
    """Tell whether an operation acts element by element with broadcasting."""
    if target in _UNTAGGED:
        return True
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def pointwise(tracker: Tracker, node: fx.Node) -> Dims:
    """Merge the dims of all tensor operands as broadcasting aligns them."""
    shape = tracker.shape(node)
    dims: list[Layers] = []
    operands = tracker.tensors(node)
    for axis, size in enumerate(shape):
        present = []
        for operand in operands:
            own = axis - len(shape) + len(tracker.shape(operand))
            if own >= 0 and tracker.shape(operand)[own] == size and size > 1:
                present.append(tracker.dims(operand)[own])
        joined = present[0] if present else ()
        for layers in present[1:]:
            joined = tracker.unify(joined, layers, node)
        dims.append(joined)
    return tuple(dims)


@rule(aten.prelu.default)
def prelu(tracker: Tracker, node: fx.Node) -> Dims:
    """Trace one slope per channel (dim 1), or one for all."""
    inputs, weight = node.args[:2]
    dims = list(tracker.dims(inputs))
    if tracker.shape(weight)[0] > 1:
        dims[1] = tracker.unify(dims[1], tracker.dims(weight)[0], node)
    return tuple(dims)


@rule(taps.TAP, *overloads(aten, "type_as.default"))
def first_only(tracker: Tracker, node: fx.Node) -> Dims:
    """Trace an operation whose other operand gives only a type; a tap is the identity."""
    return tracker.dims(node.args[0])


@rule(operator.getitem)
def item(tracker: Tracker, node: fx.Node) -> Dims:
    """Take one of several outputs."""
    return tracker.values[node.args[0]][node.args[1]]  # type: ignore[index]
