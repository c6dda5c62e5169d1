"""Example inputs from text: ``x=float32[b,3,224,224]``; letters are dynamic axes."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from kfe_fx.errors import UsageError

_SPEC = re.compile(r"(?P<name>[A-Za-z_]\w*)\s*=\s*(?P<type>\w+)\s*\[(?P<dims>[^\[\]]*)\]")
_AXIS = re.compile(r"(?P<name>[A-Za-z_]\w*)(:(?P<size>\d{1,9}))?")
_TYPES = {
    name: getattr(torch, name)
    for name in (
        *("float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool"),
        *("complex64", "complex128"),
    )
}
_LARGEST = 2**28  # elements of one example
_FIRST, _OTHER, _STEP = 2, 64, 16  # sizes of dynamic axes: the batch small; the others wide enough, no two equal


def read_specs(specs: Sequence[str]) -> tuple[dict[str, torch.Tensor], dict[str, dict[int, str]]]:
    """Return example inputs by name and their dynamic axes.

    A dim is a number, a letter or name (dynamic, of a size chosen here), or ``name:size`` (dynamic, with the
    example's size given). Floats are drawn from a fixed seed; integers are zeros, which are valid indices everywhere;
    truth values are true.

    Raises:
        UsageError: a text that is no such input, or a name that stands twice.
    """
    inputs: dict[str, torch.Tensor] = {}
    axes: dict[str, dict[int, str]] = {}
    sizes = _given_sizes(specs)
    generator = torch.Generator().manual_seed(0)
    for spec in specs:
        match = _SPEC.fullmatch(spec.strip())
        if match is None:
            raise UsageError(f"--input {spec!r}: write NAME=TYPE[DIMS], as in x=float32[b,3,224,224]")
        name, kind = match["name"], match["type"]
        if name in inputs:
            raise UsageError(f"--input {spec!r}: the input {name!r} stands twice")
        if kind not in _TYPES:
            raise UsageError(f"--input {spec!r}: no type {kind!r}; one of {', '.join(_TYPES)}")
        shape, dynamic = _dims(spec, match["dims"], sizes)
        inputs[name] = _draw(shape, _TYPES[kind], generator)
        if dynamic:
            axes[name] = dynamic
    return inputs, axes


def _given_sizes(specs: Sequence[str]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for spec in specs:
        for axis, size in re.findall(r"([A-Za-z_]\w*):(\d{1,9})", spec):
            if sizes.setdefault(axis, int(size)) != int(size):
                raise UsageError(f"--input {spec!r}: the axis {axis!r} has two sizes")
    return sizes


def _dims(spec: str, text: str, sizes: dict[str, int]) -> tuple[list[int], dict[int, str]]:
    shape: list[int] = []
    dynamic: dict[int, str] = {}
    for dim, part in enumerate(text.split(",") if text.strip() else []):
        part = part.strip()
        match = _AXIS.fullmatch(part)
        if re.fullmatch(r"\d{1,9}", part):
            shape.append(int(part))
        elif match is not None:
            axis = match["name"]
            default = _FIRST if dim == 0 else _OTHER + _STEP * len([size for size in sizes.values() if size > _FIRST])
            shape.append(sizes.setdefault(axis, default))
            dynamic[dim] = axis
        else:
            raise UsageError(f"--input {spec!r}: {part!r} is no dim; a number, a letter, or letter:size")
    total = 1
    for size in shape:
        total *= size
    if not 0 < total <= _LARGEST:
        raise UsageError(f"--input {spec!r}: {total} elements; an example has 1 to {_LARGEST}")
    return shape, dynamic


def _draw(shape: list[int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.ones(shape, dtype=dtype) if dtype is torch.bool else torch.zeros(shape, dtype=dtype)
