"""Several processes as one: sums are all-reduced, decompositions spread over the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from kfe_fx.curvature.store import Store


@dataclass(frozen=True)
class Group:
    """The default process group, or one process alone."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Group:
        """Return the process group that is initialised (``torchrun`` and ``init_process_group``), if any."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors over all ranks, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def sum_number(self, value: float) -> float:
        """Return the sum of a number over all ranks."""
        if self.size == 1:
            return value
        total = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(total)
        return float(total)

    def share(self, tensor: Tensor, owner: int) -> None:
        """Give every rank the tensor of ``owner``, in place."""
        if self.size > 1:
            dist.broadcast(tensor, owner)


def sum_store(store: Store, *, moments: bool = False) -> None:
    """Add up over all ranks what each has measured: factors and diagonals, or S* (``moments``)."""
    group = Group.current()
    if group.size == 1:
        return
    store.complete(moments=moments)
    for block in store.blocks.values():
        for key in ("S",) if moments else ("A", "G", "D"):
            if key in block.sums:
                group.sum([block.sums[key]])
        for key in ("S_examples",) if moments else ("rows", "examples", "D_examples"):
            block.counts[key] = group.sum_number(block.counts.get(key, 0.0))
