"""What a weight's gradient is made of: per example a sum over positions of outer products.

    dW_n = sum_r left[n, r] right[n, r]^T          [o, i], or one such matrix for each of K groups

For a linear layer ``left`` is the gradient of the output and ``right`` the input (algorithms of K-FAC: g and a); for an
embedding ``left`` is one-hot.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    holds gradients.
    """

    left: Tensor | OneHot
    right: Tensor | OneHot
    given: tuple[tuple[int, str], ...] = ()

    def swapped(self) -> Pairs:
        """Return the pairs of the transposed matrix."""
        turned = {"left": "right", "right": "left"}
        return Pairs(self.right, self.left, tuple((count, turned[side]) for count, side in self.given))

    def padded(self) -> Pairs:
        """Append a coordinate that is zero to the right rows: this use has no bias where another has one."""
        assert isinstance(self.right, Tensor)
        zero = self.right.new_zeros(1).expand(*self.right.shape[:-1], 1)
        return Pairs(self.left, torch.cat([self.right, zero], -1), self.given)

    def gradients(self, side: str) -> Tensor | OneHot | None:
        """Return the rows of one side that are gradients, or None where there are none."""
        rows = self.left if side == "left" else self.right
        kinds = {given != side for _, given in self.given}
        if kinds == {True}:
            return rows
        if kinds == {False}:
            return None
        assert isinstance(rows, Tensor)
        keep = torch.tensor([given != side for count, given in self.given for _ in range(count)], device=rows.device)
        return rows[:, :, keep]

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
    if all(isinstance(part.left, OneHot) for part in parts):
        indices = [part.left.index for part in parts]  # type: ignore[union-attr]
        left: Tensor | OneHot = OneHot(torch.cat(indices, 1), parts[0].left.size)  # type: ignore[union-attr]
        return Pairs(left, torch.cat([part.right for part in parts], 2), given)  # type: ignore[arg-type]
    dense = [part.dense() for part in parts]
    return Pairs(torch.cat([one for one, _ in dense], 2), torch.cat([other for _, other in dense], 2), given)


def with_ones(right: Tensor) -> Tensor:
    """Append the homogeneous coordinate: abar = [a; 1], [K, n, R, i + 1]."""
    return torch.cat([right, right.new_ones(1).expand(*right.shape[:-1], 1)], -1)
