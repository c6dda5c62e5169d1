"""What every criterion must do; a new one inherits these tests by naming itself."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from kfe_fx.criteria import Criterion, ScoreContext, score
from kfe_fx.labels.analysis import analyze
from kfe_fx.training import Batches
from tests.criteria.nets import program_of


class CriterionConformance:
    """Subclass with ``criterion``; ``store`` fills what it needs beside data."""

    criterion: ClassVar[str | Criterion | type[Criterion]]

    def store(self, program: Any) -> dict[str, Any]:
        return {}

    def context(self, name: str = "residual", seed: int = 0) -> ScoreContext:
        program, x = program_of(name)
        targets = torch.tensor([0, 2, 1])
        context = ScoreContext.of(program, analyze(program), (x, targets), seed=seed, batch_size=2)
        context.store.update(self.store(program))
        return context

    @pytest.mark.parametrize("name", ["residual", "attention", "windows"])
    def test_scores_are_finite_one_per_unit_and_repeat(self, name: str):
        context = self.context(name)
        first = score(self.criterion, context)
        assert first.shape == (len(context.analysis.units),)
        assert first.dtype == np.float64
        assert np.isfinite(first).all()
        assert len(np.unique(first)) > 1
        np.testing.assert_array_equal(first, score(self.criterion, self.context(name)))

    def test_the_program_stays_as_it_was(self):
        context = self.context()
        program = context.program.train()
        before = {name: value.clone() for name, value in program.state_dict().items()}
        text = program.hash()
        score(self.criterion, context)
        assert program.module().training
        assert program.hash() == text
        assert all(torch.equal(value, before[name]) for name, value in program.state_dict().items())
        assert all(parameter.grad is None for parameter in program.module().parameters())

    def test_batches_do_not_matter(self):
        context = self.context()
        whole = self.context()
        assert context.batches is not None
        whole.batches = Batches(whole.program, context.batches.data, 3)
        np.testing.assert_allclose(score(self.criterion, context), score(self.criterion, whole), rtol=1e-10)
