"""The step-size constraint of loss models: a removal that moves the weights far is distrusted."""

from __future__ import annotations

import numpy as np

from kfe_fx.errors import UsageError
from kfe_fx.labels.analysis import Analysis
from kfe_fx.training.group_lasso import GroupLasso


def squared_norms(analysis: Analysis) -> np.ndarray:
    """Return sum of w^2 over the weights of each unit, float64 [units]; units without weights have 0.

    It is what a removal moves the parameters by, ||Delta theta||^2, in the penalty lambda/2 ||Delta theta||^2 of
    Laurent et al. (2020), section 3. Weights that a batch norm follows move the function whatever their size
    and count nothing (see ``GroupLasso``); entries in several slices of a unit count once.
    """
    found = np.zeros(len(analysis.units))
    try:
        lasso = GroupLasso(analysis.program, 1.0, analysis)
    except UsageError:  # no unit has weights that count
        return found
    found[lasso.units] = lasso.norms().detach().double().square().numpy()
    return found
