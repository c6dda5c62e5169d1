"""Models of the loss on lines of a block against dense quadratic forms over vec(M), and a generic solver of minima."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kfe_fx.criteria import quadratics
from kfe_fx.criteria.members import Sets
from kfe_fx.criteria.quadratics import Lines
from kfe_fx.curvature.eigen import eigenbasis
from kfe_fx.errors import UsageError
from tests.criteria.dense import block_form, constrained_minimum, spd

SHAPES = [(1, 7, 5), (1, 4, 9), (3, 6, 4), (2, 5, 1)]


def lines_of(shape: tuple[int, int, int], seed: int = 0) -> Lines:
    """Make a block of random factors and second moments."""
    g = torch.Generator().manual_seed(seed)
    groups, high, wide = shape
    own, other = spd(groups, high, g), spd(groups, wide, g)
    ends = eigenbasis(own), eigenbasis(other)
    return Lines(
        torch.randn(shape, generator=g, dtype=torch.float64),
        own,
        other,
        torch.rand(shape, generator=g, dtype=torch.float64),
        torch.rand(shape, generator=g, dtype=torch.float64),
        (ends[0].vectors, ends[0].values, ends[1].vectors, ends[1].values),
    )


def sets_of(shape: tuple[int, int, int], size: int, seed: int = 0) -> Sets:
    """Draw disjoint sets of ``size`` lines in every group."""
    g = torch.Generator().manual_seed(seed)
    made = [torch.randperm(shape[1], generator=g)[: shape[1] // size * size].view(-1, size) for _ in range(shape[0])]
    groups = torch.cat([torch.full((len(lines),), group) for group, lines in enumerate(made)])
    return Sets(groups, torch.cat(made), torch.arange(len(groups)))


def alone(lines: Lines, sets: Sets, n: int) -> Tensor:
    """Return the lines of set n and zeros elsewhere, [K, d, e]."""
    theta = torch.zeros_like(lines.weight)
    theta[sets.groups[n], sets.lines[n]] = lines.weight[sets.groups[n], sets.lines[n]]
    return theta


def chosen(lines: Lines, sets: Sets, n: int) -> Tensor:
    """Mark the entries of set n, flat."""
    mask = torch.zeros_like(lines.weight, dtype=torch.bool)
    mask[sets.groups[n], sets.lines[n]] = True
    return mask.reshape(-1)


@pytest.fixture(params=[(shape, size) for shape in SHAPES for size in (1, 2, 3)], ids=str)
def case(request: pytest.FixtureRequest) -> tuple[Lines, Sets]:
    shape, size = request.param
    return lines_of(shape), sets_of(shape, size)


def dense_form(lines: Lines) -> Tensor:
    assert lines.own is not None
    assert lines.other is not None
    return block_form(lines.own, lines.other)


def compare(found: Tensor, expected: list[Tensor]) -> None:
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-10, atol=1e-12)


def test_what_is_removed_alone_is_a_dense_quadratic_form(case: tuple[Lines, Sets]) -> None:
    lines, sets = case
    form = dense_form(lines)
    expected = [0.5 * (theta := alone(lines, sets, n).reshape(-1)) @ form @ theta for n in range(len(sets.units))]
    compare(quadratics.removed_change(lines, sets), expected)
    compare(quadratics.eigenbasis_change(lines, sets, product=True), expected)  # T3.1 per unit


def test_compensation_is_the_constrained_minimum(case: tuple[Lines, Sets]) -> None:
    """T3.3, for sets of lines: min 1/2 x^T (P (x) Q) x with x = -M on the lines of the set."""
    lines, sets = case
    form = dense_form(lines)
    expected = []
    for n in range(len(sets.units)):
        fixed = chosen(lines, sets, n)
        expected.append(constrained_minimum(form, fixed, -lines.weight.reshape(-1)[fixed])[1])
    found = quadratics.compensated_change(lines, sets, 0.0)
    compare(found, expected)
    assert (found <= quadratics.removed_change(lines, sets) * (1 + 1e-12)).all()


@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
def test_damped_compensation_costs_what_its_motion_costs_undamped(case: tuple[Lines, Sets], damping: float) -> None:
    lines, sets = case
    assert lines.own is not None
    assert lines.other is not None
    level = damping * lines.own.diagonal(dim1=1, dim2=2).mean(1)
    damped = block_form(lines.own + torch.diag_embed(level.unsqueeze(1).expand(lines.own.shape[:2])), lines.other)
    form, expected = dense_form(lines), []
    for n in range(len(sets.units)):
        fixed = chosen(lines, sets, n)
        motion, _ = constrained_minimum(damped, fixed, -lines.weight.reshape(-1)[fixed])
        expected.append(0.5 * motion @ form @ motion)
    found = quadratics.compensated_change(lines, sets, damping)
    compare(found, expected)
    assert (quadratics.compensated_change(lines, sets, 0.0) <= found * (1 + 1e-10)).all()
    assert (found <= quadratics.removed_change(lines, sets) * (1 + 1e-10)).all()


def test_one_line_has_the_closed_form_of_the_paper() -> None:
    lines, sets = lines_of((1, 7, 5)), sets_of((1, 7, 5), 1)
    assert lines.own is not None
    assert lines.other is not None
    theta, inverse = lines.weight[0], torch.linalg.inv(lines.own[0])
    closed = 0.5 * ((theta @ lines.other[0]) * theta).sum(1) / inverse.diagonal()
    compare(quadratics.compensated_change(lines, sets, 0.0), list(closed[sets.lines[:, 0]]))


def test_entries_go_one_by_one_by_the_dense_inverse(case: tuple[Lines, Sets]) -> None:
    lines, sets = case
    scores = 0.5 * lines.weight.reshape(-1).square() / torch.linalg.inv(dense_form(lines)).diagonal()
    compare(
        quadratics.entrywise_surgery(lines, sets, 0.0),
        [scores[chosen(lines, sets, n)].sum() for n in range(len(sets.units))],
    )


def test_the_diagonal_is_summed_over_the_entries(case: tuple[Lines, Sets]) -> None:
    lines, sets = case
    assert lines.diagonal is not None
    scores = 0.5 * lines.diagonal * lines.weight.square()
    expected = [scores.reshape(-1)[chosen(lines, sets, n)].sum() for n in range(len(sets.units))]
    compare(quadratics.diagonal_change(lines, sets), expected)


def test_second_moments_are_a_form_in_the_eigenbasis(case: tuple[Lines, Sets], monkeypatch: pytest.MonkeyPatch) -> None:
    lines, sets = case
    assert lines.bases is not None
    assert lines.second is not None
    own, _, other, _ = lines.bases
    assert own is not None
    assert other is not None
    turned = [torch.kron(own[k].contiguous(), other[k].contiguous()) for k in range(len(own))]
    form = torch.block_diag(*(q * s.reshape(-1) @ q.T for q, s in zip(turned, lines.second, strict=True)))
    expected = [0.5 * (theta := alone(lines, sets, n).reshape(-1)) @ form @ theta for n in range(len(sets.units))]
    compare(quadratics.eigenbasis_change(lines, sets, product=False), expected)
    monkeypatch.setattr(quadratics, "_BUFFER", 1)  # one set at a time
    compare(quadratics.eigenbasis_change(lines, sets, product=False), expected)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("flat", ["own", "other", "both"])
def test_factors_that_are_diagonals(flat: str, size: int) -> None:
    whole, sets = lines_of((2, 6, 4)), sets_of((2, 6, 4), size)
    assert whole.own is not None
    assert whole.other is not None
    thin = {"own": whole.own.diagonal(dim1=1, dim2=2), "other": whole.other.diagonal(dim1=1, dim2=2)}
    thin = {key: value for key, value in thin.items() if flat in (key, "both")}
    wide = {key: torch.diag_embed(value) for key, value in thin.items()}
    parts = []
    for chosen_factors in (thin, wide):
        own, other = chosen_factors.get("own", whole.own), chosen_factors.get("other", whole.other)
        ends = eigenbasis(own), eigenbasis(other)
        bases = ends[0].vectors, ends[0].values, ends[1].vectors, ends[1].values
        parts.append(Lines(whole.weight, own, other, whole.diagonal, whole.second, bases))
    for model in (
        quadratics.removed_change,
        lambda lines, sets: quadratics.compensated_change(lines, sets, 1e-2),
        lambda lines, sets: quadratics.entrywise_surgery(lines, sets, 1e-2),
        lambda lines, sets: quadratics.eigenbasis_change(lines, sets, product=True),
    ):
        torch.testing.assert_close(model(parts[0], sets), model(parts[1], sets), rtol=1e-10, atol=1e-12)


def test_a_factor_without_an_inverse_asks_for_damping() -> None:
    lines, sets = lines_of((1, 6, 4)), sets_of((1, 6, 4), 2)
    assert lines.bases is not None
    root = torch.randn(1, 6, 5, dtype=torch.float64)
    for own in (torch.zeros(1, 6, 6, dtype=torch.float64), root @ root.mT):
        ends = eigenbasis(own)
        singular = Lines(lines.weight, own, lines.other, bases=(ends.vectors, ends.values, *lines.bases[2:]))
        found = quadratics.compensated_change(singular, sets, 1e-3)
        assert (found > 0).all() == own.any()  # nothing is lost where nothing is felt
        for model in (quadratics.compensated_change, quadratics.entrywise_surgery):
            with pytest.raises(UsageError, match="has no inverse; give a damping above 0"):
                model(singular, sets, 0.0)
    with pytest.raises(UsageError, match="the damping is -1"):
        quadratics.compensated_change(lines, sets, -1.0)
