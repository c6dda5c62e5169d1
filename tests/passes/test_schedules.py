"""Schedules of one loop, floors that end it, and what is told of the loss on the way."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfe_fx
from kfe_fx.cost.solver import Selection
from kfe_fx.criteria import Criterion, ScoreContext, score
from kfe_fx.criteria.step_size import squared_norms
from kfe_fx.errors import UsageError
from kfe_fx.frontend.capture import capture
from kfe_fx.labels.analysis import Analysis, analyze
from kfe_fx.passes import rounds as passes_rounds
from kfe_fx.passes.floors import Floor
from kfe_fx.passes.prune import PruneResult, prepare, prune
from kfe_fx.passes.rounds import Rounds
from kfe_fx.passes.schedules import netadapt, round_ratios
from kfe_fx.passes.theis import DECAY, Signals
from kfe_fx.program import Program
from tests.stopwatch import timed


class Net(nn.Module):
    """Classes of the sign of two inputs; most hidden units have no say."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mid, self.head = nn.Linear(4, 12), nn.Linear(12, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.mid(F.relu(self.up(x)))))


def data(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0.3).long()


@pytest.fixture(scope="module")
def trained() -> Program:
    torch.manual_seed(0)
    program = capture(Net().eval(), data(2)[0])
    kfe_fx.train(program, data(600), val=False, optimizer="adamw", lr=1e-2, epochs=6, threads=1)
    return program


def run(program: Program, **options: Any) -> PruneResult:
    given: dict[str, Any] = {"budget": 0.5, "metric": "macs", "data": data(400), "val": data(400, 9), "epochs": 2}
    return prune(program, **(given | options))


def accuracy(program: Any, seed: int = 5) -> float:
    x, y = data(500, seed)
    return float((program(x).argmax(1) == y).float().mean())


def cross_entropy(program: Program, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(program(x), y))


@pytest.mark.parametrize(
    ("schedule", "rounds", "expected"),
    [
        ("exponential", 2, [0.5, 0.25]),
        ("equal", 3, [0.75, 0.5, 0.25]),
        ("one-shot", None, [0.25]),
        ("exponential", None, [0.25 ** (k / 4) for k in (1, 2, 3)] + [0.25]),
        ("netadapt", None, [0.25 ** (k / 10) for k in range(1, 10)] + [0.25]),
    ],
)
def test_what_remains_after_each_round(trained: Program, schedule: str, rounds: int | None, expected: list[float]):
    job = prepare(trained, budget=0.25, metric="macs", schedule=schedule, rounds=rounds)
    found = round_ratios(job.settings, {"macs": 0.25}, trains=True)
    assert [entry["macs"] for entry in found] == pytest.approx(expected, abs=1e-15)
    assert found[-1] == {"macs": 0.25}


@pytest.mark.parametrize("schedule", ["exponential", "equal", "one-shot", "netadapt", "theis"])
def test_every_schedule_meets_the_budget_and_keeps_what_matters(trained: Program, schedule: str):
    rounds = {"one-shot": None, "netadapt": 3}.get(schedule, 2)
    result = run(trained, schedule=schedule, rounds=rounds, epochs=4)
    certificate = result.certificate
    assert certificate.feasible
    assert certificate.after["macs"] <= 0.5 * certificate.before["macs"]
    assert len(certificate.rounds) == (rounds or 1)
    assert certificate.masked_error < 1e-5
    assert accuracy(result.program) > accuracy(trained) - 0.05


def groups_by_round(program: Program, monkeypatch: pytest.MonkeyPatch, schedule: str) -> list[set[str]]:
    """The names of the groups that lost units in each of four rounds; the last plan holds them all."""
    went: list[frozenset[int]] = []
    surgery = passes_rounds.Rounds._surgery

    def watched(self: Any, selection: Any, *rest: Any) -> None:
        went.append(selection.removed - self.state.removed)
        surgery(self, selection, *rest)

    monkeypatch.setattr(passes_rounds.Rounds, "_surgery", watched)
    result = run(program, schedule=schedule, rounds=4, epochs=0, budget=0.6)
    analysis = analyze(program)
    assert result.certificate.feasible
    assert [len(units) for units in went] == [entry["removed"] for entry in result.certificate.rounds]
    assert frozenset().union(*went) == result.plan.units(analysis)
    return [{analysis.groups[analysis.units[unit].group].name for unit in units} for units in went]


def test_netadapt_takes_one_group_a_round(trained: Program, monkeypatch: pytest.MonkeyPatch):
    assert [len(names) for names in groups_by_round(trained, monkeypatch, "netadapt")] == [1] * 4


def test_other_schedules_take_from_all_groups_at_once(trained: Program, monkeypatch: pytest.MonkeyPatch):
    """The networks and the budget of the test above, where one group a round is no matter of course."""
    assert max(len(names) for names in groups_by_round(trained, monkeypatch, "exponential")) == 2


def test_netadapt_takes_the_group_that_leaves_the_least_loss(trained: Program):
    analysis = analyze(trained)
    first, second = (group.units for group in analysis.groups)

    def proposal(scores: np.ndarray) -> Selection:
        return Selection(frozenset([int(scores.argmin())]), 0.5, True)

    scores = np.arange(1.0, len(analysis.units) + 1)
    for better in (first, second):
        found = netadapt(analysis, scores, proposal, lambda s, b=better: float(not s.removed <= set(b)), frozenset())
        assert found.removed == {better[0]}


class Once(Criterion):
    """Scores that say of each group that its first units go."""

    name: ClassVar[str] = "in order"
    predicts: ClassVar[bool] = True

    def score(self, context: ScoreContext) -> np.ndarray:
        return np.arange(1.0, len(context.analysis.units) + 1)


# signals of training ------------------------------------------------------------------------------------------------


def gate_gradients(program: Program, analysis: Analysis, x: Tensor, y: Tensor, gone: frozenset[int]) -> np.ndarray:
    """Differentiate each example's loss by hand-set gates on the two hidden layers, [N, units]."""
    net = program.state_dict()
    ups = [group.units for group in analysis.groups]
    rows = []
    for one, label in zip(x, y, strict=True):
        gates = [
            torch.tensor([float(u not in gone) for u in units], dtype=x.dtype, requires_grad=True) for units in ups
        ]
        h = F.relu(F.linear(one, net["up.weight"], net["up.bias"]) * gates[0])
        h = F.relu(F.linear(h, net["mid.weight"], net["mid.bias"]) * gates[1])
        loss = F.cross_entropy(F.linear(h, net["head.weight"], net["head.bias"])[None], label[None])
        row = np.zeros(len(analysis.units))
        for units, grad in zip(ups, torch.autograd.grad(loss, gates), strict=True):
            row[list(units)] = grad.numpy()
        rows.append(row)
    return np.stack(rows)


def test_signals_are_the_running_fisher_scores_of_the_gates():
    torch.manual_seed(0)
    program = capture(Net().double().eval(), data(2)[0].double())
    analysis = analyze(program)
    assert [group.name for group in analysis.groups] == ["up", "mid"]
    asked: list[float] = []
    gone = frozenset(analysis.groups[0].units[:2])

    def choose(scores: np.ndarray, share: float) -> frozenset[int]:
        asked.append(share)
        return gone

    signals = Signals(program, analysis, choose, total=4, every=2)
    view = signals.view()
    view.train()
    expected = np.zeros(len(analysis.units))
    for step in range(4):
        x, y = data(7, step)
        x = x.double()
        masked = gone if step >= 2 else frozenset()
        g = gate_gradients(program, analysis, x, y, masked)
        expected = DECAY * expected + (1 - DECAY) * (g**2).mean(0) / 2
        F.cross_entropy(view(x), y).backward()
        signals.add_gradients()
        np.testing.assert_allclose(signals.scores, expected, rtol=1e-12, atol=1e-15)
    assert asked == [0.5, 1.0]
    assert signals.masked == gone
    np.testing.assert_allclose(signals.estimates(), expected / (1 - DECAY**4), rtol=1e-12)
    assert not signals.scores_with_masked_first()[list(gone)].any()
    # the gradients of the weights are there too, and those of masked units are none
    grad = program.module().get_parameter("up.weight").grad
    assert grad is not None
    assert grad.abs().sum() > 0


def test_signals_of_a_network_of_fixed_batches_are_those_of_the_batch():
    """One gate for all examples: the square of the sum stands for that of N independent ones."""
    torch.manual_seed(0)
    x, y = data(7)
    program = capture(Net().double().eval(), x.double(), {})
    signals = Signals(program, analyze(program), lambda scores, share: frozenset(), total=1)
    view = signals.view()
    view.train()
    F.cross_entropy(view(x.double()), y).backward()
    signals.add_gradients()
    g = gate_gradients(program, signals.analysis, x.double(), y, frozenset())
    np.testing.assert_allclose(signals.estimates(), g.sum(0) ** 2 / 14, rtol=1e-12)


def test_theis_needs_training(trained: Program):
    with pytest.raises(UsageError, match="while it trains"):
        run(trained, schedule="theis", epochs=0)


# floors --------------------------------------------------------------------------------------------------------------


def test_a_floor_of_accuracy_ends_the_rounds_before_it_is_crossed(trained: Program):
    floor = accuracy(trained, 9) - 0.03
    result = run(trained, budget=0.12, epochs=0, repair="none", stop_at_accuracy=floor)
    certificate = result.certificate
    assert not certificate.feasible
    assert certificate.binding.startswith("stop-at-accuracy: the next round, to ")
    assert certificate.quality["right_after"] >= floor
    assert accuracy(result.program, 9) >= floor
    assert 0 < len(certificate.rounds) < 8
    assert certificate.after["macs"] < certificate.before["macs"]


def test_a_floor_of_loss_that_is_never_reached_changes_nothing(trained: Program):
    plain = run(trained, epochs=0, rounds=3)
    floored = run(trained, epochs=0, rounds=3, stop_at_loss=1e6)
    assert floored.plan.kept == plain.plan.kept
    assert floored.certificate.feasible
    assert "loss" in floored.certificate.rounds[0]["held_out"]


def test_a_floor_of_loss_that_no_round_keeps_leaves_the_network(trained: Program):
    result = run(trained, budget=0.05, epochs=0, rounds=1, stop_at_loss=1e-9)
    assert not result.certificate.feasible
    assert result.certificate.after == result.certificate.before
    assert not result.plan.kept


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_loss_of_ones_own_is_told_and_floored_per_example(trained: Program, reduction: str):
    def mine(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction=reduction)

    named, own = (run(trained, budget=0.3, epochs=0, rounds=1, repair="none", loss=loss) for loss in (None, mine))
    told, expected = own.certificate.rounds[0]["loss"], named.certificate.rounds[0]["loss"]
    assert (told["before"], told["removed"]) == pytest.approx((expected["before"], expected["removed"]))
    floor = cross_entropy(trained, *data(400, 9)) / 2
    floored = run(trained, budget=0.3, epochs=0, rounds=1, repair="none", loss=mine, stop_at_loss=floor)
    assert floored.certificate.binding.startswith("stop-at-loss")


@pytest.mark.parametrize("options", [{"schedule": "theis"}, {"keep": ("*",)}])
def test_a_round_that_is_taken_back_has_trained_nothing(trained: Program, options: dict[str, Any]):
    """Under theis a round trains before it cuts, and one that finds nothing to cut trains what it began with."""
    result = run(trained, budget=0.05, rounds=1, stop_at_loss=1e-9, **options)
    assert not result.certificate.rounds
    whole = trained.state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in result.program.state_dict().items())


def test_a_round_that_is_taken_back_leaves_no_figures(trained: Program, monkeypatch: pytest.MonkeyPatch):
    values, floors = iter((0.9, 0.8, 0.1, 0.85)), iter(("", "stop-at-loss"))
    monkeypatch.setattr(Rounds, "_evaluate", lambda self, judge, program: next(values))
    monkeypatch.setattr(Floor, "crossed", lambda self, small, entry: next(floors))
    timed(monkeypatch, loop=0.5, anew=0.5)
    certificate = run(trained, metric="latency", rounds=2, stop_at_loss=1.0, multiple_of=1).certificate
    told = {"before": 0.9, "right_after": 0.8, "after": 0.85}  # not the 0.1 of the second round
    assert certificate.quality == {"metric": "accuracy", **told}
    assert not {"turns", "predictor"} & set(certificate.measured)  # the second round measured them
    assert len(certificate.rounds) == len(certificate.measured["training_threads"]) == 1


def test_the_dense_network_has_no_figures_of_training(trained: Program):
    certificate = run(trained, budget=0.05, rounds=1, stop_at_loss=1e-9).certificate
    assert certificate.rounds == []
    assert certificate.quality["right_after"] == certificate.quality["before"]
    assert "after" not in certificate.quality
    assert "training_threads" not in certificate.measured


def test_floors_need_held_out_examples(trained: Program):
    with pytest.raises(UsageError, match="stop-at-loss is measured on held-out examples"):
        prune(trained, budget=0.5, metric="macs", stop_at_loss=1.0)
    with pytest.raises(UsageError, match="stop-at-accuracy is measured on held-out examples"):
        prune(trained, budget=0.5, metric="macs", stop_at_accuracy=0.5)


# what is told --------------------------------------------------------------------------------------------------------


def test_losses_around_a_surgery_are_told(trained: Program):
    result = run(trained, epochs=0, rounds=2, criterion=Once)
    x, y = data(400)
    entries = [entry["loss"] for entry in result.certificate.rounds]
    assert entries[0]["of"] == "cross-entropy"
    assert entries[0]["before"] == pytest.approx(cross_entropy(trained, x, y), rel=1e-5)
    assert entries[1]["before"] == entries[0]["repaired"]
    assert entries[-1]["repaired"] == pytest.approx(cross_entropy(result.program, x, y), rel=1e-5)
    assert all(entry["repaired"] <= entry["removed"] for entry in entries)
    told = result.certificate.loss
    assert told["realised_change"] == pytest.approx(sum(e["removed"] - e["before"] for e in entries))
    assert told["predicted_change"] == pytest.approx(sum(e["predicted_change"] for e in entries))
    assert any("unrepaired" in row[0] for row in result.certificate.table())
    assert result.certificate.capacity["before"] > 0


def test_a_criterion_that_predicts_no_loss_promises_none(trained: Program):
    certificate = run(trained, epochs=0, criterion="magnitude").certificate
    assert certificate.loss["predicted_change"] is None


@pytest.mark.parametrize("criterion", ["fisher", "qm"])
def test_the_penalty_is_no_part_of_what_is_promised(trained: Program, criterion: str):
    result = run(trained, epochs=0, rounds=1, criterion=criterion, penalty=10.0)
    analysis = analyze(trained)
    context = ScoreContext.of(trained, analysis, data(400))
    score(criterion, context)
    assert context.changes is not None
    expected = context.changes[sorted(result.plan.units(analysis))].sum()
    assert result.certificate.loss["predicted_change"] == pytest.approx(expected, rel=1e-5)
    assert result.certificate.rounds[0]["predicted_loss"] > 10 * abs(expected)  # what was ranked by


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> list[Signals]:
    """The signals of each round."""
    seen: list[Signals] = []

    class Kept(Signals):
        def __post_init__(self) -> None:
            super().__post_init__()
            seen.append(self)

    monkeypatch.setattr(passes_rounds, "Signals", Kept)
    return seen


@pytest.mark.parametrize("options", [{}, {"criterion": "magnitude"}])
def test_theis_promises_what_its_signals_said(trained: Program, signals: list[Signals], options: dict[str, Any]):
    result = run(trained, schedule="theis", rounds=1, epochs=4, **options)
    removed = sorted(result.plan.units(analyze(trained)))
    assert signals[0].masked <= set(removed)
    promised = result.certificate.loss["predicted_change"]
    assert promised > 0
    assert promised == pytest.approx(signals[0].estimates()[removed].sum())
    assert any("running fisher scores" in note for note in result.certificate.notes) == bool(options)


@pytest.mark.parametrize("features", [(), ("mid",)])
def test_signals_come_beside_a_teacher_who_is_no_part_of_the_promise(
    trained: Program, signals: list[Signals], features: tuple[str, ...]
):
    result = run(trained, schedule="theis", rounds=1, epochs=4, distil=0.5, features=features)
    assert signals[0].scores.max() > 0
    assert signals[0].masked <= result.plan.units(analyze(trained))
    assert result.certificate.loss["predicted_change"] is None


class Images(nn.Module):
    """Two convolutions and a layer: the cost of one depends on what is left of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.hidden, self.head = nn.Linear(16, 20), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.two(F.relu(self.one(x)))).mean((2, 3))
        return self.head(F.relu(self.hidden(y)))


@pytest.mark.parametrize("rounds", [1, 2])
def test_what_was_masked_in_training_is_removed(signals: list[Signals], rounds: int):
    """Signals go on after a unit is masked, and what others cost falls: the cut is of these units all the same."""
    torch.manual_seed(0)
    program = capture(Images().eval(), torch.randn(2, 1, 6, 6))
    x = torch.randn(300, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    y = (x.mean((1, 2, 3)) > 0).long() + (x[:, 0, 0, 0] > 0).long()
    result = prune(
        program, budget=0.5, metric="macs", data=(x, y), schedule="theis", rounds=rounds, epochs=10 * rounds,
        batch_size=32,
    )  # fmt: skip
    assert len(signals) == rounds
    assert signals[0].masked
    assert signals[0].masked <= result.plan.units(analyze(program))


class Residual(nn.Module):
    """Four residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 16), nn.Linear(16, 3)
        self.up = nn.ModuleList([nn.Linear(16, 40) for _ in range(4)])
        self.down = nn.ModuleList([nn.Linear(40, 16) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(F.relu(up(x)))
        return self.head(x)


def test_branches_that_go_are_masked_from_the_start(signals: list[Signals]):
    """What is masked beside them is what the budget asks for without them, and no more."""
    torch.manual_seed(0)
    program = capture(Residual().eval(), data(2)[0])
    kfe_fx.train(program, data(600), val=False, optimizer="adamw", lr=3e-3, epochs=3, threads=1)
    with torch.no_grad():
        for name in ("down.1.weight", "down.1.bias"):
            program.tensor(name).mul_(1e-3)  # a branch that nobody misses
    result = run(program, budget=0.6, schedule="theis", rounds=1, epochs=4, batch_size=32)
    certificate = result.certificate
    assert result.plan.dropped
    assert signals[0].masked
    assert 0.55 < certificate.after["macs"] / certificate.before["macs"] <= 0.6


def test_a_fixed_batch_may_be_larger_than_the_batch_size():
    torch.manual_seed(0)
    program = capture(Net().eval(), data(100)[0], {})
    result = run(program, schedule="theis", rounds=1, epochs=2, batch_size=64)
    assert result.certificate.feasible


def test_the_penalty_counts_in_signals_too(trained: Program):
    """With a huge lambda the smallest units go, whatever their signals."""
    small = capture(Net().eval(), data(2)[0])
    small.module().load_state_dict(trained.state_dict())
    with torch.no_grad():
        for name in ("up.weight", "up.bias"):
            small.tensor(name)[:6] *= 0.1
        small.tensor("mid.weight")[:, :6] *= 10.0  # the same function
    torch.testing.assert_close(small(data(9)[0]), trained(data(9)[0]))
    plans = [run(small, schedule="theis", rounds=1, penalty=each, lr=1e-4).plan for each in (0.0, 1e9)]
    held = squared_norms(analyze(small))
    lost = [sum(held[sorted(plan.units(analyze(small)))]) for plan in plans]
    assert lost[1] < lost[0]


def test_theis_takes_no_signals_of_a_teacher_alone(trained: Program):
    with pytest.raises(UsageError, match="give distil below 1"):
        run(trained, schedule="theis", rounds=1, distil=1.0)


def test_theis_takes_no_signals_of_a_loss_that_mixes_examples(trained: Program):
    def mixed(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - outputs.mean(0)).square().mean() + 0 * targets.sum()

    with pytest.raises(UsageError, match="mixes the examples"):
        run(trained, schedule="theis", rounds=1, loss=mixed, criterion="magnitude")


def test_the_promises_of_a_shrunk_network_count_its_own_units(trained: Program):
    """In later rounds they are lifted to the units of the original, as scores are; of fisher both are the same."""
    entries = run(trained, epochs=0, rounds=3, criterion="fisher").certificate.rounds
    assert [entry["loss"]["predicted_change"] for entry in entries] == pytest.approx(
        [entry["predicted_loss"] for entry in entries]
    )


class Unknown(Once):
    """Promises something of all units but one."""

    def score(self, context: ScoreContext) -> np.ndarray:
        scores = super().score(context)
        context.changes = np.where(np.arange(len(scores)) == 0, np.nan, scores)
        return scores


def test_nothing_is_promised_where_a_unit_goes_that_no_model_knows(trained: Program):
    assert run(trained, epochs=0, rounds=1, criterion=Unknown).certificate.loss["predicted_change"] is None
    assert run(trained, epochs=0, rounds=1, criterion=Once).certificate.loss["predicted_change"] > 0


def test_no_loss_is_promised_where_a_distance_is_measured(trained: Program):
    certificate = run(trained, epochs=0, rounds=1, data=data(400)[0], val=None).certificate
    assert certificate.loss["of"] == "distance"
    assert certificate.loss["predicted_change"] is None


def test_the_step_size_constraint_makes_small_units_go(trained: Program):
    """With a huge lambda the ranking is that of the squared weights alone."""
    analysis = analyze(trained)
    plain, held = (run(trained, epochs=0, criterion=Once, penalty=each).plan for each in (0.0, 1e9))
    assert plain.kept != held.kept
    squares = np.zeros(len(analysis.units))
    for unit in analysis.units:
        for name, dims in unit.slices.items():
            for dim, indices in dims.items():
                value = trained.tensor(name).detach().double().index_select(dim, torch.tensor(indices))
                squares[unit.id] += float(value.square().sum())
    for group in analysis.groups:
        gone = [unit for unit in held.units(analysis) if unit in group.units]
        lowest = sorted(group.units, key=lambda unit: squares[unit])[: len(gone)]
        assert set(gone) == set(lowest)


def test_the_update_of_captured_factors_is_among_what_repair_chooses_from(trained: Program):
    """A few examples that a fit has little of: what curvature was captured on is more."""
    result = run(trained, epochs=0, rounds=1, criterion="kron-obs", data=data(24), batch_size=4)
    assert result.certificate.rounds[0]["repaired"]["obs"] > 0
    assert result.certificate.data["curvature"].startswith("exact")


# what fine-tuning learns from ----------------------------------------------------------------------------------------


def test_the_dense_network_teaches_without_targets(trained: Program):
    x = data(400)[0]
    plain = prune(trained, budget=0.3, metric="macs", data=x, repair="none")
    taught = prune(trained, budget=0.3, metric="macs", data=x, repair="none", distil=1.0, epochs=8, lr=1e-2)
    assert "finetune" not in plain.certificate.rounds[0]
    assert taught.certificate.rounds[-1]["finetune"]["distillation"]["weight"] == 1.0
    y = trained(x)
    assert F.mse_loss(taught.program(x), y) < 0.3 * F.mse_loss(plain.program(x), y)


def test_elastic_penalty_holds_the_weights(trained: Program):
    ends = []
    for strength in (None, 30.0):
        result = run(trained, ewc=strength, rounds=1, epochs=2, lr=1e-2, optimizer="sgd")
        start = run(trained, rounds=1, epochs=0)
        assert start.plan.kept == result.plan.kept
        moved = sum(
            float((value - start.program.state_dict()[name]).square().sum())
            for name, value in result.program.state_dict().items()
        )
        ends.append(moved)
    assert ends[1] < 0.5 * ends[0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"schedule": "often"}, "schedule is exponential, equal"),
        ({"repair": "all"}, "repair is auto, mean or none"),
        ({"penalty": -1.0}, "penalty is a number"),
        ({"distil": 1.5}, "distil is a number from 0 to 1"),
        ({"temperature": 2.0}, "say distil= too"),
        ({"features": ["mid"]}, "say distil= too"),
        ({"schedule": "one-shot", "rounds": 3}, "one-shot has one round"),
        ({"distil": 0.5, "features": ["nothing.*"]}, "no activation is called"),
        ({"ewc": float("nan")}, "ewc is a number"),
        ({"distil": 0.5, "epochs": 0}, "distil: nothing is fine-tuned here"),
        ({"ewc": 1.0, "epochs": 0}, "ewc: nothing is fine-tuned here"),
        ({"stop_at_loss": "low"}, "stop_at_loss is a number"),
    ],
)
def test_options_that_mean_nothing(trained: Program, options: dict[str, Any], says: str):
    with pytest.raises(UsageError, match=says):
        run(trained, **options)


def test_frozen_parameters_are_told_before_the_long_work(trained: Program, monkeypatch: pytest.MonkeyPatch):
    frozen = trained.copy()
    for parameter in frozen.module().parameters():
        parameter.requires_grad_(False)
    assert run(frozen, epochs=0).certificate.reached  # scores need no gradients of parameters
    monkeypatch.setattr(Rounds, "run", lambda self: pytest.fail("the long work began"))
    with pytest.raises(UsageError, match=r"no parameter to train: .*epochs 0"):
        run(frozen, epochs=1)


@pytest.mark.parametrize("schedule", ["exponential", "theis"])
def test_the_elastic_penalty_goes_with_every_schedule(trained: Program, schedule: str):
    result = run(trained, schedule=schedule, rounds=2, ewc=0.1)
    assert all("ewc" in str(entry) for entry in result.certificate.rounds if "training" in str(entry))
    assert accuracy(result.program) > 0.7


def test_class_after_class_is_no_other_sample():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3))
    program = capture(net.eval(), data(2)[0])
    kfe_fx.train(program, data(1500), val=False, optimizer="adamw", lr=1e-2, epochs=6, threads=1)
    x, y = data(1500)
    order = y.argsort(stable=True)  # as a folder of classes is read
    given: dict[str, Any] = {"val": data(400, 9), "epochs": 0, "budget": 0.4}
    for repair in ("mean", "auto"):
        found = [run(program, data=pair, repair=repair, **given) for pair in ((x, y), (x[order], y[order]))]
        fresh, labels = data(500, 5)
        losses = [float(F.cross_entropy(result.program(fresh), labels).detach()) for result in found]
        capacity = [result.certificate.capacity["after"] for result in found]
        assert losses[1] < 1.25 * losses[0] + 0.05
        assert capacity[1] == pytest.approx(capacity[0], rel=0.35)
        assert all(result.certificate.loss["examples"] == 512 for result in found)
