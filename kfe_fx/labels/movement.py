"""Data movement: provenance is exact, the operation itself says where each element went."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx
from torch.fx.node import map_arg

from kfe_fx.errors import PlanError
from kfe_fx.labels.provenance import spread, trace
from kfe_fx.labels.registry import overloads, relocator, rule
from kfe_fx.labels.relocate import Relocation
from kfe_fx.labels.tracker import Tracker
from kfe_fx.program import argument

aten = torch.ops.aten

_VIEWS = overloads(aten, "view.default", "reshape.default", "_unsafe_view.default")
_SPLITS = overloads(
    aten,
    *[
        "split.Tensor",
        "split.sizes",
        "split_with_sizes",
        "chunk",
        "unsafe_chunk",
        "unsafe_split.Tensor",
        "unsafe_split_with_sizes",
        "tensor_split.sections",
        "tensor_split.indices",
    ],
)
_GATHERS = overloads(aten, "roll.default", "narrow.default", "channel_shuffle.default", "index_select.default")
_PLAIN = overloads(
    aten,
    *[
        "flatten.using_ints",
        "unflatten.int",
        "transpose.int",
        "permute",
        "t",
        "numpy_T",
        "mT",
        "swapaxes",
        "movedim.intlist",
        "movedim.int",
        "unsqueeze",
        "squeeze",
        "squeeze.dim",
        "squeeze.dims",
        "select.int",
        "slice.Tensor",
        "unbind.int",
        "cat",
        "concat",
        "stack",
        "repeat",
        "repeat_interleave.self_int",
        "pixel_shuffle",
        "pixel_unshuffle",
        "flip",
        "im2col",
        "tile",
    ],
)


def _run(tracker: Tracker, node: fx.Node) -> Any:
    args, kwargs = tracker.concrete((node.args, node.kwargs))
    tensors = [arg for arg in node.all_input_nodes if tracker.is_tensor(arg)]

    def function(*indices: torch.Tensor) -> Any:
        given = dict(zip(tensors, indices, strict=True))
        swapped = map_arg((args, kwargs), lambda arg: given[arg])
        return node.target(*swapped[0], **swapped[1])  # type: ignore[operator]

    return _carry(tracker, node, function, tensors)


def _carry(tracker: Tracker, node: fx.Node, function: Any, tensors: list[fx.Node]) -> Any:
    shapes = [tracker.shape(arg) for arg in tensors]
    inputs = [tracker.dims(arg) for arg in tensors]
    if not any(layers for dims in inputs for layers in dims):
        fakes = tracker.fakes[node]
        empty = [tuple(() for _ in fake.shape) for fake in (fakes if isinstance(fakes, list | tuple) else [fakes])]
        return empty if isinstance(fakes, list | tuple) else empty[0]
    origins = trace(function, shapes)
    results = [spread(tracker, node, origin, inputs, shapes) for origin in origins]
    return results if isinstance(tracker.fakes[node], list | tuple) else results[0]


@rule(*_PLAIN, *_SPLITS, *_VIEWS, *(each for each in _GATHERS if each is not aten.index_select.default))
def moved(tracker: Tracker, node: fx.Node) -> Any:
    """Trace any pure data movement by running it."""
    result = _run(tracker, node)
    if node.target in _VIEWS and tracker.relocates:
        _check_symbolic_sizes(tracker, node, result)
    return result


@rule(*overloads(aten, "select_scatter.default", "slice_scatter.default"))
def written(tracker: Tracker, node: fx.Node) -> Any:
    """Trace a write into a part: what is overwritten must shrink with what is written."""
    result = _run(tracker, node)
    whole = tracker.dims(node.args[0])
    return tuple(tracker.unify(*pair, node) if any(pair) else () for pair in zip(result, whole, strict=True))


def _check_symbolic_sizes(tracker: Tracker, node: fx.Node, dims: Any) -> None:
    # a symbolic size along which units lie becomes -1, and there can be only one -1
    sizes = list(node.args[1])  # type: ignore[arg-type]
    symbolic = [d for d, size in enumerate(sizes) if isinstance(size, fx.Node) and dims[d]]
    for dim in symbolic if -1 in sizes else symbolic[1:]:
        tracker.freeze(dims[dim], node, "is part of a size that depends on the input")


@rule(*overloads(aten, "reshape_as.default", "view_as.default"))
def shaped_as(tracker: Tracker, node: fx.Node) -> Any:
    """Trace a reshape to the shape of another tensor: what comes out must shrink as that one does."""
    source, like = node.args[:2]
    shape = tracker.shape(like)
    result = _carry(tracker, node, lambda index: index.reshape(shape), [source])  # type: ignore[list-item]
    pairs = zip(result, tracker.dims(like), strict=True)
    return tuple(tracker.unify(ours, theirs, node) if ours or theirs else () for ours, theirs in pairs)


@rule(*overloads(aten, "pad.default"))
def pad(tracker: Tracker, node: fx.Node) -> Any:
    """Trace padding: constants come from nowhere; reflected and replicated borders from inside."""
    source = node.args[0]
    amounts = tracker.concrete(node.args[1])
    mode = argument(node, 2, "mode", "constant")
    value = 0 if mode == "constant" else None

    def function(index: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(index, list(amounts), mode=mode, value=value)

    return _carry(tracker, node, function, [source])  # type: ignore[list-item]


@rule(*overloads(aten, "expand.default", "expand_as.default", "broadcast_to.default"))
def expand(tracker: Tracker, node: fx.Node) -> Any:
    """Trace a broadcast: along a dim of size 1 that grows all indices are alike, so it takes any width."""
    source = node.args[0]
    before, after = tracker.shape(source), tracker.shape(node)
    dims = _carry(tracker, node, lambda index: index.expand(after), [source])  # type: ignore[list-item]
    shift = len(after) - len(before)
    grown = [d for d, size in enumerate(after) if size > 1 and (d < shift or before[d - shift] == 1)]
    return tuple(tracker.free(after[d]) if d in grown else layers for d, layers in enumerate(dims))


@rule(aten.index_select.default)
def picked(tracker: Tracker, node: fx.Node) -> Any:
    """Trace a pick by constant numbers along one dim."""
    source, dim, index = node.args[:3]
    numbers = constant_value(tracker, index)
    if numbers is None:
        tracker.freeze(tracker.dims(source)[dim], node, "is indexed by the input")  # type: ignore[index]
        dims = list(tracker.dims(source))
        dims[dim] = ()  # type: ignore[index]
        return tuple(dims)
    return _carry(tracker, node, lambda tensor: tensor.index_select(dim, numbers), [source])  # type: ignore[list-item]


@rule(*overloads(aten, "index.Tensor"))
def indexed(tracker: Tracker, node: fx.Node) -> Any:
    """Trace advanced indexing: dims picked by constant numbers keep their provenance, others are frozen."""
    source, indices = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    numbers = [None if index is None else constant_value(tracker, index) for index in indices]
    used = [place for place, index in enumerate(indices) if index is not None]
    simple = len(used) == 1 and numbers[used[0]] is not None and numbers[used[0]].dim() == 1  # type: ignore[union-attr]
    if any(index is not None and value is None for index, value in zip(indices, numbers, strict=True)):
        tracker.freeze_all(node, "is indexed by the input", [source])  # type: ignore[list-item]
        return tuple(() for _ in tracker.shape(node))
    if not simple or numbers[used[0]].dtype == torch.bool:  # type: ignore[union-attr]
        for place in used:
            tracker.freeze(tracker.dims(source)[place], node, "is indexed by a table of numbers")
    function = lambda tensor: aten.index.Tensor(tensor, [None if value is None else value for value in numbers])
    return _carry(tracker, node, function, [source])  # type: ignore[list-item]


def constant_value(tracker: Tracker, node: Any) -> torch.Tensor | None:
    """Return the value of an integer or bool tensor that depends on buffers and literals alone, else None."""
    if not isinstance(node, fx.Node) or node not in tracker.static:
        return None
    if node.op == "get_attr":
        value = tracker.program.tensor(str(node.target))
        return None if value.is_floating_point() else value
    values = [constant_value(tracker, arg) for arg in node.all_input_nodes]
    if any(value is None for value in values) or not isinstance(node.target, torch._ops.OpOverload):
        return None
    if torch.Tag.nondeterministic_seeded in node.target.tags:
        return None
    given = dict(zip(node.all_input_nodes, values, strict=True))
    args, kwargs = map_arg((node.args, node.kwargs), lambda arg: given[arg])
    result = node.target(*args, **kwargs)
    return result if isinstance(result, torch.Tensor) else None


# relocation ----------------------------------------------------------------------------------------------------------


@relocator(*_VIEWS)
def view_sizes(moved: Relocation, node: fx.Node) -> None:
    """Rewrite the sizes of a view; a symbolic size that shrinks becomes -1."""
    sizes: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    shrunk = [dim for dim in range(len(sizes)) if moved.changed(node, dim)]
    for dim in shrunk:
        if isinstance(sizes[dim], fx.Node):
            sizes[dim] = -1
        elif sizes[dim] != -1:
            sizes[dim] = moved.size_after(node, dim)
    node.update_arg(1, sizes)


@relocator(*overloads(aten, "expand.default", "broadcast_to.default"))
def expand_sizes(moved: Relocation, node: fx.Node) -> None:
    """Rewrite the sizes of a broadcast."""
    sizes: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    for dim in range(len(sizes)):
        if moved.changed(node, dim) and sizes[dim] != -1:
            sizes[dim] = moved.size_after(node, dim)
    node.update_arg(1, sizes)


@relocator(*overloads(aten, "unflatten.int"))
def unflatten_sizes(moved: Relocation, node: fx.Node) -> None:
    """Rewrite the sizes that a dim is split into."""
    rank = len(moved.tracker.shape(node.args[0]))
    first = int(node.args[1]) % rank  # type: ignore[arg-type]
    sizes: list[Any] = list(node.args[2])  # type: ignore[arg-type]
    for offset, size in enumerate(sizes):
        if moved.changed(node, first + offset) and size != -1:
            sizes[offset] = moved.size_after(node, first + offset)
    node.update_arg(2, sizes)


@relocator(*_SPLITS)
def split_sizes(moved: Relocation, node: fx.Node) -> None:
    """Write any split as ``split_with_sizes``: its parts may shrink differently."""
    source = node.args[0]
    schema = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    place = schema.index("dim")
    rank = len(moved.tracker.shape(source))
    dim = int(argument(node, place, "dim", 0)) % rank
    pieces = moved.tracker.values[node]
    before = [int(fake.shape[dim]) for fake in moved.tracker.fakes[node]]
    if not moved.changed(source, dim):
        return
    sizes = []
    for piece, size in zip(pieces, before, strict=True):
        gone = np.zeros(size, dtype=bool)
        for layer in piece[dim]:
            gone |= moved.gone[moved.tracker.classes.find(layer)]
        sizes.append(size - int(gone.sum()))
    node.target = aten.split_with_sizes.default
    node.args = (source, sizes, dim)
    node.kwargs = {}


@relocator(*overloads(aten, "slice.Tensor", *(str(each).removeprefix("aten.") for each in _GATHERS)))
def gather_new_places(moved: Relocation, node: fx.Node) -> None:
    """Pick the same indices at their new places: by bounds where they are a range, else by number."""
    source = node.args[0]
    rank = len(moved.tracker.shape(source))
    dims = _gathered_dims(moved, node, rank)
    touched = [dim for dim in dims if moved.changed(source, dim)]
    if not touched:
        return
    if len(touched) > 1:
        raise PlanError(f"{node.meta.get('source', node.name)}: {node.target} moves several shrunk dims at once")
    dim = touched[0]
    if len(dims) > 1:
        raise PlanError(f"{node.meta.get('source', node.name)}: {node.target} moves a shrunk dim together with another")
    old = _old_indices(moved, node, source, dim)
    kept_out = moved.kept(node, dim)
    old = old if kept_out is None else old[kept_out]
    kept = moved.kept(source, dim)
    new = moved.positions_after(kept, old) if kept is not None else old
    if node.target is aten.slice.Tensor and len(new) and np.array_equal(new, np.arange(new[0], new[0] + len(new))):
        node.args = (source, dim, int(new[0]), int(new[0]) + len(new))
        node.kwargs = {}
        return
    moved.gather_instead(node, source, dim, old)


def _gathered_dims(moved: Relocation, node: fx.Node, rank: int) -> list[int]:
    if node.target is aten.roll.default:
        return [dim % rank for dim in argument(node, 2, "dims", ())]
    if node.target is aten.channel_shuffle.default:
        return [1]
    dim = argument(node, 1, "dim", 0)
    return [int(dim) % rank]


def _old_indices(moved: Relocation, node: fx.Node, source: Any, dim: int) -> np.ndarray:
    tracker = moved.tracker
    size = tracker.shape(source)[dim]
    if node.target is aten.index_select.default:
        return constant_value(tracker, node.args[2]).numpy()  # type: ignore[union-attr]
    line = torch.arange(size).reshape([-1 if axis == dim else 1 for axis in range(len(tracker.shape(source)))])
    args, kwargs = tracker.concrete((node.args[1:], node.kwargs))
    return node.target(line, *args, **kwargs).reshape(-1).numpy()  # type: ignore[operator]


@relocator(*overloads(aten, "select.int"))
def select_new_place(moved: Relocation, node: fx.Node) -> None:
    """Select the same index at its new place."""
    source, dim, index = node.args[:3]
    dim = int(dim) % len(moved.tracker.shape(source))  # type: ignore[arg-type]
    kept = moved.kept(source, dim)
    if kept is not None:
        size = moved.size_before(source, dim)
        node.update_arg(2, int(moved.positions_after(kept, np.array([int(index) % size]))[0]))  # type: ignore[arg-type]


@relocator(*overloads(aten, "select_scatter.default"))
def select_scatter_new_place(moved: Relocation, node: fx.Node) -> None:
    """Write the same index at its new place."""
    source, _, dim, index = node.args[:4]
    dim = int(dim) % len(moved.tracker.shape(source))  # type: ignore[arg-type]
    kept = moved.kept(node, dim)
    if kept is not None:
        size = moved.size_before(source, dim)
        node.update_arg(3, int(moved.positions_after(kept, np.array([int(index) % size]))[0]))  # type: ignore[arg-type]


@relocator(*overloads(aten, "slice_scatter.default"))
def slice_scatter_new_place(moved: Relocation, node: fx.Node) -> None:
    """Write the same range at its new place."""
    source, _ = node.args[:2]
    tracker = moved.tracker
    rank = len(tracker.shape(source))
    dim = int(argument(node, 2, "dim", 0)) % rank
    kept = moved.kept(node, dim)
    if kept is None:
        return
    size = tracker.shape(source)[dim]
    start, end, step = tracker.concrete(
        (argument(node, 3, "start"), argument(node, 4, "end"), argument(node, 5, "step", 1))
    )
    old = np.arange(size)[start:end:step]  # pyright: ignore[reportArgumentType, reportCallIssue]
    new = np.flatnonzero(np.isin(kept, old))
    if len(new) and not np.array_equal(new, np.arange(new[0], new[0] + len(new))):
        raise PlanError(f"{node.meta.get('source', node.name)}: a strided write cannot follow the removal")
    first = int(new[0]) if len(new) else 0
    node.args = (source, node.args[1], dim, first, first + len(new))
    node.kwargs = {}


@relocator(*overloads(aten, "index.Tensor"))
def index_new_places(moved: Relocation, node: fx.Node) -> None:
    """Rewrite the numbers that pick along a shrunk dim."""
    source, indices = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    used = [place for place, index in enumerate(indices) if index is not None]
    if len(used) != 1 or not moved.changed(source, used[0]):
        return
    numbers = constant_value(moved.tracker, indices[used[0]])
    if numbers is None:
        return
    size = moved.size_before(source, used[0])
    old = np.arange(size)[numbers.numpy()]
    kept_out = moved.kept(node, used[0])
    moved.gather_instead(node, source, used[0], old if kept_out is None else old[kept_out])


@relocator(*overloads(aten, "squeeze.default", "squeeze.dim", "squeeze.dims"))
def squeeze_same_dims(moved: Relocation, node: fx.Node) -> None:
    """Squeeze the dims that had size 1 before, not those that a removal brought to 1."""
    source = node.args[0]
    shape = moved.tracker.shape(source)
    asked = node.args[1] if len(node.args) > 1 else list(range(len(shape)))
    dims = [int(dim) % len(shape) for dim in (asked if isinstance(asked, list | tuple) else [asked])]  # type: ignore[arg-type, union-attr]
    node.target = aten.squeeze.dims
    node.args = (source, [dim for dim in dims if shape[dim] == 1])
