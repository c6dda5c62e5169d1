"""Pegging: which stops can still be part of an optimum, by Lagrangian bounds.

For a price p >= 0 and a limit c, every choice of stops x within the limit loses at least

    loss(x)  >=  loss(x) + p (cost(x) - c)  >=  g(p) = min_y loss(y) + p (cost(y) - c),

and with x[t] = s held the same holds of g[t, s](p). Costs are sums of small tables, so both are exact by elimination.
A stop s with g[t, s](p) above a loss that is known to be possible is in no optimum (Nauss 1978; Fisher 1981). The price
is the one with the greatest g, found by bisection: what it chooses is within the limit above it and not below.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kfe_fx.cost.elimination import Elimination, Scope

BISECTIONS = 30
LARGEST_BUCKET = 500_000
ROUNDING = 1e-9  # bounds are sums of many numbers; a stop is given up where it exceeds what is known by more than this


def surviving(
    losses: Sequence[np.ndarray], tables: Sequence[tuple[Scope, np.ndarray]], limit: float, known: float
) -> list[np.ndarray]:
    """Return for each track which of its stops may be in a choice that loses at most ``known`` within ``limit``.

    Args:
        losses: of each track, one number per stop, infinity where a stop is not allowed.
        tables: which tracks a cost reads, and what it is at each choice of their stops, infinity where not allowed.
        limit: of the sum of the costs.
        known: the loss of a choice within the limit.

    Raises:
        UsageError: too many tracks meet at once.
    """
    sizes = [len(loss) for loss in losses]
    scopes: list[Scope] = [(track,) for track in range(len(sizes))] + [reads for reads, _ in tables]
    order = Elimination(sizes, scopes, LARGEST_BUCKET)
    costs = [table for _, table in tables]
    slack = ROUNDING * max(1.0, abs(known))

    def priced(price: float) -> list[np.ndarray]:
        if price == 0:  # what is not allowed has no price either
            return [*losses, *(np.where(np.isfinite(cost), 0.0, np.inf) for cost in costs)]
        return [*losses, *(price * cost for cost in costs)]

    def cost_of(stops: Sequence[int]) -> float:
        return sum(float(table[tuple(stops[t] for t in reads)]) for reads, table in tables)

    low, high, price = 0.0, None, abs(known) / limit or 1.0
    best, best_price = -np.inf, 0.0
    for _ in range(BISECTIONS):
        value, stops = order.minimum(priced(price))
        if value - price * limit > best:
            best, best_price = value - price * limit, price
        if cost_of(stops) > limit:
            low = price
            price = 2 * price if high is None else (low + high) / 2
        else:
            high = price
            price = (low + high) / 2
        if high is not None and high - low < 1e-6 * high:
            break
    found = [np.isfinite(loss) for loss in losses]
    for at in {best_price, low, high if high is not None else low}:
        bounds = order.marginals(priced(at))
        found = [ok & (bound - at * limit <= known + slack) for ok, bound in zip(found, bounds, strict=True)]
    return found
