from __future__ import annotations

import onnx
import pytest
import torch
from torch import nn

from kfe_fx.frontend.capture import capture
from kfe_fx.runtime.onnx_file import onnx_bytes
from kfe_fx.runtime.parity import parity
from kfe_fx.runtime.session import make_session
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


class PostNorm(nn.Module):
    """A layer norm of a sum, one side of which comes from behind a view."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.inner, self.last = nn.Linear(12, width), nn.Linear(width, 8), nn.Linear(8, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        x = self.first(x)
        y = self.inner(x).view(x.shape[0], 5, 2, 4).transpose(1, 2)
        return self.norm(x + self.last(y.transpose(1, 2).reshape(x.shape[0], 5, 8)))


@pytest.mark.parametrize("width", [16, 6])
def test_a_filled_model_is_fused_as_an_exported_one(tmp_path, width):
    template = Template(capture(PostNorm().eval(), torch.randn(2, 5, 12)))
    program = capture(PostNorm(width).eval(), torch.randn(2, 5, 12))
    made = {"filled": template.fill(program), "exported": onnx_bytes(program)}
    ran = {}
    for name, model in made.items():
        make_session(model, optimized=str(tmp_path / f"{name}.onnx"))
        graph = onnx.load(tmp_path / f"{name}.onnx", load_external_data=False).graph
        ran[name] = sorted(node.op_type for node in graph.node)
    assert ran["filled"] == ran["exported"]
    assert "SkipLayerNormalization" in ran["exported"]
