"""Fine-tuning: deterministic, the loss falls, frozen stays frozen, the best state by validation, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfe_fx.data.dataset import ArrayData
from kfe_fx.errors import BadData, UsageError
from kfe_fx.frontend.capture import capture
from kfe_fx.program import Program
from kfe_fx.training import close_optimizer, default_epochs, finetune, make_optimizer
from kfe_fx.training.metrics import ACCURACY, evaluate


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.2)
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(torch.relu(self.norm(self.first(x)))))


@pytest.fixture(scope="module")
def captured() -> Program:
    torch.manual_seed(0)
    return capture(Net(), torch.randn(2, 6))


@pytest.fixture
def program(captured: Program) -> Program:
    return captured.copy()


def examples(count: int = 200, seed: int = 0) -> ArrayData:
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return ArrayData((x,), (x[:, 0] > 0).long() + (x[:, 1] > 0).long())


def test_the_loss_falls_and_the_same_seed_gives_the_same_weights(captured: Program):
    results = []
    for noise in (1, 2):
        program = captured.copy()
        torch.manual_seed(noise)  # the global generator has no say and keeps its state
        before = torch.get_rng_state()
        facts = finetune(program, examples(), epochs=4, batch_size=32, lr=0.01, seed=5, threads=1)
        assert torch.equal(before, torch.get_rng_state())
        results.append((facts, {name: value.clone() for name, value in program.state_dict().items()}))
    (facts, first), (again, second) = results
    assert facts == again
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert facts["last_loss"] < 0.8 * facts["first_loss"]
    assert facts["steps"] == 4 * 6  # 200 // 32, the rest is dropped
    assert facts["epochs"] == 4
    assert facts["threads"] == 1
    assert first["norm.num_batches_tracked"] == 24
    other = captured.copy()
    finetune(other, examples(), epochs=4, batch_size=32, lr=0.01, seed=6, threads=1)
    assert not torch.equal(other.state_dict()["last.weight"], first["last.weight"])


@pytest.mark.parametrize(("optimizer", "lr"), [("adamw", 0.02), ("sgd", 0.1)])
def test_accuracy_rises_and_the_program_is_left_in_evaluation_mode(program: Program, optimizer: str, lr: float):
    held = examples(500, seed=9)
    before = evaluate(program, held, ACCURACY)
    seen: list[float | None] = []
    finetune(program, examples(), epochs=15, lr=lr, optimizer=optimizer, progress=lambda stage, done: seen.append(done))
    assert not program.module().training
    assert evaluate(program, held, ACCURACY) > max(before, 0.75)
    assert seen[-1] == 1.0
    assert seen == sorted(seen)  # type: ignore[type-var]


@pytest.mark.parametrize("optimizer", ["ekfac", "kfac"])
def test_curvature_by_name_leaves_no_observer(program: Program, optimizer: str):
    facts = finetune(program, examples(), epochs=3, optimizer=optimizer, threads=1)
    assert facts["optimizer"] == optimizer.upper()
    assert facts["last_loss"] < facts["first_loss"]
    assert program.module()._observer is None


def test_a_live_curvature_optimiser_stays_attached_and_sees_no_probe(program: Program):
    optimizer = make_optimizer(program, "ekfac")
    facts = finetune(program, examples(), steps=3, optimizer=optimizer)
    again = finetune(program, examples(), steps=2, optimizer=optimizer)
    assert (facts["steps"], again["steps"]) == (3, 2)
    assert optimizer.param_groups[0]["steps"] == 5
    assert program.module()._observer is not None
    close_optimizer(optimizer)


def test_a_metric_that_is_no_number_never_wins(program: Program):
    calls = iter([float("nan"), 3.0, float("nan")])
    facts = finetune(program, examples(), epochs=3, val=examples(100), metric=lambda m, loader: next(calls), threads=1)
    assert facts["best_epoch"] == 2


def test_it_is_plain_training_of_the_module():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()
    data = examples()
    x, y = data.inputs[0].double(), data.targets  # type: ignore[index]
    program = capture(module, x[:2])
    finetune(program, (x, y), epochs=2, batch_size=50, optimizer="sgd", lr=0.1, schedule="constant", seed=3, threads=1)
    module.train()
    matrices, vectors = ([p for p in module.parameters() if (p.dim() > 1) == big] for big in (True, False))
    groups = [{"params": matrices, "weight_decay": 5e-4}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    for epoch in range(2):
        for (inputs,), targets in ArrayData((x,), y).batches(50, 3 + epoch):
            optimizer.zero_grad()
            F.cross_entropy(module(inputs), targets).backward()
            optimizer.step()
    for name, value in module.state_dict().items():
        assert torch.equal(program.state_dict()[name], value), name


def test_frozen_norms_stay_frozen():
    module = Net().train()
    module.norm.eval()
    program = capture(module, torch.randn(2, 6))
    finetune(program, examples(), steps=5)
    assert torch.equal(program.tensor("norm.running_mean"), torch.zeros(16))


def test_the_best_state_by_validation_is_kept(program: Program):
    held = examples(300, seed=9)
    facts = finetune(program, examples(), epochs=6, lr=0.5, optimizer="sgd", val=held, threads=1)  # jumps about
    assert len(facts["accuracy"]) == 6
    assert facts["best_epoch"] == 1 + facts["accuracy"].index(max(facts["accuracy"]))
    assert evaluate(program, held, ACCURACY) == pytest.approx(max(facts["accuracy"]))


def test_a_metric_of_ones_own_chooses(program: Program):
    calls = iter([3.0, 5.0, 4.0])

    def metric(module: nn.Module, loader: Any) -> float:
        assert not module.training
        assert len(loader) == 2
        inputs, targets = next(iter(loader))
        assert module(inputs).shape == (len(targets), 3)
        return next(calls)

    facts = finetune(program, examples(), epochs=3, val=examples(100), metric=metric, threads=1)
    assert facts["metric"] == [3.0, 5.0, 4.0]
    assert facts["best_epoch"] == 2


def test_a_live_optimiser_keeps_its_state_and_its_rates(program: Program):
    optimizer = make_optimizer(program, "adamw", 0.003)
    finetune(program, examples(), steps=4, optimizer=optimizer)
    facts = finetune(program, examples(), steps=3, optimizer=optimizer)
    assert facts["optimizer"] == "AdamW"
    assert {group["lr"] for group in optimizer.param_groups} == {0.003}
    assert {int(state["step"]) for state in optimizer.state.values()} == {7}
    with pytest.raises(UsageError, match="trains no parameter of this Program"):
        finetune(program, examples(), optimizer=torch.optim.SGD(Net().parameters(), lr=0.1))


def test_floating_point_targets_and_any_iterable(program: Program):
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    batches = [{"x": part, "y": part[:, :3]} for part in x.split(10)]
    facts = finetune(program, batches, epochs=20, lr=0.01, threads=1)
    assert facts["loss"] == "mse"
    assert facts["steps"] == 80
    assert facts["last_loss"] < facts["first_loss"]
    facts = finetune(program, iter([(part, part[:, :3]) for part in x.split(10)]), epochs=2, threads=1)
    assert facts["steps"] == 8


def test_a_loss_that_is_not_finite_stops_in_one_line(program: Program):
    bad = examples()
    bad.inputs[0][:] = float("nan")  # type: ignore[index]
    with pytest.raises(BadData, match="before any training") as caught:
        finetune(program, bad)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"at step \d+ of 40; lower --lr \(now 1e\+25\)"):
        finetune(program, examples(), lambda o, t: (o**2).mean(), steps=40, optimizer="sgd", lr=1e25)
    assert not program.module().training


def test_options_that_mean_nothing(program: Program):
    for options, told in (
        ({"epochs": 1, "steps": 1}, "not both"),
        ({"epochs": -1}, "negative"),
        ({"schedule": "linear"}, "no schedule"),
        ({"optimizer": "lion"}, "no optimizer"),
    ):
        with pytest.raises(UsageError, match=told):
            finetune(program, examples(), **options)
    with pytest.raises(BadData, match="needs targets"):
        finetune(program, (torch.randn(4, 6), None))
    assert finetune(program, examples(), epochs=0)["steps"] == 0


def test_epochs_by_the_size_of_the_data():
    assert [default_epochs(n) for n in (100, 5_000, 20_000, 10**6)] == [30, 12, 3, 3]
