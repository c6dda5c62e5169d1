"""The closed loop: solve for a prediction, measure what comes out, correct what is asked of the prediction."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from kfe_fx.cost.solver import Selection
from kfe_fx.errors import UsageError

# of the correction that a measurement calls for, in the logarithm; noise would otherwise be answered in full
DAMPING = 0.85
# how often a correction that changes nothing is doubled before the loop gives up: solving is cheap, measuring is not
PUSHES = 5
_LEAST_TARGET = 1e-3
# a line through two turns means something when they asked for things this far apart (in the logarithm), and when it
# does not rise much more slowly than in proportion; else it is noise
_APART = 0.1
_LEAST_RISE = 0.4
# one turn asks for at most this much less (or more) than the turn it starts from
_FARTHEST = 0.6


@dataclass(frozen=True)
class Turn:
    """One turn: what was asked of the predictor, what it promised, and what was measured."""

    asked: float
    selection: Selection
    measured: float


@dataclass(frozen=True)
class LoopResult:
    """The best turn, whether it lies within the tolerance, and why the loop ended.

    ``feasible`` is false where every selection measured above the budget and its tolerance; ``selection`` is then the
    nearest to it. ``measured`` chose the selection, so it flatters it: report a fresh measurement.
    """

    selection: Selection
    measured: float
    within: bool
    feasible: bool
    reason: str
    turns: tuple[Turn, ...] = field(default=())


def close_loop(
    solve: Callable[[float], Selection],
    build_and_measure: Callable[[Selection], float],
    target: float,
    *,
    tolerance: float = 0.05,
    turns: int = 8,
    progress: Callable[[Turn], None] | None = None,
) -> LoopResult:
    """Find the selection whose measured ratio to dense is ``target``, within ``target·(1 ± tolerance)``.

    ``solve(p)`` selects for a predicted ratio ``p``; ``build_and_measure`` gives the measured ratio of a selection. The
    first ``p`` is ``target``; then ``log p`` moves by the damped miss ``log(target / measured)``; from the second turn
    on ``p`` moves to where the line through two turns, on both sides of the target for choice, meets it. What seems to
    lie within the tolerance is measured once more, and the mean counts. A selection that was turned down is not
    measured again: ``p`` moves on until another comes, or the loop ends. Of several turns outside the tolerance the one
    nearest below the budget is kept before any above it.

    Raises:
        UsageError: a target outside (0, 1], a tolerance or a number of turns that mean nothing.
    """
    if not 0 < target <= 1:
        raise UsageError(f"a budget is a ratio above 0 and at most 1, got {target}")
    if not 0 < tolerance < 1 or turns < 1:
        raise UsageError(
            f"the loop needs a tolerance between 0 and 1 and at least one turn, got {tolerance} and {turns}"
        )
    done: list[Turn] = []
    asked, reason = target, f"{turns} turns were not enough"
    selection: Selection | None = solve(asked)
    while selection is not None:
        measured = build_and_measure(selection)
        if abs(measured / target - 1) <= tolerance:  # chance lands there as well
            measured = (measured + build_and_measure(selection)) / 2
        turn = Turn(asked, selection, measured)
        done.append(turn)
        if progress is not None:
            progress(turn)
        if abs(turn.measured / target - 1) <= tolerance:
            reason = "within the tolerance"
            break
        if len(done) == turns:
            break
        asked, selection = _next(solve, done, target)
        if selection is None:
            reason = "no other selection comes nearer"
    best = min(done, key=lambda turn: _distance(turn.measured, target, tolerance))
    within = abs(best.measured / target - 1) <= tolerance
    too_slow = best.measured > target * (1 + tolerance)
    if too_slow and any(not turn.selection.feasible for turn in done):
        reason = f"the budget is out of reach: {best.selection.binding or 'nothing more can be removed'}"
    elif too_slow:
        reason = f"{reason}, the nearest measured {best.measured:.3f} of dense"
    return LoopResult(best.selection, best.measured, within, not too_slow, reason, tuple(done))


def _distance(measured: float, target: float, tolerance: float) -> tuple[bool, float]:
    miss = abs(math.log(measured / target)) if measured > 0 else math.inf
    return measured > target * (1 + tolerance), miss


def _next(solve: Callable[[float], Selection], done: list[Turn], target: float) -> tuple[float, Selection | None]:
    """Return the next thing to ask and the selection that comes of it; None where only known ones come."""
    known = {turn.selection.removed for turn in done}
    last = done[-1]
    asked = _corrected(done, target)
    for push in range(PUSHES):
        asked = min(1.0, max(_LEAST_TARGET, asked))
        selection = solve(asked)
        if selection.removed not in known:
            return asked, selection
        exhausted = not selection.feasible and asked < last.asked  # asking for less gives the same cheapest one
        if exhausted or asked in (1.0, _LEAST_TARGET):
            break
        bracket = _bracket(done, target)
        if bracket is not None:
            # a tread between two measured selections: look on the other side of its middle
            low, high = bracket[0].asked, bracket[1].asked
            share = (0.5, 0.25, 0.75, 0.125, 0.875)[push]
            asked = math.exp((1 - share) * math.log(low) + share * math.log(high))
        else:
            asked = last.asked * (asked / last.asked) ** 2
    return asked, None


def _corrected(done: list[Turn], target: float) -> float:
    bracket = _bracket(done, target)
    if bracket is None:
        *others, last = sorted(done, key=lambda turn: -abs(math.log(turn.measured / target)))
        damped = last.asked * (target / last.measured) ** DAMPING
        apart = [turn for turn in others if abs(math.log(turn.asked / last.asked)) > _APART]
        if not apart:
            return damped
        rise = (apart[-1].measured - last.measured) / (apart[-1].asked - last.asked)
        rise = max(rise, _LEAST_RISE * last.measured / last.asked)
        # part of the time does not shrink, so the whole shrinks more slowly than what is asked
        straight = last.asked + (target - last.measured) / rise
        return min(max(straight, last.asked * _FARTHEST), last.asked / _FARTHEST)
    low, high = bracket
    rise = math.log(high.measured / low.measured)
    share = math.log(target / low.measured) / rise if rise > 0 else 0.5
    share = min(0.9, max(0.1, share))
    return math.exp((1 - share) * math.log(low.asked) + share * math.log(high.asked))


def _bracket(done: list[Turn], target: float) -> tuple[Turn, Turn] | None:
    """Return the nearest turns below and above the target, when asking for more also measured more."""
    below = [turn for turn in done if turn.measured <= target]
    above = [turn for turn in done if turn.measured > target]
    if not below or not above:
        return None
    low = max(below, key=lambda turn: turn.measured)
    high = min(above, key=lambda turn: turn.measured)
    return (low, high) if low.asked < high.asked else None
