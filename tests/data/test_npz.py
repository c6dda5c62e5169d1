from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra import numpy as arrays

from kfe_fx.data import npz
from kfe_fx.data.npz import load_npz
from kfe_fx.errors import BadData

X = np.arange(24, dtype=np.float32).reshape(4, 6)
Y = np.array([0, 1, 2, 1])


def saved(path: Path, **members: np.ndarray) -> Path:
    np.savez(path, allow_pickle=True, **members)
    return path


def refused(path: Path, text: str) -> None:
    with pytest.raises(BadData, match=text) as caught:
        load_npz(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("inputs", ["x", "inputs", "images"])
@pytest.mark.parametrize("targets", ["y", "targets", "labels"])
def test_known_names_in_any_order(tmp_path: Path, inputs: str, targets: str):
    data = load_npz(saved(tmp_path / "a.npz", **{targets: Y.astype(np.uint8), inputs: X}))
    assert isinstance(data.inputs, tuple)
    assert torch.equal(data.inputs[0], torch.from_numpy(X))
    assert data.targets is not None
    assert data.targets.dtype == torch.int64
    assert data.targets.tolist() == Y.tolist()
    assert data.name == "a.npz"


def test_unknown_names_count_in_order(tmp_path: Path):
    data = load_npz(saved(tmp_path / "a.npz", first=X, second=Y))
    assert isinstance(data.inputs, tuple)
    assert data.inputs[0].shape == (4, 6)
    only = load_npz(saved(tmp_path / "b.npz", first=X))
    assert only.targets is None
    one_known = load_npz(saved(tmp_path / "c.npz", z=Y, x=X))
    assert isinstance(one_known.inputs, tuple)
    assert one_known.inputs[0].shape == (4, 6)


def test_several_inputs_keep_their_names(tmp_path: Path):
    data = load_npz(saved(tmp_path / "a.npz", input_ids=Y, mask=np.ones(4, bool), labels=Y))
    assert isinstance(data.inputs, dict)
    assert list(data.inputs) == ["input_ids", "mask"]
    assert data.inputs["mask"].dtype == torch.bool


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", [">f4", "<f8", "f2", "u1", "u2", "u4", "i1", ">i8", "?", "g"])
def test_layouts_and_types(tmp_path: Path, order: str, kind: str):
    array = np.array([[0, 1, 2], [3, 4, 5]], order=order).astype(kind)  # type: ignore[call-overload]
    np.savez_compressed(tmp_path / "a.npz", x=array)
    data = load_npz(tmp_path / "a.npz")
    assert isinstance(data.inputs, tuple)
    np.testing.assert_array_equal(data.inputs[0].numpy(), array.astype(data.inputs[0].numpy().dtype))


@settings(max_examples=30)
@given(arrays.arrays(np.float32, arrays.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=5)))
def test_round_trip(array: np.ndarray):
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"kfe-fx-round-trip-{os.getpid()}.npz"
    try:
        data = load_npz(saved(path, x=array))
    finally:
        path.unlink(missing_ok=True)
    assert isinstance(data.inputs, tuple)
    np.testing.assert_array_equal(data.inputs[0].numpy(), array)


def test_not_a_file(tmp_path: Path):
    refused(tmp_path / "none.npz", "no such file; give an .npz")
    refused(Path("/dev/zero"), "not a regular file")
    text = tmp_path / "text.npz"
    text.write_text("hello")
    refused(text, "not an .npz file")
    text.write_bytes(b"")
    refused(text, "not an .npz file")
    np.save(tmp_path / "single.npy", X)
    refused(tmp_path / "single.npy", "numpy.savez")


def test_truncated_at_every_length(tmp_path: Path):
    whole = saved(tmp_path / "whole.npz", x=X, y=Y).read_bytes()
    cut = tmp_path / "cut.npz"
    for length in range(0, len(whole), 7):
        cut.write_bytes(whole[:length])
        refused(cut, "not an .npz|damaged")


def test_flipped_bits_never_load_wrong_numbers(tmp_path: Path):
    np.savez_compressed(tmp_path / "whole.npz", x=X, y=Y)
    whole = (tmp_path / "whole.npz").read_bytes()
    path = tmp_path / "flipped.npz"
    refusals = 0
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 16]) + whole[position + 1 :])
        try:
            data = load_npz(path)
        except BadData:
            refusals += 1
        else:  # dates, versions and names carry no checksum; the numbers do
            values = [t.flatten().tolist() for _, t in data.named_inputs()]
            if data.targets is not None:
                values.append(data.targets.tolist())
            assert all(v in (X.flatten().tolist(), Y.tolist()) for v in values)
    assert refusals > len(whole) // 2


def test_pickled_objects_are_never_loaded(tmp_path: Path):
    class Evil:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    array = np.empty(2, object)
    array[0] = Evil()
    refused(saved(tmp_path / "a.npz", x=array), "Python objects, which can run code")
    fields = np.zeros(2, [("a", object)])
    refused(saved(tmp_path / "b.npz", x=fields), "Python objects")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "array", [np.array(["a", "b"]), np.zeros(2, complex), np.zeros(2, "M8[s]"), np.zeros(2, [("a", "f4")])]
)
def test_not_numbers(tmp_path: Path, array: np.ndarray):
    refused(saved(tmp_path / "a.npz", x=array), "not numbers")


def test_numbers_beyond_int64(tmp_path: Path):
    refused(saved(tmp_path / "a.npz", x=np.array([2**64 - 1], np.uint64)), "above int64")


def test_what_is_ambiguous_or_missing(tmp_path: Path):
    refused(saved(tmp_path / "a.npz", a=X, b=X, c=Y), "cannot tell the targets among a, b, c")
    refused(saved(tmp_path / "b.npz", x=X, y=Y, labels=Y), "both 'y' and 'labels'")
    refused(saved(tmp_path / "c.npz", y=Y), "targets only")
    refused(saved(tmp_path / "d.npz"), "holds no arrays|not an .npz")
    refused(saved(tmp_path / "e.npz", x=X, y=Y[:3]), "lengths differ: inputs has 4, targets has 3")
    refused(saved(tmp_path / "f.npz", x=X[:0], y=Y[:0]), "no examples")
    refused(saved(tmp_path / "g.npz", x=np.float32(1)), "single number")


def member(header: bytes, body: bytes = b"") -> bytes:
    text = header + b" " * (-(10 + len(header) + 1) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"no array at all", "no .npy array|version"),
        (b"", "no .npy array|damaged"),
        (member(b"{'descr': '<f4', 'fortran_order': False, 'shape': (99,), }"), "holds 0 bytes where"),
        (member(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }", b"1234"), "holds 4 bytes where"),
        (member(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -1), }", b"1234"), "holds 4 bytes where"),
        (member(b"{'descr': '<f4', 'fortran_order': False, 'shape': (2**40, 2**40), }"), "no .npy array|where"),
        (member(b"{'descr': '<f4', 'fortran_order': False, 'shape': (0, 99), }"), "no examples"),
        (member(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"), "Python objects"),
        (member(b"{'descr': '|V0', 'fortran_order': False, 'shape': (1,), }"), "not numbers"),
        (
            member(b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"1," * 70 + b"), }", b"1234"),
            "no .npy array",
        ),
        (member(b"__import__('os').abort()"), "no .npy array"),
        (b"\x93NUMPY\x09\x00" + b"0" * 90, "version"),
    ],
)
def test_forged_members(tmp_path: Path, content: bytes, text: str):
    path = tmp_path / "forged.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", content)
    refused(path, text)


def test_other_members(tmp_path: Path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(path, "is no array")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_members(tmp_path: Path):
    path = tmp_path / "a.npz"
    buffer = io.BytesIO()
    np.save(buffer, X)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", buffer.getvalue())
        archive.writestr("x.npy", buffer.getvalue())
    refused(path, "'x' twice")


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    np.savez_compressed(tmp_path / "bomb.npz", x=np.zeros((1000, 1000), np.float32))
    assert (tmp_path / "bomb.npz").stat().st_size < 10_000
    monkeypatch.setattr(npz, "machine_memory", lambda: 2_000_000)
    refused(tmp_path / "bomb.npz", "half of this machine's memory")
