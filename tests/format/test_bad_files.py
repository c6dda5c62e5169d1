from __future__ import annotations

import io
import os
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kfe_fx.errors import BadFile
from kfe_fx.format import load
from kfe_fx.format.archive import Archive, seal
from kfe_fx.format.fields import Malformed
from tests.format.nets import forge, records


def refused(path: Path) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(BadFile) as caught:
        load(path)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    assert len(text) < 600
    return text


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_a_truncated_file_is_refused_wherever_it_ends(saved: dict[str, Path], tmp_path: Path):
    data = saved["convolutional"].read_bytes()
    for length in {0, 1, 4, 21, 22, 30, len(data) - 1, len(data) - 20, *range(0, len(data), len(data) // 60)}:
        refused(written(tmp_path / "x.pt", data[:length]))


def test_a_file_with_something_before_behind_or_left_out_is_refused(saved: dict[str, Path], tmp_path: Path):
    data = saved["convolutional"].read_bytes()
    half = len(data) // 2
    for changed in (
        data + b"\0",
        b"\0" + data,
        data[:half] + data[half + 1 :],
        data[:half] + b"x" + data[half:],
        data * 2,
    ):
        refused(written(tmp_path / "x.pt", changed))


def test_a_flipped_bit_is_noticed_wherever_it_is(saved: dict[str, Path], tmp_path: Path):
    data = bytearray(saved["convolutional"].read_bytes())
    rng = random.Random(1)
    places = {*range(80), *range(len(data) - 120, len(data)), *range(0, len(data), len(data) // 200)}
    for place in sorted(places):
        bit = 1 << rng.randrange(8)
        data[place] ^= bit
        refused(written(tmp_path / "x.pt", bytes(data)))
        data[place] ^= bit
    assert load(written(tmp_path / "x.pt", bytes(data)))


def test_no_regular_file(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for place in ("/dev/zero", "/dev/null", tmp_path, tmp_path / "pipe"):
        assert "not a regular file" in refused(Path(place))
    assert "no such file" in refused(tmp_path / "none.pt")
    refused(tmp_path / "loop")
    with pytest.raises(BadFile):
        load("a\0b")


def test_a_huge_empty_file_is_not_read(tmp_path: Path):
    with open(tmp_path / "x.pt", "wb") as handle:
        handle.truncate(2**40)
    assert "truncated" in refused(tmp_path / "x.pt")


def names_of(content: list[tuple[str, bytes]], name: str) -> int:
    return next(i for i, (key, _) in enumerate(content) if key == name)


TAMPERED: dict[str, Callable[[list[tuple[str, bytes]]], object]] = {
    "a record is missing": lambda c: c.pop(names_of(c, "data/1")),
    "the graph is missing": lambda c: c.pop(names_of(c, "kfe/graph.json")),
    "a record too many": lambda c: c.append(("data/99", b"1234")),
    "a hidden tensor": lambda c: c.append(("kfe/data/99", b"1234")),
    "a longer record": lambda c: c.append(("data/0", c.pop(names_of(c, "data/0"))[1] + b"0")),
    "a shorter record": lambda c: c.append(("data/0", c.pop(names_of(c, "data/0"))[1][:-1])),
    "no graph but text": lambda c: c.append((c.pop(names_of(c, "kfe/graph.json"))[0], b"hello")),
    "a graph of zeros": lambda c: c.append((c.pop(names_of(c, "kfe/graph.json"))[0], bytes(1000))),
    "a graph that is too deep": lambda c: c.append((c.pop(names_of(c, "kfe/graph.json"))[0], b"[" * 10**6)),
    "a graph of one huge number": lambda c: c.append((c.pop(names_of(c, "kfe/graph.json"))[0], b"9" * 10**5)),
    "a graph that is not UTF-8": lambda c: c.append((c.pop(names_of(c, "kfe/graph.json"))[0], b'{"\xff": 1}')),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_tampered_records(what: str, saved: dict[str, Path], tmp_path: Path):
    root, held = records(saved["convolutional"])
    content = list(held.items())
    TAMPERED[what](content)
    refused(forge(tmp_path / "x.pt", root, content))


def test_a_record_that_stands_twice(saved: dict[str, Path], tmp_path: Path):
    root, held = records(saved["convolutional"])
    with pytest.warns(UserWarning, match="Duplicate name"), pytest.raises(Malformed, match="stands twice"):
        forge(tmp_path / "x.pt", root, [*held.items(), ("data/0", held["data/0"])])


def packed(names: list[tuple[str, bytes]], **options: int) -> io.BytesIO:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as opened:  # type: ignore[arg-type]
        for name, data in names:
            opened.writestr(f"x/{name}", data)
    return buffer


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "..\\x", "a/./b", "a/", ""])
def test_paths_that_lead_elsewhere(name: str):
    with pytest.raises(Malformed, match="has no place there"):
        Archive(packed([("data.pkl", b"1"), (name, b"1")]))


def test_a_zip_bomb_is_refused_before_it_is_unpacked():
    with pytest.raises(Malformed, match="compressed"):
        Archive(packed([("kfe/graph.json", bytes(10**7))], compression=zipfile.ZIP_DEFLATED))


def directory_entry(data: bytearray, index: int) -> int:
    """Offset of an entry of the directory of a zip."""
    at = int.from_bytes(data[-6:-2], "little")
    for _ in range(index):
        name, extra, comment = struct.unpack_from("<3H", data, at + 28)
        at += 46 + name + extra + comment
    return at


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (16, 7),  # CRC
        (20, 2**31),  # compressed size
        (24, 2**31),  # size
        (24, 0xFFFFFFFF),  # size in a field that is not there
        (42, 0),  # place: that of the first
        (42, 2**31),  # place: behind the end
        (42, 10),  # place: no header there
    ],
)
def test_a_directory_that_lies(field: int, value: int):
    data = bytearray(packed([("a", b"one"), ("b", b"two"), ("c", b"three")]).getvalue())
    struct.pack_into("<I", data, directory_entry(data, 1) + field, value)
    with pytest.raises(Malformed):
        Archive(io.BytesIO(data)).check("b")


@pytest.mark.parametrize(("field", "value"), [(10, 2), (10, 60000), (12, 5), (12, 2**32 - 1), (16, 1), (16, 2**32 - 1)])
def test_an_end_that_lies(field: int, value: int):
    data = bytearray(packed([("a", b"one"), ("b", b"two"), ("c", b"three")]).getvalue())
    struct.pack_into("<H" if field == 10 else "<I", data, len(data) - 22 + field, value)
    with pytest.raises(Malformed):
        Archive(io.BytesIO(data))


def test_overlapping_records_are_refused():
    # the second record lies inside the first one's bytes
    inner = packed([("b", b"two")]).getvalue()
    data = bytearray(packed([("a", inner), ("b", b"two")]).getvalue())
    place = data.index(b"PK\x03\x04", 10)
    struct.pack_into("<I", data, directory_entry(data, 1) + 42, place)
    with pytest.raises(Malformed, match="overlap"):
        Archive(io.BytesIO(data))


def test_a_file_packed_again_is_refused(saved: dict[str, Path], tmp_path: Path):
    root, held = records(saved["wide"])
    path = written(tmp_path / "x.pt", packed(list(held.items())).getvalue())
    assert "packed again" in refused(path)
    assert root


def test_large_zips_are_read(monkeypatch: pytest.MonkeyPatch):
    buffer = io.BytesIO()
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 3)  # more records than the plain directory can count
    with zipfile.ZipFile(buffer, "w") as opened:
        for index in range(9):
            opened.writestr(zipfile.ZipInfo(f"x/{index}"), b"1")
    seal(buffer)
    assert b"PK\x06\x06" in buffer.getvalue()
    archive = Archive(buffer)
    archive.check_seal()
    assert len(archive.members) == 9
    assert archive.read("8", 1) == b"1"
    data = bytearray(buffer.getvalue())
    for place in range(data.index(b"PK\x06\x06"), len(data)):
        data[place] ^= 64
        with pytest.raises(Malformed):
            Archive(io.BytesIO(data)).check_seal()
        data[place] ^= 64


def test_a_checkpoint_is_no_program(tmp_path: Path):
    torch.save({"a": torch.ones(2)}, tmp_path / "x.pt")
    assert "packed again" in refused(tmp_path / "x.pt")
