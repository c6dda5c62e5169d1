"""Budgets of several kinds on one run of prune: what is asked, what is reached, and what is told of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfe_fx
from kfe_fx import prune
from kfe_fx.cost.count import CostModel
from kfe_fx.cost.device import Device, write_device
from kfe_fx.cost.probes import fingerprint
from kfe_fx.cost.profile import Profile
from kfe_fx.errors import BadFile, PlanError, UsageError
from kfe_fx.passes import stopwatch
from kfe_fx.passes.pareto import pareto
from kfe_fx.passes.prune import prepare
from kfe_fx.passes.rounds import Rounds
from kfe_fx.passes.trial import Trial
from kfe_fx.plan import read_plan

X = torch.randn(2, 3, 12, 12)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(width, 2 * width, 3, padding=1), nn.Conv2d(2 * width, width, 1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm(self.two(torch.relu(self.one(x)))))


def made(width: int = 16, blocks: int = 3) -> nn.Module:
    torch.manual_seed(0)
    body = [Block(width) for _ in range(blocks)]
    net = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)
    )
    return net.eval()


def cut(budget: Any, **options: Any) -> kfe_fx.PruneResult:
    return prune(made(), X, budget=budget, criterion="magnitude", **options)


def reached(result: kfe_fx.PruneResult) -> dict[str, float]:
    return {limit["metric"]: limit["reached"] for limit in result.certificate.limits}


def test_several_budgets_are_met_together() -> None:
    result = cut({"macs": 0.5, "params": 0.4})
    assert result.certificate.feasible
    assert reached(result)["macs"] <= 0.5
    assert reached(result)["params"] <= 0.4
    assert all(limit["met"] for limit in result.certificate.limits)
    tighter, macs = cut({"macs": 0.5}), result.certificate.after["macs"]
    assert macs <= tighter.certificate.after["macs"]


def test_absolute_budgets() -> None:
    whole = sum(parameter.numel() for parameter in made().parameters())
    result = cut(f"{0.6 * whole / 1e3:.3f}k")
    assert result.certificate.after["parameters"] <= 0.6 * whole
    assert result.certificate.limits[0]["asked"].startswith("params=")
    assert reached(result)["params"] == pytest.approx(result.certificate.after["parameters"] / whole)
    memory = cut("0.01MB")
    assert memory.certificate.after["peak_memory"] <= 10_000
    plenty = cut("1G")
    assert plenty.certificate.reached == 1.0  # it fits already: nothing is touched
    assert not plenty.plan.kept


def test_out_of_reach_names_the_budget_that_binds() -> None:
    result = cut({"macs": 0.5, "params": 1e-4}, depth=False)
    assert not result.certificate.feasible
    assert result.certificate.binding.startswith("params: ")


def test_floors_and_caps_of_layers() -> None:
    small = cut("macs=0.4", floor=("1.one=0.9",), cap=("2.one=4",), depth=False).module().state_dict()
    assert small["1.one.weight"].shape[0] >= 0.9 * 32
    assert small["2.one.weight"].shape[0] <= 4
    with pytest.raises(UsageError, match="drop one of them"):
        cut("macs=0.4", floor=("1.one=20",), cap=("1.one=4",))
    with pytest.raises(UsageError, match="--keep keeps whole"):
        cut("macs=0.4", keep=("1.one",), cap=("1.one=4",))


# depth ---------------------------------------------------------------------------------------------------------------


def useless() -> nn.Module:
    """The middle block adds nearly nothing."""
    net = made()
    with torch.no_grad():
        net[2].norm.weight.mul_(1e-3)
    return net


def test_a_branch_that_says_nothing_goes_as_a_whole(tmp_path: Path) -> None:
    net = useless()
    result = prune(net, X, budget="macs=0.37", criterion="magnitude", data=torch.randn(64, 3, 12, 12), rounds=1)
    assert result.plan.dropped[0] == "2.two"
    small = result.module().state_dict()
    assert not [name for name in small if name.startswith(("2.one", "2.two", "2.norm"))]
    assert small["2.constant"].shape == (16, 1, 1)
    assert result.certificate.feasible
    assert result.certificate.masked_error <= 1e-4
    assert result.certificate.after["macs"] == reached(result)["macs"] * result.certificate.before["macs"]
    files = result.write(tmp_path, "net")
    assert kfe_fx.verify(files[-1])
    # the plan alone builds it again
    plan = read_plan(files[-1])
    assert plan == replace(result.plan, metadata=plan.metadata)
    again = kfe_fx.apply(plan, kfe_fx.capture(net, X))
    assert {name: value.shape for name, value in again.state_dict().items()} == {
        name: value.shape for name, value in small.items()
    }
    with pytest.raises(PlanError, match="drops whole branches"):
        kfe_fx.apply(plan, net, X)


class PreActivation(nn.Module):
    """Nothing is left of this branch when its units are masked: no bias, no norm behind the last layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.one = nn.BatchNorm2d(width), nn.Conv2d(width, 2 * width, 3, padding=1)
        self.two = nn.Conv2d(2 * width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(torch.relu(self.one(torch.relu(self.norm(x)))))


@pytest.mark.parametrize("targets", [False, True])
def test_branches_that_leave_zero_get_their_mean(targets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rounds, "_choose_branches", lambda self, judge: ("2.two",))
    torch.manual_seed(0)
    body = [PreActivation(16) for _ in range(3)]
    net = nn.Sequential(nn.Conv2d(3, 16, 3), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).eval()
    x, y = torch.randn(96, 3, 12, 12), torch.randint(0, 4, (96,))
    options: dict[str, Any] = {"rounds": 2, "batch_size": 16, "cap": ("0=8",)} | ({"epochs": 1} if targets else {})
    result = prune(net, X, budget="macs=0.3", criterion="magnitude", data=(x, y) if targets else x, **options)
    assert result.plan.dropped == ("2.two",)
    constant = result.module().state_dict()["2.constant"]
    assert constant.shape[0] <= 8  # the stream lost channels as well
    assert constant.abs().max() > 0
    assert len(result.certificate.rounds) == 2
    assert result.certificate.masked_error <= 1e-4


def test_globs_of_what_went_hold_no_later_round_back(monkeypatch: pytest.MonkeyPatch) -> None:
    net, data = useless(), (torch.randn(96, 3, 12, 12), torch.randint(0, 4, (96,)))
    options: dict[str, Any] = {"criterion": "magnitude", "data": data, "epochs": 1, "rounds": 2, "batch_size": 16}
    kept = prune(net, X, budget="macs=0.4", keep=("2.norm",), **options)
    assert "2.two" not in kept.plan.dropped
    monkeypatch.setattr(Rounds, "_choose_branches", lambda self, judge: ("2.two",))
    result = prune(net, X, budget="macs=0.4", cap=("2.one=24",), **options)
    assert result.plan.dropped == ("2.two",)


def test_a_limit_that_is_not_met_is_not_feasible() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 3, 3)).eval()
    x = torch.randn(2, 3, 24, 24)
    result = prune(net, x, budget={"latency": 0.9, "macs": 1e-3}, criterion="magnitude", multiple_of=16)
    assert not result.certificate.feasible
    plan = prune(net, x, budget="macs=0.7", criterion="magnitude").plan
    assert not prune(net, x, budget="macs=0.3", plan=plan).certificate.feasible
    capped = prune(net, x, budget={"macs": 1.0}, criterion="magnitude", cap=("0=12",), multiple_of=16)
    assert not capped.certificate.feasible
    assert "--cap" in capped.certificate.binding


def test_a_cap_on_what_cannot_be_cut_in_steps() -> None:
    result = cut("1G", cap=("1.one=40",), multiple_of=64)
    assert not result.plan.kept


def test_out_of_reach_without_branches_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes beside the units of a branch can be more than all that was asked to remain."""
    monkeypatch.setattr(Rounds, "_choose_branches", lambda self, judge: ("2.two", "3.two"))
    data = torch.randn(64, 3, 12, 12)
    result = prune(useless(), X, budget="latency=0.001", criterion="magnitude", data=data)
    assert not result.certificate.feasible
    assert 0 < result.certificate.reached < 1


def test_depth_can_be_switched_off() -> None:
    data = torch.randn(64, 3, 12, 12)
    result = prune(useless(), X, budget="macs=0.65", criterion="magnitude", data=data, depth=False)
    assert not result.plan.dropped
    kept = prune(useless(), X, budget="macs=0.65", criterion="magnitude", data=data, keep=("2.one",))
    assert "2.two" not in kept.plan.dropped


def test_branches_and_units_over_several_rounds() -> None:
    net, (x, y) = useless(), (torch.randn(96, 3, 12, 12), torch.randint(0, 4, (96,)))
    result = prune(net, X, budget="macs=0.3", criterion="taylor", data=(x, y), epochs=1, rounds=3, batch_size=16)
    assert result.certificate.feasible
    assert len(result.certificate.rounds) == 3
    assert result.certificate.masked_error <= 1e-4
    assert sum(entry["removed"] for entry in result.certificate.rounds) > 0


# another device ------------------------------------------------------------------------------------------------------


def device(threads: int = 1, **constants: float) -> Device:
    """A made-up device: not this machine, with some constants of its own."""
    measured = {"nanoseconds": {}, "ratios": {}, "step_probed": True, "seconds": 1.0}
    return Device(
        replace(fingerprint(threads, "fp32"), cpu="made up"), replace(Profile(), **constants), 1, (), measured
    )


def test_two_devices_get_two_plans_that_are_predicted(tmp_path: Path) -> None:
    dear, cheap = device(conv_mac=1.0), device(pointwise_mac=1.0)
    path = tmp_path / "device.json"
    write_device(dear, path)
    first, second = (cut(0.6, target=target, depth=False) for target in (path, cheap))
    assert first.plan.kept != second.plan.kept
    for result in (first, second):
        assert "latency" not in result.certificate.measured
        assert result.certificate.predicted["ratio"] <= 0.6 + 1e-9
        assert result.certificate.reached == result.certificate.predicted["ratio"]
        assert any("predicted, not measured" in note for note in result.certificate.notes)
        assert any("predicted, not measured" in row[0] for row in result.certificate.table())
    milliseconds = first.certificate.predicted["dense_ms"] / 2
    half = cut(f"{milliseconds}ms", target=dear, depth=False)
    assert half.certificate.predicted["pruned_ms"] <= milliseconds * (1 + 1e-6)


class ByParameters:
    """A cost model of a third party: what counts is the number of parameters."""

    name = "by-parameters"

    def __init__(self, model: CostModel, device: Device) -> None:
        self.model = model

    def predict(self, removed: Any) -> float:
        return float(self.model.parameters(removed))

    def terms(self) -> None:
        return None


def test_another_cost_model_gives_another_plan() -> None:
    options: dict[str, Any] = {"target": device(conv_mac=1.0), "depth": False}
    found = cut(0.6, cost_model=ByParameters, **options)
    assert found.plan.kept == cut("params=0.6", depth=False).plan.kept
    assert found.plan.kept != cut(0.6, **options).plan.kept
    assert found.certificate.predicted["predictor"] == {"name": "by-parameters"}
    assert any("by-parameters" in note for note in found.certificate.notes)
    with pytest.raises(UsageError, match="no cost model 'oracle'"):
        cut(0.6, cost_model="oracle")


def test_the_certificate_tells_the_cost_model_and_its_error() -> None:
    certificate = cut(0.7, cost_model=ByParameters, depth=False, multiple_of=1).certificate
    told = certificate.measured["predictor"]
    first = certificate.measured["turns"][0]
    assert told == {"name": "by-parameters", "error": first["predicted"] / first["measured"] - 1}
    assert any(row[0] == "latency predicted by by-parameters, first shot" for row in certificate.table())


def test_finer_steps_than_the_device_likes_are_told() -> None:
    wide = replace(device(), step=16)
    easy, hard = (cut(budget, target=wide, depth=False).certificate for budget in (0.8, 0.3))
    (coarse,), (fine,) = easy.rounds, hard.rounds
    assert coarse["step"] == 16
    assert not any("multiples of" in note for note in easy.notes)
    assert fine["step"] < 16
    assert any(f"multiples of {fine['step']}, not of 16 as this device likes" in note for note in hard.notes)
    asked = cut(0.3, target=wide, depth=False, multiple_of=4).certificate
    assert asked.rounds[0]["step"] == 4
    assert not any("this device likes" in note for note in asked.notes)
    assert cut("macs=0.5").certificate.rounds[0]["step"] == 1


@pytest.mark.parametrize("here", [True, False])
def test_threads_are_those_of_the_profile(here: bool) -> None:
    two, one = device(2), device(1)
    if here:
        two, one = (replace(each, fingerprint=replace(each.fingerprint, cpu=fingerprint().cpu)) for each in (two, one))
    with pytest.raises(UsageError, match=r"--target is of 1 thread, --threads says 4; drop --threads, or calibrate"):
        cut(0.5, target=one, threads=4)
    with pytest.raises(UsageError, match="of 2 threads, --threads says 1"):
        cut(0.5, target=two, threads=1)
    for asked in (None, 2):
        job = prepare(made(), X, budget=0.5, target=two, threads=asked)
        assert job.settings.threads == 2
        assert (job.settings.target is None) == here
    assert prepare(made(), X, budget=0.5).settings.threads == 1


def test_a_damaged_profile_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    path.write_text("{}")
    with pytest.raises(BadFile, match=r"device\.json"):
        cut(0.5, target=path)


def test_a_provider_that_is_not_installed() -> None:
    with pytest.raises(UsageError, match="CPUExecutionProvider"):
        cut(0.5, provider="NoSuchProvider")


def test_what_a_provider_leaves_to_the_cpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = cut(0.8, provider="azure", depth=False).certificate
    latency = certificate.measured["latency"]
    assert latency["provider"] == "AzureExecutionProvider"
    count = latency["kernels_on"]["CPUExecutionProvider"]
    told = f"not all of the network ran on AzureExecutionProvider: of {count} kernels {count} on CPUExecutionProvider"
    assert told in certificate.notes
    assert any(row[0].startswith("latency on AzureExecutionProvider") for row in certificate.table())
    assert "kernels_on" not in cut(0.8, depth=False).certificate.measured["latency"]

    def full(*_: Any, **options: Any) -> None:
        raise BadFile("no space")

    monkeypatch.setattr(stopwatch, "profile", full)
    assert "kernels_on" not in cut(0.8, provider="azure", depth=False).certificate.measured["latency"]


def test_int8_is_selected_in_the_steps_of_int8_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def here(threads: int, precision: str) -> Device:
        asked.append(precision)
        made = device()
        floats = None if precision == "fp32" else made.profile
        profile = replace(made.profile, floats=floats)
        return replace(made, fingerprint=fingerprint(threads, precision), profile=profile, step=8 if floats else 1)

    monkeypatch.setattr("kfe_fx.passes.rounds.this_device", here)
    certificate = cut(0.8, precision="int8", depth=False).certificate
    assert set(asked) == {"int8"}
    assert certificate.measured["device"]["step"] == 8
    assert certificate.measured["device"]["precision"] == "int8"
    assert not any("constants of float32" in note for note in certificate.notes)
    (front,) = pareto(made(), X, budgets=[0.9], criterion="magnitude", precision="int8", depth=False).points
    assert front.certificate.measured["device"]["step"] == 8
    assert set(asked) == {"int8"}


def test_a_target_of_another_precision(tmp_path: Path) -> None:
    floats = device(conv_mac=1.0)
    profile = replace(floats.profile, conv_mac=0.2, floats=floats.profile)
    quantised = replace(floats, fingerprint=replace(floats.fingerprint, precision="int8"), profile=profile)
    for target, precision in ((floats, "int8"), (quantised, "fp32")):
        with pytest.raises(UsageError, match=f"not {precision}; say --precision"):
            cut(0.6, target=target, precision=precision)
    write_device(quantised, tmp_path / "int8.json")
    certificate = cut(0.6, target=tmp_path / "int8.json", precision="int8", depth=False).certificate
    assert certificate.predicted["device"]["precision"] == "int8"
    assert any(row[0].startswith("latency in int8 on made up") for row in certificate.table())
    assert any("quantise it" in note for note in certificate.notes)
    with pytest.raises(UsageError, match="only batch 1"):
        cut(0.6, target=quantised, precision="int8", batch=2)


def test_int8_says_what_was_measured() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 3, 3)).eval()
    x = torch.randn(2, 3, 24, 24)
    result = prune(net, x, budget=0.7, criterion="magnitude", precision="int8", multiple_of=16)
    assert result.certificate.measured["latency"]["precision"] == "int8"
    assert any("int8 copies" in note for note in result.certificate.notes)
    assert any(row[0].startswith("latency in int8, 1 thread") for row in result.certificate.table())
    with pytest.raises(UsageError, match="precision is fp32 or int8"):
        prune(net, x, budget=0.7, precision="int4")


# plans and points ----------------------------------------------------------------------------------------------------


def test_points_of_one_scoring_and_the_one_that_is_built(tmp_path: Path) -> None:
    data = torch.randn(64, 3, 12, 12), torch.randint(0, 4, (64,))
    front = pareto(made(), X, budgets=("macs=0.5", "macs=0.8", "macs=0.3"), criterion="taylor", data=data)
    assert [str(point.budget) for point in front.points] == ["macs=0.8", "macs=0.5", "macs=0.3"]
    macs = [point.certificate.after["macs"] for point in front.points]
    assert macs == sorted(macs, reverse=True)
    assert all(point.certificate.reached <= point.budget.value + 1e-9 for point in front.points)
    assert len(front.rows()) == 3
    front.write(tmp_path / "net.pareto.json")
    front.plot(tmp_path / "net.svg")
    assert (tmp_path / "net.svg").read_text().startswith("<?xml")
    with pytest.raises(BadFile, match="--force"):
        front.write(tmp_path / "net.pareto.json")
    plan = read_plan(tmp_path / "net.pareto.json", "macs=0.5")
    built = prune(made(), X, budget="macs=0.5", plan=plan, data=data, epochs=1, batch_size=16)
    assert built.plan.kept == front.points[1].plan.kept
    assert built.plan.dropped == front.points[1].plan.dropped
    assert built.certificate.after == front.points[1].certificate.after
    with pytest.raises(PlanError, match=r"no point with the budget macs=0\.9; it has macs=0\.8, macs=0\.5, "):
        read_plan(tmp_path / "net.pareto.json", "macs=0.9")


@pytest.mark.parametrize("depth", [False, True])
def test_every_point_is_what_a_run_of_its_own_gives(depth: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The factors and the branches' harm that the first point was chosen with serve the others too."""
    data, val = ((torch.randn(64, 3, 12, 12), torch.randint(0, 4, (64,))) for _ in range(2))
    options = {"criterion": "kron-obs", "data": data, "val": val, "depth": depth}
    asked, harm = [], Trial.harm
    monkeypatch.setattr(
        Trial, "harm", lambda self, program, branch: asked.append(branch) or harm(self, program, branch)
    )
    front = pareto(made(), X, budgets=("macs=0.8", "macs=0.5", "macs=0.3"), **options)
    assert len(asked) == (3 if depth else 0)  # one for each block
    for point in front.points:
        alone = prune(made(), X, budget=str(point.budget), epochs=0, rounds=1, **options).certificate
        assert point.certificate.rounds == alone.rounds
        assert point.certificate.quality == alone.quality


def test_pareto_takes_one_metric() -> None:
    for budgets in ((), ("macs=0.5", "2M")):
        with pytest.raises(UsageError, match="pareto"):
            pareto(made(), X, budgets=budgets)
    with pytest.raises(UsageError, match="no option 'budgit'"):
        pareto(made(), X, budgets=(0.5,), budgit=3)


@pytest.mark.parametrize(
    "text",
    ["", "[1]", "{", json.dumps({"plan": 3}), json.dumps({"points": 3, "plan": {}}), json.dumps({"points": [None, 3]})],
)
def test_files_that_hold_no_plan(text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises((BadFile, PlanError)) as caught:
        read_plan(path, "latency=0.5")
    assert "\n" not in str(caught.value)
    with pytest.raises(BadFile):
        read_plan(tmp_path / "nothing.json")


def test_a_plan_of_another_network() -> None:
    plan = cut("macs=0.5").plan
    with pytest.raises(PlanError):
        prune(made(blocks=2), X, budget="macs=0.5", plan=plan)
    with pytest.raises(PlanError, match="branch"):
        prune(made(), X, budget="macs=0.5", plan=replace(plan, dropped=("9.two",)))
