"""Where each tensor of a graph holds the examples of a batch, followed node by node.

The rules are those of the labels, with examples for units. Here nothing is removed, so nothing spreads: an operation
that mixes examples or hides them takes them out of its own output alone. Where the rules lose them, the operation is
asked itself: one example of its inputs is changed, and what changes of its outputs belongs to that example.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from kfe_fx.curvature.operands import MOVEMENTS, draws
from kfe_fx.errors import KfeError
from kfe_fx.labels.analysis import BATCH, analysis_sizes, track
from kfe_fx.labels.examples import ExampleTracker
from kfe_fx.labels.tracker import Dims, Layers
from kfe_fx.labels.unionfind import UnionFind
from kfe_fx.program import Program, run_node
from kfe_fx.recurrent.opened import OPENED, PRODUCT, ROWS, STATES

aten = torch.ops.aten
_REPEATS = {aten.repeat.default}
_SEQUENCES = {STATES, PRODUCT, OPENED, ROWS}
PROBED = 1 << 22  # elements of inputs up to which an operation is run to see what depends on what


class _Fleeting(UnionFind):
    """Classes that are forgotten after each node, except what a fill or a broadcast turned out to be."""

    def __init__(self) -> None:
        super().__init__()
        self._loose = np.zeros(0, dtype=np.int64)

    def fresh(self, count: int, *, free: bool = False) -> np.ndarray:
        labels = super().fresh(count, free=free)
        if free:
            self._loose = np.concatenate([self._loose, labels])
        return labels

    def forget(self, kept: np.ndarray) -> None:
        """Take merges back, but for free labels that have met one of the classes ``kept``."""
        if not self._edges:
            return
        self._edges.clear()
        roots = self.find(self._loose)
        met = np.isin(roots, kept)
        self._parent = np.arange(len(self._parent))
        self._parent[self._loose[met]] = roots[met]
        self._free[self._loose] = True


def pinned_examples(program: Program) -> dict[str, int]:
    """Return by name of an input how many examples it holds along dim 0, where the network pins its batch."""
    if program.batch_axes():
        return {}
    values = zip(program.signature.input_names, program.flat_examples(), strict=True)
    counts = {name: len(value) for name, value in values if isinstance(value, Tensor) and value.dim()}
    first = next(iter(counts.values()), 1)
    return {name: count for name, count in counts.items() if count == first}


class Examples(ExampleTracker):
    """Labels of examples that each node keeps, or loses, for itself."""

    classes: _Fleeting

    def __init__(self, program: Program, graph: fx.Graph, fakes: dict[fx.Node, Any]) -> None:
        """Follow the examples of a batch through ``graph``, whose values have the shapes of ``fakes``."""
        super().__init__(program, _Fleeting(), {})
        self._moves: dict[Any, Any] = {}
        self._move: Any = None  # what is being looked at, if it can be looked up later
        self._dims = program.example_dims()
        pinned = pinned_examples(program)
        self._dims |= dict.fromkeys(pinned, 0)
        self.examples = self.classes.fresh(next(iter(pinned.values()), BATCH))
        track(self, graph, fakes, analysis_sizes(program))

    def input(self, node: fx.Node) -> Dims:
        """Label the dim of an input that has one entry per example."""
        counting = self._dims.get(str(node.target))
        rank = len(getattr(self.fakes[node], "shape", ()))
        return tuple((self.examples,) if dim == counting else () for dim in range(rank))

    def apply(self, rule: Callable[[Any, fx.Node], Any], node: fx.Node) -> Any:
        """Return the labels that a rule finds; equal movements of equal labels (layer repeats layer) are looked up."""
        self._move = self._spelled(node)
        return self._moves[self._move] if self._move in self._moves else rule(self, node)

    def _spelled(self, node: fx.Node) -> Any:
        """Spell a movement of one tensor in a way that equal ones share, or None."""
        tensors = self.tensors(node)
        if node.target not in MOVEMENTS or len(tensors) != 1 or not isinstance(self.values.get(tensors[0]), tuple):
            return None
        dims = self.dims(tensors[0])
        if any(not np.isin(layer, self.examples).all() for layers in dims for layer in layers):
            return None  # labels that may yet turn out to be something
        labels = tuple(tuple(layer.tobytes() for layer in layers) for layers in dims)
        args, kwargs = map_arg(self.concrete((node.args, node.kwargs)), lambda arg: "tensor")
        return node.target, repr(args), repr(kwargs), self.shape(tensors[0]), labels

    def unknown(self, node: fx.Node, tensors: list[fx.Node]) -> Any:
        """Label sequences as they are; else return no labels for now: ``done`` asks the operation."""
        if node.target in _SEQUENCES:
            return self._sequences(node)
        fake = self.fakes[node]
        several = isinstance(fake, list | tuple)
        return [_nowhere(each) for each in fake] if several else _nowhere(fake)

    def done(self, node: fx.Node) -> None:
        """Write the examples that a node's labels stand for, or find them out where its rule has lost them."""
        value = self.values[node]
        several = isinstance(value, list)
        roots = self.classes.find(self.examples)
        mixed = (roots != self.examples) | (np.bincount(roots)[roots] > 1)
        bad = [0, *roots[mixed]]
        settled = [self._settled(dims, bad) for dims in (value if several else [value])]
        self.classes.forget(self.examples[~mixed])
        if node.target in _REPEATS:
            settled = [self._repeated(node, settled[0])]
        lost = not any(self._counted(dims) for dims in settled)
        if lost and any(self._counted(dims) for arg in node.all_input_nodes for dims in self._all(arg)):
            found = [self._gathered(node)] if node.target is aten.gather.default else self._probed(node)
            settled = found if any(self._counted(dims) for dims in found) else settled
        self.values[node] = settled if several else settled[0]
        if self._move is not None:
            self._moves[self._move], self._move = self.values[node], None

    def _all(self, arg: fx.Node) -> list[Dims]:
        value = self.values.get(arg)
        return [] if value is None else value if isinstance(value, list) else [value]

    def _counted(self, dims: Dims) -> bool:
        return any(np.isin(self.classes.find(layer), self.examples).any() for layers in dims for layer in layers)

    def _settled(self, dims: Dims, bad: list[int]) -> Dims:
        found: list[Layers] = []
        for layers in dims:
            kept = (self.classes.find(layer) for layer in layers)
            found.append(tuple(layer for layer in kept if not np.isin(layer, bad).any()))
        return tuple(found)

    def _repeated(self, node: fx.Node, dims: Dims) -> Dims:
        """Label what is the same for all examples and repeated once for each: it may turn out to be theirs."""
        source, times = self.shape(node.args[0]), list(node.args[1])  # type: ignore[arg-type]
        padded = (*(1,) * (len(times) - len(source)), *source)
        counts = [isinstance(each, fx.Node) and self.fakes[each] == len(self.examples) for each in times]
        return tuple(
            (self.classes.fresh(len(self.examples), free=True).repeat(size),) if counted and not layers else layers
            for layers, size, counted in zip(dims, padded, counts, strict=True)
        )

    def _gathered(self, node: fx.Node) -> Dims:
        """Label what is picked from a row as its index is labelled, else as the row."""
        source, dim, index = node.args[:3]
        if self._counted(self.dims(index)):
            return self.dims(index)
        over = int(dim) % len(self.dims(source))  # type: ignore[arg-type]
        return tuple(() if place == over else layers for place, layers in enumerate(self.dims(source)))

    def _sequences(self, node: fx.Node) -> Any:
        """Label what opened recurrent layers are made of: each sequence is on its own, its steps are not."""
        batch_dim = 0 if node.kwargs.get("batch_first", True) else 1
        operation: Any = node.target
        given = dict(zip([one.name for one in operation._schema.arguments], node.args, strict=False))
        sided = [given[name] for name in ("input", "products", "hidden") if given.get(name) is not None]
        states = [given[name] for name in ("h0", "c0", "lengths") if given.get(name) is not None]
        batch: Layers = ()
        for value, dim in [*((value, batch_dim) for value in sided), *((value, 0) for value in states)]:
            found = self.dims(value)[dim]
            batch = self.unify(batch, found, node) if batch and found else batch or found
        if node.target is ROWS:
            return (batch, *(() for _ in self.shape(node)[1:]))
        fakes = self.fakes[node]
        ranks = [fake.dim() for fake in fakes] if isinstance(fakes, list | tuple) else [fakes.dim()]
        made = [
            tuple(batch if dim == (batch_dim if rank == 3 else 0) else () for dim in range(rank)) if rank > 1 else ((),)
            for rank in ranks
        ]
        return made if isinstance(fakes, list | tuple) else made[0]

    # asking an operation ----------------------------------------------------------------------------------------------

    def _probed(self, node: fx.Node) -> list[Dims]:
        """Change one example of the inputs at a time and see along which dim of the outputs the change stays apart."""
        if node.op != "call_function":
            return []
        inputs = [arg for arg in node.all_input_nodes if isinstance(self.fakes.get(arg), Tensor)]
        if sum(math.prod(self.shape(arg)) for arg in inputs) > PROBED:
            return []
        generator = torch.Generator().manual_seed(0)
        base: dict[fx.Node, Any] = {arg: self._stand_in(arg, generator) for arg in inputs}
        known = {arg: self.fakes[arg] for arg in node.all_input_nodes if arg not in base}
        if any(isinstance(value, list | tuple) for value in known.values()):
            return []
        try:
            outputs = _run(node, base | known)
            changed = []
            for example in self.examples:
                given = {arg: self._changed(arg, base[arg], example, generator) for arg in inputs}
                changed.append(
                    [_differs(one, two) for one, two in zip(_run(node, given | known), outputs, strict=True)]
                )
        except (RuntimeError, IndexError, ValueError, TypeError, KfeError):
            return []
        return [self._partition([of[place] for of in changed]) for place in range(len(outputs))]

    def _stand_in(self, arg: fx.Node, generator: torch.Generator) -> Tensor:
        value = self._known(arg)
        if isinstance(value, Tensor):
            return value
        fake = self.fakes[arg]
        if fake.dtype.is_floating_point or fake.dtype.is_complex:
            return (torch.rand(fake.shape, generator=generator, dtype=torch.float64) + 0.5).to(fake.dtype)
        return torch.zeros(fake.shape, dtype=fake.dtype)

    def _changed(self, arg: fx.Node, value: Tensor, example: int, generator: torch.Generator) -> Tensor:
        for dim, layers in enumerate(self.dims(arg)):
            for layer in layers:
                rows = torch.from_numpy(np.flatnonzero(self.classes.find(layer) == example))
                if len(rows) and not value.dtype.is_floating_point:
                    value = value.index_fill(dim, rows, 1)  # the index that every dim of more than one entry has
                elif len(rows):
                    shape = [*value.shape[:dim], len(rows), *value.shape[dim + 1 :]]
                    fresh = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
                    value = value.index_copy(dim, rows, fresh.to(value.dtype))
        return value

    def _known(self, node: fx.Node) -> Any:
        """Return the value of what depends on sizes and whole numbers alone, else None."""
        fake = self.fakes.get(node)
        if not isinstance(fake, Tensor):
            return None if isinstance(fake, list | tuple) else fake
        if node.op == "get_attr":
            value = self.program.tensor(str(node.target))
            return None if value.is_floating_point() else value.detach().cpu()
        if node.op != "call_function" or draws(node):
            return None
        values = {arg: self._known(arg) for arg in node.all_input_nodes}
        if any(value is None for value in values.values()):
            return None
        made = _run(node, values)
        return made[0] if len(made) == 1 else None

    def _partition(self, changed: list[Tensor]) -> Dims:
        """Return labels along the first dim each index of which changes with one example alone, and some with each."""
        rank = changed[0].dim()
        for dim in range(rank):
            others = [other for other in range(rank) if other != dim]
            hits = torch.stack([mask.any(others) if others else mask for mask in changed])  # [N, size]
            if bool((hits.sum(0) == 1).all()) and bool(hits.any(1).all()):
                labels = self.examples[hits.to(torch.int8).argmax(0).numpy()]
                return tuple((labels,) if place == dim else () for place in range(rank))
        return tuple(() for _ in range(rank))


def _nowhere(fake: Any) -> Dims:
    return tuple(() for _ in getattr(fake, "shape", ()))


def _run(node: fx.Node, values: dict[fx.Node, Any]) -> list[Tensor]:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what is drawn is the same each time
        result = run_node(node, values.__getitem__)
    return list(result) if isinstance(result, list | tuple) else [result]


def _differs(one: Tensor, other: Tensor) -> Tensor:
    return (one != other) & ~(one.isnan() & other.isnan()) if one.is_floating_point() else one != other
