"""What is accumulated over batches: K-FAC factors, second moments in a basis, and their running-average cousin.

Each statistic is a sum with its counts, so that it adds over batches, shards and processes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kfe_fx.curvature.blocks import Block
from kfe_fx.curvature.kernels import add_gram, add_second_moments
from kfe_fx.curvature.pairs import OneHot, Pairs
from kfe_fx.curvature.temporal import OPTIONS

EXPAND, REDUCE = "expand", "reduce"
SHARINGS = (EXPAND, REDUCE, *OPTIONS)
MAX_DENSE = 8192  # wider sides keep their diagonal


class Statistic(ABC):
    """A sum over examples, per block."""

    def takes(self, block: Block) -> bool:
        """Tell whether there is such a statistic of a block."""
        return True

    def end(self, first: bool) -> None:  # noqa: B027  most have nothing to do
        """Be told that a backward pass is over."""

    @abstractmethod
    def add(self, block: Block, pairs: Pairs, first: bool) -> None:
        """Add the rows of a few examples.

        Args:
            block: whose rows.
            pairs: left [K, n, R, o] and right [K, n, R, i].
            first: whether this is the first of several backward passes over the same examples (exact sources take one
                per column): what depends on the inputs alone is counted then.
        """


@dataclass
class FactorSums:
    """Sums behind A and G of a block.

    ``A`` [K, i, i] and ``G`` [K, o, o] are upper block triangles (or diagonals [K, i] where a side is wide or one-hot);
    ``rows`` counts what A is averaged over, ``examples`` what G is. expand: A = sum a a^T / (N R), G = sum g g^T / N
    (Eschenhagen et al. 2023; the product is that of KFC, Grosse & Martens 2016). reduce: both are means over examples.

    Of steps of sequences, where it is asked for, ``A1`` and ``G1`` are the same of each step and the one before it
    (not symmetric), and ``lengths`` [L + 1] counts the sequences that have so many steps.
    """

    A: Tensor
    G: Tensor
    rows: float = 0.0
    examples: float = 0.0
    A1: Tensor | None = None
    G1: Tensor | None = None
    lengths: Tensor | None = None


@dataclass
class Factors(Statistic):
    """Kronecker factors A and G of each block with pairs of rows.

    ``sharing`` says how the positions r of an example count: "expand" treats each as an example, "reduce" averages the
    inputs and sums the gradients of an example first; "rnn1" and "rnn2" are "expand" and, of steps of sequences, what
    neighbours have in common.
    """

    sharing: str = EXPAND
    sums: dict[str, FactorSums] = field(default_factory=dict)

    def takes(self, block: Block) -> bool:
        """Leave out a diagonal block, which has no pairs of rows."""
        return block.kind == "kronecker"

    def add(self, block: Block, pairs: Pairs, first: bool) -> None:
        """Add to A (on the first pass) and to G."""
        sums = self.sums.get(block.name)
        if sums is None:
            like = pairs.right if isinstance(pairs.right, Tensor) else pairs.left
            assert isinstance(like, Tensor)
            sums = self.sums[block.name] = empty_factors(block, like)
        pairs, positions = _unpadded(pairs, self.sharing == REDUCE)
        left = pairs.left if first else pairs.gradients("left")
        right = pairs.right if first else pairs.gradients("right")
        if first:
            examples = _count(pairs.right)[0]
            sums.rows += examples if self.sharing == REDUCE else positions
            sums.examples += examples
        if right is not None:
            _add_side(sums.A, right, "mean" if self.sharing == REDUCE else "")
        if left is not None:
            _add_side(sums.G, left, "sum" if self.sharing == REDUCE else "")
        if self.sharing in OPTIONS and has_steps(block):
            _add_neighbours(sums, pairs, first)


def has_steps(block: Block) -> bool:
    """Tell whether positions of a block are steps of sequences, and whole factors are kept of both sides."""
    uses = [use.site.pairing for found in block.uses.values() for use in found]
    narrow = max(block.shape[1:]) <= MAX_DENSE and all(one is not None and not one.sparse for one in uses)
    return narrow and any(one is not None and one.chained for one in uses)


def _add_neighbours(sums: FactorSums, pairs: Pairs, first: bool) -> None:
    """Add ``sum_t a_t a_{t-1}^T`` (on the first pass, or where they are gradients), the same of g, and the lengths."""
    if sums.A1 is None or sums.G1 is None:
        sums.A1, sums.G1 = torch.zeros_like(sums.A), torch.zeros_like(sums.G)
    for total, side in ((sums.A1, "right"), (sums.G1, "left")):
        if first or any(given != side for _, given in pairs.given):
            now, before = pairs.lagged(side, gradients=not first)
            total.baddbmm_(now.flatten(1, 2).transpose(1, 2), before.flatten(1, 2))
    if first:
        sums.lengths = added_lengths(sums.lengths, pairs.chain_lengths())


def added_lengths(one: Tensor | None, other: Tensor) -> Tensor:
    """Add two counts of lengths, of which the other may be longer."""
    if one is None:
        return other
    longer, shorter = (one, other) if len(one) >= len(other) else (other, one)
    made = longer.clone()
    made[: len(shorter)] += shorter.to(made)
    return made


def _count(rows: Tensor | OneHot) -> tuple[int, int]:
    """Return the numbers of examples and of positions."""
    n, positions = rows.index.shape if isinstance(rows, OneHot) else rows.shape[1:3]
    return n, positions


def _unpadded(pairs: Pairs, mean: bool) -> tuple[Pairs, int]:
    """Zero the rows beside one-hot rows of zeros (padding), and return how many positions of all examples are left.

    With ``mean`` right rows are scaled, so that their mean over all positions is that over those left.
    """
    n, positions = _count(pairs.right)
    if pairs.valid is not None and isinstance(pairs.right, Tensor):  # its rows are zeros already
        left = int(pairs.valid.sum())
        if not mean:
            return pairs, left
        scale = positions / pairs.valid.sum(1).clamp_min(1).to(pairs.right.dtype)
        return replace(pairs, right=pairs.right * scale.view(1, -1, 1, 1)), left
    hot, other = (pairs.left, pairs.right) if isinstance(pairs.left, OneHot) else (pairs.right, pairs.left)
    if not isinstance(hot, OneHot) or not isinstance(other, Tensor):
        return pairs, n * positions
    valid = hot.index >= 0
    left = int(valid.sum())
    if left == valid.numel():
        return pairs, left
    weight = valid.to(other.dtype).unsqueeze(-1)  # [n, R, 1]
    if hot is pairs.right:
        return replace(pairs, left=other * weight), left
    if mean:
        weight = weight / weight.sum(1, keepdim=True).clamp_min(1) * positions
    return replace(pairs, right=other * weight), left


def empty_factors(block: Block, like: Tensor) -> FactorSums:
    """Make zero sums for a block in the type and on the device of ``like``."""
    groups, high, wide = block.shape
    found = [use for uses in block.uses.values() for use in uses]
    hot = [use.transposed if use.site.pairing is not None and use.site.pairing.sparse else None for use in found]
    diagonal = {"A": wide > MAX_DENSE or set(hot) == {True}, "G": high > MAX_DENSE or set(hot) == {False}}
    A = like.new_zeros((groups, wide) if diagonal["A"] else (groups, wide, wide))
    return FactorSums(A, like.new_zeros((groups, high) if diagonal["G"] else (groups, high, high)))


def _add_side(total: Tensor, rows: Tensor | OneHot, over: str) -> None:
    """Add the Gram matrix of rows, or of their "sum" or "mean" over the positions of each example."""
    if isinstance(rows, OneHot):
        counts = _squared_counts(rows, over).to(total.dtype)
        (total[0] if total.dim() == 2 else total[0].diagonal()).add_(counts)
        return
    if over:
        rows = rows.sum(2, keepdim=True) if over == "sum" else rows.mean(2, keepdim=True)
    if total.dim() == 2:
        total.add_(rows.flatten(1, 2).square().sum(1))
    else:
        add_gram(total, rows.flatten(1, 2))


def _squared_counts(rows: OneHot, over: str) -> Tensor:
    """Return the diagonal of the Gram matrix of one-hot rows: how often each entry is hit (squared where summed)."""
    valid = rows.index >= 0
    if not over:
        return torch.bincount(rows.index[valid], minlength=rows.size)
    example = torch.arange(len(rows.index), device=rows.index.device).unsqueeze(1).expand_as(rows.index)
    keys, counts = (example * rows.size + rows.index)[valid].unique(return_counts=True)
    if over == "mean":
        counts = counts / valid.sum(1)[keys // rows.size]
    made = torch.zeros(rows.size, dtype=torch.float64, device=rows.index.device)
    return made.index_add_(0, keys % rows.size, counts.double().square())


@dataclass(frozen=True)
class Basis:
    """Eigenbases of a block: ``U_A`` [K, i, i], ``U_G`` [K, o, o] (or fewer columns), or None for the identity."""

    U_A: Tensor | None = None
    U_G: Tensor | None = None

    def turned(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return the shape of a matrix [K, o, i] in this basis."""
        groups, high, wide = shape
        return (
            groups,
            high if self.U_G is None else self.U_G.shape[-1],
            wide if self.U_A is None else self.U_A.shape[-1],
        )


IDENTITY = Basis()


@dataclass
class MomentSums:
    """``S`` [K, o, i]: sum over examples of squares; ``mean`` [K, o, i] the sum itself of a batch, or None."""

    S: Tensor
    examples: float = 0.0
    mean: Tensor | None = None


@dataclass
class Moments(Statistic):
    """Second moments ``S*_jk = E_n[ (U_G^T dW_n U_A)_jk^2 ]`` (George et al. 2018, equation 7).

    Without bases they are the diagonal of the gradient's second moment in the parameters themselves. ``means`` keeps
    the sum of the rotated gradients too.
    """

    bases: dict[str, Basis] = field(default_factory=dict)
    means: bool = False
    sums: dict[str, MomentSums] = field(default_factory=dict)

    def add(self, block: Block, pairs: Pairs, first: bool) -> None:
        """Add the squares of a few examples."""
        sums = self.sums.get(block.name)
        if sums is None:
            like = pairs.right if isinstance(pairs.right, Tensor) else pairs.left
            assert isinstance(like, Tensor)
            shape = self.bases.get(block.name, IDENTITY).turned(block.shape)
            sums = self.sums[block.name] = MomentSums(like.new_zeros(shape))
            sums.mean = torch.zeros_like(sums.S) if self.means else None
        if first:
            sums.examples += _count(pairs.left)[0]
        basis = self.bases.get(block.name, IDENTITY)
        if isinstance(pairs.left, OneHot) and basis.U_G is None and isinstance(pairs.right, Tensor):
            _add_sparse(sums, pairs.left, pairs.right, basis.U_A)
        else:
            left, right = pairs.dense()
            add_second_moments(sums.S, left, right, basis.U_G, basis.U_A, sums.mean)


def _add_sparse(sums: MomentSums, left: OneHot, right: Tensor, basis: Tensor | None) -> None:
    """Add an embedding's squares: rows of one example that hit the same entry are summed before."""
    rows = right[0] if basis is None else right[0] @ basis[0]  # [n, R, i]
    valid = left.index >= 0
    example = torch.arange(len(rows), device=rows.device).unsqueeze(1).expand_as(left.index)
    keys = (example * left.size + left.index)[valid]
    unique, place = keys.unique(return_inverse=True)
    totals = rows.new_zeros(len(unique), rows.shape[-1]).index_add_(0, place, rows[valid])
    entry = unique % left.size
    sums.S[0].index_add_(0, entry, totals.square())
    if sums.mean is not None:
        sums.mean[0].index_add_(0, entry, totals)


@dataclass
class RunningSums:
    """``S`` [K, o, i]: sum over batches of B·(mean rotated gradient)², and how many batches."""

    S: Tensor
    batches: float = 0.0


@dataclass
class Running(Statistic):
    """Second moments of EKFAC-ra, ``B (U_G^T mean_n dW_n U_A)^2`` per batch of B (George et al. 2018, section 3).

    No example's own gradient is needed; they are biased by (B - 1) times the square of the mean gradient, and equal S*
    only where that is zero. Blocks whose examples are taken one at a time have batches of one.
    """

    bases: dict[str, Basis] = field(default_factory=dict)
    sums: dict[str, RunningSums] = field(default_factory=dict)
    _batch: dict[str, tuple[Tensor, int]] = field(default_factory=dict)

    def add(self, block: Block, pairs: Pairs, first: bool) -> None:
        """Add a few examples to the gradient of their batch."""
        like = pairs.right if isinstance(pairs.right, Tensor) else pairs.left
        assert isinstance(like, Tensor)
        total, count = self._batch.get(block.name, (None, 0))
        total = like.new_zeros(block.shape) if total is None else total
        if isinstance(pairs.left, OneHot) and isinstance(pairs.right, Tensor):
            valid = pairs.left.index >= 0
            total[0].index_add_(0, pairs.left.index[valid], pairs.right[0][valid])
        else:
            left, right = pairs.dense()
            total.baddbmm_(left.flatten(1, 2).transpose(1, 2), right.flatten(1, 2))
        self._batch[block.name] = total, count + _count(pairs.left)[0]

    def end(self, first: bool) -> None:
        """Rotate and square what the batch came to."""
        for name, (total, count) in self._batch.items():
            basis = self.bases.get(name, IDENTITY)
            turned = total if basis.U_G is None else torch.bmm(basis.U_G.transpose(1, 2), total)
            turned = turned if basis.U_A is None else torch.bmm(turned, basis.U_A)
            sums = self.sums.setdefault(name, RunningSums(torch.zeros_like(turned)))
            sums.S += turned.square() / count
            sums.batches += first
        self._batch.clear()
