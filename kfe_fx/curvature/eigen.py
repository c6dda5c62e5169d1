"""Eigenbases of Kronecker factors, in float64 wherever the factors live."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_TRIES = (0.0, 1e-12, 1e-9)  # of the mean eigenvalue, added to the diagonal


@dataclass(frozen=True)
class Eigen:
    """``factor = vectors diag(values) vectors^T`` per group; ``vectors`` is None where the factor is a diagonal.

    ``values`` are ascending and not below zero; ``fallback`` says what it took, "" if nothing.
    """

    values: Tensor
    vectors: Tensor | None
    fallback: str = ""


def eigenbasis(factor: Tensor) -> Eigen:
    """Decompose a symmetric factor [K, d, d], or a diagonal [K, d].

    ``torch.linalg.eigh`` runs in float64 (in float32 it fails on real, rank-deficient factors) and its results go back
    to the factor's type. Should it not converge, it is tried on the CPU, then with 1e-12 and 1e-9 of the mean
    eigenvalue on the diagonal, and ``fallback`` records that; the last resort is the identity with the diagonal.
    """
    if factor.dim() == 2:
        return Eigen(factor.clamp_min(0), None)
    wide = factor.double()
    identity = torch.eye(factor.shape[-1], dtype=torch.float64, device=factor.device)
    mean = wide.diagonal(dim1=1, dim2=2).mean(1).clamp_min(0).view(-1, 1, 1)
    for jitter in _TRIES:
        for device in dict.fromkeys((str(factor.device), "cpu")):
            try:
                values, vectors = torch.linalg.eigh((wide + jitter * mean * identity).to(device))
            except RuntimeError:  # LinAlgError is one; cuSOLVER and LAPACK raise others too
                continue
            if not bool(values.isfinite().all() & vectors.isfinite().all()):
                continue
            values = (values - jitter * mean.view(-1, 1).to(device)).clamp_min(0)
            notes = [f"{jitter:g} of the mean eigenvalue added"] if jitter else []
            if device != str(factor.device):
                notes.append("on the CPU")
            return Eigen(values.to(factor), vectors.to(factor), ", ".join(notes))
    diagonal = factor.diagonal(dim1=1, dim2=2).clamp_min(0)
    return Eigen(diagonal, identity.to(factor.dtype).expand_as(factor).contiguous(), "identity basis: eigh failed")
