"""Latency in ONNX Runtime, measured in pairs: what two networks take relative to each other on a busy machine.

Absolute times move by tens of per cent with what else runs; ratios of neighbouring blocks hardly do. So sessions
take turns in short blocks (A B, B A, A B, ...), each block is summed up by its lower quartile after a run that warms
the caches, and the ratio is the median over palindromes of blocks, with an order-statistic interval.

The clock matters more than all of that. When other work shares the cores, short runs fit into one time slice and
long ones do not: by the wall clock a network of a quarter of the work then seems to take a tenth of the time, with
a narrow interval. One-thread sessions are therefore timed by the processor time of the calling thread, which is
the wall time of an idle machine; the wall time is kept beside it. Several threads have only the wall clock.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnxruntime as ort

from kfe_fx.errors import UsageError
from kfe_fx.runtime.session import run
from kfe_fx.runtime.statistics import Interval, Latency, latency_of, ratio_interval

Feeds = Mapping[str, Any]

# A block is long enough to hide the switch between sessions and short enough that the machine does not change.
BLOCK_SECONDS = 0.03
MIN_ROUNDS = 12
_COLUMN = {"wall": 0, "processor": 1}


@dataclass(frozen=True)
class Comparison:
    """Latencies of several sessions by ``clock``, their median wall times, and their ratios to the first one."""

    latencies: tuple[Latency, ...]
    wall_ms: tuple[float, ...]
    ratios: tuple[Interval, ...]
    clock: Literal["processor", "wall"]
    rounds: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "latencies_ms": [latency.to_json() for latency in self.latencies],
            "wall_ms": list(self.wall_ms),
            "clock": self.clock,
            "ratios_to_first": [ratio.to_json() for ratio in self.ratios],
            "rounds": self.rounds,
            "seconds": round(self.seconds, 3),
        }


def compare(
    sessions: Sequence[ort.InferenceSession],
    feeds: Feeds | Sequence[Feeds],
    *,
    seconds: float = 2.0,
    min_rounds: int = MIN_ROUNDS,
    precision: float | None = None,
    seed: int = 0,
) -> Comparison:
    """Measure sessions against the first one, interleaved.

    ``feeds`` are one set of named arrays for all sessions or one set each. Rounds go on for ``seconds``, and at least
    ``min_rounds`` of them whatever they take; with ``precision`` they stop early once every ratio is known to that
    relative half-width (0.01: to 1 %). ``seed`` shuffles the order of the sessions within a pair of rounds.

    Raises:
        UsageError: no session, or not one set of feeds for each.
        UnsupportedModel: a session fails on its feeds.
    """
    each = [feeds] * len(sessions) if isinstance(feeds, Mapping) else list(feeds)
    if not sessions or len(each) != len(sessions):
        raise UsageError(f"compare needs sessions and one set of feeds for each, got {len(sessions)} and {len(each)}")
    if seconds <= 0 or min_rounds < 2:
        raise UsageError(f"compare needs time and at least two rounds, got {seconds} s and {min_rounds}")
    clock = _clock(sessions)
    repeats = [_calibrate(session, one) for session, one in zip(sessions, each, strict=True)]
    order = np.random.default_rng(seed)
    turn = np.arange(len(sessions))
    runs: list[list[np.ndarray]] = [[] for _ in sessions]
    blocks: list[list[float]] = [[] for _ in sessions]
    started = time.perf_counter()
    rounds = 0
    while True:
        # the second of two rounds runs backwards
        turn = turn[::-1] if rounds % 2 else order.permutation(len(sessions))
        for index in turn:
            times = _block(sessions[index], each[index], repeats[index])
            runs[index].append(times)
            blocks[index].append(float(_summary(times, clock)))
        rounds += 1
        if rounds % 2 or rounds < min_rounds:
            continue
        precise = precision is not None and all(ratio.half_width <= precision for ratio in _ratios(blocks)[1:])
        if precise or time.perf_counter() - started >= seconds:
            break
    times = [np.concatenate(one) for one in runs]
    return Comparison(
        latencies=tuple(latency_of(one[:, _COLUMN[clock]]) for one in times),
        wall_ms=tuple(float(np.median(one[:, 0])) for one in times),
        ratios=tuple(_ratios(blocks)),
        clock=clock,
        rounds=rounds,
        seconds=time.perf_counter() - started,
    )


def measure(
    session: ort.InferenceSession, feeds: Feeds, *, seconds: float = 1.0, min_rounds: int = MIN_ROUNDS
) -> Latency:
    """Measure one session alone; to compare two, use ``compare``.

    Raises:
        UsageError: no time was given.
        UnsupportedModel: the session fails on its feeds.
    """
    return compare([session], feeds, seconds=seconds, min_rounds=min_rounds).latencies[0]


def _ratios(blocks: Sequence[Sequence[float]]) -> list[Interval]:
    first = np.asarray(blocks[0])
    others = [ratio_interval(first, np.asarray(other)) for other in blocks[1:]]
    return [Interval(1.0, 1.0, 1.0, 1.0), *others]


def _calibrate(session: ort.InferenceSession, feeds: Feeds) -> int:
    """Return how many runs fill a block; the first runs, which allocate and pack weights, are thrown away."""
    run(session, dict(feeds))
    started = time.perf_counter()
    count = 0
    while count < 2 or time.perf_counter() - started < BLOCK_SECONDS / 2:
        run(session, dict(feeds))
        count += 1
    took = (time.perf_counter() - started) / count
    return max(4, math.ceil(BLOCK_SECONDS / took))


def _block(session: ort.InferenceSession, feeds: Feeds, repeats: int) -> np.ndarray:
    """Return milliseconds [repeats, (wall, processor)] after one run that brings the weights back into the caches."""
    named = dict(feeds)
    session.run(None, named)
    times = np.empty((repeats, 2))
    for index in range(repeats):
        wall, processor = time.perf_counter_ns(), time.thread_time_ns()
        session.run(None, named)
        times[index] = time.perf_counter_ns() - wall, time.thread_time_ns() - processor
    return times / 1e6


def _clock(sessions: Sequence[ort.InferenceSession]) -> Literal["processor", "wall"]:
    alone = all(
        session.get_session_options().intra_op_num_threads == 1 and session.get_providers() == ["CPUExecutionProvider"]
        for session in sessions
    )
    return "processor" if alone else "wall"


def _summary(times: np.ndarray, clock: str) -> float:
    # By the wall clock only a run that nothing interrupted says anything; the processor clock leaves what a
    # neighbour takes from caches and from the other half of a core, against which the lower quartile is enough.
    return np.percentile(times[:, 1], 25) if clock == "processor" else times[:, 0].min()
