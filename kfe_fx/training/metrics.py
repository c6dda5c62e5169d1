"""Metrics: what is reported, and by which the best of several states is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from kfe_fx.data.checks import IGNORED
from kfe_fx.errors import BadData, UsageError
from kfe_fx.program import Program
from kfe_fx.training.batches import Batches, Loader, call
from kfe_fx.training.losses import class_scores, main_output
from kfe_fx.user_code import load_function

Function = Callable[[nn.Module, Any], float]


@dataclass(frozen=True)
class Metric:
    """A number that says how good a network is on data.

    ``function(module, loader)``: the module in evaluation mode, and a loader that can be iterated over again and yields
    (inputs, targets) batches as ``kfe_fx.training.batches.Loader`` says.
    """

    name: str
    function: Function
    larger_is_better: bool = True

    def better(self, value: float, than: float | None) -> bool:
        """Tell whether ``value`` is better than another one."""
        return than is None or (value > than if self.larger_is_better else value < than)


def accuracy(module: nn.Module, loader: Any) -> float:
    """Return the share of targets that are the class of the largest score, 0 to 1."""
    right = total = 0
    for outputs, targets in _run(module, loader):
        scores, classes = class_scores(outputs, targets)
        counted = classes != IGNORED
        right += int(((scores.argmax(1) == classes) & counted).sum())
        total += int(counted.sum())
    return right / max(total, 1)


def mean_square_error(module: nn.Module, loader: Any) -> float:
    """Return the mean of (output - target)² over all elements."""
    total, count = 0.0, 0
    for outputs, targets in _run(module, loader):
        values = main_output(outputs)
        if values.numel() != targets.numel():
            raise BadData(f"targets {list(targets.shape)} do not fit the output {list(values.shape)}; name an --eval")
        total += float(((values - targets.to(values.dtype).reshape(values.shape)) ** 2).sum())
        count += values.numel()
    return total / max(count, 1)


def _run(module: nn.Module, loader: Any) -> Any:
    for inputs, targets in loader:
        if targets is None:
            raise BadData("the data has no targets to compare with; give targets, or an --eval function")
        yield call(module, inputs), targets


ACCURACY = Metric("accuracy", accuracy)
MSE = Metric("mse", mean_square_error, larger_is_better=False)


def resolve_metric(spec: Any, targets: Tensor | None) -> Metric | None:
    """Find the metric that ``spec`` says.

    Args:
        spec: None (accuracy for integer targets, mean square error for floating-point ones, None without targets),
            "accuracy", "mse", "file.py:function", a function (module, loader) -> float of which larger is better, or a
            Metric.
        targets: a sample of the targets, or None where there are none.

    Raises:
        UsageError: there is no such metric.
    """
    if spec is None:
        return None if targets is None else MSE if targets.is_floating_point() else ACCURACY
    if isinstance(spec, Metric):
        return spec
    if isinstance(spec, str):
        named = {metric.name: metric for metric in (ACCURACY, MSE)}
        return named[spec] if spec in named else Metric(spec, load_function(spec))
    if not callable(spec):
        raise UsageError(f"the metric is a {type(spec).__name__}: give a function (module, loader) -> float")
    return Metric(getattr(spec, "__name__", type(spec).__name__), cast(Function, spec))


def evaluate(program: Program, data: Any, metric: Metric, batch_size: int = 256) -> float:
    """Return the metric of a Program on data, in evaluation mode.

    Raises:
        UsageError: a metric of the user's returns no number.
    """
    module = program.module()
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            value = metric.function(module, Loader(Batches(program, data, batch_size)))
    finally:
        module.train(training)
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise UsageError(f"the metric {metric.name!r} returned a {type(value).__name__}; return a number") from error
