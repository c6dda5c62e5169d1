"""Int8 copies for the clock."""

from __future__ import annotations

import logging

import onnx
import pytest
import torch
from torch import nn

import kfe_fx
from kfe_fx.errors import UnsupportedModel
from kfe_fx.runtime.inputs import feeds
from kfe_fx.runtime.onnx_file import onnx_bytes
from kfe_fx.runtime.quantise import int8
from kfe_fx.runtime.session import make_session, run


def test_a_copy_computes_about_the_same_in_int8(capfd: pytest.CaptureFixture[str]):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 4)).eval()
    program = kfe_fx.capture(net, torch.randn(2, 3, 8, 8))
    model, level = onnx_bytes(program), logging.getLogger().level
    copy = int8(model, [feeds(program, 4, seed) for seed in range(4)])
    held = {one.data_type for one in onnx.load_from_string(copy).graph.initializer}
    assert onnx.TensorProto.INT8 in held
    inputs = feeds(program, 2, 0)
    (found,), (expected,) = (run(make_session(one), dict(inputs)) for one in (copy, model))
    assert 0 < abs(found - expected).max() < 0.1 * abs(expected).max()
    assert logging.getLogger().level == level
    assert capfd.readouterr() == ("", "")


def test_what_is_no_model_is_refused_in_one_line():
    with pytest.raises(UnsupportedModel, match="cannot quantise") as caught:
        int8(b"", [])
    assert "\n" not in str(caught.value)
