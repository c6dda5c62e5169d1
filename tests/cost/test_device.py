"""Devices in files and in the cache: what is read back, what is refused, what is made again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kfe_fx.cost.device import Device, cache_path, forget, read_device, this_device, write_device
from kfe_fx.cost.probes import fingerprint
from kfe_fx.cost.profile import Profile
from kfe_fx.errors import BadFile

MEASURED = {"nanoseconds": {"call": 6000.0}, "ratios": {"48/64": [0.6, 0.5, 0.7]}, "step_probed": True, "seconds": 1.0}
HERE = Device(fingerprint(), replace(Profile(), name="measured", conv_mac=0.02), 16, ("row",), MEASURED)
INT8 = replace(
    HERE, fingerprint=fingerprint(1, "int8"), step=32,
    profile=replace(HERE.profile, tap=1.0, requantise=0.1, group=0.0, column=0.0, floats=HERE.profile),
)  # fmt: skip
ELSEWHERE = replace(
    HERE, fingerprint=replace(fingerprint(), cpu="aarch64 0x41 0xd0b"), profile=replace(Profile(), block=8), step=8
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget()
    yield tmp_path / "cache"
    forget()


@pytest.fixture
def calibrations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The threads of every calibration, none of which measures anything."""
    asked: list[int] = []

    def calibrate(threads: int, precision: str) -> Device:
        asked.append(threads)
        return replace(INT8 if precision == "int8" else HERE, fingerprint=fingerprint(threads, precision))

    monkeypatch.setattr("kfe_fx.cost.calibrate.calibrate", calibrate)
    return asked


@pytest.mark.parametrize("device", [HERE, INT8, ELSEWHERE])
def test_round_trip(device: Device, tmp_path: Path):
    write_device(device, tmp_path / "device.json")
    found = read_device(tmp_path / "device.json")
    assert found == device
    assert found.measured == device.measured
    assert found.to_json() == device.to_json()
    hash(found)


def test_a_profile_of_float32_is_written_as_ever():
    assert not {"tap", "requantise", "floats"} & HERE.to_json()["profile"].keys()


@pytest.mark.parametrize("change", [{"floats": ...}, {"tap": -1.0}, {"floats": {}}, {"requantise": "fast"}])
def test_an_int8_profile_without_its_constants(change: dict[str, Any], tmp_path: Path):
    content = INT8.to_json()
    profile = {name: value for name, value in {**content["profile"], **change}.items() if value is not ...}
    (tmp_path / "device.json").write_text(json.dumps({**content, "profile": profile}))
    with pytest.raises(BadFile, match="not a usable device profile"):
        read_device(tmp_path / "device.json")


def test_precisions_are_kept_apart(calibrations: list[int], cache: Path):
    floats, quantised = this_device(), this_device(1, "int8")
    assert (floats.fingerprint.precision, quantised.fingerprint.precision) == ("fp32", "int8")
    forget()
    assert (this_device(), this_device(1, "int8")) == (floats, quantised)
    assert calibrations == [1, 1]
    assert len(list(cache.rglob("*.json"))) == 2


def test_which_device_is_this_machine():
    assert HERE.is_this_machine()
    assert replace(HERE, fingerprint=fingerprint(threads=7)).is_this_machine()  # threads are chosen, not given
    assert not ELSEWHERE.is_this_machine()
    assert not replace(HERE, fingerprint=replace(fingerprint(), onnxruntime="1.2.3")).is_this_machine()


def spoiled(path: str, value: Any) -> bytes:
    content = json.loads(json.dumps(HERE.to_json()))
    *outer, last = path.split("/")
    place = content
    for key in outer:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (b"", "Expecting value"),
        (b"\x00" * 100, "the file"),
        (b"\xff\xfe", "utf-8"),
        (b"[]", "an object is expected"),
        (b"{}", "no device profile"),
        (b'{"format": "kfe-fx device profile"}', "version"),
        (b'{"format": 1, "format": 1}', "a key stands twice"),
        (b"[" * 5000, "the file"),
        (json.dumps(HERE.to_json()).encode()[:-40], "the file"),
        (spoiled("format", "kfe-fx plan"), "no device profile"),
        (spoiled("version", 2), "update kfe-fx"),
        (spoiled("version", "1"), "an integer"),
        (spoiled("version", True), "an integer"),
        (spoiled("more", 1), "unknown ['more']"),
        (spoiled("step", 0), "step"),
        (spoiled("step", 1.5), "step"),
        (spoiled("kept", "row"), "kept"),
        (spoiled("measured/nanoseconds/call", "fast"), "measured.nanoseconds.call"),
        (spoiled("measured/ratios/48~1", [1, "x", 2]), "measured.ratios"),
        (spoiled("measured/seconds", None), "measured.seconds"),
        (spoiled("profile/conv_mac", ...), "missing ['conv_mac']"),
        (spoiled("profile/warp", 1.0), "unknown ['warp']"),
        (spoiled("profile/conv_mac", float("nan")), "NaN is not JSON"),
        (spoiled("profile/conv_mac", float("inf")), "Infinity is not JSON"),
        (spoiled("profile/conv_mac", -0.01), "profile.conv_mac: a number from"),
        (spoiled("profile/conv_mac", 0), "profile.conv_mac: a number from"),
        (spoiled("profile/conv_mac", 1e300), "profile.conv_mac: a number from"),
        (spoiled("profile/conv_mac", "0.02"), "profile.conv_mac: a number from"),
        (spoiled("profile/conv_mac", True), "profile.conv_mac: a number from"),
        (spoiled("profile/conv_mac", 10**400), "profile.conv_mac: a number from"),
        (spoiled("profile/block", 16.0), "profile.block"),
        (spoiled("profile/block", 0), "profile.block"),
        (spoiled("profile/tail", [1, 1, 1]), "profile.tail"),
        (spoiled("profile/tail", [1, 1, 1, -1]), "profile.tail"),
        (spoiled("profile/tail", 1.0), "profile.tail"),
        (spoiled("profile/name", 3), "profile.name"),
        (spoiled("fingerprint/cpu", ...), "fingerprint: missing ['cpu']"),
        (spoiled("fingerprint/cpu", "\ud800"), "fingerprint.cpu"),
        (spoiled("fingerprint/flags", "avx"), "fingerprint.flags"),
        (spoiled("fingerprint/threads", 0), "fingerprint.threads"),
        (spoiled("fingerprint/precision", "int4"), "none of fp32"),
    ],
)
def test_hostile_files(payload: bytes, says: str, tmp_path: Path):
    path = tmp_path / "device.json"
    path.write_bytes(payload)
    with pytest.raises(BadFile) as error:
        read_device(path)
    text = str(error.value)
    assert says in text
    assert text.startswith(str(path))
    assert "\n" not in text
    assert len(text) < 700
    assert "kfe-fx" in text.removeprefix(str(path))  # what to do next


def test_places_that_hold_no_file(tmp_path: Path):
    with pytest.raises(BadFile, match="no such file"):
        read_device(tmp_path / "gone.json")
    with pytest.raises(BadFile, match="not a regular file"):
        read_device(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadFile, match="not a regular file"):
        read_device(tmp_path / "pipe")
    with pytest.raises(BadFile, match="not a regular file"):
        read_device("/dev/zero")


def test_a_huge_file_is_not_read(tmp_path: Path):
    path = tmp_path / "device.json"
    with open(path, "wb") as handle:
        handle.truncate(2**40)
    with pytest.raises(BadFile, match="larger than any"):
        read_device(path)


def test_calibrated_once_then_remembered_then_cached(calibrations: list[int], cache: Path):
    device = this_device()
    assert this_device() is device
    assert calibrations == [1]
    forget()
    assert this_device() == device
    assert calibrations == [1]
    (file,) = cache.rglob("*.json")
    assert file == cache_path(fingerprint())
    assert read_device(file) == device
    assert this_device(2).fingerprint.threads == 2
    assert calibrations == [1, 2]
    assert len(list(cache.rglob("*"))) == len(list(cache.rglob("*.json"))) + 2  # two folders, no draft left


def test_force_measures_again(calibrations: list[int]):
    this_device()
    assert this_device(force=True) is this_device()
    assert calibrations == [1, 1]


@pytest.mark.parametrize("content", [b"", b"{}", b"\x00\xff", json.dumps(ELSEWHERE.to_json()).encode()])
def test_a_cached_file_that_cannot_be_used_is_made_again(content: bytes, calibrations: list[int]):
    place = cache_path(fingerprint())
    place.parent.mkdir(parents=True)
    place.write_bytes(content)
    assert this_device().is_this_machine()
    assert calibrations == [1]
    assert read_device(place).is_this_machine()


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(calibrations: list[int], cache: Path):
    cache.write_text("a file is in the way")
    assert this_device().is_this_machine()
    forget()
    this_device()
    assert calibrations == [1, 1]


def test_another_way_to_measure_has_another_place(monkeypatch: pytest.MonkeyPatch):
    before = cache_path(fingerprint())
    monkeypatch.setattr("kfe_fx.cost.device.ELEMENT_FACTORS", {"abs": 7.0})
    assert cache_path(fingerprint()) != before
