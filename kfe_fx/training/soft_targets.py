"""Soft targets: the scores of a teacher as a distribution over classes, and how far a network is from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kfe_fx.errors import UsageError
from kfe_fx.training.losses import class_scores


def softened(scores: Tensor, teacher: Tensor, temperature: float = 1.0, counted: Tensor | None = None) -> Tensor:
    """Return ``T² KL( softmax(teacher / T) || softmax(scores / T) )``, the mean over examples and positions.

    Its gradient is that of T² times the cross-entropy to the soft targets, T (softmax(scores / T) - softmax(teacher /
    T)) per position: with T² its size stays from one temperature to the next (Hinton, Vinyals, Dean 2015, section 2).

    Args:
        scores: logits [N, C, ...].
        teacher: logits of the same shape; minus infinity rules a class out.
        temperature: T, above 0.
        counted: which positions count, [N, ...]; all if not given. Where none counts the result is zero.
    """
    logs = F.log_softmax(scores / temperature, 1)
    wanted = F.log_softmax(teacher / temperature, 1)
    chances = wanted.exp()
    each = torch.where(chances > 0, chances * (wanted - logs), 0.0).sum(1)  # [N, ...]
    if counted is None:
        return temperature**2 * each.mean()
    return temperature**2 * torch.where(counted, each, 0.0).sum() / counted.sum().clamp_min(1)


def with_classes(
    scores: Tensor, teacher: Tensor, targets: Tensor | None, ignored: int, inputs: list[Any]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Bring the classes of scores into dim 1, and say which positions count.

    Args:
        scores: [N, C, ...] or [N, ..., C].
        teacher: of the same shape.
        targets: classes [N, ...], which tell the two forms apart; None where there are none.
        ignored: the target of positions that do not count.
        inputs: of the network; without targets integers [N, T] say that the classes of [N, T, C] are last.

    Returns:
        Scores and teacher [N, C, ...], and a mask [N, ...], or None where all count.

    Raises:
        BadData: the targets do not fit.
        UsageError: there are no targets, and nothing says which dim has the classes.
    """
    if targets is not None:
        moved, classes = class_scores(scores, targets)
        return moved, class_scores(teacher, targets)[0], classes != ignored
    tokens = any(isinstance(v, Tensor) and not v.is_floating_point() and v.shape == scores.shape[:2] for v in inputs)
    if scores.dim() > 2 and tokens:
        return scores.movedim(-1, 1), teacher.movedim(-1, 1), None
    if scores.dim() < 2 or scores.dim() == 3 or scores.shape[1] < 2:
        raise UsageError(
            f"which dim of the output {list(scores.shape)} has the classes cannot be told without targets; leave out "
            "the loss, so that scores are compared by mse"
        )
    return scores, teacher, None
