"""Group lasso against sets of index tuples, its gradient, what batch norms exclude, and training that removes units."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfe_fx
from kfe_fx.data.dataset import ArrayData
from kfe_fx.errors import UsageError
from kfe_fx.frontend.capture import capture
from kfe_fx.labels.analysis import Analysis, analyze
from kfe_fx.passes.capture_curvature import CaptureCurvature
from kfe_fx.passes.shrink import Shrink
from kfe_fx.plan import Plan
from kfe_fx.program import Program
from kfe_fx.training import group_lasso
from kfe_fx.training.group_lasso import EPS, Excluded, GroupLasso, excluded
from kfe_fx.training.losses import Loss
from kfe_fx.training.metrics import ACCURACY, evaluate
from tests.processes import in_two_processes
from tests.random_nets import outputs, sample_net

THOROUGH = os.environ.get("KFE_FX_THOROUGH", "") not in ("", "0")
STRENGTH = 0.3


# the penalty, entry by entry -------------------------------------------------------------------------------------


def entries_of(lasso: GroupLasso, unit: int) -> set[tuple[str, tuple[int, ...]]]:
    """Every entry of every trained parameter in any slice of a unit that counts, as (first name, index tuple)."""
    program = lasso.analysis.program
    trained = {name: value for name, value in program.module().named_parameters() if value.requires_grad}
    found = set()
    for name, dims in lasso.analysis.units[unit].slices.items():
        counted = {dim: held for dim, held in dims.items() if (name, dim) not in lasso.excluded}
        shape = trained[name].shape if name in trained else ()
        for dim, held in counted.items() if name in trained else ():
            along = (held if other == dim else range(size) for other, size in enumerate(shape))
            found |= {(name, index) for index in itertools.product(*along)}
    return found


def by_hand(lasso: GroupLasso) -> tuple[float, dict[str, Tensor]]:
    """The penalty and its gradient, from sets of entries."""
    held = {name: value.detach().numpy() for name, value in lasso.analysis.program.module().named_parameters()}
    total, grads = 0.0, {name: np.zeros_like(value) for name, value in held.items()}
    for unit in lasso.analysis.units:
        entries = entries_of(lasso, unit.id)
        assert bool(entries) == (unit.id in lasso.units)
        if not entries:
            continue
        norm = math.sqrt(sum(held[name][index] ** 2 for name, index in entries) + EPS)
        total += norm
        for name, index in entries:
            grads[name][index] += lasso.strength * held[name][index] / norm
    return lasso.strength * total, {name: torch.from_numpy(grad) for name, grad in grads.items()}


def check(program: Program, *, corners: bool = False) -> GroupLasso:
    lasso = GroupLasso(program, STRENGTH)
    assert any(weight.corners for weight in lasso._weights) or not corners
    expected, grads = by_hand(lasso)
    penalty = lasso()
    assert penalty.item() == pytest.approx(expected, rel=1e-12)
    held = {name: value for name, value in program.module().named_parameters() if value.requires_grad}
    found = dict(zip(held, torch.autograd.grad(penalty, list(held.values()), allow_unused=True), strict=True))
    for value in held.values():
        value.grad = None
    lasso.add_gradients()
    for name, value in held.items():
        for grad in (found[name], value.grad):
            filled = torch.zeros_like(value) if grad is None else grad
            torch.testing.assert_close(filled, grads[name], rtol=1e-10, atol=1e-14, msg=name)
    return lasso


@pytest.mark.parametrize("seed", range(600 if THOROUGH else 8))
def test_it_is_the_sum_over_the_entries_of_units(seed: int) -> None:
    case = sample_net(seed, max_blocks=2)
    check(capture(case.module, case.inputs, case.dynamic_axes()))


class Square(nn.Module):
    """A stream that matrices map to itself: units own rows and columns of them, and cross on the diagonal."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.pairs = nn.Bilinear(4, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        y = y + self.inner(y)
        y = y + self.conv(y.unsqueeze(2)).squeeze(2)
        return self.last(y + self.pairs(y, y))


def test_an_entry_where_slices_of_a_unit_cross_counts_once():
    torch.manual_seed(0)
    program = capture(Square().double(), torch.randn(2, 3).double())
    lasso = check(program, corners=True)
    assert sorted(lasso.analysis.units[0].slices["pairs.weight"]) == [0, 1, 2]  # a cube loses three faces
    assert len(lasso.units) == 4


def test_groups_of_channels_cross_in_blocks():
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Conv1d(2, 6, 1), nn.GroupNorm(3, 6)
            self.inner, self.last = nn.Conv1d(6, 6, 3, padding=1), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.last((self.norm(y + self.inner(y)) + y).mean(2))

    torch.manual_seed(0)
    program = capture(Grouped().double(), torch.randn(2, 2, 5).double())
    lasso = check(program, corners=True)
    assert lasso.analysis.units[0].slices["inner.weight"] == {0: (0, 1), 1: (0, 1)}


def test_gradcheck():
    torch.manual_seed(0)
    program = capture(Square().double(), torch.randn(2, 3).double())
    lasso = GroupLasso(program, STRENGTH)
    assert torch.autograd.gradcheck(lambda *_: lasso(), tuple(program.module().parameters()))


def test_tied_weights_count_once_and_fixed_ones_not_at_all():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
            self.other.weight = self.one.weight
            self.last.bias.requires_grad_(False)
            self.one.bias.requires_grad_(False)
            self.start = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.start(x)
            return self.last(y + torch.tanh(self.one(y)) + torch.tanh(self.other(y)))

    torch.manual_seed(0)
    program = capture(Tied().double(), torch.randn(2, 4).double())
    lasso = check(program, corners=True)
    assert {"one.weight", "other.weight", "one.bias"} <= lasso.analysis.units[0].slices.keys()
    assert {name for name, _ in entries_of(lasso, 0)} == {
        "one.weight", "other.bias", "start.weight", "start.bias", "last.weight",
    }  # fmt: skip


def test_complex_and_half_weights():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.randn(3, 4, dtype=torch.complex128))
            self.last = nn.Parameter(torch.randn(4, 2, dtype=torch.complex128))

        def forward(self, x: Tensor) -> Tensor:
            return ((x @ self.first) @ self.last).real

    torch.manual_seed(0)
    program = capture(Net(), torch.randn(2, 3, dtype=torch.complex128))
    lasso = GroupLasso(program, STRENGTH)
    first, last = (program.tensor(name) for name in ("first", "last"))
    norms = (first.abs().square().sum(0) + last.abs().square().sum(1) + EPS).sqrt()
    torch.testing.assert_close(lasso(), STRENGTH * norms.sum(), rtol=1e-12, atol=0)
    expected = torch.autograd.grad(STRENGTH * norms.sum(), [first, last])
    lasso.add_gradients()
    for value, grad in zip((first, last), expected, strict=True):
        torch.testing.assert_close(value.grad, grad, rtol=1e-12, atol=0)

    half = capture(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).bfloat16(), torch.ones(2, 4).bfloat16())
    with torch.no_grad():
        for value in half.module().parameters():
            value.fill_(1e-4)
    lasso = GroupLasso(half, 1.0)
    assert lasso.norms(EPS).dtype == torch.float32  # 1e-8 beside 1e-8 is nothing in 8 bits
    weight = half.tensor("0.weight")[0, 0].item()
    torch.testing.assert_close(lasso.norms(EPS), torch.full((8,), math.sqrt(7 * weight**2 + EPS)), rtol=1e-6, atol=0)
    lasso.add_gradients()
    assert all(bool(value.grad.isfinite().all()) for value in half.module().parameters() if value.grad is not None)


def test_the_gradient_of_a_zero_group_is_finite():
    program = capture(Square().double(), torch.randn(2, 3).double())
    lasso = GroupLasso(program, STRENGTH)
    parameters = list(program.module().parameters())
    with torch.no_grad():
        for value in parameters:
            value.zero_()
    assert lasso().item() == pytest.approx(STRENGTH * 4 * 1e-4, rel=1e-12)
    for grad in torch.autograd.grad(lasso(), parameters, allow_unused=True):
        assert grad is None or not grad.any()
    lasso.add_gradients()
    for value in parameters:
        assert value.grad is None or not value.grad.any()


def test_gradients_are_added_to_what_is_there():
    program = capture(Square().double(), torch.randn(2, 3).double())
    lasso = GroupLasso(program, STRENGTH)
    for value in program.module().parameters():
        value.grad = torch.ones_like(value)
    program.tensor("first.weight").grad = torch.ones(4, 3).double().to_sparse()
    lasso.add_gradients()
    expected = torch.autograd.grad(lasso(), program.tensor("first.weight"))[0] + 1
    torch.testing.assert_close(program.tensor("first.weight").grad, expected, rtol=1e-12, atol=0)
    untouched = program.tensor("last.bias").grad  # in no unit
    assert untouched is not None
    assert torch.equal(untouched, torch.ones(2).double())


def test_what_cannot_be_penalised():
    program = capture(Square(), torch.randn(2, 3))
    for strength in (-1.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="strength of group lasso"):
            GroupLasso(program, strength)
    with pytest.raises(UsageError, match="no removable units"):
        GroupLasso(capture(nn.Linear(3, 2), torch.randn(2, 3)), 1.0)


# what a batch norm makes meaningless -----------------------------------------------------------------------------


def normed(*layers: nn.Module, inputs: Tensor) -> tuple[Program, Excluded]:
    program = capture(nn.Sequential(*layers), inputs)
    return program, excluded(analyze(program))


def test_the_weights_before_a_batch_norm_are_no_part_of_the_norm():
    layers = (
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4, padding=1), nn.BatchNorm2d(4),
        nn.ReLU(), nn.Conv2d(4, 5, 1), nn.ReLU(), nn.ConvTranspose2d(5, 6, 2), nn.InstanceNorm2d(6, affine=True),
        nn.Flatten(), nn.Linear(6 * 16, 3),
    )  # fmt: skip
    x = torch.randn(2, 2, 5, 5)
    program, found = normed(*layers, inputs=x)
    assert set(found) == {
        ("0.weight", 0), ("0.bias", 0), ("3.weight", 0), ("3.bias", 0), ("8.weight", 1), ("8.bias", 0),
    }  # fmt: skip
    assert found["0.weight", 0] == "feeds aten.batch_norm.default at 1: its scale has no effect"
    lasso = check(capture(nn.Sequential(*layers).double(), x.double()))
    counted = [{name for name, _ in entries_of(lasso, unit)} for unit in lasso.units]
    assert counted[0] == {"1.weight", "1.bias", "4.weight", "4.bias", "6.weight"}  # gamma, beta, and the consumer
    tapped = CaptureCurvature().run(program).program
    assert excluded(analyze(tapped)) == found


def test_a_norm_that_does_not_take_the_statistics_of_the_batch_excludes_nothing():
    frozen = nn.BatchNorm1d(4)
    frozen.eval()
    frozen.train = lambda mode=True: frozen  # type: ignore[method-assign,assignment]
    _, found = normed(nn.Linear(3, 4), frozen, nn.Linear(4, 2), inputs=torch.randn(2, 3))
    assert found == {}


class Uses(nn.Module):
    """Weights with a norm behind them, but not only, or not directly."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.tied, self.again = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.again.weight = self.tied.weight
        self.bare, self.steps, self.last = nn.Parameter(torch.randn(4, 5)), nn.BatchNorm1d(5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.both(x)  # read by the sum as well
        y = self.norm(y) + y
        y = torch.relu(self.norm(self.tied(y))) + self.again(torch.relu(y))  # a tied weight, normalised once
        z = torch.stack([y, y * y], 1) @ self.bare  # [N, 2, 5], turned about and normalised
        return self.last(self.steps(z.transpose(1, 2)).mean(2))


def test_only_what_nothing_else_reads_is_excluded():
    torch.manual_seed(0)
    program = capture(Uses().double(), torch.randn(3, 3).double())
    assert set(excluded(analyze(program))) == {("bare", 1)}
    check(program)


def test_a_norm_over_other_channels_than_the_units_excludes_nothing():
    class Across(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(3, 4), nn.BatchNorm1d(5), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(self.first(x)))  # [N, 5, 4]: a statistic for each step, over all units

    analysis = analyze(capture(Across(), torch.randn(2, 5, 3)))
    assert len(analysis.units) == 4
    assert excluded(analysis) == {}


@pytest.fixture
def another_rule() -> Iterator[None]:
    known = len(group_lasso._EXCLUSIONS)

    @group_lasso.exclusion
    def rule(analysis: Analysis) -> Excluded:
        return {("0.weight", 0): "told by another rule"}

    yield
    del group_lasso._EXCLUSIONS[known:]


@pytest.mark.usefixtures("another_rule")
def test_another_operation_can_say_the_same():
    program = capture(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double(), torch.randn(2, 3).double())
    lasso = check(program)
    assert lasso.excluded == {("0.weight", 0): "told by another rule"}
    assert {name for name, _ in entries_of(lasso, 0)} == {"0.bias", "2.weight"}


NORMED = {
    "conv", "linear", "batch-norm", "flat-batch-norm", "instance-norm", "conv-bn-act", "depthwise-conv", "activation",
    "grouped-conv", "transposed-conv", "residual", "separable-conv", "matmul-parameter", "bottleneck",
}  # fmt: skip


def scale_excluded(program: Program, found: Excluded, analysis: Analysis) -> None:
    """Multiply what is excluded of each unit by a factor of its own."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, dim in found:
            value = program.tensor(name)
            for unit in analysis.units:
                held = unit.slices.get(name, {}).get(dim)
                if held is not None:
                    value.index_copy_(
                        dim,
                        torch.tensor(held),
                        value.index_select(dim, torch.tensor(held)) * (0.5 + torch.rand(1, generator=draw).double()),
                    )


def in_training(program: Program, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return outputs(program.train()(*inputs))


def test_scaling_what_is_excluded_changes_nothing_in_training():
    """X(c w) = X(w), of random networks; the analysis and the graph are not asked."""
    scaled = 0
    for seed in range(400 if THOROUGH else 6):
        case = sample_net(seed, max_blocks=2, families=NORMED)
        program = capture(case.module, case.inputs, case.dynamic_axes())
        analysis = analyze(program)
        found = excluded(analysis)
        for graph in program.graphs.values():
            for norm in graph.nodes:
                if norm.target in group_lasso._NORMS:
                    norm.update_arg(7, 1e-12)  # eps, which the scale of the weights would be measured by
        program.module().recompile()
        inputs = case.make_inputs(4)
        before = in_training(program, inputs)
        scale_excluded(program, found, analysis)
        for one, other in zip(before, in_training(program, inputs), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-7, msg=repr(case))
        scaled += bool(found)
    assert scaled >= (200 if THOROUGH else 3)


# training --------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Three layers, the first behind a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 24), nn.BatchNorm1d(24), nn.Linear(24, 16)
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.norm(self.first(x))))))


def examples(count: int = 600, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def made() -> Program:
    torch.manual_seed(0)
    return capture(Net(), torch.randn(2, 6))


@pytest.fixture(scope="module")
def captured() -> Program:
    return made()


SETTINGS: dict[str, Any] = {"epochs": 4, "batch_size": 50, "seed": 5, "threads": 1}


def same(one: Program, other: Program) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(("optimizer", "rate"), [("adamw", 0.03), ("sgd", 0.1), ("ekfac", None)])
def test_units_go_to_zero_and_can_be_removed(captured: Program, optimizer: str, rate: float | None):
    x, y = examples(400, seed=9)
    held = ArrayData((x,), y)
    plain, sparse = captured.copy(), captured.copy()
    settings: dict[str, Any] = {
        "optimizer": optimizer,
        "lr": rate,
        "epochs": 15,
        "batch_size": 50,
        "val": held,
        "threads": 1,
    }
    assert kfe_fx.train(plain, examples(), **settings)["group_lasso"] is None
    facts = kfe_fx.train(sparse, examples(), group_lasso=0.02, **settings)
    assert GroupLasso(plain, 0.02).near_zero() == []
    told, lasso = facts["group_lasso"], GroupLasso(sparse, 0.02)
    near = lasso.near_zero()
    assert (told["lambda"], told["units"], told["near_zero"]) == (0.02, 40, len(near))
    assert told["groups"] == [
        {"name": "first", "units": 24, "near_zero": sum(unit < 24 for unit in near)},
        {"name": "second", "units": 16, "near_zero": sum(unit >= 24 for unit in near)},
    ]
    assert [(one["parameter"], one["dim"]) for one in told["excluded"]] == [("first.weight", 0), ("first.bias", 0)]
    assert told["penalty"] == pytest.approx(lasso().item(), rel=1e-6)
    assert 12 <= len(near) < 40
    assert (facts["best_epoch"], len(facts["judged"])) == (None, 15)  # the last weights
    small = Shrink(Plan.of_units(lasso.analysis, near)).run(sparse).program
    with torch.no_grad():
        torch.testing.assert_close(small(x), sparse(x), rtol=0, atol=1e-4 * float(sparse(x).std()))
    accuracy = evaluate(small, held, ACCURACY)
    assert accuracy == pytest.approx(facts["judged"][-1], abs=0.003)
    assert accuracy > evaluate(plain, held, ACCURACY) - 0.05


@pytest.mark.parametrize("optimizer", ["ekfac", "adamw"])
def test_none_and_zero_are_training_without_it(captured: Program, optimizer: str):
    found = []
    given: tuple[dict[str, Any], ...] = ({}, {"group_lasso": None}, {"group_lasso": 0.0})
    for options in given:
        program = captured.copy()
        facts = kfe_fx.train(program, examples(), optimizer=optimizer, **SETTINGS, **options)
        assert facts["group_lasso"] is None
        assert facts["best_epoch"] is not None
        found.append(program)
    assert same(found[0], found[1])
    assert same(found[0], found[2])


@pytest.mark.parametrize("optimizer", ["ekfac", "kfac", "adamw", "sgd"])
def test_it_is_a_term_of_what_is_minimised(optimizer: str):
    """The option, against the penalty written into the loss: clips and preconditioning see the same gradient."""
    torch.manual_seed(0)
    program = capture(Net().double(), torch.randn(2, 6).double())
    x, y = examples(200)
    data = (x.double(), y)
    settings = SETTINGS | {"optimizer": optimizer, "val": False, "batch_size": 40, "schedule": "constant"}
    by_option, by_loss = program.copy(), program.copy()
    facts = kfe_fx.train(by_option, data, group_lasso=0.01, **settings)
    penalty = GroupLasso(by_loss, 0.01)

    def loss(scores: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(scores, targets) + penalty()

    added = kfe_fx.train(by_loss, data, Loss("both", loss, "mean"), **settings)
    for name, value in by_option.state_dict().items():
        torch.testing.assert_close(by_loss.tensor(name), value, rtol=1e-8, atol=1e-10, msg=name)
    assert facts["last_loss"] < added["last_loss"]  # told without the penalty


class Interrupted(Exception):
    pass


def interrupt(stage: str, done: float | None) -> None:
    if done is not None and done > 0.6:
        raise Interrupted


@pytest.mark.parametrize("optimizer", ["ekfac", "sgd"])
def test_a_resumed_run_ends_at_the_same_bits(captured: Program, tmp_path: Path, optimizer: str):
    whole, again, place = captured.copy(), captured.copy(), tmp_path / "run.checkpoint"
    settings: dict[str, Any] = SETTINGS | {"optimizer": optimizer, "group_lasso": 0.02}
    facts = kfe_fx.train(whole, examples(), **settings)
    with pytest.raises(Interrupted):
        kfe_fx.train(captured.copy(), examples(), checkpoint=place, progress=interrupt, **settings)
    for strength in (0.03, None, 0.0):
        changed: dict[str, Any] = settings | {"group_lasso": strength}
        with pytest.raises(UsageError, match=r"has group_lasso 0\.02, not"):
            kfe_fx.train(captured.copy(), examples(), checkpoint=place, resume=True, **changed)
    resumed = kfe_fx.train(again, examples(), checkpoint=place, resume=True, **settings)
    assert resumed["resumed"] == 2
    assert resumed | {"resumed": None} == facts
    assert same(again, whole)


def test_near_zero_is_told_beside_the_largest_unit_of_a_group(captured: Program):
    program = captured.copy()
    lasso = GroupLasso(program, 1.0)
    assert lasso.near_zero() == []

    def fill(unit: int, number: float) -> None:
        with torch.no_grad():
            for name, dims in lasso.analysis.units[unit].slices.items():
                for dim, held in dims.items():
                    if not name.endswith(("running_mean", "running_var")):
                        program.tensor(name).index_fill_(dim, torch.tensor(held), number)

    for unit in range(24, 36):  # most of the second group, whose median is then next to nothing
        fill(unit, 1e-6)
    assert lasso.near_zero() == list(range(24, 36))
    for unit in range(36, 40):
        fill(unit, 1e-6)
    assert lasso.near_zero() == list(range(24, 40))  # all of it
    with torch.no_grad():
        program.tensor("norm.weight")[1] = 1e5
    assert set(range(24)) - set(lasso.near_zero()) == {1}  # small beside a unit of 1e5


# several processes -----------------------------------------------------------------------------------------------


def shared(optimizer: str, batch_size: int = 17) -> tuple[dict[str, Any], dict[str, Tensor]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    program = capture(net, torch.randn(2, 6).double())
    x, y = examples(75)
    facts = kfe_fx.train(
        program, (x.double(), y), optimizer=optimizer, batch_size=batch_size, epochs=2, threads=1, group_lasso=0.05
    )
    return facts, dict(program.state_dict())


RUNS = (("ekfac", 17), ("sgd", 1))  # with batches of one the second process has nothing to do


def work(folder: Path) -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
    return [shared(*run) for run in RUNS]


@pytest.mark.xdist_group("processes")
def test_two_processes_add_it_once(tmp_path: Path):
    both = in_two_processes(work, tmp_path)
    for number, run in enumerate(RUNS):
        facts, state = shared(*run)
        for found in both:
            told, values = found[number]
            assert told["processes"] == 2
            assert told["group_lasso"]["penalty"] == pytest.approx(facts["group_lasso"]["penalty"], rel=1e-8)
            for name, value in state.items():
                torch.testing.assert_close(values[name], value, rtol=1e-8, atol=1e-8, msg=name)
        for name, value in both[0][number][1].items():
            assert torch.equal(value, both[1][number][1][name]), name
