"""Moving averages of Kronecker factors, and the bases made of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kfe_fx.curvature.blocks import Block
from kfe_fx.curvature.distributed import Group
from kfe_fx.curvature.eigen import eigenbasis
from kfe_fx.curvature.kernels import symmetric
from kfe_fx.curvature.statistics import Factors, FactorSums, added_lengths, empty_factors, has_steps
from kfe_fx.curvature.temporal import OPTIONS, Lagged


@dataclass
class Moving:
    """Factors of one block as an exponential moving average in its optimizer state.

    ``A <- decay A + (1 - decay) A_batch``, corrected for the start from zero by ``weight``, the sum of the weights.
    """

    decay: float
    sums: Factors = field(default_factory=Factors)

    def absorb(self, block: Block, state: dict[str, Any], group: Group, like: Tensor) -> bool:
        """Move a block's averages towards what was summed since; tell whether there was anything."""
        sums: FactorSums | None = self.sums.sums.pop(block.name, None)
        examples = group.sum_number(0.0 if sums is None else sums.examples)
        if not examples:
            return False
        if sums is None:  # another rank has seen something
            sums = empty_factors(block, like)
        lagged = self.sums.sharing in OPTIONS and has_steps(block)
        if lagged and sums.A1 is None:
            sums.A1, sums.G1 = torch.zeros_like(sums.A), torch.zeros_like(sums.G)
        neighbours = [one for one in (sums.A1, sums.G1) if one is not None]
        group.sum([sums.A, sums.G, *neighbours])
        sums.rows, sums.examples = group.sum_number(sums.rows), examples
        counted = [("A", sums.A, sums.rows), ("G", sums.G, sums.examples)]
        if lagged:
            counted += zip(("A1", "G1"), neighbours, (sums.rows, sums.examples), strict=True)
            self._follow_lengths(state, group, sums)
        for key, total, count in counted:
            if key in state:
                state[key].mul_(self.decay).add_(total, alpha=(1 - self.decay) / count)
            else:
                state[key] = total.mul_((1 - self.decay) / count)
        state["weight"] = self.decay * state.get("weight", 0.0) + (1 - self.decay)
        return True

    def _follow_lengths(self, state: dict[str, Any], group: Group, sums: FactorSums) -> None:
        """Move the share of sequences that have so many steps, of which there may be more now."""
        found = sums.A.new_zeros(1) if sums.lengths is None else sums.lengths.to(sums.A)
        total = None
        for each in group.gather(found):
            total = added_lengths(total, each.to(found))
        assert total is not None
        before = state.get("lengths", total.new_zeros(1))
        state["lengths"] = added_lengths(before * self.decay, total * ((1 - self.decay) / sums.examples))


def factor(state: dict[str, Any], key: str) -> Tensor:
    """Return a moving average, symmetric [K, d, d] or diagonal [K, d], corrected for its start."""
    total: Tensor = state[key]
    return (symmetric(total) if total.dim() == 3 else total) / state["weight"]


def lagged(state: dict[str, Any]) -> Lagged:
    """Return what a temporal operator is made of, as moving averages corrected for their start."""
    A1, G1 = (state[key] / state["weight"] for key in ("A1", "G1"))
    return Lagged(factor(state, "A"), factor(state, "G"), A1, G1, state["lengths"])


def decompose(state: dict[str, Any], keys: Iterable[str] = ("A", "G")) -> None:
    """Refresh a block's eigenbases: ``lam_<key>`` [K, d] and, but for a diagonal, ``U_<key>`` [K, d, d]."""
    for key in keys:
        found = eigenbasis(factor(state, key))
        state[f"lam_{key}"] = found.values.contiguous()
        if found.vectors is not None:
            state[f"U_{key}"] = found.vectors.contiguous()


def share(state: dict[str, Any], group: Group, owner: int, keys: Iterable[str] = ("A", "G")) -> None:
    """Give every rank the eigenbases that the rank ``owner`` has computed."""
    for key in keys:
        total: Tensor = state[key]
        if group.rank != owner:
            state[f"lam_{key}"] = total.new_empty(total.shape[:2])
            if total.dim() == 3:
                state[f"U_{key}"] = torch.empty_like(total)
        group.share(state[f"lam_{key}"], owner)
        if total.dim() == 3:
            group.share(state[f"U_{key}"], owner)
