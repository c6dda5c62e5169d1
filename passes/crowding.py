"""What the last units of a layer cost: scores are of one unit alone, and of a layer many go."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from kfe_fx.cost.steps import LARGEST_SCORE, by_score, check_scores
from kfe_fx.labels.analysis import Analysis

EXPONENTS = (1.0, 2.0, 0.0)  # that are tried; the first wins ties


def crowded(analysis: Analysis, scores: np.ndarray, exponent: float, absent: Collection[int] = ()) -> np.ndarray:
    """Return scores float64 [units] for a sum over units that go together; ``absent`` units are not there any more.

    A score tells what is lost with one unit while all others are there. Of a layer of n units the one that goes when
    i have gone, the least important first, is charged

        s_i (n / (n - i))^p.

    Of n equal units, S in sum, k that stay then cost about S (n/k - 1) at p = 2, a loss that falls as 1/width as in the
    variance-limited regime of Bahri et al. (2021), "Explaining neural scaling laws"; S ln(n/k) at p = 1; and
    S (1 - k/n), the plain sum, at p = 0. To the first order in what goes all are the sum. Where costs are products
    of neighbouring widths the plain sum starves every other layer, as it thinks the last units no dearer than the
    first. The order within a layer stays; scores of at most 0, and infinite ones, stay as they are.

    Args:
        analysis: the units, in their layers.
        scores: loss increase if a unit alone is removed.
        exponent: p, at least 0.
        absent: units that went before, or go in any case.

    Raises:
        UsageError: scores that mean nothing.
    """
    weighed = check_scores(analysis, scores).copy()
    gone = np.zeros(len(weighed), dtype=bool)
    gone[list(absent)] = True
    for group in analysis.groups:
        present = by_score((unit for unit in group.units if not gone[unit]), weighed)
        stay = np.arange(len(present), 0, -1, dtype=np.float64)  # of them, when it is its turn
        own = weighed[present]
        dearer = np.minimum(own * (len(present) / stay) ** exponent, LARGEST_SCORE)
        weighed[present] = np.where((own > 0) & np.isfinite(own), dearer, own)
    return weighed
