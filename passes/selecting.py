"""Which units and branches of one dense network go, under all limits of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from kfe_fx.cost.bounds import Bounds
from kfe_fx.cost.count import CostModel
from kfe_fx.cost.device import Device
from kfe_fx.cost.latency import LatencyModel
from kfe_fx.cost.solver import Demand, Selection, select_budget, select_widths
from kfe_fx.cost.steps import matches
from kfe_fx.errors import PlanError
from kfe_fx.labels.branches import Branch, NoBranch, examine, find_branches
from kfe_fx.passes.crowding import crowded
from kfe_fx.passes.settings import Settings
from kfe_fx.passes.shallow import Shallow

_COSTS = {"macs": "mac_cost", "params": "parameter_cost", "memory": "memory_cost"}
OUT_OF_REACH = 1e-9  # a share of what there is that no selection meets
Ratios = dict[str, float]  # metric -> what may remain of it, relative to the network before anything went


class Selector:
    """Selects units of a network; limits are relative to ``dense``, the network before branches went."""

    def __init__(
        self,
        shallow: Shallow,
        model: CostModel,
        dense: CostModel,
        settings: Settings,
        device: Callable[[], Device],
    ) -> None:
        """Take a network with its costs; ``device`` is asked for when latency is first predicted."""
        self._analysis, self._model, self._dense = shallow.analysis, model, dense
        self._settings, self._device = settings, device
        self._shallows: dict[tuple[str, ...], Shallow] = {(): shallow.as_whole()}
        self._asides: dict[tuple[str, tuple[str, ...]], float] = {}

    # costs -----------------------------------------------------------------------------------------------------------

    @cached_property
    def latency(self) -> LatencyModel:
        """The predicted latency of the base."""
        return self._predictor(self._model)

    @cached_property
    def _dense_latency(self) -> LatencyModel:
        return self.latency if self._dense is self._model else self._predictor(self._dense)

    def _predictor(self, model: CostModel) -> LatencyModel:
        return self._settings.predictor(model, self._device())

    def milliseconds(self, model: CostModel, removed: Collection[int] = ()) -> float:
        """Return the predicted milliseconds of the base or of the dense network without some of its units."""
        return (self._dense_latency if model is self._dense else self.latency).predict(removed) / 1e6

    def ratio(self, metric: str, removed: Collection[int], drop: tuple[str, ...] = ()) -> float:
        """Return the predicted cost of the base without some units and the branches ``drop``, relative to dense."""
        if metric == "widths":
            return 1 - len(removed) / max(1, len(self._analysis.units))
        cost, dense = self._costs(metric)
        return (cost.predict(removed) - self._aside(metric, drop)) / max(1.0, dense.predict(()))

    def _aside(self, metric: str, drop: tuple[str, ...]) -> float:
        """Return what branches cost beside their units: norms, depthwise convolutions on the stream, activations.

        The cost model of the base knows their units alone, so it is asked of the network without them.
        """
        if not drop:
            return 0.0
        if (metric, drop) not in self._asides:
            shallow = self.shallow(drop)
            rest = CostModel(shallow.program, shallow.analysis)
            cost = self._predictor(rest) if metric == "latency" else getattr(rest, _COSTS[metric])
            self._asides[metric, drop] = self._costs(metric)[0].predict(self.units(drop)) - cost.predict(())
        return self._asides[metric, drop]

    def _costs(self, metric: str) -> tuple[Any, Any]:
        if metric == "latency":
            return self.latency, self._dense_latency
        return getattr(self._model, _COSTS[metric]), getattr(self._dense, _COSTS[metric])

    # selections ------------------------------------------------------------------------------------------------------

    def select(
        self,
        scores: np.ndarray,
        ratios: Ratios,
        *,
        gone: frozenset[int],
        drop: tuple[str, ...] = (),
        crowding: float = 0.0,
    ) -> Selection:
        """Select under all limits: ``gone`` went already, the branches ``drop`` go too.

        The last units of a layer count for more by the exponent ``crowding``; what is told as loss is the plain sum.
        """
        if "widths" in ratios:
            selection = select_widths(self._analysis, scores, ratios["widths"])
            return replace(selection, removed=selection.removed | gone)
        weighed = crowded(self._analysis, scores, crowding, gone | self.units(drop))
        selection = self._solve(weighed, ratios, gone, drop)
        lost = (scores[unit] for unit in selection.removed - gone)
        return replace(selection, dropped=drop, loss=math.fsum(loss for loss in lost if loss != -math.inf))

    def by_price(self, harm: dict[str, float], ratios: Ratios) -> list[str]:
        """List the branches by harm per cost saved, the cheapest first; those that save nothing are left out."""
        cost, _ = self._costs(next(iter(ratios)))
        whole = cost.predict(())
        saved = {name: whole - cost.predict(branch.units) for name, branch in self.branches.items()}
        price = {name: harm[name] / gain for name, gain in saved.items() if gain > 0}
        return sorted(price, key=lambda name: (price[name], name))

    def _solve(self, scores: np.ndarray, ratios: Ratios, gone: frozenset[int], drop: tuple[str, ...]) -> Selection:
        """Select in steps that the device likes; in less where layers are too narrow, and nobody asked for the step."""
        settings, block = self._settings, self.step(ratios)
        demands: list[Demand] = []
        for metric, ratio in ratios.items():
            cost, dense = self._costs(metric)
            present, aside = cost.predict(()), self._aside(metric, drop)
            target = (ratio * dense.predict(()) + aside) / present if present else 1.0
            # what is asked for can be less than the network costs without its branches: out of reach, not meaningless
            demands.append(Demand(metric, cost, min(1.0, max(target, OUT_OF_REACH))))
        first, *also = demands
        while True:
            selection = select_budget(
                self._model, scores, first.cost, first.target, name=first.name if also else "", also=also,
                multiple_of=block, keep=self._keep, bounds=self._bounds, gone=gone, drop=self.units(drop),
            )  # fmt: skip
            if selection.feasible or block == 1 or settings.multiple_of is not None:
                return replace(selection, predicted=self.ratio(first.name, selection.removed, drop), step=block)
            block //= 2

    def step(self, ratios: Ratios) -> int:
        """Return the step of widths: what was asked for, else the device's where latency counts."""
        if self._settings.multiple_of is not None:
            return self._settings.multiple_of
        return self._device().step if "latency" in ratios else 1

    # branches --------------------------------------------------------------------------------------------------------

    @cached_property
    def branches(self) -> dict[str, Branch]:
        """The branches that may go: none of their layers is kept whole, or has a floor."""
        settings = self._settings
        if not settings.depth or settings.metric == "widths":
            return {}
        globs = [*self._keep, *(bound.glob for bound in self._bounds.floors)]
        return {
            name: branch
            for name, branch in self._known.items()
            if not any(matches(tensor, glob) for tensor in branch.parameters for glob in globs)
        }

    @cached_property
    def _known(self) -> dict[str, Branch]:
        return {branch.name: branch for branch in find_branches(self._analysis)}

    @cached_property
    def _keep(self) -> tuple[str, ...]:
        """The globs of --keep; those whose layers went with a branch no longer match anything."""
        return tuple(glob for glob in self._settings.keep if self._matters(glob))

    @cached_property
    def _bounds(self) -> Bounds:
        bounds = self._settings.bounds
        floors, caps = (tuple(one for one in side if self._matters(one.glob)) for side in (bounds.floors, bounds.caps))
        return Bounds(floors, caps)

    def _matters(self, glob: str) -> bool:
        return self._model is self._dense or any(matches(name, glob) for name in self._analysis.params)

    def units(self, names: Iterable[str]) -> frozenset[int]:
        """Return the units of branches."""
        return frozenset[int]().union(*(self._known[name].units for name in names))

    def fit(self, names: Collection[str]) -> bool:
        """Tell whether branches can go together."""
        try:
            examine(self._analysis, self.units(names))
        except NoBranch:
            return False
        return True

    def shallow(self, names: tuple[str, ...]) -> Shallow:
        """Return the base without some of its branches.

        Raises:
            PlanError: it has no such branches, or they cannot go together.
        """
        if names not in self._shallows:
            unknown = [name for name in names if name not in self._known]
            if unknown:
                raise PlanError(f"the plan drops the branch {unknown[0]!r}, which this network does not have")
            chosen = [self._known[name] for name in names]
            self._shallows[names] = Shallow.of(self._analysis, chosen, self._settings.heads)
        return self._shallows[names]
