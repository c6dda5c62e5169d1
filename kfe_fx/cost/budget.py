"""Budgets as people write them: a fraction of dense, milliseconds, bytes, or a number of parameters."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kfe_fx.errors import UsageError

METRICS = ("latency", "macs", "params", "memory", "widths")
_NUMBER = re.compile(r"([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-zµ%]*)", re.IGNORECASE)
# unit -> (metric it speaks of, or None where the name of the metric must say it; factor to the unit of that metric)
_UNITS: dict[str, tuple[str | None, float]] = {
    "s": ("latency", 1e3), "ms": ("latency", 1.0), "us": ("latency", 1e-3), "µs": ("latency", 1e-3),
    "b": ("memory", 1.0), "kb": ("memory", 1e3), "mb": ("memory", 1e6), "gb": ("memory", 1e9),
    "kib": ("memory", 2.0**10), "mib": ("memory", 2.0**20), "gib": ("memory", 2.0**30),
    "k": (None, 1e3), "m": (None, 1e6), "g": (None, 1e9),
}  # fmt: skip
_EXAMPLES = "more than 0 and at most 1 as in 0.5, or 12ms, 4MB, 2M (parameters), macs=300M"


@dataclass(frozen=True)
class Limit:
    """What may remain of one metric.

    ``value`` is a fraction of dense, or where ``absolute`` milliseconds, bytes of activations, parameters or
    multiply-accumulates.
    """

    metric: str
    value: float
    absolute: bool = False

    def ratio(self, dense: float) -> float:
        """Return the limit as a fraction of dense, at most 1: a network that meets it already keeps everything."""
        return min(1.0, self.value / dense if self.absolute and dense > 0 else self.value)

    def __str__(self) -> str:
        """Write it so that ``read_limit`` reads the same."""
        factor, unit = (
            {"latency": (1, "ms"), "memory": (1, "B")}.get(self.metric, (1e3, "k")) if self.absolute else (1, "")
        )
        return f"{self.metric}={self.value / factor:.12g}{unit}"


def read_limits(given: Any, metric: str = "latency") -> tuple[Limit, ...]:
    """Read one budget or several: a number, a text, a sequence of such, or ``{metric: number or text}``.

    A fraction without a name is of ``metric``. The first limit is the one that is reported as *the* budget; a limit on
    latency goes first.

    Raises:
        UsageError: a text that means nothing, or two limits on one metric.
    """
    if metric not in METRICS:
        raise UsageError(f"there is no metric {metric!r}; choose one of {', '.join(METRICS)}")
    if isinstance(given, Mapping):
        limits = [read_limit(value, str(name), named=True) for name, value in given.items()]
    elif isinstance(given, Sequence) and not isinstance(given, str):
        limits = [read_limit(value, metric) for value in given]
    else:
        limits = [read_limit(given, metric)]
    if not limits:
        raise UsageError(f"a budget is needed: give what may remain, {_EXAMPLES}")
    seen = [limit.metric for limit in limits]
    for name in seen:
        if seen.count(name) > 1:
            raise UsageError(f"two budgets for {name}; give the smaller one only")
    if "widths" in seen and len(seen) > 1:
        raise UsageError("a budget of widths knows no cost, so that it goes with no other one")
    return tuple(sorted(limits, key=lambda limit: limit.metric != "latency"))


def read_limit(given: Any, metric: str, *, named: bool = False) -> Limit:
    """Read one budget; ``named``: ``metric`` was given with it and must fit its unit.

    Raises:
        UsageError: it means nothing.
    """
    if isinstance(given, Limit):
        return given
    if isinstance(given, int | float) and not isinstance(given, bool):
        return _fraction(float(given), _known(metric), given)
    if not isinstance(given, str):
        raise _refusal(given)
    name, sign, rest = given.rpartition("=")
    if sign:
        return read_limit(rest.strip(), _known(name.strip()), named=True)
    found = _NUMBER.fullmatch(given.strip())
    if found is None:
        raise _refusal(given)
    value, unit = float(found[1]), found[2].lower()
    if not unit:
        return _fraction(value, _known(metric), given)
    if unit == "%":
        return _fraction(value / 100, _known(metric), given)
    if unit not in _UNITS:
        raise _refusal(given)
    speaks, factor = _UNITS[unit]
    counted = named or metric in ("macs", "params")  # 300M is of what --metric counts, else of parameters
    target = speaks or (metric if counted else "params")
    if (named and target != _known(metric)) or target in (("latency", "memory", "widths") if speaks is None else ()):
        raise UsageError(f"{metric}={given}: {found[2]} is no unit of {metric}; write as in {_EXAMPLES}")
    if not (math.isfinite(value * factor) and value > 0):
        raise _refusal(given)
    return Limit(target, value * factor, absolute=True)


def _known(metric: str) -> str:
    if metric not in METRICS:
        raise UsageError(f"there is no metric {metric!r}; choose one of {', '.join(METRICS)}")
    return metric


def _fraction(value: float, metric: str, given: Any) -> Limit:
    if not 0 < value <= 1:
        raise _refusal(given)
    return Limit(metric, value)


def _refusal(given: Any) -> UsageError:
    return UsageError(f"{given!r} is no budget: give what may remain, {_EXAMPLES}")
