"""One thread or two: small networks run faster on one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

SECONDS = 0.05


@contextmanager
def fastest_threads(step: Callable[[], object], threads: int | None = None) -> Iterator[int]:
    """Run a block with one or two threads, whichever runs ``step`` faster in a probe of 50 ms, then go back.

    Args:
        step: a piece of the work, without lasting effect; it is run a few times.
        threads: take this number and probe nothing. OMP_NUM_THREADS says the same.

    Yields:
        The number of threads.
    """
    before = torch.get_num_threads()
    chosen = threads or _told() or _probe(step, before)
    torch.set_num_threads(chosen)
    try:
        yield chosen
    finally:
        torch.set_num_threads(before)


def _told() -> int | None:
    value = os.environ.get("OMP_NUM_THREADS", "")
    return int(value) if value.isdigit() and int(value) > 0 else None


def _probe(step: Callable[[], object], before: int) -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if available < 2:
        return 1
    try:
        best = {count: _fastest(step, count) for count in (1, 2)}
    finally:
        torch.set_num_threads(before)
    return 1 if best[1] <= best[2] else 2


def _fastest(step: Callable[[], object], count: int) -> float:
    torch.set_num_threads(count)
    step()  # the first run makes buffers and wakes threads
    times: list[float] = []
    end = time.perf_counter() + SECONDS / 2
    while not times or (time.perf_counter() < end and len(times) < 100):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return min(times)
