"""A device: what it is, how fast its kernels are, in which steps widths save time; kept in files and in a cache."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from kfe_fx.cost import probes
from kfe_fx.cost.probes import FORMAT, PRECISIONS, VERSION, Fingerprint, fingerprint
from kfe_fx.cost.profile import CELL_FACTORS, ELEMENT_FACTORS, Profile
from kfe_fx.errors import BadFile
from kfe_fx.format.atomic import replacing
from kfe_fx.format.fields import Malformed, boolean, integer, items, parse, record, table, text, texts

# many times what a file of today holds
_LARGEST = 2**20
# nanoseconds and bytes beyond which a constant is no time or size of any machine that runs ONNX Runtime
_SIZES = ("cache", "reach", "inner")
_OVERHEADS = ("call", "kernel", "conv_kernel", "recurrent_kernel", "step", "group")
_MOST = {**dict.fromkeys(_SIZES, 1e12), **dict.fromkeys(_OVERHEADS, 1e9)}
_MOST_PER_UNIT = 1e5
_LEAST = 1e-9
# what some precisions know, and others do without
_INT8 = ("tap", "requantise", "floats")
_FREE = ("tap", "requantise", "column", "group")


@dataclass(frozen=True)
class Device:
    """What a device was found to be.

    ``profile``: constants of the cost model, in nanoseconds and bytes. ``step``: widths save time in multiples of it.
    ``kept``: constants whose measurement was not believed. ``measured``: the raw nanoseconds, plain data.
    """

    fingerprint: Fingerprint
    profile: Profile
    step: int
    kept: tuple[str, ...] = ()
    measured: Mapping[str, Any] = field(default_factory=dict, compare=False, hash=False)

    def is_this_machine(self) -> bool:
        """Tell whether what is measured here and now can be compared with this device.

        Processor, ONNX Runtime, its optimisation level and provider must agree; threads and precision are chosen at
        each run, not given by the machine.
        """
        here = fingerprint(self.fingerprint.threads, self.fingerprint.precision)
        return here == self.fingerprint

    def to_json(self) -> dict[str, Any]:
        """Return what a device file holds."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint.to_json(),
            "step": self.step,
            "profile": _profile_json(self.profile),
            "kept": list(self.kept),
            "measured": dict(self.measured),
        }


def device_of(found: Any) -> Device:
    """Make a device of what a device file holds, checking every value.

    Raises:
        Malformed: something is missing, unknown, of the wrong type, or no time or size of any machine.
    """
    content = table(found, "the file")
    if content.get("format") != FORMAT:
        raise Malformed("it is no device profile")
    version = integer(content.get("version"), "version", 0, 10**6)
    if version > VERSION:
        raise Malformed(f"it has version {version} of the format, this kfe-fx reads up to {VERSION}: update kfe-fx")
    keys = ("format", "version", "fingerprint", "step", "profile", "kept", "measured")
    content = record(content, "the file", keys)
    measured = record(content["measured"], "measured", ("nanoseconds", "ratios", "step_probed", "seconds"))
    boolean(measured["step_probed"], "measured.step_probed")
    _number(measured["seconds"], "measured.seconds", 0.0, 1e6)
    for name, ratio in table(measured["ratios"], "measured.ratios").items():
        for part in items(ratio, f"measured.ratios.{name}", 3):
            _number(part, f"measured.ratios.{name}", 0.0, 1e6)
    for name, value in table(measured["nanoseconds"], "measured.nanoseconds").items():
        _number(value, f"measured.nanoseconds.{name}", 0.0, 1e15)
    found = _fingerprint(content["fingerprint"])
    return Device(
        found,
        _profile(content["profile"], found.precision),
        integer(content["step"], "step", 1, 64),
        tuple(texts(content["kept"], "kept")),
        measured,
    )


def _fingerprint(found: Any) -> Fingerprint:
    where = "fingerprint"
    names = [one.name for one in fields(Fingerprint)]
    content = record(found, where, names)
    others = {name: text(content[name], f"{where}.{name}")[:200] for name in names if name not in ("flags", "threads")}
    if others["precision"] not in PRECISIONS:
        raise Malformed(f"fingerprint.precision: {others['precision'][:20]!r} is none of {', '.join(PRECISIONS)}")
    flags = tuple(texts(content["flags"], f"{where}.flags"))
    return Fingerprint(**others, flags=flags, threads=integer(content["threads"], f"{where}.threads", 1, 4096))


def _profile_json(profile: Profile) -> dict[str, Any]:
    # a profile of float32 is written as before there were others
    found: dict[str, Any] = {**vars(profile), "tail": list(profile.tail)}
    if profile.floats is None:
        return {name: value for name, value in found.items() if name not in _INT8}
    return {**found, "floats": _profile_json(profile.floats)}


def _profile(found: Any, precision: str) -> Profile:
    names = [one.name for one in fields(Profile) if one.name not in _INT8]
    content = record(found, "profile", [*names, *(_INT8 if precision == "int8" else ())])
    values: dict[str, Any] = {"name": text(content["name"], "profile.name")[:100]}
    for name in ("block", "granule"):
        values[name] = integer(content[name], f"profile.{name}", 1, 64)
    tail = items(content["tail"], "profile.tail", 4)
    if len(tail) != 4:
        raise Malformed("profile.tail: four numbers are expected")
    values["tail"] = tuple(_number(part, "profile.tail", 0.1, 10.0) for part in tail)
    if precision == "int8":
        values["floats"] = _profile(content["floats"], "fp32")
    for name in content:
        if name not in values:
            least = 0.0 if name in _FREE else _LEAST
            values[name] = _number(content[name], f"profile.{name}", least, _MOST.get(name, _MOST_PER_UNIT))
    return Profile(**values)


def _number(value: Any, where: str, low: float, high: float) -> float:
    if type(value) not in (int, float) or not low <= value <= high:  # false for nan as well
        raise Malformed(f"{where}: a number from {low:g} to {high:g} is expected")
    return float(value)


# files ---------------------------------------------------------------------------------------------------------------


def read_device(path: str | os.PathLike[str]) -> Device:
    """Read a device file, also one that was written elsewhere.

    Raises:
        BadFile: it is missing, no regular file, damaged, foreign, newer than this kfe-fx, or says what cannot be.
    """
    path = Path(path)
    again = "write it again with `kfe-fx calibrate -o`, or run_probes.py of a bundle"
    try:
        if not path.is_file():
            reason = "not a regular file" if path.exists() else "no such file"
            raise BadFile(f"{path}: {reason}; `kfe-fx calibrate -o {path.name}` writes one")
        with open(path, "rb") as handle:
            payload = handle.read(_LARGEST + 1)
    except OSError as error:
        raise BadFile(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from error
    if len(payload) > _LARGEST:
        raise BadFile(f"{path}: larger than any device profile ({_LARGEST // 1024} KiB); name a file of `calibrate`")
    try:
        return device_of(parse(payload, "the file"))
    except Malformed as error:
        raise BadFile(f"{path}: not a usable device profile: {error}; {again}") from None


def write_device(device: Device, path: str | os.PathLike[str]) -> None:
    """Write a device file whole or not at all.

    Raises:
        BadFile: the place cannot be written.
    """
    with replacing(Path(path)) as handle:
        handle.write(json.dumps(device.to_json(), indent=1, allow_nan=False).encode() + b"\n")


# the cache -----------------------------------------------------------------------------------------------------------

_here: dict[Fingerprint, Device] = {}


def this_device(threads: int = 1, precision: str = "fp32", *, force: bool = False) -> Device:
    """Return this machine as a device: from this process, from the user's cache, or calibrated anew (about a second).

    A cached file that cannot be used is made again. With ``force`` all are.

    Raises:
        UsageError: fewer than one thread, or a precision that cannot be measured.
    """
    key = fingerprint(threads, precision)
    if not force:
        known = _here.get(key) or _cached(key)
        if known is not None:
            return _here.setdefault(key, known)
    from kfe_fx.cost.calibrate import calibrate

    device = calibrate(threads, precision)
    _here[key] = device
    place = cache_path(key)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_device(device, place)
    except (OSError, BadFile):
        pass  # a home that cannot be written costs a second per process, nothing else
    return device


def cache_path(key: Fingerprint) -> Path:
    """Return where a device with this fingerprint is cached: in the user's cache directory, as XDG_CACHE_HOME says.

    A kfe-fx that measures in another way does not find what this one cached.
    """
    from platformdirs import user_cache_dir

    method = Path(probes.__file__).read_bytes() + repr((Profile(), ELEMENT_FACTORS, CELL_FACTORS)).encode()
    digest = hashlib.sha256(method + json.dumps(key.to_json()).encode()).hexdigest()
    return Path(user_cache_dir("kfe-fx", appauthor=False)) / "devices" / f"{digest[:24]}.json"


def forget() -> None:
    """Forget the devices of this process; files stay."""
    _here.clear()


def _cached(key: Fingerprint) -> Device | None:
    place = cache_path(key)
    if not place.exists():
        return None
    try:
        device = read_device(place)
    except BadFile:
        return None
    return device if device.fingerprint == key else None
