"""Latency predicted for ONNX Runtime on a CPU, batch 1: the graph as the kernels that will run, as a device times them.

Only ratios count: the caller anchors them on the measured dense latency, and a closed loop corrects what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import fx

from kfe_fx.cost.count import CostModel, SumCost, Term
from kfe_fx.cost.kernels import CallKernel, ConvKernel, ElementKernel, GemmKernel, RecurrentKernel
from kfe_fx.cost.multiplications import (
    ANY_CONVOLUTION,
    CONVOLUTIONS,
    PRODUCTS,
    TRANSPOSED,
    aten,
    is_transposed,
    multiplications,
)
from kfe_fx.cost.operators import (
    ATTENTION_KERNELS,
    BINARY,
    BROADCASTS,
    CONCATENATIONS,
    FREE,
    FREE_ACTIVATIONS,
    FUSED_ACTIVATIONS,
    PADS,
    POOLS,
    RESHAPES,
    ROWWISE,
    STAYS_BLOCKED,
    TRANSPOSES,
)
from kfe_fx.cost.profile import CELL_FACTORS, ELEMENT_FACTORS, SCAN_FACTORS, SCAN_NODES, Profile
from kfe_fx.cost.widths import ONE, Product, Removed, product_of
from kfe_fx.program import argument
from kfe_fx.recurrent.norms import shared_rows
from kfe_fx.recurrent.op import RECURRENT, Arguments

if TYPE_CHECKING:
    from kfe_fx.cost.device import Device


class LatencyModel(Protocol):
    """What predicts latency, made of a network and a device: ``Predictor(model, device)``, see ``cost.predictors``.

    ``model`` (a CostModel) counts under any removal: ``model.parameters(removed)``, ``model.macs(removed)``, shapes as
    products of widths. ``device`` (a Device, a Profile, or None where nothing was measured) holds the constants.
    """

    @property
    def name(self) -> str:
        """How reports call the predictor."""
        ...

    def predict(self, removed: Removed) -> float:
        """Return nanoseconds when the units in ``removed`` are gone: ids, or one bool per unit.

        What is measured here anchors the prediction, so that only its ratios matter; for ``--target`` nothing does.
        """
        ...

    def terms(self) -> Sequence[Term] | None:
        """Return the kernels, whose costs add up to what is predicted, or None where the model is no such sum.

        Without them the solver evaluates all of the model for every question it asks, which is slower.
        """
        ...


class RooflineLatency(SumCost):
    """Sum of a roofline per fused kernel, on padded shapes, with changes of layout charged where they happen."""

    name = "roofline"

    def __init__(self, model: CostModel, device: Profile | Device | None = None) -> None:
        """Divide the evaluation graph of ``model`` into kernels, timed by ``device`` (default: as built in)."""
        self.profile = device if isinstance(device, Profile) else Profile() if device is None else device.profile
        super().__init__(model.widths, _Kernels(model, self.profile).run())


class _Kernels:
    def __init__(self, model: CostModel, profile: Profile) -> None:
        self.model = model
        self.profile = profile
        self.terms: list[Term] = []
        self.absorbed: dict[fx.Node, fx.Node] = {}  # node -> the convolution that computes it too
        self.fused: set[fx.Node] = set()  # activations inside a matrix product
        self.blocked: set[fx.Node] = set()
        self.plain_copies: set[fx.Node] = set()
        self.blocked_copies: set[fx.Node] = set()
        self.varying: set[fx.Node] = set()
        # how far the weights of one run are from the core: by all of the dense network, so that terms stay apart
        convolved, others = _weights(model)
        self.missed = max(0.0, 1 - profile.reach / max(1, convolved + others))
        self.weight_byte = _weight_byte(profile, convolved + others)
        # recurrent kernels are those of float32 in an int8 network too
        self.floats = profile.floats or profile
        self.float_byte = _weight_byte(self.floats, convolved + others)

    def run(self) -> list[Term]:
        self.terms.append(CallKernel("the call itself", self.profile))
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
        if node in self.fused:
            return
        if node in self.absorbed:
            self.blocked.add(node)
            self._reorders(node, wants_blocked=True)
            return
        if not self.model.is_tensor(node) and not isinstance(self.model.values.get(node), list | tuple):
            return
        if node.target in CONVOLUTIONS | TRANSPOSED | ANY_CONVOLUTION:
            self._convolution(node)
            return
        vanishes = node.target in _PASSES_ON or (node.target in PADS and _is_folded(node, self.model))
        if vanishes or node.target in FREE or getattr(node.target, "__name__", "") == "getitem":
            if vanishes:
                self.blocked |= {node} if node.args[0] in self.blocked else set()
            else:
                self._reorders(node, wants_blocked=False)
                if node.target in RESHAPES and not any(user.op == "output" for user in node.users):
                    self._add(node, product_of(self.model.shape(node)), 0.0)
            return
        stays = self._stays_blocked(node)
        self._reorders(node, wants_blocked=stays)
        if stays:
            self.blocked.add(node)
        if self._norm_behind(node) is not None:
            return
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
        if node.target in BINARY:
            return len(inputs) == 2 and self.model.shape(inputs[0]) == self.model.shape(inputs[1])
        if node.target in CONCATENATIONS:
            return bool(len(node.args) > 1 and node.args[1] == 1)
        return node.target in STAYS_BLOCKED or node.target in POOLS

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
                GemmKernel(
                    node.name, self.profile, ONE, Product(positions), image[1], weight[1] * taps, self.weight_byte
                )
            )
            self.terms.append(ElementKernel(node.name, self.profile, spread, self.profile.column))
            return
        blocked, activation = len(out) == 4, 0.0
        if blocked:
            self.blocked.add(node)
            narrow = self.model.values[source].shape[1] < self.profile.block
            if not narrow or source in self.blocked:
                self._reorders(node, wants_blocked=True)
            last = self._absorb(node)
            if last.target in FUSED_ACTIVATIONS - FREE_ACTIVATIONS:
                activation = self.profile.element * ELEMENT_FACTORS[_name(last)]
        self.terms.append(
            ConvKernel(
                node.name, self.profile, positions, taps, image[1], weight[1], out[1], blocked, self.missed, activation
            )
        )

    def _absorb(self, node: fx.Node) -> fx.Node:
        """Claim the norm, the sum and the activation that run inside the kernel of a convolution; return the last."""
        stages: list[Callable[[fx.Node, fx.Node], bool]] = [
            lambda user, last: user.target is aten.batch_norm.default and user.args[0] is last,
            lambda user, _: user.target in (aten.add.Tensor, aten.add_.Tensor) and self._same_shapes(user),
            lambda user, _: user.target in FUSED_ACTIVATIONS,
        ]
        last = node
        for stage in stages:
            users = list(last.users)
            if len(users) == 1 and users[0] not in self.absorbed and stage(users[0], last):
                last = users[0]
                self.absorbed[last] = node
        return last

    def _same_shapes(self, node: fx.Node) -> bool:
        shapes = [self.model.values[arg].shape for arg in self._inputs(node)]
        return len(shapes) == 2 and all(shape == self.model.values[node].shape for shape in shapes)

    def _norm_behind(self, node: fx.Node) -> fx.Node | None:
        """Return the layer norm that a sum runs inside, None where there is none."""
        users = list(node.users)
        if node.target is not aten.add.Tensor or [user.target for user in users] != [aten.layer_norm.default]:
            return None
        fits = self.model.values[node].dim() == 3 and self._same_shapes(node)
        return users[0] if fits and len(argument(users[0], 1, "normalized_shape")) == 1 else None

    def _elements(self, node: fx.Node, stays: bool) -> None:
        shape = self.model.shape
        inputs = [product_of(shape(arg)) for arg in self._inputs(node)]
        output = product_of(shape(node)) if self.model.is_tensor(node) else inputs[0]
        name, p = _name(node), self.profile
        if name == "layer_norm" and isinstance(node.args[0], fx.Node) and self._norm_behind(node.args[0]) is node:
            name = "skip_layer_norm"
        if node.target in TRANSPOSES:
            self._add(node, output, p.transpose)
        elif name in ELEMENT_FACTORS:
            aligned = shape(node)[1] if stays and (node.target in BINARY or node.target in CONCATENATIONS) else None
            self._add(node, output, p.element * ELEMENT_FACTORS[name], self._rows(node), aligned, [*inputs, output])
        elif "pool" in name and "adaptive" not in name:
            window = node.args[1] if isinstance(node.args[1], list | tuple) else [node.args[1]]
            taps = _whole(window) ** (2 if len(window) == 1 else 1)
            aligned = shape(node)[1] if stays else None
            self._add(node, output, p.element * 0.22 * taps, None, aligned, [*inputs, output])
        else:  # reductions, splits and everything unknown: what is read or what is written, whichever is more
            most = max([*inputs, output], key=lambda product: product.at(self.model.widths.dense))
            self._add(node, most, p.element)

    def _add(
        self,
        node: fx.Node,
        elements: Product,
        each: float,
        rows: Product | None = None,
        aligned: Product | None = None,
        moved: Sequence[Product] = (),
    ) -> None:
        self.terms.append(ElementKernel(node.name, self.profile, elements, each, rows, aligned, tuple(moved)))

    def _rows(self, node: fx.Node) -> Product | None:
        """Return the number of rows that a norm or a broadcast sum or product works through one by one."""
        if node.target in ROWWISE:
            return product_of(self.model.shape(node)[:-1])
        if node.target not in BROADCASTS:
            return None
        size = self.model.values[node].shape
        for arg in node.all_input_nodes:
            other = self.model.values[arg].shape if self.model.is_tensor(arg) else size
            if other.numel() not in (1, size.numel()):
                other = (1,) * (len(size) - len(other)) + tuple(other)
                # a row ends where the operand begins again, or moves on by one
                moves = [a != b for a, b in zip(size, other, strict=True)]
                inner = next((i for i, move in enumerate(reversed(moves)) if move != moves[-1]), len(size))
                return product_of(self.model.shape(node)[: len(size) - inner])
        return None

    def _linear(self, node: fx.Node) -> None:
        shape = self.model.shape
        weight = shape(node.args[1])  # type: ignore[arg-type]  # [out, in]
        rows = product_of(shape(node)[:-1])
        self.terms.append(
            GemmKernel(node.name, self.profile, ONE, rows, weight[1], weight[0], self.weight_byte, self.missed)
        )
        biased = len(node.args) > 2 and node.args[2] is not None
        if biased and len(node.users) == 1 and self._norm_behind(next(iter(node.users))) is not None:
            return  # it is added there as well
        if biased and len(shape(node)) > 2:  # only a product of two matrices takes the bias along
            self._add(node, product_of(shape(node)), self.profile.element * ELEMENT_FACTORS["add"], rows)
        elif biased and len(node.users) == 1 and next(iter(node.users)).target in FUSED_ACTIVATIONS:
            self.fused.add(next(iter(node.users)))

    def _matmul(self, node: fx.Node) -> None:
        left, right = (shape_of(self.model, node.args[place]) for place in PRODUCTS[node.target])  # type: ignore[index]
        out = self.model.shape(node)
        weights = len(right) == 2
        repeats = ONE if weights else product_of(out[:-2])
        rows = product_of(left[:-1]) if weights else product_of(out[-2:-1])
        columns = right[-1] if len(right) > 1 else ONE
        stream, missed = (self.weight_byte, self.missed) if weights else (0.0, 0.0)
        self.terms.append(GemmKernel(node.name, self.profile, repeats, rows, left[-1], columns, stream, missed))

    def _attention(self, node: fx.Node) -> None:
        query, key, value = (shape_of(self.model, operand) for operand in node.args[:3])
        heads = product_of(query[:-2])
        p = self.profile
        self.terms.append(ElementKernel(node.name, p, product_of(key), p.transpose))
        self.terms.extend([ElementKernel(node.name, p, product_of(key), 0.0)] * ATTENTION_KERNELS)
        self.terms.append(GemmKernel(node.name, p, heads, query[-2], query[-1], key[-2]))
        scores = heads * query[-2] * key[-2]
        self.terms.append(
            ElementKernel(node.name, p, scores, p.element * (ELEMENT_FACTORS["softmax"] + 1), heads * query[-2])
        )
        self.terms.append(GemmKernel(node.name, p, heads, query[-2], key[-2], value[-1]))

    def _einsum(self, node: fx.Node) -> None:
        for product in multiplications(node, self.model.shape):
            self.terms.append(GemmKernel(node.name, self.profile, ONE, product, ONE, Product(self.profile.block)))

    def _recurrent(self, node: fx.Node) -> None:
        # the transposes around it are left out: at one sequence they move nothing
        shape, p, call = self.model.shape, self.floats, Arguments.of(node)
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
        self.terms.append(GemmKernel(node.name, p, ONE, positions, inputs[1], inputs[0], self.float_byte))
        self.terms.append(
            RecurrentKernel(
                node.name, p, value[call.time_dim], value[1 - call.time_dim], gates[0], gates[1], hidden, projection,
                each, overhead, p.inner if call.cell == "lstm" else 0.0,
            )
        )  # fmt: skip

    def _is_scan(self, call: Arguments) -> bool:
        """Tell whether ONNX has no operator for the layer: see ``kfe_fx.runtime.recurrent_weights``."""
        if call.weight_hr is not None or call.beta_c is not None:
            return True
        tables = (call.mean_ih, call.var_ih, call.mean_hh, call.var_hh, call.var_c)
        names = [str(one.target) for one in tables if one is not None and one.op == "get_attr"]
        return not shared_rows(*map(self.model.program.tensor, names))


# what takes no kernel, whatever the layout
_PASSES_ON = {aten.clone.default, aten.dropout.default, aten.contiguous.default}
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


def _weights(model: CostModel) -> tuple[int, int]:
    """Return the bytes of weights that convolutions read in one run, and those that everything else reads.

    Of the table of an embedding next to nothing is read.
    """
    bytes_of = {True: 0, False: 0}
    for node in model.graph.nodes:
        looked_up = all(user.target is aten.embedding.default for user in node.users)
        if node.op == "get_attr" and model.is_tensor(node) and not looked_up:
            convolved = any(user.target in CONVOLUTIONS | TRANSPOSED | ANY_CONVOLUTION for user in node.users)
            value = model.values[node]
            bytes_of[convolved] += value.numel() * value.element_size()
    return bytes_of[True], bytes_of[False]


def _weight_byte(profile: Profile, weights: int) -> float:
    """Return the time of a byte of weights where all kernels together read as many bytes."""
    far = min(1.0, max(0.0, weights / profile.cache - 1))
    return profile.near_byte + far * (profile.weight_byte - profile.near_byte)


def _is_folded(node: fx.Node, model: CostModel) -> bool:
    """Tell whether ONNX Runtime pads inside the convolutions behind it, or not at all because nothing is added."""
    sizes, named = list(argument(node, 1, "pad")), node.target is aten.pad.default
    if any(not isinstance(size, int) or size < 0 for size in sizes):
        return False
    mode = argument(node, 2, "mode", "constant") if named else "constant"
    value = argument(node, 3 if named else 2, "value")
    folds = all(user.target in CONVOLUTIONS and not is_transposed(user) for user in node.users)
    beyond = any(sizes[2 * (len(model.shape(node)) - 2) :])  # batch or channels are padded
    return not any(sizes) or (mode == "constant" and not value and not beyond and folds)


def _name(node: fx.Node) -> str:
    """Return the name of an aten operation without overload and underscores."""
    return str(node.target).removeprefix("aten.").split(".")[0].strip("_")


def _constant(dims: Sequence[Product]) -> int:
    return product_of(dims).coefficient


def _whole(window: Sequence[Any]) -> int:
    return int(torch.Size([int(size) for size in window]).numel())
