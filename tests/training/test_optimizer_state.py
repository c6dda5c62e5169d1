"""Optimiser state survives a removal: the next step is the masked network's step on what stays."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfe_fx.errors import UsageError
from kfe_fx.frontend.capture import capture
from kfe_fx.labels.analysis import analyze
from kfe_fx.passes.shrink import Shrink
from kfe_fx.plan import Plan
from kfe_fx.training import close_optimizer, make_optimizer, slice_optimizer


class Tied(nn.Module):
    """Two layers with one weight, a product of which nothing shifts zero (so that a mask is the removal)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 3)
        self.again.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)) + torch.tanh(self.again(x.flip(1))))


MAKERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
}


def step(module: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, mask: Any = None) -> None:
    optimizer.zero_grad()
    F.mse_loss(module(x), y).backward()
    if mask is not None:
        mask()
    optimizer.step()


@pytest.mark.parametrize("name", MAKERS)
def test_a_step_after_slicing_is_the_masked_step_on_what_stays(name: str):
    torch.manual_seed(0)
    x, y = torch.randn(6, 5).double(), torch.randn(6, 3).double()
    program = capture(Tied().double().eval(), x[:2])
    module = program.module()
    optimizer = MAKERS[name](module.parameters())
    for _ in range(3):
        step(module, optimizer, x, y)
    analysis = analyze(program)
    plan = Plan.of_units(analysis, {analysis.groups[0].units[i] for i in (1, 4, 5)})
    small = Shrink(plan).run(program).program
    sliced = slice_optimizer(optimizer, program, small, plan)
    assert type(sliced) is type(optimizer)
    assert len(sliced.param_groups[0]["params"]) == len(optimizer.param_groups[0]["params"]) == 5
    assert [id(p) for p in sliced.param_groups[0]["params"]] == [id(p) for p in small.module().parameters()]
    held = {id(value) for state in optimizer.state.values() for value in state.values()}
    assert held.isdisjoint(
        id(value) for state in sliced.state.values() for value in state.values() if value is not None
    )

    gone = [1, 4, 5]

    def zero_removed() -> None:
        with torch.no_grad():
            for key in ("first.weight", "first.bias", "again.bias"):
                program.tensor(key)[gone] = 0
            program.tensor("last.weight")[:, gone] = 0

    zero_removed()
    for _ in range(3):
        step(module, optimizer, x, y)
        zero_removed()
        step(small.module(), sliced, x, y)
    for key, value in small.state_dict().items():
        wanted = program.tensor(key)
        for dim, kept in plan.kept.get(key, []):
            wanted = wanted.index_select(dim, torch.tensor(kept))
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-12)


def test_the_old_optimiser_and_its_scheduler_stay_as_they_were():
    x = torch.randn(6, 5).double()
    program = capture(Tied().double().eval(), x[:2])
    optimizer = make_optimizer(program, "adamw", 0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    step(program.module(), optimizer, x, torch.randn(6, 3).double())
    schedule.step()
    before = copy.deepcopy(optimizer.state_dict())
    analysis = analyze(program)
    plan = Plan.of_units(analysis, {0})
    small = Shrink(plan).run(program).program
    sliced = slice_optimizer(optimizer, program, small, plan)
    assert [group["weight_decay"] for group in sliced.param_groups] == [0.01, 0.0]
    assert sliced.param_groups[0]["lr"] == pytest.approx(0.001)
    step(small.module(), sliced, x, torch.randn(6, 3).double())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, state in before["state"].items():
        assert all(torch.equal(value, after["state"][key][name]) for name, value in state.items())


def test_state_of_another_shape_starts_anew():
    x = torch.randn(6, 5).double()
    program = capture(Tied().double().eval(), x[:2])
    optimizer = torch.optim.Adafactor(program.module().parameters(), lr=0.01)
    step(program.module(), optimizer, x, torch.randn(6, 3).double())
    analysis = analyze(program)
    plan = Plan.of_units(analysis, {0})
    small = Shrink(plan).run(program).program
    sliced = slice_optimizer(optimizer, program, small, plan)
    step(small.module(), sliced, x, torch.randn(6, 3).double())


def test_what_cannot_be_sliced_is_refused():
    x = torch.randn(6, 5).double()
    program = capture(Tied().double().eval(), x[:2])
    lbfgs = torch.optim.LBFGS(program.module().parameters())
    with pytest.raises(UsageError, match="LBFGS"):
        slice_optimizer(lbfgs, program, program, Plan())
    foreign = torch.optim.SGD(Tied().parameters(), lr=0.1)
    with pytest.raises(UsageError, match="not this Program's"):
        slice_optimizer(foreign, program, program, Plan())
    ekfac = make_optimizer(program, "ekfac")
    with pytest.raises(UsageError, match="EKFAC keeps statistics of whole layers"):
        slice_optimizer(ekfac, program, program, Plan())
    close_optimizer(ekfac)


def test_what_cannot_be_made_is_refused():
    program = capture(Tied().double().eval(), torch.randn(2, 5).double())
    with pytest.raises(UsageError, match="choose adamw, sgd, ekfac, kfac"):
        make_optimizer(program, "adam")
    with pytest.raises(UsageError, match="adamw takes no damping; that is for ekfac and kfac"):
        make_optimizer(program, "adamw", damping=0.1)
    for parameter in program.module().parameters():
        parameter.requires_grad_(False)
    with pytest.raises(UsageError, match="no parameter to train"):
        make_optimizer(program, "sgd")
