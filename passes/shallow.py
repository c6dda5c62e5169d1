"""The dense network without some of its branches: what is left of plans and units there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kfe_fx.embedding import units_at
from kfe_fx.errors import PlanError
from kfe_fx.labels.analysis import Analysis, analyze
from kfe_fx.labels.branches import Branch
from kfe_fx.passes.drop_branches import DropBranches
from kfe_fx.plan import Plan
from kfe_fx.program import Program


@dataclass(frozen=True)
class Shallow:
    """A Program from which ``branches`` were dropped, and its analysis; ``whole`` is the analysis before that."""

    whole: Analysis
    units: frozenset[int]
    program: Program
    analysis: Analysis
    branches: tuple[Branch, ...] = ()

    @classmethod
    def of(cls, whole: Analysis, branches: Iterable[Branch], heads: str) -> Shallow:
        """Drop ``branches`` from the Program of an analysis.

        Raises:
            PlanError: they cannot go together.
        """
        chosen = list(branches)
        names = tuple(branch.name for branch in chosen)
        # always: what is measured or trained to stand there has its place in the base as well
        program = DropBranches(names, heads=heads, always=True).run(whole.program).program
        units = frozenset[int]().union(*(branch.units for branch in chosen))
        return cls(whole, units, program, analyze(program, heads=heads), tuple(chosen))

    def units_of(self, removed: frozenset[int]) -> frozenset[int]:
        """Tell in units of the shallow network which of it go when ``removed`` goes from the whole one."""
        if not self.units:
            return removed
        kept = Plan.of_units(self.whole, self.units).kept
        # what a branch held together may be several units without it: look at all slices of each
        slices = (self.whole.units[unit].slices for unit in removed - self.units)
        return frozenset(
            found
            for unit in slices
            for name, dims in unit.items()
            for found in units_at(self.analysis, {name: dims}, kept)
        )

    def whole_units(self, removed: frozenset[int]) -> frozenset[int]:
        """Tell in units of the whole network which go when ``removed`` goes from the shallow one, and the branches."""
        if not self.units:
            return removed
        rest = frozenset(range(len(self.whole.units))) - self.units
        found = self.units | {unit for unit in rest if (left := self.units_of(frozenset([unit]))) and left <= removed}
        if self.units_of(found) != removed:
            raise PlanError("the plan cuts units that only came apart with the dropped branches; select anew")
        return found

    def as_whole(self) -> Shallow:
        """Return it as a network of its own, from which nothing was dropped."""
        return self if self.whole is self.analysis else Shallow(self.analysis, frozenset(), self.program, self.analysis)
