"""Do these examples fit this network? Asked before any work starts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kfe_fx.data.checks import check_finite, check_targets, validate_against
from kfe_fx.data.dataset import ArrayData
from kfe_fx.errors import BadData
from kfe_fx.program import Program
from kfe_fx.training.batches import Batches, pinned_batch
from kfe_fx.training.losses import Loss, class_scores, mean_square


def fit_inputs(program: Program, data: ArrayData) -> ArrayData:
    """Check that the network reads these inputs; cast what may be cast.

    Raises:
        BadData: an input is missing or left over, or its shape or type does not fit.
    """
    return validate_against(data, program.example_inputs, program.signature.input_names, program.axes)


def fit_examples(program: Program, data: ArrayData | None, loss: Loss | None = None) -> ArrayData | None:
    """Check inputs and, unless the loss is a function of the user's, targets; one small batch is run for that.

    Raises:
        BadData: the inputs or targets do not fit the network or are not finite, or there are too few for one batch.
    """
    if data is None:
        return None
    fitted = check_finite(fit_inputs(program, data))
    if fitted.targets is not None and (loss is None or loss.kind):
        _check_targets(program, fitted, fitted.targets, loss)
    return fitted


def _check_targets(program: Program, data: ArrayData, targets: Tensor, loss: Loss | None) -> None:
    count = pinned_batch(program) or min(2, len(data))
    batch = next(iter(Batches(program, data.first(count), count)), None)
    if batch is None or batch.targets is None:
        raise BadData(f"{data.name}: {len(data)} examples, the network reads {count} at a time; give at least as many")
    with torch.no_grad():
        outputs: tuple[Any, ...] = program.module().run_flat(batch.inputs)
    values = targets.is_floating_point() if loss is None else loss.kind == "mse"
    try:
        if values:
            mean_square(outputs, batch.targets)
            return
        scores, _ = class_scores(outputs, batch.targets)
    except BadData as error:
        raise BadData(f"{data.name}: {error}") from error
    check_targets(targets, scores.shape[1], data.name)
