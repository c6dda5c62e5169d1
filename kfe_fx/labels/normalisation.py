"""Normalisations: labels pass through; affine parameters and running statistics join the unit."""

from __future__ import annotations

import numpy as np
import torch
from torch import fx

from kfe_fx.labels.registry import overloads, relocator, rule
from kfe_fx.labels.relocate import Relocation
from kfe_fx.labels.tracker import Dims, Layers, Tracker
from kfe_fx.program import argument

aten = torch.ops.aten


def _per_channel(tracker: Tracker, node: fx.Node, channel: int, parameters: tuple[object, ...]) -> Dims:
    dims = list(tracker.dims(node.args[0]))
    for parameter in parameters:
        if parameter is not None and tracker.shape(parameter)[0] > 1:
            dims[channel] = tracker.unify(dims[channel], tracker.dims(parameter)[0], node)
    return tuple(dims)


@rule(aten.batch_norm.default)
def batch_norm(tracker: Tracker, node: fx.Node) -> Dims:
    """Trace a norm with one statistic per channel: a removed channel touches no other."""
    return _per_channel(tracker, node, 1, tuple(node.args[1:5]))


@rule(aten.instance_norm.default)
def instance_norm(tracker: Tracker, node: fx.Node) -> Dims:
    """Trace a norm with one statistic per channel and example, over space."""
    for layers in tracker.dims(node.args[0])[2:]:
        tracker.freeze(layers, node, "carries the statistic of a norm")
    return _per_channel(tracker, node, 1, tuple(node.args[1:5]))


@rule(*overloads(aten, "layer_norm.default", "rms_norm.default"))
def layer_norm(tracker: Tracker, node: fx.Node) -> Dims:
    """Trace a norm over the last dims: removing a unit changes its statistic, which the report names."""
    count = len(node.args[1])  # type: ignore[arg-type]
    dims = list(tracker.dims(node.args[0]))
    if node.args[0] in tracker.static:
        for layers in dims[-count:]:
            tracker.freeze(layers, node, "is normalised before it meets an activation")
    for place, name in ((2, "weight"), (3, "bias")):
        parameter = argument(node, place, name)
        if isinstance(parameter, fx.Node) and tracker.is_tensor(parameter):
            for offset, layers in enumerate(tracker.dims(parameter)):
                position = len(dims) - count + offset
                if tracker.shape(parameter)[offset] > 1:
                    dims[position] = tracker.unify(dims[position], layers, node)
    tracker.statistics[node.name] = tuple(range(len(dims) - count, len(dims)))
    return tuple(dims)


@rule(aten.group_norm.default)
def group_norm(tracker: Tracker, node: fx.Node) -> Dims:
    """Trace a norm over groups of channels: whole groups go exactly; else the same positions of every group.

    Positions change the statistic of their group, which the report names.
    """
    groups = int(node.args[1])  # type: ignore[arg-type]
    dims = list(_per_channel(tracker, node, 1, tuple(node.args[2:4])))
    for layers in dims[2:]:
        tracker.freeze(layers, node, "carries the statistic of a norm")
    channels = tracker.single(dims[1], node)
    dims[1] = channels
    if channels:
        table = channels[0].reshape(groups, -1)
        tracker.decisions[node.name] = _choose(tracker, node, table)
        if tracker.decisions[node.name] == "positions":
            tracker.statistics[node.name] = (1,)
    return tuple(dims)


@rule(*overloads(aten, "_weight_norm.default"))
def weight_norm(tracker: Tracker, node: fx.Node) -> Dims:
    """Trace w = g v / |v|, a norm over all dims but one: only along that one may slices go and leave the others."""
    direction, scale = node.args[:2]
    rank = len(tracker.shape(direction))
    kept = int(argument(node, 2, "dim", 0)) % rank
    dims: list[Layers] = []
    for dim, (layers, sizes) in enumerate(zip(tracker.dims(direction), tracker.dims(scale), strict=True)):
        if dim != kept:
            tracker.freeze(layers, node, "is normalised over")
            dims.append(layers)
        else:
            dims.append(tracker.unify(layers, sizes, node) if tracker.shape(scale)[dim] > 1 else layers)
    return tuple(dims)


def _choose(tracker: Tracker, node: fx.Node, table: np.ndarray) -> str:
    whole = tracker.classes.find(table).min(axis=1)
    if table.shape[1] == 1 or tracker.classes.distinct(whole) > 1:
        tracker.classes.union(table, table[:, :1], tracker.reason(node, "joins a group of the norm"))
        return "whole"
    tracker.classes.union(table, table[:1], tracker.reason(node, "joins the same position of every group"))
    return "positions"


@relocator(*overloads(aten, "layer_norm.default", "rms_norm.default"))
def normalized_shape(moved: Relocation, node: fx.Node) -> None:
    """Rewrite the normalised shape."""
    count = len(node.args[1])  # type: ignore[arg-type]
    node.update_arg(1, [moved.size_after(node.args[0], dim - count) for dim in range(count)])


@relocator(aten.group_norm.default)
def fewer_groups(moved: Relocation, node: fx.Node) -> None:
    """Lower the number of groups when whole groups went."""
    groups = int(node.args[1])  # type: ignore[arg-type]
    if moved.tracker.decisions.get(node.name) == "whole":
        per_group = moved.size_before(node.args[0], 1) // groups
        node.update_arg(1, moved.size_after(node.args[0], 1) // per_group)
