"""A basis of leading eigenvectors against the dense curvature that it stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kfe_fx.optim import EKFAC, truncated
from tests.optim.nets import classifier, data, train_step


def orthonormal(size: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q


@given(
    high=st.integers(2, 7), wide=st.integers(2, 7), s=st.integers(1, 7), r=st.integers(1, 7), seed=st.integers(0, 99)
)
@settings(max_examples=40, deadline=None)
def test_solve_is_the_dense_solve(high: int, wide: int, s: int, r: int, seed: int) -> None:
    s, r = min(s, high), min(r, wide)
    generator = torch.Generator().manual_seed(seed)
    Q_G, Q_A = orthonormal(high, generator), orthonormal(wide, generator)
    lam_G = torch.rand(high, dtype=torch.float64, generator=generator)
    lam_A = torch.rand(wide, dtype=torch.float64, generator=generator)
    S = torch.rand(s, r, dtype=torch.float64, generator=generator)
    g, a = lam_G[s:].mean() if s < high else torch.tensor(0.0), lam_A[r:].mean() if r < wide else torch.tensor(0.0)
    rest_G, rest_A = lam_G.clone(), lam_A.clone()
    rest_G[s:], rest_A[r:] = g, a
    spectrum = rest_G.unsqueeze(1) * rest_A
    spectrum[:s, :r] = S
    Q = torch.kron(Q_G, Q_A)
    dense = Q @ torch.diag(spectrum.reshape(-1)) @ Q.T
    state: dict[str, Any] = {"S": S.unsqueeze(0), "lam_G": lam_G[None, :s], "lam_A": lam_A[None, :r]}
    if s < high:
        state |= {"U_G": Q_G[None, :, :s], "rest_G": g.view(1)}
    else:
        state |= {"U_G": Q_G[None]}
    if r < wide:
        state |= {"U_A": Q_A[None, :, :r], "rest_A": a.view(1)}
    else:
        state |= {"U_A": Q_A[None]}
    grad = torch.randn(1, high, wide, dtype=torch.float64, generator=generator)
    eps = torch.tensor([0.1], dtype=torch.float64)
    update, product = truncated.solve(state, grad, eps)
    wanted = torch.linalg.solve(dense + 0.1 * torch.eye(high * wide, dtype=torch.float64), grad.reshape(-1))
    torch.testing.assert_close(update.reshape(-1), wanted, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(product, wanted @ grad.reshape(-1), rtol=1e-9, atol=1e-10)
    total = truncated.trace(state, high, wide)
    torch.testing.assert_close(total[0], dense.trace(), rtol=1e-9, atol=1e-10)


def test_leading_vectors_of_a_factor_of_low_rank_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    Q = orthonormal(20, generator)
    values = torch.cat([torch.arange(5, 0, -1.0, dtype=torch.float64), torch.zeros(15)])
    factor = (Q * values) @ Q.T
    state: dict[str, Any] = {"A": factor.unsqueeze(0).triu(), "weight": 1.0}
    truncated.leading(state, "A", 5)
    torch.testing.assert_close(state["lam_A"][0].flip(0), values[:5], rtol=1e-10, atol=1e-10)
    made = (state["U_A"][0] * state["lam_A"][0]) @ state["U_A"][0].T
    torch.testing.assert_close(made, factor, rtol=1e-9, atol=1e-10)
    assert float(state["rest_A"]) == pytest.approx(0.0, abs=1e-12)


def test_leading_vectors_follow_from_refresh_to_refresh() -> None:
    generator = torch.Generator().manual_seed(0)
    Q = orthonormal(30, generator)
    values = 0.5 ** torch.arange(30, dtype=torch.float64)
    factor = (Q * values) @ Q.T
    state: dict[str, Any] = {"A": factor.unsqueeze(0).triu(), "weight": 1.0}
    errors = []
    for _ in range(16):
        truncated.leading(state, "A", 4)
        errors.append(float((state["lam_A"][0].flip(0) - values[:4]).abs().max()))
    assert errors[-1] < 1e-9
    assert errors[-1] < errors[0]


def test_rank_keeps_narrow_factors_whole_and_trains() -> None:
    program = classifier()
    optimizer = EKFAC(program, rank=3)
    losses = [train_step(program, optimizer, data(program, 0)) for _ in range(40)]
    shapes = {block.name: optimizer.block_state(block)["S"].shape[1:] for block in optimizer.blocks}
    assert shapes == {"0.weight": (3, 3), "2.weight": (3, 3), "4.weight": (4, 3)}
    assert losses[-1] < 0.5 * losses[0]


def test_full_rank_is_the_whole_basis() -> None:
    one, other = classifier(), classifier()
    first, second = EKFAC(one), EKFAC(other, rank=100)
    for number in range(4):
        train_step(one, first, data(one, number))
        train_step(other, second, data(other, number))
    for p, q in zip(one.module().parameters(), other.module().parameters(), strict=True):
        assert torch.equal(p, q)
