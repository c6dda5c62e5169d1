"""What a weight's gradient is made of: per example a sum over positions of outer products.

    dW_n = sum_r left[n, r] right[n, r]^T          [o, i], or one such matrix for each of K groups

For a linear layer ``left`` is the gradient of the output and ``right`` the input (algorithms of K-FAC: g and a); for an
embedding ``left`` is one-hot.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class OneHot:
    """Rows that are one-hot: ``index`` [n, R] says where, a negative one stands for a row of zeros; ``size`` wide."""

    index: Tensor
    size: int

    def dense(self, like: Tensor) -> Tensor:
        """Write the rows out, [1, n, R, size], in the type of ``like``."""
        made = torch.zeros(*self.index.shape, self.size + 1, dtype=like.dtype, device=self.index.device)
        made.scatter_(-1, self.index.where(self.index >= 0, self.size).unsqueeze(-1), 1.0)
        return made[..., :-1].unsqueeze(0)


@dataclass(frozen=True)
class Pairs:
    """Rows of n examples: ``left`` [K, n, R, o] (or one-hot) and ``right`` [K, n, R, i].

    ``given`` says per run of positions, (how many, side), which side holds what went in ("left" or "right"); the other
    holds gradients. ``valid`` [n, R] tells which positions there are (padding has rows of zeros); None: all.
    ``chains`` are the runs of positions that are steps of one sequence, in their order: how many each; () where
    positions have no order.
    """

    left: Tensor | OneHot
    right: Tensor | OneHot
    given: tuple[tuple[int, str], ...] = ()
    valid: Tensor | None = None
    chains: tuple[int, ...] = ()

    def swapped(self) -> Pairs:
        """Return the pairs of the transposed matrix."""
        turned = {"left": "right", "right": "left"}
        given = tuple((count, turned[side]) for count, side in self.given)
        return replace(self, left=self.right, right=self.left, given=given)

    def padded(self) -> Pairs:
        """Append a coordinate that is zero to the right rows: this use has no bias where another has one."""
        assert isinstance(self.right, Tensor)
        zero = self.right.new_zeros(1).expand(*self.right.shape[:-1], 1)
        return replace(self, right=torch.cat([self.right, zero], -1))

    def masked(self, valid: Tensor) -> Pairs:
        """Zero the rows where ``valid`` [n, R] is false."""
        assert isinstance(self.left, Tensor)
        assert isinstance(self.right, Tensor)
        weight = valid.unsqueeze(-1)
        return replace(self, left=self.left * weight, right=self.right * weight, valid=valid)

    def gradients(self, side: str) -> Tensor | OneHot | None:
        """Return the rows of one side that are gradients, or None where there are none."""
        rows = self.left if side == "left" else self.right
        kinds = {given != side for _, given in self.given}
        if kinds == {True}:
            return rows
        if kinds == {False}:
            return None
        assert isinstance(rows, Tensor)
        return rows[:, :, self._gradient_rows(side).to(rows.device)]

    def lagged(self, side: str, *, gradients: bool) -> tuple[Tensor, Tensor]:
        """Return the rows of one side at each step and at the step before, [K, n, R - 1, .]; zeros between chains.

        With ``gradients`` those alone that are gradients.
        """
        rows = self.left if side == "left" else self.right
        assert isinstance(rows, Tensor)
        ends = torch.tensor([step == count - 1 for count in self._runs() for step in range(count)])
        follows = ~ends[:-1]
        if gradients:
            kept = self._gradient_rows(side)
            follows &= kept[1:] & kept[:-1]
        return rows[:, :, 1:] * follows.to(rows.device).unsqueeze(-1), rows[:, :, :-1]

    def chain_lengths(self) -> Tensor:
        """Count the chains by how many of their steps are valid, [L + 1]."""
        n = self.left.index.shape[0] if isinstance(self.left, OneHot) else self.left.shape[1]
        runs = self._runs()
        if self.valid is None:
            return n * torch.bincount(torch.tensor(runs)).double()
        counts = torch.stack([part.sum(1) for part in self.valid.split(list(runs), 1)])
        return torch.bincount(counts.flatten()).double()

    def _runs(self) -> tuple[int, ...]:
        return self.chains or (1,) * _positions(self)

    def _gradient_rows(self, side: str) -> Tensor:
        return torch.tensor([given != side for count, given in self.given for _ in range(count)])

    def dense(self) -> tuple[Tensor, Tensor]:
        """Return both sides as tensors."""
        left, right = self.left, self.right
        if isinstance(left, OneHot):
            assert isinstance(right, Tensor)
            return left.dense(right), right
        return left, right.dense(left) if isinstance(right, OneHot) else right


def joined(parts: list[Pairs]) -> Pairs:
    """Put the positions of several uses of one weight behind each other."""
    if len(parts) == 1:
        return parts[0]
    given = tuple(run for part in parts for run in part.given)
    masked = any(part.valid is not None for part in parts)
    valid = torch.cat([_valid(part) for part in parts], 1) if masked else None
    chained = any(part.chains for part in parts)
    chains = tuple(run for part in parts for run in part._runs()) if chained else ()
    if all(isinstance(part.left, OneHot) for part in parts):
        indices = [part.left.index for part in parts]  # type: ignore[union-attr]
        left: Tensor | OneHot = OneHot(torch.cat(indices, 1), parts[0].left.size)  # type: ignore[union-attr]
        return Pairs(left, torch.cat([part.right for part in parts], 2), given)  # type: ignore[arg-type]
    dense = [part.dense() for part in parts]
    left, right = (torch.cat(side, 2) for side in zip(*dense, strict=True))
    return Pairs(left, right, given, valid, chains)


def _positions(part: Pairs) -> int:
    return part.left.index.shape[1] if isinstance(part.left, OneHot) else part.left.shape[2]


def _valid(part: Pairs) -> Tensor:
    if part.valid is not None:
        return part.valid
    for side in (part.left, part.right):
        if isinstance(side, OneHot):
            return side.index >= 0
    assert isinstance(part.left, Tensor)
    return part.left.new_ones(part.left.shape[1:3], dtype=torch.bool)


def with_ones(right: Tensor) -> Tensor:
    """Append the homogeneous coordinate: abar = [a; 1], [K, n, R, i + 1]."""
    return torch.cat([right, right.new_ones(1).expand(*right.shape[:-1], 1)], -1)
