"""The criteria of the library, and one of a third party, against the conformance tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kfe_fx.criteria import Criterion, ScoreContext
from kfe_fx.testing import CriterionConformance


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


MINE = """
import numpy as np
from kfe_fx.criteria import Criterion

class Mine(Criterion):
    name = "mine"

    def score(self, context):
        rows = np.concatenate([rows.numpy() for rows in context.gradients()])
        return SCORE
"""


@pytest.mark.parametrize(
    ("expression", "outcome"),
    [
        ("np.abs(rows).max(0)", "6 passed"),
        ("np.zeros(rows.shape[1])", "3 failed, 3 passed"),
        ("np.random.rand(rows.shape[1])", "4 failed, 2 passed"),
    ],
)
def test_the_example_of_the_readme_runs_anywhere(expression: str, outcome: str, tmp_path: Path):
    root = Path(__file__).resolve().parents[2]
    blocks = (root / "README.md").read_text().split("```python\n")[1:]
    (example,) = [block.split("```")[0] for block in blocks if "CriterionConformance" in block]
    (tmp_path / "mine.py").write_text(MINE.replace("SCORE", expression))
    (tmp_path / "test_mine.py").write_text(example)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py"]
    env = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1].startswith(outcome), done.stdout[-2000:]
