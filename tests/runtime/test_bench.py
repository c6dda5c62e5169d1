from __future__ import annotations

import json

import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from kfe_fx.errors import BadFile, UsageError
from kfe_fx.runtime.bench import bench, declared_feeds
from kfe_fx.runtime.session import make_session


def test_rows(conv_model, tmp_path):
    paths = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for path in paths:
        path.write_bytes(conv_model)
    rows = bench(paths, seconds=0.05, batch=3)
    assert [row["path"] for row in rows] == [str(path) for path in paths]
    assert rows[0]["inputs"] == {"x": [3, 3, 12, 12]}
    assert rows[0]["ratio"] == 1.0
    assert rows[1]["ratio_low"] <= rows[1]["ratio"] <= rows[1]["ratio_high"]
    assert rows[1]["p10_ms"] <= rows[1]["p50_ms"] <= rows[1]["p90_ms"]
    json.dumps(rows, allow_nan=False)
    alone = bench(paths[:1], seconds=0.01)[0]
    assert "ratio" not in alone
    assert alone["provider"] == "CPUExecutionProvider"
    assert not {"layers", "kernels_on", "elsewhere"} & set(alone)


def test_layers_of_each_file(conv_model, tmp_path):
    ours, theirs = tmp_path / "ours.onnx", tmp_path / "theirs.onnx"
    ours.write_bytes(conv_model)
    model = onnx.load_from_string(conv_model)
    model.producer_name = ""
    for node in model.graph.node:
        node.name = ""
    theirs.write_bytes(model.SerializeToString())
    rows = bench([ours, theirs], seconds=0.05, layers=True)
    for row in rows:
        assert row["elsewhere"] == []
        assert row["kernels_on"] == {"CPUExecutionProvider": sum(one["kernels"] for one in row["layers"]["layers"])}
        assert sum(one["ms"] for one in row["layers"]["layers"]) == pytest.approx(row["p50_ms"])
        assert {"stem", "depthwise", "head"} <= {one["name"] for one in row["layers"]["layers"]}
    json.dumps(rows, allow_nan=False)


def test_an_addition_alone_has_its_operator(tmp_path):
    path = tmp_path / "add.onnx"
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "g", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    times = bench([path], seconds=0.01, layers=True)[0]["layers"]
    assert [(one["kind"], one["name"], one["kernels"]) for one in times["layers"]] == [("operator", "Add", 1)]


@pytest.mark.skipif("AzureExecutionProvider" not in ort.get_available_providers(), reason="needs a provider that idles")
def test_a_provider_that_takes_nothing_is_told(conv_model, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(conv_model)
    row = bench([path], seconds=0.01, provider="azure")[0]
    assert row["provider"] == "AzureExecutionProvider"
    assert set(row["kernels_on"]) == {"CPUExecutionProvider"}
    assert len(row["elsewhere"]) == row["kernels_on"]["CPUExecutionProvider"] > 0
    assert "layers" not in row


def test_bad_files(conv_model, tmp_path, monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    good, bad = tmp_path / "good.onnx", tmp_path / "bad.onnx"
    good.write_bytes(conv_model)
    bad.write_bytes(conv_model[: len(conv_model) // 2])
    with pytest.raises(BadFile, match=r"bad\.onnx"):
        bench([good, bad])
    with pytest.raises(UsageError, match=r"no provider CUDAExecutionProvider; it has CPUExecutionProvider$") as caught:
        bench([good], provider="cuda")
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="at least one"):
        bench([])
    with pytest.raises(UsageError, match="batch size"):
        bench([good], batch=0)


def test_declared_inputs():
    inputs = [
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", "length"]),
        helper.make_tensor_value_info("mask", TensorProto.BOOL, ["n", "length"]),
        helper.make_tensor_value_info("scale", TensorProto.DOUBLE, []),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.INT64, ["n", "length"])]
    graph = helper.make_graph([helper.make_node("Identity", ["ids"], ["y"])], "g", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = make_session(model.SerializeToString())
    with pytest.raises(UsageError, match="--axis length=N"):
        declared_feeds(session)
    made = declared_feeds(session, batch=4, axes={"length": 9})
    assert {name: array.shape for name, array in made.items()} == {"ids": (4, 9), "mask": (4, 9), "scale": ()}
    assert set(made["ids"].ravel()) <= {0, 1}
