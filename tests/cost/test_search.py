"""The search against brute force on small chains of layers whose cost couples neighbours."""

from __future__ import annotations

import ctypes
import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from kfe_fx.cost.exact import muted, solve_exactly
from kfe_fx.cost.joint import JointState
from kfe_fx.cost.search import Search, farthest
from kfe_fx.cost.state import Sizes, SumState, WholeState
from kfe_fx.cost.steps import Track
from kfe_fx.cost.widths import Product, Removed, Widths

GROUPS, STOPS = 4, 6


@dataclass(frozen=True)
class Tread:
    """A product of sizes rounded up to a tread: flat, then a step."""

    product: Product
    tread: int
    owner: str = "layer"

    @property
    def widths(self) -> tuple[int, ...]:
        return self.product.widths

    def cost(self, sizes: Sequence[int]) -> float:
        return self.product.at([-(-size // self.tread) * self.tread for size in sizes])


@dataclass(frozen=True)
class Toy:
    widths: Widths
    tracks: list[Track]
    layers: list[Tread]

    def state(self) -> SumState:
        return SumState(Sizes(self.widths, self.tracks, [], 1), self.layers)

    def terms(self) -> None:
        """No structure: the search has to ask for the whole."""

    def predict(self, removed: Removed) -> float:
        sizes = self.widths.sizes(removed).tolist()
        return sum(layer.cost(sizes) for layer in self.layers)

    def optimum(self, limit: float) -> float:
        best = math.inf
        for stops in itertools.product(*(range(len(track) + 1) for track in self.tracks)):
            sizes = [STOPS - stop for stop in stops]
            if sum(layer.cost(sizes) for layer in self.layers) <= limit:
                best = min(best, sum(track.loss[stop] for track, stop in zip(self.tracks, stops, strict=True)))
        return best


def toy(seed: int, tread: int = 1) -> Toy:
    random = np.random.default_rng(seed)
    widths, tracks = Widths(GROUPS * STOPS), []
    dims: list[Product | int] = [1]
    for group in range(GROUPS):
        units = np.arange(group * STOPS, (group + 1) * STOPS)
        dims.append(widths.product([units], STOPS))
        scores = np.sort(random.exponential(size=STOPS) * random.uniform(0.3, 3))[:-1]
        loss = np.cumsum([0, *scores])
        tracks.append(Track(group, tuple((int(unit),) for unit in units[:-1]), tuple(loss.tolist())))
    dims.append(1)
    layers = [Tread(Product(int(random.integers(1, 20))) * a * b, tread) for a, b in itertools.pairwise(dims)]
    return Toy(widths, tracks, layers)


@pytest.mark.parametrize("tread", [1, 2, 3])
def test_the_exact_solver_is_brute_force(tread: int):
    for seed in range(6):
        net = toy(seed, tread)
        for ratio in (0.8, 0.5, 0.2):
            limit = ratio * net.predict(())
            found, best = solve_exactly([net.state()], [limit]), net.optimum(limit)
            if found is None:
                assert best == math.inf
                continue
            assert found.loss == pytest.approx(best, rel=1e-9)
            gone = [unit for line, at in zip(net.tracks, found.stops, strict=True) for unit in line.gone(at)]
            assert net.predict(gone) <= limit * (1 + 1e-9)


@pytest.mark.parametrize("tread", [1, 2])
def test_what_is_known_changes_no_optimum(tread: int):
    for seed in range(6):
        net = toy(seed, tread)
        limit = 0.5 * net.predict(())
        search = Search(net.state(), limit)
        assert search.run()
        found, best = solve_exactly([net.state()], [limit], known=search.loss), net.optimum(limit)
        assert found is not None
        assert found.loss == pytest.approx(best, rel=1e-9)
    for seed in range(6):
        _, states, limits = both(seed)
        best, joint = solve_exactly(states, limits), Search(JointState(states, limits), 1.0)
        assert joint.run()
        known = joint.loss
        _, states, limits = both(seed)
        found = solve_exactly(states, limits, known=known)
        assert best is not None
        assert found is not None
        assert found.loss == pytest.approx(best.loss, rel=1e-9)


def test_what_the_integer_program_prints_stays_away(capfd: pytest.CaptureFixture[str]):
    library = ctypes.CDLL(None)
    sys.stdout.write("before\n")
    with muted():
        library.puts(b"noise")
    library.puts(b"behind")
    library.fflush(None)
    assert capfd.readouterr().out == "before\nbehind\n"


def both(seed: int) -> tuple[Toy, list[SumState], list[float]]:
    """One network under two budgets: the cost of its layers, and the sum of its widths."""
    net = toy(seed)
    count = [Tread(width, 1) for width in {layer.product.widths: layer.product for layer in net.layers}.values()]
    states = [net.state(), SumState(Sizes(net.widths, net.tracks, [], 1), count[:2])]
    return net, states, [0.7 * states[0].cost, 0.4 * states[1].cost]


def test_several_budgets_against_the_exact_solver():
    excess = []
    for seed in range(15):
        _, states, limits = both(seed)
        best = solve_exactly(states, limits)
        assert best is not None
        search = Search(JointState(states, limits), 1.0)
        assert search.run()
        assert all(state.cost <= limit for state, limit in zip(states, limits, strict=True))
        assert states[0].stops == states[1].stops
        excess.append(search.loss / best.loss)
    assert min(excess) >= 1 - 1e-9
    assert np.mean(excess) < 1.01


def test_a_joint_cost_counts_only_what_is_not_met():
    _, states, limits = both(0)
    joint = JointState(states, [2 * states[0].cost, limits[1]])
    assert joint.cost == pytest.approx(1 + states[1].cost / limits[1] - 1)
    assert JointState(states, [2 * state.cost for state in states]).cost == pytest.approx(0.5)


@pytest.mark.parametrize("tread", [1, 2])
def test_near_the_optimum(tread: int):
    excess = []
    for seed in range(15):
        net = toy(seed, tread)
        for ratio in (0.7, 0.4):
            limit = ratio * net.predict(())
            search = Search(net.state(), limit)
            assert search.run()
            assert search.state.predicted() <= limit
            excess.append(search.loss / net.optimum(limit))
    assert np.mean(excess) < 1.005
    assert max(excess) < 1.08


def test_a_cost_without_structure_is_searched_as_well():
    for seed in range(5):
        net = toy(seed)
        limit = 0.5 * net.predict(())
        search = Search(WholeState(Sizes(net.widths, net.tracks, [], 1), net), limit)
        assert search.run()
        assert search.state.predicted() <= limit
        assert search.loss <= 1.2 * net.optimum(limit)


def test_increments_equal_a_fresh_evaluation():
    net = toy(3, tread=2)
    state, random = net.state(), np.random.default_rng(0)
    for _ in range(60):
        track, stop = int(random.integers(GROUPS)), int(random.integers(STOPS))
        predicted = state.after(track, stop)
        state.move(track, stop)
        gone = [unit for line, at in zip(net.tracks, state.stops, strict=True) for unit in line.gone(at)]
        assert state.cost == pytest.approx(net.predict(gone), rel=1e-12)
        assert predicted == pytest.approx(state.cost, rel=1e-12)


def test_treads_longer_than_the_look_ahead_are_crossed():
    net = toy(1, tread=3)
    search = Search(net.state(), 0.5 * net.predict(()), look_ahead=(1,))
    assert search.run()


def test_an_unreachable_limit_ends_at_the_cheapest_point():
    net = toy(2)
    search = Search(net.state(), 1.0)
    assert not search.run()
    end = net.state()
    farthest(end)
    assert search.state.predicted() == end.predicted()


def test_equal_scores_fall_by_number():
    widths = Widths(4)
    dims = [widths.product([np.arange(g * 2, g * 2 + 2)], 2) for g in range(2)]
    tracks = [Track(g, ((g * 2,),), (0.0, 1.0)) for g in range(2)]
    net = Toy(widths, tracks, [Tread(dim, 1) for dim in dims])
    search = Search(net.state(), 3.0)
    assert search.run()
    assert search.state.stops == [1, 0]
