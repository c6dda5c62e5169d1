"""Reconstruction: what least squares on the other inputs leaves, against a solver, and units that nobody reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kfe_fx
from kfe_fx.criteria import ScoreContext, score
from kfe_fx.criteria.reconstruction import Reconstruction
from kfe_fx.errors import UsageError
from kfe_fx.labels.analysis import analyze
from kfe_fx.testing import CriterionConformance
from tests.criteria.nets import program_of
from tests.criteria.test_kronecker import Recurrent

TARGETS = torch.tensor([0, 2, 1])


class TestReconstruction(CriterionConformance):
    criterion = "reconstruction"


class Two(nn.Module):
    def __init__(self, read: int = 5) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, read), nn.Linear(read, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def context_of(module: nn.Module, count: int = 40) -> tuple[ScoreContext, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(count, 4).double()
    program = kfe_fx.capture(module.double().eval(), x[:2])
    return ScoreContext.of(program, analyze(program), (x, torch.randint(0, 3, (count,))), batch_size=16), x


def test_it_is_what_weighted_least_squares_leaves() -> None:
    torch.manual_seed(3)
    module = Two()
    context, x = context_of(module)
    held = context.curvature("kfac").blocks["second.weight"]
    assert held.G is not None
    with torch.no_grad():
        read = torch.cat([torch.tanh(module.first(x)), torch.ones(len(x), 1, dtype=torch.float64)], 1)
        given = module(x)
        expected = []
        for unit in range(5):
            others = [k for k in range(6) if k != unit]
            fitted = torch.linalg.lstsq(read[:, others], given).solution
            error = given - read[:, others] @ fitted  # [N, 3]
            expected.append(0.5 * float((error @ held.G[0] * error).sum(1).mean()))
    np.testing.assert_allclose(score(Reconstruction(0.0), context), expected, rtol=1e-9)
    np.testing.assert_allclose(score(Reconstruction(1e-9), context), expected, rtol=1e-5)
    assert (score("reconstruction", context) >= np.array(expected) * (1 - 1e-9)).all()


def test_a_unit_that_others_span_is_free_and_without_damping_the_factor_is_singular() -> None:
    torch.manual_seed(3)
    module = Two()
    with torch.no_grad():
        module.first.weight[3], module.first.bias[3] = module.first.weight[1], module.first.bias[1]
        module.second.weight[:, 3] = torch.tensor([10.0, -10.0, 5.0])
    context, _ = context_of(module)
    found = score(Reconstruction(1e-7), context)
    assert found[[1, 3]].max() < 1e-6 * found[[0, 2, 4]].min()
    assert score("kron-obd", context)[3] > score("kron-obd", context)[1]
    with pytest.raises(UsageError, match="give a damping above 0"):
        score(Reconstruction(0.0), context)


class Queries(nn.Module):
    """One head, whose queries and keys no weight reads, split into positions that do not reach the values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(5, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1)
        return self.out(weights @ self.v(x)).mean(1)


def test_units_that_no_weight_reads_cost_what_their_rows_cost() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5).double()
    program = kfe_fx.capture(Queries().double().eval(), x)
    context = ScoreContext.of(program, analyze(program), (x, TARGETS))
    found, damage = score("reconstruction", context), score("kron-obd", context)
    read = np.array(["out.weight" in unit.slices for unit in context.analysis.units])
    assert (int(read.sum()), int((~read).sum())) == (4, 6)
    np.testing.assert_allclose(found[~read], damage[~read], rtol=1e-12)
    assert not np.isclose(found[read], damage[read]).any()


def test_readers_add_and_depthwise_convolutions_do_not_count() -> None:
    program, x = program_of("residual")
    context = ScoreContext.of(program, analyze(program), (x, TARGETS))
    store = context.curvature("kfac")
    expected = np.zeros(len(context.analysis.units))
    whole = score(Reconstruction(0.1), context)
    assert any("depthwise.weight" in unit.slices for unit in context.analysis.units)
    for unit in context.analysis.units:
        for name in ("inner.weight", "branch.weight", "grouped.weight", "head.weight"):
            held, places = store.blocks[name], unit.slices.get(name, {}).get(1, ())
            if not places:
                continue
            assert held.A is not None
            assert held.G is not None
            weight = program.tensor(name).detach().double()
            if name == "grouped.weight":  # [K, o, i] with the same positions of every group
                groups, wide = weight.view(4, 3, -1), weight[0, 0].numel()
            elif name == "head.weight":
                groups, wide = weight.unsqueeze(0), 1
            else:
                groups, wide = weight.flatten(1).unsqueeze(0), 9
            columns = [place * wide + k for place in places for k in range(wide)]
            for k, matrix in enumerate(groups):
                A, G = held.A[k], held.G[k]
                level = 0.1 * A.diagonal().mean()
                inverse = torch.linalg.inv(A + level * torch.eye(len(A), dtype=A.dtype))
                motion = inverse[:, columns] @ torch.linalg.inv(inverse[columns][:, columns])
                read = matrix[:, columns]
                expected[unit.id] += 0.5 * float(((G @ read @ motion.T @ A @ motion) * read).sum())
    assert (expected > 0).any()
    np.testing.assert_allclose(whole[expected > 0], expected[expected > 0], rtol=1e-8)


def test_recurrent_units_are_read_by_their_own_layer_too() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 3).double()
    program = kfe_fx.capture(Recurrent().double().eval(), x)
    context = ScoreContext.of(program, analyze(program), (x, TARGETS))
    found = score("reconstruction", context)
    with torch.no_grad():
        program.tensor("lstm.weight_hh_l0").zero_()
        alone = score("reconstruction", ScoreContext.of(program, context.analysis, (x, TARGETS)))
    assert (found > 0).all()
    assert (alone > 0).all()
    assert not np.isclose(found, alone).any()
