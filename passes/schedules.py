"""How the rounds of a run share out what is to be removed.

    exponential   r_k = r^(k/pi): each round leaves the same fraction of what the last one left
    equal         r_k = 1 - (1 - r) k/pi: each round removes as much
    one-shot      one round
    netadapt      exponential, and in each round one group of units alone gives what is asked: the one whose removal,
                  repaired, leaves the least loss (Yang et al. 2018; in place of its short fine-tuning the closed-form
                  repair, and fine-tuning between the rounds); the last round of a measured budget of latency lands it,
                  which takes all groups
    theis         exponential, and units are masked one by one in the middle of the round's fine-tuning, by signals
                  gathered there (Theis et al. 2018, ``kfe_fx.passes.theis``)

Each is the same loop: score, select, cut, prove, repair, train.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from kfe_fx.cost.schedule import equal_schedule, exponential_schedule
from kfe_fx.cost.solver import Selection
from kfe_fx.errors import UsageError
from kfe_fx.labels.analysis import Analysis
from kfe_fx.passes.settings import Settings

Ratios = dict[str, float]

ROUNDS = 4  # with fine-tuning in between; without it one round loses little
PROPOSING = 10  # rounds of NetAdapt
CAREFUL = 8  # rounds where a floor may end them
_APART = 1e12  # what a unit costs in loss that is not to go


def round_ratios(settings: Settings, ratios: Mapping[str, float], *, trains: bool) -> list[Ratios]:
    """Return what may remain after each round, by metric; the last is the budget.

    Raises:
        UsageError: the schedule needs training, and there is none.
    """
    if settings.schedule == "theis" and not trains:
        raise UsageError("the schedule theis removes while it trains: give data with targets, and epochs")
    if settings.metric == "widths" or settings.plan is not None or settings.schedule == "one-shot":
        return [dict(ratios)]
    usual = PROPOSING if settings.schedule == "netadapt" else CAREFUL if settings.stops else ROUNDS if trains else 1
    count = settings.rounds or usual
    steps = equal_schedule if settings.schedule == "equal" else exponential_schedule
    each = {metric: steps(ratio, count) for metric, ratio in ratios.items()}
    return [{metric: line[number] for metric, line in each.items()} for number in range(count)]


def netadapt(
    analysis: Analysis,
    scores: np.ndarray,
    select: Callable[[np.ndarray], Selection],
    loss: Callable[[Selection], float],
    gone: frozenset[int],
) -> Selection:
    """Return the proposal of one group alone that leaves the least loss; where no group can, the common selection.

    Args:
        analysis: the units.
        scores: of them.
        select: selects with these scores.
        loss: of what a selection leaves, repaired.
        gone: units that went before.
    """
    best: tuple[float, Selection] | None = None
    for group in analysis.groups:
        own = np.zeros(len(scores), dtype=bool)
        own[list(group.units)] = True
        found = select(np.where(own, scores, scores + _APART))
        others = [unit for unit in found.removed - gone if not own[unit]]
        if not found.feasible or others or found.removed == gone:
            continue
        left = loss(found)
        if best is None or left < best[0]:
            best = left, found
    return best[1] if best is not None else select(scores)
