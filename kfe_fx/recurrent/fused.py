"""PyTorch's own kernels of recurrent layers, for one direction of one layer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from kfe_fx.recurrent.sequences import Order


def run_fused(
    cell: str,
    value: Tensor,
    order: Order,
    states: tuple[Tensor, Tensor | None],
    weights: list[Tensor],
    *,
    training: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run a plain layer.

    Args:
        cell: a key of ``op.CELLS``.
        value: inputs [T, N, I] in the order of ``order``.
        order: of the sequences.
        states: h0 [N, P] and, of an LSTM, c0 [N, H].
        weights: weight_ih, weight_hh, then both biases or none, then weight_hr or none.
        training: whether gradients will be asked for.

    Returns:
        Outputs [T, N, P], h_n [N, P], c_n [N, H] or None.
    """
    kernel = getattr(torch, cell)
    held = tuple(state.unsqueeze(0) for state in states if state is not None)
    hidden = held if cell == "lstm" else held[0]
    biased = any(weight.dim() == 1 for weight in weights)
    rest = (weights, biased, 1, 0.0, training, False)
    if order.alive is None:
        found = kernel(value, hidden, *rest, False)
        output = found[0]
    else:
        alive = [count for count in order.alive if count]
        packed = torch.cat(order.by_step(value))
        sizes = torch.tensor(alive)
        found = kernel(packed, sizes, hidden, *rest)
        output, _ = pad_packed_sequence(PackedSequence(found[0], sizes), total_length=len(value))
    return output, found[1].squeeze(0), found[2].squeeze(0) if cell == "lstm" else None
