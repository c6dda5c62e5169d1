"""The rounds of a pruning run: state of one run, one method a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from kfe_fx.certificate import Certificate
from kfe_fx.cost.count import CostModel
from kfe_fx.cost.device import Device, this_device
from kfe_fx.cost.loop import close_loop
from kfe_fx.cost.schedule import exponential_schedule
from kfe_fx.cost.solver import Selection
from kfe_fx.criteria.base import ScoreContext, score
from kfe_fx.embedding import lift_scores
from kfe_fx.errors import UnsupportedModel
from kfe_fx.labels.analysis import analyze
from kfe_fx.labels.states import permit
from kfe_fx.passes.cutting import Cut, Cutter, State
from kfe_fx.passes.proof import prove
from kfe_fx.passes.selecting import Selector
from kfe_fx.passes.settings import Settings
from kfe_fx.passes.shallow import Shallow
from kfe_fx.passes.shrink import Shrink
from kfe_fx.passes.stopwatch import Stopwatch
from kfe_fx.passes.telling import COUNTED, counts, describe, tell_counts, tell_limits, tell_prediction
from kfe_fx.passes.trial import Trial
from kfe_fx.plan import Plan
from kfe_fx.program import Program
from kfe_fx.training.finetune import default_epochs, finetune
from kfe_fx.training.metrics import Metric, evaluate, resolve_metric
from kfe_fx.training.optimizer_state import make_optimizer, slice_optimizer
from kfe_fx.training.prune_data import PruneData

ROUNDS = 4  # with fine-tuning in between; without it one round loses nothing
BETWEEN = 0.4  # share of the fine-tuning that goes between the rounds
TOLERANCE, NEAR = 0.05, 0.02  # of a measured budget, and of dense: the smaller counts
PATIENCE = 2  # branches that may be tried in vain


@dataclass
class Shared:
    """What several runs on one dense network have in common: its scores, and the sessions that measure it."""

    scores: np.ndarray | None = None
    scoring: dict[str, Any] = field(default_factory=dict)
    stopwatch: Stopwatch | None = None


class Rounds:
    """One run: decisions are taken on the units of the dense network, less the branches that went; the weights live in
    the small network.
    """

    def __init__(
        self,
        program: Program,
        settings: Settings,
        data: PruneData,
        progress: Callable[[str, float | None], None] | None,
        shared: Shared | None = None,
    ) -> None:
        """Analyse the network.

        Raises:
            UnsupportedModel: nothing can be removed.
        """
        self.original = permit(program, allowed=settings.resize_state)
        self.settings = settings
        self.data = data
        self.shared = shared or Shared()
        self.progress = progress or (lambda stage, done=None: None)
        self.progress("reading the graph", None)
        self.certificate = Certificate(1.0, settings.metric, str(settings.criterion), settings.seed)
        analysis = analyze(self.original, heads=settings.heads)
        whole = Shallow(analysis, frozenset(), self.original, analysis)
        self.cutter = Cutter(settings, data, lambda candidate: self.trial.loss(candidate))
        self.dense = CostModel(self.original, analysis)
        self._go_to(State(self.original.copy().eval(), whole, frozenset(), Plan(heads=settings.heads)))
        self.optimizer: torch.optim.Optimizer | None = None
        self.scoring: dict[str, Any] = {}
        self.ratios = self._ratios()
        if not analysis.units and self._asks():
            raise UnsupportedModel(
                "nothing can be removed from this network; `kfe-fx inspect` says what is frozen and why"
            )

    def _go_to(self, state: State) -> None:
        """Go on from another state; where branches went, what selects looks at the network anew."""
        if not hasattr(self, "state"):
            self.model = self.dense
        elif state.shallow is not self.state.shallow:
            self.model = CostModel(state.shallow.program, state.shallow.analysis)
            self.__dict__.pop("selector", None)
        self.state = state

    def run(self) -> tuple[Program, Plan, Certificate]:
        """Prune to the budget and return the small Program, the plan and the certificate."""
        describe(self.certificate, self.original, self.state.shallow.analysis, self.dense)
        judge = self._judge()
        if judge is not None:
            self.certificate.quality = {"metric": judge.name, "before": self._evaluate(judge, self.original)}
        if self._asks():
            self._rounds(judge)
        tell_counts(self.certificate, self.settings, self.model, self.state.removed, self.state.small)
        self._tell_data()
        if "latency" in self.ratios and self._asks():
            self._reach_latency()
        tell_limits(self.certificate, self.settings, self.ratios)
        return permit(self.state.small, allowed=False), self.state.plan, self.certificate

    # what is asked ---------------------------------------------------------------------------------------------------

    @property
    def stopwatch(self) -> Stopwatch:
        """What measures candidates against the dense network."""
        if self.shared.stopwatch is None:
            self.progress("measuring the dense network", None)
            self.shared.stopwatch = Stopwatch(self.original, self.settings)
        return self.shared.stopwatch

    @cached_property
    def device(self) -> Device:
        """The device that is pruned for: the one that was given, else this one."""
        return self.settings.target or this_device(self.settings.threads)

    @cached_property
    def trial(self) -> Trial:
        """What judges candidates by their loss on a few examples."""
        return Trial(self.original, self.data.calibration, self.settings)

    @cached_property
    def selector(self) -> Selector:
        """What selects units of the present base."""
        return Selector(self.state.shallow, self.model, self.dense, self.settings, lambda: self.device)

    def _ratios(self) -> dict[str, float]:
        """Return every limit as a fraction of dense."""
        held = counts(self.dense, frozenset())
        ratios = {}
        for limit in self.settings.limits:
            if limit.metric == "latency" and limit.absolute:
                dense = self.stopwatch.dense_ms() if self.settings.measures else self.selector.milliseconds(self.dense)
            else:
                dense = float(held.get(COUNTED.get(limit.metric, ""), 1.0))
            ratios[limit.metric] = limit.ratio(dense)
        self.certificate.budget = ratios[self.settings.metric]
        return ratios

    def _asks(self) -> bool:
        settings = self.settings
        return min(self.ratios.values()) < 1 or bool(settings.bounds.caps) or settings.plan is not None

    # the rounds ------------------------------------------------------------------------------------------------------

    def _rounds(self, judge: Metric | None) -> None:
        targets = self._targets()
        if self.settings.measures:
            _ = self.stopwatch  # what cannot be measured is to be known before anything is trained
        for number, ratios in enumerate(targets):
            last = number == len(targets) - 1
            self.progress(f"round {number + 1} of {len(targets)}: scoring", number / len(targets))
            if self.settings.plan is not None:
                self._surgery(self._planned(self.settings.plan), None, ratios)
            else:
                scores = self._scores()
                branches = self._choose_branches(scores) if number == 0 else ()
                measured = last and self.settings.measures and self.ratios["latency"] < 1
                choose = self._closed_loop if measured else self._select
                self._surgery(choose(scores, ratios, branches), scores, ratios)
            if last and judge is not None:
                self.certificate.quality["right_after"] = self._evaluate(judge, self.state.small)
            self.progress(f"round {number + 1} of {len(targets)}: fine-tuning", (number + 0.5) / len(targets))
            self._finetune(len(targets), last=last)
        if judge is not None and self._trains():
            self.certificate.quality["after"] = self._evaluate(judge, self.state.small)

    def _targets(self) -> list[dict[str, float]]:
        settings = self.settings
        if settings.metric == "widths" or settings.plan is not None:
            return [self.ratios]
        count = settings.rounds or (ROUNDS if self._trains() else 1)
        each = {metric: exponential_schedule(ratio, count) for metric, ratio in self.ratios.items()}
        return [{metric: line[number] for metric, line in each.items()} for number in range(count)]

    def _trains(self) -> bool:
        return self.data.training is not None and self.settings.epochs != 0

    def _scores(self) -> np.ndarray:
        """Score the units of the small network and hand the scores to the units of its base."""
        settings, state = self.settings, self.state
        first = not self.certificate.rounds
        if first and self.shared.scores is not None:
            self.scoring = self.shared.scoring
            return self.shared.scores
        whole = state.shallow.analysis
        analysis = analyze(state.small, heads=settings.heads) if state.removed else replace(whole, program=state.small)
        context = ScoreContext.of(
            state.small,
            analysis,
            self.data.calibration,
            settings.loss,
            batch_size=settings.batch_size,
            seed=settings.seed,
        )
        scores = score(settings.criterion, context)
        self.scoring = dict(context.facts)
        if first:
            self.shared.scores, self.shared.scoring = scores, self.scoring
        return lift_scores(whole, analysis, scores, state.plan.kept) if state.removed else scores

    def _select(self, scores: np.ndarray, ratios: dict[str, float], drop: tuple[str, ...]) -> Selection:
        return self.selector.select(scores, ratios, gone=self.state.removed, drop=drop)

    def _planned(self, plan: Plan) -> Selection:
        """Take what a plan says as a selection.

        Raises:
            PlanError: it is not a plan of this network.
        """
        shallow = self.selector.shallow(plan.dropped)
        removed = shallow.whole_units(plan.units(shallow.analysis))
        return Selection(
            removed, self.selector.ratio(self.settings.metric, removed, plan.dropped), True, dropped=plan.dropped
        )

    def _closed_loop(self, scores: np.ndarray, ratios: dict[str, float], drop: tuple[str, ...]) -> Selection:
        """Measure what is selected and correct what is asked of the predictor."""

        def solve(target: float) -> Selection:
            return self._select(scores, {**ratios, "latency": target}, drop)

        def build_and_measure(selection: Selection) -> float:
            self.progress("measuring a candidate", None)
            shallow = self.selector.shallow(selection.dropped)
            plan = Plan.of_units(shallow.analysis, shallow.units_of(selection.removed), heads=self.settings.heads)
            candidate = Shrink(plan).run(shallow.program).program
            return self.stopwatch.ratio(candidate, shallow.program, (*self.state.plan.dropped, *selection.dropped))

        tolerance = min(TOLERANCE, NEAR / ratios["latency"])
        result = close_loop(solve, build_and_measure, ratios["latency"], tolerance=tolerance)
        alone = len(self.ratios) == 1 and not self.settings.bounds.caps
        if (
            alone and drop and result.measured < ratios["latency"] * (1 - tolerance)
        ):  # they save more than was asked for
            fewer = self._closed_loop(scores, ratios, drop[:-1])
            if self.certificate.feasible:
                return fewer
        certificate = self.certificate
        certificate.feasible = result.feasible
        certificate.binding = "" if result.within else result.reason.removeprefix("the budget is out of reach: ")
        certificate.measured["turns"] = [
            {"asked": turn.asked, "predicted": turn.selection.predicted, "measured": turn.measured}
            for turn in result.turns
        ]
        first = result.turns[0]
        error = first.selection.predicted / first.measured - 1
        certificate.measured["predictor"] = {"name": self.selector.latency.name, "error": error}
        if alone and result.measured >= 1 and not self.state.removed:  # a plan that is no faster is none
            certificate.feasible, certificate.binding = False, "nothing that can be removed makes the network faster"
            return Selection(frozenset(), 1.0, False, certificate.binding)
        return result.selection

    # one surgery -----------------------------------------------------------------------------------------------------

    def _surgery(self, selection: Selection, scores: np.ndarray | None, ratios: dict[str, float]) -> None:
        """Cut, and note what came of it; the optimiser goes on with what is left of its state."""
        settings, before = self.settings, self.state
        cut, error = self._cut(selection, scores)
        if cut.state.shallow is not before.shallow:
            self.optimizer = None
        elif self.optimizer is not None:
            self.optimizer = slice_optimizer(self.optimizer, before.small, cut.state.small, cut.step)
        self.certificate.rounds.append(
            {
                "target": ratios[settings.metric],
                "predicted": selection.predicted,
                "removed": len(selection.removed) - len(before.removed),
                **({"dropped": list(selection.dropped)} if selection.dropped else {}),
                "masked_error": error,
                "predicted_loss": selection.loss,
                **cut.facts,
            }
        )
        if not selection.feasible and not settings.measures:
            self.certificate.feasible = False
            self.certificate.binding = selection.binding
        self._go_to(cut.state)

    def _cut(self, selection: Selection, scores: np.ndarray | None, *, prove: bool = True) -> tuple[Cut, float]:
        """Drop branches, then remove units; return the last cut and the larger error."""
        state, removed, error = self.state, selection.removed, 0.0
        if selection.dropped:
            shallow = self.selector.shallow(selection.dropped)
            dropped = self.cutter.drop(state, shallow, selection.dropped, prove=prove)
            state, removed, error, scores = dropped.state, shallow.units_of(removed), dropped.error, None
        cut = self.cutter.remove(state, removed, scores, before=self.state.small, prove=prove)
        return cut, max(error, cut.error)

    def _choose_branches(self, scores: np.ndarray) -> tuple[str, ...]:
        """Choose the branches that go by what the network loses with them at the final budget, after repair.

        The sum of the scores of its units says little of a whole branch, so choices are tried: the first branches in
        the order of harm per cost saved, as many as lower the loss on the calibration examples, or as the budget needs.
        """
        if not self.selector.branches:
            return ()
        trial = self.trial

        def judge(names: tuple[str, ...]) -> tuple[bool, float]:
            selection = self._select(scores, self.ratios, names)
            if not selection.feasible:
                return True, selection.predicted
            return False, trial.loss(self._cut(selection, None, prove=False)[0].state.small)

        self.progress("trying whole branches", None)
        harm = {name: trial.harm(self.state.small, branch) for name, branch in self.selector.branches.items()}
        best: tuple[str, ...] = ()
        path, in_vain = best, 0
        found: dict[tuple[str, ...], tuple[bool, float]] = {best: judge(best)}
        for name in self.selector.by_price(harm, self.ratios):
            if in_vain == PATIENCE and not found[best][0]:
                break
            if not self.selector.fit((*path, name)):
                continue
            path = (*path, name)
            left = self.selector.ratio(self.settings.metric, self.selector.units(path), path)
            if left < self.ratios[self.settings.metric] * (1 - TOLERANCE) and not found[best][0]:
                break  # these branches alone save more than was asked for
            found[path] = judge(path)
            better = found[path] < found[best]
            best, in_vain = (path, 0) if better else (best, in_vain + 1)
        return best

    def _finetune(self, rounds: int, *, last: bool) -> None:
        training, settings = self.data.training, self.settings
        if training is None or settings.epochs == 0:
            return
        epochs = settings.epochs if settings.epochs is not None else default_epochs(len(training))
        per_epoch = max(1, len(training) // settings.batch_size)
        share = 1.0 if rounds == 1 else (1 - BETWEEN) if last else BETWEEN / (rounds - 1)
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.state.small, settings.optimizer, settings.lr)
        facts = finetune(
            self.state.small,
            training,
            settings.loss,
            steps=max(1, round(epochs * per_epoch * share)),
            batch_size=settings.batch_size,
            optimizer=self.optimizer,
            schedule="cosine",
            seed=settings.seed + len(self.certificate.rounds),
            progress=self.progress,
        )
        self.certificate.rounds[-1]["finetune"] = {k: v for k, v in facts.items() if k != "threads"}
        self.certificate.measured.setdefault("training_threads", []).append(facts.get("threads"))

    # what is told ----------------------------------------------------------------------------------------------------

    def _judge(self) -> Metric | None:
        held = self.data.held_out
        return None if held is None else resolve_metric(self.settings.evaluate, held.targets)

    def _evaluate(self, judge: Metric, program: Program) -> float:
        self.progress(f"measuring {judge.name}", None)
        return evaluate(program, self.data.held_out, judge)

    def _tell_data(self) -> None:
        certificate = self.certificate
        certificate.data = {"note": self.data.note, **self.scoring}
        if self.scoring and self.data.calibration is None:
            certificate.notes.append("data-free: scored on drawn inputs; give --data for better choices")

    def _reach_latency(self) -> None:
        self.certificate.measured["device"] = {**self.device.fingerprint.to_json(), "step": self.device.step}
        if self.settings.target is None:
            onnx = prove(self.state.small, self.certificate)
            self.progress("measuring anew", None)
            self.certificate.measured["latency"] = self.stopwatch.anew(self.state.small, onnx)
            if self.settings.precision == "int8":
                self.certificate.notes.append(
                    "the latency is that of int8 copies of both networks (ranges from drawn inputs), predicted with "
                    "the constants of float32; the ONNX file is float32: quantise it"
                )
        else:
            milliseconds = self.selector.milliseconds
            tell_prediction(
                self.certificate,
                self.settings.target,
                milliseconds(self.dense),
                milliseconds(self.model, self.state.removed),
            )
