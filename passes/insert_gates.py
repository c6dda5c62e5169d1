"""Pass ``insert-gates``: a multiplier per unit, for scores and masks, or drawn at random and trained towards zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kfe_fx.errors import UsageError
from kfe_fx.gates import has_gates, insert
from kfe_fx.hard_concrete import DROP_RATE, insert_learned
from kfe_fx.labels.analysis import analyze
from kfe_fx.passes.base import Pass, PassResult
from kfe_fx.program import Program

MULTIPLIER, HARD_CONCRETE = "multiplier", "hard_concrete"


@dataclass(frozen=True)
class InsertGates(Pass):
    """Multiply each unit by a gate after the normalisation that follows its mint, in both graphs.

    With the mode "multiplier" each group gets a placeholder ``kfe_gate_<group>`` [N, units] after the inputs; left out,
    the network is what it was. ``ProgramModule.run_flat([*inputs, *gates])`` gives them.

    With the mode "hard_concrete" each group gets a parameter ``kfe_gates.<group>.log_alpha`` [units]; gates are drawn
    of it for each mini-batch in training, and are its test gates in evaluation (see ``kfe_fx.hard_concrete``): it is
    another function until ``finalise-gates`` makes a plain network of it.

    Attributes:
        heads: that of the analysis.
        mode: "multiplier" or "hard_concrete".
        drop_rate: the share of hard concrete gates to be off at the start, above 0 and below 1.
        seed: of their log alpha.
    """

    name: ClassVar[str] = "insert-gates"
    keeps: ClassVar[str] = "exact"
    heads: str = "auto"
    mode: str = MULTIPLIER
    drop_rate: float = DROP_RATE
    seed: int = 0

    def run(self, program: Program) -> PassResult:
        """Return the gated Program; facts name sites that a graph does not have, or groups without gates.

        Raises:
            UsageError: there is no such mode, there are gates already, or the drop rate means nothing.
        """
        if self.mode not in (MULTIPLIER, HARD_CONCRETE):
            raise UsageError(f"{self.name}: there is no mode {self.mode!r}; choose {MULTIPLIER} or {HARD_CONCRETE}")
        twin = program.copy()
        if self.mode == HARD_CONCRETE:
            facts = insert_learned(twin, heads=self.heads, drop_rate=self.drop_rate, seed=self.seed)
            if not facts["gates"]:
                return PassResult(program, False, facts)
            twin.lineage = (*program.lineage, self.name)
            return PassResult(twin, True, {**facts, "keeps": "trained"})
        if has_gates(program):
            raise UsageError(f"{self.name}: this network has gates already; strip-gates takes them out")
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
