"""The closed loop on made-up machines: biased, noisy, stepped, out of reach."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from kfe_fx.cost.loop import LoopResult, close_loop
from kfe_fx.cost.solver import Selection
from kfe_fx.errors import UsageError


class Machine:
    """Selections remove ``n`` of 1000 units; the predictor promises 1 - n/1000, the machine measures something else."""

    def __init__(self, measure: Callable[[float], float], tread: int = 1, least: float = 0.05) -> None:
        self.measure, self.tread, self.least = measure, tread, least
        self.solved, self.measured = 0, 0

    def solve(self, target: float) -> Selection:
        self.solved += 1
        feasible = target >= self.least
        gone = math.ceil(1000 * (1 - max(target, self.least)) / self.tread) * self.tread
        gone = min(gone, 1000 - 1)
        return Selection(frozenset(range(gone)), 1 - gone / 1000, feasible, "" if feasible else "frozen layers")

    def run(self, selection: Selection) -> float:
        self.measured += 1
        return self.measure(selection.predicted)

    def loop(self, target: float, **options: float) -> LoopResult:
        return close_loop(self.solve, self.run, target, **options)  # type: ignore[arg-type]


def test_a_right_prediction_takes_one_turn():
    machine = Machine(lambda p: p)
    result = machine.loop(0.5)
    assert result.within
    assert (len(result.turns), machine.measured) == (1, 2)  # what lands is measured once more


def test_what_landed_by_luck_goes_on():
    found = iter([0.51, 0.61])
    machine = Machine(lambda p: next(found, 1.12 * p))
    result = machine.loop(0.5)
    assert result.turns[0].measured == pytest.approx(0.56)
    assert result.within
    assert abs(1.12 * result.selection.predicted / 0.5 - 1) <= 0.05
    assert machine.measured == len(result.turns) + 2


@pytest.mark.parametrize("target", [0.7, 0.5, 0.35])
@pytest.mark.parametrize("bias", [0.8, 0.9, 1.1, 1.25])
def test_a_constant_bias_is_corrected(target: float, bias: float):
    result = Machine(lambda p: min(1.0, bias * p)).loop(target)
    assert result.within
    assert abs(result.measured / target - 1) <= 0.05
    assert len(result.turns) <= 3


@pytest.mark.parametrize("floor", [0.1, 0.25, 0.35])
def test_a_part_that_does_not_shrink_is_found(floor: float):
    result = Machine(lambda p: floor + (1 - floor) * p).loop(0.5)
    assert result.within
    assert len(result.turns) <= 4


def test_noise_does_not_lead_astray():
    hits = 0
    for seed in range(40):
        noise = np.random.default_rng(seed)
        result = Machine(lambda p, noise=noise: 1.12 * p * float(np.exp(noise.normal(0, 0.01)))).loop(0.5)
        hits += result.within
        assert abs(result.measured - 0.5) < 0.06
    assert hits >= 39


@pytest.mark.parametrize("tread", [50, 100, 180])
def test_a_staircase_ends_at_the_nearest_tread(tread: int):
    machine = Machine(lambda p: 1.1 * p, tread=tread)
    result = machine.loop(0.5, tolerance=0.02)
    reachable = [1.1 * (1 - n * tread / 1000) for n in range(1000 // tread + 1)]
    below = max(value for value in reachable if value <= 0.5 * 1.02)
    assert result.measured == pytest.approx(below)
    assert len(result.turns) == len({turn.selection.removed for turn in result.turns})  # none has two turns
    assert machine.measured == len(result.turns) + result.within


def test_the_loop_ends_when_nothing_new_comes():
    machine = Machine(lambda p: 1.1 * p, tread=450)
    result = machine.loop(0.5, turns=20)
    assert not result.within
    assert result.feasible
    assert result.measured < 0.5
    assert result.reason == "no other selection comes nearer"
    assert machine.measured <= 3


def test_out_of_reach_is_said():
    result = Machine(lambda p: 0.3 + 0.7 * p, least=0.1).loop(0.2)
    assert not result.feasible
    assert not result.within
    assert "out of reach: frozen layers" in result.reason
    assert result.selection.predicted == pytest.approx(0.1)
    assert result.measured == pytest.approx(0.37)


def test_a_budget_that_no_turn_meets_is_not_feasible():
    result = Machine(lambda p: 0.1 * p + 0.55).loop(0.5, turns=2)
    assert not result.feasible
    assert result.reason == f"2 turns were not enough, the nearest measured {result.measured:.3f} of dense"
    stuck = Machine(lambda p: 1.1 * p, tread=450).loop(0.54, turns=20)
    assert stuck.feasible  # below the budget


def test_what_the_predictor_thinks_impossible_may_be_measured_possible():
    result = Machine(lambda p: 0.5 * p, least=0.6).loop(0.31)
    assert result.feasible
    assert result.within


def test_turns_are_limited_and_reported():
    seen = []
    machine = Machine(lambda p: 0.6)
    result = close_loop(machine.solve, machine.run, 0.5, turns=3, progress=seen.append)
    assert list(result.turns) == seen
    assert len(seen) <= 3
    assert not result.within


def test_below_the_budget_is_preferred_to_nearer_above():
    values = iter([0.60, 0.41, 0.58, 0.57])
    result = close_loop(Machine(lambda p: p).solve, lambda _: next(values), 0.5, turns=4)
    assert result.measured == 0.41


@pytest.mark.parametrize("options", [{"target": 0}, {"target": 1.2}, {"tolerance": 0}, {"turns": 0}])
def test_arguments_that_mean_nothing(options: dict[str, float]):
    with pytest.raises(UsageError):
        close_loop(Machine(lambda p: p).solve, lambda _: 1.0, **{"target": 0.5, **options})  # type: ignore[arg-type]
