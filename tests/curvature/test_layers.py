"""Every way to use a parameter: the statistics are those of each example's gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfe_fx
from kfe_fx.curvature.kernels import symmetric
from tests.curvature.nets import CASES, MIXED, K, N, built, randn, tokens
from tests.curvature.oracle import assert_equal, check, measured, square, targets_of


@pytest.mark.parametrize("name", CASES)
def test_statistics_are_those_of_each_examples_gradient(name: str) -> None:
    net, inputs = built(CASES[name])
    _, blocks, _ = check(net, inputs, N)
    kinds = {parameter: block.kind for block in blocks.blocks for parameter in block.parameters}
    left = {item.parameter for item in blocks.left_out}
    given = CASES[name][2]
    assert kinds == {parameter: given.get(parameter, K) for parameter in kinds}
    assert kinds.keys() | left == dict(net.named_parameters()).keys()
    assert all(batched for block in blocks.blocks for batched in block.batched.values()) == (name not in MIXED)


def factors(layer: nn.Module, x: Tensor, rows: Tensor) -> None:
    """Compare A and G of a layer with their definition; ``rows`` [N, R, i] are what goes in.

    A = mean over all rows of a a^T, G = sum over positions of g g^T, mean over examples.
    """
    store = measured(kfe_fx.capture(layer, x), (x,), targets_of(N))
    out = layer(x).detach().requires_grad_()
    square(out, targets_of(N)).sum().backward()
    assert out.grad is not None
    grads = out.grad.flatten(2).transpose(1, 2) if isinstance(layer, nn.Conv2d) else out.grad
    block = store.blocks["weight"]
    assert block.A is not None
    assert block.G is not None
    A = torch.einsum("nri,nrj->ij", rows, rows) / (rows.shape[0] * rows.shape[1])
    G = torch.einsum("nro,nrp->op", grads, grads) / N
    assert_equal(block.A[0] if block.A.dim() == 3 else block.A[0].diag(), A, "A")
    assert_equal(block.G[0] if block.G.dim() == 3 else block.G[0].diag(), G, "G")


def ones(rows: Tensor) -> Tensor:
    return torch.cat([rows, torch.ones_like(rows[..., :1])], -1)


def test_factors_of_a_linear_layer() -> None:
    x = randn(N, 5, 4)
    factors(nn.Linear(4, 3).double(), x, ones(x))


def test_factors_of_a_convolution() -> None:
    x = randn(N, 2, 4, 5)
    factors(nn.Conv2d(2, 3, (2, 3), padding=(0, 1)).double(), x, ones(F.unfold(x, (2, 3), padding=(0, 1)).mT))


def test_factors_of_an_embedding_are_swapped() -> None:
    """The rows of the weight are picked: G is the diagonal of the counts, A that of the gradients."""
    layer, x = nn.Embedding(7, 4).double(), tokens(N, 5)
    store = measured(kfe_fx.capture(layer, x), (x,), targets_of(N))
    out = layer(x).detach().requires_grad_()
    square(out, targets_of(N)).sum().backward()
    assert out.grad is not None
    block = store.blocks["weight"]
    assert_equal(symmetric(block.sums["A"])[0], torch.einsum("nri,nrj->ij", out.grad, out.grad), "A")
    assert_equal(block.sums["G"][0], torch.bincount(x.flatten(), minlength=7).double(), "G")
