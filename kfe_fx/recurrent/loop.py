"""A recurrence step by step: for batch normalisation, gates of single examples, and what looks inside.

The input's part of all steps is one product before the loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kfe_fx.recurrent import cells
from kfe_fx.recurrent.op import Arguments
from kfe_fx.recurrent.sequences import Order


class Norms(Protocol):
    """What is done to the products and the cell state; the first ``n`` rows are the sequences alive at a step."""

    def inputs(self, products: Tensor) -> Tensor:
        """Normalise W_ih x of all steps [T, N, g H], with nothing added yet."""
        ...

    def hidden(self, product: Tensor, step: int) -> Tensor:
        """Normalise W_hh h_{t-1} of one step [n, g H], with nothing added yet."""
        ...

    def cell(self, state: Tensor, step: int) -> Tensor:
        """Normalise c_t on its way out [n, H]."""
        ...


@dataclass(frozen=True)
class Opened:
    """The products with the recurrent weights as values from outside, [T, N, ...]; see ``kfe_fx.recurrent.opened``.

    Step t takes ``hidden[t] + W_hh (h_{t-1} - before[t])``, which has the value of W_hh h_{t-1} + b_hh where
    ``before`` holds the states, and lets the gradient of the weight come through ``hidden`` alone; likewise
    ``projected`` and ``cells`` for a projection.
    """

    hidden: Tensor
    before: Tensor
    projected: Tensor | None = None
    cells: Tensor | None = None


def run_loop(
    call: Arguments,
    value: Tensor,
    order: Order,
    states: tuple[Tensor, Tensor | None],
    norms: Norms | None,
    opened: Opened | None = None,
    *,
    products: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run a layer step by step.

    Args:
        call: weights and options.
        value: inputs [T, N, I] in the order of ``order``, or W_ih x + b_ih of them where ``products``.
        order: of the sequences.
        states: h0 [N, P] and, of an LSTM, c0 [N, H].
        norms: what is normalised, or None.
        opened: the recurrent products from outside, or None.
        products: see ``value``.

    Returns:
        Outputs [T, N, P], zero where there is padding; h_n [N, P]; c_n [N, H] or None.
    """
    h, c = states
    gate, cell_gate = order.rows(call.gate), order.rows(call.cell_gate)
    x = value if products else F.linear(value, call.weight_ih)  # [T, N, g H]
    if norms is not None and call.gamma_ih is not None:
        x = norms.inputs(x)
    if not products and call.bias_ih is not None:
        x = x + call.bias_ih
    joint = call.cell != "gru"  # the sides only meet in a sum
    bias = call.bias_hh if opened is None else None
    if joint and bias is not None:
        x, bias = x + bias, None
    normal = norms is not None and call.gamma_hh is not None
    weight = call.weight_hh.t()
    out = (lambda state: norms.cell(state, step)) if norms is not None and call.gamma_c is not None else None
    outputs = []
    batch = value.shape[1]
    for step, at in enumerate(x.unbind(0)):
        count = batch if order.alive is None else order.alive[step]
        if count == 0:
            break
        whole, cell_before = h, c
        if count < batch:
            at, h = at[:count], h[:count]
            c = None if c is None else c[:count]
        if opened is not None:
            side = opened.hidden[step, :count] + torch.mm(h - opened.before[step, :count], weight)
        elif joint and not normal:
            side = None
        else:
            side = torch.mm(h, weight)
        if normal:
            assert side is not None
            assert norms is not None
            side = norms.hidden(side, step)
        if joint:
            gates = torch.addmm(at, h, weight) if side is None else at + side
            if call.cell == "lstm":
                assert c is not None
                new, c = cells.lstm(gates, c, out)
            else:
                new = cells.rnn_tanh(gates) if call.cell == "rnn_tanh" else cells.rnn_relu(gates)
        else:
            assert side is not None
            new = cells.gru(at, side if bias is None else side + bias, h)
        if cell_gate is not None:
            new = new * cell_gate[:count]
        if call.weight_hr is not None:
            new = _projected(new, call.weight_hr, opened, step, count)
        if gate is not None:
            new = new * gate[:count]
        outputs.append(new if count == batch else F.pad(new, (0, 0, 0, batch - count)))
        if count < batch:
            h = torch.cat([new, whole[count:]])
            c = None if cell_before is None or c is None else torch.cat([c, cell_before[count:]])
        else:
            h = new
    output = torch.stack(outputs)
    if len(output) < len(value):
        output = F.pad(output, (0, 0, 0, 0, 0, len(value) - len(output)))
    return output, h, c


def _projected(new: Tensor, weight: Tensor, opened: Opened | None, step: int, count: int) -> Tensor:
    if opened is None or opened.projected is None or opened.cells is None:
        return F.linear(new, weight)
    return opened.projected[step, :count] + F.linear(new - opened.cells[step, :count], weight)
