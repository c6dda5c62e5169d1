"""Which dim of an activation counts the examples, where a gate needs to know it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfe_fx.frontend.capture import capture
from kfe_fx.labels.analysis import Analysis, analyze
from kfe_fx.labels.sites import GateSite


class Two(nn.Module):
    """Two linear layers around whatever a subclass does to the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 4), nn.Linear(4, 2)

    def arrange(self, x: Tensor) -> Tensor:
        return x

    def restore(self, y: Tensor, x: Tensor) -> Tensor:
        return y

    def forward(self, x: Tensor) -> Tensor:
        return self.restore(self.down(F.relu(self.up(self.arrange(x)))), x)


class TimeMajor(Two):
    def arrange(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1)

    def restore(self, y: Tensor, x: Tensor) -> Tensor:
        return y.transpose(0, 1)


class Folded(Two):
    """The tokens of an example lie together."""

    def arrange(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 3)

    def restore(self, y: Tensor, x: Tensor) -> Tensor:
        return y.reshape(x.shape[0], x.shape[1], 2)


class FoldedTimeMajor(Two):
    """The examples of a token lie together."""

    def arrange(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1).reshape(-1, 3)

    def restore(self, y: Tensor, x: Tensor) -> Tensor:
        return y.reshape(x.shape[1], x.shape[0], 2).transpose(0, 1)


class Summed(Two):
    """Before the layers the batch is gone."""

    def arrange(self, x: Tensor) -> Tensor:
        return x.sum(0)

    def restore(self, y: Tensor, x: Tensor) -> Tensor:
        return y + x.sum(-1, keepdim=True)


def gate_of(net: nn.Module, *shape: int) -> tuple[GateSite, Analysis]:
    analysis = analyze(capture(net, torch.randn(*shape)))
    (site,) = analysis.gate_sites
    return site, analysis


@pytest.mark.parametrize(
    ("net", "dim", "layout", "channel"),
    [
        (Two, 0, "plain", 2),
        (TimeMajor, 1, "plain", 2),
        (Folded, 0, "outer", 1),
        (FoldedTimeMajor, 0, "inner", 1),
        (Summed, None, None, 1),
    ],
)
def test_the_dim_that_counts_examples(net: type[Two], dim: int | None, layout: str | None, channel: int) -> None:
    site, analysis = gate_of(net(), 2, 5, 3)
    assert (site.example_dim, site.example_layout, site.dim) == (dim, layout, channel)
    assert site.units.tolist() == [0, 1, 2, 3]
    assert len(analysis.units) == 4


@pytest.mark.parametrize("net", [Folded, FoldedTimeMajor])
def test_the_layout_is_where_one_example_reaches(net: type[Two]) -> None:
    """Change example 1 and see which rows of the activation change: they must be those that the layout names."""
    module = net()
    site, _ = gate_of(module, 2, 5, 3)
    batch, tokens = 3, 5
    x = torch.randn(batch, tokens, 3)
    other = x.clone()
    other[1] += 1.0
    seen = [module.up(module.arrange(given)) for given in (x, other)]
    changed = (seen[0] != seen[1]).any(1).nonzero().flatten().tolist()
    outer, inner = list(range(tokens, 2 * tokens)), list(range(1, batch * tokens, batch))
    assert changed == {"outer": outer, "inner": inner}[site.example_layout or ""]


def test_a_gate_stands_behind_the_norm_that_follows() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    site, analysis = gate_of(net, 2, 3, 4, 4)
    nodes = {node.name: str(node.target) for node in analysis.program.graphs["eval"].nodes}
    assert nodes[site.node] == "aten.batch_norm.default"
    assert [nodes[each.node] for each in analysis.sites] == ["aten.conv2d.default"]
    assert (site.example_dim, site.example_layout, site.dim) == (0, "plain", 1)


def test_a_gate_stays_at_its_mint_where_two_read_it() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm, self.down = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x)
            return self.down(self.norm(y) + y)

    site, analysis = gate_of(Branches().eval(), 2, 3, 4, 4)
    assert site.node == analysis.sites[0].node


def test_an_input_whose_name_is_taken_in_the_graph_still_counts_examples() -> None:
    class Named(Two):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input)

    site, _ = gate_of(Named(), 2, 5, 3)
    assert (site.example_dim, site.example_layout) == (0, "plain")


class MixedWithTheBatch(nn.Module):
    """Channels and examples trade places, so that what is kept would depend on the batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 6), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return self.down(y.reshape(3, -1).transpose(0, 1).reshape(-1, 2))


class PickedWithTheBatch(nn.Module):
    """Every fifth of all examples' channels: which ones those are depends on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 6), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(x) + F.relu(self.up(x)).reshape(-1)[::5].sum()


class RolledWithTheBatch(nn.Module):
    """The last channel of an example becomes the first of the next."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.scale, self.down = nn.Linear(3, 6), nn.Parameter(torch.randn(6)), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).reshape(-1).roll(1).reshape(-1, 6) * self.scale)


@pytest.mark.parametrize("net", [MixedWithTheBatch, PickedWithTheBatch, RolledWithTheBatch])
def test_units_that_mix_with_the_batch_are_frozen(net: type[nn.Module]) -> None:
    analysis = analyze(capture(net(), torch.randn(2, 3)))
    assert analysis.units == []


def test_a_fold_that_keeps_examples_apart_freezes_nothing() -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(3, 6), nn.Linear(6, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.relu(self.up(x).reshape(-1)).reshape(-1, 6))

    assert len(analyze(capture(Apart(), torch.randn(2, 3))).units) == 6
