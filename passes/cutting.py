"""One cut of a pruning run: remove what was selected, prove it on the weights of now, and repair what is left."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kfe_fx.curvature.blocks import find_blocks
from kfe_fx.curvature.store import Store
from kfe_fx.embedding import embed, relative
from kfe_fx.errors import PlanError, UsageError
from kfe_fx.labels.analysis import Analysis, analyze
from kfe_fx.labels.branches import find_branches
from kfe_fx.passes.drop_branches import DropBranches, measure_branch_means
from kfe_fx.passes.fold_means import FoldMeans, measure_means
from kfe_fx.passes.proof import check_masked
from kfe_fx.passes.reconstruct import Reconstruct
from kfe_fx.passes.reestimate_statistics import ReestimateStatistics
from kfe_fx.passes.settings import Settings
from kfe_fx.passes.shallow import Shallow
from kfe_fx.passes.shrink import Shrink
from kfe_fx.plan import Plan
from kfe_fx.program import Program
from kfe_fx.repair.fit import GAIN, KEPT
from kfe_fx.repair.obs import INPUTS, OUTPUTS, obs_weights
from kfe_fx.training.prune_data import PruneData

STATISTICS_EXAMPLES = 2048
RECONSTRUCTION, QUICK = 1024, 256  # examples that layers are fitted to, for good and in a trial
SHARES = (1.0, 0.25)  # of the motion of rows by Kron-OBS that are tried
WORSE = 1.05  # of the loss that folded means leave: fits that end above it are not kept


@dataclass(frozen=True)
class State:
    """Where a run stands: the small network, and which units of its base (``shallow``) are not in it."""

    small: Program
    shallow: Shallow
    removed: frozenset[int]
    plan: Plan

    def analysis(self, heads: str) -> Analysis:
        """Return the units of the small network: those of the base where none is gone."""
        if self.removed:
            return analyze(self.small, heads=heads)
        return replace(self.shallow.analysis, program=self.small)

    def full(self) -> Program:
        """Return the base with the weights of now; what was removed keeps the weights that it had."""
        return embed(self.shallow.program, self.small, self.plan.kept) if self.removed else self.small


@dataclass(frozen=True)
class Cut:
    """What a cut leaves: the state after it, the plan of this step alone, the error of the proof, and facts."""

    state: State
    step: Plan
    error: float
    facts: dict[str, Any]


class Cutter:
    """Cuts networks of one run."""

    def __init__(self, settings: Settings, data: PruneData, loss: Callable[[Program], float]) -> None:
        """Take the data that repair is measured on, and the loss on it that says which repair is best."""
        self._settings, self._data, self._loss = settings, data, loss

    def drop(self, state: State, shallow: Shallow, names: tuple[str, ...], *, prove: bool = True) -> Cut:
        """Drop branches: their means over the data take their place. ``shallow`` is the base without them.

        Raises:
            PlanError: the network has no such branches.
            VerificationFailed: what is left is not the masked original.
        """
        settings, sample, error = self._settings, self._data.calibration, 0.0
        small = state.small
        if prove or sample is None:
            small = DropBranches(names, heads=settings.heads, always=True).run(state.small).program
        if prove:
            whole = replace(shallow.whole, program=state.full())
            error = check_masked(whole, small, state.removed | shallow.units, settings.seed)
        if sample is not None:
            present = analyze(state.small, heads=settings.heads) if state.removed else None
            known = shallow.branches if present is None else find_branches(present)
            chosen = [branch for branch in known if branch.name in names]
            seen = sample if prove else sample.first(QUICK)
            means = measure_branch_means(state.small, chosen, seen, batch_size=settings.batch_size)
            small = DropBranches(names, means, settings.heads, always=True).run(state.small).program
        removed = shallow.units_of(state.removed)
        plan = Plan.of_units(shallow.analysis, removed, heads=settings.heads)
        plan = replace(plan, dropped=(*state.plan.dropped, *names), decomposed=state.plan.decomposed)
        return Cut(State(small, shallow, removed, plan), Plan(), error, {"dropped": list(names)})

    def remove(
        self,
        state: State,
        removed: frozenset[int],
        scores: np.ndarray | None = None,
        *,
        before: Program | None = None,
        store: Store | None = None,
        prove: bool = True,
    ) -> Cut:
        """Remove units (those that are gone already among them), then mend what is left.

        Args:
            state: where the run stands.
            removed: units of its base.
            scores: of those units, for the plan.
            before: what the rest is to compute again, where that is not the network of ``state``: the same one with
                the branches that were dropped since.
            store: curvature factors of the network of ``state``, whose update of the survivors is tried as well.
            prove: whether to compare with the masked original; without, repair looks at fewer examples too.

        Raises:
            VerificationFailed: what is left is not the masked original.
        """
        heads, seed = self._settings.heads, self._settings.seed
        full, analysis = state.full(), state.shallow.analysis
        bare = Plan.of_units(analysis, removed, scores, heads)
        plan = replace(bare, dropped=state.plan.dropped, decomposed=state.plan.decomposed)
        small = Shrink(bare).run(full).program
        error = check_masked(replace(analysis, program=full), small, removed, seed) if prove else 0.0
        step = Plan(relative(state.plan.kept, plan.kept), heads=heads)
        if removed == state.removed and not (
            plan.dropped or plan.decomposed
        ):  # nothing went: nothing is to be repaired
            return Cut(state, step, error, {})
        known = {"unrepaired": self._loss(small)} if prove and self._data.calibration is not None else {}
        obs = Compensation()
        if store is not None and before in (None, state.small):
            obs = _compensated(state.small, small, store, step)
        small, facts = self._repair(state.small, small, step, before or state.small, obs, quick=not prove)
        return Cut(State(small, state.shallow, removed, plan), step, error, facts | known)

    def _repair(
        self, present: Program, small: Program, step: Plan, before: Program, obs: Compensation, *, quick: bool
    ) -> tuple[Program, dict[str, Any]]:
        """Fold means, fit every layer to what ``before`` computed there, and re-estimate statistics if that helps."""
        sample, size, how = self._data.calibration, self._settings.batch_size, self._settings.repair
        seed = self._settings.seed
        if sample is None or how == "none":
            return small, {}
        fits, limit = how == "auto" and len(sample) > 1, QUICK if quick else RECONSTRUCTION
        try:
            seen = sample.first(QUICK) if fits else sample  # what is fitted next needs no exact means
            analysis = analyze(present, heads=self._settings.heads)
            result = FoldMeans(analysis, step, measure_means(analysis, seen, batch_size=size)).run(small)
            small = result.program
            facts = {"folded": result.facts["folded"], "not_folded": result.facts["skipped_at"]}
        except PlanError:  # this round cuts across units of the smaller network: leave its biases alone
            facts = {"folded": 0, "not_folded": ["this round"]}
        fitted, source = small, self._data.training if self._data.training is not None else sample

        def fresh(program: Program) -> Program:
            return ReestimateStatistics(source.sample(STATISTICS_EXAMPLES, seed), size).run(program).program

        if fits:
            others = {"obs": obs.inputs} if obs.inputs else {}
            fit = Reconstruct(before, step, sample, others, batch_size=size, limit=limit, seed=seed)
            found = fit.run(small)
            fitted, layers = found.program, found.facts["layers"]
            facts["repaired"] = dict(Counter(layer["method"] for layer in layers.values()))
            if quick and fitted is not small:
                return fitted, facts
        best = fresh(small) if fitted is small else self._better(small, fitted, fresh, facts)
        return self._rows_moved(best, obs.rows, facts) if fits else best, facts

    def _better(
        self, folded: Program, fitted: Program, fresh: Callable[[Program], Program], facts: dict[str, Any]
    ) -> Program:
        """Take the fitted layers, with fresh statistics if that helps; or leave them where the loss says so.

        Each layer is fitted to what it gave before, and judged by that alone: only the loss of the whole network tells
        that the fits together are no repair.
        """
        best, loss, again, plain = fitted, self._loss(fitted), fresh(fitted), fresh(folded)
        if again is not fitted and (other := self._loss(again)) < loss:
            best, loss = again, other
        least = self._loss(plain)
        if math.isfinite(least) and not loss <= least + (WORSE - 1) * abs(least):
            facts["repaired"] = {KEPT: sum(facts["repaired"].values())}
            facts["fits_left"] = {"fitted": loss, "folded": least}
            return plain
        return best

    def _rows_moved(self, best: Program, rows: dict[str, Tensor], facts: dict[str, Any]) -> Program:
        """Let the rows that stay make good those beside them that went, where the loss says that this helps.

        A layer's own outputs move with it, so that only the loss of the whole network can judge. Blocks know nothing
        of each other nor of what was fitted behind them, so that a whole step mostly goes too far.
        """
        if not rows:
            return best
        least, found = self._loss(best), best
        for share in SHARES:
            moved = best.copy()
            with torch.no_grad():
                for name, motion in rows.items():
                    moved.tensor(name).add_(share * motion)
            loss = self._loss(moved)
            if loss < least - (1 - GAIN) * abs(least):
                least, found, facts["rows_moved"] = loss, moved, share
        return found


@dataclass(frozen=True)
class Compensation:
    """What captured curvature proposes (``obs_weights``): weights of layers that lost inputs, and motions of rows.

    ``rows`` are by parameter, each under one name, what the rows that stay take over from those of their own layer that
    went: to be added to any weights of the small network.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)


def _compensated(present: Program, small: Program, store: Store, step: Plan) -> Compensation:
    """Propose what makes good the step from ``present`` to ``small``."""
    blocks = find_blocks(present)
    try:
        inputs, outputs = (obs_weights(present, store, step, sides=side, blocks=blocks) for side in (INPUTS, OUTPUTS))
    except UsageError:  # trained since it was scored, or this round cuts across units of the smaller network
        return Compensation()
    names = [name for name in outputs if small.names_of(name)[0] == name]
    return Compensation(inputs, {name: outputs[name] - small.tensor(name).detach() for name in names})
