"""Typed reading of JSON that may be hostile: every value is checked, and what is wrong says where."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

# Deeper nesting than any network needs; it bounds every recursion below.
DEPTH = 24


class Malformed(Exception):
    """Say what in a file breaks the format, and at which place; the reader adds the file's name."""


def parse(data: bytes, where: str) -> Any:
    """Parse JSON: no key twice, no NaN or Infinity, UTF-8 only.

    Raises:
        Malformed: it is not such JSON.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise Malformed(f"{where}: a key stands twice")
        return found

    def constant(name: str) -> Any:
        raise Malformed(f"{where}: {name} is not JSON")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except RecursionError:
        raise Malformed(f"{where}: nested too deeply") from None
    except ValueError as error:  # also bad UTF-8 and integers of thousands of digits
        raise Malformed(f"{where}: {error}") from None


def dump(value: Any) -> bytes:
    """Write JSON as it is stored: ASCII, compact, keys in the order given, so that equal programs give equal bytes."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()


def record(value: Any, where: str, keys: Iterable[str], optional: Iterable[str] = ()) -> dict[str, Any]:
    """Return ``value`` if it is an object with exactly these keys, the optional ones perhaps missing."""
    found = table(value, where)
    needed, allowed = set(keys), {*keys, *optional}
    if not needed <= found.keys() <= allowed:
        missing, unknown = sorted(needed - found.keys()), sorted(found.keys() - allowed)
        raise Malformed(f"{where}: missing {missing}, unknown {unknown}"[:300])
    return found


def table(value: Any, where: str) -> dict[str, Any]:
    """Return ``value`` if it is an object."""
    if not isinstance(value, dict):
        raise Malformed(f"{where}: an object is expected")
    for key in value:
        text(key, where)
    return value


def items(value: Any, where: str, limit: int = 1_000_000) -> list[Any]:
    """Return ``value`` if it is a list of at most ``limit`` elements."""
    if not isinstance(value, list) or len(value) > limit:
        raise Malformed(f"{where}: a list of at most {limit} elements is expected")
    return value


def text(value: Any, where: str) -> str:
    """Return ``value`` if it is a string that UTF-8 can hold (JSON can also spell half characters)."""
    if not isinstance(value, str):
        raise Malformed(f"{where}: a string is expected")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise Malformed(f"{where}: the string is not Unicode text") from None
    return value


def texts(value: Any, where: str) -> list[str]:
    """Return ``value`` if it is a list of strings."""
    return [text(item, where) for item in items(value, where)]


def distinct(values: list[str], where: str) -> list[str]:
    """Return ``values`` if none stands twice."""
    if len(set(values)) != len(values):
        raise Malformed(f"{where}: a name stands twice")
    return values


def integer(value: Any, where: str, low: int, high: int) -> int:
    """Return ``value`` if it is an integer from ``low`` to ``high``, both included."""
    if type(value) is not int or not low <= value <= high:
        raise Malformed(f"{where}: an integer from {low} to {high} is expected")
    return value


def boolean(value: Any, where: str) -> bool:
    """Return ``value`` if it is true or false."""
    if not isinstance(value, bool):
        raise Malformed(f"{where}: true or false is expected")
    return value
