"""Predicted times of forms against the predictor on the network that was really rewritten."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from kfe_fx.cost.count import CostModel
from kfe_fx.cost.latency import RooflineLatency
from kfe_fx.cost.profile import Profile
from kfe_fx.curvature import Store, fit
from kfe_fx.frontend.capture import capture
from kfe_fx.labels.analysis import analyze
from kfe_fx.lowrank.candidates import apply
from kfe_fx.lowrank.finding import find_layers
from kfe_fx.lowrank.layers import Layer
from kfe_fx.lowrank.prices import Prices
from kfe_fx.program import Program

PROFILE = Profile(block=4)


class Net(nn.Module):
    """Convolutions with what runs inside them, strided, 1x1 and of one dim; linear layers of vectors and of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.down = nn.Conv2d(16, 16, 3, stride=2)
        self.point = nn.Conv2d(16, 12, 1, stride=2)
        self.signal = nn.Conv1d(12, 8, 3)
        self.tokens, self.hidden, self.head = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.hardswish(self.norm(self.stem(x)))
        x = torch.relu(self.point(torch.relu(self.down(x))))
        x = self.signal(x.flatten(2))
        x = torch.tanh(self.tokens(x.transpose(1, 2))).mean(1)
        return self.head(torch.relu(self.hidden(x)))


@cache
def known() -> tuple[Program, Store]:
    torch.manual_seed(0)
    program = capture(Net().eval(), torch.randn(2, 8, 17, 17))
    return program, fit(program, torch.randn(16, 8, 17, 17), statistics="kfac", source="sampled")


def milliseconds(program: Program) -> float:
    return RooflineLatency(CostModel(program, analyze(program)), PROFILE).predict(()) / 1e6


def forms(layer: Layer) -> list[tuple[int, int]]:
    columns, rows = layer.columns, layer.rows
    if layer.pointwise:
        return [(4, rows), (columns, 4)]
    return [(4, 8), (4, rows), (columns, 4)]


@pytest.mark.parametrize("name", ["stem", "down", "point", "signal", "tokens", "hidden"])
def test_a_form_costs_what_the_rewritten_network_does(name: str) -> None:
    program, store = known()
    prices = Prices.of(program, PROFILE)
    layer = next(each for each in find_layers(program).layers if each.name == name)
    assert prices.whole_ms == pytest.approx(milliseconds(program), rel=1e-12)
    for ranks in forms(layer):
        small = apply(program, store, {name: ranks})
        expected = milliseconds(small) - milliseconds(program)
        found = prices.ms(layer, *ranks) - prices.ms(layer, layer.columns, layer.rows)
        # the bytes of all weights decide how far the others are from the core: that is left as it is
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_a_layer_in_factors_is_priced_as_it_stands_and_with_less() -> None:
    program, store = known()
    small = apply(program, store, {"stem": (4, 8), "hidden": (8, 12)})
    prices = Prices.of(small, PROFILE)
    again = fit(small, torch.randn(16, 8, 17, 17), statistics="kfac", source="sampled")
    for name, ranks in (("stem", (4, 4)), ("hidden", (4, 12))):
        layer = next(each for each in find_layers(small).layers if each.name == name)
        assert layer.decomposed
        smaller = apply(small, again, {name: ranks})
        expected = milliseconds(smaller) - milliseconds(small)
        found = prices.ms(layer, *ranks) - prices.ms(layer, layer.columns, layer.rows)
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_counts_are_those_of_the_rewritten_network() -> None:
    program, store = known()
    for layer in find_layers(program).layers:
        for ranks in forms(layer):
            if min(ranks) >= min(layer.columns, layer.rows):
                continue
            small = apply(program, store, {layer.name: ranks})
            models = [CostModel(each, analyze(each)) for each in (small, program)]
            whole = layer.columns, layer.rows
            counts = [model.parameters() for model in models]
            assert layer.weights(*ranks) - layer.weights(*whole) == counts[0] - counts[1]
            macs = [model.macs() for model in models]
            assert layer.macs(*ranks) - layer.macs(*whole) == macs[0] - macs[1]
