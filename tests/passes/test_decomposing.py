"""Decompositions as a part of pruning: chosen by the loss at the budget, told, and built again from a plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfe_fx
from kfe_fx.errors import PlanError, UsageError
from kfe_fx.frontend.capture import capture
from kfe_fx.lowrank import Candidate, find_layers
from kfe_fx.passes.decomposing import Decomposer
from kfe_fx.passes.prune import PruneResult, prune
from kfe_fx.plan import Plan
from kfe_fx.program import Program

WIDTH, RANK = 48, 3
KEPT = ("stem.*", "mid.*")


class Net(nn.Module):
    """A layer of few directions between channels that all have to stay."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.mid = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.mid(F.relu(self.stem(x)))).mean((2, 3)))


def made() -> Program:
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        out, inner = torch.randn(WIDTH, RANK), torch.randn(RANK, WIDTH)
        core = torch.randn(RANK, RANK, 3, 3)
        net.mid.weight.copy_(torch.einsum("or,rcxy,ci->oixy", out, core, inner) / 60)
    return capture(net, torch.randn(2, 1, 12, 12))


X = torch.randn(128, 1, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def result() -> tuple[Program, PruneResult]:
    program = made()
    return program, run(program, budget=0.4, decompose=True, keep=KEPT)


def run(program: Program, **options: Any) -> PruneResult:
    given: dict[str, Any] = {"metric": "macs", "multiple_of": 1, "data": X, "epochs": 0, "depth": False}
    return prune(program, **(given | options))


def test_ranks_are_taken_where_channels_cannot_go(result: tuple[Program, PruneResult]):
    program, found = result
    assert found.plan.decomposed["mid"][0] <= WIDTH // 2
    assert found.certificate.feasible
    assert found.certificate.after["macs"] <= 0.4 * found.certificate.before["macs"]
    assert any(note.startswith("decomposed: mid (ranks ") for note in found.certificate.notes)
    assert {"mid.0.weight", "mid.1.weight", "mid.2.weight"} <= set(found.program.state_dict())
    assert not run(program, budget=0.4, keep=KEPT).certificate.feasible
    error = F.mse_loss(found.program(X), program(X)) / program(X).var()
    assert error < 0.2


def test_a_plan_with_ranks_builds_the_same_network_again(result: tuple[Program, PruneResult]):
    program, found = result
    plan = Plan.from_json(found.plan.to_json())
    again = run(program, budget=0.4, plan=plan, keep=KEPT)
    assert again.plan.kept == found.plan.kept
    assert again.plan.decomposed == found.plan.decomposed
    torch.testing.assert_close(again.program(X), found.program(X), rtol=1e-4, atol=1e-5)


def test_a_plan_with_ranks_is_none_for_a_module(result: tuple[Program, PruneResult]):
    _, found = result
    with pytest.raises(PlanError, match="decomposes layers"):
        kfe_fx.apply(found.plan, Net(), torch.randn(2, 1, 12, 12))


def test_channels_go_where_ranks_are_no_better():
    torch.manual_seed(0)
    program = capture(nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3)).eval(), torch.randn(2, 6))
    x = torch.randn(100, 6)
    found = prune(program, budget=0.7, metric="macs", data=(x, program(x).argmax(1)), epochs=0, decompose=True)
    assert not found.plan.decomposed
    assert "no decomposition is better than channels" in found.certificate.notes
    assert found.certificate.feasible


def test_prices_decide_what_is_proposed():
    front = [Candidate("a", 8, 8, 0.1, 1.0, 10, 10), Candidate("a", 4, 4, 0.5, 1.5, 20, 20)]
    proposals = Decomposer(made(), None, {"a": front}).proposals  # type: ignore[arg-type]
    assert proposals(2.0) == [{"a": (4, 4)}, {"a": (8, 8)}]  # at 1 and 0.3 of it; 0.1 is worth as much again
    assert proposals(0.05) == []


def test_bases_need_examples():
    with pytest.raises(UsageError, match="decomposed in bases that are measured on examples"):
        prune(made(), budget=0.5, metric="macs", decompose=True)


@pytest.mark.parametrize("ranks", [{"mid": [0, 3]}, {"mid": [3]}, {"mid": "many"}, ["mid"]])
def test_ranks_that_mean_nothing(ranks: Any):
    with pytest.raises(PlanError, match="not a plan"):
        Plan.from_json({**Plan().to_json(), "decomposed": ranks})


def test_a_decomposed_network_is_taught_by_activations_that_its_teacher_has_too():
    plan = Plan(decomposed={"mid": (8, 8)})
    options = {"budget": 0.9, "plan": plan, "data": (X, X.mean((1, 2, 3)).gt(0).long()), "epochs": 1, "distil": 0.5}
    found = run(made(), features=("*",), **options)
    taught = found.certificate.rounds[0]["finetune"]["distillation"]["features"]
    assert set(taught) == {"conv2d", "relu", "mid", "relu_1", "mean", "linear"}  # "mid" is the last of its three
    with pytest.raises(UsageError, match="no activation is called 'tail'"):
        run(made(), features=("tail",), **options)


def test_the_loss_before_is_that_of_the_network_before_it_was_decomposed():
    program = made()
    labels = program(X).argmax(1)
    found = run(
        program,
        budget=0.9,
        plan=Plan(decomposed={"mid": (1, 1)}),
        data=(X, labels),
        val=(X[:4], labels[:4]),
        repair="none",
    )
    told = found.certificate.rounds[0]["loss"]
    assert told["before"] == pytest.approx(float(F.cross_entropy(program(X), labels).detach()), rel=1e-5)
    assert told["removed"] > told["before"] + 1e-3
    assert found.certificate.loss["realised_change"] == pytest.approx(told["removed"] - told["before"])
    assert found.certificate.loss["predicted_change"] is None


def test_channels_go_where_no_layer_can_be_decomposed():
    """Weights that are computed belong to no layer, and the one that makes the outputs stays whole."""
    torch.manual_seed(0)
    inner = nn.utils.parametrizations.weight_norm(nn.Linear(6, 16))
    program = capture(nn.Sequential(inner, nn.ReLU(), nn.Linear(16, 3)).eval(), torch.randn(2, 6))
    data = torch.randn(64, 6), torch.randint(3, (64,))
    assert [layer.last for layer in find_layers(program).layers] == [True]
    plain, found = (run(program, budget=0.6, data=data, decompose=decompose) for decompose in (False, True))
    assert found.plan.kept == plain.plan.kept
    assert not found.plan.decomposed
    assert [note for note in found.certificate.notes if note.startswith("nothing is decomposed: ")]


def test_channels_go_where_there_is_no_layer_at_all():
    torch.manual_seed(0)
    net = nn.Sequential(nn.ConvTranspose1d(3, 16, 3), nn.ReLU(), nn.ConvTranspose1d(16, 3, 3), nn.Flatten())
    program, data = capture(net.eval(), torch.randn(2, 3, 6)), (torch.randn(64, 3, 6), torch.randint(30, (64,)))
    assert not find_layers(program).layers
    found = run(program, budget=0.6, data=data, decompose=True)
    assert found.plan.kept
    assert [note for note in found.certificate.notes if note.startswith("nothing is decomposed: ")]
