"""Compensation from captured factors: dense constrained minima, least squares, and what comes out for networks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfe_fx
from kfe_fx.criteria import ScoreContext, score
from kfe_fx.criteria.kronecker import KronOBS
from kfe_fx.criteria.members import gathered
from kfe_fx.curvature import Store, find_blocks, fit
from kfe_fx.errors import PlanError, UsageError
from kfe_fx.labels.analysis import Analysis, analyze
from kfe_fx.passes.shrink import Shrink
from kfe_fx.plan import Plan
from kfe_fx.program import Program
from kfe_fx.repair.obs import compensated, obs_weights
from tests.criteria.dense import block_form, constrained_minimum, spd
from tests.criteria.nets import program_of
from tests.random_nets import sample_net

TARGETS = torch.tensor([0, 2, 1])


# one block ------------------------------------------------------------------------------------------------------------


def drawn(size: tuple[int, int], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Draw W, A, G and what stays; the last column, that of the bias, always does."""
    g = torch.Generator().manual_seed(seed)
    high, wide = size
    rows, columns = torch.rand(high, generator=g) < 0.6, torch.rand(wide, generator=g) < 0.6
    rows[0] = columns[-1] = True
    weight = torch.randn(high, wide, generator=g, dtype=torch.float64)
    return weight, spd(1, wide, g)[0], spd(1, high, g)[0], rows, columns


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [(5, 4), (3, 8), (6, 1), (1, 6), (7, 7)])
def test_it_is_the_joint_minimum_over_all_entries_that_stay(size: tuple[int, int], seed: int) -> None:
    weight, A, G, rows, columns = drawn(size, seed)
    free = (rows.unsqueeze(1) & columns.unsqueeze(0)).reshape(-1)
    form = block_form(G.unsqueeze(0), A.unsqueeze(0))
    motion, least = constrained_minimum(form, ~free, -weight.reshape(-1)[~free])
    found = compensated(weight, A, G, rows, columns)
    torch.testing.assert_close(found.reshape(-1), weight.reshape(-1) + motion, rtol=1e-10, atol=1e-10)
    assert not found.reshape(-1)[~free].any()
    error = found - weight
    torch.testing.assert_close(0.5 * torch.trace(G @ error @ A @ error.T), least, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_each_side_alone_is_the_minimum_over_that_side(seed: int) -> None:
    """Without A nothing moves along a row: the removed columns are as good as zero; without G the same of rows."""
    weight, A, G, rows, columns = drawn((6, 5), seed)
    identity = {high: torch.eye(high, dtype=torch.float64) for high in (5, 6)}
    for no_a, no_g in ((None, G), (A, None), (None, None), (A.diagonal(), G), (A, G.diagonal())):
        found = compensated(weight, no_a, no_g, rows, columns)
        same = compensated(
            weight,
            identity[5] if no_a is None or no_a.dim() == 1 else A,
            identity[6] if no_g is None or no_g.dim() == 1 else G,
            rows,
            columns,
        )
        torch.testing.assert_close(found, same, rtol=1e-12, atol=1e-12)


def test_one_row_moves_the_others_by_kron_obs() -> None:
    """T3.3: dW = -(G^-1 e_i) theta_i / [G^-1]_ii, whatever A is."""
    weight, A, G, _, _ = drawn((6, 5), 0)
    rows = torch.arange(6) != 2
    inverse = torch.linalg.inv(G)
    expected = weight - inverse[:, 2:3] * weight[2] / inverse[2, 2]
    found = compensated(weight, A, G, rows, torch.ones(5, dtype=torch.bool))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_damping_is_that_of_damped_factors() -> None:
    weight, A, G, rows, columns = drawn((6, 5), 1)
    damped = [f + 0.2 * f.diagonal().mean() * torch.eye(len(f), dtype=torch.float64) for f in (A, G)]
    expected = compensated(weight, damped[0], damped[1], rows, columns)
    torch.testing.assert_close(compensated(weight, A, G, rows, columns, 0.2), expected, rtol=1e-10, atol=0)
    still = weight * (rows.unsqueeze(1) & columns.unsqueeze(0))
    torch.testing.assert_close(compensated(weight, A, G, rows, columns, 1e12), still, rtol=0, atol=1e-10)
    dead = torch.zeros_like(A)
    assert torch.equal(compensated(weight, dead, None, rows, columns, 1e-3), still)
    with pytest.raises(UsageError, match="give a damping above 0"):
        compensated(weight, dead, G, rows, columns)


# networks -------------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 5)
        self.third = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def two(count: int = 200) -> tuple[Program, Analysis, Tensor, Tensor]:
    torch.manual_seed(0)
    x, targets = torch.randn(count, 4).double(), torch.randint(0, 3, (count,))
    program = kfe_fx.capture(Two().double().eval(), x[:2])
    return program, analyze(program), x, targets


def units_made(analysis: Analysis, weight: str, rows: list[int]) -> list[int]:
    return [int(analysis.params[weight][0][0][row]) for row in rows]


def test_the_inputs_alone_are_least_squares_with_a_bias() -> None:
    program, analysis, x, targets = two()
    store = fit(program, (x, targets), statistics="kfac")
    gone = [1, 4, 5]
    plan = Plan.of_units(analysis, units_made(analysis, "first.weight", gone))
    found = obs_weights(program, store, plan, damping=0.0)
    module = program.module()
    with torch.no_grad():
        read = torch.tanh(F.linear(x, program.tensor("first.weight"), program.tensor("first.bias")))
        given = F.linear(read, program.tensor("second.weight"), program.tensor("second.bias"))
        kept = [k for k in range(8) if k not in gone]
        fitted = torch.linalg.lstsq(torch.cat([read[:, kept], torch.ones(len(x), 1).double()], 1), given).solution
    assert sorted(found) == ["second.bias", "second.weight"]  # the first layer lost rows alone
    torch.testing.assert_close(found["second.weight"], fitted[:-1].T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found["second.bias"], fitted[-1], rtol=1e-9, atol=1e-9)
    assert module.training is False


def test_rows_and_columns_of_a_layer_go_jointly() -> None:
    program, analysis, x, targets = two()
    store = fit(program, (x, targets), statistics="kfac")
    gone = [*units_made(analysis, "first.weight", [0, 2]), *units_made(analysis, "second.weight", [1, 4])]
    found = obs_weights(program, store, Plan.of_units(analysis, gone), damping=1e-6, sides="both")
    assert sorted(found) == sorted(name for name, _ in program.module().named_parameters())
    held = store.blocks["second.weight"]
    assert held.A is not None
    assert held.G is not None
    damped = [f + 1e-6 * f[0].diagonal().mean() * torch.eye(f.shape[1], dtype=torch.float64) for f in (held.G, held.A)]
    weight = torch.cat([program.tensor("second.weight"), program.tensor("second.bias").unsqueeze(1)], 1).detach()
    free = torch.ones(5, 9, dtype=torch.bool)
    free[[1, 4]] = False
    free[:, [0, 2]] = False
    motion, _ = constrained_minimum(block_form(*damped), ~free.reshape(-1), -weight[~free])
    expected = (weight + motion.reshape(5, 9))[free].reshape(3, 7)
    torch.testing.assert_close(found["second.weight"], expected[:, :-1], rtol=1e-6, atol=1e-7)  # condition 1e6
    torch.testing.assert_close(found["second.bias"], expected[:, -1], rtol=1e-6, atol=1e-7)


def test_the_score_of_a_unit_is_the_cost_of_its_compensation() -> None:
    """Kron-OBS of one unit is 1/2 tr(G E A E^T) with the E of the repair, in the layer that makes it."""
    program, analysis, x, targets = two()
    context = ScoreContext.of(program, analysis, (x, targets))
    scores = score(KronOBS(1e-3), context)
    store = context.curvature("kfac")
    held = store.blocks["first.weight"]
    assert held.A is not None
    assert held.G is not None
    weight = torch.cat([program.tensor("first.weight"), program.tensor("first.bias").unsqueeze(1)], 1).detach()
    for row in range(8):
        (unit,) = units_made(analysis, "first.weight", [row])
        found = obs_weights(program, store, Plan.of_units(analysis, [unit]), sides="outputs")
        kept = [k for k in range(8) if k != row]
        after = torch.zeros_like(weight)
        after[kept] = torch.cat([found["first.weight"], found["first.bias"].unsqueeze(1)], 1)
        error = after - weight
        cost = 0.5 * float(torch.trace(held.G[0] @ error @ held.A[0] @ error.T))
        np.testing.assert_allclose(scores[unit], cost, rtol=1e-9)


def loss_with(small: Program, weights: dict[str, Tensor], x: Tensor, targets: Tensor) -> float:
    made = small.copy()
    with torch.no_grad():
        for name, value in weights.items():
            made.tensor(name).copy_(value)
        return float(F.cross_entropy(made.module().run_flat([x], "eval")[0], targets))


def test_the_loss_of_a_trained_network_rises_less() -> None:
    torch.manual_seed(0)
    x, module, teacher = torch.randn(1000, 4).double(), Two().double(), Two().double()
    targets = (teacher(x) * 20).argmax(1)
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(module(x), targets).backward()
        optimizer.step()
    program = kfe_fx.capture(module.eval(), x[:2])
    analysis = analyze(program)
    store = fit(program, (x, targets), statistics="kfac")
    whole = loss_with(program, {}, x, targets)
    rises = []
    for seed in range(8):
        gone = np.random.default_rng(seed).choice(len(analysis.units), 2, replace=False).tolist()
        plan = Plan.of_units(analysis, gone)
        small = Shrink(plan).run(program).program
        made = [{}, *(obs_weights(program, store, plan, sides=sides) for sides in ("inputs", "outputs", "both"))]
        rises.append([loss_with(small, weights, x, targets) - whole for weights in made])
    cut, inputs, outputs, both = np.mean(rises, 0)
    assert inputs < 0.6 * cut
    assert outputs < cut
    assert inputs < both < cut  # what both sides make good is made good twice


@pytest.mark.parametrize("name", ["residual", "attention"])
def test_what_comes_out_has_the_small_shapes(name: str) -> None:
    program, x = program_of(name)
    analysis = analyze(program)
    store = fit(program, (x, TARGETS), statistics="kfac")
    gone = [group.units[0] for group in analysis.groups if len(group.units) > 1]
    check_shapes(program, analysis, store, gone)


@pytest.mark.parametrize("seed", range(6))
def test_random_networks(seed: int) -> None:
    case = sample_net(80_000 + seed, max_blocks=2)
    program = kfe_fx.capture(case.module, case.inputs)
    analysis = analyze(program)
    inputs = case.make_inputs(4)
    data = [inputs]
    store = fit(program, [(inputs, None)] if len(data) else data, "mse", statistics="kfac")
    gone = [group.units[-1] for group in analysis.groups if len(group.units) > 1]
    gone = [unit for unit in gone if not any(floor <= {unit} for floor in analysis.floors)]
    check_shapes(program, analysis, store, gone)


def check_shapes(program: Program, analysis: Analysis, store: Store, gone: list[int]) -> None:
    """Compare with dense minima of every block, put into the large tensors and cut."""
    plan = Plan.of_units(analysis, gone)
    small = Shrink(plan).run(program).program
    before = {name: value.clone() for name, value in program.state_dict().items()}
    found = obs_weights(program, store, plan, damping=1e-2, sides="both")
    assert found
    assert all(torch.equal(value, before[name]) for name, value in program.state_dict().items())
    for name, value in found.items():
        assert value.shape == small.tensor(name).shape, name
        assert value.dtype == small.tensor(name).dtype
        assert torch.isfinite(value).all()
    whole = {name: value.detach().double().clone() for name, value in program.module().named_parameters()}
    for block in find_blocks(program).blocks:
        held = store.blocks[block.name]
        if block.kind != "kronecker" or held.A is None or held.G is None or held.A.dim() == 2 or held.G.dim() == 2:
            continue
        stays = block.matrix({n: entries_kept(plan, n, whole[n]) for n in block.parameters}) > 0
        if bool(stays.all()) or stays.numel() > 3000:
            continue
        weight = block.matrix(whole)
        for k in range(len(weight)):
            if not stays[k].any() or stays[k].all():
                continue
            damped = [
                f[k] + 1e-2 * (f[k].diagonal().mean() or 1.0) * torch.eye(f.shape[1], dtype=torch.float64)
                for f in (held.G.double(), held.A.double())
            ]
            fixed = ~stays[k].reshape(-1)
            motion, _ = constrained_minimum(torch.kron(*damped), fixed, -weight[k].reshape(-1)[fixed])
            weight[k] = weight[k] + motion.reshape(weight[k].shape)
        block.put(weight, whole)
    for name, value in found.items():
        expected = whole[program.names_of(name)[0]]
        for dim, indices in plan.kept.get(name, ()):
            expected = expected.index_select(dim, torch.tensor(indices))
        torch.testing.assert_close(value.double(), expected, rtol=1e-7, atol=1e-8)


def entries_kept(plan: Plan, name: str, value: Tensor) -> Tensor:
    mask = torch.ones_like(value)
    for dim, indices in plan.kept.get(name, ()):
        gone = sorted(set(range(value.shape[dim])) - set(indices))
        mask.index_fill_(dim, torch.tensor(gone, dtype=torch.int64), 0)
    return mask


class Enlarging(nn.Module):
    """A transposed convolution that reads: its inputs are the rows of the matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up = nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 4, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.relu(self.first(x))).mean((2, 3))


def test_the_inputs_of_a_transposed_convolution_are_its_rows() -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 3, 4, 4).double()
    program = kfe_fx.capture(Enlarging().double().eval(), x[:2])
    analysis = analyze(program)
    store = fit(program, (x, torch.randint(0, 4, (12,))), statistics="kfac")
    plan = Plan.of_units(analysis, units_made(analysis, "first.weight", [2]))
    found = obs_weights(program, store, plan, damping=0.0)
    assert sorted(found) == ["up.weight"]
    with torch.no_grad():
        read = torch.relu(F.conv2d(x, program.tensor("first.weight"), program.tensor("first.bias")))
        rows = read.movedim(1, -1).reshape(-1, 6)
        given = rows @ program.tensor("up.weight").reshape(6, -1)
        kept = [0, 1, 3, 4, 5]
        fitted = torch.linalg.lstsq(rows[:, kept], given).solution
    torch.testing.assert_close(found["up.weight"].reshape(5, -1), fitted, rtol=1e-9, atol=1e-9)


class TiedHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.other = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        return self.one(y) + self.other(y.square())


def test_tied_parameters_come_out_under_each_name() -> None:
    torch.manual_seed(0)
    x = torch.randn(30, 4).double()
    program = kfe_fx.capture(TiedHeads().double().eval(), x[:2])
    analysis = analyze(program)
    store = fit(program, (x, torch.randint(0, 3, (30,))), statistics="kfac")
    found = obs_weights(program, store, Plan.of_units(analysis, [1]))
    assert {"one.weight", "other.weight"} <= found.keys()
    assert torch.equal(found["one.weight"], found["other.weight"])
    assert found["one.weight"].shape == (3, 5)


def test_a_depthwise_convolution_stays_as_it_is_cut() -> None:
    program, x = program_of("residual")
    analysis = analyze(program)
    store = fit(program, (x, TARGETS), statistics="kfac")
    gone = [unit.id for unit in analysis.units if "depthwise.weight" in unit.slices][:1]
    found = obs_weights(program, store, Plan.of_units(analysis, gone), sides="both")
    assert "depthwise.weight" not in found
    assert {"stem.weight", "branch.weight", "inner.weight", "grouped.weight"} <= found.keys()
    assert gathered(find_blocks(program).blocks[0], program.tensor("stem.weight")).shape == (1, 8, 27)


def test_without_removal_nothing_changes() -> None:
    program, analysis, x, targets = two()
    assert obs_weights(program, fit(program, (x, targets), statistics="kfac"), Plan.of_units(analysis, [])) == {}


def test_what_does_not_fit_is_refused() -> None:
    program, analysis, x, targets = two()
    store = fit(program, (x, targets), statistics="kfac")
    plan = Plan.of_units(analysis, [0])
    cases: list[tuple[Any, Any, Any, type[Exception], str]] = [
        (program, fit(program, (x, targets), statistics="diagonal"), {}, UsageError, "lack 'kfac'; fit them with it"),
        (program_of("residual")[0], store, {}, UsageError, "of another network"),
        (program, store, {"damping": -0.1}, UsageError, "the damping is -0.1"),
        (program, store, {"damping": float("nan")}, UsageError, "the damping is nan"),
        (program, store, {"sides": "left"}, UsageError, "sides inputs, outputs, both, not 'left'"),
    ]
    for network, statistics, options, kind, told in cases:
        with pytest.raises(kind, match=told):
            obs_weights(network, statistics, plan, **options)
    for wrong in ((0, [99]), (3, [0])):
        with pytest.raises(PlanError, match=r"cuts dim \d of 'first.weight', which cannot be cut so"):
            obs_weights(program, store, Plan({"first.weight": [wrong]}))
    with torch.no_grad():
        program.tensor("first.weight").mul_(2)
    with pytest.raises(UsageError, match="older than the weights"):
        obs_weights(program, store, plan)
