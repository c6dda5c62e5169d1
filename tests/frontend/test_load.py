from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kfe_fx.data.dataset import ArrayData
from kfe_fx.errors import BadFile, KfeError, UsageError
from kfe_fx.format import save
from kfe_fx.frontend.load import load_program

FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.first(x))

def build():
    return Net()

def with_inputs():
    return Net(), torch.ones(2, 4)

def with_axes():
    return Net(), torch.ones(2, 4), {"x": {0: "rows"}}

def broken():
    raise ValueError("no such size")

def number():
    return 3

def leaves():
    raise SystemExit(4)

constant = 5
"""


class Net(nn.Module):
    """The same as in FACTORY, and importable for pickles."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.first(x))


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    net = Net()
    net.norm.running_mean = torch.randn(3)
    return net.eval()


@pytest.fixture
def factory(tmp_path: Path) -> str:
    path = tmp_path / "factory.py"
    path.write_text(FACTORY)
    return str(path)


def check(program: Any, net: nn.Module) -> None:
    x = torch.randn(5, 4)
    assert torch.equal(program(x), net(x))
    assert list(program.state_dict()) == list(net.state_dict())


def refusal(path: Any, kind: type[KfeError] = BadFile, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        load_program(path, **options)
    text = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in text
    return text


def test_a_program_file_is_known_by_its_content(net: Net, tmp_path: Path):
    save(net, torch.ones(1, 4), tmp_path / "network.onnx")
    check(load_program(tmp_path / "network.onnx"), net)
    check(load_program(str(tmp_path / "network.onnx"), inputs=["x=float32[9]"], arch="none:none"), net)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_state_dict_and_where_its_inputs_come_from(legacy: bool, net: Net, factory: str, tmp_path: Path):
    path = tmp_path / "w.bin"
    torch.save(net.state_dict(), path, _use_new_zipfile_serialization=not legacy)
    assert "--arch" in refusal(path, UsageError)
    check(load_program(path, arch=f"{factory}:with_inputs"), net)
    assert load_program(path, arch=f"{factory}:with_axes").axes == {"x": {0: "rows"}}
    named = load_program(path, arch=f"{factory}:build", inputs=["x=float32[n,4]"])
    assert named.axes == {"x": {0: "n"}}
    check(named, net)
    data = ArrayData((torch.randn(6, 4),), None)
    check(load_program(path, arch=f"{factory}:build", data=data), net)
    text = refusal(path, UsageError, arch=f"{factory}:build")
    assert all(part in text for part in ("factory", "--input", "--data"))


def test_an_architecture_by_module_name(net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "kfe_fx_test_nets.py").write_text(FACTORY)
    torch.save(net.state_dict(), tmp_path / "w.pt")
    monkeypatch.chdir(tmp_path)
    check(load_program("w.pt", arch="kfe_fx_test_nets:with_inputs"), net)
    assert str(tmp_path) not in sys.path
    assert "returned a Tensor" in refusal("w.pt", UsageError, arch="tests.frontend.test_load:a_tensor")


def a_tensor() -> Tensor:
    return torch.ones(1)


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("{}:nothing", "defines no 'nothing'"),
        ("{}:broken", "raised ValueError: no such size (factory.py:24)"),
        ("{}:leaves", "raised SystemExit: 4"),
        ("{}:number", "returned a int"),
        ("{}:constant", "is a int, not a function"),
        ("{}x.py:build", "no such file"),
        ("no_such_package.nets:build", "no module 'no_such_package'"),
        ("torch.no_such_module:build", "no module 'torch.no_such_module'"),
        ("factory", "write file.py:name"),
        ("factory.py:", "write file.py:name"),
    ],
)
def test_architectures_that_do_not_work(arch: str, expected: str, net: Net, factory: str, tmp_path: Path):
    torch.save(net.state_dict(), tmp_path / "w.pt")
    text = refusal(tmp_path / "w.pt", UsageError, arch=arch.format(factory))
    assert expected.split(" (")[0] in text
    if "(" in expected:
        assert "factory.py:24)" in text


def test_an_architecture_with_a_syntax_error(net: Net, tmp_path: Path):
    (tmp_path / "bad.py").write_text("import torch\ndef build(:\n")
    torch.save(net.state_dict(), tmp_path / "w.pt")
    text = refusal(tmp_path / "w.pt", UsageError, arch=f"{tmp_path}/bad.py:build")
    assert "SyntaxError" in text
    assert "bad.py:2" in text


WRAPPINGS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model": lambda s: {"model": s, "optimizer": {"state": {}, "param_groups": []}, "args": None},
    "prefix": lambda s: {f"module.{key}": value for key, value in s.items()},
    "both": lambda s: {"state_dict": {f"module._orig_mod.{key}": value for key, value in s.items()}},
    "other": lambda s: {"net_g": s, "net_d": {"x": torch.ones(1)}},
    "old": lambda s: {key: value for key, value in s.items() if not key.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize("how", WRAPPINGS)
def test_wrapped_state_dicts(how: str, net: Net, factory: str, tmp_path: Path):
    torch.save(WRAPPINGS[how](dict(net.state_dict())), tmp_path / "w.pt")
    check(load_program(tmp_path / "w.pt", arch=f"{factory}:with_inputs"), net)


def test_state_dicts_that_do_not_fit(net: Net, factory: str, tmp_path: Path):
    path, arch = tmp_path / "w.pt", f"{factory}:with_inputs"
    state = dict(net.state_dict())
    torch.save({"other": state["first.weight"], "more": state["first.bias"]}, path)
    text = refusal(path, arch=arch)
    assert "keys are missing (first 'first.weight')" in text
    assert "2 keys are unexpected (first 'other')" in text
    torch.save({key: value for key, value in state.items() if key != "first.bias"}, path)
    assert "the key 'first.bias' is missing" in refusal(path, arch=arch)
    torch.save(state | {"first.bias": torch.ones(7)}, path)
    assert "first.bias has the shape [7], there it is [3]" in refusal(path, arch=arch)
    torch.save({"model": state, "model_ema": state}, path)
    assert "'model', 'model_ema'" in refusal(path, arch=arch)
    torch.save([1, 2], path)
    assert "holds no network but a list" in refusal(path)
    assert "holds no state dict but a list" in refusal(path, arch=arch)
    torch.save(state | {"first.bias": torch.ones(3, device="meta")}, path)
    assert "first.bias" in refusal(path, arch=arch)


def test_safetensors(net: Net, factory: str, tmp_path: Path):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "w"
    safetensors.save_file(dict(net.state_dict()), path)
    check(load_program(path, arch=f"{factory}:with_inputs"), net)
    assert "--arch" in refusal(path, UsageError)
    data = path.read_bytes()
    path.write_bytes(data[:-3])
    assert "safetensors" in refusal(path, arch=f"{factory}:with_inputs")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickled_module_needs_trust(legacy: bool, net: Net, tmp_path: Path):
    path = tmp_path / "m.pt"
    torch.save(net, path, _use_new_zipfile_serialization=not legacy)
    text = refusal(path, UsageError)
    assert "--trust" in text
    assert "Net" in text
    check(load_program(path, trust=True, inputs=["x=float32[b,4]"]), net)
    assert "--input" in refusal(path, UsageError, trust=True)


class Malicious:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("how", ["torch", "legacy", "pickle"])
def test_no_code_runs_without_trust(how: str, factory: str, tmp_path: Path):
    mark, path = tmp_path / "mark", tmp_path / "m.pt"
    if how == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": Malicious(mark)}))
    else:
        torch.save({"w": Malicious(mark)}, path, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(KfeError) as caught:
        load_program(path, arch=f"{factory}:with_inputs")
    assert caught.value.exit_code == 2
    assert not mark.exists()


def test_a_class_that_cannot_be_imported(net: Net, tmp_path: Path):
    data = io.BytesIO()
    torch.save(net, data)
    path = tmp_path / "m.pt"
    torch.save(net, path)
    with zipfile.ZipFile(path) as opened:
        held = {name: opened.read(name) for name in opened.namelist()}
    with zipfile.ZipFile(path, "w") as opened:
        for name, content in held.items():
            opened.writestr(name, content.replace(b"test_load", b"test_gone"))
    assert "state dict" in refusal(path, trust=True, inputs=["x=float32[b,4]"])


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_exported_program_needs_trust(dynamic: bool, net: Net, tmp_path: Path):
    shapes = {"x": {0: torch.export.Dim("rows")}} if dynamic else None
    exported = torch.export.export(net, (torch.ones(2, 4),), dynamic_shapes=shapes)
    torch.export.save(exported, tmp_path / "m.zip")
    assert "--trust" in refusal(tmp_path / "m.zip", UsageError)
    program = load_program(tmp_path / "m.zip", trust=True)
    x = torch.randn(5 if dynamic else 2, 4)
    assert torch.equal(program(x), net(x))
    assert set(program.state_dict()) == set(net.state_dict())
    assert bool(program.axes) == dynamic


def test_a_damaged_exported_program(net: Net, tmp_path: Path):
    path = tmp_path / "m.pt2"
    torch.export.save(torch.export.export(net, (torch.ones(2, 4),)), path)
    data = bytearray(path.read_bytes())
    data[data.index(b'"graph_module"') + 3] ^= 1
    path.write_bytes(data)
    assert "damaged" in refusal(path, trust=True)


def foreign(folder: Path) -> dict[str, tuple[bytes, str]]:
    archive = io.BytesIO()
    np.savez(archive, x=np.ones(3))
    script = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.ReLU()), script)
    plain = io.BytesIO()
    with zipfile.ZipFile(plain, "w") as opened:
        opened.writestr("readme.txt", "hello")
    return {
        "empty": (b"", "is empty"),
        "text": (b"hello\nworld\n", "text"),
        "html": (b"<!DOCTYPE html><html>", "web page"),
        "lfs": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        "gzip": (b"\x1f\x8b\x08\x00aaaa", "unpack"),
        "zeros": (bytes(5000), "zeros"),
        "noise": (bytes(range(100, 250)) * 4, "no model file"),
        "onnx": (b"\x08\x08\x12\x07pytorch\x1a\x052.0.0:\xb4\x01", "ONNX"),
        "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
        "npz": (archive.getvalue(), "--data"),
        "npy": (b"\x93NUMPY\x01\x00", "--data"),
        "torchscript": (script.getvalue(), "TorchScript"),
        "zip": (plain.getvalue(), "readme.txt"),
        "zip header": (b"PK\x03\x04", "truncated"),
        "pickle header": (b"\x80\x02", "damaged"),
        "pickle of a number": (pickle.dumps(3), ""),
        "pickle of noise": (b"\x80\x02" + bytes(range(256)), "damaged"),
        "safetensors of nothing": (struct.pack("<Q", 2) + b"{}", ""),
    }


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_foreign_files(factory: str, tmp_path: Path):
    for name, (data, expected) in foreign(tmp_path).items():
        (tmp_path / "x").write_bytes(data)
        for arch in (None, f"{factory}:with_inputs"):
            text = refusal(tmp_path / "x", arch=arch)
            assert expected in text, name
            assert str(tmp_path / "x") in text, name


def test_no_regular_file(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for place in ("/dev/zero", tmp_path, tmp_path / "pipe"):
        assert "not a regular file" in refusal(place)
    assert "no such file" in refusal(tmp_path / "none.pt")
    with open(tmp_path / "sparse", "wb") as handle:
        handle.truncate(2**40)
    assert "zeros" in refusal(tmp_path / "sparse")


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_checkpoints(legacy: bool, net: Net, factory: str, tmp_path: Path):
    path = tmp_path / "w.pt"
    torch.save(net.state_dict(), path, _use_new_zipfile_serialization=not legacy)
    data = path.read_bytes()
    for length in range(0, len(data), len(data) // 25):
        path.write_bytes(data[:length])
        # a name that is cut off is not one of those that are allowed
        refusal(path, KfeError if legacy else BadFile, arch=f"{factory}:with_inputs")


def test_a_compressed_checkpoint_is_not_unpacked(factory: str, tmp_path: Path):
    path = tmp_path / "w.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("archive/data.pkl", bytes(10**7))
    assert "compressed" in refusal(path, arch=f"{factory}:with_inputs")
