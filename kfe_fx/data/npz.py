"""Read .npz files from anyone: no pickle, no more memory than the machine has, and one-line errors."""

from __future__ import annotations

import math
import os
import stat
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor

from kfe_fx.data.dataset import ArrayData, Inputs
from kfe_fx.errors import BadData

INPUTS = ("x", "inputs", "images")
TARGETS = ("y", "targets", "labels")
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def load_npz(path: Path) -> ArrayData:
    """Read examples from an .npz file.

    Targets are the array called y, targets or labels; what remains is the one input (x, inputs, images or any
    other name) or, if there are several, inputs by name. Two arrays of unknown names are inputs and targets in
    order.

    Args:
        path: the file.

    Returns:
        The examples, in the types of the file.

    Raises:
        BadData: the file is missing, damaged, no .npz, larger than memory, or its arrays are not numbers.
    """
    if not path.exists():
        raise BadData(
            f"{path}: no such file; give an .npz, a folder of images, file.py:factory, glyphs:N, chars:N, tags:N or "
            "digits"
        )
    if not stat.S_ISREG(path.stat().st_mode):
        raise BadData(f"{path}: not a regular file; give an .npz file")
    if not zipfile.is_zipfile(path):
        raise BadData(f"{path}: not an .npz file; write one with numpy.savez(path, x=inputs, y=targets)")
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = _read(path, archive)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        # NotImplementedError: an unknown compression; RuntimeError: an encrypted member
        raise BadData(f"{path}: damaged or not readable ({error}); write the file again") from error
    inputs, targets = _roles(path, arrays)
    return ArrayData(inputs, targets, name=path.name)


def machine_memory() -> int:
    """Return the bytes of physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(name: str, size: int) -> None:
    """Refuse to read `size` bytes where they would fill more than half of the machine's memory.

    Raises:
        BadData: they would.
    """
    limit = machine_memory() // 2
    if size > limit:
        raise BadData(
            f"{name}: holds {size / 2**30:.1f} GiB of arrays, above {limit / 2**30:.1f} GiB, half of this"
            " machine's memory; give fewer examples"
        )


def check_numbers(name: str, key: str, dtype: np.dtype[Any]) -> None:
    """Refuse elements that are neither booleans nor real numbers.

    Raises:
        BadData: they are text, dates, records or complex.
    """
    if dtype.kind not in "biuf":
        raise BadData(f"{name}: {key} holds {dtype}, not numbers; save it as float32 or int64")


def to_tensor(name: str, key: str, array: NDArray[Any]) -> Tensor:
    """Turn an array of numbers into a tensor of its type (whole numbers that torch lacks become int64).

    Raises:
        BadData: the elements are not numbers.
    """
    check_numbers(name, key, array.dtype)
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        if array.size and int(array.max()) > np.iinfo(np.int64).max:
            raise BadData(f"{name}: {key} holds whole numbers above int64; save it as int64")
        array = array.astype(np.int64)
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def to_targets(tensor: Tensor) -> Tensor:
    """Give targets the types of losses: whole numbers int64, others float32."""
    return tensor.to(torch.float32 if tensor.is_floating_point() else torch.int64)


def _read(path: Path, archive: zipfile.ZipFile) -> dict[str, Tensor]:
    members = [info for info in archive.infolist() if not info.is_dir()]
    if not members:
        raise BadData(f"{path}: holds no arrays; write them with numpy.savez(path, x=inputs, y=targets)")
    # what is declared is bounded before anything is unpacked; zipfile reads no more than what is declared
    check_memory(str(path), sum(info.file_size for info in members))
    arrays: dict[str, Tensor] = {}
    for info in members:
        if not info.filename.endswith(".npy"):
            raise BadData(f"{path}: member {info.filename!r} is no array; an .npz holds .npy members only")
        key = info.filename.removesuffix(".npy")
        if key in arrays:
            raise BadData(f"{path}: holds {key!r} twice; write the file again")
        arrays[key] = to_tensor(str(path), key, _array(path, archive, info, key))
    return arrays


def _array(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, key: str) -> NDArray[Any]:
    with archive.open(info) as stream:
        try:
            version = npy.read_magic(stream)
            if version not in _HEADERS:
                raise BadData(f"{path}: {key} has .npy version {version}; save numbers only, with numpy.savez")
            sizes, fortran, dtype = _HEADERS[version](stream)
            if dtype.hasobject:
                raise BadData(f"{path}: {key} holds Python objects, which can run code; save numbers only")
            check_numbers(str(path), key, dtype)
            raw = stream.read(info.file_size)
            # math.prod does not overflow; -1 would make reshape guess
            if min(sizes, default=0) < 0 or len(raw) != math.prod(sizes) * dtype.itemsize:
                text = f"{len(raw)} bytes where its header says {list(sizes)} of {dtype}"
                raise BadData(f"{path}: {key} holds {text}; write the file again")
            # a bytearray keeps the array writable, as torch wants it
            return np.frombuffer(bytearray(raw), dtype).reshape(sizes, order="F" if fortran else "C")
        except ValueError as error:
            raise BadData(f"{path}: {key} is no .npy array ({_line(error)}); write the file again") from error


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _roles(path: Path, arrays: dict[str, Tensor]) -> tuple[Inputs, Tensor | None]:
    """Tell inputs from targets by their names."""
    marked = [key for key in arrays if key in TARGETS]
    if len(marked) > 1:
        raise BadData(f"{path}: both {marked[0]!r} and {marked[1]!r} look like targets; keep one of them")
    known = [key for key in arrays if key in INPUTS]
    if not marked and len(arrays) == 2 and len(known) < 2:
        first, second = arrays
        target = first if second in INPUTS else second
    elif not marked and len(arrays) > 1:
        raise BadData(f"{path}: cannot tell the targets among {', '.join(arrays)}; name them y, targets or labels")
    else:
        target = marked[0] if marked else None
    rest = {key: tensor for key, tensor in arrays.items() if key != target}
    if not rest:
        raise BadData(f"{path}: holds targets only; add the inputs as x, inputs or images")
    inputs: Inputs = tuple(rest.values()) if len(rest) == 1 else rest
    return inputs, None if target is None else to_targets(arrays[target])
