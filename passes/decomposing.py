"""Which layers of a network become narrow products in their eigenbases, before its units are removed.

Beside removing channels and leaving a layer alone this is the third thing that can be done to it. With the price lambda
that the removal of channels has at the budget (loss per millisecond), a layer takes the ranks with the largest

    lambda * saved_ms - loss  > 0

(EigenDamage, Wang et al. 2019, with a price of time). What channels and ranks are predicted to lose is low by different
factors, so that several prices are tried, and the loss after repair at the budget says which, if any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kfe_fx.cost.count import CostModel
from kfe_fx.cost.device import Device
from kfe_fx.curvature.store import Store
from kfe_fx.labels.analysis import analyze
from kfe_fx.lowrank import Candidate, Prices, apply, candidates, find_layers, measure
from kfe_fx.passes.cutting import State
from kfe_fx.passes.settings import Settings
from kfe_fx.passes.shallow import Shallow
from kfe_fx.plan import Plan
from kfe_fx.program import Program

PRICES = (1.0, 0.3, 0.1)  # of that of channels

Ranks = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Decomposer:
    """What can be done to the layers of one network, and the networks that come of it.

    ``possible`` says whether there is any layer, but those that make the outputs, to which it can be done.
    """

    program: Program
    store: Store
    fronts: Mapping[str, Sequence[Candidate]]
    possible: bool = True

    @classmethod
    def of(cls, program: Program, model: CostModel, device: Device, sample: Any, settings: Settings) -> Decomposer:
        """Measure curvature, and what every rank of every layer loses and saves."""
        layers = find_layers(program).layers
        options = {"loss": settings.loss, "batch_size": settings.batch_size, "seed": settings.seed}
        store = measure(program, sample, layers, **options)
        if all(layer.last for layer in layers):  # a plan may say their ranks all the same
            return cls(program, store, {}, possible=False)
        prices = Prices(model, device, settings.cost_model)
        return cls(program, store, candidates(program, store, prices, data=sample, **options))

    def proposals(self, price: float | None) -> list[Ranks]:
        """Return what is worth its loss at shares of the price of channels; each another one, none empty.

        Where channels alone do not meet the budget (None) any price is paid.
        """
        if price is None:
            steepest = max((one.loss / one.saved_ms for front in self.fronts.values() for one in front), default=0.0)
            price = 10 * steepest + 1e-30
        found: list[Ranks] = []
        for share in PRICES:
            ranks = {name: best for name, front in self.fronts.items() if (best := _best(front, share * price))}
            if ranks and ranks not in found:
                found.append(ranks)
        return found

    def state(self, ranks: Ranks, heads: str) -> State:
        """Decompose: the network to go on from, a base of its own."""
        made = apply(self.program, self.store, ranks)
        analysis = analyze(made, heads=heads)
        plan = Plan(heads=heads, decomposed={name: list(pair) for name, pair in ranks.items()})
        return State(made.copy().eval(), Shallow(analysis, frozenset(), made, analysis), frozenset(), plan)


def _best(front: Sequence[Candidate], price: float) -> tuple[int, int] | None:
    worth = max(front, key=lambda one: price * one.saved_ms - one.loss)
    return (worth.c, worth.r) if price * worth.saved_ms > worth.loss else None
