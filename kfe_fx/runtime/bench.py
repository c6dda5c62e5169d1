"""Benchmark ONNX files against each other, with inputs made from what the files declare."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from kfe_fx.certificate import CPU
from kfe_fx.errors import UnsupportedModel, UsageError
from kfe_fx.runtime.layers import layer_times
from kfe_fx.runtime.measure import compare
from kfe_fx.runtime.onnx_file import LENGTHS_KEY
from kfe_fx.runtime.origins import read_original
from kfe_fx.runtime.profile import MIN_RUNS, RUNS, Profile, profile
from kfe_fx.runtime.session import make_session, provider_name

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
    provider: str = CPU,
    layers: bool = False,
) -> list[dict[str, Any]]:
    """Measure ONNX files, interleaved, and return one row each; the first file is what the others are compared with.

    A row has ``path``, ``megabytes``, ``threads``, ``inputs`` (name to shape), ``clock``, percentiles of a run such
    as ``p50_ms``, ``wall_ms``, ``runs`` and, with more than one file, ``ratio`` to the first with ``ratio_low`` and
    ``ratio_high`` (at least 95 %). ``axes`` gives sizes to named dynamic axes.

    ``provider`` is what was asked for, under ONNX Runtime's name. What it did is told by ``kernels_on`` (provider to
    number of kernels) and ``elsewhere``, the kernels that ran on another one: a session gives the CPU what its
    provider does not take, or everything. Both come from a trace; a session of the CPU alone has no ``elsewhere``,
    and counts its kernels only if ``layers`` are asked for, which adds ``layers``, see ``runtime.layers``.

    Raises:
        BadFile: a path holds nothing that ONNX Runtime reads, or it wrote no trace.
        UsageError: no path, a dynamic axis without a size, or a provider this build of ONNX Runtime lacks.
        UnsupportedModel: a file does not run on the inputs it declares.
    """
    if not paths:
        raise UsageError("bench needs at least one ONNX file")
    if batch < 1:
        raise UsageError(f"the batch size must be at least 1, got {batch}")
    provider = provider_name(provider)
    sessions = [make_session(path, threads, provider) for path in paths]
    feeds = [declared_feeds(session, batch=batch, axes=axes, seed=seed) for session in sessions]
    result = compare(sessions, feeds, seconds=seconds, seed=seed)
    del sessions  # weights on a device, which the traced sessions need as well
    traced: list[Profile] | list[None] = [None] * len(paths)
    if layers or provider != CPU:
        runs = RUNS if layers else MIN_RUNS
        traced = profile(paths, feeds, threads=threads, provider=provider, runs=runs, seconds=max(seconds, 1.0))
    rows = []
    for index, path in enumerate(paths):
        latency, ratio, trace = result.latencies[index], result.ratios[index], traced[index]
        row: dict[str, Any] = {
            "path": os.fspath(path),
            "megabytes": round(_bytes(path) / 1e6, 3),
            "threads": threads,
            "provider": provider,
            "inputs": {name: list(array.shape) for name, array in feeds[index].items()},
            "clock": result.clock,
        }
        row |= {f"{name}_ms": value for name, value in latency.to_json().items() if name.startswith("p")}
        row |= {"wall_ms": result.wall_ms[index], "runs": latency.runs}
        if len(paths) > 1:
            row |= {"ratio": ratio.value, "ratio_low": ratio.low, "ratio_high": ratio.high}
        if trace is not None:
            row |= {
                "kernels_on": trace.kernels_on,
                "elsewhere": [kernel.name for kernel in trace.kernels if kernel.provider != provider],
            }
        if trace is not None and layers:
            row["layers"] = layer_times(trace, read_original(path), latency.p50).to_json()
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
