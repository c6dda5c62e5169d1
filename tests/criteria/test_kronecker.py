"""Criteria of Kronecker-factored curvature on networks, against dense blocks of the store's own operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import kfe_fx
from kfe_fx.criteria import ScoreContext, score
from kfe_fx.criteria.kronecker import DiagonalSurgery, KronOBS, Scoring, owned_entries
from kfe_fx.criteria.members import ROWS, find_members
from kfe_fx.curvature import Store, fit
from kfe_fx.errors import BadData, UsageError
from kfe_fx.labels.analysis import analyze
from kfe_fx.program import Program
from kfe_fx.testing import CriterionConformance
from tests.criteria.dense import block_form, constrained_minimum
from tests.criteria.nets import program_of

TARGETS = torch.tensor([0, 2, 1])
NETS = ["residual", "attention", "windows", "embedding", "transposed", "lstm"]


class TestDiagonalDamage(CriterionConformance):
    criterion = "c-obd"


class TestDiagonalSurgery(CriterionConformance):
    criterion = "c-obs"


class TestKronOBD(CriterionConformance):
    criterion = "kron-obd"


class TestKronOBS(CriterionConformance):
    criterion = "kron-obs"


class TestEigenbasis(CriterionConformance):
    criterion = "kfe"


class TestEigenbasisProduct(CriterionConformance):
    criterion = "kfe-product"


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(7, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(x)).mean(1))


class Enlarging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.ConvTranspose2d(3, 5, 2, stride=2), nn.Conv2d(5, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x))).mean((2, 3))


def captured(name: str) -> tuple[Program, Tensor]:
    if name in ("residual", "attention", "windows"):
        return program_of(name)
    torch.manual_seed(0)
    module: nn.Module
    if name == "lstm":
        module, x = Recurrent(), torch.randn(3, 4, 3).double()
    elif name == "embedding":
        module, x = Words(), torch.randint(0, 7, (3, 6))
    else:
        module, x = Enlarging(), torch.randn(3, 3, 4, 4).double()
    return kfe_fx.capture(module.double().eval(), x), x


def context_of(name: str = "residual", store: Store | None = None) -> ScoreContext:
    program, x = captured(name)
    context = ScoreContext.of(program, analyze(program), (x, TARGETS), batch_size=2)
    if store is not None:
        context.store["curvature"] = store
    return context


def test_a_unit_that_nothing_was_measured_of_goes_last_and_promises_nothing():
    context = context_of()
    scores = Scoring(context).scores("kfac", [])  # no question: entries with second moments alone are left
    assert context.facts["unmeasured"] > 0
    assert np.isfinite(scores).all()
    assert context.changes is not None
    assert np.isnan(context.changes).sum() == context.facts["unmeasured"]


def quadratic(context: ScoreContext, kind: str) -> np.ndarray:
    """Sum 1/2 theta^T F theta over the blocks that make each unit, with F of the store's operator, written out."""
    store = context.curvature()
    operator = store.operator(context.program, kind)
    total = np.zeros(len(context.analysis.units))
    for members in find_members(context.program, context.analysis):
        dense = operator.blocks[members.block.name].dense()
        weight = members.block.matrix({n: context.program.tensor(n).detach() for n in members.block.parameters})
        for side in members.outputs:
            marks = marked(members, side, total)
            for unit in range(len(total)):
                theta = (weight * marks[unit]).reshape(-1)
                total[unit] += 0.5 * float(theta @ dense @ theta)
    return total


def marked(members: Any, side: str, units: Any) -> Tensor:
    """Mark the entries that each unit owns along a side, [units, K, o, i]."""
    marks = torch.zeros(len(units), *members.block.shape, dtype=torch.float64)
    for ids in members.rows if side == ROWS else members.columns:
        for unit in range(len(units)):
            lines = torch.from_numpy(ids == unit)
            marks[unit][(lines.unsqueeze(2) if side == ROWS else lines.unsqueeze(1)).expand(members.block.shape)] = 1
    return marks


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-10 * max(float(expected.max()), 1e-30))


@pytest.mark.parametrize("name", NETS)
def test_scores_are_dense_quadratic_forms(name: str) -> None:
    context = context_of(name)
    context.curvature("ekfac", "diagonal")
    for criterion, kind in (("c-obd", "diagonal"), ("kron-obd", "kfac"), ("kfe-product", "kfac"), ("kfe", "ekfac")):
        found = score(criterion, context)
        assert (found > 0).all(), criterion
        close(found, quadratic(context, kind))
    assert context.facts["curvature"] == "exact (categorical)"
    assert (context.facts["sharing"], context.facts["examples"], context.facts["unmeasured"]) == ("expand", 3, 0)


@pytest.mark.parametrize("name", NETS)
def test_identities(name: str) -> None:
    context = context_of(name)
    damage = score("kron-obd", context)
    close(score("kfe-product", context), damage)
    for damping in (1e-6, 1e-3, 1.0):
        surgery = score(KronOBS(damping), context)
        assert (surgery <= damage * (1 + 1e-10)).all()
        assert (surgery >= 0).all()
    np.testing.assert_allclose(score(KronOBS(1e9), context), damage, rtol=1e-7)  # nothing else can move


def test_kron_obs_is_the_constrained_minimum_over_the_layer() -> None:
    """T3.3 on a network: the gates of a recurrent unit go, in both weights, each at its own constrained minimum."""
    context = context_of("lstm")
    store = context.curvature("kfac")
    damping, total = 0.1, np.zeros(len(context.analysis.units))
    for members in find_members(context.program, context.analysis):
        held = store.blocks[members.block.name]
        assert held.A is not None
        assert held.G is not None
        level = damping * held.G.diagonal(dim1=1, dim2=2).mean()
        damped = block_form(held.G + level * torch.eye(held.G.shape[1], dtype=torch.float64), held.A)
        weight = members.block.matrix({n: context.program.tensor(n).detach() for n in members.block.parameters})
        form, marks = block_form(held.G, held.A), marked(members, ROWS, total)
        for unit in range(len(total)):
            fixed = marks[unit].reshape(-1) > 0
            if fixed.any():
                motion, _ = constrained_minimum(damped, fixed, -weight.reshape(-1)[fixed])
                total[unit] += 0.5 * float(motion @ form @ motion)
    np.testing.assert_allclose(score(KronOBS(damping), context), total, rtol=1e-9)


def test_c_obs_is_the_sum_over_entries() -> None:
    context = context_of("windows")
    held = context.curvature("kfac").blocks["first.weight"]
    assert held.A is not None
    assert held.G is not None
    damped = [f[0] + 0.1 * f[0].diagonal().mean() * torch.eye(len(f[0]), dtype=f.dtype) for f in (held.G, held.A)]
    inverse = torch.linalg.inv(torch.kron(*damped)).diagonal().reshape(6, 6)
    named = dict(context.program.module().named_parameters())
    weight = torch.cat([named["first.weight"], named["first.bias"].unsqueeze(1)], 1)
    expected = (0.5 * weight.square() / inverse).sum(1).detach().numpy()
    np.testing.assert_allclose(score(DiagonalSurgery(0.1), context), expected, rtol=1e-9)


class Twins(nn.Module):
    """Two hidden layers that add up."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.head = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.one(x) + self.other(x)))


def test_the_blocks_of_a_unit_add() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5).double()
    program = kfe_fx.capture(Twins().double().eval(), x)
    context = ScoreContext.of(program, analyze(program), (x, TARGETS))
    named, store = dict(program.module().named_parameters()), context.curvature("kfac")
    expected = torch.zeros(6, dtype=torch.float64)
    for name in ("one", "other"):
        held = store.blocks[f"{name}.weight"]
        assert held.A is not None
        assert held.G is not None
        rows = torch.cat([named[f"{name}.weight"], named[f"{name}.bias"].unsqueeze(1)], 1).detach()
        expected += 0.5 * held.G[0].diagonal() * ((rows @ held.A[0]) * rows).sum(1)
    close(score("kron-obd", context), expected.numpy())


# units without rows ---------------------------------------------------------------------------------------------------


class Normed(nn.Module):
    """A computed weight: its parameters have second moments alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = parametrizations.weight_norm(nn.Linear(5, 6))
        self.second = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def test_units_without_rows_have_diagonals() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5).double()
    program = kfe_fx.capture(Normed().double().eval(), x)
    context = ScoreContext.of(program, analyze(program), (x, TARGETS))
    assert not find_members(program, context.analysis)[0].rows  # the head's
    store = fit(program, (x, TARGETS), statistics="diagonal")
    expected = torch.zeros(6, dtype=torch.float64)
    for name, value in program.module().named_parameters():
        if name.startswith("first"):
            moments = store.blocks[name].D
            assert moments is not None
            expected += 0.5 * (moments.reshape(value.shape) * value.square()).detach().reshape(6, -1).sum(1)
    for criterion in ("c-obd", "kron-obd", "kron-obs", "kfe", "kfe-product", "c-obs"):
        close(score(criterion, context), expected.numpy())
        assert context.facts["unmeasured"] == 0
    given = fit(program, (x, TARGETS), statistics="kfac")
    context = ScoreContext.of(program, context.analysis)
    context.store["curvature"] = given
    with pytest.raises(UsageError, match="lack 'diagonal'; fit them with it"):
        score("kron-obd", context)


class Projected(nn.Module):
    """A first layer that nobody trains and that is no parameter."""

    fixed: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("fixed", torch.randn(6, 5))
        self.second = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(torch.nn.functional.linear(x, self.fixed)))


def test_units_that_buffers_make_are_scored_where_they_are_read() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5).double()
    program = kfe_fx.capture(Projected().double().eval(), x)
    context = ScoreContext.of(program, analyze(program), (x, TARGETS))
    assert len(context.analysis.units) == 6
    held = context.curvature("kfac").blocks["second.weight"]
    assert held.A is not None
    assert held.G is not None
    weight = program.tensor("second.weight").detach()
    columns = 0.5 * held.A[0].diagonal()[:6] * ((held.G[0] @ weight) * weight).sum(0)
    close(score("kron-obd", context), columns.numpy())


def test_entries_of_two_slices_count_once() -> None:
    first, second = np.array([0, 1, -1]), np.array([1, 0])
    found = owned_entries([(first,), (second,)], (3, 2))
    counts = np.zeros((3, 3, 2), dtype=int)
    for ids in found:
        for place, unit in enumerate(ids):
            if unit >= 0:
                counts[unit].reshape(-1)[place] += 1
    for unit in range(2):
        expected = (first[:, None] == unit) | (second[None, :] == unit)
        np.testing.assert_array_equal(counts[unit], expected.astype(int))


# where the statistics come from ---------------------------------------------------------------------------------------


def test_statistics_are_measured_once_and_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    from kfe_fx.criteria import base

    asked = []

    def counted(*args: Any, **options: Any) -> Store:
        asked.append(options["statistics"])
        return fit(*args, **options)

    monkeypatch.setattr(base, "fit", counted)
    context = context_of()
    alone = {name: score(name, context_of()) for name in ("kron-obd", "kfe", "c-obd")}
    asked.clear()
    for name in ("kron-obd", "kron-obs", "kfe", "kfe-product", "c-obd", "kron-obd", "kfe"):
        found = score(name, context)
        if name in alone:
            close(found, alone[name])
    assert asked == [("kfac",), ("ekfac",), ("diagonal",)]
    assert isinstance(context.store["curvature"], Store)
    other = context_of()
    for name in ("c-obd", "kfe", "kron-obd"):  # the other way round
        close(score(name, other), alone[name])
    assert asked[3:] == [("diagonal",), ("ekfac",)]


def test_a_store_that_is_given_is_used() -> None:
    program, x = captured("residual")
    store = fit(program, (x, TARGETS), statistics=("ekfac", "diagonal"), source="empirical")
    context = ScoreContext.of(program, analyze(program))
    context.store["curvature"] = store
    for criterion in ("c-obd", "kron-obs", "kfe"):
        assert (score(criterion, context) >= 0).all()
    assert context.store["curvature"] is store
    assert context.facts["curvature"] == "empirical (labels of the data)"
    context.store["curvature"] = store.merge(store)  # twice the sums and twice the counts
    close(score("kron-obd", context), score("kron-obd", context_of(store=store)))


def test_factors_that_were_merged_need_no_eigenbases() -> None:
    program, x = captured("residual")
    store = fit(program, (x, TARGETS), statistics="kfac")
    expected = score("kfe-product", context_of(store=store))
    for block in store.blocks.values():
        block.basis = {}
    close(score("kfe-product", context_of(store=store)), expected)


def test_statistics_that_do_not_fit_are_refused() -> None:
    program, x = captured("residual")
    store = fit(program, (x, TARGETS), statistics="kfac")
    other, y = captured("attention")
    foreign = ScoreContext.of(other, analyze(other), (y, TARGETS))
    foreign.store["curvature"] = store
    with pytest.raises(UsageError, match="of another network"):
        score("kron-obd", foreign)
    with pytest.raises(UsageError, match="lack 'ekfac'; fit them with it"):
        score("kfe", context_of(store=store))
    with pytest.raises(UsageError, match="lack 'diagonal'"):
        score("c-obd", context_of(store=store))
    context = ScoreContext.of(program, analyze(program), (x, TARGETS))
    context.store["curvature"] = store
    with torch.no_grad():
        program.tensor("head.weight").mul_(2)
    with pytest.raises(UsageError, match="older than the weights"):
        score("kron-obd", context)
    context.store["curvature"] = "a.safetensors"
    with pytest.raises(UsageError, match="is a str; give a curvature Store"):
        score("kron-obd", context)


def test_what_was_measured_here_follows_the_weights() -> None:
    context = context_of("windows")
    first = score("kron-obd", context)
    with torch.no_grad():
        context.program.tensor("second.weight").mul_(2)
    second = score("kron-obd", context)
    fresh = ScoreContext.of(context.program, context.analysis, context.batches, batch_size=2)
    close(second, score("kron-obd", fresh))
    assert not np.allclose(first, second)


def test_without_data_and_statistics_there_is_no_score() -> None:
    program, _ = captured("residual")
    for criterion in ("c-obd", "c-obs", "kron-obd", "kron-obs", "kfe", "kfe-product", "reconstruction"):
        with pytest.raises(UsageError, match=f"'{criterion}' needs curvature, which is not there; give --data"):
            score(criterion, ScoreContext.of(program, analyze(program)))
    with pytest.raises(UsageError, match="need data, which is not there; give --data"):
        ScoreContext.of(program, analyze(program)).curvature("kfac")


def test_derivatives_that_are_no_numbers_are_refused() -> None:
    program, x = captured("windows")
    x = x.clone()
    x[0] = torch.inf
    with pytest.raises(BadData, match="not finite"):
        score("kron-obd", ScoreContext.of(program, analyze(program), (x, TARGETS)))


def test_a_block_that_no_gradient_reaches_is_free_and_one_of_broken_gradients_is_refused() -> None:
    program, x = captured("windows")
    store = fit(program, (x, TARGETS), statistics="kfac")
    store.blocks["first.weight"].sums.clear()
    assert not score("kron-obd", context_of("windows", store)).any()
    store.facts["nonfinite"] = {"first.weight": 3}
    with pytest.raises(BadData, match=r"nothing finite was measured of first.weight"):
        score("kron-obd", context_of("windows", store))
