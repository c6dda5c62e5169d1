from __future__ import annotations

import os

import onnx
import onnxruntime as ort
import pytest

from kfe_fx.errors import BadFile, UnsupportedModel, UsageError
from kfe_fx.runtime.session import make_session, provider_name, run


def test_settings(conv_model):
    options = make_session(conv_model, threads=2, optimization="basic").get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)


@pytest.mark.parametrize("content", [b"", b"not a model", b"PK\x03\x04"])
def test_files_that_are_no_models(tmp_path, content):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(BadFile, match=r"m\.onnx") as caught:
        make_session(path)
    assert "\n" not in str(caught.value)


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(BadFile, match="does not exist"):
        make_session(tmp_path / "none.onnx")
    with pytest.raises(BadFile, match="not a regular file"):
        make_session(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadFile, match="not a regular file"):
        make_session(tmp_path / "pipe")


def test_bad_arguments(conv_model):
    with pytest.raises(UnsupportedModel, match="refuses the model"):
        make_session(b"junk")
    with pytest.raises(UsageError, match="at least 1"):
        make_session(conv_model, threads=0)
    with pytest.raises(UsageError, match="optimization"):
        make_session(conv_model, optimization="some")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="CPUExecutionProvider"):
        make_session(conv_model, provider="NoSuchProvider")
    with pytest.raises(UnsupportedModel, match="ONNX Runtime fails"):
        run(make_session(conv_model), {})


@pytest.mark.parametrize("given", ["cpu", "CPU", "CPUExecutionProvider", "cpuexecutionprovider"])
def test_providers_by_short_names(given):
    assert provider_name(given) == "CPUExecutionProvider"


def test_a_provider_that_is_known_but_not_there(monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UsageError, match=r"no provider TensorrtExecutionProvider; it has CPUExecutionProvider$"):
        provider_name("tensorrt")
    with pytest.raises(UsageError, match="no provider abacus"):
        provider_name("abacus")


def test_the_graph_that_runs_is_written_with_its_weights_beside_it(conv_model, tmp_path):
    make_session(conv_model, optimized=str(tmp_path / "m.onnx"))
    assert {file.name for file in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data"}
    graph = onnx.load(tmp_path / "m.onnx", load_external_data=False).graph
    assert graph.node[-1].op_type == "Gemm"
