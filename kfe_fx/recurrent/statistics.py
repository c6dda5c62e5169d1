"""Statistics of what a recurrent layer would normalise, over data, while it runs as it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from kfe_fx.recurrent.norms import SIDES
from kfe_fx.recurrent.op import Arguments
from kfe_fx.recurrent.sequences import by_step


class Moments:
    """Mean and variance of rows, added up batch by batch in float64.

    Two parts a, b give M = M_a + M_b + (mean_b - mean_a)^2 n_a n_b / n (Chan, Golub, LeVeque 1983).
    """

    def __init__(self) -> None:
        """Begin without any row."""
        self.count = 0
        self.mean = torch.zeros(())
        self._spread = torch.zeros(())

    def add(self, rows: Tensor) -> None:
        """Add rows [n, C]."""
        rows = rows.detach().double()
        mean = rows.mean(0)
        spread = (rows - mean).square().sum(0)
        if not self.count:
            self.count, self.mean, self._spread = len(rows), mean, spread
            return
        total = self.count + len(rows)
        apart = mean - self.mean
        self._spread = self._spread + spread + apart.square() * (self.count * len(rows) / total)
        self.mean = self.mean + apart * (len(rows) / total)
        self.count = total

    @property
    def var(self) -> Tensor:
        """The biased variance [C]."""
        return self._spread / self.count

    def second(self) -> Tensor:
        """Return the second moment about zero over rows and channels, [1]."""
        return (self.var + self.mean.square()).mean().reshape(1)


class Record:
    """What the products and the cell state of one layer are over all batches."""

    def __init__(self) -> None:
        """Begin without any batch."""
        self.moments = {side: Moments() for side in SIDES}
        self.seen: list[float] = []
        self.varies: set[int] = set()

    @property
    def longest(self) -> int:
        """How many steps the longest batch had."""
        return len(self.seen)

    @property
    def constant_steps(self) -> list[int]:
        """The steps at which no batch had inputs that differ between its sequences."""
        return [step for step, seen in enumerate(self.seen) if seen and step not in self.varies]

    def recorder(self, call: Arguments, counts: list[int]) -> Recorder:
        """Return what looks on while a batch runs."""
        self.seen += [0.0] * (len(counts) - len(self.seen))
        for step, count in enumerate(counts):
            self.seen[step] += count / counts[0]
        return Recorder(self, call, counts)


class Recorder:
    """Norms that change nothing and keep what they see; only valid steps, and no product with the state zero."""

    sides = SIDES

    def __init__(self, record: Record, call: Arguments, counts: list[int]) -> None:
        """Keep in ``record`` what a layer does on a batch."""
        self._record, self._call, self._counts = record, call, counts

    def inputs(self, blocks: Iterable[Tensor], bias: Tensor | None) -> Iterator[Tensor]:
        """Pass on W_ih x_t + b_ih."""
        for step, product in enumerate(by_step(blocks, self._counts)):
            self._record.moments["ih"].add(product)
            if len(product) > 1 and not torch.equal(product[1:], product[:1].expand_as(product[1:])):
                self._record.varies.add(step)
            yield product if bias is None else product + bias

    def hidden(self, product: Tensor, step: int) -> Tensor:
        """Pass on W_hh h_{t-1} + b_hh."""
        if step > 0 or self._call.h0 is not None:
            self._record.moments["hh"].add(product)
        return product if self._call.bias_hh is None else product + self._call.bias_hh

    def cell(self, state: Tensor, step: int) -> Tensor:
        """Pass on c_t."""
        self._record.moments["c"].add(state)
        return state
