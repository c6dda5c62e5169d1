"""Multiply-accumulates of each operation, as products of sizes: one rule per family of contractions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from kfe_fx.cost.widths import ONE, Product, product_of
from kfe_fx.program import argument
from kfe_fx.recurrent.op import CELL_OPS, RECURRENT, Arguments

aten = torch.ops.aten

Shape = tuple[Product, ...]
ShapeOf = Callable[[Any], Shape]
Rule = Callable[[fx.Node, ShapeOf], list[Product]]

CONVOLUTIONS = {
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
}
TRANSPOSED = {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}
ANY_CONVOLUTION = {aten.convolution.default}
# position of the two factors among the arguments
PRODUCTS = {
    aten.matmul.default: (0, 1),
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.mv.default: (0, 1),
    aten.dot.default: (0, 1),
    aten.vdot.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.addmv.default: (1, 2),
    aten.baddbmm.default: (1, 2),
}
ATTENTION = {aten.scaled_dot_product_attention.default}


def multiplications(node: fx.Node, shape: ShapeOf) -> list[Product]:
    """Return the MACs of a node as a sum of products, empty where nothing is contracted.

    ``shape(node)`` gives the size of each dim. One MAC is two of PyTorch's FLOPs. Operations between elements, norms
    and poolings are not counted.
    """
    rule = _RULES.get(node.target)
    return rule(node, shape) if rule is not None and node.op == "call_function" else []


def is_transposed(node: fx.Node) -> bool:
    """Tell whether a convolution is a transposed one."""
    return node.target in TRANSPOSED or (node.target in ANY_CONVOLUTION and bool(argument(node, 6, "transposed")))


def _linear(node: fx.Node, shape: ShapeOf) -> list[Product]:
    return [product_of(shape(node)) * shape(node.args[1])[-1]]


def _convolution(node: fx.Node, shape: ShapeOf) -> list[Product]:
    weight = shape(node.args[1])  # [out, in / groups, kernel...]; transposed: [in, out / groups, kernel...]
    whole = shape(node.args[0]) if is_transposed(node) else shape(node)
    return [product_of(whole) * product_of(weight[1:])]


def _product(node: fx.Node, shape: ShapeOf) -> list[Product]:
    left = node.args[PRODUCTS[node.target][0]]  # type: ignore[index]
    return [product_of(shape(node)) * shape(left)[-1]]


def _attention(node: fx.Node, shape: ShapeOf) -> list[Product]:
    query, key, value = (shape(operand) for operand in node.args[:3])
    scores = product_of(query[:-1]) * key[-2]  # [..., heads, queries, keys]
    return [scores * query[-1], scores * value[-1]]


def _einsum(node: fx.Node, shape: ShapeOf) -> list[Product]:
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    terms, arrow, result = equation.partition("->")
    names = terms.split(",")
    shapes = [shape(operand) for operand in operands]  # type: ignore[union-attr]
    hidden = [len(dims) - len(name.replace("...", "")) for name, dims in zip(names, shapes, strict=True)]
    spelled = [_spelled(name, count) for name, count in zip(names, hidden, strict=True)]
    if arrow:
        kept = _spelled(result, max(hidden))
    else:
        every = "".join(spelled)
        kept = "".join(letter for letter in dict.fromkeys(every) if letter.isdigit() or every.count(letter) == 1)
    size = _letter_sizes(spelled, shapes)
    total = []
    left = spelled[0]
    for index, right in enumerate(spelled[1:], start=1):
        later = kept + "".join(spelled[index + 1 :])
        # a letter that only one side has and nobody needs is summed before the product
        letters = [x for x in dict.fromkeys(left + right) if x in later or (x in left and x in right)]
        if any(x not in later for x in letters):
            total.append(product_of(size[x] for x in letters))
        left = "".join(x for x in letters if x in later)
    return total


def _spelled(name: str, hidden: int) -> str:
    """Write the dots of an einsum operand as digits that count its ``hidden`` dims from the last."""
    return name.replace("...", "".join(str(i % 10) for i in range(hidden, 0, -1)))


def _letter_sizes(spelled: list[str], shapes: list[Shape]) -> dict[str, Product]:
    size: dict[str, Product] = {}
    for letters, dims in zip(spelled, shapes, strict=True):
        for letter, dim in zip(letters, dims, strict=False):
            if size.get(letter, ONE) == ONE:  # a dim of size 1 broadcasts
                size[letter] = dim
    return size


def _tensordot(node: fx.Node, shape: ShapeOf) -> list[Product]:
    left, contracted = shape(node.args[0]), node.args[2]
    return [product_of(shape(node)) * product_of(left[dim] for dim in contracted)]  # type: ignore[union-attr, index, misc]


def _bilinear(node: fx.Node, shape: ShapeOf) -> list[Product]:
    weight = shape(node.args[2])  # [out, first, second]
    return [product_of(shape(node)) * weight[1] * weight[2], product_of(shape(node)) * weight[2]]


def _recurrent(node: fx.Node, shape: ShapeOf) -> list[Product]:
    call = Arguments.of(node)
    positions = product_of(shape(call.input)[:2])  # every sequence at every step
    weights = [call.weight_ih, call.weight_hh, *([] if call.weight_hr is None else [call.weight_hr])]
    return [positions * product_of(shape(weight)) for weight in weights]


def _cell(node: fx.Node, shape: ShapeOf) -> list[Product]:
    """Count one step of a cell: W_ih x and W_hh h for every example."""
    rows = product_of(shape(node.args[0])[:-1])
    return [rows * product_of(shape(node.args[place])) for place in (2, 3)]


_RULES: dict[Any, Rule] = {
    aten.linear.default: _linear,
    **dict.fromkeys(CONVOLUTIONS | TRANSPOSED | ANY_CONVOLUTION, _convolution),
    **dict.fromkeys(PRODUCTS, _product),
    **dict.fromkeys(ATTENTION, _attention),
    aten.einsum.default: _einsum,
    aten.tensordot.default: _tensordot,
    aten.bilinear.default: _bilinear,
    RECURRENT: _recurrent,
    **dict.fromkeys(CELL_OPS, _cell),
}
