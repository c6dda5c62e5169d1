"""Floors that end the rounds of a run: the last one is taken back when what it left is worse."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kfe_fx.errors import UsageError
from kfe_fx.passes.settings import Settings
from kfe_fx.passes.trial import Trial
from kfe_fx.program import Program
from kfe_fx.training.metrics import Metric, evaluate
from kfe_fx.training.prune_data import PruneData


@dataclass
class Floor:
    """What a network must keep on all examples that are held out."""

    settings: Settings
    data: PruneData
    original: Program
    metric: Metric | None

    def __post_init__(self) -> None:
        """Refuse floors that cannot be measured.

        Raises:
            UsageError: there are no held-out examples with targets.
        """
        for name, value in (
            ("stop-at-accuracy", self.settings.stop_at_accuracy),
            ("stop-at-loss", self.settings.stop_at_loss),
        ):
            held = self.data.held_out
            if value is not None and (self.metric is None or held is None or held.targets is None):
                raise UsageError(f"{name} is measured on held-out examples with targets; give --data or --val")

    @cached_property
    def _loss(self) -> Trial:
        held = self.data.held_out
        assert held is not None
        return Trial(self.original, held, self.settings, len(held))

    def crossed(self, small: Program, entry: dict[str, Any]) -> str:
        """Measure, note it in a round's entry, and return which floor was crossed with what, or "".

        Raises:
            UsageError: the metric is NaN.
        """
        settings, found = self.settings, entry.setdefault("held_out", {})
        if settings.stop_at_accuracy is not None and self.metric is not None:
            value = found[self.metric.name] = evaluate(small, self.data.held_out, self.metric)
            if math.isnan(value):
                raise UsageError(f"the metric {self.metric.name!r} is nan: no floor of it means anything")
            if value != settings.stop_at_accuracy and not self.metric.better(value, settings.stop_at_accuracy):
                return f"stop-at-accuracy: the next round, to {entry['target']:.3f}, ended at {value:.4g}"
        if settings.stop_at_loss is not None:
            value = found["loss"] = self._loss.loss(small)
            if not value <= settings.stop_at_loss:
                return f"stop-at-loss: the next round, to {entry['target']:.3f}, ended at {value:.4g}"
        return ""
