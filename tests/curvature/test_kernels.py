"""The arithmetic of the statistics against the sums that they stand for."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kfe_fx.curvature import kernels
from kfe_fx.curvature.kernels import add_gram, add_second_moments, symmetric

close = torch.testing.assert_close
BRANCHES = ("_by_pairs", "_in_tiles", "_by_example")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def naive(left: Tensor, right: Tensor, U_G: Tensor | None, U_A: Tensor | None) -> tuple[Tensor, Tensor]:
    """Form every example's gradient, rotate it, square it."""
    made = torch.einsum("knro,knri->knoi", left, right)
    if U_G is not None:
        made = torch.einsum("koj,knoi->knji", U_G, made)
    if U_A is not None:
        made = torch.einsum("knji,kil->knjl", made, U_A)
    return made.square().sum(1), made.sum(1)


def check(sizes: tuple[int, ...], bases: tuple[int | None, int | None], seed: int, with_mean: bool) -> None:
    """Compare with the naive sums, added to what is there; ``bases`` are the widths that the sides are rotated to."""
    groups, count, positions, high, wide = sizes
    left, right = (
        random(groups, count, positions, high, seed=seed),
        random(groups, count, positions, wide, seed=seed + 1),
    )
    U_G = None if bases[0] is None else random(groups, high, bases[0], seed=seed + 2)
    U_A = None if bases[1] is None else random(groups, wide, bases[1], seed=seed + 3)
    copies = [value.clone() for value in (left, right)]
    squares, sums = naive(left, right, U_G, U_A)
    start = random(*squares.shape, seed=seed + 4)
    total, mean = start.clone(), start.clone() if with_mean else None
    add_second_moments(total, left, right, U_G, U_A, mean)
    close(total, start + squares, rtol=1e-11, atol=1e-11)
    if mean is not None:
        close(mean, start + sums, rtol=1e-11, atol=1e-11)
    assert torch.equal(left, copies[0])
    assert torch.equal(right, copies[1])


few = st.integers(1, 4)
widths = st.integers(1, 40)
rotated = st.none() | st.integers(1, 7)


@given(st.tuples(few, few, st.integers(1, 9), widths, widths), rotated, rotated, st.integers(0, 2**20), st.booleans())
def test_second_moments_are_sums_over_positions_squared(
    sizes: tuple[int, ...], U_G: int | None, U_A: int | None, seed: int, with_mean: bool
) -> None:
    check(sizes, (U_G, U_A), seed, with_mean)
    with patch.object(kernels, "BUFFER", 1):  # a tile, an example at a time
        check(sizes, (U_G, U_A), seed, with_mean)


@pytest.mark.parametrize(
    ("branch", "sizes", "bases"),
    [
        ("", (2, 5, 1, 3, 4), (None, None)),
        ("", (2, 5, 1, 3, 4), (3, 4)),
        ("_by_pairs", (2, 5, 2, 3, 4), (None, None)),
        ("_by_pairs", (1, 5, 3, 3, 4), (3, 4)),
        ("_in_tiles", (2, 5, 4, 3, 50), (None, None)),
        ("_in_tiles", (2, 5, 4, 6, 50), (6, 50)),
        ("_in_tiles", (1, 5, 4, 6, 5), (2, 3)),  # not square
        ("_by_example", (2, 5, 9, 3, 4), (3, 4)),  # more positions than either side is wide
        ("_by_example", (2, 5, 9, 3, 4), (3, None)),
        ("_by_example", (2, 5, 9, 3, 4), (None, 4)),
        ("_by_example", (2, 5, 5, 3, 8), (3, 8)),  # one side is rotated as rows, one per example
        ("_by_example", (2, 5, 5, 8, 3), (8, 3)),
        ("_by_example", (1, 5, 9, 3, 4), (2, 6)),
    ],
)
@pytest.mark.parametrize("buffer", [1, kernels.BUFFER])
@pytest.mark.parametrize("with_mean", [False, True])
def test_each_order_of_products_gives_the_same(
    monkeypatch: pytest.MonkeyPatch,
    branch: str,
    sizes: tuple[int, ...],
    bases: tuple[int | None, int | None],
    buffer: int,
    with_mean: bool,
) -> None:
    taken: list[str] = []
    for name in BRANCHES:
        function = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *args, f=function, n=name: (taken.append(n), f(*args)))
    monkeypatch.setattr(kernels, "BUFFER", buffer)
    check(sizes, bases, 1, with_mean)
    assert taken == ([branch] if branch else [])


def test_squaring_before_summing_over_positions_would_be_another_matrix() -> None:
    left, right = random(1, 3, 4, 2), random(1, 3, 4, 3, seed=1)
    total = torch.zeros(1, 2, 3, dtype=torch.float64)
    add_second_moments(total, left, right, None, None)
    wrong = torch.einsum("knro,knri->koi", left.square(), right.square())
    assert (total - wrong).norm() > 0.1 * wrong.norm()


@pytest.mark.parametrize("size", [(2, 0, 1), (2, 0, 2), (2, 0, 5), (2, 3, 0)])
def test_no_rows_add_nothing(size: tuple[int, ...]) -> None:
    start = random(2, 3, 4)
    total = start.clone()
    add_second_moments(total, random(*size, 3), random(*size, 4), None, random(2, 4, 4))
    assert torch.equal(total, start)


@given(st.integers(1, 3), st.integers(0, 6), st.integers(1, 30), st.integers(1, 8), st.integers(0, 2**20))
def test_gram_matrices_add(groups: int, count: int, width: int, block: int, seed: int) -> None:
    """Also where the half of the matrix that mirrors the other is left out."""
    rows, more = random(groups, count, width, seed=seed), random(groups, 2, width, seed=seed + 1)
    total = torch.zeros(groups, width, width, dtype=torch.float64)
    with patch.object(kernels, "_BLOCK", block):
        add_gram(total, rows)
        add_gram(total, more)
    both = torch.cat([rows, more], 1)
    found = symmetric(total)
    close(found, both.transpose(1, 2) @ both, rtol=1e-12, atol=1e-12)
    assert torch.equal(found, found.transpose(1, 2))


def test_a_wide_gram_matrix_leaves_a_part_out() -> None:
    rows = random(1, 7, 400)
    total = torch.zeros(1, 400, 400, dtype=torch.float64)
    add_gram(total, rows)
    assert not total[:, 200:, :200].any()
    close(symmetric(total), rows.transpose(1, 2) @ rows, rtol=1e-12, atol=1e-12)
