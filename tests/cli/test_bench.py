from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from kfe_fx.cli.bench import SHOWN, label, percentiles, strays
from kfe_fx.cli.main import run


def model(width: int, layers: int = 1) -> bytes:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", width])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", width])
    nodes, weights, value = [], [], "x"
    for place in range(layers):
        weights.append(onnx.numpy_helper.from_array(np.eye(width, dtype=np.float32) * 3, f"net.{place}.weight"))
        nodes.append(helper.make_node("MatMul", [value, f"net.{place}.weight"], [f"v{place}"]))
        value = f"v{place}"
    nodes.append(helper.make_node("Tanh", [value], ["y"]))
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    made = []
    for name, width in (("a", 16), ("b", 8)):
        (tmp_path / f"{name}.onnx").write_bytes(model(width))
        made.append(str(tmp_path / f"{name}.onnx"))
    return made


def test_layers_of_two_files_as_json(files, capsys):
    assert run(["bench", *files, "--seconds", "0.05", "--layers", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["provider"] == "CPUExecutionProvider"
    assert {(row["kind"], row["name"]) for row in shown["layers"]} == {("module", "net.0"), ("operator", "Tanh")}
    assert all(len(row["ms"]) == 2 and "ratio" in row for row in shown["layers"])
    assert [row["layers"]["run_ms"] for row in shown["rows"]] == [row["p50_ms"] for row in shown["rows"]]


def test_tables(files, capsys):
    assert run(["bench", *files, "--seconds", "0.05", "--layers"]) == 0
    shown = capsys.readouterr().out
    for text in ("ms in a", "ms in b", "b / a", "net.0", "(Tanh)", "CPUExecutionProvider asked for, 1 thread", "times"):
        assert text in shown
    assert run(["bench", files[0], "--seconds", "0.05", "--layers"]) == 0
    assert "share" in capsys.readouterr().out
    assert run(["bench", *files, files[0], "--seconds", "0.05", "--layers"]) == 0
    assert "ms in c" in capsys.readouterr().out
    assert run(["bench", files[0], "--seconds", "0.05"]) == 0
    assert "net.0" not in capsys.readouterr().out


def test_a_long_table_is_cut_and_says_so(tmp_path, capsys):
    path = tmp_path / "long.onnx"
    path.write_bytes(model(4, layers=SHOWN + 4))
    assert run(["bench", str(path), "--seconds", "0.05", "--layers"]) == 0
    assert "and 5 more layers, see --json" in capsys.readouterr().out


@pytest.mark.skipif("AzureExecutionProvider" not in ort.get_available_providers(), reason="needs a provider that idles")
def test_what_ran_elsewhere_is_told(files, capsys):
    assert run(["bench", files[0], "--seconds", "0.05", "--provider", "azure"]) == 0
    shown = capsys.readouterr().out
    assert "AzureExecutionProvider asked for" in shown
    assert "not all of it ran there: of 2 kernels 2 on CPUExecutionProvider" in shown


def test_refusals_are_one_line(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert run(["bench", files[0], "--provider", "cuda"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.endswith("no provider CUDAExecutionProvider; it has CPUExecutionProvider")
    assert "\n" not in error
    (tmp_path / "text.onnx").write_text("no model")
    assert run(["bench", files[0], str(tmp_path / "text.onnx"), "--layers"]) == 2
    assert "text.onnx" in capsys.readouterr().err


def test_words():
    assert label({"kind": "module", "name": "a.b"}) == "a.b"
    assert label({"kind": "module", "name": ""}) == "(the network itself)"
    assert label({"kind": "operator", "name": "Add"}) == "(Add)"
    assert label({"kind": "unjoined", "name": ""}) == "(added by ONNX Runtime)"
    assert percentiles({"p10_ms": 1, "p50_ms": 2, "p90_ms": 3, "p99_ms": 4, "path": "p_ms"}) == [
        "p50_ms",
        "p10_ms",
        "p90_ms",
        "p99_ms",
    ]
    row = {"path": "m", "provider": "CUDAExecutionProvider"}
    assert strays(row) is None
    assert strays(row | {"kernels_on": {"CUDAExecutionProvider": 3}}) is None
    told = strays(row | {"kernels_on": {"CUDAExecutionProvider": 3, "CPUExecutionProvider": 2}})
    assert told == "m: not all of it ran there: of 5 kernels 2 on CPUExecutionProvider"
