"""Exact provenance of data movement: run the operation itself on a tensor of indices and see where each index went."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kfe_fx.labels.tracker import Dims, Layers, Tracker


@dataclass(frozen=True)
class Origin:
    """Where each element of an output comes from: ``owner`` is the input (-1: a constant), ``flat`` the index in it."""

    owner: np.ndarray
    flat: np.ndarray


def trace(function: Callable[..., Any], shapes: Sequence[tuple[int, ...]]) -> list[Origin]:
    """Run ``function`` on tensors of indices of the given shapes and read the origins of its outputs.

    Indices are float64 (exact to 2**53, and taken by operations that refuse integers); 0 means a constant.
    """
    starts = np.cumsum([1, *(int(np.prod(shape)) for shape in shapes)])
    inputs = [
        torch.arange(int(first), int(last), dtype=torch.float64).reshape(shape)
        for first, last, shape in zip(starts[:-1], starts[1:], shapes, strict=True)
    ]
    result = function(*inputs)
    outputs = result if isinstance(result, list | tuple) else [result]
    origins = []
    for output in outputs:
        index = output.to(torch.int64).numpy()
        owner = np.searchsorted(starts, index, side="right") - 1
        origins.append(Origin(owner, index - starts[np.maximum(owner, 0)]))
    return origins


def spread(
    tracker: Tracker, node: Any, origin: Origin, inputs: Sequence[Dims], shapes: Sequence[tuple[int, ...]]
) -> Dims:
    """Carry the labels of ``inputs`` to one output of a data movement.

    A label may lie along exactly one dim of the output; where a dim was split, the labels along one of the new dims
    merge so that what is removed stays a rectangle (regularity repair).
    """
    rank = origin.owner.ndim
    found: list[list[dict[int, np.ndarray]]] = [[] for _ in range(rank)]  # per dim, per layer: input -> labels or -1
    for number, (dims, shape) in enumerate(zip(inputs, shapes, strict=True)):
        region = origin.owner == number
        if not region.any():
            continue
        depth = [0] * rank
        for dim, layers in enumerate(dims):
            for layer in layers:
                placed = _place(tracker, node, origin, region, shape, dim, layer)
                if placed is None:
                    continue
                axis, labels = placed
                if depth[axis] == len(found[axis]):
                    found[axis].append({})
                found[axis][depth[axis]][number] = labels
                depth[axis] += 1
    return tuple(_combine(tracker, node, origin, axis, layers) for axis, layers in enumerate(found))


def _place(
    tracker: Tracker, node: Any, origin: Origin, region: np.ndarray, shape: tuple[int, ...], dim: int, layer: np.ndarray
) -> tuple[int, np.ndarray] | None:
    """Find the output dim that a layer lies along, and its labels there (-1 outside of ``region``)."""
    roots = tracker.classes.find(layer)
    if not roots.any():
        return None
    stride = int(np.prod(shape[dim + 1 :]))
    placed = np.where(region, roots[(origin.flat // stride) % shape[dim]], -1)
    small, dependent = _compressed(placed)
    if not dependent:
        return _single(tracker, node, origin, region, placed, layer)
    for axis in dependent:
        if _is_function_of(small, axis):
            return axis, _along(placed, axis)
    axis = _repair(tracker, node, small, dependent)
    return axis, _along(np.where(region, tracker.classes.find(np.maximum(placed, 0)), -1), axis)


def _compressed(placed: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Drop what does not matter: dims along which labels do not change become size 1; return the other dims too."""
    dependent = []
    for axis in range(placed.ndim):
        if placed.shape[axis] > 1:
            line = placed.max(axis=axis, keepdims=True)
            if bool(((placed == line) | (placed < 0)).all()):
                placed = line
            else:
                dependent.append(axis)
    return placed, dependent


def _single(
    tracker: Tracker, node: Any, origin: Origin, region: np.ndarray, placed: np.ndarray, layer: np.ndarray
) -> tuple[int, np.ndarray] | None:
    """Place a layer of one label: along the dim whose slices it fills, as one channel in a concatenation does."""
    whole = [axis for axis in range(region.ndim) if region.shape[axis] > 1 and _covers_slices(origin, region, axis)]
    if len(whole) != 1:
        tracker.freeze((layer,), node, "a single unit is all of this tensor")
        return None
    return whole[0], _along(placed, whole[0])


def _along(values: np.ndarray, axis: int) -> np.ndarray:
    others = tuple(other for other in range(values.ndim) if other != axis)
    return values.max(axis=others)


def _spanned(line: np.ndarray, axis: int, rank: int) -> np.ndarray:
    return line.reshape([-1 if other == axis else 1 for other in range(rank)])


def _is_function_of(values: np.ndarray, axis: int) -> bool:
    return bool(((values == _spanned(_along(values, axis), axis, values.ndim)) | (values < 0)).all())


def _covers_slices(origin: Origin, region: np.ndarray, axis: int) -> bool:
    # slices that the region touches belong to it alone (constants aside), and it does not touch all slices
    others = tuple(other for other in range(region.ndim) if other != axis)
    touched = region.any(axis=others)
    foreign = ((origin.owner >= 0) & ~region).any(axis=others)
    return not (touched & foreign).any() and not touched.all()


def _repair(tracker: Tracker, node: Any, values: np.ndarray, dependent: list[int]) -> int:
    """Merge labels so that they become a function of one dim; return that dim."""
    from kfe_fx.labels.heads import preferred_axis

    pairs = {axis: _pairs(values, axis) for axis in dependent}
    left = {axis: _classes_left(pairs[axis], values) for axis in dependent}
    axis = preferred_axis(tracker, node, dependent)
    if axis is None or left[axis] < 2:
        # first an axis along which no unit repeats: channels before the phases of a pixel shuffle along height or width
        slices = {each: int((_along(values, each) >= 0).sum()) for each in dependent}
        axis = max(dependent, key=lambda each: (left[each] > 1, left[each] == slices[each], left[each], each))
    tracker.classes.union(*pairs[axis], tracker.reason(node, "splits a dim: what is removed must stay a rectangle"))
    return axis


def _pairs(values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    line = np.broadcast_to(_spanned(_along(values, axis), axis, values.ndim), values.shape)
    inside = values >= 0
    pairs = np.unique(np.stack([values[inside], line[inside]]), axis=1)
    return pairs[0], pairs[1]


def _classes_left(pairs: tuple[np.ndarray, np.ndarray], values: np.ndarray) -> int:
    parent = {int(root): int(root) for root in np.unique(values[values >= 0])}

    def top(label: int) -> int:
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = parent[label]
        return label

    for one, other in zip(*(side.tolist() for side in pairs), strict=True):
        low, high = sorted((top(one), top(other)))
        parent[high] = low
    return len({top(label) for label in parent} - {0})


def _combine(tracker: Tracker, node: Any, origin: Origin, axis: int, layers: list[dict[int, np.ndarray]]) -> Layers:
    """Join what several inputs brought to one output dim; an index that is only partly covered is frozen."""
    result = []
    others = tuple(other for other in range(origin.owner.ndim) if other != axis)
    for parts in layers:
        merged = np.full(origin.owner.shape[axis], -1, dtype=np.int64)
        for labels in parts.values():
            both = (merged >= 0) & (labels >= 0)
            tracker.classes.union(merged[both], labels[both], tracker.reason(node, "joins"))
            merged = np.where(merged < 0, labels, merged)
        labelled = np.stack([labels >= 0 for labels in parts.values()])
        foreign = np.zeros_like(merged, dtype=bool)
        for number in range(origin.owner.max(initial=-1) + 1):
            present = (origin.owner == number).any(axis=others)
            covered = labelled[list(parts).index(number)] if number in parts else np.zeros_like(present)
            foreign |= present & ~covered
        partly = (merged >= 0) & foreign
        if partly.any():
            tracker.freeze((merged[partly],), node, "shares an index with values that cannot be removed")
        merged = np.where(merged < 0, 0, merged)
        if tracker.classes.find(merged).any():
            result.append(merged)
    return tuple(result)
