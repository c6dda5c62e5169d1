"""Running statistics: as torch.optim.swa_utils.update_bn on the module."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from kfe_fx.errors import UsageError
from kfe_fx.frontend.capture import capture
from kfe_fx.passes.batchnorm_recurrent import BatchnormRecurrent
from kfe_fx.passes.capture_curvature import CaptureCurvature
from kfe_fx.passes.finalise_recurrent import FinaliseRecurrent
from kfe_fx.passes.reestimate_statistics import ReestimateStatistics, live_norms
from tests.criteria.nets import build, randomise
from tests.passes import recurrent_nets as recurrent


class Shared(nn.Module):
    """A norm that is used twice, a dropout, a norm without statistics, an instance norm."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.plain = nn.BatchNorm2d(3, track_running_stats=False)
        self.instance = nn.InstanceNorm2d(3, affine=True)
        self.dropout = nn.Dropout(dropout)
        self.out, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.conv(x)))
        y = torch.relu(self.norm(self.conv(self.plain(y))))
        return self.last(self.out(self.dropout(self.instance(y)).mean((2, 3))))


def batches(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, 3, 6, 6, generator=generator, dtype=torch.float64) for _ in range(count)]


def statistics(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if "running" in name}


@pytest.mark.parametrize("name", ["shared", "residual"])
def test_equal_to_update_bn(name: str):
    module = randomise(Shared()) if name == "shared" else build("residual")[0]
    program = capture(module, batches()[0])
    before = {key: value.clone() for key, value in program.state_dict().items()}
    result = ReestimateStatistics(batches()).run(program)
    twin = copy.deepcopy(module)
    update_bn(batches(), twin)
    found, expected = statistics(result.program.state_dict()), statistics(twin.state_dict())
    assert found
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-12)
        assert not torch.equal(found[key], before[key])
    assert result.facts["batches"] == 4
    state = program.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in before.items())  # the given Program is not touched
    rest = result.program.state_dict()
    assert all(torch.equal(rest[key], value) for key, value in before.items() if "running" not in key)


def test_dropout_stays_off():
    program = capture(randomise(Shared(dropout=0.5)), batches()[0])
    twin = capture(randomise(Shared(dropout=0.0)), batches()[0])
    twin.module().load_state_dict(program.state_dict())
    first, second = (
        statistics(ReestimateStatistics(batches()).run(each).program.state_dict()) for each in (program, twin)
    )
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_frozen_norms_are_left_alone():
    module = randomise(Shared()).train()
    module.norm.eval()  # type: ignore[union-attr]
    program = capture(module, batches()[0])
    assert len(live_norms(program)) == 1
    result = ReestimateStatistics(batches()).run(program).program
    assert torch.equal(result.tensor("norm.running_mean"), program.tensor("norm.running_mean"))
    assert not torch.equal(result.tensor("last.running_mean"), program.tensor("last.running_mean"))


def test_norms_whose_training_could_not_be_captured_are_measured():
    module = randomise(Shared())
    module.last.momentum = None  # type: ignore[assignment, union-attr]
    program = capture(module, batches()[0])
    assert "train" not in program.graphs
    assert len(live_norms(program)) == 3


def test_a_network_without_norms_is_left_alone_and_a_limit_is_kept():
    program = capture(nn.Linear(3, 2), torch.randn(2, 3))
    result = ReestimateStatistics([torch.randn(4, 3)]).run(program)
    assert not result.modified
    assert result.program is program
    program = capture(randomise(Shared()), batches()[0])
    limited = ReestimateStatistics(batches(), limit=2).run(program)
    short = ReestimateStatistics(batches(2)).run(program)
    assert limited.facts["batches"] == 2
    assert torch.equal(limited.program.tensor("last.running_var"), short.program.tensor("last.running_var"))


def test_single_values_have_no_variance_and_no_data_is_refused():
    module = randomise(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    program = capture(module, torch.randn(2, 3).double())
    data = [torch.randn(5, 3).double(), torch.randn(1, 3).double()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = ReestimateStatistics(data).run(program).program
    assert torch.isfinite(result.tensor("1.running_var")).all()
    with pytest.raises(UsageError, match="no batches"):
        ReestimateStatistics([]).run(program)


@pytest.mark.parametrize("statistics_of", ["step", "shared"])
def test_recurrent_layers_get_the_average_over_batches(statistics_of: str):
    """One batch: as training with momentum 1 on whole sequences; several: their mean; padding counts by rows."""
    name = "packed"
    net = BatchnormRecurrent(mode="full", cell_norm="channel", statistics=statistics_of).run(recurrent.program(name))
    program = recurrent.moved(net.program, name)
    found = [
        statistics(ReestimateStatistics([batch]).run(program).program.state_dict())
        for batch in recurrent.batches(name, 2)
    ]
    both = ReestimateStatistics(recurrent.batches(name, 2)).run(program)
    assert both.facts == {"norms": 2, "batches": 2}
    for key, value in statistics(both.program.state_dict()).items():
        mean = (found[0][key] + found[1][key]) / 2  # as many valid rows in both
        torch.testing.assert_close(value, mean, rtol=1e-10, atol=1e-12)
        fixed = statistics_of == "step" and "_hh_" in key  # row 0 of the state zero
        assert torch.equal(value[0], program.tensor(key)[0]) == fixed
    first = found[0]
    x, lengths = recurrent.data(name)
    hidden = torch.nn.functional.linear(x, program.tensor("inputs.weight"), program.tensor("inputs.bias"))
    products = hidden @ program.tensor("layer.weight_ih_l0").t()
    if statistics_of == "shared":
        rows = torch.cat([products[row, :length] for row, length in enumerate(lengths.tolist())])
        torch.testing.assert_close(first["layer.running_mean_ih_l0"][0], rows.mean(0), rtol=1e-12, atol=1e-12)
    else:
        for step in range(recurrent.STEPS):
            rows = products[lengths > step, step]
            if len(rows) > 1:
                expected = rows.var(0, correction=0)
                torch.testing.assert_close(first["layer.running_var_ih_l0"][step], expected, rtol=1e-10, atol=1e-12)
    shares = [float((lengths > step).double().mean()) for step in range(recurrent.STEPS)]
    seen = torch.tensor([share if share * len(x) > 1.5 else 0.0 for share in shares]).double()
    seen = seen.sum(0, keepdim=True) if statistics_of == "shared" else seen
    torch.testing.assert_close(
        ReestimateStatistics(recurrent.batches(name, 1)).run(program).program.tensor("layer.seen_l0"), seen
    )


def test_recurrent_layers_on_one_batch_are_as_in_training():
    made = BatchnormRecurrent(mode="full", cell_norm="scalar", momentum=1.0).run(recurrent.program("stack")).program
    twin = made.copy()
    twin.train()(*recurrent.data("stack"))
    found = ReestimateStatistics(recurrent.batches("stack", 1)).run(made).program
    for key, value in statistics(twin.state_dict()).items():
        torch.testing.assert_close(found.tensor(key), value, rtol=1e-10, atol=1e-12)


def test_frozen_recurrent_layers_and_batches_of_one_are_left_alone():
    made = BatchnormRecurrent(mode="full").run(recurrent.program("gru")).program
    final = FinaliseRecurrent().run(made).program
    assert not ReestimateStatistics(recurrent.batches("gru", 1)).run(final).modified
    single = ReestimateStatistics([recurrent.data("gru", batch=1)]).run(made).program
    assert all(torch.equal(value, made.tensor(key)) for key, value in statistics(single.state_dict()).items())
    tapped = CaptureCurvature().run(made).program
    fresh = [
        ReestimateStatistics(recurrent.batches("gru", 1)).run(each).program.state_dict() for each in (made, tapped)
    ]
    assert all(torch.equal(value, fresh[1][key]) for key, value in fresh[0].items())
