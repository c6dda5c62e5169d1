"""Magnitude: slices, ties, and the scale of the batch norm behind (X1)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from kfe_fx.criteria import ScoreContext, score
from kfe_fx.criteria.magnitude import norm_scales
from kfe_fx.frontend.capture import capture
from kfe_fx.labels.analysis import analyze
from kfe_fx.passes.batchnorm_recurrent import BatchnormRecurrent
from tests.criteria.nets import randomise


def magnitude(module: nn.Module, x: torch.Tensor) -> np.ndarray:
    program = capture(module, x)
    return score("magnitude", ScoreContext.of(program, analyze(program)))


def test_the_mean_of_the_norms_of_rows_and_columns():
    module = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    found = magnitude(module, torch.randn(2, 4).double())
    rows, columns = module[0].weight.norm(dim=1), module[2].weight.norm(dim=0)
    np.testing.assert_allclose(found, ((rows + columns) / 2).detach().numpy(), rtol=1e-12)


def test_a_scale_that_the_norm_takes_back_changes_nothing():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, eps=0.0), nn.ReLU(), nn.Conv2d(6, 2, 1))
    randomise(module)
    x = torch.randn(2, 3, 5, 5).double()
    before, output = magnitude(module, x), module(x)
    scale = torch.tensor([0.1, 3.0, 10.0, 0.5, 2.0, 1.0], dtype=torch.float64)
    conv, norm = module[0], module[1]
    with torch.no_grad():
        conv.weight.mul_(scale.reshape(-1, 1, 1, 1))
        conv.bias.mul_(scale)
        norm.running_mean.mul_(scale)
        norm.running_var.mul_(scale**2)
    torch.testing.assert_close(module(x), output, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(magnitude(module, x), before, rtol=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ["conv", "transposed", "linear"])
def test_the_scale_is_that_of_the_norm(kind: str, groups: int):
    torch.manual_seed(0)
    if kind == "linear":
        layer, norm, x = nn.Linear(4, 6), nn.BatchNorm1d(6), torch.randn(3, 4)
    else:
        make = nn.Conv2d if kind == "conv" else nn.ConvTranspose2d
        layer, norm, x = make(4, 6, 3, groups=groups), nn.BatchNorm2d(6), torch.randn(3, 4, 5, 5)
    module = randomise(nn.Sequential(layer, norm))
    x = x.double()
    program = capture(module, x)
    scaled = randomise(nn.Sequential(layer, norm))
    expected = module(x) - module(torch.zeros_like(x))
    with torch.no_grad():
        layer.weight.mul_(norm_scales(program)["0.weight"])
        layer.bias.zero_()
    torch.testing.assert_close(scaled[0](x), expected, rtol=1e-10, atol=1e-10)


def test_tied_weights_count_once():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again, self.last = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)
            self.again.weight = self.first.weight

        def forward(self, x):
            return self.last(torch.relu(self.first(x)) + torch.relu(self.again(x)))

    module = Tied().double()
    found = magnitude(module, torch.randn(2, 4).double())
    rows, columns = module.first.weight.norm(dim=1), module.last.weight.norm(dim=0)
    np.testing.assert_allclose(found, ((rows + columns) / 2).detach().numpy(), rtol=1e-12)


@pytest.mark.parametrize("mode", ["input", "full"])
def test_a_scale_that_a_recurrent_layer_takes_back_changes_nothing(mode: str) -> None:
    torch.manual_seed(0)
    data = (torch.randn(40, 6, 3).double(), None)
    program = capture(nn.GRU(3, 5, batch_first=True).double().eval(), torch.randn(2, 6, 3).double())
    normal = BatchnormRecurrent(data=data, mode=mode, eps=1e-12).run(program).program
    scales = norm_scales(normal)
    assert scales.keys() == {"weight_ih_l0"} | ({"weight_hh_l0"} if mode == "full" else set())
    before = {name: normal.tensor(name) * scales[name] for name in scales}
    factors = torch.linspace(0.5, 2.0, 15, dtype=torch.float64).unsqueeze(1)
    with torch.no_grad():  # rows times c, variances times c^2: the same function
        for name in scales:
            normal.tensor(name).mul_(factors)
            normal.tensor(name.replace("weight", "running_var")).mul_(factors.t().square())
    for name, scale in norm_scales(normal).items():
        assert float((normal.tensor(name) * scale - before[name]).detach().abs().max()) <= 1e-9
