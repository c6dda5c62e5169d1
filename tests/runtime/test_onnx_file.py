from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from kfe_fx.errors import BadFile, UnsupportedModel, UsageError
from kfe_fx.frontend.capture import capture
from kfe_fx.runtime import onnx_file
from kfe_fx.runtime.onnx_file import export, output_names
from kfe_fx.runtime.parity import parity
from kfe_fx.runtime.session import make_session
from kfe_fx.structure import Constant
from tests.runtime.nets import Attention, Many, Tagger


def ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.fixture(scope="module")
def exported(conv_program, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    return export(conv_program, folder / "m.onnx", metadata={"kfe": "1"}), folder


@pytest.fixture(scope="module")
def linear_program():
    return capture(nn.Linear(30, 20).eval(), torch.randn(1, 30))


def test_one_checked_file_in_inference_form(exported):
    report, folder = exported
    assert [file.name for file in folder.iterdir()] == ["m.onnx"]
    assert report.files == (str(folder / "m.onnx"),)
    model = onnx.load(folder / "m.onnx")
    assert {prop.key: prop.value for prop in model.metadata_props} == {"kfe": "1"}
    # batch norms are folded, dropout is gone, nothing is computed from constants
    assert ops(model) == ["Conv", "Relu", "Conv", "Add", "Relu", "ReduceMean", "Gemm"]
    assert [value.name for value in report.inputs] == ["x"]
    assert report.inputs[0].shape == ("batch", 3, 12, 12)
    assert report.outputs[0].shape == ("batch", 5)
    assert report.seconds > 0


def test_equal_programs_give_equal_bytes_without_paths(exported, conv_model):
    # the second export of one process, also
    model = onnx.load(exported[1] / "m.onnx")
    assert not any(part.metadata_props or part.doc_string for part in (model.graph, *model.graph.node))
    assert not any(value.metadata_props for value in (*model.graph.value_info, *model.graph.input, *model.graph.output))
    del model.metadata_props[:]
    assert model.SerializeToString(deterministic=True) == conv_model
    assert b".py" not in conv_model


def test_names_of_outputs_and_every_leaf_agrees(tmp_path):
    program = capture(Many().eval(), (torch.randn(1, 4), torch.ones(3)), {"x": {0: "batch"}})
    report = export(program, tmp_path / "m.onnx")
    names = [value.name for value in report.outputs]
    assert names == ["logits", "aux.class", "aux.again", "x.0", "x.1.0"]
    result = parity(program, tmp_path / "m.onnx")
    assert result.ok
    assert [output.name for output in result.outputs] == names
    assert {output.name for output in result.outputs if output.exact} == {"aux.class"}
    assert result.untested == ("x.1.0",)


def test_two_named_axes_stay_dynamic(tmp_path):
    axes = {"ids": {0: "batch", 1: "length"}, "mask": {0: "batch", 1: "length"}}
    program = capture(Tagger().eval(), (torch.randint(0, 20, (1, 6)), torch.ones(1, 6)), axes)
    report = export(program, tmp_path / "m.onnx")
    assert {value.name: value.shape for value in report.inputs} == {
        "ids": ("batch", "length"),
        "mask": ("batch", "length"),
    }
    assert report.outputs[0].shape == ("batch", "length", 6)
    result = parity(program, tmp_path / "m.onnx")
    assert result.ok
    assert {size["length"] for size in result.sizes} == {5, 6, 7}
    text = {
        dim.dim_param
        for value in onnx.load(tmp_path / "m.onnx").graph.value_info
        for dim in value.type.tensor_type.shape.dim
    }
    assert not any(name.startswith("s") and name[1:].isdigit() for name in text)


def test_float64_exports_and_runs(tmp_path):
    program = capture(Attention().double().eval(), torch.randn(1, 5, 16).double(), {"x": {0: "n", 1: "t"}})
    report = export(program, tmp_path / "m.onnx")
    assert report.inputs[0].dtype == "double"
    assert parity(program, tmp_path / "m.onnx", tolerance=1e-6).ok


def test_a_wide_model_gets_a_file_of_weights(linear_program, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "ONE_FILE_LIMIT", 1000)
    report = export(linear_program, tmp_path / "m.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert any("m.onnx.data" in note for note in report.notes)
    assert parity(linear_program, tmp_path / "m.onnx").ok
    with pytest.raises(UnsupportedModel, match="export to a file"):
        onnx_file.onnx_bytes(linear_program)


def test_an_operation_without_onnx_form_is_named_and_nothing_is_written(tmp_path):
    class Bessel(nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)

    program = capture(Bessel().eval(), torch.randn(1, 3))
    with pytest.raises(
        UnsupportedModel, match=r"test_onnx_file.py:\d+: aten.special_bessel_j0.* has no ONNX form"
    ) as caught:
        export(program, tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_refused_file_leaves_the_old_one(linear_program, tmp_path, monkeypatch):
    target = tmp_path / "m.onnx"
    target.write_bytes(b"old")

    def refuse(*_args, **_kwargs):
        raise onnx.checker.ValidationError("no good")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(UnsupportedModel, match="no good"):
        export(linear_program, target)
    assert target.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_bad_arguments(conv_program, tmp_path):
    with pytest.raises(BadFile, match="does not exist"):
        export(conv_program, tmp_path / "missing" / "m.onnx")
    with pytest.raises(BadFile, match="is a folder"):
        export(conv_program, tmp_path)
    with pytest.raises(UsageError, match="opset 3"):
        export(conv_program, tmp_path / "m.onnx", opset=3)
    with pytest.raises(UsageError, match=r"kfe_fx\.capture"):
        export(nn.Linear(1, 1), tmp_path / "m.onnx")  # type: ignore[arg-type]


def test_output_names():
    assert output_names(0, set()) == ["output"]
    assert output_names((0, [1, 2]), set()) == ["output", "output_1", "output_2"]
    assert output_names({"x": 0, "y": {"z": 1}, "n": Constant(None)}, {"x"}) == ["x_1", "y.z"]


def test_an_opset_that_is_asked_for(linear_program, tmp_path):
    assert export(linear_program, tmp_path / "m.onnx", opset=18).opset == 18
    session = make_session(tmp_path / "m.onnx")
    assert session.run(None, {"input": np.zeros((4, 30), np.float32)})[0].shape == (4, 20)
