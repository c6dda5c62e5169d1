"""One step in several processes: each takes its share of every batch, gradients become those of the whole batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kfe_fx.curvature.distributed import Group
from kfe_fx.data.dataset import ArrayData
from kfe_fx.errors import UsageError
from kfe_fx.program import Program, named_tensors
from kfe_fx.training.batches import Batch, Batches, pinned_batch

BUCKET = 32 << 20  # bytes of gradients summed at a time


def check_shared(batches: Batches, group: Group) -> None:
    """Refuse what cannot be shared between processes.

    Raises:
        UsageError: the network pins its batch, or the order of the batches is not known to every process.
    """
    if group.size == 1:
        return
    pinned = pinned_batch(batches.program)
    if pinned is not None:
        raise UsageError(f"this network pins its batch at {pinned}, which cannot be shared by {group.size} processes")
    if not isinstance(batches.data, ArrayData | torch.utils.data.Dataset):
        raise UsageError(
            "several processes must see the batches in one order: give arrays or a Dataset, not ready-made batches"
        )


def share_of(batch: Batch, group: Group) -> Batch:
    """Return this rank's part of a batch; parts differ by one example at most, and later ranks may have none."""
    if group.size == 1:
        return batch
    start, stop = (-(-batch.count * rank // group.size) for rank in (group.rank, group.rank + 1))
    return batch.rows(start, stop)


def weighted_share(batch: Batch, group: Group, *, coupled: bool) -> tuple[Batch, float]:
    """Return this rank's part of a batch, and what it counts in the loss of the batch.

    Where a norm has ``coupled`` the examples every rank must run the network. A batch of fewer examples than there are
    ranks is done by each of them as a whole.
    """
    if coupled and batch.count < group.size:
        return batch, 1 / group.size
    share = share_of(batch, group)
    return share, share.count / batch.count


def stress_of(share: Batch, batch: Batch, ignored: int) -> float:
    """Return what a mean over the labels that count counts more in a rank's part than the mean over examples does.

        (labels of the part that count / its examples) / (labels of the batch that count / its examples)

    One where no label is ``ignored``.
    """
    if not isinstance(batch.targets, Tensor) or batch.targets.is_floating_point() or not share.count:
        return 1.0
    valid, whole = (int((part.targets != ignored).sum()) for part in (share, batch))
    return valid / share.count / (whole / batch.count) if whole else 1.0


def average_gradients(parameters: Sequence[nn.Parameter], weight: float, group: Group) -> None:
    """Replace each gradient by its mean over the ranks, in place.

        p.grad = sum over ranks r of  weight_r * p.grad_r,  weight_r as ``weighted_share`` tells

    A gradient that is missing on some ranks counts as zero there; one that is missing on all stays so.
    """
    if group.size == 1:
        return
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=group.device)
    group.sum([present])
    buckets: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for parameter, ranks in zip(parameters, present.tolist(), strict=True):
        if not ranks:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        elif parameter.grad.is_sparse:
            parameter.grad = parameter.grad.to_dense()
        parameter.grad.mul_(weight)
        held = buckets.setdefault((parameter.grad.dtype, parameter.grad.device), [])
        held.append(parameter.grad)
        if sum(grad.numel() * grad.element_size() for grad in held) >= BUCKET:
            _sum_flat(held, group)
            held.clear()
    for held in buckets.values():
        _sum_flat(held, group)


def _sum_flat(tensors: list[Tensor], group: Group) -> None:
    if not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    group.sum([flat])
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view(tensor.shape))


def share_tensors(program: Program, group: Group, *, buffers_only: bool = False) -> None:
    """Give every rank the tensors of rank 0, in place: all of them, or those that are no parameters."""
    if group.size == 1:
        return
    with torch.no_grad():
        for value in {id(value): value for value in named_tensors(program.module()).values()}.values():
            if not (buffers_only and isinstance(value, nn.Parameter)):
                group.share(value.detach(), 0)
