"""What the last units of a layer cost, and the exponent that is chosen for it by trial."""

from __future__ import annotations

import json
import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor, nn

from kfe_fx import prune
from kfe_fx.cost.count import CostModel
from kfe_fx.cost.solver import select_budget
from kfe_fx.cost.steps import LARGEST_SCORE
from kfe_fx.errors import UsageError
from kfe_fx.frontend.capture import capture
from kfe_fx.labels.analysis import Analysis, analyze
from kfe_fx.passes.crowding import EXPONENTS, crowded
from kfe_fx.passes.prune import PruneResult

WIDTHS = (12, 9, 16, 7)


def chain(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    before = 6
    for width in widths:
        layers += [nn.Linear(before, width), nn.ReLU()]
        before = width
    return nn.Sequential(*layers, nn.Linear(before, 3)).eval()


@cache
def analysis() -> Analysis:
    return analyze(capture(chain(*WIDTHS), torch.randn(2, 6)))


UNITS = sum(WIDTHS)
SCORES = arrays(np.float64, UNITS, elements=st.floats(-3, 3) | st.sampled_from([0.0, 1.0, math.inf, -math.inf]))
EXPONENT = st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0])


@given(SCORES, EXPONENT, st.sets(st.integers(0, UNITS - 1)))
def test_a_loop_over_the_layer_as_oracle(scores: np.ndarray, exponent: float, absent: set[int]) -> None:
    found = crowded(analysis(), scores, exponent, absent)
    expected = scores.copy()
    for group in analysis().groups:
        left = [unit for unit in group.units if unit not in absent]
        whole = len(left)
        while left:
            least = min(left, key=lambda unit: (scores[unit], unit))
            if scores[least] > 0:
                expected[least] = scores[least] * (whole / len(left)) ** exponent
            left.remove(least)
    np.testing.assert_allclose(found, expected, rtol=1e-14)


@given(SCORES, EXPONENT)
def test_the_order_within_a_layer_stays(scores: np.ndarray, exponent: float) -> None:
    found = crowded(analysis(), scores, exponent)
    for group in analysis().groups:
        before, after = scores[list(group.units)], found[list(group.units)]
        order = np.argsort(before, kind="stable")
        assert (after[order][1:] >= after[order][:-1]).all()
        assert (np.sign(after) == np.sign(before)).all()


@given(SCORES)
def test_the_plain_sum(scores: np.ndarray) -> None:
    np.testing.assert_array_equal(crowded(analysis(), scores, 0.0), scores)


@given(st.floats(1e-3, 1e3), st.integers(0, 15))
def test_a_layer_of_equal_units_loses_by_its_width(score: float, goes: int) -> None:
    layer = max(analysis().groups, key=lambda group: len(group.units))
    n = len(layer.units)
    stays, whole = n - goes, n * score
    sums = {}
    for exponent in EXPONENTS:
        each = crowded(analysis(), np.full(UNITS, score), exponent)[list(layer.units)]
        sums[exponent] = np.sort(each)[:goes].sum()
    # sums between the integrals that bound them
    assert sums[0.0] == pytest.approx(whole * (1 - stays / n))
    assert whole * math.log((n + 1) / (stays + 1)) - 1e-9 <= sums[1.0] <= whole * math.log(n / stays) + 1e-9
    assert whole * n * (1 / (stays + 1) - 1 / (n + 1)) - 1e-9 <= sums[2.0] <= whole * (n / stays - 1) + 1e-9


def test_large_scores_stay_sums() -> None:
    scores = np.full(UNITS, LARGEST_SCORE)
    assert (crowded(analysis(), scores, 2.0) == LARGEST_SCORE).all()


def test_scores_that_mean_nothing() -> None:
    with pytest.raises(UsageError, match="NaN"):
        crowded(analysis(), np.full(UNITS, math.nan), 1.0)


def test_equal_layers_stay_nearly_equal() -> None:
    widths = (32,) * 6
    net = analyze(capture(chain(*widths), torch.randn(2, 6)))
    model = CostModel(net.program, net)
    left = {}
    for exponent in (0.0, 2.0):
        scores = crowded(net, np.ones(len(net.units)), exponent)
        removed = select_budget(model, scores, model.mac_cost, 0.3, multiple_of=1).removed
        left[exponent] = [len(set(group.units) - removed) for group in net.groups]
    assert max(left[2.0]) <= 1.6 * min(left[2.0])
    assert max(left[0.0]) >= 4 * min(left[0.0])  # every other layer starves


# in a run ------------------------------------------------------------------------------------------------------------


def data(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] > 0.3).long()


def run(**options: Any) -> PruneResult:
    given: dict[str, Any] = {
        "budget": 0.25, "metric": "macs", "data": data(300), "val": data(50, 9), "epochs": 0, "criterion": "magnitude",
    }  # fmt: skip
    return prune(chain(24, 24, 24), data(2)[0], **(given | options))


@pytest.mark.parametrize("budget", [0.15, 0.4])
def test_a_run_takes_what_loses_least(budget: float) -> None:
    # without repair, of which a trial does less than the run
    results = {exponent: run(budget=budget, repair="none", crowding=exponent) for exponent in EXPONENTS}
    repaired = {exponent: result.certificate.loss["repaired_change"] for exponent, result in results.items()}
    assert len({json.dumps(result.plan.to_json(), sort_keys=True) for result in results.values()}) > 1
    found = run(budget=budget, repair="none")
    best = min(EXPONENTS, key=lambda exponent: repaired[exponent])
    assert found.certificate.rounds[0]["crowding"] == best
    assert found.plan == results[best].plan


def test_what_is_told_as_loss_is_the_plain_sum() -> None:
    from kfe_fx.criteria import ScoreContext, score

    net = analyze(capture(chain(24, 24, 24), data(2)[0]))
    scores = score("magnitude", ScoreContext.of(net.program, net, data(300)))
    result = run(crowding=2.0)
    gone = sorted(result.plan.units(net))
    assert result.certificate.rounds[0]["predicted_loss"] == pytest.approx(math.fsum(scores[gone]))


def test_widths_are_not_chosen_by_it() -> None:
    assert run(metric="widths", budget=0.5).certificate.rounds[0].get("crowding") is None
    with pytest.raises(UsageError, match="crowding goes with the other metrics"):
        run(metric="widths", budget=0.5, crowding=1.0)
    with pytest.raises(UsageError, match="crowding is a number of at least 0"):
        run(crowding=-1.0)
