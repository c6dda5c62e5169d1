from __future__ import annotations

import pytest
import torch
from torch import nn

from kfe_fx.frontend.capture import capture
from kfe_fx.runtime.parity import parity
from kfe_fx.runtime.template import Template
from tests.runtime.nets import Attention, ConvNet


@pytest.fixture(scope="module")
def template(conv_program):
    before = {name: value.clone() for name, value in conv_program.state_dict().items()}
    made = Template(conv_program)
    assert all(torch.equal(before[name], value) for name, value in conv_program.state_dict().items())
    return made


@pytest.mark.parametrize("width", [8, 5, 1])
def test_narrower_networks_are_filled_in(template, width):
    # other weights, other widths, other groups in the depthwise convolution, norms folded anew
    program = capture(ConvNet(width).eval(), torch.randn(1, 3, 12, 12))
    model = template.fill(program)
    assert model is not None
    assert parity(program, model).ok
    assert template.model(program) == model


def test_another_graph_is_not_filled_in(template):
    class Other(ConvNet):
        def forward(self, x):
            return super().forward(x) * 2

    assert template.fill(capture(Other().eval(), torch.randn(1, 3, 12, 12))) is None
    assert template.fill(capture(nn.Linear(3, 3).eval(), torch.randn(1, 3))) is None


def test_a_view_that_would_change_needs_an_export_of_its_own():
    template = Template(capture(Attention(16, 4).eval(), torch.randn(1, 5, 16)))
    narrow = capture(Attention(8, 2).eval(), torch.randn(1, 5, 8))
    assert template.fill(narrow) is None
