"""Examples to score, fine-tune and measure on: loaders, checks, and glyphs without end."""

from kfe_fx.data.checks import check_finite, check_targets, validate_against
from kfe_fx.data.dataset import ArrayData
from kfe_fx.data.loaders import load_data

__all__ = ["ArrayData", "check_finite", "check_targets", "load_data", "validate_against"]
