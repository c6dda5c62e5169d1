"""Batch norms over several processes: each normalises its share with the mean and variance of the whole batch.

While ``SharedNorms`` is on, the batch norms that a training graph calls (``aten.batch_norm`` with statistics of the
batch) sum over the ranks. With x_i the values of one channel on all ranks, M of them, and xhat = (x - mean) / std,

    forward    mean = 1/M sum x_i,   var = 1/M sum (x_i - mean)^2,   running var from M / (M - 1) var
    backward   dx_i = gamma / std * (dy_i - 1/M sum dy - xhat_i / M sum dy xhat)

The gradients dy of rank r are those of the mean loss over its own share, which counts w_r in the loss of the batch
(``average_gradients``). So the sums of the backward pass are weighted by w_r, and what goes back is divided by it.

Batch norms inside recurrent layers stay as they are: each process normalises its own share there.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from kfe_fx.curvature.distributed import Group
from kfe_fx.program import Program, argument
from kfe_fx.recurrent.layers import find_layers
from kfe_fx.training.batches import Batch

OWN_SHARES = (
    "each process normalised its own share of a batch in recurrent layers; rank 0's running statistics were kept"
)
BATCH_NORM = torch.ops.aten.batch_norm.default


def has_live_norms(program: Program) -> bool:
    """Tell whether training normalises with the statistics of the batch, outside of recurrent layers."""
    graph = program.graphs.get("train", program.graphs["eval"])
    return any(argument(node, 5, "training") for node in graph.find_nodes(op="call_function", target=BATCH_NORM))


def has_own_norms(program: Program) -> bool:
    """Tell whether recurrent layers normalise with the statistics of the batch: in a group, of a rank's share."""
    return any(layer.trains for layer in find_layers(program))


def shared_norms(share: Batch, whole: Batch, group: Group, *, coupled: bool) -> AbstractContextManager[Any]:
    """Return the block that a rank runs its share of a batch in: ``SharedNorms`` where norms have it ``coupled``."""
    if group.size == 1 or share.count == whole.count or not coupled:
        return nullcontext()
    return SharedNorms(share.count / whole.count, group)


class SharedNorms(TorchFunctionMode):
    """A block in which batch norms normalise with the statistics of all ranks; each must run the same network in it."""

    def __init__(self, weight: float, group: Group) -> None:
        """Take this rank's weight in the loss of the batch, above zero."""
        super().__init__()
        self.weight, self.group = weight, group

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Take the place of batch norms with live statistics; all else is called as it is."""
        if func is not BATCH_NORM or kwargs or not args[5]:
            return func(*args, **(kwargs or {}))
        x, gamma, beta, mean, var, _, momentum, eps = args[:8]
        return _Norm.apply(x, gamma, beta, mean, var, momentum, eps, self.weight, self.group)


class _Norm(torch.autograd.Function):
    """The norm of one layer; sums over ranks are float64."""

    @staticmethod
    def forward(  # what aten.batch_norm takes, and the share
        ctx: Any,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        weight: float,
        group: Group,
    ) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        dims = [dim for dim in range(x.dim()) if dim != 1]
        own = wide.numel() // x.shape[1]
        sums = torch.cat([wide.sum(dims, dtype=torch.float64), wide.new_tensor([own], dtype=torch.float64)])
        group.sum([sums])
        count = float(sums[-1])
        mean = sums[:-1] / count
        centred = wide - _along(mean, wide)
        squares = centred.square().sum(dims, dtype=torch.float64)
        group.sum([squares])
        var = squares / count
        scale = (var + eps).rsqrt()
        _follow(running_mean, mean, momentum)
        _follow(running_var, squares / max(count - 1, 1), momentum)
        normal = centred * _along(scale, wide)
        ctx.save_for_backward(normal, gamma, scale)
        ctx.told = weight, group, dims, count, x.dtype
        found = normal
        if gamma is not None:
            found = found * _along(gamma, wide)
        if beta is not None:
            found = found + _along(beta, wide)
        return found.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        normal, gamma, scale = ctx.saved_tensors
        weight, group, dims, count, kind = ctx.told
        dy = grads[0].to(normal.dtype)
        plain, along = dy.sum(dims, dtype=torch.float64), (dy * normal).sum(dims, dtype=torch.float64)
        whole = torch.stack([plain, along]) * weight
        group.sum([whole])
        whole /= count * weight
        dx = dy - _along(whole[0], dy) - normal * _along(whole[1], dy)
        dx = dx * _along(scale if gamma is None else scale * gamma, dy)
        by_gamma = None if gamma is None else along.to(gamma.dtype)
        by_beta = plain.to(gamma.dtype if gamma is not None else dy.dtype) if ctx.needs_input_grad[2] else None
        return dx.to(kind), by_gamma, by_beta, *(None,) * 6


def _along(values: Tensor, like: Tensor) -> Tensor:
    """Return one value a channel so that it multiplies [N, C, ...]."""
    return values.to(like.dtype).view(1, -1, *[1] * (like.dim() - 2))


@torch.no_grad()
def _follow(running: Tensor | None, value: Tensor, momentum: float) -> None:
    if running is not None:
        running.mul_(1 - momentum).add_(value.to(running.dtype), alpha=momentum)
