"""Recurrent layers with normalisation inside: folded into ONNX's operators, or one Scan that holds their weights."""

from __future__ import annotations

import onnx
import pytest
import torch
from torch import nn

from kfe_fx.program import Program
from kfe_fx.recurrent.op import RECURRENT, Arguments
from kfe_fx.runtime.onnx_file import OPSETS
from tests.runtime.recurrent_nets import (
    SIZES,
    TOLERANCE,
    Many,
    captured,
    checked,
    distance,
    draw,
    made,
    normalised,
    ops,
)

# in float64 everything is a Scan: ONNX Runtime has its parts so, and its LSTM not
TIGHT = 1e-12


def program_of(*layers: nn.Module, lengths: bool = False, dtype: torch.dtype = torch.float64) -> Program:
    net = Many(list(layers), lengths=lengths).to(dtype)
    return captured(net, draw(0, 2, 5, 3).to(dtype), *([torch.tensor([3, 5])] if lengths else []))


def inputs(batch: int, length: int, *, lengths: bool, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    x = draw(length, batch, length, 3).to(dtype)
    if not lengths:
        return [x]
    drawn = torch.randint(1, length + 1, (batch,), generator=torch.Generator().manual_seed(batch))
    drawn[-1] = length
    return [x, drawn]


def both(cell: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return made(cell, 3, 4, batch_first=True, bidirectional=True, **options)


def test_shared_statistics_fold_into_the_operators():
    cells = ("lstm", "gru", "rnn_tanh")
    layers = [both(cell, bias=cell != "gru") for cell in cells]
    program = normalised(program_of(*layers, lengths=True, dtype=torch.float32))
    payload = checked(program)
    assert set(ops(payload)) == {"LSTM", "GRU", "RNN", "Transpose", "Reshape", "Cast"}
    for batch, length in SIZES:
        flat = inputs(batch, length, lengths=True, dtype=torch.float32)
        assert distance(program, payload, *flat, slow=True) < TOLERANCE


def test_rows_that_are_equal_fold_too():
    program = normalised(program_of(both("lstm"), dtype=torch.float32), rows=3)
    for node in program.graphs["eval"].find_nodes(op="call_function", target=RECURRENT):
        call = Arguments.of(node)
        for table in (call.mean_ih, call.var_ih, call.mean_hh, call.var_hh):
            value = program.tensor(table.target)
            value.copy_(value[:1].expand_as(value).clone())
    payload = checked(program)
    assert ops(payload)["LSTM"] == 1
    assert distance(program, payload, *inputs(3, 8, lengths=False, dtype=torch.float32), slow=True) < TOLERANCE


def test_one_scale_of_the_cell_state_is_an_activation():
    program = program_of(both("lstm"), made("lstm", 3, 4, batch_first=True), dtype=torch.float32)
    payload = checked(normalised(program, cell_norm="scalar"))
    attributes = [
        {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        for node in onnx.load_from_string(payload).graph.node
        if node.op_type == "LSTM"
    ]
    # lists of what takes a number alone: a list padded for Sigmoid and Tanh is read wrongly and nobody says so
    assert [len(one["activation_beta"]) for one in attributes] == [2, 1]
    assert [one["activations"] for one in attributes] == [[b"Sigmoid", b"Tanh", b"ScaledTanh"] * d for d in (2, 1)]
    for batch, length in SIZES:
        flat = inputs(batch, length, lengths=False, dtype=torch.float32)
        assert distance(program, payload, *flat, slow=True) < TOLERANCE


@pytest.mark.parametrize("lengths", [False, True])
def test_statistics_of_each_step_are_one_scan(lengths):
    program = program_of(both("lstm"), both("gru"), both("rnn_tanh"), both("rnn_relu"), lengths=lengths)
    payload = checked(normalised(program, rows=3, cell_norm="channel"))
    found = ops(payload)
    assert found["Scan"] == 8
    assert found["MatMul"] == 8  # the input's, of all steps at once
    assert not found.keys() & {"Loop", "If", "LSTM", "GRU", "RNN"}
    for batch, length in SIZES:
        assert distance(program, payload, *inputs(batch, length, lengths=lengths), slow=True) < TIGHT


@pytest.mark.parametrize(
    ("rows", "sides", "cell_norm"),
    [(3, "ih", "scalar"), (3, "hh", ""), (1, "hh", "channel"), (1, "", "scalar")],
)
def test_only_some_sides_normalised(rows, sides, cell_norm):
    program = program_of(both("lstm", bias=rows == 3), both("gru", bias=sides == "hh"), lengths=sides == "ih")
    payload = checked(normalised(program, rows=rows, sides=sides, cell_norm=cell_norm))
    assert ops(payload)["Scan"] == 4
    assert distance(program, payload, *inputs(3, 8, lengths=sides == "ih"), slow=True) < TIGHT


def test_a_projection_is_a_scan_with_states_given():
    class Projected(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = both("lstm", num_layers=2, proj_size=2)

        def forward(self, x, h, c):
            return self.rnn(x, (h, c))

    def states(batch: int, length: int) -> list[torch.Tensor]:
        return [one.double() for one in (draw(1, batch, length, 3), draw(2, 4, batch, 2), draw(3, 4, batch, 4))]

    program = captured(Projected().double(), *states(2, 5))
    payload = checked(program)
    found = ops(payload)
    assert found["Scan"] == 4
    # the directions of a layer are put together before they are turned
    assert found["Transpose"] == 2
    for batch, length in SIZES:
        assert distance(program, payload, *states(batch, length)) < TIGHT


def test_the_body_owns_its_weights():
    program = normalised(program_of(made("gru", 3, 4)), rows=2)
    model = onnx.load_from_string(checked(program))
    (scan,) = [node for node in model.graph.node if node.op_type == "Scan"]
    (body,) = [attribute.g for attribute in scan.attribute if attribute.name == "body"]
    shapes = {tuple(one.dims) for one in body.initializer}
    assert (4, 12) in shapes
    assert not any(tuple(one.dims) == (4, 12) for one in model.graph.initializer)
    outside = {one.name for one in (*model.graph.initializer, *model.graph.input)}
    outside |= {name for node in model.graph.node for name in node.output}
    made_inside = {name for node in body.node for name in node.output} | {one.name for one in body.input}
    made_inside |= {one.name for one in body.initializer}
    assert not made_inside & outside
    assert all(name in made_inside for node in body.node for name in node.input)


def _opsets(program: Program, opsets: range | tuple[int, ...], **options: bool) -> None:
    for opset in opsets:
        payload = checked(program, opset)
        assert {one.domain: one.version for one in onnx.load_from_string(payload).opset_import} == {"": opset}
        assert distance(program, payload, *inputs(3, 8, lengths=True), slow=True) < TIGHT


def test_the_oldest_and_the_newest_operator_set():
    _opsets(normalised(program_of(made("lstm", 3, 4), lengths=True), rows=2), (OPSETS[0], OPSETS[-1]))


@pytest.mark.thorough
def test_every_operator_set():
    layers = [both("lstm", proj_size=2), both("gru"), both("rnn_relu")]
    _opsets(normalised(program_of(*layers, lengths=True), rows=3, cell_norm="channel"), OPSETS)
