"""A recurrence step by step: for batch normalisation, gates of single examples, and what looks inside."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kfe_fx.recurrent import cells
from kfe_fx.recurrent.norms import BatchNorms, MakeNorms, Norms, RunningNorms
from kfe_fx.recurrent.op import Arguments
from kfe_fx.recurrent.sequences import Order, by_step

# Steps whose products are made together; the tensors of all 256 at once never stay in a cache and take 1.15 the time.
BLOCK = 32
_ROWS = ("gate", "cell_gate", "bias_ih", "bias_hh", "gamma_ih", "gamma_hh", "gamma_c", "beta_c")


@dataclass(frozen=True)
class Opened:
    """What is added to the products with the recurrent weights, [T, N, ...]; see ``kfe_fx.recurrent.opened``.

    Zeros, through which the gradients of the products leave: the weights themselves are constants then.
    """

    hidden: Tensor
    projected: Tensor | None = None


def run_loop(
    call: Arguments,
    value: Tensor,
    order: Order,
    states: tuple[Tensor, Tensor | None],
    make: MakeNorms | None = None,
    opened: Opened | None = None,
    *,
    products: bool = False,
    cells_out: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run a layer step by step.

    Args:
        call: weights and options; gates, biases and what normalisations scale and shift by may be one row a sequence.
        value: inputs [T, N, I] in the order of ``order``, or W_ih x of them where ``products``.
        order: of the sequences.
        states: h0 [N, P] and, of an LSTM, c0 [N, H].
        make: says what is normalised; None for what ``call`` says, whose running statistics then move in training.
        opened: what is added to the recurrent products, or None.
        products: see ``value``; ``bias_ih`` is added where there is one.
        cells_out: gets what goes into the projection at each step, [n, H].

    Returns:
        Outputs [T, N, P], zero where there is padding; h_n [N, P]; c_n [N, H] or None.
    """
    batch = value.shape[1]
    counts = order.counts(len(value), batch)
    call = replace(call, **{name: _rows(order, getattr(call, name)) for name in _ROWS})
    norms: Norms | None = None
    if make is not None or call.normalised:
        norms = (make or (BatchNorms if call.training else RunningNorms))(call, counts)
    normal = norms is not None and "hh" in norms.sides
    joint = call.cell != "gru"  # the sides only meet in a sum
    bias, bias_hh = call.bias_ih, None if normal else call.bias_hh
    if joint and bias_hh is not None:
        bias, bias_hh = bias_hh if bias is None else bias + bias_hh, None
    shifted = norms is None or "ih" not in norms.sides
    blocks = _products(value, None if products else call.weight_ih, bias if shifted else None)
    x = by_step(blocks, counts) if norms is None or shifted else norms.inputs(blocks, bias)
    weight, gathered = call.weight_hh.t(), None
    if call.training and opened is None and torch.is_grad_enabled() and call.weight_hh.requires_grad:
        weight = weight.detach()
        x = gathered = _Gathering(x, call.weight_hh, zeros=normal or not joint)
    added = None if opened is None else order.by_step(opened.hidden)
    projected = None if opened is None or opened.projected is None else order.by_step(opened.projected)
    h, c = states
    ended: list[tuple[Tensor, Tensor | None]] = []
    outputs = []
    for step, at in enumerate(x):
        count = len(at)
        if count < len(h):  # some sequences are over
            ended.append((h[count:], None if c is None else c[count:]))
            h, c = h[:count], None if c is None else c[:count]
        zero = None if added is None else added[step]
        if gathered is not None:
            gathered.states.append(h.detach())
            zero = gathered.zero
        if norms is not None and normal:
            side = norms.hidden(torch.mm(h, weight) if zero is None else torch.addmm(zero, h, weight), step)
        elif joint:
            side = zero
        else:
            side = torch.mm(h, weight) if zero is None else torch.addmm(zero, h, weight)
            if bias_hh is not None:
                side = side + (bias_hh[:count] if bias_hh.dim() == 2 else bias_hh)
        if not joint:
            assert side is not None
            new = cells.gru(at, side, h)
        else:
            gates = at if side is None else at + side
            gates = gates if normal else torch.addmm(gates, h, weight)
            if c is None:
                new = cells.rnn_tanh(gates) if call.cell == "rnn_tanh" else cells.rnn_relu(gates)
            elif norms is not None and "c" in norms.sides:
                new, c = cells.lstm(gates, c, lambda state, step=step: norms.cell(state, step))
            else:
                new, c = cells.lstm(gates, c, None)
        if call.cell_gate is not None:
            new = new * call.cell_gate[:count]
        if cells_out is not None:
            cells_out.append(new)
        if call.weight_hr is not None:
            new = F.linear(new, call.weight_hr)
            new = new if projected is None else new + projected[step]
        if call.gate is not None:
            new = new * call.gate[:count]
        outputs.append(new if count == batch else F.pad(new, (0, 0, 0, batch - count)))
        h = new
    if make is None and isinstance(norms, BatchNorms):
        norms.update()
    output = torch.stack(outputs)
    if len(output) < len(value):
        output = F.pad(output, (0, 0, 0, 0, 0, len(value) - len(output)))
    if ended:
        h = torch.cat([h, *(last for last, _ in reversed(ended))])
        c = None if c is None else torch.cat([c, *(last for _, last in reversed(ended) if last is not None)])
    return output, h, c


def _rows(order: Order, value: Tensor | None) -> Tensor | None:
    return order.rows(value) if value is not None and value.dim() == 2 else value


def _products(value: Tensor, weight: Tensor | None, bias: Tensor | None) -> Iterator[Tensor]:
    """Yield W x_t + b of blocks of steps [k, N, g H]; without a weight ``value`` holds W x_t."""
    for block in value.split(BLOCK):
        if weight is not None:  # in memory the sequences come first: so one batch norm can take all steps
            block = F.linear(block.transpose(0, 1), weight, bias).transpose(0, 1)
        elif bias is not None:
            block = block + bias
        yield block


class _Gathering:
    """Pass on what comes to each step, and gather the gradient of W_hh block by block.

    Each step's own contribution dG_t^T h_{t-1} is as large as the weight; of a block it is one product. With ``zeros``
    the steps' products take the gradient along by zeros that are added to them, else by what comes to the step.
    """

    def __init__(self, steps: Iterable[Tensor], weight: Tensor, *, zeros: bool) -> None:
        self.steps, self.weight, self.zeros = steps, weight, zeros
        self.states: list[Tensor] = []
        self.zero: Tensor | None = None

    def __iter__(self) -> Iterator[Tensor]:
        steps = iter(self.steps)
        while block := list(islice(steps, BLOCK)):
            self.states = []
            if self.zeros:
                nothing = block[0].new_zeros(())
                zeros = [nothing.expand(len(at), len(self.weight)) for at in block]
                gathered: Any = _Gathered.apply(self.weight, self.states, *zeros)
                for at, zero in zip(block, gathered, strict=True):
                    self.zero = zero
                    yield at
            else:
                yield from _Gathered.apply(self.weight, self.states, *block)


class _Gathered(torch.autograd.Function):
    """The identity on tensors [n_t, g H] whose gradients, times the states [n_t, P], are that of a weight [g H, P]."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, states: list[Tensor], *steps: Tensor) -> tuple[Tensor, ...]:
        ctx.states = states  # filled while the steps run
        return steps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.cat(grads).t() @ torch.cat(ctx.states), None, *grads
