"""Relocation: after a removal the literals of a graph follow the labels, as a linker relocates addresses."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from kfe_fx.errors import PlanError
from kfe_fx.labels.registry import RELOCATORS
from kfe_fx.labels.tracker import Tracker

aten = torch.ops.aten


class Relocation:
    """What changed around each node, for the relocators: sizes before and after, kept indices."""

    def __init__(self, tracker: Tracker, graph: fx.Graph, gone: np.ndarray) -> None:
        """Relocate ``graph`` (a copy of the tracked one); ``gone[label]`` tells which labels are removed."""
        self.tracker = tracker
        self.graph = graph
        self.gone = gone
        self.constants: dict[str, torch.Tensor] = {}

    def kept(self, node: Any, dim: int) -> np.ndarray | None:
        """Return the indices of a dim that stay, or None when all do."""
        layers = self.tracker.dims(node)[dim]
        removed: np.ndarray | None = None
        for layer in layers:
            away = self.gone[self.tracker.classes.find(layer)]
            removed = away if removed is None else removed | away
        if removed is None or not removed.any():
            return None
        return np.flatnonzero(~removed)

    def changed(self, node: Any, dim: int) -> bool:
        """Tell whether a dim lost indices."""
        return self.kept(node, dim) is not None

    def size_before(self, node: Any, dim: int) -> int:
        """Return the size of a dim before the removal."""
        return self.tracker.shape(node)[dim]

    def size_after(self, node: Any, dim: int) -> int:
        """Return the size of a dim after the removal."""
        kept = self.kept(node, dim)
        return self.size_before(node, dim) if kept is None else len(kept)

    def any_change(self, node: Any) -> bool:
        """Tell whether any dim of a node's value (or of its outputs) lost indices."""
        value = self.tracker.values.get(node)
        if isinstance(value, list):
            return any(self._lost(layers) for dims in value for layers in dims)
        return value is not None and any(self._lost(layers) for layers in value)

    def _lost(self, layers: Any) -> bool:
        return any(self.gone[self.tracker.classes.find(layer)].any() for layer in layers)

    def positions_after(self, kept: np.ndarray, old: np.ndarray) -> np.ndarray:
        """Return where old indices lie among the kept ones.

        Raises:
            PlanError: an old index is not kept.
        """
        where = np.searchsorted(kept, old)
        if (where >= len(kept)).any() or not np.array_equal(kept[np.minimum(where, len(kept) - 1)], old):
            raise PlanError("the plan removes an index that the graph picks by number; plan again on this network")
        return where

    def gather_instead(self, node: fx.Node, source: Any, dim: int, old: np.ndarray) -> None:
        """Replace a node by ``index_select`` of the old indices ``old`` of ``source``, at their new places."""
        kept = self.kept(source, dim)
        new = old if kept is None else self.positions_after(kept, old)
        name = f"_kfe_index_{node.name}"
        self.constants[name] = torch.from_numpy(new.astype(np.int64))
        with self.graph.inserting_before(node):
            index = self.graph.get_attr(name)
            picked = self.graph.call_function(aten.index_select.default, (source, dim, index))
        picked.meta = dict(node.meta)
        node.replace_all_uses_with(picked)
        self.graph.erase_node(node)

    def run(self) -> dict[str, torch.Tensor]:
        """Rewrite every literal that the removal touches; return index constants that the graph now reads."""
        # backwards, so that a relocator that replaces its node never hides the producers that are still to come
        for node in reversed(list(self.graph.nodes)):
            relocator = RELOCATORS.get(node.target) if node.op == "call_function" else None
            if relocator is not None and (
                self.any_change(node) or any(self.any_change(a) for a in node.all_input_nodes)
            ):
                relocator(self, node)
        return self.constants
