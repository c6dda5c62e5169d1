"""Latencies that a test decides, in place of those of the machine that it runs on."""

from __future__ import annotations

import pytest

from kfe_fx.passes.stopwatch import Stopwatch


def timed(monkeypatch: pytest.MonkeyPatch, loop: float, anew: float, noise: float = 0.01) -> None:
    """Let the loop and the last measurement give these ratios."""
    found = {"dense_ms": 2.0, "pruned_ms": 2.0 * anew, "ratio": anew, "interval": [anew - noise, anew + noise]}
    found |= {"clock": "cpu", "threads": 1, "batch": 1, "provider": "CPUExecutionProvider", "precision": "fp32"}
    monkeypatch.setattr(Stopwatch, "_ratio", lambda *_: loop)
    monkeypatch.setattr(Stopwatch, "_anew", lambda *_: dict(found))
