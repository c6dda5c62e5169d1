from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from kfe_fx.frontend.capture import capture
from kfe_fx.runtime.bench import declared_feeds
from kfe_fx.runtime.lower import quiet
from kfe_fx.runtime.onnx_file import onnx_bytes
from kfe_fx.runtime.origins import UNJOINED, Origin, OriginalFile, path_of_name, read_original
from kfe_fx.runtime.profile import Kernel, Profile, profile
from kfe_fx.runtime.session import make_session


def joined(payload: bytes, folder) -> list[tuple[str, Origin]]:
    """Trace a model and return the operator and the origin of each kernel."""
    path = folder / "m.onnx"
    path.write_bytes(payload)
    found = profile([path], [declared_feeds(make_session(path))], runs=3)[0]
    return [
        (kernel.op, origin) for kernel, origin in zip(found.kernels, read_original(path).origins(found), strict=True)
    ]


def module(name: str) -> Origin:
    return Origin("module", name)


def operator(name: str) -> Origin:
    return Origin("operator", name)


class Residual(nn.Module):
    """Widths of whole blocks, so that ONNX Runtime takes its blocked layout where it has one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.left = nn.Conv2d(32, 32, 3, padding=1)
        self.right = nn.Conv2d(32, 32, 1)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.relu(self.left(x) + self.right(x)).mean((2, 3)))


class Mixer(nn.Module):
    """Fusions of every kind: bias with GELU, a sum with a norm, a scale with a product, slices to a split."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(16, 48)
        self.up = nn.Linear(16, 32)
        self.gelu = nn.GELU()
        self.down = nn.Linear(32, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 16)).permute(2, 0, 1, 3).unbind()
        x = x + nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return self.norm(x + self.down(self.gelu(self.up(x))))


def test_convolutions_keep_their_modules_in_the_blocked_layout(tmp_path):
    found = joined(onnx_bytes(capture(Residual().eval(), torch.randn(2, 3, 16, 16))), tmp_path)
    convolutions = [origin.name for op, origin in found if op.endswith("Conv")]
    assert sorted(convolutions) == ["left", "right", "stem.0"]
    assert (dict(found)["Gemm"]) == module("head")
    # what has no module was added by ONNX Runtime, and nothing else was
    assert {op for op, origin in found if origin == UNJOINED} <= {"ReorderInput", "ReorderOutput"}


def test_fused_kernels_find_their_modules(tmp_path):
    found = joined(onnx_bytes(capture(Mixer().eval(), torch.randn(2, 4, 16))), tmp_path)
    assert UNJOINED not in {origin for _, origin in found}
    assert {origin.kind for _, origin in found} == {"module"}
    assert {origin.name for _, origin in found} == {"", "qkv", "up", "gelu", "down", "norm"}
    assert all(origin.name == "norm" for op, origin in found if op.endswith("LayerNormalization"))
    assert all(origin.name in ("up", "gelu") for op, origin in found if "Gelu" in op)


def test_a_file_of_the_exporter_of_torch(tmp_path):
    net, x = Residual().eval(), torch.randn(2, 3, 16, 16)
    with quiet():
        torch.onnx.export(net, (x,), tmp_path / "torch.onnx", dynamo=True, verbose=False)
    found = joined((tmp_path / "torch.onnx").read_bytes(), tmp_path)
    assert {"left", "right", "stem.0", "head"} <= {origin.name for _, origin in found if origin.kind == "module"}


def model(nodes, initializers=(), producer: str = "") -> bytes:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
    graph = helper.make_graph(list(nodes), "g", [x], [y], list(initializers))
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name=producer)
    return made.SerializeToString()


def weight(name: str) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32) * 3, name)


def test_weights_tell_modules_where_nothing_else_does(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "encoder.0.proj.weight"], ["a"], name="MatMul_17"),
        helper.make_node("Tanh", ["a"], ["y"], name="Tanh_18"),
    ]
    found = joined(model(nodes, [weight("encoder.0.proj.weight")]), tmp_path)
    assert found == [("MatMul", module("encoder.0.proj")), ("Tanh", operator("Tanh"))]


def test_names_of_nodes_tell_them_else(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_9"], ["a"], name="/layer1/layer1.0/proj/MatMul"),
        helper.make_node("Tanh", ["a"], ["y"], name="/layer1/layer1.1/Tanh"),
    ]
    found = joined(model(nodes, [weight("onnx::MatMul_9")]), tmp_path)
    assert found == [("MatMul", module("layer1.0.proj")), ("Tanh", module("layer1.1"))]


def test_names_of_ours_come_before_weights(tmp_path):
    nodes = [helper.make_node("MatMul", ["x", "first.weight"], ["y"], name="second/MatMul")]
    assert joined(model(nodes, [weight("first.weight")], "kfe-fx"), tmp_path) == [("MatMul", module("second"))]
    assert joined(model(nodes, [weight("first.weight")]), tmp_path) == [("MatMul", module("first"))]


def test_nodes_without_names_are_known_by_their_places(tmp_path):
    constant = helper.make_node("Constant", [], ["c"], value=helper.make_tensor("v", TensorProto.FLOAT, [], [2.0]))
    nodes = [
        constant,
        helper.make_node("Add", ["x", "a.weight"], ["p"]),
        helper.make_node("Tanh", ["p"], ["q"]),
        helper.make_node("Add", ["q", "b.weight"], ["r"]),
        helper.make_node("Add", ["r", "c"], ["y"]),
    ]
    vectors = [helper.make_tensor(name, TensorProto.FLOAT, [4], [1, 2, 3, 4]) for name in ("a.weight", "b.weight")]
    found = joined(model(nodes, vectors), tmp_path)
    assert found == [("Add", module("a")), ("Tanh", operator("Tanh")), ("Add", module("b")), ("Add", operator("Add"))]


def test_a_file_that_cannot_be_read_has_operators():
    kernels = (Kernel("a", "Conv", "CPUExecutionProvider", 1.0), Kernel("b", "Relu", "CPUExecutionProvider", 1.0))
    assert OriginalFile(None).origins(Profile(kernels, 3, 2.0, None)) == [operator("Conv"), operator("Relu")]


def test_kernels_that_nothing_tells_of():
    file = OriginalFile(onnx.load_from_string(model([helper.make_node("Add", ["x", "x"], ["y"], name="a.b/Add")])))
    names = ("Transpose_token_1", "a.b/Add/SomeFusion/", "y_nchwc", "a.b/Add")
    kernels = tuple(Kernel(name, "Odd", "CPUExecutionProvider", 1.0) for name in names)
    assert file.origins(Profile(kernels, 3, 4.0, None)) == [UNJOINED, *[module("a.b")] * 3]


def test_several_weights_belong_to_what_they_share():
    nodes = [
        helper.make_node("Add", ["x", "block.one.weight"], ["p"]),
        helper.make_node("Mul", ["p", "block.two.weight"], ["y"]),
    ]
    vectors = [helper.make_tensor(f"block.{name}.weight", TensorProto.FLOAT, [4], [1] * 4) for name in ("one", "two")]
    file = OriginalFile(onnx.load_from_string(model(nodes, vectors)))
    fused = helper.make_graph([helper.make_node("Fused", ["x"], ["y"], name="fused")], "g", [], [])
    kernel = Kernel("fused", "Fused", "CPUExecutionProvider", 1.0)
    assert file.origins(Profile((kernel,), 3, 1.0, fused)) == [module("block")]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("layer1.0.conv1/Conv", "layer1.0.conv1"),
        ("/layer1/layer1.0/conv1/Conv_2", "layer1.0.conv1"),
        ("model/dense/MatMul", "model.dense"),
        ("/Add", ""),
        ("Conv_3", None),
        ("", None),
    ],
)
def test_paths_in_names(name, path):
    assert path_of_name(name) == path
