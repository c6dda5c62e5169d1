"""What counts as a branch, by family; what does not, and the reason that is given."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfe_fx.frontend.capture import capture
from kfe_fx.labels.analysis import Analysis, analyze
from kfe_fx.labels.branches import Branch, examine, find_branches
from kfe_fx.labels.joins import NoBranch
from tests.passes.branch_nets import FAMILIES, IMAGE, WIDTH, Basic, Images, Mixer, Sequences, conv, filled


def analysed(module: nn.Module, shape: tuple[int, ...]) -> Analysis:
    return analyze(capture(filled(module), torch.randn(2, *shape, dtype=torch.float64)))


def branches_of(module: nn.Module, shape: tuple[int, ...]) -> dict[str, Branch]:
    return {branch.name: branch for branch in find_branches(analysed(module, shape))}


def reason(module: nn.Module, shape: tuple[int, ...], weight: str) -> str:
    """Tell why the units that the rows of a weight come from are no branch."""
    analysis = analysed(module, shape)
    units = {unit.id for unit in analysis.units if 0 in unit.slices.get(weight, {})}
    assert frozenset(units) in analysis.floors
    assert not [branch for branch in find_branches(analysis) if units <= branch.units]
    with pytest.raises(NoBranch) as raised:
        examine(analysis, units)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_branches_of_a_family(name: str) -> None:
    family = FAMILIES[name]
    assert branches_of(family.make(), family.shape).keys() == family.branches.keys()


def test_what_is_said_of_a_branch() -> None:
    branch = branches_of(Images(Basic()), IMAGE)["blocks.0.conv2"]
    inner = [f"blocks.0.{name}" for name in ("conv1.weight", "bn1.weight", "bn1.bias")]
    outer = [f"blocks.0.{name}" for name in ("conv2.weight", "bn2.weight", "bn2.bias")]
    assert branch.parameters == (*inner, *outer)
    counters = ("running_mean", "running_var", "num_batches_tracked")
    assert branch.buffers == tuple(f"blocks.0.{norm}.{each}" for norm in ("bn1", "bn2") for each in counters)
    (constant,) = branch.constants
    assert constant.value.shape == (WIDTH, 1, 1)
    assert constant.module == "blocks.0"
    assert branch.saved == 2 * 9 * 5 * WIDTH + 2 * 5 + 2 * WIDTH - WIDTH
    assert branch.joins.keys() == {"eval", "train"}
    assert branch.joins["eval"] == branch.joins["train"]
    (join,) = branch.joins["eval"]
    assert (join.node, join.position, join.constant) == ("add_tensor", 0, 0)
    assert replace(branch, name="other") != branch


def test_the_units_are_all_that_die() -> None:
    """Either floor of a bottleneck makes it constant; both belong to the branch, the width of the stream does not."""
    analysis = analysed(FAMILIES["bottleneck"].make(), IMAGE)
    (branch,) = find_branches(analysis)
    slices = lambda name: {unit.id for unit in analysis.units if 0 in unit.slices.get(name, {})}
    assert branch.units == slices("blocks.0.conv1.weight") | slices("blocks.0.conv2.weight")
    assert examine(analysis, slices("blocks.0.conv1.weight")).units == branch.units
    assert examine(analysis, slices("blocks.0.conv2.weight")).units == branch.units


def test_the_value_is_that_of_the_norm_behind_the_contraction() -> None:
    network = filled(Images(Basic()))
    branch = branches_of(network, IMAGE)["blocks.0.conv2"]
    norm = network.get_submodule("blocks.0.bn2")
    with torch.no_grad():
        expected = norm(torch.zeros(1, WIDTH, 1, 1, dtype=torch.float64))[0]
    torch.testing.assert_close(branch.constants[0].value, expected, rtol=0, atol=1e-14)


def test_a_constant_per_position() -> None:
    branch = branches_of(Sequences(Mixer(5)), (5, 4))["blocks.0.fc2"]
    assert branch.constants[0].value.shape == (5, 1)


def test_noise_of_the_training_graph_goes_with_the_branch() -> None:
    """Stochastic depth multiplies by noise in training; the join is the same in both graphs."""
    analysis = analysed(FAMILIES["stochastic depth"].make(), IMAGE)
    (branch,) = find_branches(analysis)
    (evaluation,), (training,) = branch.joins["eval"], branch.joins["train"]
    assert (evaluation.node, evaluation.position) == (training.node, training.position)
    assert evaluation.source != training.source


# what is none --------------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """No way around the hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)))


def test_a_chain_has_none() -> None:
    assert reason(Chain(), (4,), "fc1.weight") == "an output of the network would be constant"


class TwoOutputs(Chain):
    """A second output is a constant alone, beside a residual sum that is not."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = super().forward(x)
        return x[:, :3] + y, y


def test_an_output_must_not_become_constant() -> None:
    assert "output" in reason(TwoOutputs(), (4,), "fc1.weight")


def test_the_stream_itself_is_none() -> None:
    assert "output" in reason(Images(Basic()), IMAGE, "stem.weight")


class Borders(nn.Module):
    """Two convolutions behind the hidden layer, of which the second sees the first one's bias and a zero border."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(WIDTH, 5, bias=True), conv(5, 4, bias=True)
        self.conv3 = conv(4, WIDTH, kernel, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.conv1(x)))
        return x + self.conv3(F.softmax(y, 1))  # the softmax keeps the width, so the units behind it do not die


def test_zero_padding_that_makes_borders() -> None:
    assert "borders" in reason(Images(Borders(3)), IMAGE, "blocks.0.conv1.weight")
    assert "blocks.0.conv2" in branches_of(Images(Borders(1)), IMAGE)


class Shared(nn.Module):
    """One MLP called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 5), nn.Linear(5, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.fc2(F.relu(self.fc1(x)))
        return x + self.fc2(F.relu(self.fc1(x)))


def test_a_branch_that_runs_twice_is_none() -> None:
    """It would leave two constants; a branch has one."""
    analysis = analysed(Sequences(Shared()), (5, 4))
    assert not find_branches(analysis)


class Tied(nn.Module):
    """A second layer reads the hidden weight, away from the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.fc1.weight) + self.fc2(F.relu(self.fc1(x)))


def test_a_weight_shared_with_the_stream() -> None:
    assert not branches_of(Sequences(Tied()), (5, 4))


class Concatenated(nn.Module):
    """The constant would be an operand of a cat, not of a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.back = nn.Linear(WIDTH, 5), nn.Linear(5, 4), nn.Linear(WIDTH + 4, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(torch.cat([x, F.softmax(self.fc2(F.relu(self.fc1(x))), -1)], -1))


def test_a_constant_in_a_cat_is_refused() -> None:
    assert "cat" in reason(Sequences(Concatenated()), (5, 4), "blocks.0.fc1.weight")


class Closed(nn.Module):
    """A gate that is zero without its hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 5), nn.Linear(5, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc2(F.relu(self.fc1(x)))) * x


def test_a_factor_of_zero_is_refused() -> None:
    assert "zero" in reason(Sequences(Closed()), (5, 4), "blocks.0.fc1.weight")


class Wider(nn.Module):
    """The sum has its positions from the branch alone."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 5), nn.Linear(5, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True) + self.fc2(F.relu(self.fc1(x)))


def test_a_branch_that_gives_the_shape_is_refused() -> None:
    assert "shape" in reason(Sequences(Wider()), (5, 4), "blocks.0.fc1.weight")


class Noise(nn.Module):
    """The constant meets noise in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 5), nn.Linear(5, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc2(F.relu(self.fc1(x)))
        return x + y * torch.rand(WIDTH, dtype=x.dtype)


def test_noise_is_no_constant() -> None:
    assert "constant is not" in reason(Sequences(Noise()), (5, 4), "blocks.0.fc1.weight")


class Kept(nn.Module):
    """A buffer keeps the mean of what the branch gives."""

    held: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 5), nn.Linear(5, WIDTH)
        self.register_buffer("held", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc2(F.relu(self.fc1(x)))
        self.held.copy_(y.mean((0, 1)))
        return x + y


def test_a_buffer_that_is_written_from_the_branch() -> None:
    assert "buffer" in reason(Sequences(Kept()), (5, 4), "blocks.0.fc1.weight")


class OneIsLeft(nn.Module):
    """Two branches and nothing beside them: either can go, both cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 5), nn.Linear(5, WIDTH)
        self.fc3, self.fc4 = nn.Linear(WIDTH, 5), nn.Linear(5, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x))) + self.fc4(F.relu(self.fc3(x)))


def test_branches_that_cannot_go_together() -> None:
    analysis = analysed(Sequences(OneIsLeft()), (5, 4))
    first, second = find_branches(analysis)
    assert {first.name, second.name} == {"blocks.0.fc2", "blocks.0.fc4"}
    with pytest.raises(NoBranch, match="output"):
        examine(analysis, first.units | second.units)
