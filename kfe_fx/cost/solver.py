"""Which units go: the least loss that meets a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kfe_fx.cost.bounds import Bounds
from kfe_fx.cost.count import Cost, CostModel
from kfe_fx.cost.exact import MOST_LEFT, solve_exactly
from kfe_fx.cost.joint import JointState
from kfe_fx.cost.search import LOOK_AHEAD, Search, farthest
from kfe_fx.cost.state import Sizes, State, SumState, WholeState
from kfe_fx.cost.steps import Stepper, Track, by_score, check_scores, frozen_groups, kernel_widths, protected_units
from kfe_fx.cost.widths import Removed
from kfe_fx.errors import UsageError

if TYPE_CHECKING:
    from kfe_fx.labels.analysis import Analysis

CAP = 0.9
NAMED = 3  # of globs or layers that a message lists
EXACT_COMBINATIONS = 20_000  # listed in a fraction of a second; pegging leaves few of them
# a cost that differs from the limit by less than rounding meets it
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Selection:
    """What is removed, and what that is predicted to cost relative to dense.

    ``feasible`` is false where no choice was found that meets the budget: then this is the cheapest one, and
    ``binding`` says what stands in the way. ``loss`` is the sum of the scores removed, ``dropped`` are the names of
    branches that go as a whole, ``step`` is what widths are multiples of, where that was asked.
    """

    removed: frozenset[int]
    predicted: float
    feasible: bool
    binding: str = ""
    loss: float = 0.0
    dropped: tuple[str, ...] = ()
    step: int | None = None


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


@dataclass(frozen=True)
class Demand:
    """A budget beside the first one: ``cost`` may fall to ``target`` times its dense value; ``name`` says of what."""

    name: str
    cost: Cost
    target: float


def select_budget(
    model: CostModel,
    scores: Any,
    cost: Cost | Callable[[frozenset[int]], float],
    target: float,
    *,
    name: str = "",
    also: Sequence[Demand] = (),
    multiple_of: int = 16,
    cap: float = CAP,
    keep: Sequence[str] = (),
    bounds: Bounds | None = None,
    gone: Collection[int] = (),
    drop: Collection[int] = (),
    look_ahead: Sequence[int] = LOOK_AHEAD,
    exact: int = EXACT_COMBINATIONS,
) -> Selection:
    """Choose units of the least total score so that ``cost`` falls to ``target`` times its dense value.

    ``scores``: loss increase if a unit is removed, one per unit. ``cost``: a Cost, or any function of a frozenset of
    removed units; ``also`` are more budgets that must be met at once, ``name`` tells the first from them. Widths that
    kernels see stay multiples of ``multiple_of``; groups that are not wider than it are left alone. At most the
    fraction ``cap`` of a group goes, unless ``bounds`` say otherwise; ``keep`` are globs over parameter names whose
    outputs stay. ``gone`` is removed in any case and loses nothing more: what earlier rounds took. ``drop`` is removed
    in any case at the loss of its scores, and no width, cap or floor holds it back: the units of whole branches.
    Where costs are sums and networks small (at most ``exact`` combinations of stops) the choice is optimal, as an
    integer program; else greedy on score per cost saved with look-ahead, then exchanges. Equal arguments give equal
    selections.

    Raises:
        UsageError: scores, target, cap, block, bounds or globs that mean nothing.
    """
    if not 0 <= cap <= 1:
        raise UsageError(f"the most that may go of a group is between 0 and 1, got {cap}")
    priced: Any = cost if hasattr(cost, "predict") else FunctionCost(cost)  # type: ignore[arg-type]  # one or the other
    ranked = check_scores(model.analysis, scores).copy()
    ranked[list(gone)] = -math.inf
    dropped = math.fsum(ranked[unit] for unit in drop if ranked[unit] != -math.inf)
    ranked[list(drop)] = -math.inf
    options = Options(multiple_of, cap, tuple(keep), bounds or Bounds(), frozenset(drop))
    demands = [demand for demand in (Demand(name, priced, target), *also) if _matters(demand)]
    dense = float(priced.predict(()))
    if not demands and not gone and not drop and not options.bounds.caps:
        return Selection(frozenset(), 1.0, True)
    made = [
        (demand, search_state(model, ranked, demand.cost, options), demand.target * float(demand.cost.predict(())))
        for demand in demands or [Demand(name, priced, 1.0)]
    ]
    state = made[0][1] if len(made) == 1 else JointState([one for _, one, _ in made], [limit for _, _, limit in made])
    limit = made[0][2] if len(made) == 1 else 1.0
    search = Search(state, limit * (1 + _ROUNDING), look_ahead)
    # caps, or units that are gone, demand nothing more, even where what is left is predicted to be slower than dense
    feasible = not demands or _optimise(search, made, exact)
    unmet = [] if feasible else [(one, part, most) for one, part, most in made if part.predicted() > most]
    reasons = [_binding(model, ranked, one, options, most, part) for one, part, most in unmet]
    removed = _removed(state).union(gone, drop)
    uncut = _above_caps(model.analysis, options, removed)
    if uncut:
        feasible = False
        reasons.append(f"--cap {uncut[0]} in steps of {multiple_of}")
    predicted = priced.predict(removed) / dense if dense > 0 else 1.0
    return Selection(removed, predicted, feasible, "; ".join(reasons), search.loss + dropped)


def _optimise(search: Search, made: Sequence[tuple[Demand, State, float]], most: int) -> bool:
    """Search, and go on to the optimum where that can be found quickly; return whether the limits are met."""
    first, met = list(search.state.stops), search.run()
    states = [state for _, state, _ in made if isinstance(state, SumState)]
    if not most or len(states) < len(made) or not states[0].tracks:
        return met
    found, known = list(search.state.stops), search.loss if met else None
    most = most if met else min(most, MOST_LEFT)  # what is not met cannot peg anything
    search.go_to(first)
    try:
        best = solve_exactly(states, [limit * (1 + _ROUNDING) for _, _, limit in made], most, known)
    except UsageError:
        best = None
    if best is not None and (known is None or best.loss < known):
        search.go_to(best.stops)
        if search.state.predicted() <= search.limit:
            return True
    search.go_to(found)  # nothing better, or met within the tolerance of the integer program only
    return met


def _above_caps(analysis: Analysis, options: Options, removed: frozenset[int]) -> list[str]:
    """List the groups that keep more than their cap."""
    bounds = options.bounds.of_groups(analysis)
    kept = {group.id: len(set(group.units) - removed) for group in analysis.groups}
    return [analysis.groups[id_].name for id_, (_, most) in bounds.items() if most is not None and kept[id_] > most]


def _matters(demand: Demand) -> bool:
    if not 0 < demand.target <= 1:
        raise UsageError(f"a budget is a ratio above 0 and at most 1, got {demand.target}")
    return demand.target < 1 and float(demand.cost.predict(())) > 0


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
class Options:
    """What restricts a selection; see ``select_budget``."""

    block: int
    cap: float
    keep: tuple[str, ...] = ()
    bounds: Bounds = field(default_factory=Bounds)
    drop: frozenset[int] = frozenset()


def search_state(model: CostModel, scores: np.ndarray, cost: Cost, options: Options) -> State:
    """Return where a search begins: the tracks of all groups, moved on to what is gone already (score -infinity)."""
    stepper = Stepper(model, options.block)
    protected = protected_units(model.analysis, scores) - options.drop
    frozen = frozen_groups(model.analysis, options.keep)
    bounds = options.bounds.of_groups(model.analysis, frozen)
    tracks: list[Track] = []
    for group in model.analysis.groups:
        if options.drop.issuperset(group.units):
            tracks.append(Track(group.id, (group.units,), (0.0, 0.0)))
        elif group.id not in frozen:
            least, most = bounds.get(group.id, (None, None))
            if least is None and most is not None:  # what a cap takes, the cap of all layers does not give back
                least = min(most, len(group.units) - math.floor(options.cap * len(group.units)))
            track = stepper.track(group, scores, protected, options.cap, least)
            if len(track):
                tracks.append(track)
    terms = cost.terms()
    sizes = Sizes(model.widths, tracks, kernel_widths(model), options.block)
    state = WholeState(sizes, cost) if terms is None else SumState(sizes, terms)
    for index, track in enumerate(tracks):
        last = max(
            (j for j, units in enumerate(track.portions, 1) if np.isneginf(scores[list(units)]).any()), default=0
        )
        _, most = bounds.get(track.group, (None, None))
        if most is not None:
            units = len(model.analysis.groups[track.group].units)
            fits = (j for j in range(len(track) + 1) if units - len(track.gone(j)) <= most)
            last = max(last, next(fits, len(track)))
        if last:
            state.move(index, last)
    return state


def _removed(state: State) -> frozenset[int]:
    gone = (unit for track, stop in zip(state.tracks, state.stops, strict=True) for unit in track.gone(stop))
    return frozenset(gone)


def _binding(
    model: CostModel, scores: np.ndarray, demand: Demand, options: Options, limit: float, reached: State
) -> str:
    """Say which restriction keeps the cost above ``limit``: the first whose absence alone would do, else the layers."""
    cost, bare = demand.cost, replace(options.bounds, floors=())
    told = f"{demand.name}: " if demand.name else ""
    relaxed = {
        f"what --keep protects ({_kept(model, options)})": replace(options, keep=()),
        f"what --floor keeps ({_named(floor.glob for floor in options.bounds.floors)})": replace(options, bounds=bare),
        f"widths in multiples of {options.block}": replace(options, block=1),
        f"the cap of {options.cap:.0%} removed per layer": replace(options, cap=1.0),
        "multiples, floors, caps and --keep together": Options(1, 1.0, (), bare, options.drop),
    }
    for name, easier in relaxed.items():
        if easier != options:
            state = search_state(model, scores, cost, easier)
            while True:
                before = list(state.stops)
                farthest(state)
                if state.stops == before:
                    break
            if state.predicted() <= limit:
                return f"{told}{name}"
    return f"{told}what cannot be removed at all{_costliest(model, cost, reached)}"


def _kept(model: CostModel, options: Options) -> str:
    """Name the globs of --keep that hold layers back, with the layers where a glob is not the name of one."""
    layers: dict[str, list[str]] = {}
    for group, glob in frozen_groups(model.analysis, options.keep).items():
        layers.setdefault(glob, []).append(model.analysis.groups[group].name)
    told = (glob if names == [glob] else f"{glob}: {_named(names)}" for glob, names in layers.items())
    return _named(told, "; ")


def _named(names: Iterable[str], between: str = ", ") -> str:
    """List names, the first few of many."""
    each = list(dict.fromkeys(names))
    rest = [f"and {len(each) - NAMED} more"] if len(each) > NAMED else []
    return between.join([*each[:NAMED], *rest])


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
