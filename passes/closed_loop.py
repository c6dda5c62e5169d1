"""The closed loop of one pruning run: select, slice, measure beside the dense network, correct what is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kfe_fx.certificate import Certificate
from kfe_fx.cost.loop import close_loop
from kfe_fx.cost.solver import Selection
from kfe_fx.passes.selecting import Selector
from kfe_fx.passes.shrink import Shrink
from kfe_fx.passes.stopwatch import Stopwatch
from kfe_fx.plan import Plan

TOLERANCE, NEAR = 0.05, 0.02  # of a measured budget, and of dense: the smaller counts
NO_FASTER = "nothing that can be removed makes the network faster"

Ratios = dict[str, float]


@dataclass(frozen=True)
class ClosedLoop:
    """Finds the selection that measures what was asked for.

    Attributes:
        select: (limits as fractions of dense, branches to drop) -> selection, by the predicted latency.
        selector: of the present base.
        stopwatch: of the run.
        certificate: where the turns are told.
        plan: what was done to the network before.
        alone: whether nothing but latency demands that something goes.
        progress: called with what is being done.
    """

    select: Callable[[Ratios, tuple[str, ...]], Selection]
    selector: Selector
    stopwatch: Stopwatch
    certificate: Certificate
    plan: Plan
    alone: bool
    progress: Callable[[str, float | None], None]

    def run(self, ratios: Ratios, drop: tuple[str, ...]) -> Selection | None:
        """Measure what is selected and correct what is asked of the predictor; None where no removal is of use."""
        wanted = ratios["latency"]
        tolerance = min(TOLERANCE, NEAR / wanted)
        result = close_loop(
            lambda target: self.select({**ratios, "latency": target}, drop), self._measure, wanted, tolerance=tolerance
        )
        if self.alone and drop and result.measured < wanted * (1 - tolerance):  # they save more than was asked for
            fewer = self.run(ratios, drop[:-1])
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
        if result.measured < 1:
            return result.selection
        certificate.feasible = False
        certificate.binding = f"{NO_FASTER}: the nearest measured {result.measured:.3f} of dense"
        # a plan that is no faster is none; what other budgets demand goes all the same, and no more
        return None if self.alone else self.select({**ratios, "latency": 1.0}, ())

    def _measure(self, selection: Selection) -> float:
        self.progress("measuring a candidate", None)
        shallow = self.selector.shallow(selection.dropped)
        plan = Plan.of_units(shallow.analysis, shallow.units_of(selection.removed), heads=self.plan.heads)
        candidate = Shrink(plan).run(shallow.program).program
        base = str(self.plan.decomposed), *self.plan.dropped, *selection.dropped
        return self.stopwatch.ratio(candidate, shallow.program, base)
