"""Tests that a criterion of one's own inherits, which hold it to what those of the library keep; they need pytest."""

from kfe_fx.errors import MissingDependency

try:
    import pytest
except ImportError:
    raise MissingDependency("kfe_fx.testing needs pytest: pip install pytest") from None

pytest.register_assert_rewrite("kfe_fx.testing.criteria")  # so that a failure shows its numbers

from kfe_fx.testing.criteria import CriterionConformance  # noqa: E402  (rewritten from here on)

__all__ = ["CriterionConformance"]
