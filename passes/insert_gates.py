"""Pass ``insert-gates``: a multiplier per unit, at one, for scores, masks and training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kfe_fx.gates import insert
from kfe_fx.labels.analysis import analyze
from kfe_fx.passes.base import Pass, PassResult
from kfe_fx.program import Program


@dataclass(frozen=True)
class InsertGates(Pass):
    """Multiply each unit by a gate after the normalisation that follows its mint, in both graphs.

    Each group gets a placeholder ``kfe_gate_<group>`` [N, units] after the inputs; left out, the network is what it
    was. ``ProgramModule.run_flat([*inputs, *gates])`` gives them. ``heads`` is that of the analysis.
    """

    name: ClassVar[str] = "insert-gates"
    keeps: ClassVar[str] = "exact"
    heads: str = "auto"

    def run(self, program: Program) -> PassResult:
        """Return the gated Program; facts name sites that a graph does not have."""
        twin = program.copy()
        analysis = analyze(twin, heads=self.heads)
        if not analysis.units:
            return PassResult(program, False, {"gates": 0, "sites": 0, "missing": {}})
        missing = {mode: insert(graph, analysis) for mode, graph in twin.graphs.items()}
        twin.module().recompile()
        twin.lineage = (*program.lineage, self.name)
        facts = {
            "gates": len(analysis.groups),
            "sites": len(analysis.gate_sites),
            "missing": {mode: names for mode, names in missing.items() if names},
        }
        return PassResult(twin, True, facts)
