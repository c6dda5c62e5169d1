"""One step of each cell, from what the input and the hidden state bring to the gates.

Gate order and equations are those of torch.nn.LSTM, GRU and RNN; ``x`` and ``h`` hold W x + b of either side, [N, g H].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# of c_t on its way out: the identity, or a normalisation
Out = Callable[[Tensor], Tensor]


def lstm(gates: Tensor, c: Tensor, out: Out | None) -> tuple[Tensor, Tensor]:
    """Return m_t = sigm(o) tanh(out(c_t)) and c_t = sigm(f) c_{t-1} + sigm(i) tanh(g), [N, H] each."""
    i, f, g, o = gates.chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c if out is None else out(c)), c


def gru(x: Tensor, h: Tensor, before: Tensor) -> Tensor:
    """Return h_t = (1 - z) n + z h_{t-1} with n = tanh(x_n + r h_n), [N, H]."""
    hidden = before.shape[1]
    r, z = torch.sigmoid(x[:, : 2 * hidden] + h[:, : 2 * hidden]).chunk(2, 1)
    n = torch.tanh(x[:, 2 * hidden :] + r * h[:, 2 * hidden :])
    return n + z * (before - n)


def rnn_tanh(gates: Tensor) -> Tensor:
    """Return tanh(x + h), [N, H]."""
    return torch.tanh(gates)


def rnn_relu(gates: Tensor) -> Tensor:
    """Return relu(x + h), [N, H]."""
    return torch.relu(gates)
