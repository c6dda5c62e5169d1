"""The block of the convolution kernels: in which steps of the width a convolution really gets faster.

ONNX Runtime computes convolutions in blocks of channels (16 with AVX-512, 8 with AVX2 or NEON) and leaves the
blocked layout where a width is no multiple: 63 channels then take longer than 64. Widths are therefore pruned in
multiples of the smallest step that is measured faster, found here on a few tiny networks in about 0.1 s.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort

from kfe_fx.runtime.session import make_session
from kfe_fx.runtime.statistics import Interval, median_interval

DEFAULT_STEP = 16
# From coarse to fine: a step, and the two widths that differ by it. The wider one is a multiple of the step before.
_STAIRS = ((16, 64, 48), (8, 48, 40), (4, 40, 36), (1, 36, 35))
_ROUNDS = 24
# A step down saves about 2·step/width of the work when it is real; a quarter of that is a clear yes.
_CLEAR = 0.25


@dataclass(frozen=True)
class Block:
    """The step of widths, whether it was measured, and what was measured."""

    step: int
    probed: bool
    measured: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {"step": self.step, "probed": self.probed, "measured": self.measured}


@functools.cache
def probe_block(threads: int = 1) -> Block:
    """Find the smallest of the steps 1, 4, 8, 16, 32 in which narrower convolutions run faster; once per process.

    Raises:
        UsageError: fewer than one thread.
    """
    started = time.perf_counter()
    widths = sorted({width for _, wide, narrow in _STAIRS for width in (wide, narrow)}, reverse=True)
    sessions = {width: make_session(_network(width), threads) for width in widths}
    times = _interleaved(list(sessions.values()), threads)
    by_width = {width: times[:, index] for index, width in enumerate(widths)}
    step, probed, ratios = decide(by_width)
    measured = {
        "milliseconds": {str(width): float(np.median(column)) for width, column in by_width.items()},
        "ratios": {name: interval.to_json() for name, interval in ratios.items()},
        "seconds": time.perf_counter() - started,
    }
    return Block(step, probed, measured)


def decide(by_width: Mapping[int, np.ndarray]) -> tuple[int, bool, dict[str, Interval]]:
    """Return the step, whether the measurements could tell, and the ratios looked at.

    ``by_width`` maps a width to its times [rounds], measured in turns. From the coarsest step down, a step is taken
    when the narrower network is clearly faster than the wider one; the first that is not ends the search.
    """
    step = 32
    ratios: dict[str, Interval] = {}
    for candidate, wide, narrow in _STAIRS:
        ratio = median_interval(np.asarray(by_width[narrow]) / np.asarray(by_width[wide]))
        ratios[f"{narrow}/{wide}"] = ratio
        clear = 1 - _CLEAR * 2 * candidate / wide
        if ratio.high < clear:
            step = candidate
        elif ratio.low > clear:
            break
        else:
            return DEFAULT_STEP, False, ratios  # the machine was too busy to tell
    return step, True, ratios


def _interleaved(sessions: Sequence[ort.InferenceSession], threads: int) -> np.ndarray:
    """Return milliseconds [rounds, sessions]; see kfe_fx.runtime.measure on the clock."""
    clock = time.thread_time_ns if threads == 1 else time.perf_counter_ns
    image = np.random.default_rng(0).standard_normal((1, 3, 16, 16)).astype(np.float32)
    feeds = {"x": image}
    times = np.empty((_ROUNDS, len(sessions)))
    for session in sessions:
        session.run(None, feeds)
    for row in times:
        for index, session in enumerate(sessions):
            best = float("inf")
            for _ in range(2):
                before = clock()
                session.run(None, feeds)
                best = min(best, (clock() - before) / 1e6)
            row[index] = best
    return times


def _network(width: int) -> bytes:
    """Return an ONNX model 3 → width, depthwise, width → width, all 3x3 and followed by ReLU, on [1, 3, 16, 16]."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(width)
    nodes, weights, value = [], [], "x"
    for index, (fan_in, groups) in enumerate(((3, 1), (1, width), (width, 1))):
        kernel = random.standard_normal((width, fan_in, 3, 3)).astype(np.float32) / (3 * fan_in**0.5)
        weights.append(numpy_helper.from_array(kernel, f"w{index}"))
        nodes.append(helper.make_node("Conv", [value, f"w{index}"], [f"c{index}"], pads=[1, 1, 1, 1], group=groups))
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"r{index}"]))
        value = f"r{index}"
    graph = helper.make_graph(
        nodes,
        "block",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 16, 16])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, [1, width, 16, 16])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()
