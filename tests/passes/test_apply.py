"""A plan applied to the original nn.Module: the layers shrink in place and compute what the shrunk Program computes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfe_fx.errors import PlanError, UsageError
from kfe_fx.frontend.capture import capture
from kfe_fx.labels.analysis import analyze
from kfe_fx.passes.apply import apply
from kfe_fx.passes.shrink import Shrink
from kfe_fx.plan import Plan


def halved(module: nn.Module, x: Tensor, heads: str = "auto") -> Plan:
    """Plan to remove every other unit of each group."""
    analysis = analyze(capture(module, x), heads=heads)
    removed = [unit for group in analysis.groups for unit in group.units[: len(group.units) // 2 * 2 : 2]]
    assert removed
    return Plan.of_units(analysis, removed, heads=heads)


def shaken(module: nn.Module) -> nn.Module:
    """Give all tensors other values, so that a slice from the wrong place shows."""
    torch.manual_seed(0)
    module = module.double()
    with torch.no_grad():
        for value in module.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) + 0.1)
    return module


def surgery(module: nn.Module, x: Tensor) -> tuple[Any, Any]:
    """Apply the plan to the module and to its Program; compare shapes and outputs at another batch size."""
    module = shaken(module).eval()
    plan = halved(module, x)
    small, program = apply(plan, module, x), Shrink(plan).run(capture(module, x)).program
    assert type(small) is type(module)
    state = small.state_dict()
    for name, value in program.state_dict().items():
        assert torch.equal(state[name], value), name
    other = torch.cat([x, x + 1, x - 1])
    torch.testing.assert_close(small(other), program(other), rtol=0, atol=1e-10)
    return small, module


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.up, self.down = nn.Conv2d(4, 6, 1), nn.ConvTranspose2d(6, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.head((x + self.down(torch.relu(self.up(x)))).mean((2, 3)))


IMAGE = torch.randn(2, 3, 4, 4, dtype=torch.float64)


def test_convolutions_with_a_residual_stream() -> None:
    small, module = surgery(Residual(), IMAGE)
    assert (small.stem.in_channels, small.stem.out_channels) == (3, 2)
    assert (small.up.in_channels, small.up.out_channels) == (2, 3)
    assert (small.down.in_channels, small.down.out_channels) == (3, 2)
    assert small.norm.num_features == 2
    assert (small.head.in_features, small.head.out_features) == (2, 2)
    assert (module.stem.out_channels, module.norm.num_features) == (4, 4)


def test_depthwise_convolutions() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, groups=4), nn.ReLU(), nn.Conv2d(8, 2, 1))
    small, _ = surgery(net, IMAGE)
    assert (small[1].in_channels, small[1].out_channels, small[1].groups) == (2, 4, 2)


def test_grouped_convolutions_that_lose_positions_keep_their_groups() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=2), nn.ReLU(), nn.Conv2d(8, 2, 1))
    small, _ = surgery(net, IMAGE)
    assert (small[1].in_channels, small[1].out_channels, small[1].groups) == (4, 4, 2)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(torch.relu(self.one(self.stem(x)))))


def test_tied_weights_stay_tied() -> None:
    small, module = surgery(Tied(), torch.randn(2, 3, dtype=torch.float64))
    assert small.two.weight is small.one.weight
    assert small.one.weight.shape == (2, 2)
    assert module.one.weight.shape == (4, 4)
    assert module.two.weight is module.one.weight


@pytest.mark.parametrize(
    ("norm", "attribute", "wanted"),
    [
        (nn.GroupNorm(4, 8), "num_groups", 2),  # whole groups go
        (nn.GroupNorm(1, 8), "num_groups", 1),  # the only group loses channels
        (nn.GroupNorm(4, 8, affine=False), "num_groups", 2),
        (nn.InstanceNorm2d(8, affine=True), "num_features", 4),
        (nn.BatchNorm2d(8, affine=False), "num_features", 4),
    ],
)
def test_norms_of_channels(norm: nn.Module, attribute: str, wanted: int) -> None:
    small, _ = surgery(nn.Sequential(nn.Conv2d(3, 8, 1), norm, nn.ReLU(), nn.Conv2d(8, 2, 1)), IMAGE)
    assert getattr(small[1], attribute) == wanted
    assert getattr(small[1], "num_channels", 4) == 4


def test_a_group_norm_that_loses_positions_keeps_its_groups() -> None:
    # the grouped convolution ties position p of both groups, so the norm cannot lose whole groups
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=2), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 2, 1)
    )
    small, _ = surgery(net, IMAGE)
    assert (small[2].num_groups, small[2].num_channels) == (2, 4)


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(6),
        nn.LayerNorm(6, elementwise_affine=False),
        nn.RMSNorm(6),
        nn.RMSNorm(6, elementwise_affine=False),
    ],
)
def test_norms_over_features(norm: nn.Module) -> None:
    small, _ = surgery(nn.Sequential(nn.Linear(3, 6), norm, nn.Linear(6, 2)), torch.randn(2, 3, dtype=torch.float64))
    assert small[1].normalized_shape == (3,)


def test_embeddings() -> None:
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2)).double()
    x = torch.randint(0, 5, (2, 3))
    small = apply(halved(net, x), net, x)
    assert (small[0].num_embeddings, small[0].embedding_dim) == (5, 2)
    assert small(x).shape == (2, 3, 2)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_of_a_class_of_their_own(kind: type[nn.RNNBase]) -> None:
    own = type("Own", (kind,), {})

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = own(3, 6, batch_first=True), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x)[0])

    small, _ = surgery(Net(), torch.randn(2, 5, 3, dtype=torch.float64))
    assert type(small.layer) is own
    assert (small.layer.input_size, small.layer.hidden_size) == (3, 3)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_of_a_class_of_their_own(kind: type[nn.RNNCellBase]) -> None:
    own = type("Own", (kind,), {})

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = own(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            state: Any = None
            for step in x.unbind(1):
                state = self.cell(step, state)
            return self.head(state[0] if isinstance(state, tuple) else state)

    small, _ = surgery(Net(), torch.randn(2, 4, 3, dtype=torch.float64))
    assert (small.cell.input_size, small.cell.hidden_size) == (3, 3)


def test_buffers_and_flags_come_along() -> None:
    class Scaled(nn.Module):
        scale: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(3, 4), nn.Linear(4, 1)
            self.register_buffer("scale", torch.rand(4), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x) * self.scale)

    net = Scaled().double().train()
    net.up.weight.requires_grad_(False)
    x = torch.randn(2, 3, dtype=torch.float64)
    small = apply(halved(net, x), net, x)
    assert small.scale.shape == (2,)
    assert "scale" not in small.state_dict()
    assert not small.up.weight.requires_grad
    assert small.down.weight.requires_grad
    assert small.training


def test_the_module_is_not_touched() -> None:
    net = shaken(Residual()).train()
    before = copy.deepcopy(net.state_dict())
    apply(halved(net, IMAGE), net, IMAGE)
    assert net.training
    assert net.stem.out_channels == 4
    for name, value in before.items():
        assert torch.equal(net.state_dict()[name], value), name


class HardCoded(nn.Module):
    """Its own code says how wide it is."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.up, self.down = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        if self.how == "view":
            y = y.reshape(-1, 4)
        elif self.how == "scale":
            y = y / y.shape[1]
        elif self.how == "slice":
            y = torch.cat([y[:, 2:], y[:, :2]], 1)
        return self.down(y)


@pytest.mark.parametrize("how", ["view", "scale", "slice"])
def test_a_width_in_the_modules_own_code_is_refused(how: str) -> None:
    net, x = shaken(HardCoded(how)), torch.randn(2, 3, dtype=torch.float64)
    plan = halved(net, x)
    with pytest.raises(PlanError, match="code holds a width") as raised:
        apply(plan, net, x)
    assert "\n" not in str(raised.value)
    assert "result.module()" in str(raised.value)
    assert net.up.out_features == 4


def test_a_program_is_shrunk() -> None:
    net = shaken(Residual()).eval()
    program = capture(net, IMAGE)
    plan = halved(net, IMAGE)
    small, expected = apply(plan, program), Shrink(plan).run(program).program
    assert small.hash() == expected.hash()
    torch.testing.assert_close(small(IMAGE), expected(IMAGE), rtol=0, atol=0)


def test_an_empty_plan_gives_an_equal_copy() -> None:
    net = shaken(Residual()).eval()
    twin = apply(Plan(), net, IMAGE)
    assert twin is not net
    torch.testing.assert_close(twin(IMAGE), net(IMAGE), rtol=0, atol=0)


def test_what_cannot_be_applied_to_is_refused() -> None:
    with pytest.raises(UsageError, match="example_inputs are needed"):
        apply(Plan(), nn.Linear(2, 2))
    with pytest.raises(UsageError, match="got str"):
        apply(Plan(), "net.pt")  # type: ignore[type-var]
