from __future__ import annotations

import pytest
import torch

from kfe_fx.frontend.capture import capture
from kfe_fx.runtime.onnx_file import onnx_bytes
from tests.runtime.nets import ConvNet


@pytest.fixture(scope="session")
def conv_program():
    return capture(ConvNet().eval(), torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="session")
def conv_model(conv_program):
    return onnx_bytes(conv_program)
