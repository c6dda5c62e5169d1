"""Criterion ``magnitude``: how large a unit's weights are, seen behind the batch norm that follows."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, fx

from kfe_fx.criteria.base import Criterion, ScoreContext, register
from kfe_fx.program import Program
from kfe_fx.recurrent.op import RECURRENT, Arguments

aten = torch.ops.aten

_OUT_DIM: dict[Any, int] = {
    aten.linear.default: 0,
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default), 0),
    **dict.fromkeys((aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding), 0),
    **dict.fromkeys((aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input), 1),
}


@register
class Magnitude(Criterion):
    """Score by the mean L2 norm of the slices that go with a unit.

    A slice is what a unit takes of one dim of one weight: its rows in the producer, its columns in each consumer. Each
    weight that a batch norm follows is multiplied by gamma / sqrt(running_var + eps) per output first, because the norm
    makes its own scale meaningless. The mean over slices, not the sum, makes units with many members (a residual
    stream) comparable with units of one producer and one consumer. Vectors (biases, affine parameters) count only for
    units that own nothing else. Tied weights count once.
    """

    name: ClassVar[str] = "magnitude"

    def score(self, context: ScoreContext) -> np.ndarray:
        """Return mean over slices of |w|_2, [units]."""
        scales = norm_scales(context.program)
        units = len(context.analysis.units)
        matrices = _Sum(units)
        vectors = _Sum(units)
        parameters = {name for name, _ in context.program.module().named_parameters(remove_duplicate=False)}
        for name, layout in context.analysis.params.items():
            if name not in parameters:
                continue
            weight = context.program.tensor(name).detach().double() * scales.get(name, 1.0)
            table = matrices if weight.dim() > 1 else vectors
            for dim, layers in enumerate(layout):
                if not layers:
                    continue
                energy = weight.square().movedim(dim, 0).reshape(weight.shape[dim], -1).sum(1)
                for layer in layers:
                    table.add(layer, energy.numpy())
        return np.where(matrices.count > 0, matrices.mean(), vectors.mean())

    def weights(self, context: ScoreContext) -> dict[str, Tensor]:
        """Return theta_k^2 of each single weight (MP of Laurent et al. 2020, section 2), float64.

        It is the plain square, as in the paper: no scale of a batch norm behind the weight enters.
        """
        return {name: weight.detach().double().square() for name, weight in context.weights().items()}


class _Sum:
    """Sum of norms and number of slices of each unit."""

    def __init__(self, units: int) -> None:
        self.norm = np.zeros(units)
        self.count = np.zeros(units)

    def add(self, layer: np.ndarray, energy: np.ndarray) -> None:
        """Add one dim of one weight: ``energy[i]`` is the squared norm of index i, ``layer[i]`` its unit."""
        owned = layer >= 0
        squares = np.bincount(layer[owned], energy[owned], len(self.norm))
        present = np.bincount(layer[owned], minlength=len(self.norm)) > 0
        self.norm += np.sqrt(squares)
        self.count += present

    def mean(self) -> np.ndarray:
        """Return the mean norm, 0 where there is no slice."""
        return self.norm / np.maximum(self.count, 1)


def norm_scales(program: Program) -> dict[str, Tensor]:
    """Return for each weight whose outputs all go into one batch norm what that norm multiplies them with.

    gamma / sqrt(running_var + eps), shaped to broadcast over the weight: [out, 1, ...] or, for a transposed
    convolution, [in, out / groups, 1, ...]. A weight that several nodes use is left alone. A recurrent layer that
    normalises inside multiplies the rows of its weights, with the mean of its variances over the steps.
    """
    scales: dict[str, Tensor] = {}
    seen: set[str] = set()
    for node in program.graphs["eval"].nodes:
        for weight, scale in _weights_and_scales(program, node):
            if not isinstance(weight, fx.Node) or weight.op != "get_attr":
                continue
            name = program.names_of(str(weight.target))[0]
            scales.pop(name, None)
            if scale is not None and name not in seen:
                scales[name] = scale
            seen.add(name)
    return scales


def _weights_and_scales(program: Program, node: fx.Node) -> list[tuple[Any, Tensor | None]]:
    """Return the weights that a node multiplies with, each with what a norm multiplies its outputs with, or None."""
    if node.target is RECURRENT:
        call = Arguments.of(node)
        sides = ((call.weight_ih, call.gamma_ih, call.var_ih), (call.weight_hh, call.gamma_hh, call.var_hh))
        return [(weight, _scale_inside(program, gamma, var, call.eps)) for weight, gamma, var in sides]
    if node.target not in _OUT_DIM:
        return []
    weight = node.args[1]
    scale = _scale_behind(program, node)
    if scale is None or not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return [(weight, None)]
    return [(weight, _shaped(scale, program.tensor(str(weight.target)), node))]


def _scale_inside(program: Program, gamma: Any, var: Any, eps: float) -> Tensor | None:
    if gamma is None or gamma.op != "get_attr" or var.op != "get_attr":
        return None
    variance = program.tensor(str(var.target)).double().mean(0)
    return (program.tensor(str(gamma.target)).detach().double() * torch.rsqrt(variance + eps)).unsqueeze(1)


def _scale_behind(program: Program, node: fx.Node) -> Tensor | None:
    norm = next(iter(node.users)) if len(node.users) == 1 else None
    if norm is None or norm.target is not aten.batch_norm.default or norm.args[0] is not node or norm.args[5]:
        return None
    gamma, variance = norm.args[1], norm.args[4]
    if not isinstance(variance, fx.Node) or variance.op != "get_attr":
        return None
    scale = torch.rsqrt(program.tensor(str(variance.target)).double() + float(norm.args[7]))  # type: ignore[arg-type]
    if isinstance(gamma, fx.Node) and gamma.op == "get_attr":
        scale = scale * program.tensor(str(gamma.target)).detach().double()
    return scale


def _shaped(scale: Tensor, weight: Tensor, node: fx.Node) -> Tensor:
    ones = [1] * (weight.dim() - 2)
    if _OUT_DIM[node.target] == 0:
        return scale.reshape(-1, 1, *ones)
    groups = len(scale) // weight.shape[1]
    # [in, out / groups, k...]: input channel i belongs to the group i // (in / groups)
    return scale.reshape(groups, -1).repeat_interleave(weight.shape[0] // groups, 0).reshape(*weight.shape[:2], *ones)
