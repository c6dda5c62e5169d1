"""Elastic weight consolidation: values, gradients and Hessians against dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import kfe_fx
from kfe_fx.curvature import Store, fit
from kfe_fx.curvature.ewc import EWC, total_penalty
from kfe_fx.curvature.operators import Curvature
from kfe_fx.errors import UsageError
from kfe_fx.program import Program

from .dense import TIGHT

close = torch.testing.assert_close
KINDS = ("diagonal", "ekfac", "kfac")


class Net(nn.Module):
    """A grouped convolution, a norm, a linear layer, and a parameter that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 2, groups=2)
        self.norm = nn.GroupNorm(2, 4)
        self.head = nn.Linear(12, 3)
        self.idle = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.conv(x))).flatten(1))


def task(seed: int) -> Tensor:
    return torch.randn(5, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def program() -> Program:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kfe_fx.capture(Net().double(), (task(0),))


def measured(program: Program, seed: int = 0) -> Store:
    return fit(program, task(seed), statistics=("diagonal", "ekfac"), source="exact")


def move(program: Program, seed: int) -> None:
    """Train, as it were."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in program.module().parameters():
            value += 0.3 * torch.randn(value.shape, dtype=value.dtype, generator=generator)


def flat(curvature: Curvature, program: Program) -> Tensor:
    held = dict(program.module().named_parameters())
    return torch.cat([held[name].detach().reshape(-1) for name in curvature.parameters])


def hessian(penalty: EWC, program: Program, curvature: Curvature) -> Tensor:
    """Return the second derivative of a penalty by the parameters, dense."""
    module = program.module()
    names = curvature.parameters
    shapes = [dict(module.named_parameters())[name].shape for name in names]

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self) -> Tensor:
            return penalty(self.inner)

    def value(vector: Tensor) -> Tensor:
        parts = vector.split([shape.numel() for shape in shapes])
        given = {f"inner.{name}": part.view(s) for name, part, s in zip(names, parts, shapes, strict=True)}
        return functional_call(Called(), given, ())

    return torch.autograd.functional.hessian(value, flat(curvature, program))  # type: ignore[return-value]


@pytest.mark.parametrize("kind", KINDS)
def test_the_penalty_is_half_the_quadratic_form(program: Program, kind: str) -> None:
    """T9.3: zero with a zero gradient at theta*; T9.4: its Hessian is lambda F."""
    store = measured(program)
    penalty = EWC(store, program, kind, strength=3.0)
    curvature = store.operator(program, kind)
    start, dense = flat(curvature, program), curvature.dense()
    value = penalty()
    assert value.item() == 0.0
    grads = torch.autograd.grad(value, list(program.module().parameters()), allow_unused=True)
    assert not any(grad.any() for grad in grads if grad is not None)
    move(program, 1)
    moved = flat(curvature, program) - start
    value = penalty()
    close(value.detach(), 1.5 * moved @ dense @ moved, **TIGHT)
    value.backward()
    held = dict(program.module().named_parameters())
    found = torch.cat([held[name].grad.reshape(-1) for name in curvature.parameters])  # type: ignore[union-attr]
    close(found, 3.0 * dense @ moved, **TIGHT)
    close(hessian(penalty, program, curvature), 3.0 * dense, **TIGHT)
    assert held["idle"].grad is None
    assert [item.parameter for item in penalty.missing] == ["idle"]


def test_the_anchor_is_a_copy(program: Program) -> None:
    penalty = EWC(measured(program), program)
    before = {name: value.clone() for name, value in penalty.anchor.items()}
    move(program, 1)
    assert all(torch.equal(value, before[name]) for name, value in penalty.anchor.items())
    assert not any(value.requires_grad for value in penalty.anchor.values())
    assert penalty().item() > 0


def test_it_penalises_any_module_with_the_names(program: Program) -> None:
    penalty = EWC(measured(program), program, "ekfac")
    source = Net().double()
    source.load_state_dict(program.state_dict())
    assert penalty(source).item() == 0.0
    with torch.no_grad():
        source.head.weight.add_(1.0)
    assert penalty(source).item() > 0.0 == penalty().item()
    penalty(source).backward()
    assert source.head.weight.grad is not None
    with pytest.raises(UsageError, match=r"no parameter 'conv.weight'"):
        penalty(nn.Linear(3, 3))


def test_the_penalties_of_tasks_add(program: Program) -> None:
    first = EWC(measured(program), program, "diagonal", 2.0)
    move(program, 1)
    second = EWC(measured(program, 1), program, "ekfac", 0.5)
    move(program, 2)
    total = total_penalty([first, second])
    close(total, first() + second(), rtol=0, atol=0)
    assert first().item() > 0
    assert second().item() > 0
    with pytest.raises(UsageError, match="no penalties"):
        total_penalty([])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gamma", [0.0, 0.7, 1.0])
def test_the_online_form_weighs_earlier_tasks_down(program: Program, kind: str, gamma: float) -> None:
    """F <- gamma F + F_new, three times over, around the latest parameters."""
    store = measured(program)
    penalty = EWC(store, program, kind, strength=2.0)
    curvature = store.operator(program, kind)
    dense = curvature.dense()
    for seed in (1, 2):
        move(program, seed)
        new = measured(program, seed)
        penalty = penalty.online(new, gamma)
        dense = gamma * dense + new.operator(program, kind).dense()
        assert penalty().item() == 0.0
    close(hessian(penalty, program, curvature), 2.0 * dense, **TIGHT)
    start = flat(curvature, program)
    move(program, 3)
    moved = flat(curvature, program) - start
    close(penalty().detach(), moved @ dense @ moved, **TIGHT)


def test_the_online_form_keeps_one_diagonal(program: Program) -> None:
    penalty = EWC(measured(program), program)
    for seed in range(1, 4):
        move(program, seed)
        penalty = penalty.online(measured(program, seed), 0.9)
    assert all(len(terms) == 1 for _, terms in penalty._terms)


@pytest.mark.parametrize("kind", ["diagonal", "ekfac"])
def test_it_holds_what_an_earlier_task_needs(kind: str) -> None:
    """The example of the docstring; the second task moves the biases of the first, unless they are held."""
    x = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    nothing = torch.zeros(40, 3, dtype=torch.float64)
    tasks = [torch.cat([x[:, :3], nothing], 1), torch.cat([nothing, 1 + x[:, 3:].abs()], 1)]
    targets = [(x[:, 0] > 0).long(), torch.ones(40, dtype=torch.long)]

    def train(strength: float) -> list[float]:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double()
        program = kfe_fx.capture(module, (x,))
        penalties: list[EWC] = []
        for inputs, labels in zip(tasks, targets, strict=True):
            optimizer = torch.optim.Adam(program.module().parameters(), lr=0.03)
            for _ in range(150):
                optimizer.zero_grad()
                loss = F.cross_entropy(program(inputs), labels)
                (loss + total_penalty(penalties) if penalties else loss).backward()
                optimizer.step()
            store = fit(program, inputs, statistics=("diagonal", "ekfac"), source="exact")
            penalties.append(EWC(store, program, kind, strength))
        with torch.no_grad():
            return [float(F.cross_entropy(program(d), y)) for d, y in zip(tasks, targets, strict=True)]

    forgotten, kept = train(0.0), train(100.0)
    assert kept[0] < 0.2 * forgotten[0]
    assert kept[1] < 1e-3  # and the second task is learned


def test_what_means_nothing_is_refused(program: Program) -> None:
    store = measured(program)
    with pytest.raises(UsageError, match="not negative"):
        EWC(store, program, strength=-1.0)
    with pytest.raises(UsageError, match="no curvature 'full'"):
        EWC(store, program, "full")
    penalty = EWC(store, program)
    for gamma in (-0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match="gamma is"):
            penalty.online(store, gamma)
    move(program, 1)
    with pytest.raises(UsageError, match="older than the weights"):
        EWC(store, program)
    with pytest.raises(UsageError, match="older than the weights"):
        penalty.online(store)
    kfac = fit(program, task(0), statistics="kfac", source="exact")
    both = EWC(measured(program), program, "kfac")
    with pytest.raises(UsageError, match=r"hold nothing of norm.weight, which earlier tasks did"):
        both.online(kfac)
