"""Which dim of each tensor counts the examples: the batch axis followed as labels of its own."""

from __future__ import annotations

import numpy as np
import torch
from torch import fx

from kfe_fx.labels.registry import overloads
from kfe_fx.labels.tracker import Dims, Layers, Tracker
from kfe_fx.labels.unionfind import UnionFind
from kfe_fx.program import Program

aten = torch.ops.aten


class ExampleTracker(Tracker):
    """Labels of examples: inputs carry one per example along their batch dim, parameters none, outputs freeze none."""

    relocates = False
    examples: np.ndarray

    def input(self, node: fx.Node) -> Dims:
        """Label the dim of an input that has one entry per example."""
        counting = self.program.example_dims().get(str(node.target))
        rank = len(getattr(self.fakes[node], "shape", ()))
        return tuple((self.examples,) if dim == counting else () for dim in range(rank))

    def output(self, node: fx.Node) -> None:
        """Leave the examples at the output alone."""

    def parameter(self, name: str, tensor: torch.Tensor) -> Dims:
        """Return no labels: a parameter is the same for all examples."""
        return tuple(() for _ in tensor.shape)

    def counts(self, layer: np.ndarray) -> bool:
        """Tell whether a layer holds examples; a broadcast or a fill has labels that are none."""
        return bool(np.isin(self.classes.find(layer), self.classes.find(self.examples)).any())

    def layout(self, node: fx.Node) -> tuple[int | None, str | None]:
        """Return the dim of a node that counts the examples and how: see ``GateSite``; (None, None) where none does."""
        return self.layout_of(self.values[node])

    def layout_of(self, value: Dims) -> tuple[int | None, str | None]:
        """Return the same of the labels of one tensor."""
        wanted = self.classes.find(self.examples)
        if (wanted == 0).any() or len(set(wanted.tolist())) < len(wanted):
            return None, None
        for dim, layers in enumerate(value):
            for layer in layers:
                roots = self.classes.find(layer)
                if np.array_equal(roots, wanted):
                    return dim, "plain"
                times = len(roots) // len(wanted)
                if np.array_equal(roots, wanted.repeat(times)):
                    return dim, "outer"
                if np.array_equal(roots, np.tile(wanted, times)):
                    return dim, "inner"
        return None, None


def follow_examples(program: Program, batch: int) -> ExampleTracker:
    """Make the tracker that follows a batch of ``batch`` examples."""
    tracker = ExampleTracker(program, UnionFind(), {})
    tracker.examples = tracker.classes.fresh(batch)
    return tracker


def freeze_irregular(tracker: Tracker, examples: ExampleTracker, graph: fx.Graph, batch: int) -> None:
    """Freeze units along a dim that the batch is folded into unless they repeat from example to example.

    Only then does what is kept mean the same at every batch size.
    """
    for node in graph.nodes:
        value, folded = tracker.values.get(node), examples.values.get(node)
        if not isinstance(value, tuple) or not isinstance(folded, tuple):
            continue
        for layers, counted in zip(value, folded, strict=True):
            if any(examples.counts(layer) for layer in counted):
                _freeze_unless_repeated(tracker, node, layers, batch)
        _freeze_picked(tracker, examples, node)


_PICKS = {
    *overloads(aten, "slice.Tensor", "select.int", "narrow", "roll", "index_select", "index.Tensor", "channel_shuffle"),
    *overloads(aten, "split.Tensor", "split_with_sizes", "chunk", "tensor_split.sections", "tensor_split.indices"),
}


def _freeze_picked(tracker: Tracker, examples: ExampleTracker, node: fx.Node) -> None:
    # the numbers that pick are rewritten for the batch of the analysis, and would be wrong at any other
    source = node.args[0] if node.target in _PICKS else None
    if source is None or not isinstance(tracker.values.get(source), tuple):
        return
    for layers, counted in zip(tracker.dims(source), examples.dims(source), strict=True):
        if any(examples.counts(layer) for layer in counted):
            tracker.freeze(layers, node, "is picked from by number along with the batch")


def _freeze_unless_repeated(tracker: Tracker, node: fx.Node, layers: Layers, batch: int) -> None:
    for layer in layers:
        roots = tracker.classes.find(layer)
        period = len(roots) // batch
        outer = np.array_equal(roots, np.tile(roots[:period], batch))
        if not outer and not np.array_equal(roots, roots[::batch].repeat(batch)):
            tracker.freeze((layer,), node, "is mixed with the batch")
