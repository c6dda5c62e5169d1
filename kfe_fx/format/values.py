"""Arguments of nodes and templates of inputs and outputs, as JSON and back.

None, booleans, integers, finite floats, strings and lists are themselves; everything else is an object with one key
that says what it is: ``{"node": 3}``, ``{"tuple": [...]}``, ``{"float": "inf"}``, ``{"dtype": "float32"}`` ...
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from kfe_fx.errors import UnsupportedModel
from kfe_fx.format.fields import DEPTH, Malformed, integer, items, table, text
from kfe_fx.structure import Constant

DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "complex64", "complex128"),
        *("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    )
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
LAYOUTS = {"strided": torch.strided}
MEMORY_FORMATS = {
    name: getattr(torch, name) for name in ("contiguous_format", "channels_last", "channels_last_3d", "preserve_format")
}
DEVICES = ("cpu", "cuda", "mps", "xpu", "meta")
_NON_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_LARGEST = 2**64 - 1


def encode(value: Any, number: Callable[[fx.Node], int], where: str = "") -> Any:
    """Return the JSON form of a node's argument; ``number`` gives the index of a node.

    Raises:
        UnsupportedModel: the value has no form in the file.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, fx.Node):
        return {"node": number(value)}
    if isinstance(value, dict):
        return {"dict": [[encode(key, number, where), encode(part, number, where)] for key, part in value.items()]}
    if isinstance(value, torch.Size | tuple):
        kind = "size" if isinstance(value, torch.Size) else "tuple"
        return {kind: [encode(part, number, where) for part in value]}
    if isinstance(value, list):
        return [encode(part, number, where) for part in value]
    if isinstance(value, slice):
        return {"slice": [encode(part, number, where) for part in (value.start, value.stop, value.step)]}
    plain = _encode_scalar(value)
    if plain is None:
        raise UnsupportedModel(f"{where}: an argument of type {type(value).__name__} has no form in a program file")
    return plain


def _encode_scalar(value: Any) -> Any:
    if type(value) is int and -(2**63) <= value <= _LARGEST:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, complex) and math.isfinite(value.real) and math.isfinite(value.imag):
        return {"complex": [value.real, value.imag]}
    for kind, names in (("dtype", DTYPES), ("layout", LAYOUTS), ("memory_format", MEMORY_FORMATS)):
        for name, known in names.items():
            if value is known:
                return {kind: name}
    if isinstance(value, torch.device) and value.type in DEVICES:
        return {"device": str(value)}
    return None


def decode(value: Any, node: Callable[[int], fx.Node], where: str, depth: int = 0) -> Any:
    """Return the argument that ``encode`` wrote; ``node`` gives the node of an index, or refuses it.

    Raises:
        Malformed: it is nothing that ``encode`` writes.
    """
    if depth > DEPTH:
        raise Malformed(f"{where}: nested too deeply")
    if value is None or isinstance(value, bool | float):
        if isinstance(value, float) and not math.isfinite(value):  # JSON can spell 1e999
            raise Malformed(f"{where}: a number is too large")
        return value
    if isinstance(value, int):
        return integer(value, where, -(2**63), _LARGEST)
    if isinstance(value, str):
        return text(value, where)
    if isinstance(value, list):
        return [decode(part, node, where, depth + 1) for part in items(value, where)]
    kind, inner = _only_pair(value, where)
    if kind == "node":
        return node(integer(inner, where, 0, 2**31))
    if kind == "dict":
        return _decode_dict(inner, node, where, depth)
    if kind in ("tuple", "size", "slice"):
        parts = [decode(part, node, where, depth + 1) for part in items(inner, where)]
        return _decode_sequence(kind, parts, where)
    return _decode_scalar(kind, inner, where)


def _only_pair(value: Any, where: str) -> tuple[str, Any]:
    found = table(value, where)
    if len(found) != 1:
        raise Malformed(f"{where}: an object with one key is expected")
    return next(iter(found.items()))


def _decode_dict(inner: Any, node: Callable[[int], fx.Node], where: str, depth: int) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    for pair in items(inner, where):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Malformed(f"{where}: pairs of key and value are expected")
        result[_key(pair[0], where)] = decode(pair[1], node, where, depth + 1)
    if len(result) != len(inner):
        raise Malformed(f"{where}: a key stands twice")
    return result


def _key(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool):
        return value
    return integer(value, where, -(2**63), _LARGEST) if isinstance(value, int) else text(value, where)


def _decode_sequence(kind: str, parts: list[Any], where: str) -> Any:
    if kind == "tuple":
        return tuple(parts)
    if kind == "size":
        return torch.Size([integer(part, where, 0, 2**62) for part in parts])
    if len(parts) != 3 or any(type(part) is not int and part is not None for part in parts):
        raise Malformed(f"{where}: a slice has three integers or null")
    return slice(*parts)


def _decode_scalar(kind: str, inner: Any, where: str) -> Any:
    names = {"float": _NON_FINITE, "dtype": DTYPES, "layout": LAYOUTS, "memory_format": MEMORY_FORMATS}.get(kind)
    if names is not None:
        name = text(inner, where)
        if name not in names:
            raise Malformed(f"{where}: unknown {kind} {name[:40]!r}")
        return names[name]
    if kind == "complex":
        parts = items(inner, where, 2)
        if len(parts) != 2 or any(type(part) is not float or not math.isfinite(part) for part in parts):
            raise Malformed(f"{where}: a complex number has two finite floats")
        return complex(*parts)
    if kind == "device":
        name, _, index = text(inner, where).partition(":")
        if name in DEVICES and (not index or (index.isascii() and index.isdigit() and len(index) < 4)):
            return torch.device(text(inner, where).rstrip(":"))
    raise Malformed(f"{where}: {kind[:40]!r} is no value this version knows; update kfe-fx")


def _no_node(_: Any) -> Any:
    raise Malformed("a template refers to a node")


def encode_template(template: Any) -> Any:
    """Return the JSON form of a template (``kfe_fx.structure``): leaves are ``{"leaf": index}``.

    Raises:
        UnsupportedModel: a constant in it has no form in the file.
    """
    if isinstance(template, Constant):
        return {"constant": encode(template.value, _no_node, "a constant among inputs or outputs")}
    if isinstance(template, int):
        return {"leaf": template}
    if isinstance(template, dict):
        where = "a key among inputs or outputs"
        return {"dict": [[encode(key, _no_node, where), encode_template(part)] for key, part in template.items()]}
    parts = [encode_template(part) for part in template]
    return {"tuple": parts} if isinstance(template, tuple) else parts


def decode_template(value: Any, where: str, leaves: list[int], depth: int = 0) -> Any:
    """Return the template that ``encode_template`` wrote; its leaf indices are appended to ``leaves``.

    Raises:
        Malformed: it is nothing that ``encode_template`` writes.
    """
    if depth > DEPTH:
        raise Malformed(f"{where}: nested too deeply")
    if isinstance(value, list):
        return [decode_template(part, where, leaves, depth + 1) for part in items(value, where)]
    kind, inner = _only_pair(value, where)
    if kind == "leaf":
        leaves.append(integer(inner, where, 0, 1_000_000))
        return leaves[-1]
    if kind == "constant":
        return Constant(decode(inner, _no_node, where, depth + 1))
    if kind == "tuple":
        return tuple(decode_template(part, where, leaves, depth + 1) for part in items(inner, where))
    if kind != "dict":
        raise Malformed(f"{where}: {kind[:40]!r} is no part of a template")
    result: dict[Any, Any] = {}
    for pair in items(inner, where):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Malformed(f"{where}: pairs of key and part are expected")
        result[_key(pair[0], where)] = decode_template(pair[1], where, leaves, depth + 1)
    if len(result) != len(inner):
        raise Malformed(f"{where}: a key stands twice")
    return result
