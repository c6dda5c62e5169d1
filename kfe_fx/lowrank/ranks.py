"""How many columns and rows of each layer stay: one threshold for all, and in which form they are worth it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kfe_fx.lowrank.axes import Axes
from kfe_fx.lowrank.layers import Layer
from kfe_fx.lowrank.prices import Prices, price

WHOLE_CAP, AGAIN_CAP = 0.95, 0.5  # of columns and rows that one pass may take (the authors' code)

Ranks = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Choice:
    """A form of a layer: ``c`` columns and ``r`` rows stay, at a predicted ``loss``; ``costs`` are before and after."""

    c: int
    r: int
    loss: float
    costs: tuple[float, float]


def floors(layer: Layer, cap: float | None) -> tuple[int, int]:
    """Return how many columns and rows stay at least: one pass takes no more than the share ``cap`` of either.

    None: 0.95 of a layer that is whole, 0.5 of one that was decomposed before.
    """
    share = cap if cap is not None else AGAIN_CAP if layer.decomposed else WHOLE_CAP
    columns, rows = (max(1, size - math.floor(share * size + 1e-9)) for size in (layer.columns, layer.rows))
    return columns, rows


def by_ratio(axes: Mapping[str, Axes], ratio: float, cap: float | None = None) -> Ranks:
    """Let the share ``ratio`` of all columns and rows of all layers go, those with the lowest scores.

    The cap holds back what would be more than that of a layer; nothing goes instead.
    """
    order = _order(axes)
    return _cut(axes, order[: math.floor(ratio * len(order) + 1e-9)], cap)


def by_importance(axes: Mapping[str, Axes], share: float, cap: float | None = None) -> Ranks:
    """Let as many columns and rows go, lowest scores first, as together cost no more than ``share`` of the total."""
    order = _order(axes)
    total = sum(one.total for one in axes.values())

    def fits(count: int) -> bool:
        ranks = _cut(axes, order[:count], cap)
        return sum(one.importance_lost(*ranks[name]) for name, one in axes.items()) <= share * total

    low, high = 0, len(order)  # the loss never falls as more goes
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return _cut(axes, order[:low], cap)


def _order(axes: Mapping[str, Axes]) -> list[tuple[str, int]]:
    """List the columns (0) and rows (1) of all layers by score, the lowest first; ties keep their order."""
    found = [
        (float(score), name, side)
        for name, one in axes.items()
        for side, scores in enumerate((one.column_scores, one.row_scores))
        for score in scores
    ]
    return [(name, side) for _, name, side in sorted(found, key=lambda entry: entry[0])]


def _cut(axes: Mapping[str, Axes], gone: Sequence[tuple[str, int]], cap: float | None) -> Ranks:
    counts: dict[tuple[str, int], int] = {}
    for entry in gone:
        counts[entry] = counts.get(entry, 0) + 1
    ranks: Ranks = {}
    for name, one in axes.items():
        sides = zip((one.layer.columns, one.layer.rows), floors(one.layer, cap), strict=True)
        c, r = (max(least, size - counts.get((name, side), 0)) for side, (size, least) in enumerate(sides))
        ranks[name] = c, r
    return ranks


def stepped(size: int, full: int, step: int) -> int:
    """Round a number of columns or rows up to the next multiple of the step that is not more than all."""
    return min(full, -(-size // step) * step)


def best_form(axes: Axes, ranks: tuple[int, int], *, step: int, metric: str, prices: Prices | None) -> Choice | str:
    """Return the cheapest form of a layer that keeps at least these columns and rows, or why none is worth it.

    Tried are both sides cut and one side cut: an operation less, and less lost. Of a matrix the free side stays whole.
    """
    layer = axes.layer
    columns, rows = layer.columns, layer.rows
    c, r = stepped(ranks[0], columns, step), stepped(ranks[1], rows, step)
    if layer.pointwise:  # of full rank it is what it was, with something lost
        tried = {form for form in ((c, rows), (columns, r)) if min(form) < min(columns, rows)}
    else:
        tried = {(c, r), (c, rows), (columns, r)} - {(columns, rows)}
    forms = sorted(tried)
    if not forms:
        return f"{c} of its {columns} columns and {r} of its {rows} rows stay: in steps of {step} no form has less"
    now = price(prices, metric, layer, columns, rows)
    costs = {form: price(prices, metric, layer, *form) for form in forms}
    best = min(forms, key=lambda form: (costs[form], axes.loss(*form)))
    found = Choice(*best, axes.loss(*best), (now, costs[best]))
    if metric == "none":
        return found
    whole, less = layer.weights(columns, rows), layer.weights(*best)
    as_it_is = f"with {best[0]} of {columns} columns and {best[1]} of {rows} rows"
    if less >= whole:
        return f"it would not be smaller {as_it_is}: {less:,} weights, now {whole:,}"
    if costs[best] >= now:
        unit = {"latency": "ms predicted", "macs": "MACs", "params": "weights"}[metric]
        return f"it would not be faster {as_it_is}: {costs[best]:,.4g} {unit}, now {now:,.4g}"
    return found
