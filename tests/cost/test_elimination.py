"""Elimination and pegging against brute force on random tables."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from kfe_fx.cost.elimination import Elimination
from kfe_fx.cost.pegging import surviving
from kfe_fx.errors import UsageError

Tables = list[tuple[tuple[int, ...], np.ndarray]]


@st.composite
def sums(draw: st.DrawFn) -> tuple[list[int], Tables]:
    """Draw sizes of variables and tables over up to three of them, some choices not allowed."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    seed = draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    scopes = draw(
        st.lists(st.lists(st.sampled_from(range(len(sizes))), max_size=3, unique=True).map(sorted), max_size=8)
    )
    tables: Tables = []
    for scope in scopes:
        table = random.normal(size=[sizes[v] for v in scope])
        if draw(st.booleans()):
            table = np.where(random.random(table.shape) < 0.2, np.inf, table)
        tables.append((tuple(scope), np.asarray(table)))
    return sizes, tables


def brute(sizes: list[int], tables: Tables) -> dict[tuple[int, ...], float]:
    return {
        stops: sum(float(table[tuple(stops[v] for v in scope)]) for scope, table in tables)
        for stops in itertools.product(*map(range, sizes))
    }


@given(sums())
def test_the_minimum_and_the_marginals_are_those_of_all_choices(drawn: tuple[list[int], Tables]):
    sizes, tables = drawn
    order = Elimination(sizes, [scope for scope, _ in tables], 10_000)
    values = [table for _, table in tables]
    every = brute(sizes, tables)
    least, chosen = order.minimum(values)
    assert least == pytest.approx(min(every.values()), abs=1e-12)
    assert every[tuple(chosen)] == pytest.approx(least, abs=1e-12)
    for v, marginal in enumerate(order.marginals(values)):
        for stop in range(sizes[v]):
            wanted = min(value for stops, value in every.items() if stops[v] == stop)
            assert marginal[stop] == pytest.approx(wanted, abs=1e-12)


@given(sums(), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_no_choice_as_good_as_the_known_one_is_given_up(drawn: tuple[list[int], Tables], seed: int, share: float):
    sizes, costs = drawn
    costs = [(scope, np.abs(table)) for scope, table in costs]
    losses = [np.random.default_rng(seed).normal(size=size) for size in sizes]
    every, price = brute(sizes, costs), brute(sizes, [((v,), loss) for v, loss in enumerate(losses)])
    finite = sorted(value for value in every.values() if np.isfinite(value))
    if not finite or finite[0] <= 0:
        return
    limit = finite[int(share * (len(finite) - 1))]
    within = [stops for stops, value in every.items() if value <= limit]
    known = sorted(price[stops] for stops in within)[len(within) // 4]
    left = surviving(losses, costs, limit, known)
    for stops in within:
        if price[stops] <= known:
            assert all(ok[stop] for ok, stop in zip(left, stops, strict=True))


def test_most_stops_go():
    random = np.random.default_rng(0)
    losses = [np.cumsum(random.exponential(size=20)) for _ in range(10)]
    costs: Tables = [((v,), np.arange(20.0, 0.0, -1.0)) for v in range(10)]
    every = np.array([0.0])  # the least loss for each cost, by dynamic programming
    for loss in losses:
        best = np.full(len(every) + 20, np.inf)
        for stop, value in enumerate(loss):
            best[20 - stop : 20 - stop + len(every)] = np.minimum(best[20 - stop :][: len(every)], every + value)
        every = best
    left = surviving(losses, costs, 100.0, float(every[:101].min()))
    assert sum(int(ok.sum()) for ok in left) < 40


def test_too_many_choices_at_once_are_refused():
    with pytest.raises(UsageError, match="1000 choices meet at once, at most 999"):
        Elimination([10, 10, 10], [(0, 1, 2)], 999)
