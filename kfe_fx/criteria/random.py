"""Criterion ``random``: the baseline that any other has to beat."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from kfe_fx.criteria.base import Criterion, ScoreContext, register


@register
class Random(Criterion):
    """Score units, or single weights, by uniform numbers from the seed."""

    name: ClassVar[str] = "random"

    def score(self, context: ScoreContext) -> np.ndarray:
        """Return uniform numbers in [0, 1), [units]."""
        return np.random.default_rng(context.seed).random(len(context.analysis.units))

    def weights(self, context: ScoreContext) -> dict[str, torch.Tensor]:
        """Return uniform numbers in [0, 1), one stream over the weights in their order."""
        generator = np.random.default_rng(context.seed)
        return {name: torch.from_numpy(generator.random(tuple(w.shape))) for name, w in context.weights().items()}
