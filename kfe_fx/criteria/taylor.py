"""Criteria ``taylor`` and ``fisher``: first-order loss change and Fisher information, by gates or by single weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np
import torch

from kfe_fx.criteria.base import Criterion, ScoreContext, register
from kfe_fx.criteria.loss_models import examples_of, mean_curvatures, mean_over_examples


@register
class Taylor(Criterion):
    """Score by the first-order change of each example's loss (Molchanov et al. 2017, 2019; per example).

    With g[n, u] = sum over members and positions of a * dl_n/da:  score_u = 1/N sum_n |g[n, u]|.
    The members of a unit are summed before the absolute value is taken; signed means would vanish at convergence.
    """

    name: ClassVar[str] = "taylor"

    def score(self, context: ScoreContext) -> np.ndarray:
        """Return mean_n |g[n, u]|, [units]."""
        return _mean(context, torch.abs)

    def weights(self, context: ScoreContext) -> dict[str, torch.Tensor]:
        """Return mean_n |g[n, k] theta_k| per entry of each weight, float64; one example at a time.

        A weight enters the loss as its gate does, so that theta_k dl_n/dtheta_k is the gradient by a gate on it alone.
        """
        weights = {name: weight.detach().double() for name, weight in context.weights().items()}
        return mean_over_examples(context, lambda name, first, _: (first * weights[name]).abs())


@register
class Fisher(Criterion):
    """Score by the Fisher information of the gate (Theis et al. 2018, equation 5).

    With g[n, u] = sum over members and positions of a * dl_n/da:  score_u = 1/(2N) sum_n g[n, u]^2, the loss that
    removing u costs to second order where the mean gradient is zero. Squared per example, after the sum over members.
    """

    name: ClassVar[str] = "fisher"
    predicts: ClassVar[bool] = True

    def score(self, context: ScoreContext) -> np.ndarray:
        """Return half the mean of g[n, u]^2, [units]."""
        return 0.5 * _mean(context, torch.square)

    def weights(self, context: ScoreContext) -> dict[str, torch.Tensor]:
        """Return theta_k^2 / (2N) sum_n g[n, k]^2 per entry of each weight, float64 (Theis et al. 2018, equation 4).

        With the labels of the data, or with drawn ones where there are none, as for units.
        """
        examples = examples_of(context)
        source = "sampled" if examples.targets() is None else "empirical"
        weights = {name: weight.detach().double() for name, weight in context.weights().items()}
        squares = mean_curvatures(context, examples, list(weights), source)
        told = context.facts.pop("curvature")
        context.facts["labels"] = "data" if source == "empirical" else told
        return {name: 0.5 * squares[name] * weight.square() for name, weight in weights.items()}


def _mean(context: ScoreContext, function: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
    total = torch.zeros(len(context.analysis.units), dtype=torch.float64)
    count = 0
    for rows in context.gradients():
        total += function(rows).sum(0)
        count += len(rows)
    return (total / max(count, 1)).numpy()
