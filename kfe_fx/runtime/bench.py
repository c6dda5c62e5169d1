"""Benchmark ONNX files against each other, with inputs made from what the files declare."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from kfe_fx.errors import UnsupportedModel, UsageError
from kfe_fx.runtime.measure import compare
from kfe_fx.runtime.onnx_file import LENGTHS_KEY
from kfe_fx.runtime.session import make_session

_TYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint64)": np.uint64,
    "tensor(uint32)": np.uint32,
    "tensor(uint16)": np.uint16,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


def bench(
    paths: Sequence[str | os.PathLike[str]],
    *,
    threads: int = 1,
    batch: int = 1,
    seconds: float = 2.0,
    axes: Mapping[str, int] | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Measure ONNX files, interleaved, and return one row each; the first file is what the others are compared with.

    A row has ``path``, ``megabytes``, ``threads``, ``inputs`` (name to shape), ``clock``, ``p10_ms``, ``p50_ms``,
    ``p90_ms``, ``wall_ms``, ``runs`` and, with more than one file, ``ratio`` to the first with ``ratio_low`` and
    ``ratio_high`` (at least 95 %). ``axes`` gives sizes to named dynamic axes.

    Raises:
        BadFile: a path holds nothing that ONNX Runtime reads.
        UsageError: no path, or a dynamic axis without a size.
        UnsupportedModel: a file does not run on the inputs it declares.
    """
    if not paths:
        raise UsageError("bench needs at least one ONNX file")
    if batch < 1:
        raise UsageError(f"the batch size must be at least 1, got {batch}")
    sessions = [make_session(path, threads) for path in paths]
    feeds = [declared_feeds(session, batch=batch, axes=axes, seed=seed) for session in sessions]
    result = compare(sessions, feeds, seconds=seconds, seed=seed)
    rows = []
    for index, path in enumerate(paths):
        latency, ratio = result.latencies[index], result.ratios[index]
        row: dict[str, Any] = {
            "path": os.fspath(path),
            "megabytes": round(_bytes(path) / 1e6, 3),
            "threads": threads,
            "inputs": {name: list(array.shape) for name, array in feeds[index].items()},
            "clock": result.clock,
            "p10_ms": latency.p10,
            "p50_ms": latency.p50,
            "p90_ms": latency.p90,
            "wall_ms": result.wall_ms[index],
            "runs": latency.runs,
        }
        if len(paths) > 1:
            row |= {"ratio": ratio.value, "ratio_low": ratio.low, "ratio_high": ratio.high}
        rows.append(row)
    return rows


def declared_feeds(
    session: ort.InferenceSession, *, batch: int = 1, axes: Mapping[str, int] | None = None, seed: int = 0
) -> dict[str, np.ndarray]:
    """Make inputs from the types and shapes that a model declares.

    Dim 0 and an axis called ``batch`` take ``batch`` where they are dynamic; every other dynamic axis must stand in
    ``axes``. Floats are normal, whole numbers 0 or 1 (valid in nearly every table), booleans true; sequences whose
    lengths are an input, which files written here tell of, have all their steps.

    Raises:
        UsageError: a dynamic axis without a size.
        UnsupportedModel: an input that is no tensor of numbers.
    """
    generator = np.random.default_rng(seed)
    given = dict(axes or {})
    feeds = {}
    lengths = _lengths(session)
    sizes: dict[str, int] = {}
    for declared in session.get_inputs():
        dtype = _TYPES.get(declared.type)
        if dtype is None:
            raise UnsupportedModel(f"input {declared.name!r} is {declared.type}; bench makes tensors of numbers only")
        shape = [_size(declared.name, dim, size, batch, given) for dim, size in enumerate(declared.shape)]
        sizes |= {name: size for name, size in zip(declared.shape, shape, strict=True) if isinstance(name, str)}
        if np.issubdtype(dtype, np.floating):
            feeds[declared.name] = generator.standard_normal(shape).astype(dtype)
        elif dtype is np.bool_:
            feeds[declared.name] = np.ones(shape, dtype)
        else:
            feeds[declared.name] = generator.integers(0, 2, shape).astype(dtype)
    for name, longest in lengths.items():
        whole = sizes.get(longest) if isinstance(longest, str) else longest
        if name in feeds and isinstance(whole, int):
            feeds[name] = np.full_like(feeds[name], whole)
    return feeds


def _lengths(session: ort.InferenceSession) -> dict[str, Any]:
    try:
        told = json.loads(session.get_modelmeta().custom_metadata_map.get(LENGTHS_KEY, "{}"))
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def _size(name: str, dim: int, size: int | str | None, batch: int, given: Mapping[str, int]) -> int:
    if isinstance(size, int):
        return size
    axis = size or f"dim {dim}"
    if axis in given:
        return given[axis]
    if axis == "batch" or dim == 0:
        return batch
    raise UsageError(f"input {name!r} has the dynamic axis {axis!r}; give its size with --axis {axis}=N")


def _bytes(path: str | os.PathLike[str]) -> int:
    """Return the size of a model with the weights that may stand beside it."""
    beside = f"{os.fspath(path)}.data"
    return os.path.getsize(path) + (os.path.getsize(beside) if os.path.isfile(beside) else 0)
