"""Convolutions of any rank: plain, grouped, depthwise, transposed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from kfe_fx.labels.registry import overloads, relocator, rule
from kfe_fx.labels.relocate import Relocation
from kfe_fx.labels.tracker import Dims, Layers, Tracker
from kfe_fx.program import argument

aten = torch.ops.aten

_CONVS = overloads(
    aten, "conv1d.default", "conv2d.default", "conv3d.default", "conv1d.padding", "conv2d.padding", "conv3d.padding"
)
_TRANSPOSED = overloads(aten, "conv_transpose1d.default", "conv_transpose2d.input", "conv_transpose3d.input")
WHOLE, POSITIONS = "whole groups", "positions in groups"


_GROUPS = 6  # the place of the argument in both kinds


def _groups(node: fx.Node) -> int | None:
    """Return the number of groups, or None where it depends on the batch (weights made for each example)."""
    groups = argument(node, _GROUPS, "groups", 1)
    return groups if isinstance(groups, int) else None


@rule(*_CONVS)
def convolution(tracker: Tracker, node: fx.Node) -> Dims | None:
    """Trace y[o] = sum_i w[o, i] * x[i] + b[o]; with groups, see ``_grouped``."""
    return _convolve(tracker, node, out_dim=0)


@rule(*_TRANSPOSED)
def transposed(tracker: Tracker, node: fx.Node) -> Dims | None:
    """Trace a transposed convolution: the weight is [in, out / groups, k...]."""
    return _convolve(tracker, node, out_dim=1)


def _convolve(tracker: Tracker, node: fx.Node, out_dim: int) -> Dims | None:
    inputs, weight = node.args[:2]
    groups = _groups(node)
    if groups is None:
        return None
    bias = argument(node, 2, "bias")
    dims, kernel = tracker.dims(inputs), tracker.dims(weight)
    channel = len(dims) - (len(kernel) - 1)
    for layers in kernel[2:]:
        tracker.freeze(layers, None)
    for layers in dims[channel + 1 :]:
        tracker.freeze(layers, node, "is convolved over")
    source = dims[channel]
    if groups == 1:
        into = kernel[1 - out_dim]
        if tracker.shape(inputs)[channel] > 1:
            tracker.unify(source, into, node)
        if inputs in tracker.static:
            tracker.freeze(source, node, "is summed between two parameters")
        out = kernel[out_dim]
    else:
        out = _grouped(tracker, node, source, out_dim, groups)
    if weight in tracker.static and tracker.decisions.get(node.name) != WHOLE:
        tracker.minted[node] = {channel}
    if bias is not None and tracker.shape(bias)[0] > 1:
        out = tracker.unify(out, tracker.dims(bias)[0], node)
    return (*dims[:channel], out, *((),) * (len(kernel) - 2))


def _grouped(tracker: Tracker, node: fx.Node, source: Layers, out_dim: int, groups: int) -> Layers:
    """Choose between whole groups (inputs and outputs of a group go together) and the same positions of every group.

    Either keeps the convolution regular; the one that leaves more units is taken.
    """
    weight = node.args[1]
    shape, kernel = tracker.shape(weight), tracker.dims(weight)
    # the dim of the weight that runs over all groups is dim 0 in both kinds; dim 1 is per group
    whole_dim, group_dim = kernel[0], kernel[1]
    width, inner = shape[0] // groups, shape[1]
    transposed_kind = out_dim == 1
    in_width, out_width = (width, inner) if transposed_kind else (inner, width)
    source = tracker.single(source, node)
    if not source:
        # an input that cannot shrink: whole groups are out, positions of the outputs may still go
        if transposed_kind:
            tracker.freeze(whole_dim, node, "meets a dim that cannot shrink")
            return _tiled(tracker, node, group_dim, groups, out_width)
        tracker.freeze(group_dim, node, "meets a dim that cannot shrink")
        return _merged(tracker, node, whole_dim, groups, out_width)
    layer = source[0].reshape(groups, in_width)
    wide = whole_dim[0].reshape(groups, width) if whole_dim else np.zeros((groups, width), dtype=np.int64)
    as_groups = tracker.classes.distinct(_lowest(tracker, layer, 1))
    as_positions = tracker.classes.distinct(_lowest(tracker, layer, 0)) + (out_width if out_width > 1 else 0)
    if in_width == 1 or as_groups >= as_positions:
        tracker.decisions[node.name] = WHOLE
        tracker.freeze(group_dim, node, "is kept: whole groups of this convolution are its units")
        merged = np.concatenate([layer, wide], axis=1)
        tracker.classes.union(merged, merged[:, :1], tracker.reason(node, "joins a group"))
        return (layer[:, 0].repeat(out_width),)
    tracker.decisions[node.name] = POSITIONS
    tracker.classes.union(layer, layer[:1], tracker.reason(node, "joins the same position of every group"))
    if transposed_kind:
        tracker.unify(source, _merged(tracker, node, whole_dim, groups, width), node)
        return _tiled(tracker, node, group_dim, groups, out_width)
    tracker.unify((layer[0],) if in_width > 1 else (), group_dim, node)
    return _merged(tracker, node, whole_dim, groups, out_width)


def _lowest(tracker: Tracker, table: np.ndarray, axis: int) -> np.ndarray:
    # the representative that each row (or column) would have if it merged; 0 where any of it is frozen
    return tracker.classes.find(table).min(axis=axis)


def _merged(tracker: Tracker, node: fx.Node, layers: Layers, groups: int, width: int) -> Layers:
    if not layers or width == 1:
        tracker.freeze(layers, node, "is one channel per group of a kept grouping")
        return ()
    table = layers[0].reshape(groups, width)
    tracker.classes.union(table, table[:1], tracker.reason(node, "joins the same position of every group"))
    return layers


def _tiled(tracker: Tracker, node: fx.Node, layers: Layers, groups: int, width: int) -> Layers:
    if not layers or width == 1:
        tracker.freeze(layers, node, "is one channel per group of a kept grouping")
        return ()
    return (np.tile(layers[0], groups),)


@relocator(*_CONVS, *_TRANSPOSED)
def new_groups(moved: Relocation, node: fx.Node) -> None:
    """Lower the number of groups when whole groups went."""
    groups = _groups(node)
    if groups is None or groups == 1 or moved.tracker.decisions.get(node.name) != WHOLE:
        return
    inputs, weight = node.args[:2]
    channel = len(moved.tracker.shape(inputs)) - (len(moved.tracker.shape(weight)) - 1)
    per_group = moved.size_before(inputs, channel) // groups
    left: Any = moved.size_after(inputs, channel) // per_group
    if len(node.args) > _GROUPS:
        node.update_arg(_GROUPS, left)
    else:
        node.update_kwarg("groups", left)
