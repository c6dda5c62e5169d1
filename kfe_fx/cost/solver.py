"""Which units go: the least loss that meets a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kfe_fx.cost.count import Cost, CostModel
from kfe_fx.cost.search import LOOK_AHEAD, Search, farthest
from kfe_fx.cost.state import Sizes, State, SumState, WholeState
from kfe_fx.cost.steps import Stepper, Track, by_score, check_scores, frozen_groups, kernel_widths, protected_units
from kfe_fx.cost.widths import Removed
from kfe_fx.errors import UsageError

if TYPE_CHECKING:
    from kfe_fx.labels.analysis import Analysis

CAP = 0.9
# a cost that differs from the limit by less than rounding meets it
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Selection:
    """What is removed, and what that is predicted to cost relative to dense.

    ``feasible`` is false where no choice was found that meets the budget: then this is the cheapest one, and
    ``binding`` says what stands in the way. ``loss`` is the sum of the scores removed.
    """

    removed: frozenset[int]
    predicted: float
    feasible: bool
    binding: str = ""
    loss: float = 0.0


@dataclass(frozen=True)
class FunctionCost:
    """Make a cost of a plain function of the removed units."""

    function: Callable[[Any], float]

    def predict(self, removed: Removed) -> float:
        """Return the function's value; it is handed a frozenset of unit ids."""
        ids = np.flatnonzero(removed).tolist() if isinstance(removed, np.ndarray) and removed.dtype == bool else removed
        return float(self.function(frozenset(ids)))

    def terms(self) -> None:
        """Say that nothing is known of its structure."""


def select_budget(
    model: CostModel,
    scores: Any,
    cost: Cost | Callable[[frozenset[int]], float],
    target: float,
    *,
    multiple_of: int = 16,
    cap: float = CAP,
    keep: Sequence[str] = (),
    gone: Collection[int] = (),
    look_ahead: Sequence[int] = LOOK_AHEAD,
) -> Selection:
    """Choose units of the least total score so that ``cost`` falls to ``target`` times its dense value.

    ``scores``: loss increase if a unit is removed, one per unit. ``cost``: a Cost, or any function of a frozenset of
    removed units. Widths that kernels see stay multiples of ``multiple_of``; groups that are not wider than it are left
    alone. At most the fraction ``cap`` of a group goes; ``keep`` are globs over parameter names whose outputs stay.
    ``gone`` is removed in any case and loses nothing more: what earlier rounds took.
    Greedy on score per cost saved with look-ahead, then exchanges; equal arguments give equal selections.

    Raises:
        UsageError: scores, target, cap, block or globs that mean nothing.
    """
    if not 0 < target <= 1:
        raise UsageError(f"a budget is a ratio above 0 and at most 1, got {target}")
    if not 0 <= cap <= 1:
        raise UsageError(f"the most that may go of a group is between 0 and 1, got {cap}")
    priced = cost if hasattr(cost, "predict") else FunctionCost(cost)  # type: ignore[arg-type]
    ranked = check_scores(model.analysis, scores).copy()
    ranked[list(gone)] = -math.inf
    options = _Options(multiple_of, cap, tuple(keep))
    dense = float(priced.predict(()))  # type: ignore[union-attr]
    if dense <= 0 or (target == 1 and not gone):
        return Selection(frozenset(gone), 1.0, True)
    state = _state(model, ranked, priced, options)  # type: ignore[arg-type]
    search = Search(state, target * dense * (1 + _ROUNDING), look_ahead)
    feasible = search.run()
    binding = "" if feasible else _binding(model, ranked, priced, options, target * dense, state)  # type: ignore[arg-type]
    removed = _removed(state).union(gone)
    return Selection(removed, priced.predict(removed) / dense, feasible, binding, search.loss)  # type: ignore[union-attr]


def select_widths(analysis: Analysis, scores: Any, budget: float) -> Selection:
    """Keep the max(1, ceil(budget·n)) best of the n units of every group; no cost model, no multiples.

    A floor that would be left empty gets its best unit back, for the worst one that no floor needs.

    Raises:
        UsageError: scores or a budget that mean nothing.
    """
    if not 0 < budget <= 1:
        raise UsageError(f"a budget is a ratio above 0 and at most 1, got {budget}")
    ranked = check_scores(analysis, scores)
    removed: set[int] = set()
    for group in analysis.groups:
        count = max(1, math.ceil(budget * len(group.units)))
        removed.update(by_score(group.units, ranked)[: max(0, len(group.units) - count)])
    group_of = {unit: group for group in analysis.groups for unit in group.units}
    for floor in sorted(analysis.floors, key=lambda floor: (len(floor), sorted(floor))):
        if floor and floor <= removed:
            back = by_score(floor, ranked)[-1]
            removed.discard(back)
            spare = next(
                (u for u in by_score(group_of[back].units, ranked) if _spare(analysis, u, back, removed)), None
            )
            removed.update(() if spare is None else (spare,))
    total, kept = len(analysis.units), len(analysis.units) - len(removed)
    loss = math.fsum(ranked[unit] for unit in removed)
    return Selection(frozenset(removed), kept / total if total else 1.0, True, "", loss)


def _spare(analysis: Analysis, unit: int, back: int, removed: set[int]) -> bool:
    if unit == back or unit in removed:
        return False
    return not any(unit in floor and floor - {unit} <= removed for floor in analysis.floors)


@dataclass(frozen=True)
class _Options:
    block: int
    cap: float
    keep: tuple[str, ...]


def _state(model: CostModel, scores: np.ndarray, cost: Cost, options: _Options) -> State:
    stepper = Stepper(model, options.block)
    protected = protected_units(model.analysis, scores)
    frozen = frozen_groups(model.analysis, options.keep)
    tracks: list[Track] = []
    for group in model.analysis.groups:
        if group.id not in frozen:
            track = stepper.track(group, scores, protected, options.cap)
            if len(track):
                tracks.append(track)
    terms = cost.terms()
    sizes = Sizes(model.widths, tracks, kernel_widths(model), options.block)
    state = WholeState(sizes, cost) if terms is None else SumState(sizes, terms)
    for index, track in enumerate(tracks):
        last = max(
            (j for j, units in enumerate(track.portions, 1) if np.isneginf(scores[list(units)]).any()), default=0
        )
        if last:
            state.move(index, last)
    return state


def _removed(state: State) -> frozenset[int]:
    gone = (unit for track, stop in zip(state.tracks, state.stops, strict=True) for unit in track.gone(stop))
    return frozenset(gone)


def _binding(model: CostModel, scores: np.ndarray, cost: Cost, options: _Options, limit: float, reached: State) -> str:
    """Say which restriction keeps the cost above ``limit``: the first whose absence alone would do, else the layers."""
    relaxed = {
        "what --keep protects": _Options(options.block, options.cap, ()),
        f"widths in multiples of {options.block}": _Options(1, options.cap, options.keep),
        f"the cap of {options.cap:.0%} removed per layer": _Options(options.block, 1.0, options.keep),
        "multiples, caps and --keep together": _Options(1, 1.0, ()),
    }
    for name, easier in relaxed.items():
        if easier != options:
            state = _state(model, scores, cost, easier)
            while True:
                before = list(state.stops)
                farthest(state)
                if state.stops == before:
                    break
            if state.predicted() <= limit:
                return name
    return f"what cannot be removed at all{_costliest(model, cost, reached)}"


def _costliest(model: CostModel, cost: Cost, reached: State) -> str:
    sizes = model.widths.sizes(_removed(reached)).tolist()
    spent: dict[str, float] = {}
    for term in cost.terms() or ():
        spent[term.owner] = spent.get(term.owner, 0.0) + term.cost(sizes)
    total = sum(spent.values())
    if not total:
        return ""
    most = sorted(spent, key=lambda owner: (-spent[owner], owner))[:3]
    return ", most of it in " + ", ".join(f"{_module(model, owner)} ({spent[owner] / total:.0%})" for owner in most)


def _module(model: CostModel, owner: str) -> str:
    node = next((node for node in model.graph.nodes if node.name == owner), None)
    return str(node.meta.get("module") or owner) if node is not None else owner
