from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from kfe_fx.errors import BadFile, UnsupportedModel
from kfe_fx.runtime import profile as module
from kfe_fx.runtime.bench import declared_feeds
from kfe_fx.runtime.onnx_file import onnx_bytes
from kfe_fx.runtime.profile import MAX_EVENTS, MIN_RUNS, WARM_UP, profile, read_model
from kfe_fx.runtime.session import make_session
from tests.runtime.recurrent_nets import captured, draw, made, normalised


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """A temporary folder of one's own, to see what is left in it."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def conv_file(conv_model, tmp_path):
    path = tmp_path / "conv.onnx"
    path.write_bytes(conv_model)
    return path


def feeds(path: Path, **axes: int) -> dict[str, np.ndarray]:
    return declared_feeds(make_session(path), axes=axes)


def test_kernels_of_each_file(conv_file, scratch):
    first, second = profile([conv_file, conv_file], [feeds(conv_file)] * 2, runs=4)
    assert first.runs == second.runs == 4
    assert [kernel.op for kernel in first.kernels][-1] == "Gemm"
    assert first.kernels_on == {"CPUExecutionProvider": len(first.kernels)}
    assert first.run_ms > 0
    assert all(kernel.ms >= 0 and kernel.inside == 0 for kernel in first.kernels)
    assert first.graph is not None
    assert {kernel.name for kernel in first.kernels} <= {node.name for node in first.graph.node}
    assert not list(scratch.iterdir())


def test_bodies_of_loops_count_in_the_loop(tmp_path):
    net = made("gru", 3, 4, batch_first=True)
    path = tmp_path / "scan.onnx"
    path.write_bytes(onnx_bytes(normalised(captured(net, draw(0, 2, 5, 3)), rows=3)))
    model = read_model(path)
    assert model is not None
    graph = model.graph
    scan = next(node for node in graph.node if node.op_type == "Scan")
    body = next(part.g for part in scan.attribute if part.HasField("g"))
    axes = {dim.dim_param: 7 for value in graph.input for dim in value.type.tensor_type.shape.dim if dim.dim_param}
    found = profile([path], [feeds(path, **axes)], runs=3)[0]
    assert [kernel.inside > 0 for kernel in found.kernels] == [kernel.op == "Scan" for kernel in found.kernels]
    inside = max(kernel.inside for kernel in found.kernels)
    assert inside % 7 == 0  # seven steps of one body
    assert not {node.name for node in body.node} & {kernel.name for kernel in found.kernels}


def test_long_loops_are_traced_less(tmp_path):
    inner = helper.make_graph([helper.make_node("Add", ["a", "a"], ["b"])], "body", [], [])
    graph = helper.make_graph([helper.make_node("Scan", ["x"], ["y"], body=inner)], "g", [], [])
    assert module._affordable(graph, {"x": np.zeros((1, 10))}) == MAX_EVENTS // 11
    assert module._affordable(graph, {"x": np.zeros((1, 10**6))}) == MIN_RUNS


def test_few_runs_where_time_is_short(conv_file):
    assert profile([conv_file], [feeds(conv_file)], runs=1000, seconds=0.0)[0].runs == MIN_RUNS


def broken(path: str) -> None:
    Path(path).write_text("[{")


def emptied(path: str) -> None:
    Path(path).write_text("[]")


def odd(path: str) -> None:
    Path(path).write_text('[1, null, {}, {"ts": 1, "dur": "x"}, {"cat": "Node", "name": "a_kernel_time", "args": {}}]')


@pytest.mark.parametrize(
    ("harm", "says"),
    [(os.remove, "no trace"), (broken, "no trace"), (emptied, "no whole run"), (odd, "no whole run")],
)
def test_a_trace_that_is_missing_or_broken(conv_file, scratch, monkeypatch, harm, says):
    finish = ort.InferenceSession.end_profiling

    def harmed(session):
        path = finish(session)
        harm(path)
        return path

    given = feeds(conv_file)
    monkeypatch.setattr(ort.InferenceSession, "end_profiling", harmed)
    with pytest.raises(BadFile, match=rf"conv\.onnx.*{says}") as caught:
        profile([conv_file], [given], runs=3)
    assert "\n" not in str(caught.value)
    assert not list(scratch.iterdir())


def test_a_graph_that_cannot_be_written_is_done_without(conv_file, scratch, monkeypatch):
    real = module.make_session

    def full(path, optimized=None, **settings):
        if optimized is not None:
            raise BadFile("the disk is full")
        return real(path, **settings)

    monkeypatch.setattr(module, "make_session", full)
    found = profile([conv_file], [feeds(conv_file)], runs=3)[0]
    assert found.graph is None
    assert found.kernels
    assert not list(scratch.iterdir())


def test_a_model_that_fails_while_it_runs(conv_file, scratch, tmp_path):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 3])
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [-1, 3])
    graph = helper.make_graph([helper.make_node("Reshape", ["x", "shape"], ["y"])], "g", [x], [y], [shape])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(model.SerializeToString())
    with pytest.raises(UnsupportedModel, match="ONNX Runtime fails"):
        profile([conv_file, bad], [feeds(conv_file), feeds(bad)])
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(BadFile, match=r"text\.onnx"):
        profile([conv_file, tmp_path / "text.onnx"], [feeds(conv_file)] * 2)
    assert not list(scratch.iterdir())
    assert WARM_UP > 0


def test_what_is_no_onnx(tmp_path):
    (tmp_path / "m.ort").write_bytes(b"\xff\xff\xff\xff")
    assert read_model(tmp_path / "m.ort") is None
    assert read_model(tmp_path / "none.onnx") is None
