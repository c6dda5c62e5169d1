"""Calibration: run the probes on this machine and fit a device to them, in about a second."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from kfe_fx.cost.device import Device, device_of
from kfe_fx.cost.probe_models import probe_models, stair_models
from kfe_fx.cost.probes import INT8_CONSTANTS, PRECISIONS, measure_device
from kfe_fx.cost.profile import CELL_FACTORS, ELEMENT_FACTORS, Profile
from kfe_fx.errors import UsageError


def built_in_constants() -> dict[str, Any]:
    """Return the constants of the built-in profile, which stand where a measurement is not believed."""
    return {name: value for name, value in asdict(Profile()).items() if name not in ("name", *INT8_CONSTANTS)}


def factors() -> dict[str, float]:
    """Return what the probes have to know of the cost model: its relative costs of what they run."""
    activations = {name: ELEMENT_FACTORS[name] for name in ("abs", "add", "hardsigmoid")}
    return {**activations, "lstm": CELL_FACTORS["lstm"]}


def calibrate(threads: int = 1, precision: str = "fp32") -> Device:
    """Measure this machine; what int8 networks run in float32 is measured with them.

    One thread is timed by its processor time, which other work hardly moves; several by the wall clock.

    Raises:
        UsageError: fewer than one thread, or a precision that cannot be measured.
    """
    if threads < 1:
        raise UsageError(f"threads must be at least 1, got {threads}")
    if precision not in PRECISIONS:
        raise UsageError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    models = {one: (probe_models(one), stair_models(one)) for one in PRECISIONS[: PRECISIONS.index(precision) + 1]}
    found = measure_device(models, built_in_constants(), factors(), threads=threads, precision=precision)
    return device_of(found)
