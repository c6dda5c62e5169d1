"""Which dim counts the examples: at the inputs, in the middle, and where nobody can tell."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfe_fx
from kfe_fx.curvature import find_blocks, fit
from kfe_fx.curvature.layout import Layout
from kfe_fx.errors import BadData
from kfe_fx.program import Program
from kfe_fx.training.losses import Loss
from tests.curvature.nets import N, Net, randn, tokens
from tests.curvature.oracle import LOSS, check, check_claims, check_store, measured, square, targets_of


def layouts(function: Any, *inputs: Tensor, axes: Any = None) -> list[Layout | None]:
    """Return where the inputs of each linear layer hold the examples."""
    net = Net(function, layer=nn.Linear(4, 4)).double().eval()
    (block,) = find_blocks(kfe_fx.capture(net, inputs, axes)).blocks
    sites = (use.site for use in block.uses["eval"])
    return [site.layouts[site.pairing.data.name] for site in sites if site.pairing is not None]


@pytest.mark.parametrize(
    ("function", "shape", "expected"),
    [
        (lambda m, x: m.layer(x), (N, 4), Layout(0, "plain")),
        (lambda m, x: m.layer(x.transpose(0, 1)), (N, 5, 4), Layout(1, "plain")),
        (lambda m, x: m.layer(x.flatten(0, 1)).unflatten(0, (-1, 5)), (N, 5, 4), Layout(0, "outer")),
        (lambda m, x: m.layer(x.transpose(0, 1).flatten(0, 1)), (N, 5, 4), Layout(0, "inner")),
        (lambda m, x: m.layer(torch.cat([x, 2 * x])), (N, 4), Layout(0, "inner")),
        (lambda m, x: m.layer(x.repeat_interleave(2, 0)), (N, 4), Layout(0, "outer")),
        (lambda m, x: m.layer(F.glu(x)), (N, 8), Layout(0, "plain")),
        (lambda m, x: m.layer(x.cumsum(1)), (N, 4), Layout(0, "plain")),
        (lambda m, x: m.layer(x[torch.arange(x.shape[0]), x.argmax(1)[:, 0]]), (N, 5, 4), Layout(0, "plain")),
        (lambda m, x: m.layer(x - x.mean(0)), (N, 4), Layout(0, "plain")),
        (lambda m, x: m.layer(x.mean(0)), (N, 5, 4), None),
        (lambda m, x: m.layer(x.flip(0)), (N, 4), None),
        (lambda m, x: m.layer(x.sort(0).values), (N, 4), None),
        (lambda m, x: m.layer(x.permute(1, 0, 2, 3).flatten(0, 2)), (N, 2, 3, 4), None),
    ],
)
def test_the_examples_are_followed_node_by_node(function: Any, shape: tuple[int, ...], expected: Layout | None) -> None:
    assert layouts(function, randn(*shape)) == [expected]


def test_what_one_operation_loses_is_lost_there_alone() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.layer(x) + m.layer(x.flip(0)) + m.layer(x * x)

    assert layouts(forward, randn(N, 4)) == [Layout(0, "plain"), None, Layout(0, "plain")]


@pytest.mark.parametrize(
    ("axes", "dims"),
    [
        ({0: "batch"}, 0),
        ({1: "batch"}, 1),
        ({0: "time", 1: "batch"}, 1),
        ({0: "L", 1: "N"}, 1),
        ({0: "b", 1: "n"}, 0),
        ({0: "time", 1: "Batch_size"}, 1),
        ({0: "rows", 1: "time"}, 0),
        ({1: "time"}, None),
    ],
)
def test_the_name_of_an_axis_tells_what_counts_examples(axes: dict[int, str], dims: int | None) -> None:
    net = Net(lambda m, x: m.layer(x), layer=nn.Linear(4, 2)).double()
    program = kfe_fx.capture(net, randn(5, N, 4), {"inputs_0": axes})
    assert program.example_dims() == ({} if dims is None else {"inputs_0": dims})
    assert program.batch_axes() == (set() if dims is None else {axes[dims]})


def test_an_input_that_is_the_same_for_all_examples_has_none() -> None:
    net = Net(lambda m, x, table: m.layer(x) @ table.T, layer=nn.Linear(4, 4)).double()
    program = kfe_fx.capture(net, (randn(N, 4), randn(5, 4)), {"inputs_0": {0: "batch"}, "inputs_1": {0: "rows"}})
    assert program.example_dims() == {"inputs_0": 0}
    inputs = randn(N, 4), randn(7, 4, seed=1)
    check(program, inputs, N)


# a network whose input is time-major ---------------------------------------------------------------------------------


class TimeMajor(nn.Module):
    """Attention over [T, B, D], and a vector per example."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mha, self.head = nn.Linear(4, 4), nn.MultiheadAttention(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor, start: Tensor) -> Tensor:
        y = torch.tanh(self.first(x)) + start
        return self.head(self.mha(y, y, y)[0].mean(0))


def time_major() -> tuple[Program, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    inputs = randn(5, N, 4), randn(N, 4, seed=1)
    axes = {"x": {0: "time", 1: "batch"}, "start": {0: "batch"}}
    return kfe_fx.capture(TimeMajor().double().eval(), inputs, axes), inputs


def test_a_time_major_network_is_measured_right() -> None:
    program, inputs = time_major()
    _, blocks, store = check(program, inputs, N)
    assert all(block.batched["eval"] for block in blocks.blocks)
    whole = fit(program, (inputs, targets_of(N)), LOSS, source="empirical", statistics="diagonal", batch_size=2)
    for name, block in store.blocks.items():
        torch.testing.assert_close(whole.blocks[name].D, block.D, rtol=1e-9, atol=1e-15)


def test_examples_that_come_first_are_put_where_the_network_has_them() -> None:
    program, (x, start) = time_major()
    store = measured(program, (x, start), targets_of(N))
    data = kfe_fx.data.ArrayData((x.movedim(1, 0), start), targets_of(N))
    again = fit(program, data, LOSS, source="empirical", statistics="diagonal", batch_size=2)
    for name, block in store.blocks.items():
        torch.testing.assert_close(again.blocks[name].D, block.D, rtol=1e-9, atol=1e-15)


def test_outputs_may_be_time_major_too() -> None:
    net = Net(lambda m, x: m.second(torch.tanh(m.first(x))), first=nn.Linear(4, 3), second=nn.Linear(3, 2)).double()
    program = kfe_fx.capture(net, randn(5, N, 4), {"inputs_0": {0: "time", 1: "batch"}})
    last = Loss("last", lambda outs, targets: square(outs.transpose(0, 1), targets), "none")
    one = fit(program, [(randn(5, N, 4), targets_of(N))], last, source="empirical", statistics="diagonal")
    first = kfe_fx.capture(net, randn(N, 5, 4))
    other = fit(
        first, [(randn(5, N, 4).transpose(0, 1), targets_of(N))], LOSS, source="empirical", statistics="diagonal"
    )
    for name, block in one.blocks.items():
        torch.testing.assert_close(block.D, other.blocks[name].D, rtol=1e-9, atol=1e-15)


# a network that pins its batch ---------------------------------------------------------------------------------------


def whole_batch(program: Program, x: Tensor) -> dict[str, Tensor]:
    """Return the gradient of each example's loss with the whole batch present."""
    parameters = dict(program.module().named_parameters())
    losses = square(program(x), targets_of(N))
    rows = [torch.autograd.grad(one, list(parameters.values()), retain_graph=True) for one in losses]
    return {name: torch.stack([row[place] for row in rows]) for place, name in enumerate(parameters)}


@pytest.mark.parametrize(("turns", "batched"), [(0, True), (1, False)])
def test_a_network_that_pins_its_batch_is_measured_with_the_whole_of_it(turns: int, batched: bool) -> None:
    net = Net(
        lambda m, x: m.second(torch.tanh(m.first(x.view(3, 4).roll(turns, 0)))).roll(-turns, 0),
        first=nn.Linear(4, 3),
        second=nn.Linear(3, 2),
    ).double()
    x = randn(N, 4)
    program = kfe_fx.capture(net, x)
    assert not program.axes
    blocks = find_blocks(program)
    assert all(block.batched["eval"] == batched for block in blocks.blocks)
    truth = whole_batch(program, x)
    check_claims(program, blocks, truth)
    store = measured(program, (x,), targets_of(N), blocks=blocks)
    check_store(store, blocks, truth)
    assert store.facts["examples"] == N


def test_examples_that_are_mixed_are_taken_one_at_a_time() -> None:
    net = Net(
        lambda m, x: m.layer(x.permute(1, 0, 2, 3).flatten(0, 2)).view(2, -1, 3, 4).transpose(0, 1),
        layer=nn.Linear(4, 4),
    )
    _, blocks, _ = check(net.double(), randn(N, 2, 3, 4), N)
    assert not any(block.batched["eval"] for block in blocks.blocks)


def test_examples_that_see_each_other_are_measured_row_by_row() -> None:
    """With a norm over the batch g_n is the total derivative through the rows of example n (of all losses)."""
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Tanh(), nn.Linear(5, 2))
    net = net.double().eval()
    x = randn(6, 4)
    targets = targets_of(6)
    program = kfe_fx.capture(net, x)
    store = measured(program, (x,), targets)
    norm = net[1]
    own = {
        name: value.detach().expand(6, *value.shape).clone().requires_grad_() for name, value in net.named_parameters()
    }  # a copy of each parameter for each example
    y = torch.einsum("noi,ni->no", own["0.weight"], x) + own["0.bias"]
    y = F.batch_norm(y, None, None, training=True, eps=norm.eps) * own["1.weight"] + own["1.bias"]
    y = torch.einsum("noi,ni->no", own["3.weight"], torch.tanh(y)) + own["3.bias"]
    torch.testing.assert_close(y, net(x))
    square(y, targets).sum().backward()
    check_store(store, find_blocks(program), {name: value.grad for name, value in own.items()})


def test_sizes_of_what_is_computed_are_followed() -> None:
    """A size may be taken of an activation: positions that are cut to the length a convolution leaves."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x).transpose(1, 2)
        return m.out(torch.tanh(y + m.place(torch.arange(y.shape[1]))))

    net = Net(forward, conv=nn.Conv1d(2, 4, 2, stride=2), place=nn.Embedding(9, 4), out=nn.Linear(4, 2)).double()
    program = kfe_fx.capture(net, randn(N, 2, 8), {"inputs_0": {0: "batch", 2: "time"}})
    check(program, (randn(N, 2, 6),), N)
    graph = program.graphs["eval"]
    nodes = {node.name: node for node in graph.nodes}
    with graph.inserting_after(nodes["conv1d"]):
        size = graph.call_function(torch.ops.aten.sym_size.int, (nodes["conv1d"], 2))
    nodes["floordiv"].replace_all_uses_with(size)
    graph.erase_node(nodes["floordiv"])
    position = nodes["arange"]
    nodes["conv1d"].append(size)
    size.append(position)
    position.append(nodes["embedding"])
    graph.lint()
    program.module().recompile()
    _, blocks, _ = check(program, (randn(N, 2, 6),), N)
    assert {block.weight: block.kind for block in blocks.blocks}["place.weight"] == "diagonal"
    assert all(block.batched["eval"] for block in blocks.blocks)


# layouts themselves --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["plain", "outer", "inner"])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_rows_bring_the_examples_to_the_front(order: str, dim: int) -> None:
    k = 1 if order == "plain" else 2
    shape = [4, 5, 6]
    shape[dim] = N * k
    index = torch.arange(N).repeat_interleave(k) if order == "outer" else torch.arange(N).repeat(k)
    value = index.view([-1 if place == dim else 1 for place in range(3)]).expand(shape)
    found = Layout(dim, order).rows(value, N)
    assert found.shape == (N, *([] if k == 1 else [k]), *(size for place, size in enumerate(shape) if place != dim))
    assert all((found[n] == n).all() for n in range(N))


def test_rows_of_another_number_of_examples_are_refused() -> None:
    for layout in (Layout(0, "plain"), Layout(0, "outer"), Layout(0, "inner")):
        with pytest.raises(BadData, match="does not hold 3 examples along dim 0"):
            layout.rows(torch.zeros(4, 2), 3)


def test_tokens_and_a_mask_of_them() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        mask = (x != 0).unsqueeze(-1)
        y = m.layer(m.table(x)) * mask
        return y.sum(1) / mask.sum(1).clamp(min=1)

    _, blocks, _ = check(Net(forward, table=nn.Embedding(7, 4), layer=nn.Linear(4, 3)).double(), tokens(N, 5), N)
    assert all(block.batched["eval"] for block in blocks.blocks)
