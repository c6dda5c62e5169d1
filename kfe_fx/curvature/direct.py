"""Gradients of each example by a value that all examples share: scales, biases, affine parameters, anything.

A rule returns a *contribution* of the output's shape that, summed over the positions of each example, is the gradient
by the operand; operations without a rule are differentiated one example at a time, exact and slow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from kfe_fx.curvature.layout import Layout, rows
from kfe_fx.labels.registry import overloads
from kfe_fx.program import argument
from kfe_fx.recurrent.opened import PRODUCT, ROWS, STATISTICS

aten = torch.ops.aten


@dataclass
class Moment:
    """What a rule sees of one execution: the operation, its arguments' values, and the gradient of its output.

    ``place`` says which of several outputs that is.
    """

    node: fx.Node
    values: dict[fx.Node, Any]
    grad: Tensor
    place: int | None = None

    def arg(self, position: int) -> Any:
        """Return the value of an argument."""
        return self._filled(self.node.args[position], self.values)

    def run(self, replaced: dict[fx.Node, Any]) -> Any:
        """Run the operation with some arguments replaced; statistics that it would update stay as they are."""
        args, kwargs = self._filled((self.node.args, self.node.kwargs), {**self.values, **replaced})
        names = [argument.name for argument in getattr(self.node.target, "_schema", _NO_SCHEMA).arguments]
        args = tuple(
            value.clone() if name.startswith(_RUNNING) and isinstance(value, Tensor) else value
            for value, name in zip(args, [*names, *[""] * (len(args) - len(names))], strict=False)
        )
        made = self.node.target(*args, **kwargs)  # type: ignore[operator]
        return made if self.place is None else made[self.place]

    def _filled(self, given: Any, values: dict[fx.Node, Any]) -> Any:
        return map_arg(given, lambda arg: values[arg])


_NO_SCHEMA = SimpleNamespace(arguments=())
_RUNNING = ("running_", *STATISTICS)


# (contribution of the output's shape, dim that the operand's one dim lies along, or None where it broadcasts)
Contribution = Callable[[Moment, fx.Node], "tuple[Tensor, int | None] | None"]
CONTRIBUTIONS: dict[Any, Contribution] = {}


def contribution(*targets: Any) -> Callable[[Contribution], Contribution]:
    """Register the rule of operations."""

    def register(function: Contribution) -> Contribution:
        for target in targets:
            CONTRIBUTIONS[target] = function
        return function

    return register


@contribution(aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor)
def addition(moment: Moment, operand: fx.Node) -> tuple[Tensor, int | None] | None:
    """Take the gradient with the sign and factor of the operand."""
    if moment.node.args[0] is moment.node.args[1]:
        return None
    first = moment.node.args[0] is operand
    alpha = moment.node.kwargs.get("alpha", 1)
    sign = {aten.add.Tensor: (1, alpha), aten.sub.Tensor: (1, -alpha), aten.rsub.Tensor: (-alpha, 1)}  # type: ignore[operator]
    factor = sign[moment.node.target][0 if first else 1]  # type: ignore[index]
    return (moment.grad if factor == 1 else moment.grad * factor), None


@contribution(aten.mul.Tensor)
def multiplication(moment: Moment, operand: fx.Node) -> tuple[Tensor, int | None] | None:
    """Multiply the gradient by the other factor."""
    first, second = moment.node.args[:2]
    if first is second:
        return None
    other = moment.values[second if first is operand else first]  # type: ignore[index]
    return moment.grad * other.conj(), None


@contribution(aten.div.Tensor)
def division(moment: Moment, operand: fx.Node) -> tuple[Tensor, int | None] | None:
    """Divide the gradient by the denominator; an operand in the denominator has no rule."""
    first, second = moment.node.args[:2]
    if first is not operand or second is operand:
        return None
    under = moment.arg(1)
    return moment.grad / (under.conj() if isinstance(under, Tensor) else under), None


@contribution(aten.expand.default, ROWS)
def expansion(moment: Moment, operand: fx.Node) -> tuple[Tensor, int | None]:
    """Sum over what it was expanded to."""
    return moment.grad, None


@contribution(aten.batch_norm.default, aten.instance_norm.default, aten.group_norm.default)
def channel_norm(moment: Moment, operand: fx.Node) -> tuple[Tensor, int | None] | None:
    """Take gamma: g·xhat, beta: g, along the channels."""
    group = moment.node.target is aten.group_norm.default
    weight, bias = moment.node.args[2:4] if group else moment.node.args[1:3]
    if operand is bias and operand is not weight:
        return moment.grad, 1
    if operand is not weight or operand is bias:
        return None
    return moment.grad * _normalised(moment, weight, bias), 1


@contribution(aten.layer_norm.default, aten.rms_norm.default)
def feature_norm(moment: Moment, operand: fx.Node) -> tuple[Tensor, int | None] | None:
    """Take gamma: g·xhat, beta: g, along the last dims."""
    weight = moment.node.args[2]
    bias = moment.node.args[3] if moment.node.target is aten.layer_norm.default and len(moment.node.args) > 3 else None
    if operand is bias and operand is not weight:
        return moment.grad, None
    if operand is not weight or operand is bias:
        return None
    return moment.grad * _normalised(moment, weight, bias), None


def _normalised(moment: Moment, weight: Any, bias: Any) -> Tensor:
    replaced: dict[fx.Node, Any] = {weight: None}
    if isinstance(bias, fx.Node):
        replaced[bias] = None
    if moment.node.target is not aten.batch_norm.default:
        return moment.run(replaced)
    node = moment.node
    data, mean, var = moment.arg(0), moment.arg(3), moment.arg(4)
    if not node.args[5]:  # evaluation
        return aten.batch_norm.default(data, None, None, mean, var, False, 0.0, node.args[7], False)
    return aten.batch_norm.default(data, None, None, None, None, True, 0.0, node.args[7], False)


@contribution(
    aten.linear.default,
    PRODUCT,
    aten.addmm.default,
    aten.baddbmm.default,
    *overloads(aten, *(f"conv{rank}d.{kind}" for rank in (1, 2, 3) for kind in ("default", "padding"))),
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
)
def bias(moment: Moment, operand: fx.Node) -> tuple[Tensor, int | None] | None:
    """Take the gradient itself, along the channels of a convolution."""
    node = moment.node
    if node.target in (aten.addmm.default, aten.baddbmm.default):
        if node.args[0] is not operand or operand in node.args[1:3]:
            return None
        beta = node.kwargs.get("beta", 1)
        return moment.grad * beta, None  # type: ignore[operator]
    if argument(node, 2, "bias") is not operand or operand in node.args[:2]:
        return None
    # an image without a batch dim has its channels in front
    last = node.target in (aten.linear.default, PRODUCT)
    return moment.grad, None if last else moment.grad.dim() - _spatial(node) - 1


def _spatial(node: fx.Node) -> int:
    return int(str(node.target).partition("d.")[0][-1])


@contribution(aten.prelu.default)
def slope(moment: Moment, operand: fx.Node) -> tuple[Tensor, int | None] | None:
    """Take g·min(x, 0), along the channels."""
    data, weight = moment.node.args[:2]
    if operand is not weight or operand is data:
        return None
    value = moment.arg(0)
    alone = moment.arg(1).numel() == 1
    return moment.grad * value.clamp_max(0), None if alone else min(1, value.dim() - 1)


# gradients [stop - start, *operand.shape] of a range of examples
Rows = Callable[[int, int], Tensor]


def per_example(moment: Moment, operand: fx.Node, layout: Layout | None, examples: int) -> Rows:
    """Return the gradients of the examples' losses by the operand."""
    value: Tensor = moment.values[operand]
    rule = CONTRIBUTIONS.get(moment.node.target) if moment.place is None else None
    found = rule(moment, operand) if rule is not None else None
    if found is None:
        return _one_by_one(moment, operand, layout, examples)
    made, dim = found
    if made.is_complex() and not value.is_complex():
        made = made.real
    shape = tuple(value.shape) if dim is None else tuple(-1 if place == dim else 1 for place in range(made.dim()))
    padded = (*(1,) * (made.dim() - len(shape)), *shape)
    if layout is not None and padded[layout.dim] != 1:
        return _one_by_one(moment, operand, layout, examples)  # a row of the operand for each example
    held = rows(layout, made, examples)

    def of(start: int, stop: int) -> Tensor:
        return _summed(held[start:stop], padded, layout).reshape(stop - start, *value.shape)

    return of


def _summed(held: Tensor, padded: tuple[int, ...], layout: Layout | None) -> Tensor:
    """Sum [n, ...] over everything that an operand of the shape ``padded`` was broadcast along."""
    kept = [size for dim, size in enumerate(padded) if layout is None or dim != layout.dim]
    folded = held.dim() - 1 - len(kept)  # 1 where examples are folded with others into their dim
    over = list(range(1, 1 + folded))
    over += [1 + folded + dim for dim, size in enumerate(kept) if size == 1 and held.shape[1 + folded + dim] > 1]
    return held.sum(over) if over else held


def _one_by_one(moment: Moment, operand: fx.Node, layout: Layout | None, examples: int) -> Rows:
    leaf = moment.values[operand].detach().requires_grad_()
    values = {node: value.detach() if isinstance(value, Tensor) else value for node, value in moment.values.items()}
    with torch.enable_grad():
        value = Moment(moment.node, values, moment.grad, moment.place).run({operand: leaf})
    if not value.requires_grad:  # one of several outputs, that the operand has no part in
        return lambda start, stop: leaf.detach().new_zeros(stop - start, *leaf.shape)
    held = rows(layout, moment.grad, examples)

    def of(start: int, stop: int) -> Tensor:
        grads = []
        for example in range(start, stop):
            grad = torch.zeros_like(moment.grad)
            rows(layout, grad, examples)[example] = held[example]
            (found,) = torch.autograd.grad(value, leaf, grad, retain_graph=True, allow_unused=True)
            grads.append(torch.zeros_like(leaf) if found is None else found)
        return torch.stack(grads)

    return of
