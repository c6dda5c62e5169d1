"""Checks of the arguments of ``prune`` that need no network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kfe_fx.cost.budget import Limit
from kfe_fx.data.dataset import check_seed
from kfe_fx.errors import UsageError
from kfe_fx.runtime.quantise import PRECISIONS

REPAIRS = ("auto", "mean", "none")
SCHEDULES = ("exponential", "equal", "one-shot", "netadapt", "theis")
_CHOICES = {
    "heads": ("auto", "heads", "positions"),
    "precision": PRECISIONS,
    "repair": REPAIRS,
    "schedule": SCHEDULES,
}
MEASURING = {
    "threads": None, "batch": 1, "provider": "CPUExecutionProvider", "precision": "fp32", "target": None,
    "cost_model": "roofline",
}  # fmt: skip
_COUNTS = {"threads": 1, "batch": 1, "batch_size": 1, "rounds": 1, "epochs": 0}


def check_options(given: Mapping[str, Any], limits: Sequence[Limit]) -> None:
    """Refuse options that mean nothing, or not together.

    Raises:
        UsageError: there is one.
    """
    for name, known in _CHOICES.items():
        if given[name] not in known:
            raise UsageError(f"{name} is {', '.join(known[:-1])} or {known[-1]}, got {given[name]!r}")
    if given["optimizer"] not in ("adamw", "sgd"):
        raise UsageError(f"optimizer is adamw or sgd, whose state goes through a removal, got {given['optimizer']!r}")
    for name, least in _COUNTS.items():
        value = given[name]
        if value is not None and (not isinstance(value, int) or value < least):
            raise UsageError(f"{name} is a whole number of at least {least}, got {value!r}")
    check_seed(given["seed"])
    _number(given, "lr", above=True)
    _number(given, "temperature", above=True)
    for name in ("penalty", "crowding", "ewc"):
        _number(given, name)
    _number(given, "distil", most=1.0)
    for name in ("stop_at_loss", "stop_at_accuracy"):
        _number(given, name, least=-math.inf)
    uneven = [name for name in ("keep", "floor", "cap") if given[name]]
    uneven += ["crowding"] if given["crowding"] is not None else []
    if limits[0].metric == "widths" and uneven:
        raise UsageError(f"a budget of widths cuts all layers alike: {uneven[0]} goes with the other metrics")
    _check_measuring(given, limits)
    _check_rounds(given, limits)
    if given["temperature"] is not None and not given["distil"]:
        raise UsageError("a temperature is of distillation; say distil= too, the dense network's share of the loss")
    if given["schedule"] == "theis" and given["distil"] == 1:
        raise UsageError(
            "the schedule theis takes its signals from the gradients of the loss, which vanish where the dense network "
            "alone is learned from; give distil below 1"
        )
    if given["features"] and not given["distil"]:
        raise UsageError("features are compared by distillation; say distil= too, the dense network's share")


def _check_measuring(given: Mapping[str, Any], limits: Sequence[Limit]) -> None:
    """Refuse what is said of a latency that nobody looks at."""
    if any(limit.metric == "latency" for limit in limits) or given["decompose"]:
        return
    unused = [name for name, value in MEASURING.items() if given[name] != value]
    if unused:
        raise UsageError(
            f"{unused[0]} is of latency, and the budget is of {limits[0].metric} alone; drop it, or give a budget of "
            "latency"
        )


def _check_rounds(given: Mapping[str, Any], limits: Sequence[Limit]) -> None:
    """Refuse rounds, and a schedule of them, where there is one."""
    rounds, schedule = given["rounds"], given["schedule"]
    if schedule == "one-shot" and (rounds or 1) != 1:
        raise UsageError("the schedule one-shot has one round; drop rounds, or choose exponential or equal")
    if schedule == "netadapt" and rounds == 1 and any(limit.metric == "latency" for limit in limits):
        raise UsageError("the last round of netadapt lands a latency in all layers at once: give it 2 rounds or more")
    why = "a budget of widths is cut" if limits[0].metric == "widths" else "a plan is carried out"
    if limits[0].metric != "widths" and given["plan"] is None:
        return
    if (rounds or 1) != 1:
        raise UsageError(f"{why} in one round; drop rounds")
    if schedule not in ("exponential", "one-shot"):
        raise UsageError(f"{why} in one round, which has no schedule; drop schedule")


def _number(
    given: Mapping[str, Any], name: str, *, above: bool = False, least: float = 0.0, most: float = math.inf
) -> None:
    value = given[name]
    if value is None:
        return
    fine = isinstance(value, int | float) and math.isfinite(value) and least <= value <= most
    if not fine or (above and value <= least):
        bounds = "above 0" if above else f"from 0 to {most:g}" if math.isfinite(most) else "of at least 0"
        raise UsageError(f"{name} is a number {'' if math.isinf(least) else bounds}".rstrip() + f", got {value!r}")
