"""Ridge regression of one layer's outputs on its inputs, judged on rows that it has not seen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kfe_fx.curvature.pairs import with_ones

KEPT, MEAN, LEAST_SQUARES = "kept", "mean", "least-squares"
RIDGES = (1e-4, 1e-2, 1e-1)  # of the mean square of the inputs
GAIN = 0.98  # what another method's error must be below of that of the weights as they are
NOTHING = 1e-10  # an error, relative to the variance, that there is nothing to mend in

Pieces = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Layer:
    """Weights of one layer as [K, o, i], with the constant [K, o]; ``method`` says where they come from."""

    method: str
    weight: Tensor
    constant: Tensor


@dataclass(frozen=True)
class Choice:
    """The weights that were taken, and the errors of all methods relative to the variance of the outputs."""

    taken: Layer
    errors: dict[str, float]


def choose(now: Layer, others: Mapping[str, Tensor], pieces: Pieces, held: int, *, constant: bool) -> Choice:
    """Fit a layer by ridge regression and take what has the least error on the last ``held`` pieces.

        W' = W + E X^T (X X^T + rho I)^{-1}   with the errors E = Y - W X of the weights as they are

    Args:
        now: the weights as they are.
        others: further weights to judge, [K, o, i] by method. Where a constant has a place they, and the weights as
            they are under the name "mean", get the one that their own mean error asks for.
        pieces: (inputs [K, m, i], outputs [K, m, o]) batch by batch.
        held: how many of the last pieces judge; the others are fitted to.
        constant: whether a constant per output has a place.
    """
    fitted, judged = pieces[:-held], pieces[-held:]
    layers = [now]
    for method, weight in {**({MEAN: now.weight} if constant else {}), **others}.items():
        shift = _mean_error(weight, now.constant, fitted) if constant else 0.0
        layers.append(Layer(method, weight, now.constant + shift))
    layers += _ridge(now, fitted, constant)
    scale = _spread(judged)
    errors = [_error(layer, judged) / scale for layer in layers]
    errors = [error if math.isfinite(error) else math.inf for error in errors]
    told: dict[str, float] = {}
    for layer, error in zip(layers, errors, strict=True):
        told[layer.method] = min(error, told.get(layer.method, error))
    best = min(range(len(layers)), key=lambda number: errors[number])
    if errors[0] < NOTHING or not errors[best] < GAIN * errors[0]:
        best = 0
    return Choice(layers[best], told)


def _ridge(now: Layer, pieces: Pieces, constant: bool) -> list[Layer]:
    groups, outputs, inputs = now.weight.shape
    width = inputs + constant
    gram = torch.zeros(groups, width, width, dtype=torch.float64)
    cross = torch.zeros(groups, outputs, width, dtype=torch.float64)
    rows = 0
    for read, given in pieces:
        error = given - read @ now.weight.mT.to(read) - now.constant.unsqueeze(1).to(read)
        right = with_ones(read.unsqueeze(1)).squeeze(1) if constant else read
        gram += (right.mT @ right).double()
        cross += (error.mT @ right).double()
        rows += read.shape[1]
    gram, cross = gram / rows, cross / rows
    level = gram.diagonal(dim1=1, dim2=2)[:, :inputs].mean(1).clamp_min(1e-30)  # inputs may all be zero
    penalty = torch.ones(width, dtype=torch.float64)
    penalty[inputs:] = 1e-9  # the constant is free
    found = []
    for ridge in RIDGES:
        damped = gram + torch.diag_embed(ridge * level.unsqueeze(1) * penalty)
        step = torch.linalg.solve(damped, cross.mT).mT
        shift = step[..., inputs] if constant else torch.zeros_like(now.constant)
        found.append(Layer(LEAST_SQUARES, now.weight + step[..., :inputs], now.constant + shift))
    return found


def _mean_error(weight: Tensor, constant: Tensor, pieces: Pieces) -> Tensor:
    total, rows = torch.zeros_like(constant), 0
    for read, given in pieces:
        error = given - read @ weight.mT.to(read) - constant.unsqueeze(1).to(read)
        total += error.double().sum(1)
        rows += read.shape[1]
    return total / max(1, rows)


def _error(layer: Layer, pieces: Pieces) -> float:
    total, rows = 0.0, 0
    for read, given in pieces:
        error = given - read @ layer.weight.mT.to(read) - layer.constant.unsqueeze(1).to(read)
        total += float(error.double().square().sum())
        rows += read.shape[1]
    return total / max(1, rows)


def _spread(pieces: Pieces) -> float:
    given = torch.cat([given for _, given in pieces], 1).double()
    return max(float((given - given.mean(1, keepdim=True)).square().sum()) / given.shape[1], 1e-30)
