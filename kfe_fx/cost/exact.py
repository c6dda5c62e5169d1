"""The exact solver: a multiple-choice knapsack as an integer program, for networks with few stops.

One binary variable per track and stop, x[t, s]; a cost is a sum of terms, and a term that reads several tracks gets a
continuous variable per combination of their stops, y[c] in [0, 1] with sum_c y[c] = 1 and the marginals
sum_{c with s at t} y[c] = x[t, s], which leaves y no freedom once x is chosen (Adams & Sherali's linearisation). Then

    minimise  sum_{t,s} loss[t, s] x[t, s]   so that   sum_c cost_k[c] y[c] <= limit_k   for every budget k.

HiGHS solves it through scipy. The number of combinations grows as the product of the stops of the tracks that meet in
a term, so that small networks are solved so, and large ones by the search, which is tested against this. Where the loss
of some choice is known, the stops that cannot do better are left out first (``pegging``), which are most of them.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from kfe_fx.cost.pegging import surviving
from kfe_fx.cost.state import SumState
from kfe_fx.errors import UsageError

MOST_COMBINATIONS = 200_000
MOST_LEFT = 5_000  # of them behind pegging: proved in a fraction of a second
MOST_NODES = 20_000  # of branch and bound: a count, not a clock, so that equal questions get equal answers


@dataclass(frozen=True)
class Exact:
    """The best stops, one per track, and their loss."""

    stops: tuple[int, ...]
    loss: float


def solve_exactly(
    states: Sequence[SumState], limits: Sequence[float], most: int = MOST_COMBINATIONS, known: float | None = None
) -> Exact | None:
    """Return the stops of the least loss under all limits; None where no stops meet them.

    ``states``: one per budget, of the same tracks, with costs that are sums, at the least stops that are allowed. They
    are left as they are. ``known``: the loss of a choice that meets all limits, so that others need not be looked at.

    Raises:
        UsageError: more than ``most`` combinations to list, more than ``MOST_LEFT`` that may do better than what is
            known, or no proof within ``MOST_NODES`` nodes.
    """
    tracks = states[0].tracks
    allowed = [np.arange(len(track) + 1) >= first for track, first in zip(tracks, states[0].stops, strict=True)]
    costs = [state.tables(most) for state in states]
    if known is not None:
        for tables, limit in zip(costs, limits, strict=True):
            losses = [np.where(ok, track.loss, np.inf) for track, ok in zip(tracks, allowed, strict=True)]
            dense = [(readers, _array(table, [len(tracks[t]) + 1 for t in readers])) for readers, table in tables]
            allowed = surviving(losses, dense, limit, known)
        left = sum(math.prod(int(allowed[t].sum()) for t in readers) for tables in costs for readers, _ in tables)
        if left > MOST_LEFT:
            raise UsageError(f"{left} choices of stops are left to compare, at most {MOST_LEFT}")
    starts = np.cumsum([0, *(len(track) + 1 for track in tracks)])
    loss: list[float] = [value for track in tracks for value in track.loss]
    rows: list[dict[int, float]] = [dict.fromkeys(range(a, b), 1.0) for a, b in itertools.pairwise(starts.tolist())]
    low: Any = [1.0] * len(tracks)
    high: Any = list(low)
    for tables, limit in zip(costs, limits, strict=True):
        budget: dict[int, float] = {}
        fixed = 0.0
        for readers, table in tables:
            if not readers:
                fixed += table[()]
                continue
            first = len(loss)
            marginals: dict[tuple[int, int], dict[int, float]] = {
                (track, stop): {} for track in readers for stop in np.flatnonzero(allowed[track]).tolist()
            }  # a stop that no combination allows stays at nothing
            possible = [
                (stops, value)
                for stops, value in table.items()
                if all(allowed[track][stop] for track, stop in zip(readers, stops, strict=True))
            ]
            loss += [0.0] * len(possible)
            for column, (stops, value) in enumerate(possible, first):
                budget[column] = value / limit
                for track, stop in zip(readers, stops, strict=True):
                    marginals[track, stop][column] = 1.0
            for (track, stop), row in marginals.items():
                rows.append({**row, int(starts[track]) + stop: -1.0})
                low.append(0.0)
                high.append(0.0)
        rows.append(budget)
        low.append(-np.inf)
        high.append(1 - fixed / limit)
    picked = [(row, column, value) for row, found in enumerate(rows) for column, value in found.items()]
    at, column, value = (np.array(part) for part in zip(*picked, strict=True))
    matrix = csr_matrix((value, (at, column)), shape=(len(rows), len(loss)))
    upper: Any = np.ones(len(loss))
    upper[: starts[-1]] = np.concatenate(allowed)
    whole = np.arange(len(loss)) < starts[-1]
    with muted():
        found = milp(
            np.array(loss),
            integrality=whole.astype(int),
            bounds=Bounds(0, upper),
            constraints=LinearConstraint(matrix, low, high),
            options={"node_limit": MOST_NODES, "mip_rel_gap": 0.0},
        )
    if found.status == 2:  # infeasible
        return None
    if found.status != 0:
        raise UsageError(f"no proof within {MOST_NODES} nodes ({found.message}); give the exact solver fewer stops")
    stops = tuple(int(found.x[a:b].argmax()) for a, b in itertools.pairwise(starts.tolist()))
    return Exact(stops, math.fsum(track.loss[stop] for track, stop in zip(tracks, stops, strict=True)))


def _array(table: dict[tuple[int, ...], float], shape: Sequence[int]) -> np.ndarray:
    found = np.full(shape, np.inf)
    for stops, value in table.items():
        found[stops] = value
    return found


@contextmanager
def muted() -> Iterator[None]:
    """Keep what HiGHS prints past all options out of stdout, which belongs to the user's pipeline."""
    library = ctypes.CDLL(None)
    library.fflush(None)
    try:
        kept = os.dup(1)
    except OSError:  # there is none
        yield
        return
    if sys.stdout is not None:
        sys.stdout.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        library.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
