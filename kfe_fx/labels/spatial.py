"""Pooling and resizing: channels pass, the dims that are pooled over stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from kfe_fx.labels.registry import overloads, rule
from kfe_fx.labels.tracker import Tracker

aten = torch.ops.aten


def _of_rank(rank: int) -> list[Any]:
    return overloads(
        aten,
        *(
            f"max_pool{rank}d avg_pool{rank}d adaptive_avg_pool{rank}d adaptive_max_pool{rank}d "
            f"max_pool{rank}d_with_indices lp_pool{rank}d upsample_nearest{rank}d.vec upsample_nearest{rank}d "
            f"_upsample_nearest_exact{rank}d.vec _upsample_nearest_exact{rank}d reflection_pad{rank}d "
            f"replication_pad{rank}d"
        ).split(),
        *(["upsample_linear1d.vec", "upsample_linear1d"] if rank == 1 else ()),
        *(
            [
                "upsample_bilinear2d.vec",
                "upsample_bilinear2d",
                "upsample_bicubic2d.vec",
                "upsample_bicubic2d",
                "_upsample_bilinear2d_aa.vec",
                "_upsample_bicubic2d_aa.vec",
            ]
            if rank == 2
            else ()
        ),
        *(["upsample_trilinear3d.vec", "upsample_trilinear3d"] if rank == 3 else ()),
    )


def _trace(tracker: Tracker, node: fx.Node, rank: int) -> Any:
    dims = tracker.dims(node.args[0])
    for layers in dims[-rank:]:
        tracker.freeze(layers, node, "is pooled or resized over")
    kept = (*dims[:-rank], *((),) * rank)
    outputs = tracker.fakes[node]
    return [kept for _ in outputs] if isinstance(outputs, list | tuple) else kept


@rule(*_of_rank(1))
def over_one(tracker: Tracker, node: fx.Node) -> Any:
    """Trace pooling or resizing of the last dim."""
    return _trace(tracker, node, 1)


@rule(*_of_rank(2))
def over_two(tracker: Tracker, node: fx.Node) -> Any:
    """Trace pooling or resizing of the last two dims."""
    return _trace(tracker, node, 2)


@rule(*_of_rank(3))
def over_three(tracker: Tracker, node: fx.Node) -> Any:
    """Trace pooling or resizing of the last three dims."""
    return _trace(tracker, node, 3)
