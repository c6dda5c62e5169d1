"""Labels drawn from the network's own output distribution: the Fisher of the model, not the empirical one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kfe_fx.errors import BadData
from kfe_fx.training.batches import Batch
from kfe_fx.training.losses import Loss, main_output

CATEGORICAL, GAUSSIAN = "categorical", "Gaussian"


class Sampler:
    """Draw labels and take the negative log-likelihood of them.

    Scores [N, C, ...] with C > 1 are logits of a softmax (or already its probabilities); anything else is the mean of a
    Gaussian of variance one. Token scores [N, T, C] for integer inputs [N, T] have their classes last. A loss by name
    ("cross-entropy", "mse") decides instead.
    """

    def __init__(self, loss: Loss | None, seed: int) -> None:
        """Take the family from the loss if it is one of ours; draw with ``seed``."""
        self.loss = loss
        self.generator = torch.Generator().manual_seed(seed)
        self.family = {"cross-entropy": CATEGORICAL, "mse": GAUSSIAN}.get(loss.name, "") if loss is not None else ""

    def total(self, outputs: object, batch: Batch) -> Tensor:
        """Return the sum over examples of -log p(y | x) with y drawn from p( . | x).

        Raises:
            BadData: a loss of the user's own was given, for which no distribution is known.
        """
        if self.loss is not None and not self.family:
            raise BadData(
                f"the loss {self.loss.name!r} needs targets, and the data has none; give targets or no --loss"
            )
        values = main_output(outputs)
        if not self.family:
            self.family = CATEGORICAL if values.dim() >= 2 and values.shape[1] > 1 else GAUSSIAN
        if self.family == GAUSSIAN:
            noise = torch.randn(values.shape, dtype=values.dtype, generator=self.generator)
            return 0.5 * ((values - (values.detach() + noise)) ** 2).sum()
        return self._categorical(values, batch)

    def _categorical(self, values: Tensor, batch: Batch) -> Tensor:
        tokens = any(
            isinstance(v, Tensor) and not v.is_floating_point() and v.shape == values.shape[:2] for v in batch.inputs
        )
        scores = values if values.dim() > 2 and tokens else values.movedim(1, -1)
        scores = scores.reshape(-1, scores.shape[-1])  # [N * positions, C]
        sums = scores.detach().sum(1)
        normalised = bool((scores >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-4)
        logs = scores.clamp_min(torch.finfo(scores.dtype).tiny).log() if normalised else F.log_softmax(scores, 1)
        drawn = torch.multinomial(logs.detach().exp(), 1, generator=self.generator)[:, 0]
        return F.nll_loss(logs, drawn, reduction="sum") * batch.count / len(logs)
