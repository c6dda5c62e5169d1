"""Decompose the layers of a network, each where it is worth it, and tell what was done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kfe_fx.cost.device import Device, this_device
from kfe_fx.errors import UsageError
from kfe_fx.lowrank.axes import Axes
from kfe_fx.lowrank.candidates import applied, choose, pareto
from kfe_fx.lowrank.finding import find_layers
from kfe_fx.lowrank.layers import Layer
from kfe_fx.lowrank.prices import METRICS, Prices
from kfe_fx.lowrank.ranks import Choice, Ranks, best_form, by_importance, by_ratio
from kfe_fx.program import Program


@dataclass(frozen=True)
class Request:
    """What is asked for: one of ``ratio``, ``importance`` and ``time``, and how a form is judged.

    ``ratio``: the share of all columns and rows that goes; ``importance``: the share of the total importance that goes;
    ``time``: what remains of the network's predicted time, at the least loss. ``metric``: what a form must save, one of
    "latency", "macs", "params" and "none". ``step``: ranks are multiples of it; None for what the device likes where
    latency counts, else 1.
    """

    ratio: float | None
    importance: float | None
    time: float | None
    metric: str
    step: int | None
    cap: float | None
    threads: int
    device: Device | None = None

    def check(self, name: str) -> None:
        """Refuse what means nothing; ``name`` is the pass that asks.

        Raises:
            UsageError: an option has a value that means nothing.
        """
        given = {key: getattr(self, key) for key in ("ratio", "importance", "time") if getattr(self, key) is not None}
        if len(given) != 1:
            told = f"not {' and '.join(given)}" if given else f"such as {name}{{ratio=0.5}}"
            raise UsageError(f"{name}: give one of ratio, importance and time, {told}")
        for key, value in {**given, **({} if self.cap is None else {"cap": self.cap})}.items():
            if not 0 < value < 1:
                raise UsageError(f"{name}: {key} is between 0 and 1, got {value:g}")
        if self.metric not in METRICS:
            raise UsageError(f"{name}: metric is one of {', '.join(METRICS)}, got {self.metric!r}")
        if self.time is not None and self.metric != "latency":
            raise UsageError(f"{name}: time is predicted with metric=latency, got metric={self.metric}")
        for key, count in (("step", self.step), ("threads", self.threads)):
            if count is not None and count < 1:
                raise UsageError(f"{name}: {key} is a number from 1, got {count}")

    def prices(self, program: Program) -> Prices | None:
        """Return the predictor of times, None where no time counts."""
        if self.metric != "latency":
            return None
        return Prices.of(program, self.device or this_device(self.threads))


def chosen_layers(program: Program, glob: str, *, last: bool) -> tuple[list[Layer], dict[str, str]]:
    """Return the layers that a glob means, and by name of the others why they stay.

    Raises:
        UsageError: it means nothing here.
    """
    found = find_layers(program).matching(glob)
    left = dict(found.refused)
    layers = []
    for layer in found.layers:
        if layer.last and not last:
            left[layer.name] = "it makes the outputs; last=true decomposes it too"
        else:
            layers.append(layer)
    return layers, left


def decompose(
    program: Program, axes: Mapping[str, Axes], left: Mapping[str, str], request: Request
) -> tuple[Program, dict[str, Any]]:
    """Replace layers by factors as far as it was asked for and is worth it.

    Args:
        program: the network; it stays as it was.
        axes: by name, what each layer can lose.
        left: why others stay, for the facts.
        request: what is asked for; checked.

    Returns:
        The network, or ``program`` where no layer is worth it, and facts: ``layers`` maps each decomposed one to its
        ranks and to weights, MACs and predicted milliseconds before and after, ``left`` each other one to the reason.

    Raises:
        InfeasibleBudget: the time that was asked for is out of reach.
    """
    prices = request.prices(program) if axes else None
    step = request.step or (1 if prices is None else prices.step)
    reasons = dict(left)
    forms: dict[str, Choice] = {}
    if request.time is not None and prices is not None:
        fronts = {name: pareto(one, prices, step, request.cap) for name, one in axes.items()}
        for name, front in fronts.items():
            if not front:
                reasons[name] = f"no ranks in steps of {step} make it faster as predicted"
        for one in choose(fronts, (1 - request.time) * prices.whole_ms, prices.whole_ms):
            now = prices.ms(axes[one.layer].layer, *_whole(axes[one.layer].layer))
            forms[one.layer] = Choice(one.c, one.r, one.loss, (now, now - one.saved_ms))
        reasons |= {name: "the time asked for needs it not" for name in axes if name not in {*forms, *reasons}}
    else:
        for name, ranks in _ranks(axes, request).items():
            form = best_form(axes[name], ranks, step=step, metric=request.metric, prices=prices)
            if isinstance(form, str):
                reasons[name] = form
            else:
                forms[name] = form
    small = applied(program, axes, {name: (form.c, form.r) for name, form in forms.items()}) if forms else program
    facts: dict[str, Any] = {
        "layers": {name: _told(axes[name].layer, form, prices) for name, form in forms.items()},
        "left": reasons,
        "loss": float(sum(form.loss for form in forms.values())),
        "parameters": [_count(program), _count(small)],
    }
    if prices is not None:
        saved = sum(form.costs[0] - form.costs[1] for form in forms.values())
        facts["predicted_ms"] = [prices.whole_ms, prices.whole_ms - saved]
    return small, facts


def _ranks(axes: Mapping[str, Axes], request: Request) -> Ranks:
    if request.ratio is not None:
        return by_ratio(axes, request.ratio, request.cap)
    assert request.importance is not None
    return by_importance(axes, request.importance, request.cap)


def _whole(layer: Layer) -> tuple[int, int]:
    return layer.columns, layer.rows


def _told(layer: Layer, form: Choice, prices: Prices | None) -> dict[str, Any]:
    whole, now = _whole(layer), (form.c, form.r)
    told: dict[str, Any] = {
        "ranks": list(now),
        "of": list(whole),
        "operations": [made for _, _, made in layer.steps(*now)],
        "loss": form.loss,
        "weights": [layer.weights(*whole), layer.weights(*now)],
        "macs": [layer.macs(*whole), layer.macs(*now)],
    }
    return told if prices is None else {**told, "predicted_ms": list(form.costs)}


def _count(program: Program) -> int:
    return sum(value.numel() for value in program.module().parameters())
