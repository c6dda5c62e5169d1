"""Penalties of fine-tuning: EWC against dense matrices, gradients against autograd, several at once, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfe_fx
from kfe_fx.curvature import EWC, Store, fit
from kfe_fx.errors import UsageError
from kfe_fx.program import Program
from kfe_fx.training import GroupLasso, finetune
from kfe_fx.training.batches import Batch
from kfe_fx.training.loop import Trainer
from kfe_fx.training.losses import resolve_loss
from kfe_fx.training.penalties import Differentiated, Quadratic, as_penalties, ewc_penalty

KINDS = ("diagonal", "kfac", "ekfac")
TIGHT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-13}
SETTINGS: dict[str, Any] = {"epochs": 3, "batch_size": 10, "optimizer": "sgd", "lr": 0.05, "threads": 1}
close = torch.testing.assert_close


class Net(nn.Module):
    """A grouped convolution, a norm, a linear layer, and a parameter that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 4, 2, groups=2), nn.GroupNorm(2, 4)
        self.head, self.idle = nn.Linear(12, 3), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.conv(x))).flatten(1))


def task(seed: int, count: int = 30) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0].sum(1) > 0).long() + (x[:, 1, 0] > seed).long()


@pytest.fixture(scope="module")
def captured() -> Program:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kfe_fx.capture(Net().double(), (task(0)[0][:2],))


@pytest.fixture(scope="module")
def store(captured: Program) -> Store:
    return fit(captured, task(0)[0], statistics=("diagonal", "ekfac"), source="exact")


@pytest.fixture
def program(captured: Program) -> Program:
    return captured.copy()


def move(program: Program, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in program.module().parameters():
            value += 0.3 * torch.randn(value.shape, dtype=value.dtype, generator=generator)


def flat(values: dict[str, Tensor], names: tuple[str, ...]) -> Tensor:
    return torch.cat([values[name].detach().reshape(-1) for name in names])


def added(program: Program, penalty: Any) -> dict[str, Tensor | None]:
    """Return what a penalty leaves in ``p.grad``, from nothing."""
    for value in program.module().parameters():
        value.grad = None
    penalty.add_gradients()
    return {name: value.grad for name, value in program.module().named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_value_gradient_and_hessian(program: Program, store: Store, kind: str):
    """T9.3: zero with a zero gradient at theta*; T9.4: the gradient is lambda F (theta - theta*), F dense."""
    curvature = store.operator(program, kind)
    dense, names = curvature.dense(), curvature.parameters
    penalty = Quadratic(program, curvature, 3.0)
    held = dict(program.module().named_parameters())
    start = flat(held, names)
    assert penalty().item() == 0.0
    assert not any(grad.any() for grad in added(program, penalty).values() if grad is not None)
    for seed in (1, 2):
        move(program, seed)
        moved = flat(held, names) - start
        close(penalty().detach(), 1.5 * moved @ dense @ moved, **TIGHT)
        found = added(program, penalty)
        assert found["idle"] is None
        close(flat({n: g for n, g in found.items() if g is not None}, names), 3.0 * dense @ moved, **TIGHT)
        wanted = torch.autograd.grad(penalty(), [held[name] for name in names])
        for name, grad in zip(names, wanted, strict=True):
            close(found[name], grad, **TIGHT)
    # linear in the parameters: along each axis the gradient changes by a column of lambda F
    before = flat(added(program, penalty), names)  # type: ignore[arg-type]
    columns = []
    for name in names:
        for index in range(held[name].numel()):
            with torch.no_grad():
                held[name].view(-1)[index] += 1.0
            columns.append(flat(added(program, penalty), names) - before)  # type: ignore[arg-type]
            with torch.no_grad():
                held[name].view(-1)[index] -= 1.0
    close(torch.stack(columns, 1), 3.0 * dense, rtol=1e-10, atol=1e-12)
    facts = penalty.facts()
    assert (facts["lambda"], facts["kind"], facts["penalty"]) == (3.0, kind, pytest.approx(penalty().item()))
    assert [item["parameter"] for item in facts["missing"]] == ["idle"]


def test_it_adds_to_the_gradient_that_is_there_and_leaves_frozen_parameters(program: Program, store: Store):
    penalty = Quadratic(program, store.operator(program, "diagonal"), 2.0)
    move(program)
    alone = added(program, penalty)
    held = dict(program.module().named_parameters())
    for value in held.values():
        value.grad = torch.ones_like(value)
    held["head.bias"].requires_grad_(False)
    held["head.bias"].grad = None
    penalty.add_gradients()
    for name in ("conv.weight", "norm.bias", "head.weight"):
        close(held[name].grad, 1 + alone[name], **TIGHT)  # type: ignore[operator]
    assert held["head.bias"].grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_another_anchor(program: Program, store: Store, kind: str):
    """theta* as it was when the curvature was measured, and the weights elsewhere since."""
    anchor = {name: value.detach().clone() for name, value in program.module().named_parameters()}
    curvature = store.operator(program, kind)
    move(program)
    penalty = ewc_penalty(program, (curvature, 0.5, anchor))
    moved = flat(dict(program.module().named_parameters()), curvature.parameters) - flat(anchor, curvature.parameters)
    close(penalty().detach(), 0.25 * moved @ curvature.dense() @ moved, **TIGHT)
    finest = ewc_penalty(program, (store, 0.5, anchor))  # the statistics are of the anchor
    assert isinstance(finest, Quadratic)
    assert finest.curvature.kind == "ekfac"
    anchor["conv.weight"].zero_()  # a copy was taken
    close(penalty().detach(), 0.25 * moved @ curvature.dense() @ moved, **TIGHT)


def test_the_finest_curvature_of_a_store(program: Program):
    for statistics, kind in (
        ("diagonal", "diagonal"),
        ("kfac", "kfac"),
        (("diagonal", "kfac"), "kfac"),
        ("ekfac",) * 2,
    ):
        held = fit(program, task(0)[0], statistics=statistics, source="exact")
        penalty = ewc_penalty(program, (held, 1.0))
        assert isinstance(penalty, Quadratic)
        assert penalty.curvature.kind == kind


def test_earlier_tasks_of_an_ewc_stay(program: Program, store: Store):
    """Autograd of the sum over tasks, each in its own basis."""
    ewc = EWC(store, program, "ekfac", 2.0)
    move(program, 1)
    ewc = ewc.online(fit(program, task(1)[0], statistics=("diagonal", "ekfac"), source="exact"), 0.7)
    move(program, 2)
    penalty = ewc_penalty(program, ewc)
    found = added(program, penalty)
    names = [name for name in found if name != "idle"]
    held = dict(program.module().named_parameters())
    for name, grad in zip(names, torch.autograd.grad(ewc(), [held[name] for name in names]), strict=True):
        close(found[name], grad, **TIGHT)
    assert found["idle"] is None


class Counting:
    """A penalty that says how often it was asked."""

    def __init__(self) -> None:
        self.times = 0

    def add_gradients(self) -> None:
        self.times += 1


def test_a_step_is_a_step_on_the_sum(program: Program, store: Store):
    """SGD on loss + EWC + group lasso + one's own, against autograd of the sum; each is asked once in a step."""
    x, y = task(1)
    lasso = GroupLasso(program, 0.05)
    weight = program.tensor("head.weight")
    own = Differentiated(program, lambda: 0.1 * weight.abs().sum())
    ewc = Quadratic(program, store.operator(program, "ekfac"), 40.0)
    move(program)
    counting = Counting()
    optimizer = torch.optim.SGD(program.module().parameters(), lr=0.1)
    loss = resolve_loss("cross-entropy", y)
    assert loss is not None
    trainer = Trainer(program, loss, optimizer, 2, "constant", None, None, [ewc, lasso, own, counting])
    held = dict(program.module().named_parameters())
    for number in range(2):
        program.train()
        total = F.cross_entropy(program(x), y) + ewc() + lasso() + own()
        grads = torch.autograd.grad(total, list(held.values()), allow_unused=True)
        wanted = [
            value if grad is None else value - 0.1 * grad for value, grad in zip(held.values(), grads, strict=True)
        ]
        trainer.step(Batch([x], y, len(y)))
        for value, expected in zip(held.values(), wanted, strict=True):
            close(value.detach(), expected.detach(), **TIGHT)
        assert counting.times == number + 1
    assert trainer.record.losses[0] < total.item()  # told without penalties


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "ekfac"])
def test_it_holds_the_old_task(captured: Program, optimizer: str):
    """Trained on one task, fine-tuned on another: with EWC the first is not forgotten, with none it is."""
    program = captured.copy()
    finetune(program, task(0, 200), epochs=30, lr=0.01, threads=1)
    measured = fit(program, task(0, 200)[0], statistics="ekfac", source="exact")
    (x, y), lost, apart = task(0, 200), {}, {}
    for strength in (0.0, 100.0):
        twin = program.copy()
        settings = SETTINGS | {
            "optimizer": optimizer,
            "epochs": 15,
            "lr": {"sgd": 0.005, "adamw": 0.005, "ekfac": 0.01}[optimizer],
        }
        facts = finetune(twin, task(3, 100), ewc=(measured, strength), **settings)
        with torch.no_grad():
            lost[strength] = float(F.cross_entropy(twin(x), y) - F.cross_entropy(program(x), y))
        apart[strength] = facts["ewc"]["penalty"]
        assert (facts["ewc"]["kind"], facts["ewc"]["lambda"]) == ("ekfac", strength)
    assert lost[100.0] < 0.3 * lost[0.0]
    assert apart[0.0] == 0.0 < apart[100.0]


def test_without_strength_it_is_plain_fine_tuning(captured: Program, store: Store):
    runs = []
    for options in ({}, {"ewc": (store, 0.0)}, {"penalties": []}):
        program = captured.copy()
        finetune(program, task(1), **options, **SETTINGS)
        runs.append(program.state_dict())
    for other in runs[1:]:
        assert all(torch.equal(value, other[name]) for name, value in runs[0].items())


def test_with_a_teacher_and_other_penalties(captured: Program, store: Store):
    program = captured.copy()
    lasso = GroupLasso(program, 1e-3)
    facts = finetune(program, (task(1)[0], None), teacher=captured, ewc=(store, 10.0), penalties=lasso, **SETTINGS)
    assert facts["ewc"]["penalty"] > 0
    assert facts["distillation"]["weight"] == 1.0


def test_what_means_nothing_is_refused_in_one_line(program: Program, store: Store):
    curvature = store.operator(program, "diagonal")
    other = kfe_fx.capture(nn.Linear(3, 2).double(), torch.randn(2, 3).double())
    anchor = dict(program.module().named_parameters())
    moved = program.copy()
    move(moved)
    for told, network, ewc in (
        ("give a finite number, 0 or more", program, (store, -1.0)),
        ("give a finite number, 0 or more", program, (store, float("nan"))),
        ("give a finite number, 0 or more", program, (store, float("inf"))),
        ("give a finite number, 0 or more", program, (store, "1")),
        (r"ewc is \(curvature, strength\)", program, store),
        (r"ewc is \(curvature, strength\)", program, (1.0, store)),
        (r"ewc is \(curvature, strength\)", program, (store,)),
        ("older than the weights", moved, (store, 1.0)),
        ("of another network", other, (store, 1.0)),
        ("the network has no parameter 'conv.weight'", other, (curvature, 1.0)),
        (r"\(the anchor\) has no parameter 'conv.weight'", program, (curvature, 1.0, {})),
        (r"conv.weight is \[1\] in the anchor", program, (curvature, 1.0, anchor | {"conv.weight": torch.ones(1)})),
        ("'conv.weight' that this network does not have", other, EWC(store, program)),
    ):
        with pytest.raises(UsageError, match=told) as caught:
            finetune(network, (torch.randn(4, 2, 4), torch.zeros(4).long()), ewc=ewc, steps=1)
        assert "\n" not in str(caught.value)
    for penalty in (lambda: torch.ones(()), "lasso", [1.0]):
        with pytest.raises(UsageError, match="an object with add_gradients"):
            finetune(program, task(0), penalties=penalty, steps=1)
    with pytest.raises(UsageError, match="returns one number"):
        Differentiated(program, lambda: torch.ones(3))()
    assert as_penalties(None) == []
    assert added(program, Differentiated(program, lambda: torch.ones(())))["head.bias"] is None
