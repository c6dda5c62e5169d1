"""Pass ``shrink``: the result against a network built by hand with the slices that stay; the input stays as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from kfe_fx.errors import PlanError, VerificationFailed
from kfe_fx.frontend.capture import capture
from kfe_fx.labels import registry
from kfe_fx.labels.analysis import Analysis, analyze
from kfe_fx.passes.shrink import Shrink
from kfe_fx.plan import Plan
from kfe_fx.program import Program


class Net(nn.Module):
    """Two convolutions of ``first`` and ``second`` channels; a view with the widths written out; dropout."""

    def __init__(self, first: int = 4, second: int = 3) -> None:
        super().__init__()
        self.second = second
        self.one, self.norm = nn.Conv2d(2, first, 3, padding=1), nn.BatchNorm2d(first)
        self.two, self.drop, self.head = nn.Conv2d(first, second, 1), nn.Dropout(0.5), nn.Linear(4 * second, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.two(torch.relu(self.norm(self.one(x)))))
        return self.head(self.drop(y.view(-1, self.second * 4)))


FIRST, SECOND = [0, 2], [1, 2]  # what stays of 4 and of 3 channels
FLAT = [4, 5, 6, 7, 8, 9, 10, 11]  # ... behind the view


def by_hand(net: Net) -> Net:
    small = Net(len(FIRST), len(SECOND)).double()
    state = net.state_dict()
    cut = {
        **{name: value[FIRST] for name, value in state.items() if name.startswith(("one.", "norm.")) and value.dim()},
        "norm.num_batches_tracked": state["norm.num_batches_tracked"],
        "two.weight": state["two.weight"][SECOND][:, FIRST],
        "two.bias": state["two.bias"][SECOND],
        "head.weight": state["head.weight"][:, FLAT],
        "head.bias": state["head.bias"],
    }
    small.load_state_dict(cut)
    return small


def cut_away(analysis: Analysis, **kept: list[int]) -> set[int]:
    """Find the units of each layer that are not kept."""
    return {
        unit.id
        for unit in analysis.units
        for layer, indices in kept.items()
        if not set(unit.slices.get(f"{layer}.weight", {}).get(0, indices)) <= {*indices}
    }


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    module = Net().double()
    with torch.no_grad():
        for value in module.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) + 0.1)
    return module


@pytest.fixture
def program(net: Net) -> Program:
    return capture(net, torch.randn(2, 2, 2, 2, dtype=torch.float64))


@pytest.fixture
def plan(program: Program) -> Plan:
    analysis = analyze(program)
    return Plan.of_units(analysis, cut_away(analysis, one=FIRST, two=SECOND))


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_the_result_is_the_network_built_by_hand(net: Net, program: Program, plan: Plan, batch: int) -> None:
    small, expected = Shrink(plan).run(program).program, by_hand(net).eval()
    assert small.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(small.state_dict()[name], value), name
    x = torch.randn(batch, 2, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(small(x), expected(x), rtol=0, atol=1e-12)


def test_the_input_is_not_touched(program: Program, plan: Plan) -> None:
    text, state = program.hash(), copy.deepcopy(program.state_dict())
    tensors = {name: id(value) for name, value in program.module().named_parameters()}
    result = Shrink(plan).run(program)
    with torch.no_grad():
        for value in result.program.module().parameters():
            value.fill_(0)
    assert program.hash() == text
    assert program.lineage == ()
    assert tensors == {name: id(value) for name, value in program.module().named_parameters()}
    for name, value in state.items():
        assert torch.equal(program.state_dict()[name], value), name


def test_what_is_said_of_the_result(program: Program, plan: Plan) -> None:
    result = Shrink(plan).run(program)
    assert result.modified
    assert result.program.hash() != program.hash()
    assert result.program.lineage == ("shrink",)
    assert result.facts == {"removed": 3, "tensors": len(plan.kept)}
    again = analyze(result.program)
    assert len(again.units) == len(FIRST) + len(SECOND)


def test_an_empty_plan_changes_nothing(program: Program) -> None:
    result = Shrink(Plan()).run(program)
    assert not result.modified
    assert result.program is program


def test_the_same_removal_twice_is_refused(program: Program, plan: Plan) -> None:
    once = Shrink(plan).run(program).program
    with pytest.raises(PlanError):
        Shrink(plan).run(once)


def test_the_training_graph_is_relocated_too(net: Net, program: Program, plan: Plan) -> None:
    """A training step is that of the network built by hand: loss, weights, running statistics."""
    small, expected = Shrink(plan).run(program).program.train(), by_hand(net).train()
    assert "train" in small.graphs
    x, y = torch.randn(6, 2, 2, 2, dtype=torch.float64), torch.randint(0, 2, (6,))
    losses = []
    for module in (small.module(), expected):
        torch.manual_seed(1)  # the same dropout
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        loss = nn.functional.cross_entropy(module(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - losses[1]) <= 1e-12
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], value, rtol=0, atol=1e-12)
    # and the step did something
    assert not torch.equal(small.state_dict()["norm.running_mean"], by_hand(net).state_dict()["norm.running_mean"])
    assert not torch.equal(small.state_dict()["one.weight"], by_hand(net).state_dict()["one.weight"])


def test_parameters_stay_parameters_and_frozen_ones_stay_frozen(net: Net) -> None:
    net.one.weight.requires_grad_(False)
    program = capture(net, torch.randn(2, 2, 2, 2, dtype=torch.float64))
    analysis = analyze(program)
    small = Shrink(Plan.of_units(analysis, cut_away(analysis, one=FIRST))).run(program).program
    found = {name: value.requires_grad for name, value in small.module().named_parameters()}
    assert found == {name: value.requires_grad for name, value in net.named_parameters()}
    assert {name for name, _ in small.module().named_buffers()} == {name for name, _ in net.named_buffers()}


class Buffers(nn.Module):
    saved: Tensor
    unsaved: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(2, 3), nn.Linear(3, 1)
        self.register_buffer("saved", torch.arange(1.0, 4.0))
        self.register_buffer("unsaved", torch.arange(4.0, 7.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x) * self.saved + self.unsaved)


def test_buffers_are_cut_and_those_that_are_not_saved_stay_so() -> None:
    program = capture(Buffers(), torch.randn(2, 2))
    analysis = analyze(program)
    small = Shrink(Plan.of_units(analysis, cut_away(analysis, one=[0, 2]))).run(program).program
    assert small.tensor("saved").tolist() == [1, 3]
    assert small.tensor("unsaved").tolist() == [4, 6]
    assert small.state_dict().keys() == program.state_dict().keys()
    assert "unsaved" not in small.state_dict()


class Parts(nn.Module):
    """A range in the middle of the channels, whose bounds move when channels before it go."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.scale = nn.Linear(2, 6), nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.relu(self.one(x))[:, 2:4] * self.scale).sum(1)


def test_bounds_that_are_not_relocated_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    program = capture(Parts(), torch.randn(3, 2))
    analysis = analyze(program)
    plan = Plan.of_units(analysis, cut_away(analysis, one=[1, 3, 4, 5]))
    assert plan.kept["scale"] == [(0, [1])]
    Shrink(plan).run(program)
    monkeypatch.setitem(registry.RELOCATORS, torch.ops.aten.slice.Tensor, lambda moved, node: None)
    with pytest.raises(VerificationFailed, match=r"test_shrink\.py:") as raised:
        Shrink(plan).run(program)
    assert "\n" not in str(raised.value)


def test_a_view_that_is_not_relocated_is_seen(program: Program, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.RELOCATORS, torch.ops.aten.view.default, lambda moved, node: None)
    with pytest.raises(VerificationFailed) as raised:
        Shrink(plan).run(program)
    assert "\n" not in str(raised.value)
