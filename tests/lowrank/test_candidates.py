"""Candidates against all forms, choices against all choices, and what ``apply`` refuses."""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kfe_fx.cost.profile import Profile
from kfe_fx.curvature import Store, fit
from kfe_fx.errors import InfeasibleBudget, UsageError
from kfe_fx.frontend.capture import capture
from kfe_fx.lowrank.candidates import Candidate, apply, candidates, choose
from kfe_fx.lowrank.finding import find_layers
from kfe_fx.lowrank.kfe import Kfe
from kfe_fx.lowrank.losses import with_fisher_losses
from kfe_fx.lowrank.prices import Prices
from kfe_fx.program import Program
from tests.lowrank.nets import case, store
from tests.lowrank.test_prices import Net

# kernels that start at once: else nothing this small is worth three operations
PROFILE = Profile(block=4, conv_kernel=1.0, kernel=1.0, call=1.0)


@cache
def known() -> tuple[Program, Store]:
    torch.manual_seed(1)
    program = capture(Net().double().eval(), torch.randn(2, 8, 17, 17).double())
    return program, fit(program, torch.randn(12, 8, 17, 17).double(), statistics="ekfac", source="sampled")


@pytest.mark.parametrize("statistics", ["product", "moments"])
def test_candidates_are_the_forms_that_no_other_form_beats(statistics: str) -> None:
    program, held = known()
    prices = Prices.of(program, PROFILE)
    found = candidates(program, held, prices, statistics=statistics)
    assert {"stem", "down"} <= found.keys()
    assert "head" not in found
    for layer in find_layers(program).layers:
        axes = Kfe.of(program, held, layer, statistics)
        columns, rows = layer.columns, layer.rows
        every = list(product([*range(4, columns, 4), columns], [*range(4, rows, 4), rows]))
        if layer.pointwise:
            every = [(c, r) for c, r in every if c == columns or r == rows]
        now = prices.ms(layer, columns, rows)
        points = [
            (axes.loss(c, r), now - prices.ms(layer, c, r))
            for c, r in every
            if layer.weights(c, r) < layer.weights(columns, rows) and prices.ms(layer, c, r) < now
        ]
        best = {p for p in points if not any(q[0] <= p[0] and q[1] >= p[1] and q != p for q in points)}
        if layer.last:
            continue
        assert {(one.loss, one.saved_ms) for one in found.get(layer.name, [])} == best
        for one in found.get(layer.name, []):
            assert one.weights == layer.weights(columns, rows) - layer.weights(one.c, one.r)
            assert one.macs == layer.macs(columns, rows) - layer.macs(one.c, one.r)


def test_losses_that_were_measured_take_the_place_of_importances() -> None:
    program, held = known()
    prices = Prices.of(program, PROFILE)
    x = torch.randn(6, 8, 17, 17, generator=torch.Generator().manual_seed(2)).double()
    found = candidates(program, held, prices, data=x, source="exact", batch_size=4)
    layers = {layer.name: layer for layer in find_layers(program).layers}
    axes = {name: Kfe.of(program, held, layers[name]) for name in found}
    measured = with_fisher_losses(program, x, axes, source="exact", batch_size=3)
    for name, front in found.items():
        for one in front:
            assert one.loss == pytest.approx(measured[name].loss(one.c, one.r), rel=1e-9, abs=1e-15)
        assert any(one.loss > axes[name].loss(one.c, one.r) * 1.01 for one in front)


def test_where_only_the_outputs_could_be_decomposed_nothing_is_measured() -> None:
    program, x = capture(torch.nn.Sequential(torch.nn.Linear(6, 4)).eval(), torch.randn(2, 6)), torch.randn(8, 6)
    held = fit(program, x, statistics="kfac", source="exact", batch_size=4)
    assert candidates(program, held, Prices.of(program, PROFILE), data=x, source="exact", batch_size=4) == {}


def test_a_layer_that_keeps_everything_stays_as_it_is() -> None:
    program, held = known()
    same = apply(program, held, {"stem": (8, 16)})
    assert same.hash() == program.hash()
    assert list(same.state_dict()) == list(program.state_dict())


def test_caps_and_steps_bound_what_is_offered() -> None:
    program, held = known()
    prices = Prices.of(program, PROFILE)
    every = candidates(program, held, prices, cap=0.5, step=2)["down"]
    assert all(one.c >= 8 and one.r >= 8 and one.c % 2 == one.r % 2 == 0 for one in every)
    assert prices.step == 4


def drawn(seed: int) -> dict[str, list[Candidate]]:
    generator = torch.Generator().manual_seed(seed)
    fronts = {}
    for name in "abc":
        count = int(torch.randint(0, 4, (), generator=generator))
        losses, saved = torch.rand(2, count, generator=generator, dtype=torch.float64).cumsum(1)
        fronts[name] = [Candidate(name, i, i, float(losses[i]), float(saved[i]), 1, 1) for i in range(count)]
    return fronts


@given(seed=st.integers(0, 10_000), share=st.sampled_from([0.1, 0.5, 0.95]))
@settings(max_examples=40)
def test_the_choice_is_the_best_of_all_choices(seed: int, share: float) -> None:
    fronts = drawn(seed)
    most = sum(front[-1].saved_ms for front in fronts.values() if front)
    if not most:
        return
    needed = share * most
    chosen = choose(fronts, needed, 10.0)
    assert sum(one.saved_ms for one in chosen) >= needed * (1 - 1e-6)
    assert len({one.layer for one in chosen}) == len(chosen)
    options = product(*([None, *front] for front in fronts.values()))
    every = [[one for one in option if one is not None] for option in options]
    enough = [sum(one.loss for one in option) for option in every if sum(one.saved_ms for one in option) >= needed]
    assert sum(one.loss for one in chosen) == pytest.approx(min(enough), rel=1e-6, abs=1e-9)


def test_what_no_choice_saves_is_infeasible_and_says_how_far_they_reach() -> None:
    fronts = {"a": [Candidate("a", 1, 1, 0.5, 2.0, 1, 1)]}
    with pytest.raises(InfeasibleBudget, match=r"reach time=0\.800 as predicted, not 0\.700"):
        choose(fronts, 3.0, 10.0)
    assert choose(fronts, 0.0, 10.0) == []


def test_apply_refuses_what_there_is_not() -> None:
    made = case("conv2d")
    held = store("conv2d")
    with pytest.raises(UsageError, match="no layer 'stem' to decompose; its layers are: layer, head"):
        apply(made.program, held, {"stem": (1, 1)})
    with pytest.raises(UsageError, match="layer has 3 columns and 4 rows: 4 and 4 cannot stay"):
        apply(made.program, held, {"layer": (4, 4)})
    other = case("conv1d").program
    with pytest.raises(UsageError, match="of another network"):
        apply(other, held, {"layer": (1, 1)})
    trained = made.program.copy()
    with torch.no_grad():
        trained.tensor("layer.weight").mul_(1.5)
    with pytest.raises(UsageError, match="older than the weights"):
        apply(trained, held, {"layer": (1, 1)})
    with pytest.raises(UsageError, match="older than the weights"):
        candidates(trained, held, Prices.of(trained, PROFILE))
