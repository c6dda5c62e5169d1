from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from kfe_fx.errors import UsageError, VerificationFailed
from kfe_fx.frontend.capture import capture
from kfe_fx.runtime.onnx_file import onnx_bytes
from kfe_fx.runtime.parity import compare_output, parity, verify


def test_equal(conv_program, conv_model):
    conv_program.train()
    report = parity(conv_program, conv_model)
    assert conv_program.module().training
    conv_program.eval()
    assert report.ok
    assert 0 < report.error < 1e-5
    assert [size["batch"] for size in report.sizes] == [1, 2, 5]
    assert report.probes == 10
    assert not report.untested
    json.dumps(report.to_json(), allow_nan=False)


def test_a_planted_error_is_caught(conv_program, conv_model):
    model = onnx.load_from_string(conv_model)
    for tensor in model.graph.initializer:
        if tensor.name == "head.bias":
            planted = numpy_helper.to_array(tensor).copy()
            planted[3] += 0.01
            tensor.CopyFrom(numpy_helper.from_array(planted, tensor.name))
    report = parity(conv_program, model.SerializeToString())
    assert not report.ok
    assert report.error > 1e-3
    with pytest.raises(VerificationFailed, match="'output' differs by"):
        verify(conv_program, model.SerializeToString())


def test_another_networks_file(conv_program, conv_model):
    program = capture(nn.Linear(3, 3).eval(), torch.randn(1, 3))
    with pytest.raises(VerificationFailed, match="do not belong together"):
        parity(program, conv_model)


def test_further_calls(conv_program, conv_model):
    calls = [((torch.randn(3, 3, 12, 12),), {})]
    assert parity(conv_program, conv_model, batches=(1,), probes=2, calls=calls).probes == 4
    with pytest.raises(UsageError, match="at least two probes"):
        parity(conv_program, conv_model, probes=1)


def test_a_fixed_batch_is_tried_at_its_own_size():
    program = capture(nn.Linear(3, 3).eval(), torch.randn(4, 3), {})
    report = parity(program, onnx_bytes(program))
    assert report.ok
    assert report.sizes == ({},)


def test_log_sigmoid_keeps_its_tail():
    program = capture(nn.LogSigmoid().eval(), torch.linspace(-500, 500, 101)[None])
    assert parity(program, onnx_bytes(program)).ok


def pairs(*ours: np.ndarray, error: float = 0.0) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(one, one + error) for one in ours]


def test_error_is_relative_to_size_or_spread():
    random = np.random.default_rng(0)
    values = [random.standard_normal(100) * 1000 for _ in range(4)]
    assert compare_output("y", pairs(*values, error=1.0)).error == pytest.approx(1e-3, rel=0.6)
    # one position of many varies: its spread is the scale, not the small rms of the rest
    sparse = [np.zeros(10_000) for _ in range(4)]
    for index, value in enumerate(sparse):
        value[7] = 100.0 * index
    assert compare_output("y", pairs(*sparse, error=1.0)).scale == pytest.approx(np.std([0, 100, 200, 300]))


def test_what_does_not_vary_is_untested():
    constant = np.full(5, 2.0)
    assert not compare_output("y", pairs(constant, constant)).tested
    # other shapes are no variation
    assert not compare_output("y", pairs(constant, np.full(7, 2.0))).tested
    assert compare_output("y", pairs(constant, constant + 1)).tested
    assert not compare_output("y", pairs(np.zeros(3), np.zeros(3))).tested
    # ... and must agree all the same
    assert compare_output("y", pairs(np.zeros(3), error=1e-9)).error == np.inf


def test_integers_are_exact():
    same = compare_output("y", [(np.arange(4), np.arange(4)), (np.arange(4) + 1, np.arange(4) + 1)])
    assert (same.error, same.exact, same.tested) == (0.0, True, True)
    assert compare_output("y", [(np.arange(4), np.array([0, 1, 2, 4]))]).error == 1.0


def test_nan_and_infinity_stand_at_the_same_places():
    ours = np.array([1.0, np.nan, np.inf])
    assert compare_output("y", [(ours, ours.copy())]).error == 0
    assert compare_output("y", [(ours, np.array([1.0, 2.0, np.inf]))]).error == np.inf
    assert compare_output("y", [(ours, np.array([1.0, np.nan, -np.inf]))]).error == np.inf
    assert compare_output("y", [(ours, np.array([1.0, np.nan, 3.0]))]).error == np.inf


def test_shapes_and_types_must_agree():
    assert compare_output("y", [(np.zeros(3), np.zeros((3, 1)))]).error == np.inf
    assert compare_output("y", [(np.zeros(3), np.zeros(3, np.float32))]).error == np.inf
