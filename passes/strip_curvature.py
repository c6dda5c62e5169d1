"""Pass ``strip-curvature``: take the taps out; the graph is the one before, node for node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kfe_fx import taps
from kfe_fx.passes.base import Pass, PassResult
from kfe_fx.program import Program


@dataclass(frozen=True)
class StripCurvature(Pass):
    """Undo ``capture-curvature``: the hash of the graphs is the one before it."""

    name: ClassVar[str] = "strip-curvature"
    keeps: ClassVar[str] = "exact"

    def run(self, program: Program) -> PassResult:
        """Return the Program without taps."""
        if not any(taps.tapped(graph) for graph in program.graphs.values()):
            return PassResult(program, False, {"taps": 0})
        twin = program.copy()
        found = sum(taps.strip(graph) for graph in twin.graphs.values())
        twin.module().recompile()
        twin.lineage = (*program.lineage, self.name)
        return PassResult(twin, True, {"taps": found})
