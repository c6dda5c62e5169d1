"""How one call of the operation is computed: checks, order of the sequences, which implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from kfe_fx.errors import UsageError
from kfe_fx.recurrent.fused import run_fused
from kfe_fx.recurrent.loop import run_loop
from kfe_fx.recurrent.norms import SIDES, MakeNorms, folded
from kfe_fx.recurrent.op import CELLS, Arguments
from kfe_fx.recurrent.sequences import arrange


def run(call: Arguments, norms: MakeNorms | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the operation; see ``kfe_fx.recurrent.op.recurrent``.

    Args:
        call: what it takes.
        norms: makes what is done to the products instead of what ``call`` says, for who measures; running statistics
            then stay as they are.
    """
    check(call)
    if norms is None and not call.training:
        call = folded(call)
    value = call.input.transpose(0, 1) if call.batch_first else call.input
    value, order = arrange(value, call.lengths, reverse=call.reverse)
    h0, c0 = (order.rows(state) for state in initial(call, value))
    assert h0 is not None
    weights = [call.weight_ih, call.weight_hh, *biases(call), *([] if call.weight_hr is None else [call.weight_hr])]
    held = [one for one in (value, h0, c0, *weights) if one is not None]
    training = torch.is_grad_enabled() and any(one.requires_grad for one in held)
    # On a CPU the kernel of packed sequences keeps a whole batch for each step of the backward pass: at 256 steps it
    # takes four times as long as the loop.
    padded = training and order.alive is not None and value.device.type == "cpu"
    gated = call.gate is not None or call.cell_gate is not None
    # PyTorch's kernel tells a projection from none by the widths, and takes one onto as many units for none
    square = call.weight_hr is not None and call.weight_hr.shape[0] == call.weight_hr.shape[1]
    if norms is not None or call.normalised or gated or padded or square:
        output, h_n, c_n = run_loop(call, value, order, (h0, c0), norms)
    else:
        output, h_n, c_n = run_fused(call.cell, value, order, (h0, c0), weights, training=training)
    output = order.steps_back(output)
    if call.batch_first:
        output = output.transpose(0, 1)
    return output, order.rows_back(h_n), value.new_empty(0) if c_n is None else order.rows_back(c_n)


def initial(call: Arguments, value: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the first states, zeros where none are given."""
    batch, hidden = value.shape[1], call.weight_hh.shape[0] // CELLS[call.cell]
    h0 = value.new_zeros(batch, call.weight_hh.shape[1]) if call.h0 is None else call.h0
    if call.cell != "lstm":
        return h0, None
    return h0, value.new_zeros(batch, hidden) if call.c0 is None else call.c0


def biases(call: Arguments) -> list[Tensor]:
    """Return both biases, zeros for one that is missing beside the other, or none."""
    given = [call.bias_ih, call.bias_hh]
    if all(bias is None for bias in given):
        return []
    zeros = call.weight_ih.new_zeros(len(call.weight_ih))
    return [zeros if bias is None else bias for bias in given]


def check(call: Arguments) -> None:
    """Check that the shapes fit each other.

    Raises:
        UsageError: they do not.
    """
    value, batch_dim = call.input, 1 - call.time_dim
    if value.dim() != 3 or value.shape[2] != call.weight_ih.shape[1]:
        raise UsageError(
            f"a recurrent layer of {call.weight_ih.shape[1]} inputs got {list(value.shape)}; "
            f"give {'[batch, time' if call.batch_first else '[time, batch'}, {call.weight_ih.shape[1]}]"
        )
    if value.shape[call.time_dim] == 0:
        raise UsageError("a recurrent layer got a sequence of length 0; give at least one step")
    batch = value.shape[batch_dim]
    hidden = call.weight_hh.shape[0] // CELLS[call.cell]
    for name, state, size in (("hidden", call.h0, call.weight_hh.shape[1]), ("cell", call.c0, hidden)):
        if state is not None and tuple(state.shape) != (batch, size):
            raise UsageError(f"the {name} state of a recurrent layer is [{batch}, {size}], got {list(state.shape)}")
    if call.lengths is not None and tuple(call.lengths.shape) != (batch,):
        raise UsageError(f"lengths are one number a sequence, [{batch}], got {list(call.lengths.shape)}")
    for side in SIDES:
        _check_side(call, side, hidden)
    if call.seen is not None and call.shared and len(call.seen) > 1:
        raise UsageError(f"statistics that all steps share have one row, got {len(call.seen)}")


def _check_side(call: Arguments, side: str, hidden: int) -> None:
    gamma, mean, var = (getattr(call, f"{part}_{side}") for part in ("gamma", "mean", "var"))
    if gamma is None:
        return
    if side == "c" and call.cell != "lstm":
        raise UsageError(f"the cell state of a {call.cell} cannot be normalised: it has none")
    scalar = side == "c" and call.beta_c is None
    width = 1 if scalar else hidden if side == "c" else len(call.weight_hh)
    for name, value in (("var", var), ("mean", mean)):
        if value is None and not (scalar and name == "mean"):
            raise UsageError(f"gamma_{side} of a recurrent layer comes with {name}_{side}, which is missing")
        if value is not None and (value.dim() != 2 or value.shape[1] != width or len(value) == 0):
            raise UsageError(f"{name}_{side} of a recurrent layer is [rows, {width}], got {list(value.shape)}")
    if gamma.shape[-1] != width:
        raise UsageError(f"gamma_{side} of a recurrent layer is [{width}], got {list(gamma.shape)}")
