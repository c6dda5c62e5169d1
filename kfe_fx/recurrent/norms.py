"""Batch normalisation inside a recurrence, of the products with either weight and of the cell state on its way out.

    gates_t = BN(W_ih x_t; gamma_ih, b_ih) + BN(W_hh h_{t-1}; gamma_hh, b_hh)
    h_t = o tanh(BN(c_t; gamma_c, beta_c))

(Cooijmans et al. 2017; on the input side alone: Laurent et al. 2016.) Running statistics have one row a step, or one
row for all; variances are biased in both. Step t reads row min(t, rows - 1).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kfe_fx.errors import BadData
from kfe_fx.recurrent.op import Arguments
from kfe_fx.recurrent.sequences import by_step

SIDES = ("ih", "hh", "c")


class Norms(Protocol):
    """What is done to the products and the cell state of the n sequences that are alive at a step."""

    @property
    def sides(self) -> Collection[str]:
        """Which of SIDES are normalised, and so which of the methods are called."""
        ...

    def inputs(self, blocks: Iterable[Tensor], bias: Tensor | None) -> Iterable[Tensor]:
        """Normalise W_ih x_t of all steps, in blocks [k, N, g H], and add ``bias``: one [n, g H] a step."""
        ...

    def hidden(self, product: Tensor, step: int) -> Tensor:
        """Normalise W_hh h_{t-1} of one step [n, g H] and add b_hh."""
        ...

    def cell(self, state: Tensor, step: int) -> Tensor:
        """Normalise c_t on its way out [n, H]."""
        ...


# of the arguments of a layer, and of how many sequences are alive at each step
MakeNorms = Callable[[Arguments, list[int]], Norms]


@dataclass(frozen=True)
class Pooled:
    """Statistics of a batch for the first rows of the running ones.

    ``mean`` (None where nothing is centred) and ``var`` [rows, C]; ``weight`` [rows, 1 or C], valid rows of the batch.
    """

    mean: Tensor | None
    var: Tensor
    weight: Tensor


def scale_of(gamma: Tensor, var: Tensor, eps: float) -> Tensor:
    """Return gamma / sqrt(var + eps), [rows, C]."""
    return gamma * torch.rsqrt(var + eps)


def shared_rows(*tables: Tensor) -> bool:
    """Tell whether all rows of each table of running statistics are equal: all steps then share the first."""
    return all(bool((table == table[:1]).all()) for table in tables)


def folded(call: Arguments) -> Arguments:
    """Fold what is normalised by one row of running statistics into the weights; what is not stays.

    BN(W x; gamma, b) = (s W) x + (b - s mean) with s = gamma / sqrt(var + eps): either side has its own bias.
    """
    for side in ("ih", "hh"):
        gamma, mean, var = (getattr(call, f"{part}_{side}") for part in ("gamma", "mean", "var"))
        if gamma is None or len(var) > 1:
            continue
        weight, bias = getattr(call, f"weight_{side}"), getattr(call, f"bias_{side}")
        scale = scale_of(gamma, var[0], call.eps)  # [g H]
        shift = -scale * mean[0] if bias is None else bias - scale * mean[0]
        gone = {f"{part}_{side}": None for part in ("gamma", "mean", "var")}
        call = replace(call, **{f"weight_{side}": scale.unsqueeze(1) * weight, f"bias_{side}": shift}, **gone)
    return call


def pool(mean: Tensor | None, var: Tensor, weight: Tensor, rows: int) -> Pooled:
    """Pool statistics of steps into ``rows`` rows: the last one takes all steps that are left, by total variance.

    With weights w_t: mean = sum w_t mean_t / sum w_t, var = sum w_t (var_t + (mean_t - mean)^2) / sum w_t.

    Args:
        mean: [T, C], or None where variances are second moments about zero.
        var: [T, C], biased.
        weight: [T, 1] or [T, C].
        rows: at most how many rows are asked for.
    """
    if len(var) <= rows:
        return Pooled(mean, var, weight)
    head, tail = slice(0, rows - 1), slice(rows - 1, None)
    share = weight[tail]
    total = share.sum(0, keepdim=True)
    share = share / total.clamp(min=torch.finfo(var.dtype).tiny)  # [T - rows + 1, 1 or C]
    spread = var[tail]
    if mean is not None:
        center = (share * mean[tail]).sum(0, keepdim=True)
        spread = spread + (mean[tail] - center).square()
        mean = torch.cat([mean[head], center])
    var = torch.cat([var[head], (share * spread).sum(0, keepdim=True)])
    return Pooled(mean, var, torch.cat([weight[head], total]))


class _Side:
    """One normalisation: what it scales and shifts by, [C] or one row a sequence, and its running statistics."""

    def __init__(self, call: Arguments, side: str, bias: Tensor | None) -> None:
        self.gamma: Tensor = getattr(call, f"gamma_{side}")
        self.bias = bias
        self.mean: Tensor | None = getattr(call, f"mean_{side}")
        self.var: Tensor = getattr(call, f"var_{side}")
        self.eps = call.eps
        self._scales: list[Tensor] | None = None
        self._shifts: list[Tensor] = []

    @property
    def by_sequence(self) -> bool:
        """Whether each sequence has a scale of its own."""
        return self.gamma.dim() == 2

    def affine(self, value: Tensor) -> Tensor:
        """Scale and shift each sequence by its own row."""
        value = value * self.gamma[: len(value)]
        return value if self.bias is None else value + self.bias[: len(value)]

    def running(self, value: Tensor, step: int, *, affine: bool = True) -> Tensor:
        """Normalise [n, C] with the running statistics of a step."""
        if self._scales is None:
            scale = torch.rsqrt(self.var + self.eps) if self.by_sequence else scale_of(self.gamma, self.var, self.eps)
            shift = None if self.mean is None else -self.mean * scale
            if self.bias is not None and not self.by_sequence:
                shift = self.bias.expand_as(scale) if shift is None else shift + self.bias
            self._scales = list(scale.unbind(0))
            self._shifts = [] if shift is None else list(shift.unbind(0))
        row = min(step, len(self._scales) - 1)
        scale = self._scales[row]
        value = torch.addcmul(self._shifts[row], value, scale) if self._shifts else value * scale
        return self.affine(value) if affine and self.by_sequence else value


class RunningNorms:
    """Normalisation with the running statistics: in evaluation, and in training where they are frozen."""

    def __init__(self, call: Arguments, counts: list[int]) -> None:
        """Take the layer's scales, shifts and statistics, and how many sequences are alive at each step."""
        self.call, self.counts = call, counts
        self.sides = [side for side in SIDES if getattr(call, f"gamma_{side}") is not None]
        biases = {"hh": call.bias_hh, "c": call.beta_c}
        self._held = {side: _Side(call, side, biases[side]) for side in self.sides if side != "ih"}

    def inputs(self, blocks: Iterable[Tensor], bias: Tensor | None) -> Iterator[Tensor]:
        """Normalise each step with its row."""
        side = _Side(self.call, "ih", bias)
        for step, product in enumerate(by_step(blocks, self.counts)):
            yield side.running(product, step)

    def hidden(self, product: Tensor, step: int) -> Tensor:
        """Normalise with the row of the step."""
        return self._held["hh"].running(product, step)

    def cell(self, state: Tensor, step: int) -> Tensor:
        """Normalise with the row of the step."""
        return self._held["c"].running(state, step)


class _Batch(_Side):
    """A normalisation with the statistics of the batch, and what these were at each step."""

    def __init__(self, call: Arguments, side: str, bias: Tensor | None, steps: int) -> None:
        super().__init__(call, side, bias)
        self.centred = side != "c" or call.beta_c is not None
        # zeros, not empty: F.batch_norm adds 0 times what was there
        self.means, self.variances = (self.var.new_zeros(steps, self.var.shape[1]) for _ in range(2))
        self._at = list(zip(self.means.unbind(0), self.variances.unbind(0), strict=True))
        self.weights = [0.0] * steps
        self.flat: dict[int, Tensor] = {}

    def batch(self, value: Tensor, step: int, *, affine: bool = True) -> Tensor:
        """Normalise [n, C] with its own mean and variance over n.

        Channels that do not vary, and a single sequence, are normalised with the running statistics instead: of a
        variance of zero the gradient is 1 / sqrt(eps) times too long or not a number.
        """
        count = len(value)
        if count < 2:
            return self.running(value, step, affine=affine)
        self.weights[step] = count
        if not self.centred:
            return self._scaled(value, step)
        mean, var = self._at[step]
        inside = affine and not self.by_sequence
        gamma, bias = (self.gamma, self.bias) if inside else (None, None)
        found = F.batch_norm(value, mean, var, gamma, bias, True, 1.0, self.eps)
        flat = self._flat(mean, var)
        if flat is not None:
            self.flat[step] = flat
            found = torch.where(flat, self.running(value, step, affine=inside), found)
        return self.affine(found) if affine and self.by_sequence else found

    def block(self, value: Tensor, start: int) -> Tensor:
        """Do ``batch`` for all steps of [k, N, C] at once: they are channels of one batch norm."""
        steps, count, width = value.shape
        stop = start + steps
        self.weights[start:stop] = [count] * steps
        mean, var = self.means[start:stop].view(-1), self.variances[start:stop].view(-1)
        rows = value.transpose(0, 1).reshape(count, steps * width)
        gamma, bias = self.gamma.repeat(steps), None if self.bias is None else self.bias.repeat(steps)
        found = F.batch_norm(rows, mean, var, gamma, bias, True, 1.0, self.eps)
        found = found.view(count, steps, width).transpose(0, 1)
        flat = self._flat(mean, var)
        if flat is None:
            return found
        flats = flat.view(steps, width)
        self.flat |= {start + step: flats[step] for step in range(steps)}
        running = [self.running(rows, start + step) for step, rows in enumerate(value.unbind(0))]
        return torch.where(flats.unsqueeze(1), torch.stack(running), found)

    def _flat(self, mean: Tensor, var: Tensor) -> Tensor | None:
        """Return which channels do not vary but for what rounding makes of equal rows, or None."""
        flat = var <= mean.square().mul_((64 * torch.finfo(var.dtype).eps) ** 2)
        return flat if flat.any() else None

    def _scaled(self, value: Tensor, step: int) -> Tensor:
        """Divide by the root of the second moment over batch and channels."""
        flat = value.reshape(-1)
        moment = torch.dot(flat, flat) / len(flat)
        var = self._at[step][1]
        var.copy_(moment.detach())
        if not var.all():
            self.weights[step] = 0.0
            return self.running(value, step)
        return value * (self.gamma[: len(value)] * torch.rsqrt(moment + self.eps))

    def pooled(self) -> Pooled:
        """Return the statistics of the batch, row by row of the running ones."""
        weight = self.var.new_tensor(self.weights).unsqueeze(1)  # [T, 1]
        if self.centred:  # F.batch_norm counts with the unbiased variance
            variances = self.variances * ((weight - 1).clamp(min=0) / weight.clamp(min=1))
        else:
            variances = self.variances
        if self.flat:
            weight = weight.repeat(1, self.var.shape[1])
            for step, flat in self.flat.items():
                weight[step].masked_fill_(flat, 0)
        return pool(self.means if self.centred else None, variances, weight, len(self.var))


class BatchNorms:
    """Normalisation with the statistics of the batch, in training.

    Each step has its own, over the sequences that are alive; ``shared`` ones of the input side are over all steps
    (sequence-wise, Laurent et al. 2016). Where the first state is zero the hidden side of the first step does not vary,
    and is normalised with row 0 of the running statistics, which training does not move there.
    """

    def __init__(self, call: Arguments, counts: list[int]) -> None:
        """Take the layer's scales, shifts and statistics, and how many sequences are alive at each step.

        Raises:
            BadData: one sequence, where each step is normalised over the batch.
        """
        self.call, self.counts = call, counts
        self.sides = [side for side in SIDES if getattr(call, f"gamma_{side}") is not None]
        together = call.shared and self.sides == ["ih"]
        if counts[0] < 2 and not together:
            raise BadData(
                "batch normalisation over each step of a recurrent layer needs 2 sequences, the batch has 1: take "
                "larger ones, batchnorm-recurrent with mode=input and statistics=shared, or finalise-recurrent first"
            )
        steps = {"ih": 1 if call.shared else len(counts), "hh": len(counts), "c": len(counts)}
        biases = {"ih": None, "hh": call.bias_hh, "c": call.beta_c}
        self._held = {side: _Batch(call, side, biases[side], steps[side]) for side in self.sides}

    def inputs(self, blocks: Iterable[Tensor], bias: Tensor | None) -> Iterator[Tensor]:
        """Normalise each step, or all together."""
        side = self._held["ih"]
        side.bias = bias
        if self.call.shared:
            yield from self._together(side, by_step(blocks, self.counts))
        elif side.by_sequence or self.counts[-1] < self.counts[0]:
            for step, product in enumerate(by_step(blocks, self.counts)):
                yield side.batch(product, step)
        else:
            start = 0
            for block in blocks:
                yield from side.block(block, start).unbind(0)
                start += len(block)

    def _together(self, side: _Batch, products: Iterable[Tensor]) -> Iterator[Tensor]:
        apart = side.by_sequence
        found = side.batch(torch.cat(list(products)), 0, affine=not apart)
        for part in found.split([count for count in self.counts if count]):
            yield side.affine(part) if apart else part

    def hidden(self, product: Tensor, step: int) -> Tensor:
        """Normalise over the batch."""
        side = self._held["hh"]
        return side.running(product, 0) if step == 0 and self.call.h0 is None else side.batch(product, step)

    def cell(self, state: Tensor, step: int) -> Tensor:
        """Normalise over the batch, or over batch and channels where there is one scale."""
        return self._held["c"].batch(state, step)

    def pooled(self) -> dict[str, Pooled]:
        """Return the statistics of the batch by side."""
        return {side: held.pooled() for side, held in self._held.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the running statistics: row <- (1 - m) row + m batch with m = momentum n / N.

        n counts the valid rows of the batch behind a row, at most its N sequences. Rows that no batch has reached copy
        the last one that this batch has.
        """
        for held in self._held.values():
            found = held.pooled()
            pace = self.call.momentum * (found.weight / self.counts[0]).clamp(max=1)
            for running, batch in ((held.mean, found.mean), (held.var, found.var)):
                if running is not None and batch is not None:
                    running[: len(batch)].lerp_(batch, pace)
        reached = [count for count in self.counts if count > 1]
        seen, rows = self.call.seen, len(self._held[self.sides[0]].var)
        if seen is None or not reached:
            return
        count_rows(seen, self.counts)
        if len(reached) < rows:
            fill_unseen(self.call, seen, len(reached) - 1, from_zero=self.call.h0 is None)


def count_rows(seen: Tensor, counts: list[int]) -> None:
    """Add a batch to ``seen`` [rows]: 1 to the row of a step that all its sequences have, else their share."""
    shares = seen.new_tensor([count / counts[0] if count > 1 else 0.0 for count in counts])
    rows = torch.arange(len(counts), device=seen.device).clamp(max=len(seen) - 1)
    seen.index_add_(0, rows, shares)


def fill_unseen(call: Arguments, seen: Tensor, last: int, *, from_zero: bool) -> None:
    """Copy row ``last`` of all running statistics into the rows that no batch has reached.

    ``from_zero``: the first state is zero, to which row 0 of the hidden side belongs.
    """
    unseen = (seen == 0).nonzero().squeeze(1)
    unseen = unseen[unseen > last]
    for side in SIDES:
        if side == "hh" and last == 0 and from_zero:
            continue
        for part in ("mean", "var"):
            running = getattr(call, f"{part}_{side}")
            if running is not None:
                running[unseen] = running[last].clone()
