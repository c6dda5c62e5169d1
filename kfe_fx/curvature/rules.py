"""The rules behind ``PAIRINGS``: from a node of the graph to how its weight's gradient is made."""

from __future__ import annotations

from dataclasses import replace
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
    Steps,
    TransposedConvolution,
    pairing,
)
from kfe_fx.labels.contraction import einsum_terms
from kfe_fx.labels.registry import overloads
from kfe_fx.program import argument
from kfe_fx.recurrent.opened import PRODUCT

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


@pairing(PRODUCT)
def steps(look: Look, node: fx.Node) -> Pairing | None:
    """See ``Steps``; the examples lie along the sequences, or are not told apart."""
    given: tuple[Any, ...] = node.args
    data, weight = given[:2]
    if look.fixed(data) or not look.fixed(weight):
        return None
    batch_first = node.kwargs.get("batch_first", True)
    layout = look.layout(data)
    if layout is not None and layout.dim != (0 if batch_first else 1):
        return None
    return Steps(
        weight,
        argument(node, 2, "bias"),
        data,
        lengths=argument(node, 3, "lengths"),
        reverse=bool(node.kwargs.get("reverse", False)),
        batch_first=bool(batch_first),
        from_zero=bool(node.kwargs.get("from_zero", False)),
        whole=layout is None,
    )


@pairing(aten.embedding.default)
def embedding(look: Look, node: fx.Node) -> Pairing | None:
    """See ``Embedding``; gradients scaled by frequency mix the examples of a batch and have no rule."""
    weight, data = node.args[:2]
    if look.fixed(data) or not look.fixed(weight) or argument(node, 3, "scale_grad_by_freq", False):  # type: ignore[arg-type]
        return None
    padding, rows = argument(node, 2, "padding_idx", -1), look.shape(weight)[0]  # type: ignore[arg-type]
    return Embedding(weight, None, data, padding=int(padding), size=rows)  # type: ignore[arg-type]


@pairing(aten.index.Tensor, aten.index_select.default)
def table(look: Look, node: fx.Node) -> Pairing | None:
    """Take rows that are picked by numbers as the look-up that it is."""
    weight, *picked = node.args
    index = picked[-1]
    if node.target is aten.index.Tensor:
        if len(index) != 1:  # type: ignore[arg-type]
            return None
        index = index[0]  # type: ignore[index]
    elif picked[0] != 0:
        return None
    if not isinstance(index, fx.Node) or look.fixed(index) or not look.fixed(weight):  # type: ignore[arg-type]
        return None
    shape = look.shape(weight)  # type: ignore[arg-type]
    return Embedding(weight, None, index, size=shape[0]) if len(shape) == 2 else None  # type: ignore[arg-type]


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
    return Convolution(weight, bias, data, groups, stride, padding, dilation, tuple(kernel))  # type: ignore[arg-type]


_TRANSPOSED = {
    aten.conv_transpose1d.default: 1,
    aten.conv_transpose2d.input: 2,
    aten.conv_transpose3d.input: 3,
}


@pairing(*_TRANSPOSED)
def transposed_convolution(look: Look, node: fx.Node) -> Pairing | None:
    """See ``TransposedConvolution``: what the input positions meet are patches of the padded gradient."""
    rank = _TRANSPOSED[node.target]  # type: ignore[index]
    data, weight = node.args[:2]
    if not _batched(look, node, data, weight, rank):
        return None
    kernel = look.shape(weight)[2:]  # type: ignore[arg-type]
    stride = _each(argument(node, 3, "stride", 1), rank)
    padding = tuple((amount, amount) for amount in _each(argument(node, 4, "padding", 0), rank))
    groups, dilation = int(argument(node, 6, "groups", 1)), _each(argument(node, 7, "dilation", 1), rank)
    bias = argument(node, 2, "bias")
    return TransposedConvolution(weight, bias, data, groups, stride, padding, dilation, tuple(kernel))  # type: ignore[arg-type]


def _batched(look: Look, node: fx.Node, data: Any, weight: Any, rank: int) -> bool:
    if look.fixed(data) or not look.fixed(weight):
        return False
    found = look.layout(data)
    # an image without a batch dim is one example; examples along channels or space have no patches of their own
    return found is None or (found.dim == 0 and len(look.shape(data)) == rank + 2)


@pairing(aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default)
def product(look: Look, node: fx.Node) -> Pairing | None:
    """Write a matrix product as a contraction; the weight may be either side."""
    return _product(look, node, node.args[0], node.args[1], 1.0)


@pairing(aten.addmm.default, aten.baddbmm.default)
def added_product(look: Look, node: fx.Node) -> Pairing | None:
    """Write ``beta * b + alpha * x @ w``; b may be the homogeneous coordinate."""
    made = _product(look, node, node.args[1], node.args[2], float(node.kwargs.get("alpha", 1)))  # type: ignore[arg-type]
    added = node.args[0]
    if made is None or not isinstance(added, fx.Node) or not look.fixed(added):
        return made
    outputs = made.reading(look.shape(made.weight))[:2]
    last = made.out_letters[-1:] == tuple(made.weight_letters[dim] for dim in outputs[1])
    joint = last and not outputs[0] and node.kwargs.get("beta", 1) == 1
    return replace(made, bias=added, column=joint and look.shape(added) == look.shape(node)[-1:])


def _product(look: Look, node: fx.Node, first: Any, second: Any, scale: float) -> Contraction | None:
    ranks = len(look.shape(first)), len(look.shape(second))
    batch = "".join(chr(ord("A") + index) for index in range(max(*ranks, 2) - 2))
    one = batch[len(batch) - max(ranks[0] - 2, 0) :] + ("ik" if ranks[0] > 1 else "k")
    other = batch[len(batch) - max(ranks[1] - 2, 0) :] + ("kj" if ranks[1] > 1 else "k")
    out = batch + ("i" if ranks[0] > 1 else "") + ("j" if ranks[1] > 1 else "")
    return contraction(look, node, [(first, one), (second, other)], out, scale)


@pairing(aten.einsum.default)
def einsum(look: Look, node: fx.Node) -> Pairing | None:
    """Take an einsum of data and one weight as the contraction that it is."""
    operands = list(node.args[1])  # type: ignore[arg-type]
    spelled = einsum_terms(str(node.args[0]), [len(look.shape(operand)) for operand in operands])
    if spelled is None or len(operands) != 2 or len(set(spelled[1])) != len(spelled[1]):
        return None
    return contraction(look, node, list(zip(operands, spelled[0], strict=True)), spelled[1], 1.0)


def contraction(
    look: Look, node: fx.Node, operands: list[tuple[Any, str]], out: str, scale: float
) -> Contraction | None:
    """Tell weight from data; None where no rule of pairs holds."""
    fixed = [look.fixed(operand) for operand, _ in operands]
    if sum(fixed) != 1:
        return None
    (weight, weight_term), (data, data_term) = sorted(operands, key=lambda pair: not look.fixed(pair[0]))
    layouts = look.layout(data), look.layout(node)
    if (layouts[0] is None) != (layouts[1] is None):
        return None
    # a dim of size one of the weight's broadcasts: no letter
    weights = [x if size > 1 else "" for x, size in zip(weight_term, look.shape(weight), strict=True)]
    datas, outs = (
        [x if size > 1 or x not in weight_term else "" for x, size in zip(term, look.shape(item), strict=True)]
        for item, term in ((data, data_term), (node, out))
    )
    for spelled, layout in ((datas, layouts[0]), (outs, layouts[1])):
        if layout is not None and spelled.pop(layout.dim) in weights:
            return None
    known = [set(filter(None, spelled)) for spelled in (weights, datas, outs)]
    if any(one - known[place - 1] - known[place - 2] for place, one in enumerate(known)):
        return None  # a dim summed or broadcast on one side alone
    return Contraction(weight, None, data, 1, tuple(datas), tuple(weights), tuple(outs), scale)
