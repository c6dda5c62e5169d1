"""Batches that a teacher reads, too: each with the same examples as the teacher takes them, or with what it said."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfe_fx.data.dataset import ArrayData
from kfe_fx.program import Program
from kfe_fx.training.batches import Batch, Batches

Ask = Callable[[Batch], tuple[Any, ...]]


@dataclass(frozen=True)
class Lesson(Batch):
    """A batch; ``asked`` holds the same examples for the teacher, ``told`` what it says of them if that is known."""

    asked: Batch | None = None
    told: tuple[Tensor, ...] | None = None

    def rows(self, start: int, stop: int) -> Lesson:
        """Take some of the examples; what does not count examples stays whole."""
        part = super().rows(start, stop)
        stop = min(stop, self.count)
        asked = None if self.asked is None else self.asked.rows(start, stop)
        told = None if self.told is None else tuple(value[start:stop] for value in self.told)
        return Lesson(part.inputs, part.targets, part.count, part.dims, asked, told)


class Lessons(Batches):
    """The batches of ``Batches``, each a ``Lesson``.

    States that were narrowed are cut for the network alone: the teacher gets them as the data has them.
    """

    def __init__(self, program: Program, teacher: Program, data: Any, batch_size: int = 64) -> None:
        """Look at what ``data`` is; see ``Batches``.

        Raises:
            BadData: it is nothing that holds examples.
        """
        super().__init__(program, data, batch_size)
        self._for_teacher = Batches(teacher, self.data, self.batch_size)
        self._known: tuple[Tensor, ...] | None = None

    @property
    def remembered(self) -> bool:
        """Whether lessons come with what the teacher said."""
        return self._known is not None

    def _raw(self, seed: int | None, drop_last: bool) -> Iterable[Any]:
        items = super()._raw(seed, drop_last)
        if self._known is None:
            return ((item, None) for item in items)
        # the order of the examples once more, drawn as that of the data is
        order = ArrayData((torch.arange(len(self.data)),)).batches(self.batch_size, seed, drop_last)
        return ((item, rows) for item, ((rows,), _) in zip(items, order, strict=True))

    def _batch(self, item: Any) -> Lesson:
        given, rows = item
        batch = super()._batch(given)
        told = None if rows is None or self._known is None else tuple(value[rows] for value in self._known)
        return Lesson(batch.inputs, batch.targets, batch.count, batch.dims, self._for_teacher._batch(given), told)

    def remember(self, ask: Ask, seed: int, memory: int, progress: Callable[[float], None]) -> bool:
        """Ask the teacher once about every example, where that changes nothing but the time it takes.

        That is so for whole arrays, whose examples stay the same from epoch to epoch, if the answers take no more than
        ``memory`` bytes, and if the teacher says of an example the same, to the bit, whatever batch it is in: kernels
        may round the rows of a batch differently, and a network may mix its examples. Batches in order are compared
        with the same in another order and with a shuffled one.

        Returns:
            Whether the lessons of later epochs have the answers.
        """
        whole = self.data
        if not isinstance(whole, ArrayData) or any(self._dims) or any(self._for_teacher._dims):
            return False
        size, total = min(self.batch_size, len(whole)), len(whole)
        first = ask(self._ordered(slice(0, size)))
        if not all(isinstance(value, Tensor) and value.dim() and len(value) == size for value in first):
            return False
        if sum(value.nbytes for value in first) / size * total > memory:
            return False
        mixed = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
        if not _same(ask(self._ordered(mixed)), tuple(value[mixed] for value in first)):
            return False
        known = tuple(value.new_empty(total, *value.shape[1:]) for value in first)
        for start in range(0, total, size):
            begin = min(start, total - size)  # every batch of one size: kernels are chosen by it
            for place, value in zip(known, ask(self._ordered(slice(begin, begin + size))), strict=True):
                place[begin : begin + size] = value
            progress((begin + size) / total)
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:size]
        if not _same(ask(self._ordered(order)), tuple(value[order] for value in known)):
            return False
        self._known = known
        return True

    def _ordered(self, rows: Tensor | slice) -> Batch:
        taken = self.data.take(rows)
        return self._for_teacher._batch((taken.inputs, taken.targets))


def _same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return all(torch.equal(first, second) for first, second in zip(one, other, strict=True))
