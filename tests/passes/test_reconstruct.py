"""Reconstruction: what is redundant comes back exactly, what is not comes nearer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kfe_fx.embedding import relative
from kfe_fx.errors import UsageError
from kfe_fx.frontend.capture import capture
from kfe_fx.labels.analysis import analyze
from kfe_fx.labels.states import permit, widths
from kfe_fx.passes.fold_means import FoldMeans, measure_means
from kfe_fx.passes.prune import prune
from kfe_fx.passes.reconstruct import Reconstruct
from kfe_fx.passes.shrink import Shrink
from kfe_fx.plan import Plan
from kfe_fx.program import Program


class Net(nn.Module):
    """Two convolutions with a norm between, a residual stream, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 6, 3, padding=1)
        self.back = nn.Conv2d(6, 8, 3, padding=1, bias=False)
        self.up, self.head = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.stem(x)).relu()
        y = y + self.back(self.inner(y).relu())
        return self.head(self.up(y.mean((2, 3))).relu())


def setting(seed: int = 0) -> tuple[Program, Tensor]:
    torch.manual_seed(seed)
    module = Net().double().eval()
    with torch.no_grad():
        module.norm.running_mean.normal_()  # type: ignore[union-attr,operator]
        module.norm.bias.normal_()
    return capture(module, torch.randn(2, 3, 6, 6).double()), torch.randn(96, 3, 6, 6).double()


def plan_of(program: Program, group: str, count: int) -> Plan:
    analysis = analyze(program)
    chosen = next(one for one in analysis.groups if one.name == group)
    return Plan.of_units(analysis, chosen.units[:count])


def error(program: Program, small: Program, x: Tensor) -> float:
    with torch.no_grad():
        return float((program(x) - small(x)).square().mean() / program(x).var())


def test_copies_of_a_channel_are_given_to_the_one_that_stays():
    program, x = setting()
    with torch.no_grad():  # channel 0 of the inner layer is channel 3 over again
        for tensor in ("inner.weight", "inner.bias"):
            program.tensor(tensor)[0] = program.tensor(tensor)[3]
        program.tensor("back.weight")[:, 0] *= 30
    plan = plan_of(program, "inner", 1)
    small = Shrink(plan).run(program).program
    result = Reconstruct(program, plan, x).run(small)
    assert error(program, small, x) > 1e-3
    assert error(program, result.program, x) < 1e-5  # a ridge of 1e-4 is between
    assert result.facts["layers"]["back"]["method"] == "least-squares"
    assert result.modified
    assert result.program.lineage[-1] == "reconstruct"


@pytest.mark.parametrize("group", ["inner", "up", "stem"])
def test_outputs_come_nearer_to_those_of_the_whole_network(group: str):
    program, x = setting(1)
    names = [one.name for one in analyze(program).groups]
    found = next(name for name in names if group in name)
    plan = plan_of(program, found, 4)
    small = Shrink(plan).run(program).program
    before = {name: value.clone() for name, value in small.state_dict().items()}
    fitted = Reconstruct(program, plan, x[:64]).run(small).program
    assert error(program, fitted, x[64:]) < 0.8 * error(program, small, x[64:])
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 1)
        self.second = nn.Conv2d(6, 4, 1, bias=False)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.second(self.first(x).relu()))


def test_a_layer_without_bias_has_the_constant_in_the_norm_behind():
    torch.manual_seed(0)
    program = capture(Normed().double().eval(), torch.randn(2, 2, 4, 4).double())
    x = torch.randn(128, 2, 4, 4).double()
    with torch.no_grad():  # removed channels that are all but constant
        program.tensor("first.weight")[:2] *= 1e-6
        program.tensor("first.bias")[:2] = 3.0
    plan = plan_of(program, "first", 2)
    small = Shrink(plan).run(program).program
    fitted = Reconstruct(program, plan, x).run(small).program
    assert not torch.equal(fitted.tensor("norm.running_mean"), small.tensor("norm.running_mean"))
    assert error(program, fitted, x) < 1e-6 < error(program, small, x)


def test_folded_means_are_no_second_constant():
    """What ``fold-means`` put into a running mean is known as a constant: the fit from there is the fit without it."""
    torch.manual_seed(2)
    program, x = capture(Normed().double().eval(), torch.randn(2, 2, 4, 4).double()), torch.randn(96, 2, 4, 4).double()
    analysis = analyze(program)
    plan = plan_of(program, "first", 3)
    bare = Shrink(plan).run(program).program
    folded = FoldMeans(analysis, plan, measure_means(analysis, x)).run(bare).program
    ends = [Reconstruct(program, plan, x).run(each).program for each in (bare, folded)]
    assert error(program, folded, x) < 0.9 * error(program, bare, x)
    torch.testing.assert_close(ends[0](x), ends[1](x), rtol=0, atol=1e-9)


def test_an_alternative_is_taken_where_it_is_better():
    program, x = setting(3)
    plan = plan_of(program, "inner", 2)
    small = Shrink(plan).run(program).program
    best = Reconstruct(program, plan, x).run(small).program.tensor("back.weight").clone()
    few = Reconstruct(program, plan, x[:4], {"told": {"back.weight": best}})
    assert few.run(small).facts["layers"]["back"]["method"] == "told"


def test_nothing_removed_is_nothing_to_do():
    program, x = setting(4)
    result = Reconstruct(program, Plan(), x).run(program)
    assert not result.modified
    assert result.program is program


def test_one_example_is_too_few():
    program, x = setting()
    with pytest.raises(UsageError, match="only one"):
        Reconstruct(program, Plan(), x[:1]).run(program)


class Mixing(nn.Module):
    """A layer over positions, whose rows are channels, and a convolution with the channels among the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.time, self.head = nn.Linear(3, 8), nn.Linear(6, 6), nn.Linear(8, 2)
        self.each = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.time(self.up(x).relu().transpose(1, 2))
        y = self.each(y.reshape(-1, 1, 6)).reshape(-1, y.shape[1], 6)
        return self.head(y.transpose(1, 2).relu())


@pytest.mark.parametrize("count", [96, 4096])  # all rows, and some of them at random
def test_rows_that_hold_channels_are_compared_with_their_own(count: int):
    torch.manual_seed(5)
    program = capture(Mixing().double().eval(), torch.randn(2, 6, 3).double())
    x = torch.randn(count, 6, 3).double()
    plan = plan_of(program, "up", 3)
    small = Shrink(plan).run(program).program
    result = Reconstruct(program, plan, x, limit=count).run(small)
    layers = result.facts["layers"]
    assert layers["time"]["method"] == "kept"  # a channel's row does not read another one's: nothing is to be mended
    assert layers["time"]["errors"]["kept"] < 1e-20
    assert layers["each"] == {"method": "kept", "errors": {}}
    assert layers["head"]["method"] == "least-squares"
    assert error(program, result.program, x) < error(program, small, x)


class Stream(nn.Module):
    """A recurrent layer whose state comes from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.GRU(3, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y, state = self.layer(x, h)
        return self.head(y[:, -1]), state


EXAMPLES = torch.zeros(2, 5, 3).double(), torch.zeros(1, 2, 8).double()


def test_states_that_an_earlier_cut_narrowed_are_cut_from_there():
    torch.manual_seed(6)
    program = permit(capture(Stream().double().eval(), EXAMPLES), allowed=True)
    x, h, y = torch.randn(64, 5, 3).double(), torch.randn(1, 64, 8).double(), torch.zeros(64).long()
    plans = [plan_of(program, analyze(program).groups[0].name, count) for count in (3, 5)]
    before, small = (Shrink(plan).run(program).program for plan in plans)
    assert [widths(one)["inputs"]["h"]["kept"] for one in (before, small)] == [[3, 4, 5, 6, 7], [5, 6, 7]]
    step = Plan(relative(plans[0].kept, plans[1].kept))
    found = Reconstruct(before, step, ((x, h), y)).run(small)
    assert found.facts["layers"]["head"]["method"] == "least-squares"
    result = prune(
        Stream().double().eval(), EXAMPLES, budget=0.5, metric="macs", rounds=2, epochs=0,
        data=((x, h.movedim(1, 0)), y), resize_state=True, criterion="magnitude",
    )  # fmt: skip
    assert len(result.certificate.rounds) == 2
