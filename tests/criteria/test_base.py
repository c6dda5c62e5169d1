"""Finding criteria, what they need, and what is refused."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch

from kfe_fx.criteria import Criterion, ScoreContext, base, names, register, resolve, score
from kfe_fx.errors import UsageError
from kfe_fx.labels.analysis import analyze
from tests.criteria.nets import program_of


class Constant(Criterion):
    name: ClassVar[str] = "constant"
    value: ClassVar[float] = 1.0

    def score(self, context: ScoreContext) -> np.ndarray:
        return np.full(len(context.analysis.units), self.value)


def context_without_data() -> ScoreContext:
    program, _ = program_of("outer")
    return ScoreContext.of(program, analyze(program))


def test_registered_criteria_are_found_by_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    assert {"random", "magnitude", "taylor", "fisher"} <= set(names())
    register(Constant)
    assert isinstance(resolve("constant"), Constant)
    register(Constant)  # again is no error
    with pytest.raises(UsageError, match="already"):
        register(type("Other", (Constant,), {}))


def test_an_unknown_name_says_what_there_is():
    with pytest.raises(UsageError, match=r"no criterion 'x'; choose one of bn-scale, c-obd, c-obs, fisher"):
        resolve("x")


def test_what_is_needed_must_be_there():
    context = context_without_data()
    for need, told in (("data", "needs data"), ("targets", "needs targets"), ("factors", "needs factors")):
        criterion = type("Needy", (Constant,), {"needs": frozenset({need})})()
        with pytest.raises(UsageError, match=told):
            score(criterion, context)


def test_scores_of_the_wrong_number_or_not_finite_are_refused():
    context = context_without_data()
    with pytest.raises(UsageError, match="gives a score of nan to a unit of first"):
        score(type("Nan", (Constant,), {"value": float("nan")}), context)
    with pytest.raises(UsageError, match=r"returned \[2\] scores for 6 units"):
        score(type("Short", (Constant,), {"score": lambda self, context: np.zeros(2)}), context)


@pytest.mark.parametrize("returned", [["high"] * 6, ["1"] * 6, [1j] * 6, [[1.0], [1.0, 2.0]], [object()] * 6, {"a": 1}])
def test_what_is_no_array_of_numbers_is_refused(returned: object):
    with pytest.raises(UsageError, match="no array of real numbers"):
        score(type("Odd", (Constant,), {"score": lambda self, context: returned}), context_without_data())


def test_a_tensor_that_requires_gradients_is_its_values():
    for dtype in (torch.float32, torch.bfloat16):
        given = torch.ones(6, dtype=dtype, requires_grad=True)
        found = score(type("Live", (Constant,), {"score": lambda self, context, v=given: v}), context_without_data())
        assert found.tolist() == [1.0] * 6
