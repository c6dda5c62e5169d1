"""Optimizers that precondition with the curvature of the taps."""

from kfe_fx.optim.ekfac import EKFAC
from kfe_fx.optim.kfac import KFAC

__all__ = ["EKFAC", "KFAC"]
