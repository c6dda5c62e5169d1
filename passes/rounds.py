"""The rounds of a pruning run: state of one run, one method a step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from kfe_fx.certificate import Certificate
from kfe_fx.cost.count import CostModel
from kfe_fx.cost.device import Device, this_device
from kfe_fx.cost.solver import Selection
from kfe_fx.criteria.base import resolve
from kfe_fx.criteria.step_size import squared_norms
from kfe_fx.curvature.distributed import Group
from kfe_fx.embedding import units_at
from kfe_fx.errors import UnsupportedModel, UsageError
from kfe_fx.labels.analysis import analyze
from kfe_fx.labels.states import permit
from kfe_fx.passes.branch_choice import choose_branches
from kfe_fx.passes.closed_loop import NO_FASTER, TOLERANCE, ClosedLoop
from kfe_fx.passes.crowding import EXPONENTS
from kfe_fx.passes.cutting import Cut, Cutter, State
from kfe_fx.passes.decomposing import Decomposer
from kfe_fx.passes.floors import Floor
from kfe_fx.passes.proof import prove
from kfe_fx.passes.schedules import netadapt, round_ratios
from kfe_fx.passes.scoring import Scored, lifted, score_state
from kfe_fx.passes.selecting import Selector
from kfe_fx.passes.settings import Settings
from kfe_fx.passes.shallow import Shallow
from kfe_fx.passes.stopwatch import Stopwatch
from kfe_fx.passes.telling import (
    COUNTED,
    counts,
    describe,
    tell_capacity,
    tell_counts,
    tell_data,
    tell_limits,
    tell_losses,
    tell_negative,
    tell_prediction,
    tell_step,
    unasked,
)
from kfe_fx.passes.theis import Signals
from kfe_fx.passes.trial import Trial
from kfe_fx.passes.tuning import Tuner
from kfe_fx.plan import Plan
from kfe_fx.program import Program
from kfe_fx.runtime.profile import strays
from kfe_fx.training.batches import Batches, pinned_batch
from kfe_fx.training.losses import Settling, resolve_loss
from kfe_fx.training.metrics import Metric, evaluate, resolve_metric
from kfe_fx.training.prune_data import PruneData
from kfe_fx.training.shared_norms import has_own_norms

NOTHING_TO_DECOMPOSE = "nothing is decomposed: no layer can be but those that make the outputs, which stay"
FURTHER = 0.85  # of the budget: what lies between says what time costs in channels
MASKING = 0.5  # share of a round's fine-tuning in which the schedule theis masks units


@dataclass(frozen=True)
class Part:
    """One round: its number of how many, and what may remain after it."""

    number: int
    count: int
    ratios: dict[str, float]

    @property
    def first(self) -> bool:
        """Whether it is the first."""
        return self.number == 0

    @property
    def last(self) -> bool:
        """Whether it is the last."""
        return self.number == self.count - 1


@dataclass(frozen=True)
class Mark:
    """Where a run stood before a round: the network, and what was told until then."""

    state: State
    quality: dict[str, Any]
    measured: dict[str, Any]


@dataclass
class Shared:
    """What runs on one dense network and sample have in common: scores and factors, and what measures the network."""

    scored: Scored | None = None  # its factors repair every network that it chooses
    stopwatch: Stopwatch | None = None
    harms: dict[str, float] = field(default_factory=dict)  # by branch


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
        self.certificate = Certificate(1.0, settings.metric, _criterion(settings), settings.seed)
        analysis = analyze(self.original, heads=settings.heads)
        self.whole = Shallow(analysis, frozenset(), self.original, analysis)
        self.cutter = Cutter(settings, data, lambda candidate: self.trial.loss(candidate))
        self.dense = CostModel(self.original, analysis)
        self._go_to(self._start())
        self.tuner = Tuner(settings, data, self.original, self.progress)
        self.scored = Scored()  # what was scored last
        self.masked: frozenset[int] = frozenset()  # units of the base that training has been without in this round
        self.crowding = EXPONENTS[0] if settings.crowding is None else settings.crowding
        self.ratios = self._ratios()
        if not analysis.units and self._asks():
            raise UnsupportedModel(
                "nothing can be removed from this network; `kfe-fx inspect` says what is frozen and why"
            )

    def _start(self) -> State:
        """Return where a run begins: a copy of the dense network."""
        return State(self.original.copy().eval(), self.whole, frozenset(), Plan(heads=self.settings.heads))

    def _go_to(self, state: State) -> None:
        """Go on from another state; where branches went, what selects looks at the network anew."""
        if not hasattr(self, "state") or state.shallow is not self.state.shallow:
            dense = state.shallow is self.whole
            self.model = self.dense if dense else CostModel(state.shallow.program, state.shallow.analysis)
            self.__dict__.pop("selector", None)
        self.state = state

    def run(self) -> tuple[Program, Plan, Certificate]:
        """Prune to the budget and return the small Program, the plan and the certificate."""
        describe(self.certificate, self.original, self.state.shallow.analysis, self.dense)
        judge = self._judge()
        if judge is not None:
            self.certificate.quality = {"metric": judge.name, "before": self._evaluate(judge, self.original)}
        if self._asks():
            self._decompose()
            self._rounds(judge)
        if "latency" in self.ratios and self._asks():
            self._reach_latency()
        tell_counts(self.certificate, self.settings, self.model, self.state.removed, self.state.small)
        shared = self.tuner.trains and Group.current().size > 1 and has_own_norms(self.original)
        tell_data(self.certificate, self.settings, self.data, self.scored.facts, self.original, shared=shared)
        if "latency" in self.ratios and self._asks():
            tell_step(self.certificate, self.device, self.settings)
        tell_limits(self.certificate, self.settings, self.ratios)
        tell_negative(self.certificate)
        tell_losses(self.certificate, self.trial.examples if self.certificate.rounds else 0)
        if self._asks() and self.data.calibration is not None:
            self.progress("measuring the Fisher-Rao norm", None)
            tell_capacity(self.certificate, self.settings, self.data.calibration, self.original, self.state.small)
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
        return self.settings.target or Group.current().lead(
            lambda: this_device(self.settings.threads, self.settings.precision)
        )

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

    def _demands_more(self) -> bool:
        """Whether something must go for another reason than latency."""
        others = (ratio for metric, ratio in self.ratios.items() if metric != "latency")
        return any(ratio < 1 for ratio in others) or bool(self.settings.bounds.caps)

    # the rounds ------------------------------------------------------------------------------------------------------

    def _rounds(self, judge: Metric | None) -> None:
        targets = round_ratios(self.settings, self.ratios, trains=self.tuner.trains)
        floor = Floor(self.settings, self.data, self.original, judge)
        if self.settings.measures:
            _ = self.stopwatch  # what cannot be measured is to be known before anything is trained
        for number, ratios in enumerate(targets):
            before = self._mark()
            if not self._round(Part(number, len(targets), ratios), judge):
                self._leave()
                break
            if crossed := floor.crossed(self.state.small, self.certificate.rounds[-1]):
                self._take_back(before, crossed)
                break
        if judge is not None and self.tuner.trains and self.certificate.rounds:
            self.certificate.quality["after"] = self._evaluate(judge, self.state.small)

    def _round(self, part: Part, judge: Metric | None) -> bool:
        """Cut and train; return whether there was anything to cut."""
        self.progress(f"round {part.number + 1} of {part.count}: scoring", part.number / part.count)
        if self.settings.plan is not None:
            self._surgery(self._planned(self.settings.plan), None, part.ratios)
        else:
            scores = self._scores() if self.settings.schedule != "theis" or part.first else self.scored.scores
            branches = self._choose_shape(part, scores)
            if self.settings.schedule == "theis":
                self._tell_signals(part, branches)
                scores = self._train_and_mask(part, branches)
            found = self._chosen(part, scores, branches)
            chosen = Group.current().lead(lambda: found)
            if chosen is None:
                return False
            self._surgery(chosen, scores, part.ratios)
        if judge is not None and (part.last or self.settings.stops):  # a floor makes any round the last one
            self.certificate.quality["right_after"] = self._evaluate(judge, self.state.small)
        self.progress(f"round {part.number + 1} of {part.count}: fine-tuning", (part.number + 0.5) / part.count)
        self._finetune(part)
        return True

    def _chosen(self, part: Part, scores: np.ndarray, branches: tuple[str, ...]) -> Selection | None:
        if part.last and self.settings.measures and self.ratios["latency"] < 1:
            self.masked = frozenset()  # what the measurement corrects may come back
            loop = ClosedLoop(
                lambda ratios, drop: self._select(scores, ratios, drop), self.selector, self.stopwatch,
                self.certificate, self.state.plan, not self._demands_more(), self.progress,
            )  # fmt: skip
            return loop.run(part.ratios, branches)
        if self.settings.schedule != "netadapt" or branches:
            return self._select(scores, part.ratios, branches)
        return netadapt(
            self.state.shallow.analysis,
            scores,
            lambda given: self._select(given, part.ratios, ()),
            self._loss_at,
            self.state.removed,
        )

    def _scores(self) -> np.ndarray:
        """Score the units of the small network."""
        settings, state = self.settings, self.state
        first = not self.certificate.rounds
        shares = first and not settings.decompose  # else they are of one network after the other
        if shares and self.shared.scored is not None:
            self.scored = self.shared.scored
        else:
            store = settings.store if first and not state.plan.decomposed else None
            self.scored = score_state(state, settings, self.data.calibration, store)
        if shares:
            self.shared.scored = self.scored
        return self.scored.scores

    def _select(self, scores: np.ndarray, ratios: dict[str, float], drop: tuple[str, ...]) -> Selection:
        gone = self.state.removed | self.masked
        return self.selector.select(scores, ratios, gone=gone, drop=drop, crowding=self.crowding)

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

    # one surgery -----------------------------------------------------------------------------------------------------

    def _surgery(self, selection: Selection, scores: np.ndarray | None, ratios: dict[str, float]) -> None:
        """Cut, and note what came of it; the optimiser goes on with what is left of its state."""
        settings, before = self.settings, self.state
        cut, error = self._cut(selection, scores)
        self.masked = frozenset()
        self.tuner.follow(before, cut.state, cut.step)
        unrepaired = cut.facts.pop("unrepaired", None)
        wanted = unasked(settings, selection, scores, before.removed, ratios)
        entry = {
            "target": ratios[settings.metric],
            "predicted": selection.predicted,
            "removed": len(selection.removed) - len(before.removed),
            **({"dropped": list(selection.dropped)} if selection.dropped else {}),
            **({} if selection.step is None else {"step": selection.step, "crowding": self.crowding}),
            **({"negative": wanted} if wanted else {}),
            "masked_error": error,
            "predicted_loss": selection.loss,
            **cut.facts,
        }
        if unrepaired is not None:
            entry["loss"] = self._losses(before, cut.state, unrepaired, selection)
        self.certificate.rounds.append(entry)
        if not selection.feasible and not settings.measures:
            self.certificate.feasible = False
            self.certificate.binding = selection.binding
        self._go_to(cut.state)

    def _losses(self, before: State, after: State, unrepaired: float, selection: Selection) -> dict[str, Any]:
        """Return the loss on the calibration examples around a surgery, and the change that the scores promised."""
        # layers are decomposed with the first round, of which no score promises anything
        decomposed = bool(before.plan.decomposed) and not self.certificate.rounds
        return {
            "of": self.trial.name,
            "before": self.trial.loss(self.original if decomposed else before.small),
            "removed": unrepaired,
            "repaired": self.trial.loss(after.small),
            "predicted_change": None if decomposed else self._promised(before, selection),
        }

    def _promised(self, before: State, selection: Selection) -> float | None:
        """Return the sum of what was promised of the units that go; None where there is one of which nothing was."""
        changes = self.scored.changes
        if changes is None or self.settings.plan is not None or selection.dropped or not self.trial.judges_loss:
            return None
        total = float(changes[sorted(selection.removed - before.removed)].sum())
        return total if np.isfinite(total) else None

    def _cut(self, selection: Selection, scores: np.ndarray | None, *, prove: bool = True) -> tuple[Cut, float]:
        """Drop branches, then remove units; return the last cut and the larger error."""
        state, removed, error = self.state, selection.removed, 0.0
        if selection.dropped:
            shallow = self.selector.shallow(selection.dropped)
            dropped = self.cutter.drop(state, shallow, selection.dropped, prove=prove)
            state, removed, error, scores = dropped.state, shallow.units_of(removed), dropped.error, None
        store = None if selection.dropped or not prove else self.scored.curvature
        cut = self.cutter.remove(state, removed, scores, before=self.state.small, store=store, prove=prove)
        return cut, max(error, cut.error)

    def _choose_shape(self, part: Part, scores: np.ndarray) -> tuple[str, ...]:
        """Choose by trial which branches go, in the first round, and how much dearer the last units of a layer are."""
        free = self.settings.crowding is None and self.settings.metric != "widths"
        losses: dict[tuple[frozenset[int], tuple[str, ...]], float] = {}

        def judge(names: tuple[str, ...], ratios: dict[str, float]) -> tuple[bool, float]:
            selection = self._select(scores, ratios, names)
            if not selection.feasible:
                return True, selection.predicted
            key = selection.removed, names
            if key not in losses:
                losses[key] = self._loss_at(selection)
            return False, losses[key]

        def weighed(exponent: float) -> tuple[bool, float]:
            self.crowding = exponent
            return judge(names, part.ratios)

        names: tuple[str, ...] = ()
        if part.first and self.selector.branches:
            self.progress("trying whole branches", None)
            names = self._choose_branches(lambda names: judge(names, self.ratios))
        if free:
            self.progress("trying shapes", None)
            chosen = min(EXPONENTS, key=weighed)
            self.crowding = Group.current().lead(lambda: chosen)
        return names

    def _choose_branches(self, judge: Callable[[tuple[str, ...]], tuple[bool, float]]) -> tuple[str, ...]:
        harms = self.shared.harms if self.state.shallow is self.whole else {}

        def harm(name: str) -> float:
            if name not in harms:
                harms[name] = self.trial.harm(self.state.small, self.selector.branches[name])
            return harms[name]

        return choose_branches(self.selector, self.ratios, harm, judge, TOLERANCE)

    def _decompose(self) -> None:
        """Go on from a network some of whose layers are decomposed, where that leaves less loss at the budget."""
        settings, planned = self.settings, self.settings.plan
        ranks = {} if planned is None else {name: (c, r) for name, (c, r) in planned.decomposed.items()}
        if not ranks and (planned is not None or not settings.decompose):
            return
        sample = self.data.calibration
        if sample is None:
            raise UsageError("layers are decomposed in bases that are measured on examples; give --data")
        self.progress("measuring eigenbases", None)
        decomposer = Decomposer.of(self.original, self.dense, self.device, sample, settings)
        if ranks:
            self._go_to(decomposer.state(ranks, settings.heads))
            return
        if not decomposer.possible:
            self.certificate.notes.append(NOTHING_TO_DECOMPOSE)
            return
        before, scores = self.state, self._scores()
        selection = self._select(scores, self.ratios, ())
        further = self._select(scores, {name: FURTHER * ratio for name, ratio in self.ratios.items()}, ())
        saved = self.selector.milliseconds(self.model, selection.removed) - self.selector.milliseconds(
            self.model, further.removed
        )
        price = (further.loss - selection.loss) / saved if saved > 0 and selection.feasible else None
        best = not selection.feasible, self._loss_at(selection)
        found = before
        for ranks in decomposer.proposals(price):
            self.progress("trying decompositions", None)
            state = decomposer.state(ranks, settings.heads)
            self._go_to(state)
            selection = self._select(self._scores(), self.ratios, ())
            judged = not selection.feasible, self._loss_at(selection)
            best, found = (judged, state) if judged < best else (best, found)
        self._go_to(found)
        told = ", ".join(f"{name} (ranks {c}, {r})" for name, (c, r) in found.plan.decomposed.items())
        self.certificate.notes.append(f"decomposed: {told}" if told else "no decomposition is better than channels")

    def _loss_at(self, selection: Selection) -> float:
        return self.trial.loss(self._cut(selection, None, prove=False)[0].state.small)

    # training --------------------------------------------------------------------------------------------------------

    def _finetune(self, part: Part) -> None:
        if not self.tuner.trains:
            return
        steps = self.tuner.steps(part.count, last=part.last)
        if self.settings.schedule == "theis":
            steps -= round(MASKING * steps)
        self._train(steps)

    def _train(self, steps: int, penalties: Any = None, program: Program | None = None) -> None:
        seed = self.settings.seed + len(self.certificate.rounds)
        facts = self.tuner.run(self.state, steps, seed, penalties, program)
        entry = self.certificate.rounds[-1] if self.certificate.rounds else {}
        entry["finetune"] = {key: value for key, value in facts.items() if key != "threads"}
        self.certificate.measured.setdefault("training_threads", []).append(facts.get("threads"))

    def _train_and_mask(self, part: Part, branches: tuple[str, ...]) -> np.ndarray:
        """Train with gates, and mask units by the signals of the way; return the scores that came of it.

        The branches that are going to be dropped are masked from the start.
        """
        state, whole = self.state, self.state.shallow.analysis
        self.masked = frozenset()
        analysis = state.analysis(self.settings.heads)
        before = {metric: self.selector.ratio(metric, state.removed) for metric in part.ratios}

        distrust = 0.5 * self.settings.penalty * squared_norms(analysis)

        def choose(found: np.ndarray, share: float) -> frozenset[int]:
            way = {name: before[name] * (ratio / before[name]) ** share for name, ratio in part.ratios.items()}
            limits = {name: min(1.0, ratio) for name, ratio in way.items()}
            removed = self._select(lifted(state, analysis, found + distrust), limits, branches).removed
            gone = self.masked = removed - state.removed
            if not state.removed:
                return gone
            slices = (whole.units[unit].slices for unit in gone)
            return frozenset(u for each in slices for u in units_at(analysis, each, state.plan.kept))

        self._check_per_example()
        steps = max(1, round(MASKING * self.tuner.steps(part.count, last=part.last)))
        signals = Signals(state.small, analysis, choose, steps)
        self._train(steps, [signals], signals.view())
        found = signals.scores_with_masked_first(distrust), signals.estimates()
        scores, changes = (lifted(state, analysis, values) for values in found)
        # the teacher's share of the loss pulls back what the labels say: then nothing is promised of them
        self.scored = replace(self.scored, scores=scores, changes=None if self.settings.distil else changes)
        return scores

    def _tell_signals(self, part: Part, branches: tuple[str, ...]) -> None:
        name = self.certificate.criterion
        if part.first and name != "fisher":
            chose = "only chose which branches go" if branches else "ranked nothing that goes"
            self.certificate.notes.append(
                f"the schedule theis ranks units by signals of its own (running fisher scores); {name} {chose}"
            )

    def _check_per_example(self) -> None:
        """Refuse a loss that mixes examples, of which no signal belongs to one.

        Raises:
            UsageError: it does.
        """
        training, small = self.data.training, self.state.small
        assert training is not None
        size = pinned_batch(small) or self.settings.batch_size
        for batch in Batches(small, training.first(size), size):
            Settling(small, resolve_loss(self.settings.loss, batch.targets)).see(batch)

    def _mark(self) -> Mark:
        told, state = self.certificate, self.state
        if self.settings.stops:  # a round may train this very network before it cuts, or where nothing is to be cut
            state = replace(state, small=state.small.copy())
        return Mark(state, dict(told.quality), copy.deepcopy(told.measured))

    def _take_back(self, before: Mark, why: str) -> None:
        """Go back to where the last round began; nothing that was told of it stays."""
        certificate = self.certificate
        certificate.rounds.pop()
        certificate.quality, certificate.measured = before.quality, before.measured
        certificate.feasible, certificate.binding = False, why
        self._go_to(before.state)
        self.tuner.optimizer = None
        if not certificate.rounds:
            self._tell_dense()

    def _leave(self) -> None:
        """Go back to the dense network, whose weights nothing has touched: what was made of it is of no use."""
        self.certificate.rounds.clear()
        self.certificate.measured.pop("training_threads", None)
        self._go_to(self._start())
        self.tuner.optimizer = None
        self._tell_dense()

    def _tell_dense(self) -> None:
        quality = self.certificate.quality
        if quality:
            quality.pop("after", None)
            quality["right_after"] = quality["before"]

    # what is told ----------------------------------------------------------------------------------------------------

    def _judge(self) -> Metric | None:
        held = self.data.held_out
        return None if held is None else resolve_metric(self.settings.evaluate, held.targets)

    def _evaluate(self, judge: Metric, program: Program) -> float:
        self.progress(f"measuring {judge.name}", None)
        return evaluate(program, self.data.held_out, judge)

    def _reach_latency(self) -> None:
        """Tell the latency of the finished network; one that is no faster gives way to the dense one."""
        certificate, settings = self.certificate, self.settings
        certificate.measured["device"] = {**self.device.fingerprint.to_json(), "step": self.device.step}
        found = self._latency()
        wanted = self.ratios["latency"] < 1 and settings.plan is None and not self._demands_more()
        if wanted and found["ratio"] >= 1 and self._changed():
            why = f"{NO_FASTER}: the smaller one takes {found['ratio']:.3f} of dense"
            certificate.binding = why if certificate.feasible else f"{certificate.binding}; {why}"
            certificate.feasible = False
            self._leave()
            found = self._latency()
        if where := strays(found.get("provider", ""), found.get("kernels_on", {})):
            certificate.notes.append(f"not all of the network ran on {found['provider']}: {where}")
        if settings.measures and settings.precision == "int8":
            certificate.notes.append(
                "the latency is that of int8 copies of both networks (ranges from drawn inputs); the ONNX file is "
                "float32: quantise it"
            )

    def _changed(self) -> bool:
        return self.state.shallow is not self.whole or bool(self.state.removed)

    def _latency(self) -> dict[str, Any]:
        """Measure the network anew, or predict for another device, and tell it."""
        certificate, milliseconds = self.certificate, self.selector.milliseconds
        if self.settings.target is not None:
            dense, small = milliseconds(self.dense), milliseconds(self.model, self.state.removed)
            tell_prediction(certificate, self.settings.target, dense, small, self.selector.latency.name)
            return certificate.predicted
        onnx = prove(self.state.small, certificate)
        self.progress("measuring anew", None)
        found = self.stopwatch.anew(self.state.small, onnx)
        if not self._changed():  # as fast as itself, whatever the noise says
            found |= {"pruned_ms": found["dense_ms"], "ratio": 1.0, "interval": [1.0, 1.0]}
        certificate.measured["latency"] = found
        return found


def _criterion(settings: Settings) -> str:
    """Name what says which units go."""
    if settings.plan is not None:
        return "plan"
    return settings.criterion if isinstance(settings.criterion, str) else resolve(settings.criterion).name
