"""What the loss rises by when lines of one block go, by second-order models with Kronecker factors; no network here.

A block is seen from one side: its lines (rows or columns of the weight's matrix) are the rows of M [K, d, e] here, with
the second moments P of their own side and Q of the other, so that

    loss(M + E) - loss(M) = 1/2 sum_k tr(P_k E_k Q_k E_k^T)

in nats, if M is a minimum (Martens & Grosse 2015; Wang et al. 2019, section 3). Everything is float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kfe_fx.criteria.members import ROWS, Members, Sets
from kfe_fx.curvature.block_operator import TIKHONOV, check_damping
from kfe_fx.curvature.eigen import eigenbasis
from kfe_fx.curvature.store import BlockStore
from kfe_fx.errors import UsageError
from kfe_fx.program import Program

_BUFFER = 1 << 22  # entries of a temporary


@dataclass(frozen=True)
class Lines:
    """A block seen from one side.

    Attributes:
        weight: M [K, d, e].
        own: P [K, d, d], or its diagonal [K, d].
        other: Q [K, e, e], or its diagonal [K, e].
        diagonal: D [K, d, e], second moments of the entries' gradients, or None where they were not measured.
        second: S* [K, d, e] in the eigenbases of P and Q, or None.
        bases: eigenvectors of P and of Q (None: identity) with their eigenvalues [K, d] and [K, e], or None.
    """

    weight: Tensor
    own: Tensor | None
    other: Tensor | None
    diagonal: Tensor | None = None
    second: Tensor | None = None
    bases: tuple[Tensor | None, Tensor, Tensor | None, Tensor] | None = None


def lines_of(members: Members, side: str, program: Program, held: BlockStore) -> Lines:
    """Read a block of a store from one side ("rows" or "columns")."""
    block = members.block
    values = {name: program.tensor(name).detach().double().cpu() for name in block.parameters}
    weight, found = block.matrix(values), {key: _wide(getattr(held, key)) for key in ("A", "G", "D", "S")}
    basis = {key: value.double().cpu() for key, value in held.basis.items()}
    ends = {key: (basis.get(f"U_{key}"), basis[f"lam_{key}"]) for key in "AG" if f"lam_{key}" in basis}
    for key in "AG":  # factors that were merged and not decomposed
        factor = found[key]
        if key not in ends and factor is not None:
            made = eigenbasis(factor)
            ends[key] = made.vectors, made.values
    own, other = ("G", "A") if side == ROWS else ("A", "G")
    bases = (*ends[own], *ends[other]) if len(ends) == 2 else None
    if side != ROWS:
        weight = weight.mT
        found |= {key: None if value is None else value.mT for key, value in found.items() if key in "DS"}
    return Lines(weight, found[own], found[other], found["D"], found["S"], bases)


def _wide(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.double().cpu()


# models ---------------------------------------------------------------------------------------------------------------


def diagonal_change(lines: Lines, sets: Sets) -> Tensor:
    """Return 1/2 sum over the entries of each set of D_k M_k^2, [n]."""
    assert lines.diagonal is not None
    return _summed(0.5 * (lines.diagonal * lines.weight.square()).sum(2), sets)


def entrywise_surgery(lines: Lines, sets: Sets, damping: float) -> Tensor:
    """Return 1/2 sum over the entries of each set of M_k^2 / [F^-1]_kk with F^-1 = P^-1 (x) Q^-1, [n].

    ``damping``: as in ``compensated_change``, of both factors.

    Raises:
        UsageError: without damping a factor has no inverse, or the damping means nothing.
    """
    assert lines.bases is not None
    own, high, other, wide = lines.bases
    rows, columns = (
        spread.reciprocal() if vectors is None else (vectors.square() @ spread.reciprocal().unsqueeze(2)).squeeze(2)
        for vectors, spread in ((own, _spread(high, damping)), (other, _spread(wide, damping)))
    )
    return _summed(0.5 * (lines.weight.square() / (rows.unsqueeze(2) * columns.unsqueeze(1))).sum(2), sets)


def removed_change(lines: Lines, sets: Sets) -> Tensor:
    """Return 1/2 tr(P_RR M_R Q M_R^T) of the lines R of each set, [n]: they go, and nothing else moves."""
    assert lines.own is not None
    return 0.5 * (_own_blocks(lines.own, sets) * _gram(lines, sets)).sum((1, 2))


def compensated_change(lines: Lines, sets: Sets, damping: float) -> Tensor:
    """Return 1/2 tr(([P^-1]_RR)^-1 M_R Q M_R^T) of the lines R of each set, [n]: they go, and all others make it good.

    It is the minimum of the quadratic with E_R = -M_R. The inverse is of ``P + damping mean(lam) I``, with the mean of
    the eigenvalues of P; what is returned is the undamped quadratic at the damped minimiser E = -Z M_R with
    Z = P^-1_{:R} ([P^-1]_RR)^-1, that is 1/2 tr(Z^T P Z M_R Q M_R^T). So it is above the minimum, which it tends to as
    the damping does to 0, and never above ``removed_change``: there E_R alone moves.

    Raises:
        UsageError: without damping P has no inverse, or the damping means nothing.
    """
    assert lines.bases is not None
    own, high = lines.bases[:2]
    spread = _spread(high, damping)
    if own is None:
        return removed_change(lines, sets)  # with a diagonal P no line can make another good
    # in the eigenbasis, where zeros stay zeros: products of matrices would have errors of 1 / damping^2
    kept = torch.linalg.inv(_own_blocks((own * spread.reciprocal().unsqueeze(1)) @ own.mT, sets))
    felt = high.where(high > _least(high), 0.0)
    around = _own_blocks((own * (felt / spread.square()).unsqueeze(1)) @ own.mT, sets)
    return 0.5 * ((kept @ around @ kept) * _gram(lines, sets)).sum((1, 2))


def eigenbasis_change(lines: Lines, sets: Sets, *, product: bool) -> Tensor:
    """Return 1/2 theta^T Q diag(S) Q^T theta of each set, theta its lines and zeros elsewhere, Q the eigenbasis, [n].

    S are the eigenvalues lam_P lam_Q^T with ``product``, else the second moments S*.
    """
    assert lines.bases is not None
    own, high, other, wide = lines.bases
    spectrum = high.unsqueeze(2) * wide.unsqueeze(1) if product else lines.second
    assert spectrum is not None
    turned = lines.weight if other is None else lines.weight @ other  # [K, d, e]
    if own is None:  # lines are their own axes
        return _summed(0.5 * (spectrum * turned.square()).sum(2), sets)
    if sets.lines.shape[1] == 1:
        return _summed(0.5 * ((own.square() @ spectrum) * turned.square()).sum(2), sets)
    step = max(1, _BUFFER // (turned.shape[1] * turned.shape[2]))
    found = []
    for start in range(0, len(sets.lines), step):
        groups, rows = sets.groups[start : start + step, None], sets.lines[start : start + step]
        theta = own[groups, rows].mT @ turned[groups, rows]  # [m, d, e]
        found.append(0.5 * (spectrum[groups[:, 0]] * theta.square()).sum((1, 2)))
    return torch.cat(found)


# parts ----------------------------------------------------------------------------------------------------------------


def _spread(values: Tensor, damping: float) -> Tensor:
    """Return eigenvalues [K, d] plus ``damping`` times their mean, or plus the damping itself where all are zero.

    Raises:
        UsageError: the damping is negative or not a number, or one of the sums is zero but for rounding.
    """
    check_damping(damping, TIKHONOV, has_factors=True)
    mean = values.mean(1, keepdim=True)
    spread = values + damping * mean.where(mean > 0, 1.0)
    if not bool((spread > _least(values)).all()):
        raise UsageError("a Kronecker factor of the curvature has no inverse; give a damping above 0, or more examples")
    return spread


def _least(values: Tensor) -> Tensor:
    """Return what rounding makes of eigenvalues [K, d] that are zero, at most, [K, 1]."""
    return values.shape[1] * torch.finfo(values.dtype).eps * values.amax(1, keepdim=True)


def _own_blocks(own: Tensor, sets: Sets) -> Tensor:
    """Return P_RR of each set, [n, r, r]."""
    groups = sets.groups[:, None]
    if own.dim() == 2:
        return torch.diag_embed(own[groups, sets.lines])
    return own[groups.unsqueeze(2), sets.lines.unsqueeze(2), sets.lines.unsqueeze(1)]


def _gram(lines: Lines, sets: Sets) -> Tensor:
    """Return M_R Q M_R^T of each set, [n, r, r]."""
    assert lines.other is not None
    rows = lines.weight[sets.groups[:, None], sets.lines]  # [n, r, e]
    weighted = lines.weight @ lines.other if lines.other.dim() == 3 else lines.weight * lines.other.unsqueeze(1)
    return weighted[sets.groups[:, None], sets.lines] @ rows.mT


def _summed(values: Tensor, sets: Sets) -> Tensor:
    """Sum values of lines [K, d] over each set, [n]."""
    return values[sets.groups[:, None], sets.lines].sum(1)
