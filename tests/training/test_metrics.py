"""Accuracy and mean square error, and functions of the user's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from kfe_fx.errors import BadData, UsageError
from kfe_fx.frontend.capture import capture
from kfe_fx.program import Program
from kfe_fx.training import Metric, evaluate, resolve_metric

X = torch.randn(10, 3)


@pytest.fixture(scope="module")
def program() -> Program:
    return capture(nn.Linear(3, 4), X[:2])


def test_accuracy_and_mean_square_error_over_all_batches(program: Program):
    outputs = program(X).detach()
    labels = outputs.argmax(1)
    labels[:4] = (labels[:4] + 1) % 4
    accuracy = resolve_metric(None, labels)
    assert accuracy is not None
    assert evaluate(program, (X, labels), accuracy, batch_size=4) == pytest.approx(0.6)
    labels[4:7] = -100  # does not count
    assert evaluate(program, (X, labels), accuracy, batch_size=4) == pytest.approx(3 / 7)
    mse = resolve_metric(None, outputs)
    assert mse is not None
    assert evaluate(program, (X, outputs + 2), mse, batch_size=4) == pytest.approx(4.0)
    assert accuracy.better(0.6, 0.5)
    assert mse.better(0.5, 0.6)
    assert mse.better(0.5, None)
    with pytest.raises(BadData, match="no targets"):
        evaluate(program, (X, None), accuracy)
    assert resolve_metric(None, None) is None


def test_functions_of_the_users(program: Program, tmp_path: Path):
    file = tmp_path / "mine.py"
    file.write_text("def count(module, loader):\n    return sum(len(module(x)) for x, _ in loader)\n")
    metric = resolve_metric(f"{file}:count", None)
    assert metric is not None
    program.train()
    assert evaluate(program, (X, None), metric) == 10.0
    assert program.module().training
    program.eval()
    with pytest.raises(UsageError, match="return a number"):
        evaluate(program, (X, None), Metric("odd", lambda module, loader: None))  # type: ignore[arg-type, return-value]
    with pytest.raises(UsageError, match="give a function"):
        resolve_metric(3, None)
