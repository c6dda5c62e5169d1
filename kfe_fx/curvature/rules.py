"""The rules behind ``PAIRINGS``: from a node of the graph to how its weight's gradient is made."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import fx

from kfe_fx.curvature.layout import Layout
from kfe_fx.curvature.pairings import (
    Contraction,
    Convolution,
    Embedding,
    Linear,
    Pairing,
    TransposedConvolution,
    pairing,
)
from kfe_fx.labels.registry import overloads

aten = torch.ops.aten


class Look(Protocol):
    """What a rule may ask about the graph."""

    def fixed(self, node: fx.Node) -> bool:
        """Tell whether a node has the same value for all examples."""
        ...

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Return the shape of a tensor node at the sizes of the analysis."""
        ...

    def layout(self, node: fx.Node) -> Layout | None:
        """Return where a node holds the examples."""
        ...


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """Return an argument that may be given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


@pairing(aten.linear.default)
def linear(look: Look, node: fx.Node) -> Pairing | None:
    """See ``Linear``; the examples may lie along any dim but the last."""
    data, weight = node.args[:2]
    bias = argument(node, 2, "bias")
    if look.fixed(data) or not look.fixed(weight) or len(look.shape(weight)) != 2:  # type: ignore[arg-type]
        return None
    layout, rank = look.layout(data), len(look.shape(data))  # type: ignore[arg-type]
    if layout is not None and layout.dim == rank - 1:
        return None
    return Linear(weight, bias, data)  # type: ignore[arg-type]


@pairing(aten.embedding.default)
def embedding(look: Look, node: fx.Node) -> Pairing | None:
    """See ``Embedding``; gradients scaled by frequency mix the examples of a batch and have no rule."""
    weight, data = node.args[:2]
    if look.fixed(data) or not look.fixed(weight) or argument(node, 3, "scale_grad_by_freq", False):  # type: ignore[arg-type]
        return None
    padding, rows = argument(node, 2, "padding_idx", -1), look.shape(weight)[0]  # type: ignore[arg-type]
    return Embedding(weight, None, data, padding=int(padding), size=rows)  # type: ignore[arg-type]


def _each(value: Any, rank: int) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(int(x) for x in (values * rank if len(values) == 1 else values))


_CONVOLUTIONS = {
    operation: rank
    for rank in (1, 2, 3)
    for operation in overloads(aten, f"conv{rank}d.default", f"conv{rank}d.padding")
}


@pairing(*_CONVOLUTIONS)
def convolution(look: Look, node: fx.Node) -> Pairing | None:
    """See ``Convolution``; "same" pads one more at the end where the kernel is even."""
    rank = _CONVOLUTIONS[node.target]
    data, weight = node.args[:2]
    bias = argument(node, 2, "bias")
    if not _batched(look, node, data, weight, rank):
        return None
    kernel = look.shape(weight)[2:]  # type: ignore[arg-type]
    stride = _each(argument(node, 3, "stride", 1), rank)
    dilation = _each(argument(node, 5, "dilation", 1), rank)
    given = argument(node, 4, "padding", 0)
    if given == "valid":
        padding = ((0, 0),) * rank
    elif given == "same":
        whole = [by * (size - 1) for by, size in zip(dilation, kernel, strict=True)]
        padding = tuple((total // 2, total - total // 2) for total in whole)
    else:
        padding = tuple((amount, amount) for amount in _each(given, rank))
    groups = int(argument(node, 6, "groups", 1))
    return Convolution(weight, bias, data, stride, padding, dilation, tuple(kernel), groups)  # type: ignore[arg-type]


_TRANSPOSED = {
    aten.conv_transpose1d.default: 1,
    aten.conv_transpose2d.input: 2,
    aten.conv_transpose3d.input: 3,
}


@pairing(*_TRANSPOSED)
def transposed_convolution(look: Look, node: fx.Node) -> Pairing | None:
    """See ``TransposedConvolution``: what the input positions meet are patches of the padded gradient."""
    rank = _TRANSPOSED[node.target]
    data, weight = node.args[:2]
    if not _batched(look, node, data, weight, rank):
        return None
    kernel = look.shape(weight)[2:]  # type: ignore[arg-type]
    stride = _each(argument(node, 3, "stride", 1), rank)
    padding = tuple((amount, amount) for amount in _each(argument(node, 4, "padding", 0), rank))
    groups, dilation = int(argument(node, 6, "groups", 1)), _each(argument(node, 7, "dilation", 1), rank)
    bias = argument(node, 2, "bias")
    made = TransposedConvolution(weight, bias, data, stride, padding, dilation, tuple(kernel), groups)  # type: ignore[arg-type]
    return made


def _batched(look: Look, node: fx.Node, data: Any, weight: Any, rank: int) -> bool:
    if look.fixed(data) or not look.fixed(weight):
        return False
    found = look.layout(data)
    # an image without a batch dim is one example; examples along channels or space have no patches of their own
    return found is None or (found.dim == 0 and len(look.shape(data)) == rank + 2)


@pairing(aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default)
def product(look: Look, node: fx.Node) -> Pairing | None:
    """Write a matrix product as a contraction; the weight may be either side."""
    return _product(look, node, node.args[0], node.args[1], None, 1.0)


@pairing(aten.addmm.default, aten.baddbmm.default)
def added_product(look: Look, node: fx.Node) -> Pairing | None:
    """Write ``beta * b + alpha * x @ w``; what is added counts as a parameter of its own."""
    alpha = float(node.kwargs.get("alpha", 1))  # type: ignore[arg-type]
    return _product(look, node, node.args[1], node.args[2], node.args[0], alpha)


def _product(look: Look, node: fx.Node, first: Any, second: Any, bias: Any, scale: float) -> Pairing | None:
    ranks = len(look.shape(first)), len(look.shape(second))
    batch = [chr(ord("A") + index) for index in range(max(*ranks, 2) - 2)]
    one = batch[len(batch) - max(ranks[0] - 2, 0) :] + (["i", "k"] if ranks[0] > 1 else ["k"])
    other = batch[len(batch) - max(ranks[1] - 2, 0) :] + (["k", "j"] if ranks[1] > 1 else ["k"])
    out = batch + (["i"] if ranks[0] > 1 else []) + (["j"] if ranks[1] > 1 else [])
    return contraction(look, node, [(first, one), (second, other)], out, bias, scale)


@pairing(aten.einsum.default)
def einsum(look: Look, node: fx.Node) -> Pairing | None:
    """Take an einsum of data and one weight as the contraction that it is."""
    equation, operands = node.args[:2]
    inputs, arrow, out = str(equation).replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or "." in equation or len(terms) != 2 or any(len(set(term)) != len(term) for term in (*terms, out)):  # type: ignore[operator]
        return None
    pairs = [(operand, list(term)) for operand, term in zip(operands, terms, strict=True)]  # type: ignore[arg-type]
    return contraction(look, node, pairs, list(out), None, 1.0)


def contraction(
    look: Look, node: fx.Node, operands: list[tuple[Any, list[str]]], out: list[str], bias: Any, scale: float
) -> Pairing | None:
    """Tell weight from data and spell dims of size one as no letter; None where no rule of pairs holds."""
    fixed = [look.fixed(operand) for operand, _ in operands]
    if sum(fixed) != 1:
        return None
    (weight, weight_term), (data, data_term) = sorted(operands, key=lambda pair: not look.fixed(pair[0]))
    layouts = look.layout(data), look.layout(node)
    if (layouts[0] is None) != (layouts[1] is None):
        return None
    spelled = [
        _spelled(look.shape(item), term) for item, term in ((weight, weight_term), (data, data_term), (node, out))
    ]
    for place, layout in ((1, layouts[0]), (2, layouts[1])):
        if layout is not None:
            letter = (data_term if place == 1 else out)[layout.dim]
            if letter in spelled[0]:
                return None
            spelled[place].pop(layout.dim)
    weights, datas, outs = (set(filter(None, term)) for term in spelled)
    if weights - datas - outs or datas - weights - outs or outs - weights - datas:
        return None  # a dim summed or broadcast on one side alone
    return Contraction(weight, bias, data, tuple(spelled[1]), tuple(spelled[0]), tuple(spelled[2]), scale)


def _spelled(shape: tuple[int, ...], term: list[str]) -> list[str]:
    return [letter if size > 1 else "" for letter, size in zip(term, shape, strict=True)]
