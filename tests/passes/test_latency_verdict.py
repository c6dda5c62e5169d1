"""What becomes of a run whose network is measured too slow: by the loop, or anew at the end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import kfe_fx
from kfe_fx import prune
from kfe_fx.passes.floors import Floor
from kfe_fx.program import Program
from tests.stopwatch import timed

X = torch.randn(2, 3, 8, 8)
DATA = torch.randn(48, 3, 8, 8), torch.arange(48) % 4
TRAINED: dict[str, Any] = {"data": DATA, "rounds": 3, "epochs": 1, "batch_size": 16, "repair": "none"}
RUNS = pytest.mark.parametrize("options", [{"rounds": 1}, TRAINED], ids=["1", "3"])


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    return kfe_fx.capture(net.eval(), X)


def cut(program: Program, budget: Any, **options: Any) -> kfe_fx.PruneResult:
    return prune(program, budget=budget, **{"criterion": "magnitude", "multiple_of": 1, **options})


def limits(result: kfe_fx.PruneResult) -> dict[str, tuple[float, bool]]:
    return {limit["metric"]: (limit["reached"], limit["met"]) for limit in result.certificate.limits}


def is_dense(result: kfe_fx.PruneResult, program: Program) -> bool:
    """Whether nothing went and no weight changed, and the certificate says so."""
    told, small = result.certificate, result.program.state_dict()
    same = all(torch.equal(value, small[name]) for name, value in program.state_dict().items())
    silent = not told.rounds and "after" not in told.quality and "training_threads" not in told.measured
    figures = told.before == told.after and told.quality.get("before") == told.quality.get("right_after")
    return same and silent and figures and not result.plan.kept


@pytest.mark.parametrize(
    ("budget", "options"),
    [(0.7, TRAINED), (0.7, {**TRAINED, "rounds": 1}), (0.99, {}), ({"latency": 0.7, "params": 1.0}, TRAINED)],
)
def test_what_gets_no_faster_stays_dense(
    program: Program, options: dict[str, Any], budget: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(monkeypatch, 1.005, 1.005)  # at 0.99 that is within the loop's tolerance
    result = cut(program, budget, **options)
    assert is_dense(result, program)
    assert not result.certificate.feasible
    assert result.certificate.binding.startswith("nothing that can be removed makes the network faster: the nearest")
    assert limits(result)["latency"] == (1.0, False)


@RUNS
def test_what_is_slower_only_at_last_stays_dense_too(
    program: Program, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(monkeypatch, 0.7, 1.02)
    result = cut(program, 0.7, **options)
    assert is_dense(result, program)
    assert not result.certificate.feasible
    assert "the smaller one takes 1.020 of dense" in result.certificate.binding
    assert limits(result)["latency"] == (1.0, False)
    assert result.certificate.measured["latency"]["pruned_ms"] == 2.0
    assert result.certificate.parity["ok"]


@RUNS
def test_other_budgets_are_met_where_latency_gains_nothing(
    program: Program, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(monkeypatch, 1.3, 1.3)
    result = cut(program, {"latency": 0.3, "params": 0.8}, **options)
    assert not result.certificate.feasible
    assert limits(result)["latency"] == (1.3, False)
    reached, met = limits(result)["params"]
    assert met
    assert reached <= 0.8
    assert result.certificate.binding.startswith("nothing that can be removed makes the network faster")
    if "data" not in options:  # no more went than they ask for
        assert result.plan.kept == cut(program, {"params": 0.8}).plan.kept


def test_a_cap_is_kept_where_latency_gains_nothing(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, 1.3, 1.3)
    result = cut(program, 0.5, cap=("0=10",))
    assert result.program.state_dict()["0.weight"].shape[0] == 10
    assert result.program.state_dict()["3.weight"].shape[0] == 16
    assert not result.certificate.feasible


@pytest.mark.parametrize(
    ("anew", "noise", "met", "options"),
    [(0.62, 0.02, False, {}), (0.62, 0.02, False, TRAINED), (0.62, 0.12, True, {}), (0.524, 0.0, True, {})],
)
def test_the_last_measurement_decides(
    program: Program, anew: float, noise: float, met: bool, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(monkeypatch, 0.5, anew, noise)
    certificate = (result := cut(program, 0.5, **options)).certificate
    assert (certificate.feasible, limits(result)) == (met, {"latency": (anew, met)})
    assert result.plan.kept
    told = "latency is above its limit, now that it is measured anew"
    assert certificate.binding == ("" if met else told)
    assert any(told in note for note in certificate.notes) != met


@pytest.mark.parametrize(("anew", "met"), [(0.54, False), (0.51, True)])
def test_a_loop_that_ends_above_the_budget_says_so(
    program: Program, anew: float, met: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(monkeypatch, 0.54, anew, 0.0)
    result = cut(program, 0.5)
    assert not result.certificate.feasible
    assert "budget is out of reach" in result.certificate.notes[-1]
    assert result.certificate.binding
    assert limits(result) == {"latency": (anew, met)}


def test_a_given_plan_is_carried_out_and_judged(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, 0.5, 1.2)
    plan = cut(program, "macs=0.5").plan
    result = cut(program, 0.5, plan=plan)
    assert result.plan.kept == plan.kept
    assert not result.certificate.feasible
    assert limits(result) == {"latency": (1.2, False)}


def test_a_network_that_a_floor_left_dense_is_as_fast_as_itself(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(monkeypatch, 0.5, 0.97)
    monkeypatch.setattr(Floor, "crossed", lambda *_: "stop-at-loss: no")
    result = cut(program, 0.98, **TRAINED, stop_at_loss=1.0)
    assert is_dense(result, program)
    assert limits(result) == {"latency": (1.0, False)}
    assert result.certificate.binding == "stop-at-loss: no"
