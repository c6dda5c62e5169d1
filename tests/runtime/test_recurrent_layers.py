"""Recurrent layers in ONNX have the numbers of the Program, at other batches and lengths than traced."""

from __future__ import annotations

import random
from itertools import product
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from kfe_fx.frontend.capture import capture
from kfe_fx.program import Program, put_tensor
from kfe_fx.recurrent.op import CELLS, RECURRENT, Arguments
from kfe_fx.runtime.onnx_file import OPSETS
from tests.runtime.recurrent_nets import (
    SIZES,
    TOLERANCE,
    Layer,
    Many,
    captured,
    checked,
    distance,
    draw,
    made,
    normalised,
    ops,
)


def every_layer() -> list[nn.Module]:
    torch.manual_seed(0)
    kinds = (
        {"num_layers": 1},
        {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False},
        {"num_layers": 3, "batch_first": True},
        {"num_layers": 1, "bidirectional": True, "bias": False},
    )
    return [made(cell, 3, 4, **kind) for cell, kind in product(CELLS, kinds)]


def test_every_plain_layer():
    program = captured(Many(every_layer()), draw(0, 2, 5, 3))
    payload = checked(program)
    found = ops(payload)
    assert (found["LSTM"], found["GRU"], found["RNN"]) == (7, 7, 14)
    assert not found.keys() & {"Scan", "Loop", "If", "Slice", "Gather"}
    for seed, (batch, length) in enumerate(SIZES):
        assert distance(program, payload, draw(seed, batch, length, 3)) < TOLERANCE


def test_lengths_of_every_cell():
    layers = [made(cell, 3, 4, bidirectional=both, batch_first=True) for cell in CELLS for both in (False, True)]
    program = captured(Many(layers, lengths=True), draw(0, 3, 5, 3), torch.tensor([3, 5, 1]))
    payload = checked(program)
    assert ops(payload)["Cast"] == 1
    for batch, length in SIZES:
        lengths = torch.randint(1, length + 1, (batch,))
        lengths[-1] = length
        assert distance(program, payload, draw(batch, batch, length, 3), lengths) < TOLERANCE
        assert distance(program, payload, draw(batch, batch, length, 3), lengths, slow=True) < TOLERANCE


class Stateful(nn.Module):
    """A step of a streaming network: states go in and come out."""

    def __init__(self, *, first: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a = nn.LSTM(3, 4, 2, batch_first=first, bidirectional=True)
        self.b = nn.GRU(8, 5, batch_first=first)

    def forward(self, x, h, c, g):
        x, (h, c) = self.a(x, (h, c))
        x, g = self.b(x, g)
        return x, h, c, g


@pytest.mark.parametrize("batched", [True, False])
def test_states_are_inputs(batched):
    def inputs(batch: int, length: int) -> list[torch.Tensor]:
        x, h, c, g = draw(1, batch, length, 3), draw(2, 4, batch, 4), draw(3, 4, batch, 4), draw(4, 1, batch, 5)
        return [x, h, c, g] if batched else [x[0], h[:, 0], c[:, 0], g[:, 0]]

    program = captured(Stateful(first=batched), *inputs(2 if batched else 1, 5))
    payload = checked(program)
    assert ops(payload)["LSTM"] == 2
    assert ops(payload)["GRU"] == 1
    for batch, length in SIZES if batched else ((1, 1), (1, 9)):
        flat = inputs(batch, length)
        assert distance(program, payload, *flat) < TOLERANCE
        assert distance(program, payload, *flat, slow=True) < TOLERANCE


class Residual(nn.Module):
    """Layers with something between them that leaves the order of batch and steps alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.a, self.b = nn.GRU(4, 4, batch_first=True), nn.GRU(4, 4, batch_first=True)
        self.c, self.d = nn.RNN(8, 4), nn.RNN(4, 3)

    def forward(self, x):
        y = torch.relu(self.a(x)[0])
        z = y + self.b(y)[0]
        z = torch.cat([y, z], -1)
        w = self.d(torch.dropout(self.c(z.transpose(0, 1))[0], 0.5, False))[0]
        return w.transpose(0, 1)


def test_no_transpose_between_layers():
    program = captured(Residual(), draw(0, 2, 5, 4))
    payload = checked(program)
    assert ops(payload)["Transpose"] == 2
    assert distance(program, payload, draw(1, 3, 8, 4)) < TOLERANCE


def narrowed(program: Program, name: str, hidden: int) -> None:
    """Cut one direction to its first units; it is the only one that reads its outputs."""
    for node in program.graphs["eval"].find_nodes(op="call_function", target=RECURRENT):
        call = Arguments.of(node)
        if call.weight_hh.target != name:
            continue
        gates = CELLS[call.cell]
        for weight in (call.weight_ih, call.weight_hh, call.bias_ih, call.bias_hh):
            value = program.tensor(weight.target)
            value = value.unflatten(0, (gates, -1))[:, :hidden].flatten(0, 1)
            value = value[:, :hidden] if weight is call.weight_hh else value
            put_tensor(program.module(), weight.target, nn.Parameter(value.detach().clone()))


def test_directions_of_different_widths_stay_two_nodes():
    net = made("lstm", 3, 6, bidirectional=True, batch_first=True)
    program = capture(nn.Sequential(net, _First()).eval(), draw(0, 2, 5, 3))
    narrowed(program, "0.weight_hh_l0_reverse", 4)
    payload = checked(program)
    assert ops(payload) == {"LSTM": 2, "Transpose": 2, "Squeeze": 2, "Concat": 1}
    directions = [
        attribute.s for node in onnx.load_from_string(payload).graph.node for attribute in node.attribute
        if attribute.name == "direction"
    ]  # fmt: skip
    assert directions == [b"forward", b"reverse"]
    x = draw(1, 3, 8, 3)
    assert distance(program, payload, x) < TOLERANCE
    assert distance(program, payload, x, slow=True) < TOLERANCE


class _First(nn.Module):
    def forward(self, found: Any) -> torch.Tensor:
        return found[0]


def test_directions_that_are_not_brought_together_are_taken_apart():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(3, 4, bidirectional=True)

        def forward(self, x):
            output, h = self.rnn(x)
            forward, backward = output.chunk(2, -1)
            return forward * backward, h[1]

    program = captured(Sum(), draw(0, 5, 2, 3))
    payload = checked(program)
    assert ops(payload)["GRU"] == 1
    assert distance(program, payload, draw(1, 8, 3, 3)) < TOLERANCE


class Random(nn.Module):
    """A few random layers one after another, with lengths or without, and with something between them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        pick = random.Random(seed)
        self.lengths = pick.random() < 0.5
        width, layers, self.between = 3, [], []
        for _ in range(pick.randint(1, 3)):
            cell, hidden, both = pick.choice(list(CELLS)), pick.randint(1, 5), pick.random() < 0.5
            projection = pick.randint(1, hidden - 1) if cell == "lstm" and hidden > 1 and pick.random() < 0.3 else 0
            options = {"proj_size": projection} if projection else {}
            options |= {"num_layers": pick.randint(1, 2), "bias": pick.random() < 0.7, "dropout": 0.0}
            layers.append(made(cell, width, hidden, bidirectional=both, batch_first=pick.random() < 0.6, **options))
            width = (projection or hidden) * (1 + both)
            self.between.append(pick.choice(["", "relu", "residual", "both"]))
        self.layers = nn.ModuleList(Layer(layer, lengths=self.lengths) for layer in layers)

    def forward(self, x, lengths=None):
        found = []
        for layer, between in zip(self.layers, self.between, strict=True):
            first = layer.layer.batch_first
            y, ends = layer(x if first else x.transpose(0, 1), lengths)
            y = y if first else y.transpose(0, 1)
            if between in ("relu", "both"):
                y = torch.relu(y)
            if between in ("residual", "both"):
                y = y + torch.tanh(y)
            x = y
            found.append(ends)
        return x, found[-1]


def _random_network(seed: int) -> None:
    pick = random.Random(seed)
    dtype, tolerance = pick.choice([(torch.float32, TOLERANCE), (torch.float64, 1e-11)])
    net = Random(seed).to(dtype)
    lengths = [torch.tensor([5, 3])] if net.lengths else []
    program = captured(net, draw(0, 2, 5, 3).to(dtype), *lengths)
    if pick.random() < 0.7:
        sides, cell_norm = pick.choice(["", "ih", "hh", "ih hh"]), pick.choice(["", "scalar", "channel"])
        normalised(program, rows=pick.choice([1, 1, 3]), sides=sides, cell_norm=cell_norm, seed=seed)
    payload = checked(program, pick.choice([None, *OPSETS]))
    assert not ops(payload).keys() & {"Loop", "If"}
    for batch, length in SIZES:
        flat = [draw(seed, batch, length, 3).to(dtype)]
        if net.lengths:
            flat.append(torch.tensor([pick.randint(1, length) for _ in range(batch - 1)] + [length]))
        assert distance(program, payload, *flat, slow=True) < tolerance


@pytest.mark.parametrize("seed", [0, 1])
def test_random_networks(seed):
    _random_network(seed)


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(2, 60))
def test_more_random_networks(seed):
    _random_network(seed)
