from __future__ import annotations

import math

import numpy as np
import pytest

from kfe_fx.errors import UsageError
from kfe_fx.runtime.statistics import block_ratios, latency_of, median_interval, ratio_interval


def test_median_interval_by_hand():
    # n = 6: P[median in (min, max)] = 1 - 2/64
    interval = median_interval([3, 1, 2, 6, 5, 4])
    assert (interval.value, interval.low, interval.high) == (3.5, 1, 6)
    assert interval.coverage == pytest.approx(1 - 2 / 64)
    # n = 20: the 6th and the 15th, coverage 0.9586
    interval = median_interval(range(1, 21))
    assert (interval.low, interval.high) == (6, 15)
    tail = sum(math.comb(20, k) for k in range(6)) / 2**20
    assert interval.coverage == pytest.approx(1 - 2 * tail)


def test_few_values_say_so():
    interval = median_interval([1.0, 2.0, 3.0])
    assert (interval.low, interval.high) == (1, 3)
    assert interval.coverage == pytest.approx(0.75)
    assert median_interval([2.0]).coverage == 0
    with pytest.raises(UsageError, match="no values"):
        median_interval([])
    with pytest.raises(UsageError, match="confidence"):
        median_interval([1.0], confidence=1.0)


def test_coverage_holds_for_heavy_tails():
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        interval = median_interval(np.exp(random.standard_cauchy(25) * 0.01))
        inside += interval.low <= 1 <= interval.high
    assert inside / 400 > 0.93


def spikes(random: np.random.Generator, rounds: int) -> np.ndarray:
    """Some blocks take 2.5 times as long, or far longer."""
    return np.where(random.random(rounds) < 0.08, random.pareto(1.5, rounds) + 2.5, 1)


def test_known_ratio_under_drift_and_interruptions():
    random = np.random.default_rng(1)
    rounds, intervals = 40, []
    for _ in range(100):
        drift = 1 + 0.5 * np.linspace(0, 1, rounds)
        first = 3.0 * drift * (1 + 0.01 * random.standard_normal(rounds)) * spikes(random, rounds)
        other = 1.5 * drift * (1 + 0.01 * random.standard_normal(rounds)) * spikes(random, rounds)
        intervals.append(ratio_interval(first, other))
    assert sum(interval.low <= 0.5 <= interval.high for interval in intervals) >= 90
    assert max(abs(interval.value - 0.5) for interval in intervals) < 0.02
    assert np.median([interval.half_width for interval in intervals]) < 0.03


def test_a_palindrome_cancels_linear_drift():
    # turns at times 0, 1 | 2, 3 in the order A B B A; cost grows by 10 % a turn
    cost = lambda turn: math.exp(0.1 * turn)
    first = np.array([cost(0), cost(3)])
    other = np.array([2 * cost(1), 2 * cost(2)])
    assert block_ratios(first, other) == pytest.approx([2.0])
    assert len(block_ratios(np.ones(5), np.ones(5))) == 2
    assert len(block_ratios(np.ones(1), np.ones(1))) == 1


def test_percentiles():
    latency = latency_of(np.arange(101.0))
    assert (latency.p10, latency.p50, latency.p90, latency.p99, latency.runs) == (10, 50, 90, 99, 101)
    with pytest.raises(UsageError):
        latency_of([])
