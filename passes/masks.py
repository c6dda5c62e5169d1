"""Masks of single weights: chosen by score, kept while a network trains on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kfe_fx.cost.schedule import exponential_schedule
from kfe_fx.program import Program

SCHEDULES = ("exponential", "equal")


def sparsities(sparsity: float, rounds: int, schedule: str = "exponential") -> list[float]:
    """Return the share of weights that is zero after each of pi rounds; the last one is ``sparsity`` exactly.

        exponential   s_k = 1 - (1 - s)^(k / pi)    each round keeps the same fraction of what is left
        equal         s_k = k s / pi                each round removes the same number

    Laurent et al., "Revisiting Loss Modelling for Unstructured Pruning" (2020), section 3.

    Args:
        sparsity: s, above 0 and below 1.
        rounds: pi, at least 1.
        schedule: "exponential" or "equal".
    """
    if schedule == "equal":
        return [*(k * sparsity / rounds for k in range(1, rounds)), sparsity]
    return [*(1 - ratio for ratio in exponential_schedule(1 - sparsity, rounds)[:-1]), sparsity]


def prune_lowest(scores: Mapping[str, Tensor], masks: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Return masks with ``count`` weights out, the lowest scores of all tensors together.

    What is out already stays out, whatever its score (it counts as minus infinity). Of equal scores those go first
    that come first, in the order of ``masks`` and row-major within a tensor.

    Args:
        scores: one finite number per entry, by name of the tensor.
        masks: bool of the same shapes, True where a weight stays.
        count: how many are out afterwards, at least as many as are out now.
    """
    if not count:
        return dict(masks)
    flat = torch.cat([scores[name].masked_fill(~mask, -torch.inf).reshape(-1) for name, mask in masks.items()])
    threshold = flat.kthvalue(count).values
    out = flat < threshold
    ties = (flat == threshold).nonzero().squeeze(1)
    out[ties[: count - int(out.sum())]] = True
    parts = out.split([mask.numel() for mask in masks.values()])
    return {name: ~part.reshape(mask.shape) for (name, mask), part in zip(masks.items(), parts, strict=True)}


@torch.no_grad()
def apply_masks(program: Program, masks: Mapping[str, Tensor]) -> None:
    """Set the weights that are out to zero, in place."""
    for name, mask in masks.items():
        program.tensor(name).masked_fill_(~mask, 0.0)


def hold_masks(optimizer: torch.optim.Optimizer, program: Program, masks: Mapping[str, Tensor]) -> None:
    """Let every step of an optimiser leave the weights that are out at zero.

    Their gradients are zeroed before the step, so that they enter no momentum, no second moment and no norm that
    gradients are clipped by; the weights are set to zero again after it, whatever the step added.
    """

    def before(_optimizer: Any, _args: Any, _kwargs: Any) -> None:
        for name, mask in masks.items():
            gradient = program.tensor(name).grad
            if gradient is not None:
                gradient.masked_fill_(~mask, 0.0)

    def after(_optimizer: Any, _args: Any, _kwargs: Any) -> None:
        apply_masks(program, masks)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
