"""The rounds of a pruning run: state of one run, one method a step."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from kfe_fx.certificate import Certificate
from kfe_fx.cost.count import CostModel
from kfe_fx.cost.latency import RooflineLatency
from kfe_fx.cost.loop import close_loop
from kfe_fx.cost.schedule import exponential_schedule
from kfe_fx.cost.solver import Selection, select_budget, select_widths
from kfe_fx.criteria.base import ScoreContext, score
from kfe_fx.embedding import embed, lift_scores, relative
from kfe_fx.errors import PlanError, UnsupportedModel
from kfe_fx.labels.analysis import Analysis, analyze
from kfe_fx.labels.states import permit, resized
from kfe_fx.passes.fold_means import FoldMeans, measure_means
from kfe_fx.passes.proof import check_masked, prove
from kfe_fx.passes.reestimate_statistics import ReestimateStatistics
from kfe_fx.passes.shrink import Shrink
from kfe_fx.plan import Plan
from kfe_fx.program import Program
from kfe_fx.runtime.block import probe_block
from kfe_fx.runtime.inputs import feeds
from kfe_fx.runtime.measure import compare
from kfe_fx.runtime.onnx_file import onnx_bytes
from kfe_fx.runtime.session import make_session
from kfe_fx.runtime.template import Template
from kfe_fx.training.finetune import default_epochs, finetune
from kfe_fx.training.metrics import Metric, evaluate, resolve_metric
from kfe_fx.training.optimizer_state import make_optimizer, slice_optimizer
from kfe_fx.training.prune_data import PruneData

ROUNDS = 4  # with fine-tuning in between; without it one round loses nothing
BETWEEN = 0.4  # share of the fine-tuning that goes between the rounds
TOLERANCE = 0.05  # of a measured budget
FINAL_SECONDS = 3.0
TURN_SECONDS = 1.0
STATISTICS_EXAMPLES = 2048


@dataclass(frozen=True)
class Settings:
    """What the user asked for; see ``prune``."""

    budget: float
    metric: str
    criterion: Any
    loss: Any
    evaluate: Any
    epochs: int | None
    lr: float | None
    batch_size: int
    optimizer: str
    rounds: int | None
    multiple_of: int | None
    threads: int
    batch: int
    keep: tuple[str, ...]
    heads: str
    seed: int
    resize_state: bool = False


class Rounds:
    """One run: every decision is taken on the units of the original; the weights live in the small network."""

    def __init__(
        self,
        program: Program,
        settings: Settings,
        data: PruneData,
        progress: Callable[[str, float | None], None] | None,
    ) -> None:
        """Analyse the network.

        Raises:
            UnsupportedModel: nothing can be removed.
        """
        self.original = permit(program, allowed=settings.resize_state)
        program = self.original
        self.settings = settings
        self.data = data
        self.progress = progress or (lambda stage, done=None: None)
        self.progress("reading the graph", None)
        self.analysis = analyze(program, heads=settings.heads)
        if not self.analysis.units and settings.budget < 1:
            raise UnsupportedModel(
                "nothing can be removed from this network; `kfe-fx inspect` says what is frozen and why"
            )
        self.model = CostModel(program, self.analysis)
        self.small = program.copy().eval()
        self.removed: frozenset[int] = frozenset()
        self.plan = Plan(heads=settings.heads)
        self.optimizer: torch.optim.Optimizer | None = None
        self.certificate = Certificate(settings.budget, settings.metric, str(settings.criterion), settings.seed)
        self.scoring: dict[str, Any] = {}

    def run(self) -> tuple[Program, Plan, Certificate]:
        """Prune to the budget and return the small Program, the plan and the certificate."""
        self._describe()
        judge = self._judge()
        if judge is not None:
            self.certificate.quality = {"metric": judge.name, "before": self._evaluate(judge, self.original)}
        if self.settings.budget < 1:
            self._rounds(judge)
        self._count()
        if self.settings.metric == "latency" and self.settings.budget < 1:
            self._measure_anew(prove(self.small, self.certificate))
        return permit(self.small, allowed=False), self.plan, self.certificate

    # the rounds ------------------------------------------------------------------------------------------------------

    def _rounds(self, judge: Metric | None) -> None:
        targets = self._targets()
        for number, target in enumerate(targets):
            last = number == len(targets) - 1
            self.progress(f"round {number + 1} of {len(targets)}: scoring", number / len(targets))
            scores, small_analysis = self._scores()
            if last and self.settings.metric == "latency":
                self._closed_loop(scores)
            selection = (
                self._last_selection if last and self.settings.metric == "latency" else self._select(scores, target)
            )
            self._surgery(selection, scores, small_analysis, target)
            if last and judge is not None:
                self.certificate.quality["right_after"] = self._evaluate(judge, self.small)
            self.progress(f"round {number + 1} of {len(targets)}: fine-tuning", (number + 0.5) / len(targets))
            self._finetune(len(targets), last=last)
        if judge is not None and self._trains():
            self.certificate.quality["after"] = self._evaluate(judge, self.small)

    def _targets(self) -> list[float]:
        settings = self.settings
        if settings.metric == "widths":
            return [settings.budget]
        count = settings.rounds or (ROUNDS if self._trains() else 1)
        return exponential_schedule(settings.budget, count)

    def _trains(self) -> bool:
        return self.data.training is not None and self.settings.epochs != 0

    def _scores(self) -> tuple[np.ndarray, Analysis]:
        """Score the units of the small network and hand the scores to the units of the original."""
        settings = self.settings
        analysis = (
            analyze(self.small, heads=settings.heads) if self.removed else replace(self.analysis, program=self.small)
        )
        context = ScoreContext.of(
            self.small,
            analysis,
            self.data.calibration,
            settings.loss,
            batch_size=settings.batch_size,
            seed=settings.seed,
        )
        scores = score(settings.criterion, context)
        self.scoring = dict(context.facts)
        if self.removed:
            scores = lift_scores(self.analysis, analysis, scores, self.plan.kept)
        return scores, analysis

    def _select(self, scores: np.ndarray, target: float) -> Selection:
        settings = self.settings
        if settings.metric == "widths":
            selection = select_widths(self.analysis, scores, target)
        else:
            selection = self._solve(scores, target)
        return replace(selection, removed=selection.removed | self.removed)

    def _solve(self, scores: np.ndarray, target: float) -> Selection:
        """Select in multiples of the block; where layers are too narrow for it, and nobody asked for it, of less."""
        settings, block = self.settings, self._block()
        while True:
            selection = select_budget(
                self.model, scores, self._cost(), target, multiple_of=block, keep=settings.keep, gone=self.removed
            )
            if selection.feasible or block == 1 or settings.multiple_of is not None:
                return selection
            block //= 2

    def _cost(self) -> Any:
        model, metric = self.model, self.settings.metric
        if metric == "latency":
            return RooflineLatency(model)
        return {"macs": model.mac_cost, "params": model.parameter_cost, "memory": model.memory_cost}[metric]

    def _block(self) -> int:
        if self.settings.multiple_of is not None:
            return self.settings.multiple_of
        if self.settings.metric != "latency":
            return 1
        block = probe_block(self.settings.threads)
        self.certificate.measured["block"] = block.to_json()
        return block.step

    def _closed_loop(self, scores: np.ndarray) -> None:
        settings = self.settings
        self.progress("measuring the dense network", None)
        template = Template(self.original)  # one export; each candidate is sliced into it
        dense = make_session(template.model(self.original), threads=settings.threads)
        example = feeds(self.original, settings.batch, settings.seed)

        def build_and_measure(selection: Selection) -> float:
            self.progress("measuring a candidate", None)
            plan = Plan.of_units(self.analysis, selection.removed, heads=settings.heads)
            candidate = Shrink(plan).run(self.original).program
            session = make_session(template.model(candidate), threads=settings.threads)
            each = [example, feeds(candidate, settings.batch, settings.seed)]  # states may have lost units
            found = compare([dense, session], each, seconds=TURN_SECONDS, precision=0.005, seed=settings.seed)
            return found.ratios[1].value

        result = close_loop(
            lambda target: self._select(scores, target), build_and_measure, settings.budget, tolerance=TOLERANCE
        )
        self._last_selection = result.selection
        self.certificate.feasible = result.feasible
        self.certificate.binding = "" if result.within else result.reason.removeprefix("the budget is out of reach: ")
        self.certificate.measured["turns"] = [
            {"asked": turn.asked, "predicted": turn.selection.predicted, "measured": turn.measured}
            for turn in result.turns
        ]

    # one surgery -----------------------------------------------------------------------------------------------------

    def _surgery(self, selection: Selection, scores: np.ndarray, small_analysis: Analysis, target: float) -> None:
        """Remove, prove on this round's weights, then repair: fold means, re-estimate statistics."""
        settings = self.settings
        full = embed(self.original, self.small, self.plan.kept) if self.removed else self.small
        plan = Plan.of_units(self.analysis, selection.removed, scores, settings.heads)
        shrunk = Shrink(plan).run(full).program
        error = check_masked(replace(self.analysis, program=full), shrunk, selection.removed, settings.seed)
        step = Plan(relative(self.plan.kept, plan.kept), heads=settings.heads)
        before = self.small
        folded = self._repair(shrunk, step, small_analysis)
        if self.optimizer is not None:
            self.optimizer = slice_optimizer(self.optimizer, before, self.small, step)
        self.certificate.rounds.append(
            {
                "target": target,
                "predicted": selection.predicted,
                "removed": len(selection.removed - self.removed),
                "masked_error": error,
                "predicted_loss": selection.loss,
                **folded,
            }
        )
        if not selection.feasible and settings.metric != "latency":
            self.certificate.feasible = False
            self.certificate.binding = selection.binding
        self.removed, self.plan = selection.removed, plan

    def _repair(self, shrunk: Program, step: Plan, small_analysis: Analysis) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        sample = self.data.calibration
        if sample is not None:
            try:
                means = measure_means(small_analysis, sample, batch_size=self.settings.batch_size)
                result = FoldMeans(small_analysis, step, means).run(shrunk)
                shrunk = result.program
                facts = {"folded": result.facts["folded"], "not_folded": result.facts["skipped_at"]}
            except PlanError:  # this round cuts across units of the smaller network: leave its biases alone
                facts = {"folded": 0, "not_folded": ["this round"]}
            source = self.data.training if self.data.training is not None else sample
            shrunk = (
                ReestimateStatistics(source.first(STATISTICS_EXAMPLES), self.settings.batch_size).run(shrunk).program
            )
        self.small = shrunk
        return facts

    def _finetune(self, rounds: int, *, last: bool) -> None:
        training, settings = self.data.training, self.settings
        if training is None or settings.epochs == 0:
            return
        epochs = settings.epochs if settings.epochs is not None else default_epochs(len(training))
        per_epoch = max(1, len(training) // settings.batch_size)
        share = 1.0 if rounds == 1 else (1 - BETWEEN) if last else BETWEEN / (rounds - 1)
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.small, settings.optimizer, settings.lr)
        facts = finetune(
            self.small,
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

    def _describe(self) -> None:
        import onnx
        import onnxruntime

        certificate = self.certificate
        certificate.data = {"note": self.data.note}
        certificate.statistics = list(self.analysis.statistics)
        certificate.notes = list(self.original.notes)
        certificate.versions = {
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            "python": platform.python_version(),
        }
        self.certificate.before = self._counts(frozenset())

    def _counts(self, removed: frozenset[int]) -> dict[str, Any]:
        return {
            "parameters": self.model.parameters(removed),
            "macs": self.model.macs(removed),
            "peak_memory": self.model.memory(removed),
            "units": len(self.analysis.units) - len(removed),
        }

    def _count(self) -> None:
        certificate = self.certificate
        certificate.after = self._counts(self.removed)
        if self.settings.resize_state:
            certificate.measured["states"] = states = resized(self.small)
            certificate.notes += [
                f"the state that is {name} is {len(held['kept'])} wide, {held['width']} before"
                for name, held in states.items()
            ]
        certificate.data |= self.scoring
        if self.scoring and self.data.calibration is None:
            certificate.notes.append("data-free: scored on drawn inputs; give --data for better choices")
        if self.settings.metric in ("macs", "params", "memory"):
            name = {"macs": "macs", "params": "parameters", "memory": "peak_memory"}[self.settings.metric]
            certificate.reached = certificate.after[name] / max(1, certificate.before[name])
        elif self.settings.metric == "widths":
            certificate.reached = certificate.after["units"] / max(1, certificate.before["units"])
        if not certificate.feasible:
            certificate.notes.append(f"the budget is out of reach ({certificate.binding}); this is the nearest point")

    def _measure_anew(self, onnx: bytes) -> None:
        settings = self.settings
        self.progress("measuring anew", None)
        sessions = [make_session(model, threads=settings.threads) for model in (onnx_bytes(self.original), onnx)]
        found = compare(
            sessions,
            [feeds(program, settings.batch, settings.seed) for program in (self.original, self.small)],
            seconds=FINAL_SECONDS,
            seed=settings.seed + 1,
        )
        ratio = found.ratios[1]
        self.certificate.reached = ratio.value
        self.certificate.measured["latency"] = {
            "dense_ms": found.latencies[0].p50,
            "pruned_ms": found.latencies[1].p50,
            "ratio": ratio.value,
            "interval": [ratio.low, ratio.high],
            "clock": found.clock,
            "threads": settings.threads,
            "batch": settings.batch,
        }
