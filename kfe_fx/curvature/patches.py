"""Patches of a convolution in the order of its weight, in any number of spatial dims."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def patches(
    value: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
    out: tuple[int, ...],
    groups: int = 1,
    *,
    ones: bool = False,
) -> Tensor:
    """Gather what each output position reads.

    Args:
        value: [M, C, *S].
        kernel: its size per spatial dim.
        stride: the same.
        padding: zeros before and after, per spatial dim.
        dilation: per spatial dim.
        out: output positions per spatial dim.
        groups: K, of C / K channels each.
        ones: whether to append a row of ones, for the bias.

    Returns:
        [K, i, M, R]: i counts (channel of the group, kernel position) as ``weight.view(o, -1)`` does, R output
        positions.
    """
    if any(before or after for before, after in padding):
        value = F.pad(value, [amount for pair in reversed(padding) for amount in pair])
    value = value.contiguous()
    examples, channels = value.shape[:2]
    steps = value.stride()
    inner = channels // groups
    sizes = (groups, inner, *kernel, examples, *out)
    strides = (
        steps[1] * inner,
        steps[1],
        *(step * by for step, by in zip(steps[2:], dilation, strict=True)),
        steps[0],
        *(step * by for step, by in zip(steps[2:], stride, strict=True)),
    )
    view = value.as_strided(sizes, strides)
    width = inner
    for size in kernel:
        width *= size
    positions = 1
    for size in out:
        positions *= size
    made = torch.empty(groups, width + ones, examples, positions, dtype=value.dtype, device=value.device)
    made[:, :width].view(sizes).copy_(view)
    if ones:
        made[:, width] = 1.0
    return made
