"""Elastic weight consolidation: stay where earlier tasks were learned, as their curvature weighs it.

    penalty = strength / 2 (theta - theta*)^T F (theta - theta*)

F is the diagonal Fisher at theta* (Kirkpatrick et al. 2017) or EKFAC, which is the same in rotated coordinates (Liu et
al. 2018). Measure it with gradients of the model's own labels (source "exact" or "sampled"): with the labels of a
training set that is fitted the gradients, and with them F, are next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from kfe_fx.curvature.blocks import Block, LeftOut
from kfe_fx.curvature.operators import DIAGONAL, BlockOperator, Operator
from kfe_fx.curvature.store import Store
from kfe_fx.errors import UsageError
from kfe_fx.program import Program


class EWC:
    """A penalty on the parameters of a network for leaving those of an earlier task.

    ``anchor`` holds copies of theta*, ``missing`` names the parameters that the penalty does not hold, and why.

    Example:
        store = fit(program, task_a, statistics="diagonal", source="exact")
        ewc = EWC(store, program, strength=100.0)
        for inputs, targets in task_b:
            optimizer.zero_grad()
            (F.cross_entropy(program(inputs), targets) + ewc()).backward()
            optimizer.step()
    """

    anchor: dict[str, Tensor]
    missing: tuple[LeftOut, ...]

    def __init__(self, store: Store, program: Program, kind: str = DIAGONAL, strength: float = 1.0) -> None:
        """Anchor the present parameters.

        Args:
            store: curvature of the task that was learned, measured at the present parameters.
            program: the network; its live module is what a call penalises.
            kind: "diagonal", "kfac" or "ekfac".
            strength: lambda; it goes with a loss that is a mean over examples, as F is one.

        Raises:
            UsageError: the statistics are of another network, older than the parameters, or hold nothing of this kind;
                or the strength is negative.
        """
        if not strength >= 0:
            raise UsageError(f"the strength of a penalty is {strength}; give a number that is not negative")
        self.program = program
        self.kind = kind
        self.strength = strength
        self._terms = self._take(store)

    def _take(self, store: Store) -> list[tuple[Block, tuple[Operator, ...]]]:
        """Copy the parameters as anchor and return the curvature around it."""
        store.check(self.program, weights=True)
        curvature = store.operator(self.program, self.kind)
        held = dict(self.program.module().named_parameters())
        self.anchor = {name: held[name].detach().clone() for name in curvature.parameters}
        self.missing = curvature.missing
        return [(block, (operator,)) for block, operator in curvature.pairs]

    def __call__(self, module: nn.Module | None = None) -> Tensor:
        """Return the penalty, a scalar that can be differentiated.

        Args:
            module: whose parameters are penalised, by the same names; the Program's live module if not given.

        Raises:
            UsageError: the module lacks a parameter.
        """
        held = dict((self.program.module() if module is None else module).named_parameters())
        absent = [name for name in self.anchor if name not in held]
        if absent:
            raise UsageError(f"this module has no parameter {absent[0]!r}; give the module that the penalty is of")
        moved = {name: held[name] - start for name, start in self.anchor.items()}
        parts = [term.quadratic(block.matrix(moved)) for block, terms in self._terms for term in terms]
        return self.strength / 2 * torch.stack([part.to(parts[0]) for part in parts]).sum()

    def online(self, store: Store, gamma: float = 1.0) -> EWC:
        """Return the penalty after one more task: ``F <- gamma F + F_new`` around the present parameters.

        One diagonal is kept however many the tasks (Schwarz et al. 2018). Second moments in different eigenbases have
        no common diagonal: with "ekfac" each task keeps its own, so that the sum stays exact.

        Args:
            store: curvature of the new task, measured at the present parameters.
            gamma: how much earlier tasks still count, 0 to 1.

        Raises:
            UsageError: gamma is out of range, or the statistics do not fit.
        """
        if not 0 <= gamma <= 1:
            raise UsageError(f"gamma is {gamma}; give a number from 0 (forget) to 1 (keep)")
        made = EWC(store, self.program, self.kind, self.strength)
        earlier = {block.name: terms for block, terms in self._terms if gamma > 0}
        names = {block.name for block, _ in made._terms}
        lost = [name for name in earlier if name not in names]
        if lost:
            raise UsageError(f"the new statistics hold nothing of {lost[0]}, which earlier tasks did; fit them again")
        made._terms = [
            (block, _added(tuple(old.scaled(gamma) for old in earlier.get(block.name, ())), terms[0]))
            for block, terms in made._terms
        ]
        return made


def _added(earlier: tuple[Operator, ...], new: Operator) -> tuple[Operator, ...]:
    """Add operators, into one where they share their eigenbasis."""
    for place, old in enumerate(earlier):
        if not isinstance(old, BlockOperator) or not isinstance(new, BlockOperator):
            continue
        if _same(old.U_G, new.U_G) and _same(old.U_A, new.U_A):
            both = BlockOperator(old.spectrum + new.spectrum, new.U_G, new.U_A)
            return (*earlier[:place], *earlier[place + 1 :], both)
    return (*earlier, new)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def total_penalty(penalties: Iterable[EWC], module: nn.Module | None = None) -> Tensor:
    """Return the sum of the penalties of several tasks, each around its own optimum.

    Args:
        penalties: at least one.
        module: see ``EWC.__call__``.

    Raises:
        UsageError: there are none.

    Example:
        penalties.append(EWC(fit(program, task, statistics="diagonal"), program, strength=100.0))
        loss = F.cross_entropy(program(inputs), targets) + total_penalty(penalties)
    """
    found = [penalty(module) for penalty in penalties]
    if not found:
        raise UsageError("there are no penalties to add; give at least one")
    return torch.stack(found).sum()
