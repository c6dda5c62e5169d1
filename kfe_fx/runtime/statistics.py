"""Statistics of latencies that survive a shared machine: medians, and intervals that assume no distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kfe_fx.errors import UsageError


@dataclass(frozen=True)
class Interval:
    """A value with the interval that holds the true one with probability ``coverage`` (at least)."""

    value: float
    low: float
    high: float
    coverage: float

    @property
    def half_width(self) -> float:
        """Half the interval relative to the value."""
        return (self.high - self.low) / (2 * self.value) if self.value else math.inf

    def to_json(self) -> dict[str, float]:
        """Return plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Latency:
    """The distribution of single runs, in milliseconds."""

    p10: float
    p50: float
    p90: float
    p99: float
    runs: int

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def latency_of(milliseconds: Sequence[float] | np.ndarray) -> Latency:
    """Summarise single runs by their 10th, 50th, 90th and 99th percentile.

    Raises:
        UsageError: no run was given.
    """
    if len(milliseconds) == 0:
        raise UsageError("no runs to summarise")
    p10, p50, p90, p99 = (float(value) for value in np.percentile(milliseconds, (10, 50, 90, 99)))
    return Latency(p10, p50, p90, p99, len(milliseconds))


def median_interval(values: Sequence[float] | np.ndarray, confidence: float = 0.95) -> Interval:
    """Return the median and its order-statistic interval.

    The median lies between the (k+1)-th smallest and the (k+1)-th largest of n independent values with probability
    1 - 2·P[Binomial(n, 1/2) <= k], whatever their distribution; the largest k that keeps ``confidence`` is taken.
    Below six values none reaches 0.95: the whole range is given, and ``coverage`` says what it is worth.

    Raises:
        UsageError: no value was given, or the confidence is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise UsageError(f"confidence must lie between 0 and 1, got {confidence}")
    ordered = np.sort(np.asarray(values, dtype=float))
    n = len(ordered)
    if n == 0:
        raise UsageError("no values to take the median of")
    outside, tail, k = 0.0, 0.0, 0
    for rank in range((n - 1) // 2 + 1):
        tail += math.exp(math.lgamma(n + 1) - math.lgamma(rank + 1) - math.lgamma(n - rank + 1) - n * math.log(2))
        if rank and 1 - 2 * tail < confidence:
            break
        k, outside = rank, tail
    coverage = max(0.0, 1 - 2 * outside)
    return Interval(float(np.median(ordered)), float(ordered[k]), float(ordered[n - 1 - k]), coverage)


def block_ratios(first: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return one ratio other/first per palindrome of blocks.

    Both hold block medians [rounds] of rounds run in the order A B, B A, A B, ...; the geometric mean of two
    neighbouring rounds (A B B A) cancels what drifts linearly. An odd last round is left out, unless it is alone.
    """
    logs = np.log(np.asarray(other, dtype=float)) - np.log(np.asarray(first, dtype=float))
    if len(logs) == 1:
        return np.exp(logs)
    pairs = len(logs) // 2
    return np.exp(logs[: 2 * pairs].reshape(pairs, 2).mean(axis=1))


def ratio_interval(first: np.ndarray, other: np.ndarray, confidence: float = 0.95) -> Interval:
    """Return the ratio other/first of block medians [rounds] with its interval."""
    return median_interval(block_ratios(first, other), confidence)
