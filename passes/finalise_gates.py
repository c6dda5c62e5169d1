"""Pass ``finalise-gates``: hard concrete gates become part of the weights, and units whose gate is zero go."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from kfe_fx.errors import VerificationFailed
from kfe_fx.gate_folding import drop_ones, fold
from kfe_fx.hard_concrete import Learned
from kfe_fx.labels.analysis import Analysis, analyze
from kfe_fx.labels.units import Unit
from kfe_fx.passes.base import Pass, PassResult
from kfe_fx.passes.reestimate_statistics import ReestimateStatistics
from kfe_fx.passes.shrink import Shrink
from kfe_fx.passes.zero_units import Removable, removable
from kfe_fx.plan import Plan
from kfe_fx.program import Program

_Key = frozenset[tuple[str, int, tuple[int, ...]]]


@dataclass(frozen=True)
class FinaliseGates(Pass):
    """Make a plain network of one with hard concrete gates (Louizos et al. 2018, equation 13): theta* = theta zhat.

    The test gates go into the weights that make what they multiply; where these have other readers, or an operation has
    none, a product with a constant stays. Units with zhat = 0 are removed. In evaluation the network computes what it
    did, except where ``inexact`` or ``data`` says otherwise, and for the one unit that every dim keeps.

    A unit with zhat = 0 stays where its removal would change what is computed: a norm takes a statistic over it, or an
    activation makes something else of zero and no bias can take that (``stays`` among the facts says which).

    Attributes:
        remove: remove units with zhat = 0; else they are zero and stay.
        inexact: remove those too whose removal changes what is computed. Constants that they send go into biases as
            their mean over positions; the rest is for fine-tuning.
        data: examples to measure the running statistics of batch norms over again, in any form: those of training were
            taken with gates that were drawn. None leaves them.
        batch_size: examples at a time; more give better statistics.
    """

    name: ClassVar[str] = "finalise-gates"
    keeps: ClassVar[str] = "trained"
    remove: bool = True
    inexact: bool = False
    data: Any = field(default=None, repr=False)
    batch_size: int = 64

    def run(self, program: Program) -> PassResult:
        """Return the network without gates; facts tell where they went and by group how many units did.

        Raises:
            UsageError: there are no hard concrete gates, those of another network, or data without any batch.
        """
        gates = Learned.of(program)
        values = gates.values().detach().double().tolist()
        at_test = gates.at_test()
        wanted = {unit: value for unit, value in zip(gates.units(), values, strict=True) if at_test[unit] == 0}
        twin = program.copy()
        sites = fold(twin)
        found = Removable(frozenset(), {}, {})
        analysis = analyze(twin, heads=gates.heads)
        numbers = _numbers(gates.analysis, analysis)
        if self.remove and wanted:
            zero = {numbers[unit]: value for unit, value in wanted.items()}
            found = removable(analysis, zero, inexact=self.inexact)
            with torch.no_grad():
                for name, shift in found.shifts.items():
                    held = twin.tensor(name)
                    held += shift.to(held.device, held.dtype)
            plan = Plan.of_units(analysis, found.gone, heads=gates.heads)
            twin = Shrink(plan).run(twin).program
        drop_ones(twin)
        facts: dict[str, Any] = {"keeps": "trained" if self.inexact and found.gone else "exact"}
        facts |= {"units": len(at_test), "zero": len(wanted), "removed": len(found.gone), **sites}
        facts |= {"groups": _groups(gates, at_test, numbers, found), "stays": _stays(gates, numbers, found)}
        if self.data is not None:
            result = ReestimateStatistics(self.data, self.batch_size).run(twin)
            twin = result.program
            facts |= {"statistics": result.facts, "keeps": "trained"}
        twin.lineage = (*program.lineage, self.name)
        return PassResult(twin, True, facts)


def _numbers(before: Analysis, after: Analysis) -> dict[int, int]:
    """Map the units of the network without gates to those of the folded one, which may have more tensors."""
    known = {name for unit in before.units for name in unit.slices}
    named = {_key(unit, known): unit.id for unit in after.units}
    found = {unit.id: number for unit in before.units if (number := named.get(_key(unit, known))) is not None}
    if len(found) < len(before.units):
        raise VerificationFailed("finalise-gates changed what can be removed; please report this network")
    return found


def _key(unit: Unit, known: set[str]) -> _Key:
    slices = ((name, dim, indices) for name, dims in unit.slices.items() for dim, indices in dims.items())
    return frozenset(one for one in slices if one[0] in known)


def _groups(
    gates: Learned, at_test: dict[int, float], numbers: dict[int, int], found: Removable
) -> list[dict[str, Any]]:
    told = []
    for number in gates.log_alpha:
        group = gates.analysis.groups[number]
        zero = [unit for unit in group.units if at_test[unit] == 0]
        removed = sum(numbers[unit] in found.gone for unit in zero)
        told.append({"name": group.name, "units": len(group.units), "zero": len(zero), "removed": removed})
    return told


def _stays(gates: Learned, numbers: dict[int, int], found: Removable) -> list[dict[str, Any]]:
    """Tell by group and reason how many units are zero and stay."""
    counts: dict[tuple[str, str], int] = {}
    for unit in gates.units():
        why = found.stays.get(numbers[unit])
        if why is not None:
            key = gates.analysis.groups[gates.analysis.units[unit].group].name, why
            counts[key] = counts.get(key, 0) + 1
    return [{"group": group, "units": count, "why": why} for (group, why), count in counts.items()]
