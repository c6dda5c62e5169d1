"""Intermediate budgets of pruning in rounds."""

from __future__ import annotations

import pytest

from kfe_fx.cost.schedule import exponential_schedule
from kfe_fx.errors import UsageError


@pytest.mark.parametrize("rounds", [1, 2, 7, 14])
def test_each_round_keeps_the_same_fraction(rounds: int):
    ratios = exponential_schedule(0.37, rounds)
    assert len(ratios) == rounds
    assert ratios[-1] == 0.37
    kept = [after / before for before, after in zip([1.0, *ratios], ratios, strict=False)]
    assert kept == pytest.approx([0.37 ** (1 / rounds)] * rounds)


def test_nothing_to_do():
    assert exponential_schedule(1.0, 3) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(("target", "rounds"), [(0, 1), (1.5, 1), (0.5, 0)])
def test_arguments_that_mean_nothing(target: float, rounds: int):
    with pytest.raises(UsageError):
        exponential_schedule(target, rounds)
