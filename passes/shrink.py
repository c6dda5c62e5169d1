"""Pass ``shrink``: remove the slices of a plan, physically."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from kfe_fx.errors import VerificationFailed
from kfe_fx.labels.analysis import Analysis, analyze
from kfe_fx.labels.relocate import Relocation
from kfe_fx.labels.states import narrow_input, permit, record_removal, resizable
from kfe_fx.passes.base import Pass, PassResult
from kfe_fx.plan import Plan
from kfe_fx.program import Program, named_tensors, put_tensor, tied_names
from kfe_fx.shapes import propagate_all
from kfe_fx.structure import pack


@dataclass(frozen=True)
class Shrink(Pass):
    """Slice every tensor of the plan and relocate the literals of both graphs.

    The result computes what the original computes with the removed units masked to zero, to rounding; the exceptions
    (statistics over removed units) are named by ``Analysis.statistics``.
    """

    name: ClassVar[str] = "shrink"
    keeps: ClassVar[str] = "trained"
    plan: Plan = field(default_factory=Plan)

    def run(self, program: Program) -> PassResult:
        """Return the smaller Program; ``program`` stays as it was.

        Raises:
            PlanError: the plan does not fit this network.
            VerificationFailed: a node of the result has another shape than its labels say.
        """
        if not (self.plan.kept or self.plan.dropped):
            return PassResult(program, False, {"removed": 0})
        twin = _without_branches(program, self.plan)
        twin = permit(twin, allowed=self.plan.resize_state)
        analysis = analyze(twin, heads=self.plan.heads)
        removed = self.plan.units(analysis)
        gone = analysis.table.gone(removed)
        if resizable(twin):
            record_removal(twin, analysis, removed)
        sliced = slice_tensors(twin, analysis, removed)
        moves = {mode: Relocation(analysis.trackers[mode], graph, gone) for mode, graph in twin.graphs.items()}
        for move in moves.values():
            for name, constant in move.run().items():
                put_tensor(twin.module(), name, constant, persistent=False)
        for graph in twin.graphs.values():
            graph.eliminate_dead_code()
            graph.lint()
        twin.module().recompile()
        _narrow_states(twin, program)
        for mode, fakes in shapes_after(twin, analysis.trackers["eval"].sizes).items():
            check_shapes(moves[mode], fakes)
        twin.lineage = (*program.lineage, self.name)
        result = permit(twin, allowed=resizable(program))
        return PassResult(result, True, {"removed": len(removed), "tensors": sliced})


def _without_branches(program: Program, plan: Plan) -> Program:
    if not plan.dropped:
        return program.sharing()
    from kfe_fx.passes.drop_branches import DropBranches  # it slices what is left with this module

    return DropBranches(plan.dropped, heads=plan.heads, always=True).run(program).program


def _narrow_states(program: Program, before: Program) -> None:
    """Cut the example inputs and the calibration sample of a Program whose states lost units ``before`` still has."""
    names = program.signature.input_names
    cut = lambda flat: [narrow_input(program, name, value, before) for name, value in zip(names, flat, strict=True)]
    program.example_inputs = pack(program.signature.inputs, cut(program.flat_examples()))
    if "calibration" in program.extras:
        inputs, targets = program.extras["calibration"]
        program.extras["calibration"] = tuple(cut(inputs)), targets


def shapes_after(program: Program, sizes: dict[str, int]) -> dict[str, dict[Any, Any]]:
    """Propagate shapes through the graphs of a network that was just cut."""
    try:
        return propagate_all(program, sorted(program.graphs), sizes)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        first = str(error).strip().splitlines()[0]
        raise VerificationFailed(f"the shrunk graph does not run ({first}); please report this network") from error


def slice_tensors(program: Program, analysis: Analysis, removed: frozenset[int]) -> int:
    """Replace every tensor by its kept slice, or by a copy; tied ones stay tied. Return how many changed."""
    tensors = named_tensors(program.module())
    lasting = program.state_dict().keys()
    count = 0
    for names in dict.fromkeys(tied_names(program.module()).values()):
        old = tensors[names[0]]
        kept = analysis.kept(names[0], removed) if names[0] in analysis.params else []
        value = old.detach()
        for dim, index in enumerate(kept):
            if index is not None:
                value = value.index_select(dim, torch.from_numpy(index).to(value.device))
        count += value.shape != old.shape
        value = value.clone() if value.shape == old.shape else value
        value = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
        for name in names:
            put_tensor(program.module(), name, value, persistent=name in lasting)
    return count


def check_shapes(move: Relocation, fakes: dict[Any, Any]) -> None:
    """Compare the shape of every node with what the labels say; a difference is a bug and must not get out."""
    for node, fake in fakes.items():
        expected = move.tracker.fakes.get(node)
        if not isinstance(fake, torch.Tensor) or not isinstance(expected, torch.Tensor):
            continue
        if not isinstance(move.tracker.values.get(node), tuple):
            continue
        wanted = tuple(move.size_after(node, dim) for dim in range(expected.dim()))
        if tuple(fake.shape) != wanted:
            where = node.meta.get("source", node.name)
            raise VerificationFailed(
                f"{where}: {node.target} gives {tuple(fake.shape)} after the removal, its labels say {wanted}; "
                "please report this network"
            )
