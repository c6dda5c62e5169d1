"""Criteria of weights alone: scales of batch norms, LAMP and geometric medians, each against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kfe_fx
from kfe_fx.criteria import ScoreContext, score
from kfe_fx.errors import UsageError
from kfe_fx.labels.analysis import analyze
from kfe_fx.passes.batchnorm_recurrent import BatchnormRecurrent
from kfe_fx.testing import CriterionConformance
from tests.criteria.nets import program_of, randomise
from tests.criteria.test_kronecker import Normed, Recurrent


class Plain(nn.Module):
    """Convolutions with batch norms behind, before, and nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.two, self.flat = nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5)
        self.three = nn.Conv2d(5, 7, 1)
        self.before = nn.BatchNorm1d(7)
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.one(x)))
        y = torch.relu(self.three(torch.relu(self.flat(self.two(y)))))
        return self.head(self.before(y.mean((2, 3))))


def filled(seed: int = 0) -> Plain:
    """Give the norms statistics, and one of them no affine."""
    torch.manual_seed(seed)
    module = Plain()
    randomise(module, seed)
    for name in ("weight", "bias"):
        setattr(module.flat, name, None)
    return module


def context_of(module: nn.Module, *inputs: Tensor) -> ScoreContext:
    program = kfe_fx.capture(module.double().eval(), inputs)
    return ScoreContext.of(program, analyze(program))


def plain() -> tuple[Plain, ScoreContext, dict[str, list[int]]]:
    """Return the network, and the units by the layer that makes them, in the order of its rows."""
    module = filled()
    context = context_of(module, torch.randn(2, 3, 6, 6).double())
    made = {
        name: [context.analysis.params[f"{name}.weight"][0][0][row] for row in range(width)]
        for name, width in (("one", 6), ("two", 5), ("three", 7))
    }
    return module, context, made


def scale_of(norm: nn.BatchNorm2d) -> Tensor:
    """Return what a norm multiplies with, [C, 1, 1, 1]."""
    assert norm.running_var is not None
    gamma: Tensor | None = norm.weight
    scale = (norm.running_var + norm.eps).rsqrt()
    return (scale if gamma is None else gamma.detach() * scale).view(-1, 1, 1, 1)


class TestBatchNormScale(CriterionConformance):
    criterion = "bn-scale"

    def context(self, name: str = "residual", seed: int = 0) -> ScoreContext:
        if name == "residual":
            return super().context(name, seed)
        torch.manual_seed(seed)
        x = torch.randn(3, 3, 6, 6).double()
        shallow = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(80, 4))
        program = kfe_fx.capture(filled(seed) if name == "attention" else randomise(shallow, seed), x[:1])
        return ScoreContext.of(program, analyze(program), (x, torch.tensor([0, 2, 1])), batch_size=2)


class TestLAMP(CriterionConformance):
    criterion = "lamp"


class TestGeometricMedian(CriterionConformance):
    criterion = "fpgm"


# scales of batch norms ------------------------------------------------------------------------------------------------


def test_the_scale_is_that_of_the_norm_before_or_behind_and_others_go_last() -> None:
    module, context, made = plain()
    found = score("bn-scale", context)
    np.testing.assert_allclose(found[made["one"]], module.norm.weight.abs().detach().numpy(), rtol=1e-12)
    np.testing.assert_allclose(found[made["three"]], module.before.weight.abs().detach().numpy(), rtol=1e-12)
    others = found[made["one"]].sum() + found[made["three"]].sum()
    assert (found[made["two"]] > others).all()
    assert context.facts["unnormalised"] == 5


def test_the_members_of_a_unit_are_averaged() -> None:
    program, _ = program_of("residual")
    context = ScoreContext.of(program, analyze(program))
    found = score("bn-scale", context)
    named = dict(program.module().named_parameters())
    together = torch.cat([named["norm.weight"], named["branch_norm.weight"]]).abs().detach().numpy()
    for unit in context.analysis.units:
        places = [*unit.slices.get("norm.weight", {}).get(0, ())]
        assert places == [*unit.slices.get("branch_norm.weight", {}).get(0, ())]
        if places:
            np.testing.assert_allclose(found[unit.id], together[[*places, *(p + 8 for p in places)]].mean(), rtol=1e-12)


def test_norms_inside_recurrent_layers_count() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 3).double()
    program = kfe_fx.capture(Recurrent().double().eval(), x)
    program = BatchnormRecurrent(data=x, mode="input").run(program).program
    context = ScoreContext.of(program, analyze(program))
    (name,) = [name for name, _ in program.module().named_parameters() if "gamma" in name]
    gamma = program.tensor(name).detach().abs().reshape(4, 4).mean(0)  # [gates, units]
    np.testing.assert_allclose(score("bn-scale", context), gamma.double().numpy(), rtol=1e-12)


def test_a_network_without_batch_norms_is_refused() -> None:
    program, _ = program_of("attention")
    with pytest.raises(UsageError, match="scales of batch norms, and no unit has one; choose another"):
        score("bn-scale", ScoreContext.of(program, analyze(program)))


# LAMP -----------------------------------------------------------------------------------------------------------------


def test_lamp_is_the_share_among_what_is_not_smaller() -> None:
    module, context, made = plain()
    found = score("lamp", context)
    with torch.no_grad():
        scale, flat = scale_of(module.norm), scale_of(module.flat)
        one = (module.one.weight * scale).square().sum((1, 2, 3))
        energies = {
            "one": one + (module.two.weight * flat).square().sum((0, 2, 3)),
            "two": (module.two.weight * flat).square().sum((1, 2, 3)) + module.three.weight.square().sum((0, 2, 3)),
            "three": module.three.weight.square().sum((1, 2, 3)) + module.head.weight.square().sum(0),
        }
    for name, energy in energies.items():
        expected = [float(e / energy[energy >= e].sum()) for e in energy]
        np.testing.assert_allclose(found[made[name]], expected, rtol=1e-12)
        assert found[made[name]].max() == 1.0
        assert (np.argsort(found[made[name]]) == np.argsort(energy.numpy())).all()


def test_equal_units_share_and_nothing_is_nothing() -> None:
    first, last = nn.Linear(2, 3, bias=False), nn.Linear(3, 4)
    module = nn.Sequential(first, nn.ReLU(), last).double()
    with torch.no_grad():
        last.weight.zero_()
        first.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0]]))
    x = torch.randn(2, 2).double()
    program = kfe_fx.capture(module, x)
    np.testing.assert_allclose(
        score("lamp", ScoreContext.of(program, analyze(program))), [1 / 11, 1 / 11, 1.0], rtol=1e-12
    )
    with torch.no_grad():
        program.tensor("0.weight").zero_()
    assert not score("lamp", ScoreContext.of(program, analyze(program))).any()


# geometric medians ----------------------------------------------------------------------------------------------------


def brute(filters: Tensor) -> list[float]:
    return [sum(float((one - other).detach().norm()) for other in filters) / (len(filters) - 1) for one in filters]


def test_distances_to_the_other_filters_behind_the_norm() -> None:
    module, context, made = plain()
    found = score("fpgm", context)
    with torch.no_grad():
        scale, flat = scale_of(module.norm), scale_of(module.flat)
        filters = {
            "one": module.one.weight * scale,
            "two": module.two.weight * flat,
            "three": module.three.weight,
        }
    for name, rows in filters.items():
        np.testing.assert_allclose(found[made[name]], brute(rows.flatten(1)), rtol=1e-9)


def test_gates_are_one_filter_and_layers_are_averaged() -> None:
    torch.manual_seed(0)
    program = kfe_fx.capture(Recurrent().double().eval(), torch.randn(2, 5, 3).double())
    found = score("fpgm", ScoreContext.of(program, analyze(program)))
    expected = np.zeros(4)
    for name in ("lstm.weight_ih_l0", "lstm.weight_hh_l0"):
        rows = program.tensor(name).detach().reshape(4, 4, -1).transpose(0, 1)  # [units, gates, inputs]
        expected += np.array(brute(rows.flatten(1))) / 2
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_what_another_can_stand_in_for_goes_first() -> None:
    torch.manual_seed(0)
    first = nn.Linear(6, 5, bias=False)
    with torch.no_grad():
        first.weight.add_(1.0)
        first.weight[3] = first.weight[[1, 2, 4]].mean(0)
        first.weight[0] *= 0.3
    context = context_of(nn.Sequential(first, nn.ReLU(), nn.Linear(5, 4)), torch.randn(2, 6).double())
    assert score("fpgm", context).argmin() == 3
    assert score("lamp", context).argmin() == 0


def test_units_of_computed_weights_are_compared_by_what_they_own() -> None:
    torch.manual_seed(0)
    module = Normed().double().eval()
    program = kfe_fx.capture(module, torch.randn(2, 5).double())
    context = ScoreContext.of(program, analyze(program))
    found = score("fpgm", context)
    expected, count = np.zeros(6), 0
    for name, value in program.module().named_parameters():
        for dim in sorted({dim for unit in context.analysis.units for dim in unit.slices.get(name, {})}):
            expected += brute(value.detach().movedim(dim, 0).reshape(6, -1))
            count += 1
    assert count > 2
    np.testing.assert_allclose(found, expected / count, rtol=1e-9)
