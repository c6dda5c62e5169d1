"""Scores of what a pruning run still has, told on the units of its base."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kfe_fx.criteria.base import ScoreContext, score
from kfe_fx.criteria.step_size import squared_norms
from kfe_fx.embedding import lift_scores
from kfe_fx.labels.analysis import Analysis
from kfe_fx.passes.cutting import State
from kfe_fx.passes.settings import Settings


@dataclass(frozen=True)
class Scored:
    """Scores of one network on the units of the base of its run; of units that are gone there are none to speak of.

    ``changes``: what they promise of the loss, unit by unit; None where they promise nothing. ``facts``: what the
    criterion tells. ``curvature``: factors of the network that was scored, where the criterion took some.
    """

    scores: np.ndarray = field(default_factory=lambda: np.zeros(0))
    changes: np.ndarray | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    curvature: Any = None


def score_state(state: State, settings: Settings, sample: Any, store: Any = None) -> Scored:
    """Score the units of the small network on a sample, or data-free; ``store`` holds its statistics if they are known.

    Raises:
        KfeError: what ``kfe_fx.criteria.base.score`` raises.
    """
    analysis = state.analysis(settings.heads)
    context = ScoreContext.of(
        state.small, analysis, sample, settings.loss, batch_size=settings.batch_size, seed=settings.seed
    )
    if store is not None:
        context.store["curvature"] = store
    scores, changes = score(settings.criterion, context), context.changes
    if settings.penalty:  # it ranks, and is no part of the loss
        scores = scores + 0.5 * settings.penalty * squared_norms(analysis)
    return Scored(
        lifted(state, analysis, scores),
        None if changes is None else lifted(state, analysis, changes),
        dict(context.facts),
        context.store.get("curvature"),
    )


def lifted(state: State, analysis: Analysis, found: np.ndarray) -> np.ndarray:
    """Tell values of the units of the small network on those of the base."""
    return lift_scores(state.shallow.analysis, analysis, found, state.plan.kept) if state.removed else found
