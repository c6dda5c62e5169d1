"""Exact counts of a Program under any set of removed units: parameters, MACs, activation memory, bytes of weights."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import fx

from kfe_fx.cost.multiplications import multiplications
from kfe_fx.cost.widths import Product, Removed, Widths, product_of
from kfe_fx.program import Program, get_tensor, named_tensors, tied_names
from kfe_fx.shapes import propagate

if TYPE_CHECKING:
    from kfe_fx.labels.analysis import Analysis

Shape = tuple[Product, ...]


class Term(Protocol):
    """One summand of a cost: what it costs depends on a few widths; ``owner`` is the node or tensor that causes it."""

    @property
    def owner(self) -> str:
        """The name of the node or tensor."""
        ...

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths it depends on."""
        ...

    def cost(self, sizes: Sequence[int]) -> float:
        """Return the cost where width ``w`` has the size ``sizes[w]``."""
        ...


class Cost(Protocol):
    """Anything that can be budgeted. Only ratios to ``predict(())`` matter, so the unit is free."""

    def predict(self, removed: Removed) -> float:
        """Return the cost when the units in ``removed`` are gone."""
        ...

    def terms(self) -> Sequence[Term] | None:
        """Return the summands of the cost, or None where it is no sum (the solver is slower then)."""
        ...


@dataclass(frozen=True)
class Count:
    """One product of sizes and who owns it."""

    owner: str
    product: Product

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths it depends on."""
        return self.product.widths

    def cost(self, sizes: Sequence[int]) -> int:
        """Return the count at these sizes."""
        return self.product.at(sizes)


class SumCost:
    """A cost that is a sum of terms over the widths of a network."""

    def __init__(self, widths: Widths, terms: Iterable[Term]) -> None:
        """Take the terms as they are."""
        self._widths = widths
        self._terms = tuple(terms)

    def terms(self) -> Sequence[Term]:
        """Return the summands."""
        return self._terms

    def predict(self, removed: Removed) -> float:
        """Return the sum when the units in ``removed`` are gone."""
        sizes = self._widths.sizes(removed).tolist()
        return sum(term.cost(sizes) for term in self._terms)


@dataclass(frozen=True)
class _Storage:
    """Memory that one node allocates: bytes, and the first and last node (by position) between which it lives."""

    owner: str
    bytes: Product
    start: int
    end: int


class PeakMemory:
    """The largest sum of activations alive at once, in bytes, when the graph runs in order.

    Views share the memory of what they view; inputs live until their last use; every other operation allocates its
    output while its inputs are still alive. Weights are not counted.
    """

    def __init__(self, widths: Widths, storages: Sequence[_Storage], length: int) -> None:
        """Take the storages of a graph of ``length`` nodes."""
        self._widths = widths
        self._storages = tuple(storages)
        self._start = np.array([s.start for s in storages], dtype=np.int64)
        self._end = np.array([s.end for s in storages], dtype=np.int64)
        self._length = length
        self._coefficient = np.array([s.bytes.coefficient for s in storages], dtype=np.int64)
        most = max((len(s.bytes.widths) for s in storages), default=0)
        self._factors = np.array(
            [[*s.bytes.widths, *[-1] * (most - len(s.bytes.widths))] for s in storages], dtype=np.int64
        )

    def terms(self) -> None:
        """Say that a peak is no sum."""

    def _alive(self, removed: Removed) -> np.ndarray:
        """Return the bytes alive at each node, [length]."""
        sizes = np.append(self._widths.sizes(removed), 1)  # -1 reads the 1
        taken = self._coefficient * sizes[self._factors].prod(axis=1) if len(self._storages) else self._coefficient
        change = np.zeros(self._length + 1, dtype=np.int64)
        np.add.at(change, self._start, taken)
        np.subtract.at(change, self._end + 1, taken)
        return np.cumsum(change)[: self._length]

    def predict(self, removed: Removed) -> int:
        """Return the peak in bytes when the units in ``removed`` are gone."""
        return int(self._alive(removed).max(initial=0))

    def smooth(self, removed: Removed) -> float:
        """Return a soft maximum, (Σ b¹⁶)^(1/16): it also falls when one of several equal peaks does.

        The solver follows it, because cutting one of several equal peaks alone saves nothing.
        """
        alive = self._alive(removed).astype(np.float64)
        peak = alive.max(initial=0.0)
        return float(peak * ((alive / peak) ** 16).sum() ** (1 / 16)) if peak else 0.0


class CostModel:
    """Sizes of every tensor of a Program as functions of the removed units, and the counts that follow from them.

    Shapes are those of the evaluation graph with every axis named "batch" at 1. ``removed`` is a collection of unit ids
    or one bool per unit.
    """

    def __init__(self, program: Program, analysis: Analysis) -> None:
        """Read the shapes of the graph and the labels of ``analysis``; both are left as they are."""
        self.program = program
        self.analysis = analysis
        self.widths = Widths(len(analysis.units))
        self.graph: fx.Graph = program.graphs["eval"]
        sizes = {axis: 1 for dims in program.axes.values() for axis in dims.values() if axis == "batch"}
        self.values: dict[fx.Node, Any] = propagate(program, sizes=sizes)
        self._tied = tied_names(program.module())
        self._shapes: dict[fx.Node, Shape] = {}
        self._tensors: dict[str, Shape] = {}

    # sizes -----------------------------------------------------------------------------------------------------------

    def is_tensor(self, node: Any) -> bool:
        """Tell whether an argument is a node that holds one tensor."""
        return isinstance(node, fx.Node) and isinstance(self.values.get(node), torch.Tensor)

    def shape(self, node: fx.Node) -> Shape:
        """Return the size of each dim of a tensor node."""
        if node not in self._shapes:
            if node.op == "get_attr":
                self._shapes[node] = self.tensor_shape(str(node.target))
            else:
                self._shapes[node] = self._products(self.values[node].shape, self.analysis.layout(node.name))
        return self._shapes[node]

    def tensor_shape(self, name: str) -> Shape:
        """Return the size of each dim of a parameter, buffer or constant."""
        if name not in self._tensors:
            known = (other for other in self._tied.get(name, (name,)) if other in self.analysis.params)
            layout = self.analysis.params.get(next(known, name), ()) if name in self._tied else ()
            self._tensors[name] = self._products(get_tensor(self.program.module(), name).shape, layout)
        return self._tensors[name]

    def _products(self, shape: Sequence[int], layout: Any) -> Shape:
        layers = list(layout) or [()] * len(shape)
        return tuple(self.widths.product(dim, int(size)) for size, dim in zip(shape, layers, strict=True))

    def size(self, name: str, dim: int, removed: Removed) -> int:
        """Return the size of dim ``dim`` of a node (by name) or tensor (by dotted name) when ``removed`` is gone."""
        node = next((node for node in self.graph.nodes if node.name == name), None)
        product = (self.shape(node) if node is not None else self.tensor_shape(name))[dim]
        mask = self.widths.mask(removed)
        sizes = {width: self.widths.size(width, mask) for width in product.widths}
        return product.coefficient * int(np.prod([sizes[width] for width in product.widths], dtype=np.int64))

    # counts ----------------------------------------------------------------------------------------------------------

    def parameters(self, removed: Removed = ()) -> int:
        """Count the parameters, tied ones once, buffers not."""
        return int(self.parameter_cost.predict(removed))

    def macs(self, removed: Removed = ()) -> int:
        """Count the multiply-accumulates of all contractions at batch 1 (half of PyTorch's FLOPs)."""
        return int(self.mac_cost.predict(removed))

    def memory(self, removed: Removed = ()) -> int:
        """Return the peak bytes of activations at batch 1; see ``PeakMemory``."""
        return self.memory_cost.predict(removed)

    def weight_bytes(self, removed: Removed = ()) -> int:
        """Return the bytes of all parameters and buffers, tied ones once."""
        return int(self.weight_cost.predict(removed))

    @cached_property
    def parameter_cost(self) -> SumCost:
        """The number of parameters as a cost."""
        named = self.program.module().named_parameters()  # each once
        return self._sum((name, product_of(self.tensor_shape(name))) for name, _ in named)

    @cached_property
    def weight_cost(self) -> SumCost:
        """The bytes of parameters and buffers as a cost."""
        named = named_tensors(self.program.module())
        first = {id(value): name for name, value in reversed(named.items())}
        return self._sum(
            (name, product_of(self.tensor_shape(name)) * value.element_size())
            for name, value in named.items()
            if first[id(value)] == name
        )

    @cached_property
    def mac_cost(self) -> SumCost:
        """The MACs as a cost."""
        counted = ((node.name, multiplications(node, self.shape)) for node in self.graph.nodes)
        return self._sum((name, product) for name, products in counted for product in products)

    @cached_property
    def memory_cost(self) -> PeakMemory:
        """The peak of activation memory as a cost."""
        return PeakMemory(self.widths, _storages(self), len(self.graph.nodes))

    def _sum(self, products: Iterable[tuple[str, Product]]) -> SumCost:
        # equal products of one owner become one term
        merged: Counter[tuple[str, tuple[int, ...]]] = Counter()
        for owner, product in products:
            merged[owner, product.widths] += product.coefficient
        return SumCost(self.widths, [Count(owner, Product(c, widths)) for (owner, widths), c in merged.items()])


def _storages(model: CostModel) -> list[_Storage]:
    """Find what each activation allocates and how long it lives; fake tensors alias as the real ones do."""
    nodes = list(model.graph.nodes)
    varying: set[fx.Node] = set()  # what depends on no input is computed once, before the network runs
    owner: dict[int, str] = {}
    amount: dict[int, Product] = {}
    start: dict[int, int] = {}
    end: dict[int, int] = {}
    for position, node in enumerate(nodes):
        if node.op == "get_attr" or (node.op != "placeholder" and varying.isdisjoint(node.all_input_nodes)):
            continue
        varying.add(node)
        held = _tensors_in(model.values.get(node))
        used = [
            tensor for arg in node.all_input_nodes if arg in varying for tensor in _tensors_in(model.values.get(arg))
        ]
        for tensor in (*used, *held):
            end[_storage(tensor)] = position
        if node.op == "output":
            continue
        for tensor in held:
            key = _storage(tensor)
            if key not in start:
                owner[key], start[key] = node.name, 0 if node.op == "placeholder" else position
                amount[key] = Product(tensor.numel() * tensor.element_size())
            made_here = owner[key] == node.name or (node.target is operator.getitem and owner[key] == str(node.args[0]))
            if made_here and held[0] is model.values[node]:  # of several results each is labelled where it is picked
                amount[key] = product_of(model.shape(node)) * tensor.element_size()
    weights = {_storage(model.values[node]) for node in nodes if node.op == "get_attr" and model.is_tensor(node)}
    return [_Storage(owner[key], amount[key], start[key], end[key]) for key in start if key not in weights]


def _tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for part in value for tensor in _tensors_in(part)] if isinstance(value, list | tuple) else []


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
