"""K-FAC: exact and factored damping against dense matrices, and T1.3."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kfe_fx.errors import UsageError
from kfe_fx.optim import EKFAC, KFAC
from kfe_fx.optim.moving import factor
from tests.optim.nets import classifier, convolutional, data, gradients, train_step


@pytest.mark.parametrize("make", [classifier, convolutional])
def test_before_any_second_moment_ekfac_is_kfac(make: Any) -> None:
    one, other = make(), make()
    first, second = EKFAC(one), KFAC(other)
    train_step(one, first, data(one, 0))
    train_step(other, second, data(other, 0))
    for p, q in zip(one.module().parameters(), other.module().parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("make", [classifier, convolutional])
@pytest.mark.parametrize("kind", ["exact", "factored"])
def test_the_update_is_the_dense_solve(make: Any, kind: str) -> None:
    program = make()
    optimizer = KFAC(program, lr=0.1, momentum=0.0, kl_clip=None, damping=0.01, refresh=100, damping_kind=kind)
    before = {name: p.detach().clone() for name, p in program.module().named_parameters()}
    train_step(program, optimizer, data(program, 0))
    grads = gradients(program)
    eps = float(optimizer._eps) * 0.01
    for block in optimizer.blocks:
        A, G = factor(optimizer.block_state(block), "A")[0], factor(optimizer.block_state(block), "G")[0]
        if kind == "factored":
            pi = ((A.trace() / len(A)) / (G.trace() / len(G))).sqrt()
            damped = torch.kron(
                G + eps**0.5 / pi * torch.eye(len(G), dtype=torch.float64),
                A + pi * eps**0.5 * torch.eye(len(A), dtype=torch.float64),
            )
        else:
            damped = torch.kron(G, A) + eps * torch.eye(len(G) * len(A), dtype=torch.float64)
        wanted = torch.linalg.solve(damped, block.matrix(grads).reshape(-1))
        moved = block.matrix({n: before[n] - program.tensor(n).detach() for n in block.parameters}) / 0.1
        torch.testing.assert_close(moved.reshape(-1), wanted, rtol=1e-6, atol=1e-8)


def test_a_dead_layer_inverts_to_zero() -> None:
    program = classifier()
    with torch.no_grad():
        program.tensor("2.weight").zero_()
    optimizer = KFAC(program, lr=0.1, damping_kind="factored")
    before = program.tensor("0.weight").detach().clone()
    train_step(program, optimizer, data(program, 0))
    assert torch.equal(program.tensor("0.weight"), before)
    assert all(bool(torch.isfinite(p).all()) for p in program.module().parameters())


def test_options_that_mean_nothing() -> None:
    with pytest.raises(UsageError, match="damping_kind"):
        KFAC(classifier(), damping_kind="none")
    with pytest.raises(UsageError, match="whole factors"):
        KFAC(classifier(), damping_kind="factored", rank=2)
