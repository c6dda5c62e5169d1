"""The three files of a pruning run: in which order they are written, and what verification sees."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kfe_fx.errors import BadFile, KfeError, VerificationFailed
from kfe_fx.format import load
from kfe_fx.frontend.capture import capture
from kfe_fx.plan import Plan
from kfe_fx.program import Program
from kfe_fx.runtime import artifacts
from kfe_fx.runtime.artifacts import verify, write_set
from kfe_fx.runtime.onnx_file import onnx_bytes

NAMES = ["net.pruned.json", "net.pruned.onnx", "net.pruned.pt"]
DOCUMENT: dict[str, Any] = {"plan": Plan().to_json(), "certificate": {"budget": 0.5}}


def network(seed: int) -> Program:
    torch.manual_seed(seed)
    return capture(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.randn(2, 3))


@pytest.fixture(scope="module")
def program() -> Program:
    return network(0)


@pytest.fixture(scope="module")
def onnx(program: Program) -> bytes:
    return onnx_bytes(program)


@pytest.fixture(scope="module")
def written(program: Program, onnx: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    write_set(program, onnx, DOCUMENT, folder, "net")
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """Copy the set, to be tampered with."""
    return Path(shutil.copytree(written, tmp_path / "copy"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_set_is_whole_and_verifies(written: Path, program: Program) -> None:
    assert names(written) == NAMES
    document = json.loads((written / NAMES[0]).read_text())
    assert document["files"] == {name: hashlib.sha256((written / name).read_bytes()).hexdigest() for name in NAMES[1:]}
    assert document["certificate"] == DOCUMENT["certificate"]
    x = torch.randn(5, 3)
    assert torch.equal(load(written / NAMES[2])(x), program(x))
    for path in (written, written / NAMES[0], str(written)):
        found = verify(path)
        assert found.path == written / NAMES[0]
        assert [check for check, _, _ in found.table()] == [
            "net.pruned.onnx",
            "net.pruned.pt",
            "ONNX = network",
            "plan",
        ]
        assert found.to_json()["ok"] is True
        assert json.loads(json.dumps(found.to_json()))["certificate"] == str(found.path)


def test_the_folder_is_made(program: Program, onnx: bytes, tmp_path: Path) -> None:
    paths = write_set(program, onnx, DOCUMENT, tmp_path / "a" / "b", "net")
    assert [path.name for path in paths] == ["net.pruned.onnx", "net.pruned.pt", "net.pruned.json"]
    assert names(tmp_path / "a" / "b") == NAMES


@pytest.mark.parametrize("there", NAMES)
def test_nothing_is_overwritten_without_force(program: Program, onnx: bytes, tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_bytes(b"mine")
    with pytest.raises(BadFile, match="--force") as raised:
        write_set(program, onnx, DOCUMENT, tmp_path, "net")
    assert there in str(raised.value)
    assert contents(tmp_path) == {there: b"mine"}
    write_set(program, onnx, DOCUMENT, tmp_path, "net", force=True)
    assert names(tmp_path) == NAMES
    verify(tmp_path)


def test_the_certificate_is_written_last_and_an_old_one_goes_first(
    program: Program, onnx: bytes, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    real = artifacts.replacing

    def watched(path: Path) -> Any:
        seen.append([name for name in names(folder) if not name.startswith(".")])
        return real(path)

    monkeypatch.setattr(artifacts, "replacing", watched)
    for name in NAMES[1:]:
        (folder / name).unlink()
    write_set(program, onnx, DOCUMENT, folder, "net", force=True)
    assert seen == [[], NAMES[1:]]  # before the model no certificate; before the certificate both others
    assert names(folder) == NAMES


def fails(*_: Any, **__: Any) -> None:
    raise BadFile("the disk is full")


def test_a_failure_on_the_way_leaves_no_certificate(
    program: Program, onnx: bytes, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "save", fails)
    with pytest.raises(BadFile, match="the disk is full"):
        write_set(program, onnx, DOCUMENT, folder, "net", force=True)
    assert names(folder) == NAMES[1:]
    with pytest.raises(VerificationFailed, match="never finished"):
        verify(folder)


def test_a_file_in_the_place_of_the_folder_is_named(program: Program, onnx: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(BadFile, match="cannot be written") as raised:
        write_set(program, onnx, DOCUMENT, tmp_path / "file", "net")
    assert "\n" not in str(raised.value)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("change", [flip, lambda path: path.write_bytes(b""), lambda path: path.unlink()])
def test_a_changed_or_missing_file_is_seen(folder: Path, name: str, change: Callable[[Path], Any]) -> None:
    change(folder / name)
    with pytest.raises(VerificationFailed) as raised:
        verify(folder)
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)


def certify(folder: Path) -> None:
    """Write the hashes of the files as they are now into the certificate."""
    path = folder / NAMES[0]
    document = json.loads(path.read_text())
    document["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in NAMES[1:]}
    path.write_text(json.dumps(document))


def test_a_model_of_other_weights_is_seen_even_with_matching_hashes(folder: Path) -> None:
    (folder / NAMES[1]).write_bytes(onnx_bytes(network(1)))
    certify(folder)
    with pytest.raises(VerificationFailed, match=r"differs from net\.pruned\.pt"):
        verify(folder)


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_broken_model_with_matching_hashes_is_an_error_of_ours(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"not a model")
    certify(folder)
    with pytest.raises(KfeError) as raised:
        verify(folder)
    assert "\n" not in str(raised.value)


def edited(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda document: {**document, **changes}


@pytest.mark.parametrize(
    "edit",
    [
        lambda document: None,
        lambda document: [],
        lambda document: {},
        edited(format="another"),
        edited(version=2),
        edited(files={}),
        edited(files=[]),
        edited(files={"../net.pruned.onnx": "0", "net.pruned.pt": "0"}),
        edited(files={"/etc/passwd": "0", "net.pruned.pt": "0"}),
        edited(files={"net.pruned.onnx": 0, "net.pruned.pt": "0"}),
        edited(plan=None),
    ],
)
def test_what_is_no_certificate_is_refused(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / NAMES[0]
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    with pytest.raises(BadFile) as raised:
        verify(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 100_000])
def test_bytes_that_are_no_json_are_refused(folder: Path, data: bytes) -> None:
    (folder / NAMES[0]).write_bytes(data)
    with pytest.raises(BadFile, match="no certificate"):
        verify(folder)


def test_a_plan_of_a_newer_version_is_refused(folder: Path) -> None:
    path = folder / NAMES[0]
    document = json.loads(path.read_text())
    document["plan"]["version"] = 99
    path.write_text(json.dumps(document))
    with pytest.raises(KfeError, match="version 99"):
        verify(path)


def test_no_certificate_or_several_are_told_apart(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="does not exist"):
        verify(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadFile, match="holds 0 certificates"):
        verify(tmp_path / "empty")
    shutil.copy(folder / NAMES[0], folder / "other.pruned.json")
    with pytest.raises(BadFile, match="holds 2 certificates"):
        verify(folder)
    verify(folder / NAMES[0])
