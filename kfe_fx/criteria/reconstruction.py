"""Criterion ``reconstruction``: what stays of the loss after those who read a unit were refitted without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from kfe_fx.criteria.base import Criterion, ScoreContext, register
from kfe_fx.criteria.kronecker import DAMPING, MADE, READ, Scoring
from kfe_fx.criteria.members import Sets
from kfe_fx.criteria.quadratics import Lines, compensated_change, removed_change


@register
@dataclass(frozen=True)
class Reconstruction(Criterion):
    """Score by 1/2 tr(G W_C ([A^-1]_CC)^-1 W_C^T), summed over the weights that read the unit by their columns C.

    It is the minimum over W' of 1/2 tr(G (W' - W) A (W' - W)^T) with W'_C = 0, Kron-OBS on the side of the inputs: the
    error of the layer's outputs, weighed by G, that least squares on the other inputs and the bias leaves (the
    reconstruction of channel pruning, He et al. 2017, equation 5, in nats). A unit whose activations others span is
    free, however large they are. A is damped by ``damping`` times its mean eigenvalue; see ``compensated_change``.

    Rows that go with the unit itself (of a recurrent weight) count among the outputs. Depthwise convolutions read a
    unit only to carry it on, and do not count. Units that no weight with Kronecker factors reads (queries and keys)
    cannot be made good: they get the score of ``kron-obd``, and without rows what that one gives to such units.
    """

    damping: float = DAMPING
    name: ClassVar[str] = "reconstruction"
    needs: ClassVar[frozenset[str]] = frozenset({"curvature"})

    def change(self, lines: Lines, sets: Sets) -> Tensor:
        """Return 1/2 tr(G W_C Z^T A Z W_C^T), [n]."""
        return compensated_change(lines, sets, self.damping)

    def score(self, context: ScoreContext) -> np.ndarray:
        """Return the sum over the readers, [units]."""
        return Scoring(context).scores("kfac", [(READ, self.change), (MADE, removed_change)])
