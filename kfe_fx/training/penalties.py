"""Penalties beside a loss: functions of the parameters alone, whose gradients are added once in every step.

    EWC:  lambda / 2 (theta - theta*)^T F (theta - theta*),   gradient  lambda F (theta - theta*)

with F a diagonal, a K-FAC or an EKFAC (its S* in the eigenbases) of what the network was trained on before
(Kirkpatrick et al. 2017; Liu et al. 2018), and theta* the parameters that it had then. ``kfe_fx.curvature.ewc`` has the
same as a function to differentiate, and sums over several tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kfe_fx.curvature.ewc import EWC
from kfe_fx.curvature.operators import DIAGONAL, EKFAC, KFAC, Curvature
from kfe_fx.curvature.store import Store
from kfe_fx.errors import UsageError
from kfe_fx.program import Program
from kfe_fx.training.loop import Penalty

Anchor = Mapping[str, Tensor]


class Quadratic:
    """A quadratic around the parameters theta*; its gradient needs one product with F, and no graph.

    ``anchor`` holds theta*; parameters that F is not of are free, and named by ``curvature.missing``. Those that ask
    for no gradient get none.

    Example:
        store = fit(program, old_data, statistics="ekfac", source="exact")
        finetune(program, new_data, penalties=Quadratic(program, store.operator(program, "ekfac"), 100.0))
    """

    def __init__(self, program: Program, curvature: Curvature, strength: float, anchor: Anchor | None = None) -> None:
        """Copy theta*.

        Args:
            program: the network; its live module is what is penalised.
            curvature: F, of the same network.
            strength: lambda, 0 or more; it goes with a loss that is a mean over examples, as F is one.
            anchor: theta* by name, at least of ``curvature.parameters``; the present parameters if not given.

        Raises:
            UsageError: the strength is negative or not finite, or a parameter is missing or of another shape.
        """
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength < math.inf:
            raise UsageError(f"the strength of a penalty is {strength!r}; give a finite number, 0 or more")
        self.curvature, self.strength = curvature, float(strength)
        held = dict(program.module().named_parameters())
        given: Anchor = held if anchor is None else anchor
        self._held: dict[str, nn.Parameter] = {}
        self.anchor: dict[str, Tensor] = {}
        for name in curvature.parameters:
            if name not in held or name not in given:
                where = "the network" if name not in held else "what it is to stay near to (the anchor)"
                raise UsageError(f"{where} has no parameter {name!r}, and the curvature is of it")
            if given[name].shape != held[name].shape:
                raise UsageError(
                    f"{name} is {list(given[name].shape)} in the anchor, and {list(held[name].shape)} in the network"
                )
            self._held[name] = held[name]
            self.anchor[name] = given[name].detach().to(held[name]).clone()

    def _moved(self) -> dict[str, Tensor]:
        return {name: value - self.anchor[name] for name, value in self._held.items()}

    def __call__(self) -> Tensor:
        """Return the penalty, a scalar that can be differentiated."""
        return self.strength / 2 * self.curvature.quadratic(self._moved())

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Add ``strength F (theta - theta*)`` to ``p.grad`` of every parameter in it."""
        for name, value in self.curvature.matvec(self._moved()).items():
            _add(self._held[name], value * self.strength)

    def facts(self) -> dict[str, Any]:
        """Return for the report: lambda, which curvature, its present value, and what it leaves free."""
        with torch.no_grad():
            value = float(self())
        missing = [{"parameter": item.parameter, "why": item.reason} for item in self.curvature.missing]
        return {"lambda": self.strength, "kind": self.curvature.kind, "penalty": value, "missing": missing}


class Differentiated:
    """A penalty of one's own, a function without arguments that returns a scalar; autograd takes its gradient.

    Example:
        weight = program.tensor("0.weight")
        finetune(program, data, penalties=Differentiated(program, lambda: 1e-4 * weight.abs().sum()))
    """

    def __init__(self, program: Program, function: Callable[[], Tensor]) -> None:
        """Hold the function and the parameters that it may be of."""
        self._function = function
        self._parameters = [value for value in program.module().parameters() if value.requires_grad]

    def __call__(self) -> Tensor:
        """Return the penalty.

        Raises:
            UsageError: it is no scalar.
        """
        value = self._function()
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise UsageError("a penalty is a function that returns one number as a tensor")
        return value.sum()

    def facts(self) -> dict[str, Any]:
        """Return its present value, for the report."""
        with torch.no_grad():
            return {"penalty": float(self())}

    @torch.enable_grad()
    def add_gradients(self) -> None:
        """Add its gradient to ``p.grad`` of every parameter in it."""
        value = self()
        if not value.requires_grad:
            return
        grads = torch.autograd.grad(value, self._parameters, allow_unused=True)
        for parameter, grad in zip(self._parameters, grads, strict=True):
            if grad is not None:
                _add(parameter, grad)


def ewc_penalty(program: Program, ewc: Any) -> Quadratic | Differentiated:
    """Make the penalty that ``finetune(ewc=...)`` says.

    Args:
        program: the network that is about to be trained.
        ewc: (Store or Curvature, strength), (either, strength, theta* by name), or an ``EWC``, whose anchor and earlier
            tasks stay. Of a Store the finest curvature is taken that it holds: "ekfac", else "kfac", else "diagonal".

    Raises:
        UsageError: it says something else, or the statistics are of another network, or, where no theta* is given,
            older than its weights.
    """
    if isinstance(ewc, EWC):
        held = dict(program.module().named_parameters())
        wrong = [name for name, start in ewc.anchor.items() if name not in held or held[name].shape != start.shape]
        if wrong:
            raise UsageError(
                f"the penalty is of a parameter {wrong[0]!r} that this network does not have in that shape"
            )
        return Differentiated(program, lambda: ewc(program.module()))
    if not isinstance(ewc, tuple | list) or len(ewc) not in (2, 3) or not isinstance(ewc[0], Store | Curvature):
        raise UsageError("ewc is (curvature, strength), (curvature, strength, parameters to stay near to), or an EWC")
    curvature, strength, anchor = ewc[0], ewc[1], ewc[2] if len(ewc) == 3 else None
    if isinstance(curvature, Store):
        curvature.check(program, weights=anchor is None)
        curvature = curvature.operator(program, finest(curvature))
    return Quadratic(program, curvature, strength, anchor)


def finest(store: Store) -> str:
    """Choose the kind of curvature that a store has most of, the finer one first."""
    blocks = [block for block in store.blocks.values() if block.kind == "kronecker"]
    if not blocks or any(block.S is not None for block in blocks):
        return EKFAC if blocks else DIAGONAL
    return KFAC if any(block.basis for block in blocks) else DIAGONAL


def as_penalties(penalties: Any) -> list[Penalty]:
    """Return one penalty, several or none as a list.

    Raises:
        UsageError: one of them cannot add gradients.
    """
    if penalties is None:
        return []
    found = list(penalties) if isinstance(penalties, tuple | list) else [penalties]
    for penalty in found:
        if not callable(getattr(penalty, "add_gradients", None)):
            raise UsageError(
                f"a penalty is a {type(penalty).__name__}: give an object with add_gradients(), as GroupLasso or "
                "Quadratic, or wrap a function in Differentiated"
            )
    return found


def _add(parameter: nn.Parameter, grad: Tensor) -> None:
    if not parameter.requires_grad:
        return
    if parameter.grad is None:
        parameter.grad = grad.clone()
    else:
        parameter.grad = parameter.grad.to_dense() + grad if parameter.grad.is_sparse else parameter.grad.add_(grad)
