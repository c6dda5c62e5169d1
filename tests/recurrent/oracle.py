"""Recurrent layers the slow way: a loop over steps and sequences, statistics written out, nothing shared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kfe_fx.recurrent.op import CELLS, Arguments

# By side of the normalisation: of each step, the mean (None: not centred), the biased variance, and which sequences.
Seen = dict[str, dict[int, tuple[Tensor | None, Tensor, int]]]


@dataclass
class Slow:
    """What the operation should return, and the statistics that it met."""

    output: Tensor
    h_n: Tensor
    c_n: Tensor
    met: Seen = field(default_factory=dict)


def slow(call: Arguments) -> Slow:
    """Compute the operation sequence by sequence; ``met`` is filled in training."""
    inputs = call.input if call.batch_first else call.input.transpose(0, 1)
    batch, steps, _ = inputs.shape
    hidden, width = call.weight_hh.shape[0] // CELLS[call.cell], call.weight_hh.shape[1]
    lengths = [steps] * batch if call.lengths is None else call.lengths.tolist()
    h = [inputs.new_zeros(width) if call.h0 is None else call.h0[n] for n in range(batch)]
    c = [inputs.new_zeros(hidden) if call.c0 is None else call.c0[n] for n in range(batch)]
    found = [[inputs.new_zeros(width) for _ in range(steps)] for _ in range(batch)]
    made = Slow(inputs, inputs, inputs)

    def place(n: int, t: int) -> int:
        return lengths[n] - 1 - t if call.reverse else t

    products = {(n, t): call.weight_ih @ inputs[n, place(n, t)] for n in range(batch) for t in range(lengths[n])}
    if call.shared and call.training and call.gamma_ih is not None:
        products = dict(zip(products, _normal(call, "ih", list(products.values()), 0, made.met), strict=True))
    for t in range(steps):
        alive = [n for n in range(batch) if lengths[n] > t]
        if not alive:
            break
        x = [products[n, t] for n in alive]
        if call.gamma_ih is not None and not (call.shared and call.training):
            x = _normal(call, "ih", x, t, made.met)
        side = [call.weight_hh @ h[n] for n in alive]
        if call.gamma_hh is not None:
            side = _normal(call, "hh", side, t, made.met, constant=t == 0 and call.h0 is None)
        x = [one if call.bias_ih is None else one + call.bias_ih for one in x]
        side = [one if call.bias_hh is None else one + call.bias_hh for one in side]
        new = []
        for row, n in enumerate(alive):
            m, c[n] = _cell(call.cell, x[row], side[row], h[n], c[n])
            new.append(m)
        if call.cell == "lstm":
            out = [c[n] for n in alive]
            if call.gamma_c is not None:
                out = _normal(call, "c", out, t, made.met)
                out = [one if call.beta_c is None else one + call.beta_c for one in out]
            new = [m * torch.tanh(one) for m, one in zip(new, out, strict=True)]
        for row, n in enumerate(alive):
            m = new[row]
            m = m if call.cell_gate is None else m * call.cell_gate[n % len(call.cell_gate)]
            m = m if call.weight_hr is None else call.weight_hr @ m
            h[n] = m if call.gate is None else m * call.gate[n % len(call.gate)]
            found[n][place(n, t)] = h[n]
    output = torch.stack([torch.stack(rows) for rows in found])
    made.output = output if call.batch_first else output.transpose(0, 1)
    made.h_n, made.c_n = torch.stack(h), torch.stack(c) if call.cell == "lstm" else inputs.new_empty(0)
    return made


def _cell(cell: str, x: Tensor, side: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Return h (of an LSTM: the output gate alone) and c."""
    if cell == "lstm":
        i, f, g, o = (x + side).chunk(4)
        return torch.sigmoid(o), torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    if cell == "gru":
        (xr, xz, xn), (hr, hz, hn) = x.chunk(3), side.chunk(3)
        r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
        return (1 - z) * torch.tanh(xn + r * hn) + z * h, c
    return (torch.tanh if cell == "rnn_tanh" else torch.relu)(x + side), c


def _normal(
    call: Arguments, side: str, rows: list[Tensor], step: int, met: Seen, *, constant: bool = False
) -> list[Tensor]:
    """Normalise without the bias: with the running row of the step, or with the statistics of these rows."""
    gamma, means, variances = (getattr(call, f"{part}_{side}") for part in ("gamma", "mean", "var"))
    row = min(step, len(variances) - 1)
    centred = side != "c" or call.beta_c is not None
    mean, var = (means[row] if centred else torch.zeros_like(gamma)), variances[row]
    if call.training and not constant and len(rows) > 1:
        values = torch.stack(rows)
        if centred:
            batch_mean = sum(rows) / len(rows)
            batch_var = sum((one - batch_mean) ** 2 for one in rows) / len(rows)
        else:
            batch_mean, batch_var = torch.zeros_like(mean), (values**2).mean().reshape(1)
        varies = batch_var.detach() > 1e-20
        mean = torch.where(varies, batch_mean, mean)
        var = torch.where(varies, batch_var, var)
        met.setdefault(side, {})[step] = (
            batch_mean.detach() if centred else None,
            torch.where(varies, batch_var, torch.nan).detach(),
            len(rows),
        )
    return [(one - mean) / torch.sqrt(var + call.eps) * gamma for one in rows]


def running_after(call: Arguments, met: Seen) -> dict[str, Tensor]:
    """Return the running statistics that one training step should leave, by argument name."""
    batch = call.input.shape[1 - call.time_dim]
    after: dict[str, Any] = {}
    last_met = 0
    for side, steps in met.items():
        variances = getattr(call, f"var_{side}").clone()
        means = getattr(call, f"mean_{side}")
        means = None if means is None else means.clone()
        rows, width = variances.shape
        for row in range(rows):
            mine = [steps[t] for t in steps if min(t, rows - 1) == row]
            for channel in range(width):
                some = [(m, v, n) for m, v, n in mine if not torch.isnan(v[channel])]
                total = sum(n for _, _, n in some)
                if not total:
                    continue
                mean = sum(n * m[channel] for m, _, n in some) / total if means is not None else 0.0
                square = sum(n * (v[channel] + (0.0 if m is None else m[channel] ** 2)) for m, v, n in some) / total
                pace = call.momentum * min(1.0, total / batch)
                variances[row, channel] += pace * (square - mean**2 - variances[row, channel])
                if means is not None:
                    means[row, channel] += pace * (mean - means[row, channel])
        last_met = max(last_met, *(min(t, rows - 1) for t in steps))
        after[f"var_{side}"] = variances
        if means is not None:
            after[f"mean_{side}"] = means
    if call.seen is not None:
        reached = {n: (call.seen[n] > 0) or n <= last_met for n in range(len(call.seen))}
        for name, value in after.items():
            if last_met == 0 and name.endswith("hh"):
                continue
            for row, was in reached.items():
                if not was:
                    value[row] = value[last_met]
    return after
