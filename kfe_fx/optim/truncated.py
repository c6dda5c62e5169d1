"""A basis of leading eigenvectors alone, kept by subspace iteration; what is orthogonal to them is isotropic.

With V_A [i, r], V_G [o, s] orthonormal, S [s, r] tracked between them, and the mean eigenvalues a, g of what is left of
A and G, the curvature is S on top x top, lam_G a on top x rest, g lam_A on rest x top and g a on rest x rest. So top-r
directions are those of EKFAC and the rest those of K-FAC with an isotropic tail: spectra of factors decay fast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kfe_fx.optim.moving import factor

_OVERSAMPLE = 2  # a side is truncated where it is more than this many times the rank


def truncates(width: int, rank: int | None) -> bool:
    """Tell whether a side of this width keeps its leading eigenvectors alone."""
    return rank is not None and width > _OVERSAMPLE * rank


def leading(state: dict[str, Any], key: str, rank: int) -> None:
    """Refresh the leading eigenvectors of a factor: ``V <- orth(A V)``, rotated to its Ritz vectors.

    One product with the factor a refresh (Halko, Martinsson & Tropp 2011, section 4.4); the start is random, with two.
    Sets ``U_<key>`` [K, d, rank], ``lam_<key>`` [K, rank] and ``rest_<key>`` [K], the mean eigenvalue of the rest.
    """
    matrix = factor(state, key)  # [K, d, d]
    groups, width, _ = matrix.shape
    old: Tensor | None = state.get(f"U_{key}")
    if old is None or old.shape[-1] != rank:
        draws = torch.randn(groups, width, rank, generator=torch.Generator().manual_seed(width), dtype=torch.float64)
        old = torch.bmm(matrix, torch.linalg.qr(draws.to(matrix)).Q)
    wide = torch.bmm(matrix, old)
    basis = torch.linalg.qr(wide.double()).Q
    ritz = torch.bmm(basis.transpose(1, 2), torch.bmm(matrix.double(), basis))
    values, turn = torch.linalg.eigh((ritz + ritz.transpose(1, 2)) / 2)
    values = values.clamp_min(0)
    trace = matrix.diagonal(dim1=1, dim2=2).sum(1).double()
    state[f"U_{key}"] = torch.bmm(basis, turn).to(matrix).contiguous()
    state[f"lam_{key}"] = values.to(matrix)
    state[f"rest_{key}"] = ((trace - values.sum(1)) / (width - rank)).clamp_min(0).to(matrix)


def solve(state: dict[str, Any], grad: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(F + eps I)^{-1} grad`` [K, o, i] and its inner product with ``grad``.

    A side that is not truncated has a whole basis and no rest.
    """
    U_A, U_G = state.get("U_A"), state.get("U_G")
    lam_A, lam_G, S = state["lam_A"], state["lam_G"], state["S"]
    zero = S.new_zeros(len(S))
    a, g = (state.get(f"rest_{key}", zero).view(-1, 1, 1) for key in ("A", "G"))
    eps = eps.view(-1, 1, 1)
    inner = 1 / (S + eps)  # [K, s, r]
    across = 1 / (lam_G.unsqueeze(2) * a + eps)  # [K, s, 1]: top of G, rest of A
    down = 1 / (g * lam_A.unsqueeze(1) + eps)  # [K, 1, r]: rest of G, top of A
    rest = 1 / (g * a + eps)
    left = grad if U_G is None else torch.bmm(U_G.transpose(1, 2), grad)  # [K, s, i]
    right = grad if U_A is None else torch.bmm(grad, U_A)  # [K, o, r]
    both = left if U_A is None else torch.bmm(left, U_A)  # [K, s, r]
    rows = both * (inner - across - down + rest)
    made = left * (across - rest)
    made = made + (rows if U_A is None else torch.bmm(rows, U_A.transpose(1, 2)))  # [K, s, i]
    update = made if U_G is None else torch.bmm(U_G, made)
    update = update + grad * rest
    columns = right * (down - rest)
    update = update + (columns if U_A is None else torch.bmm(columns, U_A.transpose(1, 2)))
    return update, (update * grad).sum()


def trace(state: dict[str, Any], high: int, wide: int) -> Tensor:
    """Return the trace of the curvature over all o·i coordinates, [K]."""
    S, lam_A, lam_G = state["S"], state["lam_A"], state["lam_G"]
    zero = S.new_zeros(len(S))
    a, g = state.get("rest_A", zero), state.get("rest_G", zero)
    more_A, more_G = wide - S.shape[2], high - S.shape[1]
    return S.sum((1, 2)) + lam_G.sum(1) * a * more_A + g * more_G * lam_A.sum(1) + g * a * more_A * more_G
