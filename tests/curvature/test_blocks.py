"""Blocks: each entry of each parameter is claimed once, or is named with the reason why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfe_fx
from kfe_fx import taps
from kfe_fx.curvature import Blocks, find_blocks
from kfe_fx.program import Program
from tests.curvature.nets import CASES, N, Net, built, randn
from tests.curvature.oracle import check, check_claims


def blocks_of(name: str) -> tuple[Program, Blocks]:
    net, inputs = built(CASES[name])
    program = kfe_fx.capture(net, inputs)
    return program, find_blocks(program)


def left_out(net: nn.Module, *inputs: Tensor) -> dict[str, str]:
    program = kfe_fx.capture(net.double().eval(), inputs)
    blocks = find_blocks(program)
    check_claims(program, blocks, {})
    return {item.parameter: item.reason for item in blocks.left_out}


def test_a_packed_weight_has_a_block_for_each_part_in_both_modes() -> None:
    program, blocks = blocks_of("cross attention")
    assert set(program.graphs) == {"eval", "train"}
    told = {block.name: (block.shape, block.bias) for block in blocks.blocks}
    assert told == {
        "mha.in_proj_weight[0:4]": ((1, 4, 5), "mha.in_proj_bias"),
        "mha.in_proj_weight[4:12]": ((1, 8, 5), "mha.in_proj_bias"),
        "mha.out_proj.weight": ((1, 4, 5), "mha.out_proj.bias"),
    }
    assert all(
        {mode: len(uses) for mode, uses in block.uses.items()} == {"eval": 1, "train": 1} for block in blocks.blocks
    )


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("grouped", {"weight": (2, 3, 19)}),
        ("depthwise", {"weight": (4, 1, 10)}),
        ("transposed conv2d", {"weight": (2, 2, 18), "bias": (1, 1, 6)}),
        ("called twice", {"layer.weight": (1, 4, 5), "head.weight": (1, 2, 5)}),
        ("tied embedding and head with a bias", {"embedding.weight": (1, 7, 5), "body.weight": (1, 4, 5)}),
        ("tied autoencoder", {"up": (1, 1, 4), "down.weight": (1, 3, 5)}),
        ("tied conv and transposed conv", {"weight": (1, 3, 5), "deep": (1, 1, 2)}),
        ("addmm", {"weight": (1, 3, 5)}),
        ("einsum", {"a": (1, 6, 4), "b": (1, 2, 6)}),
        ("experts", {"bias": (1, 1, 6), "up": (1, 6, 4), "down": (3, 2, 10)}),
        ("parameter on the left", {"mix": (1, 3, 5), "vector": (1, 1, 4)}),
        ("part of a weight", {"weight": (1, 3, 4)}),
    ],
)
def test_blocks_are_matrices_of_inputs_and_outputs(name: str, shapes: dict[str, tuple[int, int, int]]) -> None:
    _, blocks = blocks_of(name)
    assert {block.weight: block.shape for block in blocks.blocks} == shapes


PLAIN = [
    "linear on vectors",
    "grouped",
    "tied embedding and head",
    "tied autoencoder",
    "addmm",
    "self attention",
    "einsum",
]


@pytest.mark.parametrize("name", PLAIN)
def test_no_index_is_kept_of_a_weight_that_is_used_as_it_stands(name: str) -> None:
    _, blocks = blocks_of(name)
    assert all(block.entries is None and block.bias_entries is None for block in blocks.blocks)


@pytest.mark.parametrize(
    "name", ["a packed weight", "grouped", "addmm", "einsum", "transposed conv2d", "tied autoencoder"]
)
def test_what_is_put_is_what_was_gathered(name: str) -> None:
    program, blocks = blocks_of(name)
    before = {key: value.detach().clone() for key, value in program.module().named_parameters()}
    after = {key: torch.zeros_like(value) for key, value in before.items()}
    for block in blocks.blocks:
        matrix = block.matrix(before)
        assert matrix.shape == block.shape
        block.put(matrix, after)
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", ["cross attention", "tied embedding and head", "class token", "weight norm"])
def test_blocks_of_a_tapped_network_are_those_of_the_network(name: str) -> None:
    program, blocks = blocks_of(name)
    before = program.hash()
    twin = program.copy()
    for mode, graph in twin.graphs.items():
        taps.insert(graph, blocks.taps(mode))
    again = find_blocks(twin)
    assert [(b.name, b.shape, b.bias, b.kind) for b in again.blocks] == [
        (b.name, b.shape, b.bias, b.kind) for b in blocks.blocks
    ]
    assert all(again.taps(mode) == blocks.taps(mode) for mode in program.graphs)
    assert program.hash() == before


class Odd(nn.Module):
    """Parameters that no statistics exist for."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.unused = nn.Parameter(torch.randn(2))
        self.phase = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.places = nn.Parameter(torch.arange(3), requires_grad=False)
        self.scale = nn.Parameter(torch.randn(()))
        self.limit = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layer(x) * self.phase.abs() * (x[:, :3] > self.limit) + self.places
        return y, self.scale.exp()


def test_what_is_left_out_is_named_with_its_reason() -> None:
    assert left_out(Odd(), randn(N, 4)) == {
        "unused": "never reaches an output",
        "phase": "is complex",
        "places": "is of whole numbers (int64)",
        "scale": "is an output that no example goes into",
        "limit": "only goes into aten.gt.Tensor, which has no gradient",
    }


def test_a_weight_that_is_dropped_at_random_in_evaluation_is_left_out() -> None:
    net = Net(lambda m, x: F.linear(x, F.dropout(m.weight, 0.5, training=True)), weight=torch.randn(3, 4))
    assert left_out(net, randn(N, 4)) == {"weight": "goes into aten.dropout, which draws at random"}


def test_a_weight_that_is_dropped_at_random_in_training_is_measured_in_evaluation_alone() -> None:
    net = Net(lambda m, x: F.linear(x, F.dropout(m.layer.weight, 0.5, m.training), m.layer.bias), layer=nn.Linear(4, 3))
    program = kfe_fx.capture(net.double().eval(), randn(N, 4))
    blocks = find_blocks(program)
    batched = {block.weight: block.batched for block in blocks.blocks}
    assert batched["layer.weight"] == {"eval": True, "train": False}
    check_claims(program, blocks, {})


def test_a_parameter_of_training_alone_has_a_block() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.layer(x)
        return y + m.extra(torch.tanh(y)) if m.training else y

    program = kfe_fx.capture(Net(forward, layer=nn.Linear(4, 3), extra=nn.Linear(3, 3)).double().eval(), randn(N, 4))
    blocks = {block.weight: block for block in find_blocks(program).blocks}
    assert set(blocks["extra.weight"].uses) == {"train"}
    assert set(blocks["layer.weight"].uses) == {"eval", "train"}


def test_weights_that_are_used_as_they_stand_need_no_table_of_entries() -> None:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3)]
    for _ in range(8):
        layers += [nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2, enable_nested_tensor=False
    )
    net = Net(
        lambda m, x: m.head(m.encoder(m.body(x).flatten(2).transpose(1, 2)).mean(1)),
        body=nn.Sequential(*layers),
        encoder=encoder,
        head=nn.Linear(64, 10),
    )
    program = kfe_fx.capture(net.eval(), torch.randn(2, 3, 64, 64))
    blocks = find_blocks(program).blocks
    assert len(blocks) == 1 + 3 * 8 + 2 * 8 + 1
    assert all(block.entries is None and block.bias_entries is None for block in blocks)


def test_weights_in_any_memory_order() -> None:
    """Entries count in row-major order, whatever the strides of the parameter are."""
    conv = nn.Conv2d(4, 6, 3)
    net = Net(lambda m, x: F.conv2d(x, m.conv.weight[:4]) + F.conv2d(x, m.conv.weight[4:]).mean(1, True), conv=conv)
    net = net.double().to(memory_format=torch.channels_last).eval()
    program, blocks, _ = check(net, randn(N, 4, 5, 5).to(memory_format=torch.channels_last), N)
    weight = program.module().get_parameter("conv.weight").detach()
    assert not weight.is_contiguous()
    other = torch.zeros_like(weight)
    for block in blocks.blocks[:2]:
        block.put(block.matrix({"conv.weight": weight}), {"conv.weight": other})
    assert torch.equal(other, weight)
