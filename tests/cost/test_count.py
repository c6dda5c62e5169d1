"""Counts of dense and shrunk networks against PyTorch's own counters on networks built that small."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.cost.nets import Attention, Case, ConvNet, attention_case, case, conv_case


def macs_of(module: nn.Module, inputs: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval()(inputs[:1])
    return counter.get_total_flops() // 2


def parameters_of(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def check(made: Case, removed: set[int], built: nn.Module) -> None:
    assert made.model.macs(removed) == macs_of(built, made.inputs)
    assert made.model.parameters(removed) == parameters_of(built)
    tensors = [*built.parameters(), *built.buffers()]
    assert made.model.weight_bytes(removed) == sum(t.numel() * t.element_size() for t in tensors)


def test_convolutions_dense():
    check(conv_case(), set(), ConvNet())


def test_convolutions_shrunk():
    made = conv_case()
    removed = {*made.units_of("stem.weight", 5), *made.units_of("expand.weight", 7)}
    check(made, removed, ConvNet(stem=27, hidden=41))


def test_masks_and_sets_say_the_same():
    made = conv_case()
    removed = made.units_of("stem.weight", 5)
    assert made.model.macs(made.model.widths.mask(removed)) == made.model.macs(removed)


def test_attention_dense():
    check(attention_case(), set(), Attention())


def test_attention_shrunk():
    made = attention_case()
    removed = {*made.units_of("embed.weight", 5), *made.units_of("up.weight", 9), *made.units_of("q.weight", 1)}
    check(made, removed, Attention(model=27, feed=55, heads=3))


def test_sizes_of_nodes_and_tensors():
    made = attention_case()
    removed = made.units_of("q.weight", 1)
    assert made.model.size("q.weight", 0, removed) == 48
    assert made.model.size("q.weight", 1, removed) == 32
    einsum = next(node.name for node in made.model.graph.nodes if "einsum" in node.name)
    assert [made.model.size(einsum, dim, removed) for dim in range(4)] == [1, 7, 3, 16]
    assert made.model.size("out.weight", 1, removed) == 48


class Products(nn.Module):
    """Every other way to contract."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, 4))
        self.first = nn.Conv1d(3, 8, 3)
        self.volume = nn.ConvTranspose1d(8, 4, 3, 2, groups=2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # [N, 3, 12]
        y = self.first(x)  # [N, 8, 10]
        rows = y.transpose(1, 2)  # [N, 10, 8]
        return (
            rows @ self.table,
            torch.bmm(y, rows),
            torch.addmm(torch.zeros(4), rows[:, 0], self.table),
            torch.baddbmm(torch.zeros(1), y, rows),
            torch.einsum("...ij,jk->...ik", rows, self.table),
            torch.einsum("bij,bjk->ik", y, rows),
            F.scaled_dot_product_attention(rows[:, None], rows[:, None], rows[:, None], attn_mask=torch.ones(10, 10)),
            self.volume(y),
        )


def test_every_other_contraction():
    torch.manual_seed(0)
    made = case(Products(), torch.randn(2, 3, 12))
    by_kind: dict[str, int] = {}
    for term in made.model.mac_cost.terms():
        node = next(node for node in made.model.graph.nodes if node.name == term.owner)
        kind = str(node.target).removeprefix("aten.").split(".")[0]
        by_kind[kind] = by_kind.get(kind, 0) + int(term.cost(made.model.widths.dense))
    # PyTorch's counter does not see the fused attention of the CPU: all by hand
    assert by_kind == {
        "conv1d": 8 * 10 * 3 * 3,
        "matmul": 10 * 8 * 4,
        "bmm": 8 * 8 * 10,
        "addmm": 8 * 4,
        "baddbmm": 8 * 8 * 10,
        "einsum": 10 * 8 * 4 + 8 * 10 * 8,
        "scaled_dot_product_attention": 2 * 10 * 10 * 8,
        "conv_transpose1d": 8 * 10 * 2 * 3,
    }


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(10, 100), nn.Linear(100, 20), nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(torch.relu(self.a(x)).view(-1, 10, 10).flatten(1)))


def test_memory_is_the_peak_of_what_is_alive():
    made = case(Branches(), torch.randn(2, 10))
    # the activation, its relu, nothing else; views take nothing
    assert made.model.memory() == 4 * (100 + 100)
    smaller = case(nn.Sequential(nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 50), nn.Linear(50, 2)), torch.randn(2, 10))
    assert smaller.model.memory() == 4 * (6 + 50)
    assert smaller.model.memory(smaller.units_of("2.weight", 20)) == 4 * (30 + 6)
    smooth = smaller.model.memory_cost.smooth(())
    assert smaller.model.memory() <= smooth <= 1.3 * smaller.model.memory()


def test_a_skip_stays_alive():
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(10, 40), nn.Linear(40, 10)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.relu(self.up(x)))

    made = case(Skip(), torch.randn(2, 10))
    assert made.model.memory() == 4 * (10 + 40 + 40)
    assert made.model.memory(made.units_of("up.weight", 30)) == 4 * (10 + 10 + 10)


def test_tied_parameters_count_once():
    made = conv_case()
    names = [term.owner for term in made.model.parameter_cost.terms()]
    assert "head.bias" in names
    assert "again.bias" not in names


@pytest.mark.parametrize("made", [conv_case, attention_case])
def test_removing_more_never_costs_more(made):
    model, units = made().model, range(len(made().analysis.units))
    floors = set().union(*made().analysis.floors) if made().analysis.floors else set()
    order = [u for u in units if u not in floors][:20] or list(units)[:20]
    for count in range(len(order)):
        more, less = order[: count + 1], order[:count]
        assert model.macs(more) <= model.macs(less)
        assert model.parameters(more) < model.parameters(less)
        assert model.memory(more) <= model.memory(less)
