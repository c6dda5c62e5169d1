"""Criterion ``group-fisher``: Fisher information of coupled members per share of activation memory."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from kfe_fx.criteria.base import Criterion, ScoreContext, register
from kfe_fx.criteria.taylor import Fisher
from kfe_fx.labels.analysis import Analysis
from kfe_fx.labels.convolution import WHOLE


@register
class GroupFisher(Criterion):
    """Score by 1/(2N) sum_n (sum over members of g_n)^2 divided by the share of activation memory (Liu et al. 2021).

    The numerator is the criterion ``fisher``: per example the gradients of all members of a unit add before the square
    (equation 5 there). The division (section 3.4) is what differs: what a unit costs per element of the feature maps
    that go with it, because on a GPU memory, not arithmetic, sets the time. So scores are not comparable with a loss,
    and a solver that knows the cost itself should be given ``fisher``, or it counts the cost twice.

    The paper sets a mask before every layer that reads the channel; here the gates stand behind the producers and their
    norms. Both are the same where only what is positively homogeneous (ReLU, sums, pooling) lies between.
    """

    name: ClassVar[str] = "group-fisher"

    def score(self, context: ScoreContext) -> np.ndarray:
        """Return Fisher information over the share of memory, [units]."""
        memory = activation_memory(context.analysis)
        share = memory / max(memory.sum(), 1.0)
        context.facts["activation_elements"] = int(memory.sum())
        return np.divide(Fisher().score(context), share, out=np.zeros(len(share)), where=share > 0)


def activation_memory(analysis: Analysis) -> np.ndarray:
    """Count the elements of feature maps that go with each unit, for the sizes of the analysis, [units].

    The feature maps are the outputs of the layers that make units and of the convolutions that carry them channel by
    channel; what norms and activations make of these is computed in place, as in the paper, and not counted.
    """
    tracker = analysis.trackers["eval"]
    total = np.zeros(len(analysis.units))
    made = {site.node for site in analysis.sites if site.argument is None}
    carried = {name for name, decision in tracker.decisions.items() if decision == WHOLE}
    for name in sorted(made | carried):
        shape = tracker.fakes[name].shape
        for dim, layers in enumerate(analysis.layout(name)):
            for ids in layers:
                each = torch.Size(shape).numel() / int(shape[dim])
                total += each * np.bincount(ids[ids >= 0], minlength=len(total))
    for site in analysis.sites:
        if site.argument is not None:  # units inside a recurrent layer: all steps of all sequences
            output = tracker.fakes[site.node][0].shape
            each = torch.Size(output).numel() / int(output[-1])
            total += each * np.bincount(site.units[site.units >= 0], minlength=len(total))
    return total
