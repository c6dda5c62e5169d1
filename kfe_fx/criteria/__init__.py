"""Scores of units: how much is lost with each. One file per criterion; importing it registers it.

A criterion of one's own is a subclass of ``Criterion`` with a ``name``, made known by ``register`` or handed over.
"""

from kfe_fx.criteria import (  # noqa: F401  (importing a criterion registers it)
    group_fisher,
    kronecker,
    loss_models,
    magnitude,
    random,
    reconstruction,
    taylor,
    weights,
)
from kfe_fx.criteria.base import Criterion, ScoreContext, names, register, resolve, score

__all__ = ["Criterion", "ScoreContext", "names", "register", "resolve", "score"]
