from __future__ import annotations

import json

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
    assert "ratio" not in bench(paths[:1], seconds=0.01)[0]


def test_bad_files(conv_model, tmp_path):
    good, bad = tmp_path / "good.onnx", tmp_path / "bad.onnx"
    good.write_bytes(conv_model)
    bad.write_bytes(conv_model[: len(conv_model) // 2])
    with pytest.raises(BadFile, match=r"bad\.onnx"):
        bench([good, bad])
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
