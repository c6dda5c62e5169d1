"""What recurrent layers become in a file: nodes, names, initializers, and what is refused."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from kfe_fx.errors import UnsupportedModel
from kfe_fx.program import Program, put_tensor
from kfe_fx.recurrent.op import RECURRENT
from kfe_fx.runtime import onnx_file
from kfe_fx.runtime.lower import to_exported_program
from kfe_fx.runtime.onnx_file import export, onnx_bytes
from kfe_fx.runtime.session import make_session, run
from tests.runtime.recurrent_nets import (
    SIZES,
    TOLERANCE,
    Layer,
    Stack,
    captured,
    checked,
    distance,
    draw,
    made,
    normalised,
    ops,
)


def test_a_stack_is_one_node_a_layer_with_one_transpose_at_either_end():
    program = captured(Stack(), draw(0, 2, 7, 5))
    payload = checked(program)
    found = ops(payload)
    assert found["LSTM"] == 3
    # into ONNX's order of steps and batch; of the directions of each layer, the last one back to the batch at once
    assert found["Transpose"] == 1 + 3
    assert found["Concat"] == 1  # the last states
    assert set(found) == {"LSTM", "Transpose", "Reshape", "Concat", "MatMul", "Add"}
    model = onnx.load_from_string(payload)
    assert [
        [dim.dim_param or dim.dim_value for dim in out.type.tensor_type.shape.dim] for out in model.graph.output
    ] == [
        ["batch", "time", 2],
        [6, "batch", 6],
    ]
    for seed, (batch, length) in enumerate(SIZES):
        assert distance(program, payload, draw(seed, batch, length, 5)) < TOLERANCE


def test_weights_are_initializers_in_the_order_of_onnx():
    program = captured(Layer(made("lstm", 3, 4)), draw(0, 5, 2, 3))
    before = {name: value.clone() for name, value in program.state_dict().items()}
    text = program.hash()
    held = {one.name: numpy_helper.to_array(one) for one in onnx.load_from_string(checked(program)).graph.initializer}
    i, f, g, o = before["layer.weight_hh_l0"].chunk(4)
    assert np.array_equal(held["layer.onnx_R_l0"], torch.cat([i, o, f, g]).unsqueeze(0))
    assert held["layer.onnx_W_l0"].shape == (1, 16, 3)
    assert held["layer.onnx_B_l0"].shape == (1, 32)
    assert sum(one.size for one in held.values() if one.dtype == np.float32) == sum(v.numel() for v in before.values())
    assert program.hash() == text
    assert all(torch.equal(before[name], value) for name, value in program.state_dict().items())
    assert "layer.weight_hh_l0" not in to_exported_program(program).state_dict


def test_weights_that_are_computed_are_computed_before():
    net = made("gru", 3, 4, batch_first=True)
    for name in ("weight_hh_l0", "weight_ih_l0"):
        nn.utils.parametrizations.weight_norm(net, name)
    program = captured(Layer(net), draw(0, 2, 5, 3))
    payload = checked(program)
    assert set(ops(payload)) == {"Transpose", "GRU", "Squeeze"}
    assert distance(program, payload, draw(1, 3, 8, 3)) < TOLERANCE


def test_exports_do_not_disturb_each_other():
    plain = captured(Stack(), draw(0, 2, 7, 5))
    other = normalised(captured(Stack(), draw(0, 2, 7, 5)), rows=2)
    first = onnx_bytes(plain)
    stepped = onnx_bytes(other)
    assert onnx_bytes(plain) == first
    assert onnx_bytes(other) == stepped


def test_weights_beside_the_file(tmp_path, monkeypatch):
    program = captured(Layer(made("lstm", 3, 4, proj_size=2)), draw(0, 5, 2, 3))
    monkeypatch.setattr(onnx_file, "ONE_FILE_LIMIT", 10)
    report = export(program, tmp_path / "m.onnx")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    # with the weights inside the Scan, and the zeros that it starts from
    assert report.weight_bytes >= 4 * sum(
        value.numel() for name, value in program.state_dict().items() if "weight" in name
    )
    found = run(make_session(tmp_path / "m.onnx"), {"x": draw(1, 8, 3, 3).numpy()})
    with torch.no_grad():
        ours = program.module().run_flat([draw(1, 8, 3, 3)])
    assert np.allclose(found[0], ours[0], atol=TOLERANCE)


def gated(program: Program, name: str) -> Program:
    graph = program.graphs["eval"]
    (node,) = graph.find_nodes(op="call_function", target=RECURRENT)
    put_tensor(program.module(), "ones", torch.ones(1, 4))
    with graph.inserting_before(node):
        node.kwargs = {**node.kwargs, name: graph.get_attr("ones")}
    return program


@pytest.mark.parametrize("name", ["gate", "cell_gate"])
def test_gates_are_refused(name):
    program = gated(captured(Layer(made("lstm", 3, 4)), draw(0, 5, 2, 3)), name)
    with pytest.raises(UnsupportedModel, match=r"recurrent_nets.py:\d+: .*strip the gates before lowering$"):
        onnx_bytes(program)


def test_statistics_of_the_batch_are_refused():
    program = normalised(captured(Layer(made("gru", 3, 4)), draw(0, 5, 2, 3)))
    (node,) = program.graphs["eval"].find_nodes(op="call_function", target=RECURRENT)
    node.kwargs = {**node.kwargs, "training": True}
    with pytest.raises(UnsupportedModel, match=r"recurrent_nets.py:\d+: .*statistics of each batch"):
        onnx_bytes(program)


def test_weights_from_an_input_are_refused():
    class Hyper(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.RNN(3, 4, bias=False)

        def forward(self, x, scale):
            return self.rnn(x)[0] * scale

    program = captured(Hyper(), draw(0, 5, 2, 3), torch.ones(1))
    graph = program.graphs["eval"]
    (node,) = graph.find_nodes(op="call_function", target=RECURRENT)
    scale = next(one for one in graph.find_nodes(op="placeholder") if "scale" in one.name)
    with graph.inserting_before(node):
        scaled = graph.call_function(torch.ops.aten.mul.Tensor, (node.args[4], scale))
    node.update_arg(4, scaled)
    with pytest.raises(UnsupportedModel, match=r"test_recurrent_onnx.py:\d+: the weights .* depend on scale"):
        onnx_bytes(program)
