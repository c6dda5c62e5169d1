"""Tensors of a program file: the table that says which record of the zip holds which, and their bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from kfe_fx.errors import UnsupportedModel
from kfe_fx.format.archive import Archive
from kfe_fx.format.fields import Malformed, boolean, distinct, integer, items, record, text, texts
from kfe_fx.format.values import DTYPE_NAMES, DTYPES

_LARGEST = 2**48  # elements
_FIELDS = ("record", "dtype", "shape", "stride")


@dataclass(frozen=True)
class Entry:
    """One tensor of the table: all its names, those outside the state dict, and what it is."""

    names: tuple[str, ...]
    transient: tuple[str, ...]
    kind: str  # "parameter" or "buffer"
    requires_grad: bool
    stored: dict[str, Any]


def prepared(value: torch.Tensor, name: str) -> torch.Tensor:
    """Return ``value`` as it is stored: on the CPU, dense, alone in its storage.

    Raises:
        UnsupportedModel: a tensor of a kind that the file does not hold (quantised, sparse, without data).
    """
    plain = value.detach()
    if plain.is_meta or plain.layout is not torch.strided or plain.is_quantized or plain.dtype not in DTYPE_NAMES:
        raise UnsupportedModel(
            f"the tensor {name!r} ({plain.dtype}, {plain.layout}) has no form in a program file; convert it"
        )
    plain = plain.cpu().resolve_conj().resolve_neg()
    whole = plain.untyped_storage().nbytes() == plain.numel() * plain.element_size()
    if type(plain) is not torch.Tensor or not whole or not _dense(plain.shape, plain.stride()):
        plain = torch.empty(plain.shape, dtype=plain.dtype).copy_(plain)
    return plain


def raw(value: torch.Tensor) -> memoryview:
    """Return the bytes of a prepared tensor without copying them."""
    return torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage()).numpy().data


def describe(value: torch.Tensor, where: str) -> dict[str, Any]:
    """Return the table's fields for a prepared tensor whose bytes lie in the record ``where``."""
    shape, stride = list(value.shape), list(value.stride())
    return {"record": where, "dtype": DTYPE_NAMES[value.dtype], "shape": shape, "stride": stride}


def decode_entry(value: Any, where: str) -> Entry:
    """Read one line of the table.

    Raises:
        Malformed: it is not one.
    """
    found = record(value, where, ("names", "transient", "kind", "requires_grad", *_FIELDS))
    names = distinct([tensor_name(name, where) for name in texts(found["names"], where)], where)
    transient = distinct(texts(found["transient"], where), where)
    kind, needs_grad = text(found["kind"], where), boolean(found["requires_grad"], where)
    if not names or not {*names} >= {*transient} or kind not in ("parameter", "buffer"):
        raise Malformed(f"{where}: a tensor has names and is a parameter or a buffer")
    if kind == "parameter" and transient:
        raise Malformed(f"{where}: a parameter is always in the state dict")
    stored = {key: found[key] for key in _FIELDS}
    dtype = DTYPES.get(text(stored["dtype"], where))
    if dtype is None or (needs_grad and (kind == "buffer" or not (dtype.is_floating_point or dtype.is_complex))):
        raise Malformed(f"{where}: a tensor of this type does not exist or has no gradient")
    return Entry(tuple(names), tuple(transient), kind, needs_grad, stored)


def tensor_name(name: str, where: str) -> str:
    """Return a dotted name if modules can carry it and generated code can spell it."""
    parts = name.split(".")
    if not all(parts) or not name.isprintable() or any(char in name for char in "\"'\\`{}") or len(parts) > 64:
        raise Malformed(f"{where}: {name[:80]!r} is not the name of a tensor")
    return name


def read(archive: Archive, fields: Any, where: str, used: set[str]) -> torch.Tensor:
    """Read one tensor; ``used`` collects the records, none of which is read twice.

    Raises:
        Malformed: the fields are not those of a dense tensor that fills its record exactly.
    """
    found = record(fields, where, _FIELDS)
    name = text(found["record"], where)
    dtype = DTYPES.get(text(found["dtype"], where))
    shape = [integer(size, where, 0, _LARGEST) for size in items(found["shape"], where, 64)]
    stride = [integer(step, where, 0, _LARGEST) for step in items(found["stride"], where, 64)]
    if dtype is None or len(shape) != len(stride) or not _dense(shape, stride):
        raise Malformed(f"{where}: the type, shape or strides are not those of a dense tensor")
    if math.prod(size for size in shape if size) > _LARGEST:
        raise Malformed(f"{where}: a tensor of that size does not exist")
    size = math.prod(shape) * dtype.itemsize
    if not name.startswith(("data/", "kfe/data/")) or name in used or archive.size(name) != size:
        raise Malformed(f"{where}: the record {name[:40]!r} does not hold this tensor alone")
    used.add(name)
    try:
        made = torch.empty_strided(shape, stride, dtype=dtype)
    except RuntimeError:  # the allocator's word for no memory
        raise Malformed(f"{where}: there is no memory for its {size / 2**20:.0f} MiB") from None
    buffer = raw(made)
    archive.read_into(name, buffer)
    if dtype is torch.bool and size and int(torch.frombuffer(buffer, dtype=torch.uint8).max()) > 1:
        raise Malformed(f"{where}: a truth value is neither 0 nor 1")
    return made


def _dense(shape: Any, stride: Any) -> bool:
    """Tell whether the elements fill their storage without gaps or overlaps, in whatever order of the dims."""
    if 0 in shape:
        return list(stride) == list(torch.empty(tuple(shape), device="meta").stride()) if _small(shape) else False
    expected = 1
    for step, size in sorted((step, size) for step, size in zip(stride, shape, strict=True) if size != 1):
        if step != expected:
            return False
        expected *= size
    return True


def _small(shape: Any) -> bool:
    return math.prod(size for size in shape if size) <= _LARGEST
