"""Latency of candidates of one pruning run, each measured against the dense network in ONNX Runtime."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from kfe_fx.certificate import CPU
from kfe_fx.curvature.distributed import Group
from kfe_fx.errors import BadFile
from kfe_fx.passes.settings import Settings
from kfe_fx.program import Program
from kfe_fx.runtime.inputs import feeds
from kfe_fx.runtime.measure import compare
from kfe_fx.runtime.onnx_file import onnx_bytes
from kfe_fx.runtime.profile import MIN_RUNS, profile
from kfe_fx.runtime.quantise import int8
from kfe_fx.runtime.session import make_session, provider_name
from kfe_fx.runtime.template import Template

FINAL_SECONDS = 3.0
TURN_SECONDS = 1.0
RANGES = 4  # batches of drawn inputs that ranges of int8 copies are taken from


class Stopwatch:
    """Measures candidates that are cut from one dense Program; what is exported and opened once is kept.

    In a process group rank 0 measures for all.
    """

    def __init__(self, dense: Program, settings: Settings) -> None:
        """Export and open the dense network.

        Raises:
            UnsupportedModel: it has no ONNX form, or ONNX Runtime cannot run it.
            UsageError: the provider is not installed.
        """
        self._program, self._settings = dense, settings
        self._onnx = onnx_bytes(dense, share=False)
        self._session = self._open(self._onnx, dense)
        self._templates: dict[tuple[str, ...], Template] = {}

    def _open(self, model: bytes, program: Program) -> Any:
        settings = self._settings
        return make_session(self._in_precision(model, program), threads=settings.threads, provider=settings.provider)

    def _in_precision(self, model: bytes, program: Program) -> bytes:
        settings = self._settings
        if settings.precision != "int8":
            return model
        return int8(model, [feeds(program, settings.batch, settings.seed + turn) for turn in range(RANGES)])

    def _feeds(self, program: Program) -> Any:
        return feeds(program, self._settings.batch, self._settings.seed)  # its states may have lost units

    def dense_ms(self) -> float:
        """Return the median milliseconds of the dense network."""

        def measure() -> float:
            feeds = self._feeds(self._program)
            return compare([self._session], feeds, seconds=TURN_SECONDS, seed=self._settings.seed).latencies[0].p50

        return Group.current().lead(measure)

    def ratio(self, candidate: Program, base: Program, dropped: tuple[str, ...] = ()) -> float:
        """Return the time of a candidate as a fraction of dense.

        ``base`` is what it was shrunk from: the dense network without the branches ``dropped``, whatever names it.
        """
        return Group.current().lead(lambda: self._ratio(candidate, base, dropped))

    def _ratio(self, candidate: Program, base: Program, dropped: tuple[str, ...]) -> float:
        if dropped not in self._templates:
            self._templates[dropped] = Template(base)  # one export; each candidate is sliced into it
        session = self._open(self._templates[dropped].model(candidate), candidate)
        each = [self._feeds(self._program), self._feeds(candidate)]
        found = compare([self._session, session], each, seconds=TURN_SECONDS, precision=0.005, seed=self._settings.seed)
        return found.ratios[1].value

    def anew(self, small: Program, onnx: bytes) -> dict[str, Any]:
        """Measure the final network against dense in sessions of their own; return what the certificate tells."""
        return Group.current().lead(lambda: self._anew(small, onnx))

    def _anew(self, small: Program, onnx: bytes) -> dict[str, Any]:
        settings = self._settings
        sessions = [self._open(self._onnx, self._program), self._open(onnx, small)]
        each = [self._feeds(self._program), self._feeds(small)]
        found = compare(sessions, each, seconds=FINAL_SECONDS, seed=settings.seed + 1)
        ratio = found.ratios[1]
        del sessions  # weights on a device, which the traced session needs as well
        return {
            "dense_ms": found.latencies[0].p50,
            "pruned_ms": found.latencies[1].p50,
            "ratio": ratio.value,
            "interval": [ratio.low, ratio.high],
            "clock": found.clock,
            "threads": settings.threads,
            "batch": settings.batch,
            "provider": provider_name(settings.provider),
            "precision": settings.precision,
            **self._traced(small, onnx),
        }

    def _traced(self, small: Program, onnx: bytes) -> dict[str, Any]:
        """Count the kernels by where they ran: a session gives the CPU what its provider does not take."""
        settings = self._settings
        provider = provider_name(settings.provider)
        if provider == CPU:
            return {}
        try:
            with tempfile.TemporaryDirectory(prefix="kfe_fx-", ignore_cleanup_errors=True) as scratch:
                path = Path(scratch) / "small.onnx"
                path.write_bytes(self._in_precision(onnx, small))
                each = [self._feeds(small)]
                (trace,) = profile([path], each, threads=settings.threads, provider=provider, runs=MIN_RUNS)
        except (BadFile, OSError):  # a full disk costs this one fact, not the run
            return {}
        return {"kernels_on": trace.kernels_on}
