"""Quadratic forms written out, and their constrained minima by one solve of the optimality conditions."""

from __future__ import annotations

import torch
from torch import Tensor


def spd(groups: int, size: int, generator: torch.Generator) -> Tensor:
    """Draw symmetric positive definite matrices [K, d, d]."""
    root = torch.randn(groups, size, size + 3, generator=generator, dtype=torch.float64)
    return root @ root.mT / size + 0.05 * torch.eye(size, dtype=torch.float64)


def block_form(own: Tensor, other: Tensor) -> Tensor:
    """Write P (x) Q out over the row-major entries of [K, d, e]."""
    return torch.block_diag(*(torch.kron(p.contiguous(), q.contiguous()) for p, q in zip(own, other, strict=True)))


def constrained_minimum(form: Tensor, fixed: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Minimise 1/2 x^T F x with ``x[fixed] = values`` by its Karush-Kuhn-Tucker system.

        [F  C^T] [x]   [0]
        [C  0  ] [l] = [v]

    Returns:
        x and the minimum.
    """
    rows = torch.eye(len(form), dtype=form.dtype)[fixed]
    count = len(rows)
    system = torch.cat(
        [torch.cat([form, rows.T], 1), torch.cat([rows, torch.zeros(count, count, dtype=form.dtype)], 1)]
    )
    found = torch.linalg.solve(system, torch.cat([torch.zeros(len(form), dtype=form.dtype), values]))
    x = found[: len(form)]
    return x, 0.5 * x @ form @ x
