"""Pass ``strip-gates``: take the gates out; the graph is the one before, node for node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kfe_fx.gates import strip
from kfe_fx.hard_concrete import learned, remove_learned
from kfe_fx.passes.base import Pass, PassResult
from kfe_fx.program import Program


@dataclass(frozen=True)
class StripGates(Pass):
    """Undo ``insert-gates``: the hash of the graphs is the one before it.

    Hard concrete gates go with their parameters; what they were trained to is lost. ``finalise-gates`` keeps it.
    """

    name: ClassVar[str] = "strip-gates"
    keeps: ClassVar[str] = "exact"

    def run(self, program: Program) -> PassResult:
        """Return the Program without gates."""
        twin = program.copy()
        if learned(program):
            count = remove_learned(twin)
            twin.lineage = (*program.lineage, self.name)
            return PassResult(twin, True, {"gates": count, "keeps": "trained"})
        found = {mode: strip(graph, twin.signature.input_names) for mode, graph in twin.graphs.items()}
        if not any(found.values()):
            return PassResult(program, False, {"gates": 0})
        twin.module().recompile()
        twin.lineage = (*program.lineage, self.name)
        return PassResult(twin, True, {"gates": sum(found.values())})
