"""Several processes as one: sums are all-reduced, decompositions spread over the ranks."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from kfe_fx.curvature.store import Store


Value = TypeVar("Value")


@dataclass(frozen=True)
class Group:
    """The default process group, or one process alone. Every rank must make the same calls in the same order."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Group:
        """Return the process group that is initialised (``torchrun`` and ``init_process_group``), if any."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def device(self) -> torch.device:
        """Where numbers are summed: NCCL takes nothing but CUDA tensors."""
        if self.size > 1 and dist.get_backend() == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors over all ranks, in place."""
        if self.size > 1:
            for tensor in tensors:
                held = self._taken(tensor)
                dist.all_reduce(held)
                if held is not tensor:
                    tensor.copy_(held)

    def sum_number(self, value: float) -> float:
        """Return the sum of a number over all ranks."""
        if self.size == 1:
            return value
        total = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total)

    def share(self, tensor: Tensor, owner: int) -> None:
        """Give every rank the tensor of ``owner``, in place."""
        if self.size > 1:
            held = self._taken(tensor)
            dist.broadcast(held, owner)
            if held is not tensor:
                tensor.copy_(held)

    def gather(self, value: Any) -> list[Any]:
        """Return the plain values (numbers, texts, small tensors) of all ranks, in their order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def lead(self, work: Callable[[], Value]) -> Value:
        """Do something on rank 0 alone, such as a measurement, and return the (plain) value on all ranks.

        What is raised there is raised everywhere.
        """
        if self.size == 1:
            return work()
        told: list[Any] = [None]
        if self.rank == 0:
            try:
                told = [(work(), None)]
            except Exception as error:  # noqa: BLE001  (it is raised again, everywhere)
                told = [(None, error)]
        dist.broadcast_object_list(told, 0)
        value, error = told[0]
        if error is not None:
            raise error
        return value

    def _taken(self, tensor: Tensor) -> Tensor:
        """Return a tensor that the backend takes: itself, or a copy that is contiguous and on its device."""
        held = tensor if self.device.type == "cpu" else tensor.to(self.device)
        return held.contiguous()


@contextmanager
def joined(**options: Any) -> Iterator[Group]:
    """Join other processes by gloo for the time of a block; ``options`` are those of ``init_process_group``."""
    # Its functions have the default group of the moment of their import as a default argument, and torch.export imports
    # it: the group would outlive the block, and its threads abort the process if they run while the interpreter ends.
    importlib.import_module("torch.distributed.nn")
    dist.init_process_group("gloo", **options)
    try:
        yield Group.current()
    finally:
        dist.destroy_process_group()


@contextmanager
def launched() -> Iterator[Group]:
    """Join the processes that ``torchrun`` started, for the time of a block; without torchrun stay alone."""
    if not dist.is_available() or dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield Group.current()
        return
    with joined() as group:
        yield group


def sum_store(store: Store, *, moments: bool = False) -> None:
    """Add up over all ranks what each has measured: factors and diagonals, or S* (``moments``)."""
    group = Group.current()
    if group.size == 1:
        return
    store.complete(moments=moments)
    keys, counts = ("A", "G", "A1", "G1", "D", "lengths"), ("rows", "examples", "D_examples")
    if moments:
        keys, counts = ("S", "S_ra"), ("S_examples", "batches")
    for block in store.blocks.values():
        group.sum([block.sums[key] for key in keys if key in block.sums])
    told = [[block.counts.get(key, 0.0) for key in counts] for block in store.blocks.values()]
    numbers = torch.tensor(told, dtype=torch.float64, device=group.device)
    group.sum([numbers])
    for block, values in zip(store.blocks.values(), numbers.tolist(), strict=True):
        block.counts |= {key: value for key, value in zip(counts, values, strict=True) if value}


def known_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """Add to the facts of this rank those that others alone know, because it has seen no batch."""
    merged: dict[str, Any] = {}
    for told in reversed(Group.current().gather(facts)):
        merged |= told
    return merged | facts
