"""The criteria of the library, and one of a third party, against the conformance tests."""

from __future__ import annotations

import numpy as np

from kfe_fx.criteria import Criterion, ScoreContext
from tests.criteria.conformance import CriterionConformance


class TestRandom(CriterionConformance):
    criterion = "random"


class TestMagnitude(CriterionConformance):
    criterion = "magnitude"


class TestTaylor(CriterionConformance):
    criterion = "taylor"


class TestFisher(CriterionConformance):
    criterion = "fisher"


class Largest(Criterion):
    name = "largest-gradient"
    needs = frozenset({"data"})

    def score(self, context: ScoreContext) -> np.ndarray:
        return np.max([rows.abs().amax(0).numpy() for rows in context.gradients()], 0)


class TestThirdParty(CriterionConformance):
    criterion = Largest
