"""The distribution of labels that a network's outputs stand for: drawn from, or taken whole.

Scores [N, C, ...] with C > 1 are logits of a softmax (or already its probabilities); anything else is the mean of a
Gaussian. Token scores [N, T, C] for integer inputs [N, T] have their classes last; where there are class targets, their
shape says which dim the classes are, as it does for the loss. A loss by name ("cross-entropy", "mse") decides instead,
and brings its scale: the loss of an example is the mean over its positions or elements. Positions whose label is -100
have no loss, and so no curvature.

Where there is neither a loss nor a target, every output is to stay what it is: those beside the main one are Gaussians,
the loss of each 1/2 of its mean square change over its variance in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kfe_fx.data.checks import IGNORED
from kfe_fx.errors import BadData, UsageError
from kfe_fx.training.batches import Batch
from kfe_fx.training.losses import Loss, class_scores, floating_outputs, main_output

CATEGORICAL, GAUSSIAN = "categorical", "Gaussian"
MAX_COLUMNS = 1024


class Likelihood:
    """Draw labels and take the negative log-likelihood of them, or go through its whole second derivative."""

    def __init__(self, loss: Loss | None, seed: int, *, main: bool = False) -> None:
        """Take the family from the loss if it is one of ours; draw with ``seed``; ``main``: only of the main output."""
        self.loss = loss
        self.main = main or loss is not None
        self.generator = torch.Generator().manual_seed(seed)
        self.family = {"cross-entropy": CATEGORICAL, "mse": GAUSSIAN}.get(loss.kind, "") if loss is not None else ""
        self._spreads: list[float] = []  # of floating outputs, by their place
        self.classes_last: bool | None = None  # as the targets of a batch said; batches without any go by it

    def total(self, outputs: object, batch: Batch) -> Tensor:
        """Return the sum over examples of -log p(y | x) with y drawn from p( . | x).

        Raises:
            BadData: a loss of the user's own was given, for which no distribution is known.
        """
        values = self.values(outputs)
        total = self._total(values, batch)
        for other, scale in self._scaled(outputs, batch):
            total = total + self._drawn(other, scale)
        return total

    def hold(self, run: Callable[[], object], batch: Batch) -> None:
        """Measure what outputs vary by over a batch whose examples are going to be taken one by one.

        Args:
            run: gives the outputs of the whole batch; it is called where there is something to measure.
            batch: the whole batch.
        """
        if not self.main and batch.targets is None:
            with torch.no_grad():
                self._spreads = [_spread(value) for value in floating_outputs(run())]

    def _scaled(self, outputs: object, batch: Batch) -> Iterator[tuple[Tensor, float]]:
        """Yield the outputs beside the main one with 1 / standard deviation of the labels drawn for them.

        The loss is half the mean square change relative to the variance in the batch.
        """
        for place, other in self._others(outputs, batch).items():
            spread = self._spreads[place] if self._spreads else _spread(other)
            yield other, math.sqrt(batch.count / (other.numel() * spread))

    def _drawn(self, values: Tensor, scale: float) -> Tensor:
        noise = torch.randn(values.shape, dtype=values.dtype, generator=self.generator).to(values.device)
        return 0.5 * ((values - (values.detach() + noise / scale)) ** 2).sum() * scale**2

    def _total(self, values: Tensor, batch: Batch) -> Tensor:
        if self.family == GAUSSIAN:
            return self._drawn(values, self._gaussian_scale(values, batch.count))
        scores = self._scores(values, batch)
        logs = _log_probabilities(scores)
        chances = logs.detach().exp().cpu()
        # scores that are not finite give a loss that is not, whatever label is drawn: whoever measures leaves it out
        chances = chances.where(chances.isfinite().all(1, keepdim=True), 1.0)
        drawn = torch.multinomial(chances, 1, generator=self.generator)[:, 0].to(logs.device)
        ignored = self._ignored(scores, batch)
        if ignored is not None and self.loss is not None and self.loss.positions is not None:
            return F.nll_loss(logs, drawn.masked_fill(ignored, IGNORED), reduction="sum") / self.loss.positions
        return F.nll_loss(logs, drawn, reduction="sum") * batch.count / len(logs)

    def columns(self, outputs: object, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (outputs, S_c) with ``sum_c S_c S_c^T`` the second derivative of each example's loss by its outputs.

        For a softmax S_c = sqrt(p_c) d log p_c / d outputs, so that the sum is diag(p) - p p^T; for a Gaussian of
        variance v unit vectors over sqrt(v). Examples share a column, positions of one example do not.

        Raises:
            BadData: a loss of the user's own was given, for which no distribution is known.
            UsageError: there are more than 1,024 columns.
        """
        values = self.values(outputs)
        _bound(self.size(outputs, batch))
        if self.family == GAUSSIAN:
            yield from _gaussian_columns(values, batch.count, self._gaussian_scale(values, batch.count))
        else:
            yield from self._categorical_columns(values, batch)
        for other, scale in self._scaled(outputs, batch):
            yield from _gaussian_columns(other, batch.count, scale)

    def size(self, outputs: object, batch: Batch) -> int:
        """Count the outputs of one example that labels are drawn for, a column each."""
        return sum(value.numel() for value in self.drawn_for(outputs, batch)) // max(1, batch.count)

    def drawn_for(self, outputs: object, batch: Batch) -> list[Tensor]:
        """Return the outputs that labels are drawn for, the main one first."""
        return [self.values(outputs), *self._others(outputs, batch).values()]

    def _others(self, outputs: object, batch: Batch) -> dict[int, Tensor]:
        """Return the outputs beside the main one by their place, where nothing says which of them count."""
        if self.main or batch.targets is not None:
            return {}
        values = main_output(outputs)
        found = {at: value for at, value in enumerate(floating_outputs(outputs)) if value is not values}
        return {at: value for at, value in found.items() if value.requires_grad and value.numel() % batch.count == 0}

    def _ignored(self, scores: Tensor, batch: Batch) -> Tensor | None:
        """Tell which rows of scores [N * positions, C] have no loss, by their labels."""
        targets = batch.targets
        if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.numel() != len(scores):
            return None
        return (targets.reshape(-1) == IGNORED).to(scores.device)

    def _categorical_columns(self, values: Tensor, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        scores = self._scores(values, batch)
        positions, classes = len(scores) // batch.count, scores.shape[1]
        with torch.no_grad():
            chances = _log_probabilities(scores).exp()
            weight, ignored = (chances / positions).sqrt(), self._ignored(scores, batch)
            if ignored is not None and self.loss is not None and self.loss.positions is not None:
                weight = (chances / self.loss.positions).sqrt().masked_fill(ignored[:, None], 0.0)
            identity = torch.eye(classes, dtype=scores.dtype, device=scores.device)
            if _normalised(scores):
                slopes = identity / chances.clamp_min(torch.finfo(scores.dtype).tiny).unsqueeze(1)
            else:
                slopes = identity - chances.unsqueeze(1)  # [N * positions, class drawn, score]
        for position in range(positions):
            for drawn in range(classes):
                column = torch.zeros_like(scores)
                rows = slice(position, None, positions)
                column[rows] = weight[rows, drawn, None] * slopes[rows, drawn]
                yield scores, column

    def _gaussian_scale(self, values: Tensor, count: int) -> float:
        """Return 1 / standard deviation: the loss (1/O) sum (y - t)^2 is that of a variance O / 2."""
        return 1.0 if self.loss is None else math.sqrt(2.0 * count / values.numel())

    def values(self, outputs: object) -> Tensor:
        """Return the output that the labels are drawn for, and settle the family."""
        if self.loss is not None and not self.family:
            raise BadData(
                f"the loss {self.loss.name!r} needs targets: no distribution of labels is known for it; give targets, "
                "or name cross-entropy or mse"
            )
        values = main_output(outputs)
        if not self.family:
            self.family = CATEGORICAL if values.dim() >= 2 and values.shape[1] > 1 else GAUSSIAN
        return values

    def _scores(self, values: Tensor, batch: Batch) -> Tensor:
        told = _classes_last(values, batch.targets)
        self.classes_last = self.classes_last if told is None else told
        last = _are_tokens(values, batch) if self.classes_last is None else self.classes_last
        scores = values if last else values.movedim(1, -1)
        return scores.reshape(-1, scores.shape[-1])  # [N * positions, C]


def _gaussian_columns(values: Tensor, count: int, scale: float) -> Iterator[tuple[Tensor, Tensor]]:
    flat = values.reshape(count, -1)
    for element in range(flat.shape[1]):
        column = torch.zeros_like(flat)
        column[:, element] = scale
        yield flat, column


def _spread(values: Tensor) -> float:
    """Return the variance, or 1 where there is none."""
    held = values.detach()
    spread = float(held.var(correction=0)) if held.numel() > 1 else 0.0
    return spread if spread > 0 and math.isfinite(spread) else 1.0


def _classes_last(values: Tensor, targets: object) -> bool | None:
    """Tell whether class targets have the shape of scores [N, ..., C]; None where they tell nothing."""
    if not isinstance(targets, Tensor) or targets.is_floating_point():
        return None
    try:
        logits, _ = class_scores(values, targets)
    except BadData:
        return None  # a loss of the user's own takes them
    return values.dim() > 2 and logits is not values


def _are_tokens(values: Tensor, batch: Batch) -> bool:
    whole = [v for v in batch.inputs if isinstance(v, Tensor) and not v.is_floating_point()]
    return values.dim() > 2 and any(v.shape == values.shape[:2] for v in whole)


def _normalised(scores: Tensor) -> bool:
    sums = scores.detach().sum(1)
    return bool((scores >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-4)


def _log_probabilities(scores: Tensor) -> Tensor:
    if _normalised(scores):
        return scores.clamp_min(torch.finfo(scores.dtype).tiny).log()
    return F.log_softmax(scores, 1)


def _bound(columns: int) -> None:
    if columns > MAX_COLUMNS:
        raise UsageError(
            f"the exact Fisher takes one backward pass per output, here {columns} of them; use the source 'sampled'"
        )
