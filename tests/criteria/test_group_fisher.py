"""Group Fisher: the Fisher information of the gates over the feature maps that go with each unit."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

import kfe_fx
from kfe_fx.criteria import ScoreContext, score
from kfe_fx.criteria.group_fisher import activation_memory
from kfe_fx.labels.analysis import analyze
from kfe_fx.testing import CriterionConformance
from tests.criteria.nets import program_of
from tests.criteria.test_kronecker import Recurrent

TARGETS = torch.tensor([0, 2, 1])


class TestGroupFisher(CriterionConformance):
    criterion = "group-fisher"


def test_information_over_the_share_of_memory() -> None:
    program, x = program_of("residual")
    context = ScoreContext.of(program, analyze(program), (x, TARGETS), batch_size=2)
    memory = np.zeros(len(context.analysis.units))
    for unit in context.analysis.units:
        for name in ("stem", "inner", "branch", "depthwise", "grouped"):  # 36 positions of 2 examples each
            memory[unit.id] += 72 * len(unit.slices.get(f"{name}.weight", {}).get(0, ()))
    np.testing.assert_array_equal(activation_memory(context.analysis), memory)
    found = score("group-fisher", context)
    np.testing.assert_allclose(found, score("fisher", context) * memory.sum() / memory, rtol=1e-12)
    assert context.facts["activation_elements"] == memory.sum()


def test_the_members_of_a_unit_add_before_the_square() -> None:
    """A unit made by two layers that add up has the information of the one that makes the sum."""
    torch.manual_seed(0)
    x = torch.randn(3, 5).double()
    whole = nn.Linear(5, 6).double()
    head = nn.Linear(6, 4).double()

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Linear(5, 6), nn.Linear(5, 6), head
            with torch.no_grad():
                for part, share in ((self.one, 0.25), (self.two, 0.75)):
                    part.double().weight.copy_(share * whole.weight)
                    part.bias.copy_(share * whole.bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.one(x) + self.two(x)))

    found = []
    for module in (nn.Sequential(whole, nn.ReLU(), head), Halves()):
        program = kfe_fx.capture(module.eval(), x)
        context = ScoreContext.of(program, analyze(program), (x, TARGETS))
        assert activation_memory(context.analysis).tolist() == [2.0 * (1 + len(found))] * 6  # examples times layers
        found.append(score("group-fisher", context))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-9)  # every unit has the same share


def test_recurrent_units_are_there_at_every_step() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 3).double()
    program = kfe_fx.capture(Recurrent().double().eval(), x)
    assert activation_memory(analyze(program)).tolist() == [10.0] * 4  # two examples of five steps
