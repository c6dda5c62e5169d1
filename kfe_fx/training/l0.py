"""L0 regularisation: training that closes hard concrete gates, so that their units can be removed.

    penalty = 1/N sum over gated units u of  P(z_u != 0) (lambda w_u + l2/2 |theta_u|^2)
    P(z_u != 0) = sigmoid(log alpha_u - beta log(-gamma / zeta))

(Louizos, Welling & Kingma 2018, equations 12 and 14) with N the number of examples that are trained on, w_u what the
unit costs, and |theta_u|^2 the squares of all entries of the unit, as group lasso counts them. Weights w are divided by
their mean over the gated units, so that lambda means the same whatever they are measured in; the paper's own lambda,
per parameter, is lambda divided by the mean number of parameters of a unit.

The estimator is known not to close gates of deep networks out of the box: judge by what comes out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kfe_fx.cost.count import CostModel
from kfe_fx.cost.predictors import ROOFLINE, Spec, predictor
from kfe_fx.errors import UsageError
from kfe_fx.hard_concrete import LEAST, MOST, Learned, gate_at_test, insert_learned, learned, nonzero_probability
from kfe_fx.labels.analysis import Analysis
from kfe_fx.program import Program
from kfe_fx.training.group_lasso import EPS, GroupLasso

WEIGHTS = ("params", "time")
# Times the learning rate, for log alpha: 0.03 where AdamW takes 0.001. It has to go from 2.2 to below -2.4, and at 0.01
# runs of some hundred steps ended before any gate was closed.
RATE = 30.0

Weights = str | Callable[[Analysis], Any] | Any


def parameters_of_units(analysis: Analysis) -> np.ndarray:
    """Count the parameters that go with each unit, [units]: those that go with two units count for both.

    Of a tensor with n_d indices along dim d, k_d of them the unit's, these are prod_d n_d - prod_d (n_d - k_d).
    """
    sizes = {name: tuple(value.shape) for name, value in analysis.program.module().named_parameters()}  # tied ones once
    counts = np.zeros(len(analysis.units))
    for unit in analysis.units:
        for name, dims in unit.slices.items():
            if name in sizes:
                left = [size - len(dims.get(dim, ())) for dim, size in enumerate(sizes[name])]
                counts[unit.id] += math.prod(sizes[name]) - math.prod(left)
    return counts


def time_of_units(analysis: Analysis, cost_model: Spec = ROOFLINE) -> np.ndarray:
    """Predict the time that each unit takes, [units], by a cost model (see ``kfe_fx.cost.predictors``).

    What a group of units costs, whole against down to what must stay, is shared among its units by their parameters:
    kernels work in blocks of channels, so that the first unit to go often saves nothing, and the last of a block all.
    """
    cost = predictor(CostModel(analysis.program, analysis), spec=cost_model)
    whole, sizes = cost.predict(()), parameters_of_units(analysis)
    times = np.zeros(len(analysis.units))
    for group in analysis.groups:
        gone = set(group.units)
        for floor in analysis.floors:
            if floor <= gone:
                gone.discard(min(floor))
        units = list(group.units)
        share = sizes[units] / max(sizes[units].sum(), 1.0)
        times[units] = max(0.0, whole - cost.predict(gone)) * share
    return times


def check_strength(strength: float) -> float:
    """Return lambda.

    Raises:
        UsageError: it is negative or not finite.
    """
    if not 0 <= strength < math.inf:
        raise UsageError(f"the strength of l0 is {strength}; give a finite number, 0 or more")
    return float(strength)


class L0:
    """The penalty on the gates of a Program's live module.

    Example:
        program = InsertGates(mode="hard_concrete").run(program).program
        penalty = L0(program, 1.0, examples=len(x))
        (F.cross_entropy(program.train()(x), y) + penalty()).backward()
        optimizer.step()
        penalty.clamp()
    """

    def __init__(
        self, program: Program, strength: float, *, weight: Weights = "params", l2: float = 0.0, examples: int = 1
    ) -> None:
        """Find what each gated unit costs.

        Args:
            program: a network with hard concrete gates; its live module is what is penalised, for as long as it keeps
                its parameters.
            strength: lambda, 0 or more, for the mean unit. It goes with a loss that is a mean over examples.
            weight: what a unit costs: "params" (its parameters), "time" (predicted by the roofline; by another cost
                model: ``functools.partial(time_of_units, cost_model=...)``), one number for each unit of the network
                without gates, or a function of its analysis that gives these.
            l2: precision of the weights that are on, 0 or more; 0 leaves them alone.
            examples: N, how many are trained on.

        Raises:
            UsageError: no gates, or a strength, weight or number of examples that means nothing.
        """
        self.strength = check_strength(strength)
        if not 0 <= l2 < math.inf:
            raise UsageError(f"the l2 of l0 is {l2}; give a finite number, 0 or more")
        if examples < 1:
            raise UsageError(f"l0 divides by the number of examples, which is {examples}; give at least 1")
        self.l2, self.examples = float(l2), examples
        self.gates = Learned.of(program)
        self.weight = weight if isinstance(weight, str) else getattr(weight, "__name__", "given")
        self.parameters = list(self.gates.log_alpha.values())
        first = self.parameters[0]
        units = self.gates.units()
        self._weights = torch.as_tensor(_normalised(weight, self.gates.analysis, units)).to(first)  # [units]
        self._lasso = GroupLasso(self.gates.analysis.program, 0.0, self.gates.analysis) if l2 else None
        place = {unit: number for number, unit in enumerate(units)}
        owned = [] if self._lasso is None else [place.get(unit, -1) for unit in self._lasso.units]
        self._owned = torch.tensor(owned, device=first.device, dtype=torch.int64)  # [units with weights]

    def __call__(self) -> Tensor:
        """Return the penalty, a scalar that can be differentiated."""
        on = nonzero_probability(self.gates.values())
        total = self.strength * (self._weights * on).sum()
        if self._lasso is not None:
            gated = self._owned >= 0
            squares = self._lasso.norms(EPS).square() - EPS
            total = total + self.l2 / 2 * (on[self._owned[gated]] * squares[gated]).sum()
        return total / self.examples

    def add_gradients(self) -> None:
        """Add the penalty's gradient to ``p.grad`` of every parameter in it, as its backward pass would."""
        with torch.enable_grad():
            self().backward()

    @torch.no_grad()
    def clamp(self) -> None:
        """Hold log alpha between log 1e-2 and log 1e2, where its gradient is not lost; to be called after a step."""
        for value in self.parameters:
            value.clamp_(LEAST, MOST)

    def attach(self, optimizer: torch.optim.Optimizer, rate: float = RATE) -> None:
        """Let an optimizer train log alpha at ``rate`` times its learning rate, without weight decay, and clamp it.

        They become a group of their own, the last one; the optimizer must hold them.
        """
        mine = {id(value) for value in self.parameters}
        held = [group for group in optimizer.param_groups if any(id(p) in mine for p in group["params"])]
        if not held:
            raise UsageError("the optimizer does not hold the gates; make it of program.module() after insert-gates")
        options = {key: value for key, value in held[0].items() if key != "params"}
        for group in held:
            group["params"] = [p for p in group["params"] if id(p) not in mine]
        key = "fallback_lr" if "fallback_lr" in options else "lr"  # an optimizer with curvature has none of gates
        options |= {key: options[key] * rate, "weight_decay": 0.0}
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        optimizer.add_param_group({**options, "params": self.parameters})
        optimizer.register_step_post_hook(lambda *_: self.clamp())

    @torch.no_grad()
    def facts(self) -> dict[str, Any]:
        """Return for the report: lambda, the penalty, and in all and by group the units, those on and those closed.

        ``expected`` is the expected number of units that are on in training, ``zero`` how many are off in evaluation.
        """
        groups = []
        for group, value in self.gates.log_alpha.items():
            name = self.gates.analysis.groups[group].name
            zero, expected = int((gate_at_test(value) == 0).sum()), float(nonzero_probability(value).sum())
            groups.append({"name": name, "units": len(value), "zero": zero, "expected": expected})
        total = {key: sum(group[key] for group in groups) for key in ("units", "zero", "expected")}
        told = {"lambda": self.strength, "weight": self.weight, "l2": self.l2, "examples": self.examples}
        return {**told, "penalty": float(self()), **total, "groups": groups}


def _normalised(weight: Weights, analysis: Analysis, units: list[int]) -> np.ndarray:
    """Return the weights of the gated units over their mean, [units], float64."""
    if isinstance(weight, str):
        if weight not in WEIGHTS:
            raise UsageError(f"l0 has no weight {weight!r}; choose {' or '.join(WEIGHTS)}, or give numbers")
        weight = parameters_of_units if weight == "params" else time_of_units
    found = np.asarray(weight(analysis) if callable(weight) else weight, dtype=np.float64)
    if found.shape != (len(analysis.units),):
        raise UsageError(f"l0 takes one weight for each of {len(analysis.units)} units, got {list(found.shape)}")
    chosen = found[units]
    if not (np.isfinite(chosen).all() and (chosen >= 0).all() and chosen.sum() > 0):
        raise UsageError("the weights of l0 are finite, 0 or more, and not all 0")
    return chosen / chosen.mean()


def ensure_gates(program: Program, seed: int) -> bool:
    """Gate a Program without gates, in place; return whether it had none.

    Raises:
        UsageError: it has no unit that a gate can stand at, or gates of another kind.
    """
    if learned(program):
        return False
    if not insert_learned(program, seed=seed)["gates"]:
        raise UsageError(
            "this network has no removable units to gate; leave out l0 (kfe-fx inspect says what cannot be removed, "
            "and why)"
        )
    return True


def notes_of(facts: dict[str, Any] | None) -> list[str]:
    """Return what the user should know of a run with this penalty."""
    if facts is None:
        return []
    notes = ["the network has hard concrete gates now: finalise-gates removes the units that are closed"]
    if facts["inserted"]:
        notes.insert(0, f"{facts['units']:,} units were given hard concrete gates: the network had none")
    empty = [group["name"] for group in facts["groups"] if group["zero"] == group["units"]]
    if empty:
        few = ", ".join(empty[:3]) + (", ..." if len(empty) > 3 else "")
        notes.append(f"every gate of {len(empty)} groups ({few}) is closed: lower l0 to keep some open")
    return notes
