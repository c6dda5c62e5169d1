"""Floors and caps of single layers."""

from __future__ import annotations

import numpy as np
import pytest

from kfe_fx.cost.bounds import Bound, Bounds, read_bound
from kfe_fx.cost.solver import Demand, select_budget
from kfe_fx.errors import UsageError
from tests.cost.nets import Case, residual_case


def scores_of(made: Case, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).exponential(size=len(made.analysis.units))


def kept(made: Case, name: str, removed: frozenset[int]) -> int:
    return made.model.size(name, 0, removed)


@pytest.mark.parametrize("exact", [0, 3000])
def test_floors_and_caps_hold(exact: int):
    made = residual_case()
    bounds = Bounds((Bound("blocks.0.0", 0.9),), (Bound("blocks.1.0", 0.5),))
    free = select_budget(made.model, scores_of(made), made.model.mac_cost, 0.4, multiple_of=8, exact=exact)
    bound = select_budget(
        made.model, scores_of(made), made.model.mac_cost, 0.4, multiple_of=8, bounds=bounds, exact=exact
    )
    whole = kept(made, "blocks.0.0.weight", frozenset())
    assert bound.feasible
    assert bound.predicted <= 0.4
    assert kept(made, "blocks.0.0.weight", bound.removed) >= 0.9 * whole > kept(made, "blocks.0.0.weight", free.removed)
    assert kept(made, "blocks.1.0.weight", bound.removed) <= 0.5 * kept(made, "blocks.1.0.weight", frozenset())
    assert bound.loss >= free.loss


@pytest.mark.parametrize("slower", [False, True])
def test_a_cap_alone_is_met(slower: bool):
    made = residual_case()
    whole, units = kept(made, "blocks.1.0.weight", frozenset()), len(made.analysis.units)

    def slow(gone: frozenset[int]) -> float:
        return 2 - len(gone) / units if gone else 1.0  # slower than dense, the less so the more is gone

    chosen = select_budget(
        made.model,
        scores_of(made),
        slow if slower else made.model.mac_cost,
        1.0,
        multiple_of=1,
        bounds=Bounds((), (Bound("blocks.1.0", 5),)),
    )
    assert chosen.feasible
    assert kept(made, "blocks.1.0.weight", chosen.removed) == 5 < whole
    assert len(chosen.removed) == whole - 5
    assert chosen.loss == pytest.approx(sum(scores_of(made)[list(chosen.removed)]))


def test_a_floor_that_binds_is_named():
    made = residual_case()
    chosen = select_budget(
        made.model,
        scores_of(made),
        made.model.mac_cost,
        0.3,
        multiple_of=1,
        name="macs",
        bounds=Bounds((Bound("*", 0.9),)),
    )
    assert not chosen.feasible
    assert chosen.binding == "macs: what --floor keeps (*)"


def test_several_budgets_are_met_at_once():
    made = residual_case()
    costs = {"macs": made.model.mac_cost, "params": made.model.parameter_cost, "memory": made.model.memory_cost}
    for targets in ({"macs": 0.5, "params": 0.4}, {"macs": 0.6, "params": 0.6, "memory": 0.7}):
        (name, target), *others = targets.items()
        also = [Demand(other, costs[other], ratio) for other, ratio in others]
        chosen = select_budget(made.model, scores_of(made), costs[name], target, name=name, also=also, multiple_of=1)
        assert chosen.feasible
        for metric, ratio in targets.items():
            assert costs[metric].predict(chosen.removed) <= ratio * costs[metric].predict(()) * (1 + 1e-9)


def test_only_the_budget_that_binds_is_named():
    made = residual_case()
    also = [Demand("params", made.model.parameter_cost, 1e-4)]
    chosen = select_budget(made.model, scores_of(made), made.model.mac_cost, 0.5, name="macs", also=also, multiple_of=1)
    assert not chosen.feasible
    assert chosen.binding.startswith("params: ")


@pytest.mark.parametrize(
    ("bounds", "keep", "said"),
    [
        (Bounds((Bound("nothing.*", 3),)), (), "matches no parameter"),
        (Bounds((Bound("blocks.*", 9),), (Bound("blocks.1.*", 4),)), (), "--floor 'blocks.\\*' keeps 9 .* only 4"),
        (Bounds((), (Bound("blocks.1.0", 4),)), ("blocks.*",), "which --keep keeps whole"),
    ],
)
def test_contradictions(bounds: Bounds, keep: tuple[str, ...], said: str):
    made = residual_case()
    with pytest.raises(UsageError, match=said):
        select_budget(made.model, scores_of(made), made.model.mac_cost, 0.5, bounds=bounds, keep=keep)


def test_bounds_as_text():
    assert read_bound("layer1.*=0.5") == Bound("layer1.*", 0.5)
    assert read_bound("head=16") == Bound("head", 16)
    assert Bound("head", 0.26).count(10) == 3
    assert Bound("head", 99).count(10) == 10
    for text in ("head", "=3", "head=0", "head=1.5", "head=-2", "head=x", "head=nan"):
        with pytest.raises(UsageError, match="GLOB"):
            read_bound(text)
