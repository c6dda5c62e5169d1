"""Eigenbases: decompositions in float64, and what is done where they fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kfe_fx.curvature.eigen import Eigen, eigenbasis

close = torch.testing.assert_close
eigh = torch.linalg.eigh


def factor(groups: int, size: int, rank: int, seed: int = 0) -> Tensor:
    made = torch.randn(groups, size, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return made @ made.transpose(1, 2)


def rebuilt(found: Eigen) -> Tensor:
    assert found.vectors is not None
    return found.vectors * found.values.unsqueeze(1) @ found.vectors.transpose(1, 2)


@given(st.integers(1, 3), st.integers(1, 8), st.integers(0, 8), st.integers(0, 2**20))
def test_a_factor_is_its_eigenvectors_and_values(groups: int, size: int, rank: int, seed: int) -> None:
    given_ = factor(groups, size, rank, seed)
    found = eigenbasis(given_)
    assert found.vectors is not None
    close(rebuilt(found), given_, rtol=1e-10, atol=1e-12)
    eye = torch.eye(size, dtype=torch.float64).expand(groups, size, size)
    close(found.vectors.transpose(1, 2) @ found.vectors, eye, rtol=1e-10, atol=1e-12)
    assert (found.values >= 0).all()
    assert (found.values.diff(dim=1) >= 0).all()
    assert found.fallback == ""


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_rank_deficient_factors_are_decomposed_in_float64(kind: torch.dtype) -> None:
    given_ = factor(1, 60, 3).to(kind)
    found = eigenbasis(given_)
    assert found.values.dtype is found.vectors.dtype is kind  # type: ignore[union-attr]
    assert float(found.values.min()) == 0.0 or float(found.values.min()) < 1e-5
    close(rebuilt(found), given_, rtol=1e-4, atol=1e-5 if kind is torch.float32 else 1e-12)


def test_a_diagonal_stays_one() -> None:
    found = eigenbasis(torch.tensor([[3.0, 0.0, -1e-9]]))
    assert found.vectors is None
    assert found.values.tolist() == [[3.0, 0.0, 0.0]]


def failing(times: int, error: Callable[[], Exception] | None) -> tuple[Any, list[Tensor]]:
    """Make an eigh that fails ``times`` times: raises, or returns what is not a number."""
    seen: list[Tensor] = []

    def run(value: Tensor) -> Any:
        seen.append(value)
        if len(seen) > times:
            return eigh(value)
        if error is not None:
            raise error()
        values, vectors = eigh(value)
        return values * float("nan"), vectors

    return run, seen


FAULTS = {
    "does not converge": lambda: torch.linalg.LinAlgError("the algorithm failed to converge"),
    "the library fails": lambda: RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR"),
    "not a number": None,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("times", "note"), [(0, ""), (1, "1e-12"), (2, "1e-09")])
def test_a_failure_is_tried_again_with_a_little_on_the_diagonal(
    monkeypatch: pytest.MonkeyPatch, fault: str, times: int, note: str
) -> None:
    given_ = factor(2, 5, 5)
    run, seen = failing(times, FAULTS[fault])
    monkeypatch.setattr(torch.linalg, "eigh", run)
    found = eigenbasis(given_)
    assert len(seen) == times + 1
    assert note in found.fallback
    assert bool(found.fallback) == bool(times)
    close(rebuilt(found), given_, rtol=1e-8, atol=1e-8)
    added = (seen[-1] - given_).diagonal(dim1=1, dim2=2) / given_.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    close(added, torch.full_like(added, [0.0, 1e-12, 1e-9][times]), rtol=1e-2, atol=1e-15)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_last_resort_is_the_identity(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    given_ = factor(2, 4, 4)
    run, seen = failing(100, FAULTS[fault])
    monkeypatch.setattr(torch.linalg, "eigh", run)
    found = eigenbasis(given_)
    assert len(seen) == 3
    assert found.fallback == "identity basis: eigh failed"
    close(found.values, given_.diagonal(dim1=1, dim2=2), rtol=0, atol=0)
    close(found.vectors, torch.eye(4, dtype=torch.float64).expand(2, 4, 4), rtol=0, atol=0)


def test_a_factor_that_is_not_finite_falls_back() -> None:
    given_ = factor(1, 3, 3)
    given_[0, 0, 1] = given_[0, 1, 0] = float("inf")
    assert eigenbasis(given_).fallback == "identity basis: eigh failed"
