"""Folding means: exact where removed channels are constant, the mean elsewhere, whatever the consumer is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfe_fx.errors import UsageError
from kfe_fx.frontend.capture import capture
from kfe_fx.labels.analysis import Analysis, analyze
from kfe_fx.passes.fold_means import FoldMeans, measure_means
from kfe_fx.passes.shrink import Shrink
from kfe_fx.plan import Plan
from kfe_fx.program import Program

CONSTANT = 3  # of the producer's channels, the first ones, do not vary


class Net(nn.Module):
    """A producer whose first channels are constant, and one consumer."""

    def __init__(self, consumer: nn.Module, *, conv: bool = True, norm: bool = False) -> None:
        super().__init__()
        self.producer: nn.Module = nn.Conv2d(3, 8, 1) if conv else nn.Linear(3, 8)
        self.consumer = consumer
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        with torch.no_grad():
            self.producer.weight[:CONSTANT] = 0.0  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.consumer(F.elu(self.producer(x))))


class Product(nn.Module):
    """Multiply by a matrix and add a vector, without aten.linear."""

    def __init__(self, *, together: bool) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6))
        self.together = together

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight) if self.together else x @ self.weight + self.bias


def prepared(module: nn.Module, x: Tensor, channels: list[int]) -> tuple[Program, Analysis, Plan, Program]:
    program = capture(module.double().eval(), x[:2])
    analysis = analyze(program)
    layer = next(layers[0] for layers in analysis.params["producer.weight"] if layers)
    plan = Plan.of_units(analysis, {int(layer[channel]) for channel in channels})
    return program, analysis, plan, Shrink(plan).run(program).program


def folded(analysis: Analysis, plan: Plan, small: Program, x: Tensor):
    return FoldMeans(analysis, plan, measure_means(analysis, (x, None), batch_size=3)).run(small)


CASES = {
    "conv": (lambda: nn.Conv2d(8, 6, 3), 4),
    "strided": (lambda: nn.Conv2d(8, 6, 3, stride=2, dilation=2), 4),
    "pointwise": (lambda: nn.Conv2d(8, 6, 1), 4),
    "one-by-one transposed": (lambda: nn.ConvTranspose2d(8, 6, 1), 4),
    "linear": (lambda: nn.Linear(8, 6), 2),
    "tokens": (lambda: nn.Linear(8, 6), 3),
    "product": (lambda: Product(together=False), 2),
    "addmm": (lambda: Product(together=True), 2),
}


@pytest.mark.parametrize("name", CASES)
def test_constant_channels_fold_exactly(name: str):
    torch.manual_seed(0)
    make, rank = CASES[name]
    x = torch.randn(7, *(3, 6, 6) if rank == 4 else (3,) if rank == 2 else (5, 3)).double()
    program, analysis, plan, small = prepared(Net(make(), conv=rank == 4), x, list(range(CONSTANT)))
    assert (small(x) - program(x)).abs().max() > 1e-3
    result = folded(analysis, plan, small, x)
    assert result.modified
    assert result.facts == {"folded": 1, "skipped": 0, "skipped_at": []}
    assert (result.program(x) - program(x)).abs().max() < 1e-12
    assert (small(x) - program(x)).abs().max() > 1e-3  # the given Program is not touched


def test_without_a_bias_the_running_mean_of_the_norm_behind_shifts():
    torch.manual_seed(0)
    x = torch.randn(7, 3, 6, 6).double()
    net = Net(nn.Conv2d(8, 6, 3, bias=False), norm=True)
    assert isinstance(net.norm, nn.BatchNorm2d)
    net.norm.running_var = torch.rand(6) + 0.5
    program, analysis, plan, small = prepared(net, x, list(range(CONSTANT)))
    result = folded(analysis, plan, small, x)
    assert (result.program(x) - program(x)).abs().max() < 1e-12
    assert not torch.equal(result.program.tensor("norm.running_mean"), small.tensor("norm.running_mean"))


def test_with_neither_it_is_skipped_and_counted():
    x = torch.randn(4, 3, 6, 6).double()
    _, analysis, plan, small = prepared(Net(nn.Conv2d(8, 6, 3, bias=False)), x, [0])
    result = folded(analysis, plan, small, x)
    assert not result.modified
    assert result.program is small
    assert result.facts == {"folded": 0, "skipped": 1, "skipped_at": ["consumer"]}


def test_a_weight_that_is_computed_is_skipped_and_counted():
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 8))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight * 2)

    x = torch.randn(4, 3).double()
    _, analysis, plan, small = prepared(Net(Computed(), conv=False), x, [0])
    assert folded(analysis, plan, small, x).facts == {"folded": 0, "skipped": 1, "skipped_at": ["consumer"]}


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(8, 6, 3, padding=1), lambda: nn.ConvTranspose2d(8, 6, 3, groups=2)])
def test_the_mean_output_is_restored_whatever_varies(make):
    """The mean over data and positions of every output is that of the whole network, padding or not."""
    torch.manual_seed(0)
    x = torch.randn(7, 3, 4, 4).double()
    program, analysis, plan, small = prepared(Net(make()), x, [0, 5])
    result = folded(analysis, plan, small, x)
    mean = lambda net: net(x).mean((0, 2, 3))
    assert (mean(small) - mean(program)).abs().max() > 1e-3
    torch.testing.assert_close(mean(result.program), mean(program), rtol=0, atol=1e-12)


def test_outputs_that_went_too_and_shared_layers():
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.producer, self.middle, self.last = nn.Linear(3, 8), nn.Linear(8, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.middle(F.elu(self.producer(x)))))

    torch.manual_seed(0)
    x = torch.randn(50, 3).double()
    program = capture(Chain().double().eval(), x[:2])
    analysis = analyze(program)
    removed = {group.units[i] for group in analysis.groups for i in (0, 2)}
    plan = Plan.of_units(analysis, removed)
    small = Shrink(plan).run(program).program
    result = folded(analysis, plan, small, x)
    assert result.facts["folded"] == 2
    before, after = (small(x) - program(x)).mean(0).norm(), (result.program(x) - program(x)).mean(0).norm()
    assert after < 0.5 * before
    hidden = F.elu(F.linear(x, program.tensor("producer.weight"), program.tensor("producer.bias")))[:, [0, 2]].mean(0)
    shift = program.tensor("middle.weight")[:, [0, 2]] @ hidden
    kept = [i for i in range(5) if i not in (0, 2)]
    expected = program.tensor("middle.bias")[kept] + shift[kept]
    torch.testing.assert_close(result.program.tensor("middle.bias"), expected, rtol=0, atol=1e-12)


def test_images_of_several_sizes_share_one_mean_per_channel():
    torch.manual_seed(0)
    module = Net(nn.Conv2d(8, 6, 3)).double().eval()
    x = torch.randn(2, 3, 6, 6).double()
    program = capture(module, x, {"x": {0: "batch", 2: "height", 3: "width"}})
    analysis = analyze(program)
    plan = Plan.of_units(analysis, {int(analysis.params["producer.weight"][0][0][i]) for i in range(CONSTANT)})
    small = Shrink(plan).run(program).program
    batches = [(x, None), (torch.randn(3, 3, 9, 7).double(), None)]
    result = FoldMeans(analysis, plan, measure_means(analysis, batches)).run(small)
    assert (result.program(x) - program(x)).abs().max() < 1e-12


def test_another_plan_and_no_data_are_refused():
    x = torch.randn(4, 3).double()
    program, analysis, plan, small = prepared(Net(nn.Linear(8, 6), conv=False), x, [0])
    with pytest.raises(UsageError, match="no batches"):
        measure_means(analysis, [])
    nothing = FoldMeans(analysis, Plan(), measure_means(analysis, (x, None))).run(small)
    assert not nothing.modified
    assert folded(analysis, plan, program, x).program is not program


class Sequences(nn.Module):
    """A producer whose first channels are constant, and a recurrent layer."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.producer, self.layer = nn.Linear(3, 8), layer
        with torch.no_grad():
            self.producer.weight[:CONSTANT] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(F.elu(self.producer(x)))[0]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("both", [False, True])
def test_a_recurrent_layer_takes_constant_inputs_exactly(kind: type[nn.RNNBase], both: bool) -> None:
    x = torch.randn(6, 5, 3).double()
    program, analysis, plan, small = prepared(Sequences(kind(8, 4, batch_first=True, bidirectional=both)), x, [0, 2])
    result = folded(analysis, plan, small, x)
    assert result.facts == {"folded": 2 if both else 1, "skipped": 0, "skipped_at": []}
    with torch.no_grad():
        assert float((result.program(x) - program(x)).abs().max()) <= 1e-12


@pytest.mark.parametrize("reverse", [False, True])
def test_a_removed_hidden_unit_goes_into_the_recurrent_bias_on_the_average(reverse: bool) -> None:
    torch.manual_seed(0)

    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.RNN(3, 4, batch_first=True, bidirectional=True)
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x)[0])

    net = Read().double()
    suffix = "_l0_reverse" if reverse else "_l0"
    weights = {name: getattr(net.layer, name + suffix) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    with torch.no_grad():  # unit 1 is tanh(0.7) at every step
        weights["weight_ih"][1], weights["weight_hh"][1] = 0.0, 0.0
        weights["bias_ih"][1], weights["bias_hh"][1] = 0.7, 0.0
    program = capture(net.eval(), torch.randn(2, 5, 3).double())
    analysis = analyze(program)
    unit = int(analysis.params[f"layer.weight_hh{suffix}"][1][0][1])
    plan = Plan.of_units(analysis, {unit})
    small = Shrink(plan).run(program).program
    result = folded(analysis, plan, small, torch.randn(6, 5, 3).double())
    mean = torch.tanh(torch.tensor(0.7, dtype=torch.float64)) * 4 / 5  # the first of five steps reads zero
    kept = [0, 2, 3]
    expected = weights["bias_hh"][kept] + weights["weight_hh"][kept, 1] * mean
    assert float((result.program.tensor(f"layer.bias_hh{suffix}") - expected).detach().abs().max()) <= 1e-12
