"""Finding criteria, what they need, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kfe_fx import sparsify
from kfe_fx.criteria import Criterion, ScoreContext, base, names, register, resolve, score
from kfe_fx.errors import UsageError
from kfe_fx.frontend.capture import capture
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


OWN = """
import numpy as np, torch
from kfe_fx.criteria import Criterion

class Fine(Criterion):
    name = "own"
    def score(self, context):
        return np.arange(len(context.analysis.units), dtype=float)
    def weights(self, context):
        return {name: value.detach().abs().numpy() for name, value in context.weights().items()}

class Raises(Fine):
    def score(self, context):
        raise KeyError("my own")
    weights = score

class Unnamed(Criterion):
    def score(self, context):
        return []

class Abstract(Criterion):
    name = "abstract"

class Argument(Fine):
    def __init__(self, x):
        self.x = x

class Letters(Fine):
    needs = "data"

class Zeroes(Fine):
    def score(self, context):
        with torch.no_grad():
            for value in context.program.module().parameters():
                value.zero_()
        return super().score(context)

made = Fine()

def function(context):
    return []
"""


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Raises", r"own.py:Raises: raised KeyError: 'my own' \(.*own.py:14\)"),
        ("Unnamed", "Unnamed has no name"),
        ("Abstract", "raised TypeError: .*abstract"),
        ("Argument", "raised TypeError: .*'x'"),
        ("Letters", r"needs 'data'; give a set"),
        ("Zeroes", "changed the network's weights"),
        ("function", "no kfe_fx.criteria.Criterion"),
        ("missing", "defines no 'missing'"),
    ],
)
def test_mistakes_of_a_third_party_are_told_as_its_own(tmp_path: Path, name: str, told: str):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    with pytest.raises(UsageError, match=told):
        score(f"{path}:{name}", context_without_data())


def test_classes_and_instances_in_files(tmp_path: Path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    for name in ("Fine", "made"):
        assert score(f"{path}:{name}", context_without_data()).tolist() == list(range(6))
    program, _ = program_of("outer")
    assert sparsify(program, sparsity=0.5, criterion=f"{path}:Fine").certificate.reached == pytest.approx(0.5, abs=0.05)


def test_a_class_that_is_no_criterion_is_named():
    with pytest.raises(UsageError, match="the criterion is dict: give a name"):
        resolve(dict)  # type: ignore[arg-type]


class Fixed(nn.Module):
    """Nothing of it can go."""

    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.only(x)


@pytest.mark.parametrize("name", ["fisher", "taylor", "taylor-so", "lm", "qm", "obd", "group-fisher", "magnitude"])
def test_a_network_without_units_has_no_scores(name: str):
    program = capture(Fixed().eval(), torch.randn(2, 3))
    data = torch.randn(4, 3), torch.arange(4) % 2
    assert score(name, ScoreContext.of(program, analyze(program), data)).shape == (0,)
