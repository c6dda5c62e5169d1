"""Latency predicted for ONNX Runtime on a CPU, float32, batch 1, one thread: the graph as the kernels that will run.

Only ratios count: the caller anchors them on the measured dense latency, and a closed loop corrects what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import fx

from kfe_fx.cost.count import CostModel, SumCost, Term
from kfe_fx.cost.kernels import ConvKernel, ElementKernel, GemmKernel, RecurrentKernel
from kfe_fx.cost.multiplications import (
    ANY_CONVOLUTION,
    CONVOLUTIONS,
    PRODUCTS,
    TRANSPOSED,
    aten,
    is_transposed,
    multiplications,
)
from kfe_fx.cost.profile import CELL_FACTORS, ELEMENT_FACTORS, SCAN_FACTORS, SCAN_NODES, Profile
from kfe_fx.cost.widths import ONE, Product, Removed, product_of
from kfe_fx.recurrent.norms import shared_rows
from kfe_fx.recurrent.op import RECURRENT, Arguments


class LatencyModel(Protocol):
    """What predicts latency: a Cost whose unit is free."""

    def predict(self, removed: Removed) -> float:
        """Return the time when the units in ``removed`` are gone, in units of its own."""
        ...

    def terms(self) -> Sequence[Term] | None:
        """Return the kernels, or None where the model does not tell them apart."""
        ...


# what ONNX Runtime computes inside a convolution's kernel
_FUSED_ACTIVATIONS = {
    aten.relu.default,
    aten.relu6.default,
    aten.hardtanh.default,
    aten.clamp.default,
    aten.leaky_relu.default,
    aten.sigmoid.default,
    aten.tanh.default,
    aten.hardsigmoid.default,
    aten.hardswish.default,
}
_FREE = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.view_as.default,
    aten.reshape_as.default,
    aten.expand.default,
    aten.expand_as.default,
    aten.detach.default,
    aten.alias.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.to.dtype,
}
_TRANSPOSES = {aten.permute.default, aten.transpose.int, aten.t.default, aten.pixel_shuffle.default, aten.roll.default}
_BINARY = {aten.add.Tensor, aten.mul.Tensor}
_POOLS = {aten.max_pool2d.default, aten.avg_pool2d.default}
_CONCATENATIONS = {aten.cat.default}
_STAYS_BLOCKED = {*_FUSED_ACTIVATIONS, aten.silu.default, aten.batch_norm.default, aten.upsample_nearest2d.vec}


class RooflineLatency(SumCost):
    """Sum of a roofline per fused kernel, on padded shapes, with changes of layout charged where they happen."""

    def __init__(self, model: CostModel, profile: Profile | None = None) -> None:
        """Divide the evaluation graph of ``model`` into kernels, timed by ``profile`` (default: built in)."""
        self.profile = profile or Profile()
        super().__init__(model.widths, _Kernels(model, self.profile).run())


class _Kernels:
    def __init__(self, model: CostModel, profile: Profile) -> None:
        self.model = model
        self.profile = profile
        self.terms: list[Term] = []
        self.absorbed: dict[fx.Node, fx.Node] = {}  # node -> the convolution that computes it too
        self.blocked: set[fx.Node] = set()
        self.plain_copies: set[fx.Node] = set()
        self.blocked_copies: set[fx.Node] = set()
        self.varying: set[fx.Node] = set()

    def run(self) -> list[Term]:
        for node in self.model.graph.nodes:
            if node.op == "placeholder":
                self.varying.add(node)
            elif node.op == "output":
                self._reorders(node, wants_blocked=False)
            elif node.op == "call_function" and not self.varying.isdisjoint(node.all_input_nodes):
                self.varying.add(node)
                self._visit(node)
        return self.terms

    def _visit(self, node: fx.Node) -> None:
        if node in self.absorbed:
            self.blocked.add(node)
            self._reorders(node, wants_blocked=True)
            return
        if not self.model.is_tensor(node) and not isinstance(self.model.values.get(node), list | tuple):
            return
        if node.target in CONVOLUTIONS | TRANSPOSED | ANY_CONVOLUTION:
            self._convolution(node)
            return
        if node.target in _FREE or getattr(node.target, "__name__", "") == "getitem":
            if node.target is aten.clone.default or node.target in (aten.dropout.default, aten.contiguous.default):
                self.blocked |= {node} if node.args[0] in self.blocked else set()
            else:
                self._reorders(node, wants_blocked=False)
            return
        stays = self._stays_blocked(node)
        self._reorders(node, wants_blocked=stays)
        if stays:
            self.blocked.add(node)
        matrix = _MATRIX_RULES.get(node.target)
        if matrix is not None:
            matrix(self, node)
        else:
            self._elements(node, stays)

    # layout ----------------------------------------------------------------------------------------------------------

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        return [arg for arg in node.all_input_nodes if arg in self.varying and self.model.is_tensor(arg)]

    def _stays_blocked(self, node: fx.Node) -> bool:
        inputs = self._inputs(node)
        if not inputs or any(arg not in self.blocked for arg in inputs):
            return False
        if node.target in _BINARY:
            return len(inputs) == 2 and self.model.shape(inputs[0]) == self.model.shape(inputs[1])
        if node.target in _CONCATENATIONS:
            return bool(len(node.args) > 1 and node.args[1] == 1)
        return node.target in _STAYS_BLOCKED or node.target in _POOLS

    def _reorders(self, node: fx.Node, *, wants_blocked: bool) -> None:
        for arg in self._inputs(node):
            done = self.blocked_copies if wants_blocked else self.plain_copies
            if (arg in self.blocked) == wants_blocked or arg in done:
                continue
            done.add(arg)
            elements = product_of(self.model.shape(arg))
            self.terms.append(ElementKernel(arg.name, self.profile, elements, self.profile.reorder))

    # kernels ---------------------------------------------------------------------------------------------------------

    def _convolution(self, node: fx.Node) -> None:
        shape = self.model.shape
        source: Any = node.args[0]
        weight, out, image = shape(node.args[1]), shape(node), shape(source)  # type: ignore[arg-type]
        taps, positions = _constant(weight[2:]), _constant(out[2:])
        if is_transposed(node):
            positions = _constant(image[2:])
            spread = product_of(out[1:2]) * (positions * taps)
            self._reorders(node, wants_blocked=False)
            self.terms.append(
                GemmKernel(node.name, self.profile, ONE, Product(positions), image[1], weight[1] * taps, weights=True)
            )
            self.terms.append(ElementKernel(node.name, self.profile, spread, self.profile.column))
            return
        blocked = len(out) == 4
        rows = _constant(out[2:-1])
        if blocked:
            self.blocked.add(node)
            narrow = self.model.values[source].shape[1] < self.profile.block
            if not narrow or source in self.blocked:
                self._reorders(node, wants_blocked=True)
            self._absorb(node)
        self.terms.append(
            ConvKernel(node.name, self.profile, positions, taps, image[1], weight[1], out[1], rows, blocked)
        )

    def _absorb(self, node: fx.Node) -> None:
        """Claim the norm, the sum and the activation that run inside the kernel of a convolution."""
        stages: list[Callable[[fx.Node, fx.Node], bool]] = [
            lambda user, last: user.target is aten.batch_norm.default and user.args[0] is last,
            lambda user, _: user.target in (aten.add.Tensor, aten.add_.Tensor) and self._same_shapes(user),
            lambda user, _: user.target in _FUSED_ACTIVATIONS,
        ]
        last = node
        for stage in stages:
            users = list(last.users)
            if len(users) == 1 and users[0] not in self.absorbed and stage(users[0], last):
                last = users[0]
                self.absorbed[last] = node

    def _same_shapes(self, node: fx.Node) -> bool:
        shapes = [self.model.values[arg].shape for arg in self._inputs(node)]
        return len(shapes) == 2 and all(shape == self.model.values[node].shape for shape in shapes)

    def _elements(self, node: fx.Node, stays: bool) -> None:
        shape = self.model.shape
        inputs = [product_of(shape(arg)) for arg in self._inputs(node)]
        output = product_of(shape(node)) if self.model.is_tensor(node) else inputs[0]
        name = str(node.target).removeprefix("aten.").split(".")[0].rstrip("_")
        p = self.profile
        if node.target in _TRANSPOSES:
            self._add(node, output, p.transpose)
        elif name in ELEMENT_FACTORS:
            aligned = shape(node)[1] if stays and (node.target in _BINARY or node.target in _CONCATENATIONS) else None
            self._add(node, output, p.element * ELEMENT_FACTORS[name], aligned, [*inputs, output])
        elif "pool" in name and "adaptive" not in name:
            window = node.args[1] if isinstance(node.args[1], list | tuple) else [node.args[1]]
            taps = _whole(window) ** (2 if len(window) == 1 else 1)
            self._add(node, output, p.element * 0.22 * taps, shape(node)[1] if stays else None, [*inputs, output])
        else:  # reductions, splits and everything unknown: what is read or what is written, whichever is more
            most = max([*inputs, output], key=lambda product: product.at(self.model.widths.dense))
            self._add(node, most, p.element)

    def _add(
        self,
        node: fx.Node,
        elements: Product,
        each: float,
        aligned: Product | None = None,
        moved: Sequence[Product] = (),
    ) -> None:
        self.terms.append(ElementKernel(node.name, self.profile, elements, each, aligned, tuple(moved)))

    def _linear(self, node: fx.Node) -> None:
        shape = self.model.shape
        weight = shape(node.args[1])  # type: ignore[arg-type]  # [out, in]
        rows = product_of(shape(node)[:-1])
        self.terms.append(GemmKernel(node.name, self.profile, ONE, rows, weight[1], weight[0], weights=True))
        biased = len(node.args) > 2 and node.args[2] is not None
        if biased and len(shape(node)) > 2:  # only a product of two matrices takes the bias along
            self._add(node, product_of(shape(node)), self.profile.element * ELEMENT_FACTORS["add"])

    def _matmul(self, node: fx.Node) -> None:
        left, right = (shape_of(self.model, node.args[place]) for place in PRODUCTS[node.target])  # type: ignore[index]
        out = self.model.shape(node)
        weights = len(right) == 2
        repeats = ONE if weights else product_of(out[:-2])
        rows = product_of(left[:-1]) if weights else product_of(out[-2:-1])
        columns = right[-1] if len(right) > 1 else ONE
        self.terms.append(GemmKernel(node.name, self.profile, repeats, rows, left[-1], columns, weights))

    def _attention(self, node: fx.Node) -> None:
        query, key, value = (shape_of(self.model, operand) for operand in node.args[:3])
        heads = product_of(query[:-2])
        p = self.profile
        self.terms.append(ElementKernel(node.name, p, product_of(key), p.transpose))
        self.terms.append(GemmKernel(node.name, p, heads, query[-2], query[-1], key[-2], weights=False))
        scores = heads * query[-2] * key[-2]
        self.terms.append(ElementKernel(node.name, p, scores, p.element * (ELEMENT_FACTORS["softmax"] + 1)))
        self.terms.append(GemmKernel(node.name, p, heads, query[-2], key[-2], value[-1], weights=False))

    def _einsum(self, node: fx.Node) -> None:
        for product in multiplications(node, self.model.shape):
            self.terms.append(
                GemmKernel(node.name, self.profile, ONE, product, ONE, Product(self.profile.block), False)
            )

    def _recurrent(self, node: fx.Node) -> None:
        # the transposes around it are left out: at one sequence they move nothing
        shape, p, call = self.model.shape, self.profile, Arguments.of(node)
        inputs, gates = shape(call.weight_ih), shape(call.weight_hh)  # [g H, I], [g H, P]
        value = shape(call.input)
        projection = None if call.weight_hr is None else product_of(shape(call.weight_hr))
        hidden = shape(call.weight_hr)[1] if call.weight_hr is not None else gates[1]
        normalised = [one for one in (call.gamma_hh, call.gamma_c) if one is not None]
        if self._is_scan(call):
            nodes = SCAN_NODES[call.cell] + len(normalised) * 2 + (projection is not None)
            each, overhead = SCAN_FACTORS[call.cell] * p.element, nodes * p.kernel
        else:
            each, overhead = CELL_FACTORS[call.cell] * p.element, p.step
        positions = product_of(value[:2])
        self.terms.append(GemmKernel(node.name, p, ONE, positions, inputs[1], inputs[0], weights=True))
        self.terms.append(
            RecurrentKernel(
                node.name, p, value[call.time_dim], value[1 - call.time_dim], gates[0], gates[1], hidden, projection,
                each, overhead,
            )
        )  # fmt: skip

    def _is_scan(self, call: Arguments) -> bool:
        """Tell whether ONNX has no operator for the layer: see ``kfe_fx.runtime.recurrent_weights``."""
        if call.weight_hr is not None or call.beta_c is not None:
            return True
        tables = (call.mean_ih, call.var_ih, call.mean_hh, call.var_hh, call.var_c)
        names = [str(one.target) for one in tables if one is not None and one.op == "get_attr"]
        return not shared_rows(*map(self.model.program.tensor, names))


_MATRIX_RULES: dict[Any, Callable[[_Kernels, fx.Node], None]] = {
    aten.linear.default: _Kernels._linear,
    **dict.fromkeys(PRODUCTS, _Kernels._matmul),
    aten.scaled_dot_product_attention.default: _Kernels._attention,
    aten.einsum.default: _Kernels._einsum,
    RECURRENT: _Kernels._recurrent,
}


def shape_of(model: CostModel, node: Any) -> tuple[Product, ...]:
    """Return the shape of an operand."""
    return model.shape(node)


def _constant(dims: Sequence[Product]) -> int:
    return product_of(dims).coefficient


def _whole(window: Sequence[Any]) -> int:
    return int(torch.Size([int(size) for size in window]).numel())
