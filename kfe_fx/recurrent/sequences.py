"""Padded batches of sequences, brought into the order in which a recurrence runs, and back.

Steps first, the longest sequence first, each reversed inside its own length where the recurrence runs backwards: then
the sequences that are still alive at step t are the first ``alive[t]`` ones, and no mask is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kfe_fx.errors import BadData


@dataclass(frozen=True)
class Order:
    """How a batch was rearranged.

    ``alive`` [T] counts the sequences at each step, or is None where all are whole; ``index`` [N] are the sequences,
    the longest first; ``steps`` [T, N] the step that stands at each place, or None where none was moved.
    """

    alive: list[int] | None
    index: Tensor | None
    steps: Tensor | None
    flipped: bool

    def counts(self, steps: int, batch: int) -> list[int]:
        """Return how many sequences are alive at each of the steps."""
        return [batch] * steps if self.alive is None else self.alive

    def by_step(self, value: Tensor) -> list[Tensor]:
        """Split [T, N, ...] into the rows [n, ...] that are alive, of every step that has any."""
        return list(by_step([value], self.counts(*value.shape[:2])))

    def rows(self, value: Tensor | None) -> Tensor | None:
        """Rearrange a state or gate [N or 1, ...] as the sequences are."""
        if value is None or self.index is None or (len(value) == 1 and len(self.index) > 1):
            return value
        return value.index_select(0, self.index)

    def rows_back(self, value: Tensor) -> Tensor:
        """Undo ``rows``."""
        if self.index is None or value.dim() < 2:
            return value
        return torch.empty_like(value).index_copy(0, self.index, value)

    def steps_back(self, value: Tensor) -> Tensor:
        """Bring outputs [T, N, ...] back; the permutation of steps is its own inverse."""
        if self.flipped:
            return value.flip(0)
        if self.steps is not None:
            value = value.gather(0, self.steps.unsqueeze(-1).expand_as(value))
        if self.index is not None:
            value = torch.empty_like(value).index_copy(1, self.index, value)
        return value


def by_step(blocks: Iterable[Tensor], counts: list[int]) -> Iterator[Tensor]:
    """Split blocks of steps [k, N, ...] into the rows [n, ...] that are alive, up to the last step that has any."""
    left = iter(counts)
    for block in blocks:
        for rows, count in zip(block.unbind(0), left, strict=False):
            if count == 0:
                return
            yield rows if count == len(rows) else rows[:count]


def arrange(value: Tensor, lengths: Tensor | None, *, reverse: bool) -> tuple[Tensor, Order]:
    """Rearrange inputs [T, N, I].

    Raises:
        BadData: a length below 1 or above T.
    """
    if lengths is None:
        return (value.flip(0) if reverse else value), Order(None, None, None, reverse)
    steps, batch = value.shape[:2]
    check_lengths(lengths, steps)
    lengths, index = torch.sort(lengths.to(value.device), descending=True, stable=True)
    value = value.index_select(1, index)
    moved = None
    if reverse:
        clock = torch.arange(steps, device=value.device).unsqueeze(1).expand(steps, batch)
        moved = torch.where(clock < lengths, lengths - 1 - clock, clock)
        value = value.gather(0, moved.unsqueeze(-1).expand_as(value))
    ends = torch.bincount(lengths, minlength=steps + 1)[: steps + 1]
    alive = (batch - torch.cumsum(ends, 0))[:steps].tolist()  # those with a length above t
    return value, Order(alive, index, moved, False)


def check_lengths(lengths: Tensor, steps: int) -> None:
    """Check the lengths of a batch padded to ``steps``.

    Raises:
        BadData: they are no whole numbers, or one is below 1 or above ``steps``.
    """
    if lengths.is_floating_point() or lengths.dtype is torch.bool:
        raise BadData(f"lengths are whole numbers, got {lengths.dtype}; give how many steps of each sequence count")
    bad = ((lengths < 1) | (lengths > steps)).nonzero()
    if len(bad):
        place = int(bad[0])
        found = int(lengths[place])
        what = "is empty" if found < 1 else f"has {found} steps"
        raise BadData(f"sequence {place} of the batch {what}: lengths are 1 to {steps}, the padded length")


def valid_steps(lengths: Tensor, steps: int) -> Tensor:
    """Return [N, T]: whether a step is no padding."""
    return torch.arange(steps, device=lengths.device).unsqueeze(0) < lengths.unsqueeze(1)
