"""Microbenchmarks that fit a Profile to this machine in a fraction of a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from kfe_fx.cost.profile import ELEMENT_FACTORS, Profile

_LINKS = 6  # kernels in a row, so that the way in and out of the runtime counts little
_LEAST = 0.2  # a constant further than five times from the built-in one is a disturbed measurement


def calibrated(profile: Profile | None = None, *, seconds: float = 0.2, threads: int = 1) -> Profile:
    """Return ``profile`` (default: the built-in one) with its main constants measured on this machine.

    Runs chains of equal kernels in ONNX Runtime and takes the fastest of many runs, ``seconds`` in all (loading comes
    on top). Constants that come out implausible keep their old value.

    Raises:
        UsageError: fewer than one thread, or no time.
    """
    from kfe_fx.errors import UsageError

    if seconds <= 0:
        raise UsageError(f"calibration needs time, got {seconds} s")
    base = profile or Profile()
    share = seconds / (len(_BENCHES) + 2)
    measured: dict[str, float] = {}
    # a call of the runtime costs something before its first kernel: two lengths of one chain tell it from the kernels
    short = _fastest(_activations(8), share, threads)
    overhead = (_fastest(_activations(8, 5 * _LINKS), share, threads) - short) / (4 * _LINKS)
    call = short - _LINKS * overhead
    for name, (build, work) in _BENCHES.items():
        value = ((_fastest(build(), share, threads) - call) / _LINKS - overhead) / work
        measured[name] = value
    measured["kernel"] = overhead
    for name, value in list(measured.items()):
        built_in = getattr(base, name)
        if not _LEAST < value / built_in < 1 / _LEAST:
            del measured[name]
    # what is not measured moves with its kin
    conv = measured.get("conv_mac", base.conv_mac) / base.conv_mac
    depthwise = measured.get("depthwise_mac", base.depthwise_mac) / base.depthwise_mac
    element = measured.get("element", base.element) / base.element
    follow = {
        "narrow_mac": base.narrow_mac * conv,
        "plain_mac": base.plain_mac * conv,
        "plain_depthwise_mac": base.plain_depthwise_mac * depthwise,
        "column": base.column * element,
        "reorder": base.reorder * element,
        "transpose": base.transpose * element,
        "core_byte": base.core_byte * measured.get("gemm_mac", base.gemm_mac) / base.gemm_mac,
        "step": base.step * measured.get("kernel", base.kernel) / base.kernel,
    }
    return replace(base, name="measured", **measured, **follow)


def _fastest(model: tuple[bytes, tuple[int, ...]], seconds: float, threads: int) -> float:
    """Return the nanoseconds of the fastest run."""
    from kfe_fx.runtime.session import make_session, run

    payload, shape = model
    session = make_session(payload, threads=threads)
    feeds: dict[str, Any] = {"x": np.full(shape, 0.5, dtype=np.float32)}
    run(session, feeds)
    best = float("inf")
    started = time.perf_counter()
    while best == float("inf") or time.perf_counter() - started < seconds:
        before = time.perf_counter_ns()
        session.run(None, feeds)
        best = min(best, time.perf_counter_ns() - before)
    return best


def _model(
    nodes: Sequence[Any], weights: dict[str, np.ndarray], shape: tuple[int, ...]
) -> tuple[bytes, tuple[int, ...]]:
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        list(nodes),
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return made.SerializeToString(), shape


def _convolutions(channels: int, side: int, groups: int) -> tuple[bytes, tuple[int, ...]]:
    from onnx import helper

    weight = np.full((channels, channels // groups, 3, 3), 0.01, dtype=np.float32)
    names = ["x", *(f"h{i}" for i in range(_LINKS))]
    links = list(pairwise(names))
    nodes = [
        helper.make_node("Conv", [a, f"w_{b}"], [b], kernel_shape=[3, 3], pads=[1] * 4, group=groups) for a, b in links
    ]
    return _model(nodes, {f"w_{b}": weight for _, b in links}, (1, channels, side, side))


def _products(rows: int, size: int) -> tuple[bytes, tuple[int, ...]]:
    from onnx import helper

    names = ["x", *(f"h{i}" for i in range(_LINKS))]
    links = list(pairwise(names))
    nodes = [helper.make_node("MatMul", [a, f"w_{b}"], [b]) for a, b in links]
    weight = np.full((size, size), 0.01, dtype=np.float32)
    return _model(nodes, {f"w_{b}": weight for _, b in links}, (rows, size))


def _activations(elements: int, count: int = _LINKS) -> tuple[bytes, tuple[int, ...]]:
    from onnx import helper

    # two operations in turn, so that none cancels its neighbour
    names = ["x", *(f"h{i}" for i in range(count))]
    links = pairwise(names)
    nodes = [helper.make_node("HardSigmoid" if i % 2 else "Abs", [a], [b]) for i, (a, b) in enumerate(links)]
    return _model(nodes, {}, (1, elements))


_ELEMENTS = 2**16
_Bench = tuple[Callable[[], tuple[bytes, tuple[int, ...]]], float]
# constant -> (how to build the chain, units of work per kernel)
_BENCHES: dict[str, _Bench] = {
    "conv_mac": (lambda: _convolutions(64, 16, 1), 64 * 64 * 9 * 256),
    "depthwise_mac": (lambda: _convolutions(64, 16, 64), 64 * 9 * 256),
    "gemm_mac": (lambda: _products(64, 192), 64 * 192 * 192),
    "weight_byte": (lambda: _products(1, 768), 4 * 768 * 768),
    "element": (
        lambda: _activations(_ELEMENTS),
        _ELEMENTS * (ELEMENT_FACTORS["abs"] + ELEMENT_FACTORS["hardsigmoid"]) / 2,
    ),
}
