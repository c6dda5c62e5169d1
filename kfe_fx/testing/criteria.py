"""What every criterion must do; a new one inherits these tests by naming itself. Only here is pytest imported."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from kfe_fx.criteria import Criterion, ScoreContext, resolve, score
from kfe_fx.labels.analysis import analyze
from kfe_fx.testing.nets import program_of
from kfe_fx.training import Batches


class CriterionConformance:
    """Tests of a criterion: subclass as ``Test...`` with ``criterion``; ``store`` fills what it needs beside data.

    A criterion gives one finite score per unit and, if it has ``weights``, one per entry of every weight; the same ones
    for the same context, whatever the batches; it changes nothing of the Program.
    """

    criterion: ClassVar[str | Criterion | type[Criterion]]

    def store(self, program: Any) -> dict[str, Any]:
        """Return entries of ``ScoreContext.store`` for a Program, where ``needs`` names some."""
        return {}

    def context(self, name: str = "residual", seed: int = 0) -> ScoreContext:
        """Make a context of a network of ``kfe_fx.testing.nets`` with three examples and targets."""
        program, x = program_of(name)
        targets = torch.tensor([0, 2, 1])
        context = ScoreContext.of(program, analyze(program), (x, targets), seed=seed, batch_size=2)
        context.store.update(self.store(program))
        return context

    @pytest.mark.parametrize("name", ["residual", "attention", "windows"])
    def test_scores_are_finite_one_per_unit_and_repeat(self, name: str) -> None:
        """Check shape, type and repeatability; all scores equal would say nothing."""
        context = self.context(name)
        first = score(self.criterion, context)
        assert first.shape == (len(context.analysis.units),)
        assert first.dtype == np.float64
        assert np.isfinite(first).all()
        assert len(np.unique(first)) > 1
        np.testing.assert_array_equal(first, score(self.criterion, self.context(name)))

    def test_the_program_stays_as_it_was(self) -> None:
        """Check that tensors, graphs, mode and gradients are left alone."""
        context = self.context()
        program = context.program.train()
        before = {name: value.clone() for name, value in program.state_dict().items()}
        text = program.hash()
        score(self.criterion, context)
        assert program.module().training
        assert program.hash() == text
        assert all(torch.equal(value, before[name]) for name, value in program.state_dict().items())
        assert all(parameter.grad is None for parameter in program.module().parameters())

    def test_batches_do_not_matter(self) -> None:
        """Check that three examples score the same in one batch or two."""
        context = self.context()
        whole = self.context()
        assert context.batches is not None
        whole.batches = Batches(whole.program, context.batches.data, 3)
        np.testing.assert_allclose(score(self.criterion, context), score(self.criterion, whole), rtol=1e-10)

    def test_weights_are_scored_entry_by_entry(self) -> None:
        """Check shapes, finiteness and repeatability of the scores of single weights, where the criterion has some."""
        criterion = resolve(self.criterion)
        if not criterion.scores_weights():
            return
        context = self.context()
        before = {name: value.clone() for name, value in context.program.state_dict().items()}
        found, again = criterion.weights(context), criterion.weights(self.context())
        assert {n: s.shape for n, s in found.items()} == {n: w.shape for n, w in context.weights().items()}
        assert all(bool(torch.isfinite(each).all()) for each in found.values())
        assert all(torch.equal(found[name], again[name]) for name in found)
        assert all(torch.equal(value, before[name]) for name, value in context.program.state_dict().items())
