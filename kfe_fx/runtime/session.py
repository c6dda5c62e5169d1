"""ONNX Runtime sessions with settings fit for measuring: one thread unless said, quiet, no spinning between runs."""

from __future__ import annotations

import os
import re
import tempfile
from typing import Any, Literal

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors  # pyright: ignore[reportAttributeAccessIssue]

from kfe_fx.errors import BadFile, UnsupportedModel, UsageError
from kfe_fx.runtime.lower import first_line

# What loading or running a model raises: one class per status code, with no common base but Exception.
ORT_ERRORS: tuple[type[Exception], ...] = (
    *(kind for kind in vars(ort_errors).values() if isinstance(kind, type) and issubclass(kind, Exception)),
    RuntimeError,
    ValueError,
)

_LEVELS = {
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


def make_session(
    model: bytes | str | os.PathLike[str],
    threads: int = 1,
    provider: str = "CPUExecutionProvider",
    optimization: Literal["none", "basic", "extended", "all"] = "all",
    profile: bool | str = False,
    optimized: str | None = None,
) -> ort.InferenceSession:
    """Open an ONNX model, given as bytes or as a path, in ONNX Runtime.

    ``threads`` work inside one operation; operations run one after another. With ``profile`` (True, or the beginning
    of a path) the session writes a trace whose name ``session.end_profiling()`` returns. ``optimized`` is a path for
    the graph that really runs, with its weights beside it at ``optimized.data``.

    Raises:
        BadFile: the path holds nothing that ONNX Runtime can read.
        UnsupportedModel: the bytes are no model that ONNX Runtime runs.
        UsageError: fewer than one thread, an unknown optimization level, or a provider this build lacks.
    """
    if threads < 1:
        raise UsageError(f"threads must be at least 1, got {threads}")
    if optimization not in _LEVELS:
        raise UsageError(f"optimization must be one of {', '.join(_LEVELS)}, got {optimization!r}")
    provider = provider_name(provider)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = _LEVELS[optimization]
    options.log_severity_level = 4
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = (
            profile if isinstance(profile, str) else os.path.join(tempfile.gettempdir(), "kfe_fx")
        )
    if optimized is not None:
        options.optimized_model_filepath = optimized
        # without its weights the graph is read in no time; below 64 bytes they are constants of the graph
        beside = f"{os.path.basename(optimized)}.data"
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", beside)
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "64")
    # Idle workers of one session would otherwise burn the cores on which the next one is measured.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    source: Any = model if isinstance(model, bytes) else os.fspath(model)
    if not isinstance(source, bytes):
        check_readable(source)
    try:
        return ort.InferenceSession(source, options, providers=[provider])
    except ORT_ERRORS as error:
        if isinstance(source, bytes):
            raise UnsupportedModel(_refusal(error)) from error
        raise BadFile(f"{source}: ONNX Runtime cannot load it: {first_line(error)}") from error


def provider_name(given: str) -> str:
    """Return ONNX Runtime's name for a provider: ``CPUExecutionProvider`` for that or for ``cpu``, in any case.

    Raises:
        UsageError: this build of ONNX Runtime lacks the provider; the text names those it has.
    """
    available = ort.get_available_providers()
    short = {_short(name): name for name in available}
    found = short.get(_short(given))
    if found is None:
        known = next((name for name in ort.get_all_providers() if _short(name) == _short(given)), given)
        raise UsageError(f"this ONNX Runtime has no provider {known}; it has {', '.join(available)}")
    return found


def _short(provider: str) -> str:
    return provider.lower().removesuffix("executionprovider")


def _refusal(error: Exception) -> str:
    text = first_line(error)
    missing = re.search(r"Could not find an implementation for (\w+)\(", text)
    if missing:
        return f"ONNX Runtime has no {missing[1]} for the number type of this network; convert the network to float32"
    return f"ONNX Runtime refuses the model: {text}"


def check_readable(path: str | os.PathLike[str]) -> None:
    """Refuse a path that is missing, empty, unreadable or not a regular file (a device may never end).

    Raises:
        BadFile: with what is wrong.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise BadFile(f"{path} does not exist")
    if not os.path.isfile(path):
        raise BadFile(f"{path} is not a regular file; name an .onnx file")
    if os.path.getsize(path) == 0:
        raise BadFile(f"{path} is empty")
    if not os.access(path, os.R_OK):
        raise BadFile(f"{path} cannot be read; check its permissions")


def run(session: ort.InferenceSession, feeds: dict[str, Any]) -> list[Any]:
    """Run a session on named arrays and return its outputs in order.

    Raises:
        UnsupportedModel: ONNX Runtime fails on these inputs.
    """
    try:
        return list(session.run(None, feeds))
    except ORT_ERRORS as error:
        raise UnsupportedModel(f"ONNX Runtime fails on this model: {first_line(error)}") from error
