from __future__ import annotations

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kfe_fx.frontend.capture import capture
from kfe_fx.runtime.modules import common, noted_scope, owner
from kfe_fx.runtime.onnx_file import onnx_bytes
from tests.runtime.nets import Attention, Tagger
from tests.runtime.recurrent_nets import captured, draw, normalised
from tests.runtime.recurrent_nets import made as layer_of


def names(payload: bytes) -> list[str]:
    return [node.name for node in onnx.load_from_string(payload).graph.node]


def test_nodes_are_called_after_their_modules(conv_model):
    # the norms are folded into what stands before them; what the network itself does has no path
    assert names(conv_model) == ["stem/Conv", "/Relu", "depthwise/Conv", "/Add", "/Relu_2", "/ReduceMean", "head/Gemm"]


def test_shared_layers_and_equal_weights_stay_apart():
    class Norms(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4))

        def forward(self, x):
            return self.blocks(self.blocks(x))

    made = names(onnx_bytes(capture(Norms().eval(), torch.randn(2, 4))))
    # both norms hold ones and share one tensor in the file; every call of a layer counts for it
    assert [name for name in made if name.endswith("LayerNormalization")][:2] == [
        "blocks.0/LayerNormalization",
        "blocks.2/LayerNormalization",
    ]
    assert sum(name.startswith("blocks.0/") for name in made) == 2


def test_a_weight_that_the_network_uses_itself_tells_its_module():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(20, 8)

        def forward(self, ids):
            return F.log_softmax(F.linear(self.table(ids).mean(1), self.table.weight), -1)

    made = names(onnx_bytes(capture(Tied().eval(), torch.randint(0, 20, (2, 5)))))
    assert {name.partition("/")[0] for name in made} == {"table", ""}
    assert "/LogSoftmax" in made


def test_attention_and_its_parts():
    made = names(onnx_bytes(capture(Attention().eval(), torch.randn(2, 5, 16))))
    assert {name.partition("/")[0] for name in made} == {"", "project", "out"}
    program = capture(Tagger().eval(), (torch.randint(0, 20, (1, 6)), torch.ones(1, 6)))
    made = names(onnx_bytes(program))
    assert {name.partition("/")[0] for name in made} >= {"table", "attention", "attention.project", "out"}


@pytest.mark.parametrize("norms", [False, True])
def test_recurrent_layers_belong_to_themselves(norms):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = layer_of("lstm", 3, 4, batch_first=True)
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.rnn(x)[0])

    program = captured(Net().eval(), draw(0, 2, 5, 3))
    if norms:
        program = normalised(program, rows=3)
    found = [name.partition("/")[0] for name in names(onnx_bytes(program))]
    assert set(found) == {"rnn", "head"}
    assert ("rnn/Scan" in names(onnx_bytes(program))) is norms


def test_names_are_unique_and_add_little(conv_program, conv_model):
    model = onnx.load_from_string(conv_model)
    made = [node.name for node in model.graph.node]
    assert len(set(made)) == len(made)
    for place, node in enumerate(model.graph.node):
        node.name = f"node_{node.op_type}_{place}"
    assert len(conv_model) <= len(model.SerializeToString(deterministic=True)) + 8 * len(made)
    assert onnx_bytes(conv_program) == conv_model


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("['', 'layer1', 'layer1.0', 'conv2d']", "layer1.0"),
        ("['', 'add']", ""),
        ("['_empty_nn_module_stack_from_metadata_hook', 'sym_size']", None),
        ("['add']", None),
        ("[1, 2]", None),
        ("import os", None),
        ("{}", None),
        ("", None),
        ("[" * 1000, None),
    ],
)
def test_notes_of_the_exporter(text, found):
    assert noted_scope(text) == found


def test_owners():
    assert owner("layer1.0.weight") == "layer1.0"
    assert common(["bias", "a.b.weight", "c.bias"]) == "a.b"
    assert common(["bias"]) is None
