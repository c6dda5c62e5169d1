"""The block of the convolution kernels: in which steps of the width a convolution really gets faster.

ONNX Runtime computes convolutions in blocks of channels (16 with AVX-512, 8 with AVX2 or NEON) and leaves the
blocked layout where a width is no multiple: 63 channels then take longer than 64. Widths are therefore pruned in
multiples of the smallest step that is measured faster, found here on a few tiny networks in about 0.1 s.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from kfe_fx.cost.probe_models import stair_models
from kfe_fx.cost.probes import decide, run_stairs
from kfe_fx.errors import UsageError


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
    if threads < 1:
        raise UsageError(f"threads must be at least 1, got {threads}")
    started = time.perf_counter()
    by_width = run_stairs(stair_models(), threads)
    step, probed, ratios = decide(by_width)
    measured = {
        "milliseconds": {str(width): float(np.median(column)) / 1e6 for width, column in by_width.items()},
        "ratios": {name: {"value": middle, "low": low, "high": high} for name, (middle, low, high) in ratios.items()},
        "seconds": time.perf_counter() - started,
    }
    return Block(step, probed, measured)
