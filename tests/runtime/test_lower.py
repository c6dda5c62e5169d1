from __future__ import annotations

import logging
import warnings

import pytest
import torch
from torch import nn

from kfe_fx.errors import UnsupportedModel
from kfe_fx.frontend.capture import capture
from kfe_fx.runtime.lower import drop_buffer_writes, quiet, to_exported_program
from tests.runtime.nets import Attention, ConvNet, Many


def test_same_numbers_at_other_batch_sizes(conv_program):
    exported = to_exported_program(conv_program).module(check_guards=False)
    for batch in (1, 2, 7):
        x = torch.randn(batch, 3, 12, 12)
        (out,) = exported(x)
        torch.testing.assert_close(out, conv_program.module().run_flat([x])[0], rtol=1e-6, atol=1e-6)


def test_program_is_left_as_it_was():
    program = capture(ConvNet().eval(), torch.randn(1, 3, 12, 12))
    program.train()
    before, state = program.hash(), {name: value.clone() for name, value in program.state_dict().items()}
    to_exported_program(program)
    assert program.module().training
    assert program.hash() == before
    assert all(torch.equal(state[name], value) for name, value in program.state_dict().items())


def test_parameters_are_shared_under_their_names(conv_program):
    exported = to_exported_program(conv_program)
    assert exported.state_dict["stem.weight"].data_ptr() == conv_program.tensor("stem.weight").data_ptr()
    assert "norm.running_var" in exported.state_dict


def test_attention_is_followed_by_a_contiguous_copy():
    program = capture(Attention().eval(), torch.randn(1, 5, 16), {"x": {0: "batch", 1: "time"}})
    graph = to_exported_program(program).graph
    (attention,) = graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default)
    assert {user.target for user in attention.users} == {torch.ops.aten.clone.default}


def test_outputs_are_values_of_their_own():
    program = capture(Many().eval(), (torch.randn(1, 4), torch.ones(3)), {"x": {0: "batch"}})
    exported = to_exported_program(program)
    outputs = exported.graph_signature.user_outputs
    assert len(set(outputs)) == len(outputs) == 5
    assert not set(outputs) & set(exported.graph_signature.user_inputs)


def test_operations_of_ours_are_refused():
    program = capture(nn.Linear(3, 3).eval(), torch.randn(1, 3))

    @torch.library.custom_op("kfe_fx::test_gate", mutates_args=())
    def gate(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    graph = program.graphs["eval"]
    output = next(iter(reversed(graph.nodes)))
    with graph.inserting_before(output):
        gated = graph.call_function(torch.ops.kfe_fx.test_gate.default, (output.args[0][0],))
    output.args = ((gated,),)
    with pytest.raises(UnsupportedModel, match="strip the gates"):
        to_exported_program(program)


def test_writes_to_buffers_are_left_out():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(1)
            return x + self.calls

    program = capture(Counter().eval(), torch.randn(1, 3))
    exported = to_exported_program(program)
    assert not exported.graph_signature.buffers_to_mutate
    assert torch.equal(exported.module(check_guards=False)(torch.zeros(2, 3))[0], torch.ones(2, 3))
    assert drop_buffer_writes(program.copy().graphs["eval"]) == ["calls"]


def test_an_axis_that_cannot_stay_dynamic_is_named():
    program = capture(nn.Sequential(nn.Flatten(0), nn.Linear(12, 2)).eval(), torch.randn(3, 4), {})
    program.axes["input"] = {0: "rows"}
    with pytest.raises(UnsupportedModel, match="rows"):
        to_exported_program(program)


def test_quiet_mutes_and_restores(capsys):
    logger = logging.getLogger("torch.onnx.something")
    with quiet():
        logger.warning("not seen")
        warnings.warn("not seen", stacklevel=1)
    assert "not seen" not in capsys.readouterr().err
    handlers = [*logging.getLogger("torch").handlers, *logging.getLogger("torch.onnx").handlers]
    assert not any(handler.filters for handler in handlers)
