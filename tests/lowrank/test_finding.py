"""Which layers are found, which are refused and why, and how factors of one layer are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from kfe_fx.errors import UsageError
from kfe_fx.frontend.capture import capture
from kfe_fx.lowrank.finding import find_layers
from kfe_fx.lowrank.layers import Found


class Mixed(nn.Module):
    """One layer of every kind that stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(4, 4, 3, padding=1)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.normed = parametrizations.weight_norm(nn.Linear(4, 4))
        self.table = nn.Linear(4, 4)
        self.product = nn.Parameter(torch.randn(4, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.up(self.grouped(torch.relu(self.plain(x))))).mean((2, 3))
        x = torch.tanh(self.table(self.normed(x)) + self.table.weight.sum(0))
        return F.log_softmax(self.head(torch.tanh(x @ self.product)), -1)


def found(module: nn.Module, *shape: int) -> Found:
    return find_layers(capture(module.double().eval(), torch.randn(2, *shape).double()))


def test_what_stays_says_why() -> None:
    result = found(Mixed(), 4, 5, 5)
    assert {layer.name: layer.last for layer in result.layers} == {"plain": False, "head": True}
    assert result.refused["grouped"].startswith("it has 2 groups")
    assert result.refused["up"].startswith("it is a transposed convolution")
    assert result.refused["normed"] == "its weight is computed in the network"
    assert result.refused["table"].startswith("its weight is also read by ")
    assert result.refused["product"].startswith("its weight is used by matmul")


def test_tied_transposes_stay() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.head = nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.linear(torch.tanh(self.one(x)), self.one.weight.t()))

    result = found(Tied(), 4)
    assert [layer.name for layer in result.layers] == ["head"]
    assert "its weight is" in result.refused["one"]


def chain(*layers: nn.Module) -> list[list[str]]:
    # an activation in front, a pooled head behind: the chain stands alone
    body = nn.Sequential(nn.Tanh(), *layers, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    return [[op.weight for op in layer.ops] for layer in found(body, 4, 6, 6).layers][:-1]


def pointwise(bias: bool = False, **options: int) -> nn.Conv2d:
    return nn.Conv2d(4, 4, 1, bias=bias, **options)  # type: ignore[arg-type]


def core(bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1, bias=bias)


def test_factors_are_known_by_how_they_are_connected() -> None:
    assert chain(pointwise(), core(), pointwise(bias=True)) == [["1.weight", "2.weight", "3.weight"]]
    assert chain(core(), pointwise()) == [["1.weight", "2.weight"]]
    assert chain(pointwise(), core(bias=True)) == [["1.weight", "2.weight"]]
    assert chain(pointwise(stride=2), pointwise()) == [["1.weight", "2.weight"]]


@pytest.mark.parametrize(
    "layers",
    [
        (pointwise(bias=True), core()),  # a bias in between
        (core(bias=True), pointwise()),
        (pointwise(stride=2), core()),  # positions left out before the kernel
        (pointwise(padding=1), core()),
        (core(), pointwise(stride=2)),
        (core(), nn.ReLU(), pointwise()),
        (core(), core()),
    ],
)
def test_what_is_no_matrix_at_each_position_is_a_layer_of_its_own(layers: tuple[nn.Module, ...]) -> None:
    assert all(len(weights) == 1 for weights in chain(*layers))


def test_a_value_that_others_read_is_no_factor() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other, self.head = pointwise(), core(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x)
            return self.head(torch.tanh(self.other(y) + y).mean((2, 3)))

    assert [layer.name for layer in found(Skip(), 4, 5, 5).layers] == ["one", "other", "head"]


def test_three_matrices_are_a_pair_and_one_more() -> None:
    assert chain(pointwise(), pointwise(), pointwise()) == [["1.weight", "2.weight"], ["3.weight"]]


def test_globs_mean_layers_by_name_module_and_weight() -> None:
    result = found(Mixed(), 4, 5, 5)
    assert [layer.name for layer in result.matching("plain").layers] == ["plain"]
    assert [layer.name for layer in result.matching("*.weight").layers] == ["plain", "head"]
    assert list(result.matching("gr*").refused) == ["grouped"]
    with pytest.raises(UsageError, match="layers='stem\\.\\*' matches no layer"):
        result.matching("stem.*")
