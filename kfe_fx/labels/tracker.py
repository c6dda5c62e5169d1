"""The state of one label analysis, and the few operations that every rule is written in.

The value of a tensor is a tuple over its dims; each dim is a tuple of *layers*; a layer is an array with one label per
index. An index is removed when the label of any layer is removed. Mostly there is one layer; flattening two labelled
dims gives two. A dim without labels is the empty tuple.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.fx.node import map_arg

from kfe_fx.labels.states import RESIZE, States
from kfe_fx.labels.unionfind import FROZEN, Reason, UnionFind
from kfe_fx.program import Program

Layers = tuple[np.ndarray, ...]
Dims = tuple[Layers, ...]


class ByName(dict[str, Any]):
    """A table over nodes keyed by their names, so that it also serves a copy of the graph."""

    def __getitem__(self, node: Any) -> Any:
        """Return the entry of a node (or of a name)."""
        return super().__getitem__(getattr(node, "name", node))

    def __setitem__(self, node: Any, value: Any) -> None:
        """Set the entry of a node (or of a name)."""
        super().__setitem__(getattr(node, "name", node), value)

    def __contains__(self, node: Any) -> bool:
        """Tell whether a node (or a name) has an entry."""
        return super().__contains__(getattr(node, "name", node))

    def fill(self, entries: dict[Any, Any]) -> None:
        """Add entries keyed by nodes or names."""
        for node, value in entries.items():
            self[node] = value

    def get(self, node: Any, default: Any = None) -> Any:
        """Return the entry of a node (or of a name), else ``default``."""
        return super().get(getattr(node, "name", node), default)


class Tracker:
    """Labels of the parameters and of the nodes of one graph, while the rules run."""

    relocates = True  # whether literals will follow; an analysis that only looks may spread further

    def __init__(
        self, program: Program, classes: UnionFind, parameters: dict[str, Dims], *, heads: str = "auto"
    ) -> None:
        """Share ``classes`` and ``parameters`` between the graphs of a Program."""
        self.program = program
        self.classes = classes
        self.parameters = parameters
        self.heads = heads
        self.sizes: dict[str, int] = {}  # sizes of the dynamic axes during the analysis
        self.fakes = ByName()
        self.values = ByName()
        self.static = ByName()  # nodes that no input reaches: parameters and what is computed from them alone
        self.minted = ByName()  # contraction -> dims of its output that a parameter brings
        self.decisions: dict[str, str] = {}
        self.states = States()  # of recurrent layers, among the inputs and outputs
        self.resizes = False  # whether they may lose units
        self.statistics: dict[str, tuple[int, ...]] = {}

    # reading ---------------------------------------------------------------------------------------------------------

    def shape(self, node: Any) -> tuple[int, ...]:
        """Return the concrete shape of a tensor node."""
        return tuple(int(size) for size in self.fakes[node].shape)

    def is_tensor(self, arg: Any) -> bool:
        """Tell whether an argument is a node that holds one tensor."""
        return isinstance(arg, fx.Node) and isinstance(self.fakes.get(arg), torch.Tensor)

    def dims(self, node: Any) -> Dims:
        """Return the labels of a tensor node."""
        return self.values[node]

    def tensors(self, node: fx.Node) -> list[fx.Node]:
        """Return the tensor arguments of a node, in order."""
        return [arg for arg in node.all_input_nodes if self.is_tensor(arg)]

    def concrete(self, args: Any) -> Any:
        """Replace integer nodes in arguments by their value at the analysis sizes."""
        return map_arg(args, lambda arg: self.fakes[arg] if not self.is_tensor(arg) else arg)

    # writing ---------------------------------------------------------------------------------------------------------

    def reason(self, node: fx.Node, text: str) -> Reason:
        """Make a reason that names the node, its module and its source line."""
        return Reason(text, node.name, node.meta.get("source", ""))

    def freeze(self, layers: Layers, node: fx.Node | None, text: str = "") -> None:
        """Freeze the labels of one dim; without ``text`` as a matter of course (kernel positions, ...)."""
        for layer in layers:
            self.classes.freeze(layer, self.reason(node, text) if node is not None and text else None)

    def freeze_all(self, node: fx.Node, text: str, inputs: list[fx.Node] | None = None) -> None:
        """Freeze every label of the inputs of a node."""
        for arg in node.all_input_nodes if inputs is None else inputs:
            value = self.values.get(arg)
            for dims in value if isinstance(value, list) else [value]:
                for layers in dims or ():
                    self.freeze(layers, node, text)

    def unify(self, first: Layers, second: Layers, node: fx.Node) -> Layers:
        """Merge two dims that must lose the same indices; against a dim without labels the other is frozen."""
        if not first or not second:
            self.freeze(first + second, node, "meets a dim that cannot shrink")
            return ()
        if len(first) != len(second):
            first, second = self.single(first, node), self.single(second, node)
        for one, other in zip(first, second, strict=True):
            stuck = (one == FROZEN) | (other == FROZEN)
            self.freeze((one[stuck], other[stuck]), node, "meets an index that cannot be removed")
            self.classes.union(one, other, self.reason(node, "joins"))
        return first

    def single(self, layers: Layers, node: fx.Node) -> Layers:
        """Keep the layer with the most classes (free ones last) and freeze the other layers."""
        if len(layers) <= 1:
            return layers
        rank = lambda layer: (not self.classes.is_free(layer), self.classes.distinct(layer))
        best = max(layers, key=rank)
        for layer in layers:
            if layer is not best:
                self.classes.freeze(layer, self.reason(node, "a second way to remove the same indices"))
        return (best,)

    def free(self, size: int) -> Layers:
        """Mint labels for a dim along which all indices are alike, so that it takes any width."""
        return (self.classes.fresh(size, free=True),) if size > 1 else ()

    def apply(self, rule: Callable[[Any, fx.Node], Any], node: fx.Node) -> Any:
        """Return the labels that a rule finds for a node."""
        return rule(self, node)

    def unknown(self, node: fx.Node, tensors: list[fx.Node]) -> Any:
        """Return the labels of what an operation without a rule makes: none, and its inputs are frozen."""
        self.freeze_all(node, f"goes into {str(node.target).removesuffix('.default')}, which has no rule", tensors)
        return unlabelled(self.fakes[node])

    def done(self, node: fx.Node) -> None:
        """Be told that a node has its labels."""

    def input(self, node: fx.Node) -> Dims:
        """Return the labels of an input of the network: none, an input keeps its shape; states may not."""
        shape: tuple[int, ...] = tuple(getattr(self.fakes[node], "shape", ()))
        if self.resizes and str(node.target) in self.states.inputs and shape and shape[-1] > 1:
            self.minted[node] = {len(shape) - 1}
            others: Dims = ((),) * (len(shape) - 1)
            return (*others, (self.classes.fresh(int(shape[-1])),))
        return tuple(() for _ in shape)

    def output(self, node: fx.Node) -> None:
        """Freeze what leaves the network: an output keeps its shape; states may not."""
        leaves: Any = node.args[0]
        states = {leaves[place] for place in self.states.outputs}
        self.freeze_all(node, "is an output of the network", [arg for arg in node.all_input_nodes if arg not in states])
        for state in states:
            dims = self.dims(state)
            for layers in dims[:-1]:
                self.freeze(layers, node, "is an output of the network")
            if not self.resizes:
                self.freeze(dims[-1], node, f"is a state that leaves the network ({RESIZE})")

    def parameter(self, name: str, tensor: torch.Tensor) -> Dims:
        """Return (minting them at first sight) the labels of a parameter, buffer or constant."""
        if name not in self.parameters:
            floating = tensor.is_floating_point() or tensor.is_complex()
            self.parameters[name] = tuple(
                (self.classes.fresh(size),) if floating and size > 1 else () for size in tensor.shape
            )
        return self.parameters[name]


def unlabelled(fake: Any) -> Any:
    """Return the labels of a value that has none: () per dim, a list of such for several outputs."""
    if isinstance(fake, torch.Tensor):
        return tuple(() for _ in fake.shape)
    return [unlabelled(part) for part in fake]
