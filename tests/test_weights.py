"""Weights that are not finite are refused before anything is made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfe_fx
from kfe_fx import curvature, prune, sparsify
from kfe_fx.errors import UsageError
from kfe_fx.passes.decompose_kfe import DecomposeKfe
from kfe_fx.passes.decompose_svd import DecomposeSvd
from kfe_fx.program import Program
from kfe_fx.weights import check_weights

X, Y = torch.randn(12, 5), torch.arange(12) % 3


class Masked(nn.Module):
    """A mask with -inf, as buffer and as a parameter that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.register_buffer("mask", torch.tensor([0.0, 0.0, -torch.inf, 0.0, 0.0, 0.0]))
        self.fixed = nn.Parameter(torch.tensor([0.0, -torch.inf, 0.0, 0.0, 0.0, 0.0]), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.softmax(self.norm(self.first(x)) + self.mask + self.fixed, 1))


def damaged(name: str, value: float) -> Program:
    torch.manual_seed(0)
    program = kfe_fx.capture(Masked().eval(), X[:2])
    with torch.no_grad():
        program.tensor(name).view(-1)[1] = value
    return program


def test_masks_are_sound():
    check_weights(kfe_fx.capture(Masked().eval(), X[:2]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("last.weight", torch.nan), ("first.bias", torch.inf), ("norm.running_var", torch.nan), ("mask", torch.nan),
        ("fixed", torch.nan),
    ],
)  # fmt: skip
def test_damage_is_named(name: str, value: float):
    with pytest.raises(UsageError, match=rf"1 of \d+ values of {name} are not finite"):
        check_weights(damaged(name, value))


USES: dict[str, Callable[[Program], Any]] = {
    "prune": lambda program: prune(program, budget=0.5, metric="macs", criterion="random"),
    "prune with data": lambda program: prune(program, budget=0.5, metric="macs", data=(X, Y), epochs=0),
    "sparsify": lambda program: sparsify(program, sparsity=0.5, criterion="lamp"),
    "curvature": lambda program: curvature.fit(program, (X, Y)),
    "decompose-svd": lambda program: DecomposeSvd(ratio=0.5, metric="none").run(program),
    "decompose-kfe": lambda program: DecomposeKfe((X, Y), ratio=0.5, metric="none").run(program),
}


@pytest.mark.parametrize("use", USES)
def test_nothing_is_made_of_them(use: str):
    with pytest.raises(UsageError, match="the weights are damaged"):
        USES[use](damaged("last.weight", torch.nan))
