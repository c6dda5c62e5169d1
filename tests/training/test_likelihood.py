"""Labels that outputs stand for: second derivatives against dense ones, with several outputs and ignored labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kfe_fx.training.batches import Batch
from kfe_fx.training.likelihood import Likelihood
from kfe_fx.training.losses import counted, resolve_loss

N, T, C = 5, 3, 4


def outputs_of(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(N, C, generator=generator, dtype=torch.float64)
    boxes = 100 * torch.randn(N, 2, generator=generator, dtype=torch.float64)
    return {"scores": scores.requires_grad_(), "boxes": boxes.requires_grad_(), "index": torch.zeros(N)}


def curvature(likelihood: Likelihood, outputs: Any, wanted: list[Tensor], batch: Batch) -> Tensor:
    """Return the sum of S S^T over all examples, by every element of the outputs."""
    size = sum(value.numel() for value in wanted)
    total = torch.zeros(size, size, dtype=torch.float64)
    for values, column in likelihood.columns(outputs, batch):
        for n in range(batch.count):  # examples share a column
            part = torch.zeros_like(column)
            rows = len(column) // batch.count
            part[n * rows : (n + 1) * rows] = column[n * rows : (n + 1) * rows]
            found = torch.autograd.grad([values], wanted, [part], retain_graph=True, allow_unused=True)
            flat = torch.cat(
                [(torch.zeros_like(v) if g is None else g).reshape(-1) for v, g in zip(wanted, found, strict=True)]
            )
            total += torch.outer(flat, flat)
    return total


def test_without_a_loss_every_output_counts():
    outputs = outputs_of()
    batch = Batch([torch.zeros(N, 1)], None, N)
    likelihood = Likelihood(None, 0)
    wanted = [outputs["scores"], outputs["boxes"]]
    assert likelihood.size(outputs, batch) == C + 2
    found = curvature(likelihood, outputs, wanted, batch)
    expected = torch.zeros_like(found)
    for n in range(N):
        p = outputs["scores"][n].detach().softmax(0)
        rows = slice(n * C, (n + 1) * C)
        expected[rows, rows] = torch.diag(p) - torch.outer(p, p)
    variance = outputs["boxes"].detach().var(correction=0)
    boxes = torch.arange(N * C, N * (C + 2))
    expected[boxes, boxes] = 1 / (2 * variance)  # of half the mean square change over the variance
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    drawn = torch.autograd.grad(likelihood.total(outputs, batch), wanted)
    assert all(bool((grad != 0).all()) for grad in drawn)
    assert Likelihood(None, 0, main=True).size(outputs, batch) == C


def test_with_targets_or_a_loss_the_main_one_counts():
    outputs, labels = outputs_of(), torch.zeros(N, dtype=torch.int64)
    named = resolve_loss("cross-entropy", None)
    for likelihood, targets in ((Likelihood(None, 0), labels), (Likelihood(named, 0), None)):
        batch = Batch([torch.zeros(N, 1)], targets, N)
        assert likelihood.size(outputs, batch) == C
        assert torch.autograd.grad(likelihood.total(outputs, batch), outputs["boxes"], allow_unused=True) == (None,)


@pytest.mark.parametrize("last", [False, True])
def test_ignored_labels_have_no_curvature(last: bool):
    generator = torch.Generator().manual_seed(1)
    shape = (N, T, C) if last else (N, C, T)
    scores = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, C, (N, T), generator=generator)
    labels[0, 1:], labels[2] = -100, -100
    loss = counted(resolve_loss(None, labels), [labels])
    assert loss is not None
    batch = Batch([torch.zeros(N, 1)], labels, N)
    found = curvature(Likelihood(loss, 0), scores, [scores], batch)

    def whole(flat: Tensor) -> Tensor:  # for a softmax the second derivative of the loss is the Gauss-Newton matrix
        logits = flat.reshape(shape).movedim(-1, 1) if last else flat.reshape(shape)
        return N * F.cross_entropy(logits, labels)

    expected = torch.autograd.functional.hessian(whole, scores.detach().reshape(-1))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    total = Likelihood(loss, 0).total(scores, batch)
    (drawn,) = torch.autograd.grad(total, scores)
    by_position = drawn.abs().sum(-1 if last else 1)
    assert torch.equal(by_position != 0, labels != -100)
