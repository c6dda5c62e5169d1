"""The penalty on hard concrete gates: its value, its gradient, what units cost, and training that removes units."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import kfe_fx
from kfe_fx.cli.main import run
from kfe_fx.cost.count import CostModel
from kfe_fx.cost.latency import RooflineLatency
from kfe_fx.data.dataset import ArrayData
from kfe_fx.data.glyphs import glyphs
from kfe_fx.errors import UsageError
from kfe_fx.frontend.capture import capture
from kfe_fx.hard_concrete import BETA, GAMMA, LEAST, MOST, ZETA, Learned, learned
from kfe_fx.labels.analysis import Analysis, analyze
from kfe_fx.passes.batchnorm_recurrent import BatchnormRecurrent
from kfe_fx.passes.finalise_gates import FinaliseGates
from kfe_fx.passes.insert_gates import InsertGates
from kfe_fx.program import Program
from kfe_fx.training import make_optimizer
from kfe_fx.training.group_lasso import EPS, GroupLasso
from kfe_fx.training.l0 import L0, RATE, parameters_of_units, time_of_units
from kfe_fx.training.metrics import ACCURACY, evaluate
from tests.criteria.nets import NAMES, program_of
from tests.passes.recurrent_nets import INPUTS, NETS
from tests.random_nets import sample_net


def gated(program: Program, seed: int = 0) -> Program:
    """Gate a network, with log alpha spread over its range."""
    found = InsertGates(mode="hard_concrete").run(program).program
    generator = torch.Generator().manual_seed(seed)
    for value in learned(found).values():
        value.data.uniform_(-4, 4, generator=generator)
    return found


# the penalty ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_sum_over_gated_units(name: str):
    found = gated(program_of(name)[0])
    penalty = L0(found, 3.0, examples=50)
    gates = Learned.of(found)
    sizes = parameters_of_units(gates.analysis)
    mean = sizes[gates.units()].mean()
    total = 0.0
    for group, held in gates.log_alpha.items():
        for unit, value in zip(gates.analysis.groups[group].units, held.tolist(), strict=True):
            open_share = 1 / (1 + math.exp(-(value - BETA * math.log(-GAMMA / ZETA))))
            total += sizes[unit] / mean * open_share
    assert penalty().item() == pytest.approx(3.0 / 50 * total, rel=1e-12)


@pytest.mark.parametrize("l2", [0.0, 0.7])
def test_its_gradient_is_that_of_finite_differences(l2: float):
    """T8.4; with the second term the gradient by the weights too."""
    found = gated(program_of("residual")[0])
    penalty = L0(found, 2.0, examples=10, l2=l2)
    parameters = [value for value in found.module().parameters() if value.requires_grad]
    for value in parameters:
        value.grad = torch.ones_like(value)
    penalty.add_gradients()
    moved = 0
    for value in parameters:
        assert value.grad is not None
        for place in (0, value.numel() // 2, value.numel() - 1):
            flat, step = value.data.view(-1), 1e-5
            kept = float(flat[place])
            flat[place] = kept + step
            above = float(penalty().detach())
            flat[place] = kept - step
            below = float(penalty().detach())
            flat[place] = kept
            wanted = (above - below) / (2 * step)
            assert float(value.grad.view(-1)[place]) - 1 == pytest.approx(wanted, rel=1e-6, abs=1e-9)
            moved += abs(wanted) > 1e-6
    assert moved >= (20 if l2 else 6)


def test_the_second_term_counts_the_squares_of_units_that_are_on():
    found = gated(program_of("outer")[0])
    gates = Learned.of(found)
    lasso = GroupLasso(gates.analysis.program, 1.0, gates.analysis)
    on = torch.sigmoid(gates.values() - BETA * math.log(-GAMMA / ZETA))
    assert lasso.units == gates.units()
    wanted = 0.7 / 2 / 10 * (on * (lasso.norms(EPS).square() - EPS)).sum()
    found_l2 = L0(found, 0.0, l2=0.7, examples=10)()
    torch.testing.assert_close(found_l2, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("seed", range(6))
def test_a_unit_costs_the_parameters_that_go_with_it(seed: int):
    """The cost model counts what is left when it is gone."""
    case = sample_net(seed)
    program = capture(case.module, case.inputs, case.dynamic_axes())
    analysis = analyze(program)
    cost = CostModel(program, analysis)
    whole = cost.parameters()
    found = parameters_of_units(analysis)
    assert found.tolist() == [whole - cost.parameters([unit.id]) for unit in analysis.units]


def test_a_unit_costs_its_share_of_the_time_of_its_group():
    program, _ = program_of("residual")
    analysis = analyze(program)
    cost = RooflineLatency(CostModel(program, analysis))
    found = time_of_units(analysis)
    for group in analysis.groups:
        units = list(group.units)
        left = {min(floor) for floor in analysis.floors if floor <= set(units)}
        saved = cost.predict(()) - cost.predict(set(units) - left)
        assert saved > 0
        assert found[units].sum() == pytest.approx(saved, rel=1e-12)
        sizes = parameters_of_units(analysis)[units]
        np.testing.assert_allclose(found[units] / found[units].sum(), sizes / sizes.sum(), rtol=1e-12)


def test_weights_may_be_given_and_count_beside_their_mean():
    found = gated(program_of("residual")[0])
    analysis = Learned.of(found).analysis
    numbers = np.arange(1.0, len(analysis.units) + 1)

    def twice(known: Analysis) -> np.ndarray:
        assert len(known.units) == len(numbers)
        return 2 * numbers

    first, second = L0(found, 1.0, weight=numbers), L0(found, 1.0, weight=twice)
    assert first().item() == pytest.approx(second().item(), rel=1e-12)
    assert (first.weight, second.weight) == ("given", "twice")
    assert first().item() != pytest.approx(L0(found, 1.0)().item(), rel=1e-3)
    assert L0(found, 1.0, weight="time")().item() != pytest.approx(L0(found, 1.0)().item(), rel=1e-3)


def test_log_alpha_is_held_in_its_range():
    found = gated(program_of("outer")[0])
    penalty = L0(found, 1.0)
    (value,) = learned(found).values()
    value.data.copy_(torch.tensor([-9.0, -4.7, -1.0, 0.0, 4.7, 9.0]))
    penalty.clamp()
    assert value.tolist() == [LEAST, LEAST, -1.0, 0.0, MOST, MOST]


@pytest.mark.parametrize("name", ["adamw", "sgd", "ekfac", "kfac"])
def test_log_alpha_has_a_rate_of_its_own_and_no_decay(name: str):
    found = gated(program_of("outer")[0])
    penalty = L0(found, 1.0)
    optimizer = make_optimizer(found, name)
    before = {id(value) for group in optimizer.param_groups for value in group["params"]}
    key = "fallback_lr" if name in ("ekfac", "kfac") else "lr"
    rate = optimizer.param_groups[0][key]
    penalty.attach(optimizer)
    *others, mine = optimizer.param_groups
    assert {id(value) for value in mine["params"]} == {id(value) for value in learned(found).values()}
    assert mine[key] == rate * RATE
    assert mine["weight_decay"] == 0
    assert all(group[key] == rate and group["params"] for group in others)
    assert {id(value) for group in optimizer.param_groups for value in group["params"]} == before
    (value,) = learned(found).values()
    value.data.fill_(-9.0)
    for one in found.module().parameters():
        one.grad = torch.zeros_like(one)
    optimizer.step()
    assert (value == LEAST).all()  # clamped behind the step
    if name in ("ekfac", "kfac"):
        optimizer.close()  # type: ignore[attr-defined]


def test_what_means_nothing_is_refused():
    program, _ = program_of("outer")
    found = gated(program)
    for strength in (-1.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="strength of l0"):
            L0(found, strength)
    for wrong, words in (
        ("flops", "no weight 'flops'"),
        (np.ones(3), "one weight for each of 6"),
        (-np.ones(6), "not all 0"),
    ):
        with pytest.raises(UsageError, match=words):
            L0(found, 1.0, weight=wrong)
    with pytest.raises(UsageError, match="examples"):
        L0(found, 1.0, examples=0)
    with pytest.raises(UsageError, match="l2"):
        L0(found, 1.0, l2=-1.0)
    with pytest.raises(UsageError, match="no hard concrete gates"):
        L0(program, 1.0)
    with pytest.raises(UsageError, match="does not hold the gates"):
        L0(found, 1.0).attach(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))


# training --------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A wide hidden layer for a task that needs few units; of the inputs two of six count."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 32), nn.BatchNorm1d(32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.first(x))))


def drawn(count: int, seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def examples(count: int, seed: int) -> ArrayData:
    x, y = drawn(count, seed)
    return ArrayData({"x": x}, y)


def made() -> Program:
    torch.manual_seed(0)
    return capture(Net(), torch.randn(2, 6))


SETTINGS: dict[str, Any] = {"batch_size": 50, "seed": 5, "threads": 1, "val": False}


@pytest.mark.parametrize(("optimizer", "rate", "strength"), [("adamw", 1e-2, 20.0), ("ekfac", None, 60.0)])
def test_units_that_are_not_needed_are_closed_and_go(
    optimizer: str, rate: float | None, strength: float, tmp_path: Path
):
    """From a file to a file: train, finalise, ONNX; beside the same training without a penalty."""
    data, held = examples(600, 1), examples(1000, 2)
    kfe_fx.save(made(), tmp_path / "model.pt")
    program = kfe_fx.load(tmp_path / "model.pt")
    facts = kfe_fx.train(program, data, optimizer=optimizer, lr=rate, epochs=40, l0=strength, **SETTINGS)
    told = facts["l0"]
    assert told["inserted"]
    assert (told["lambda"], told["weight"], told["examples"], told["units"]) == (strength, "params", 600, 32)
    assert told["zero"] >= 16
    assert told["expected"] < 16
    assert facts["best_epoch"] is None
    assert any("were given hard concrete gates" in note for note in facts["notes"])

    kfe_fx.save(program, tmp_path / "gated.pt")
    gates = kfe_fx.load(tmp_path / "gated.pt")
    plain = FinaliseGates().run(gates)
    assert plain.facts["removed"] == plain.facts["zero"] == told["zero"]
    x, _ = drawn(1000, 2)
    torch.testing.assert_close(plain.program(x), gates(x), rtol=0, atol=1e-4)  # float32, logits of size 10
    small = FinaliseGates(data=data).run(gates).program
    assert small.tensor("first.weight").shape == (32 - told["zero"], 6)
    accuracy = evaluate(small, held, ACCURACY)

    bare = made()
    kfe_fx.train(bare, data, optimizer=optimizer, lr=rate, epochs=40, **SETTINGS)
    assert accuracy >= evaluate(bare, held, ACCURACY) - 0.02 > 0.9

    kfe_fx.export(small, tmp_path / "small.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    out: Any = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(out, small(x).detach().numpy(), rtol=0, atol=1e-5)


def test_channels_that_see_nothing_are_the_ones_that_go():
    """Half of the first filters are cut off from what comes behind: the task has no use for them."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 12, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(12, 8, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 4),
    )
    useless = [0, 2, 5, 7, 8, 11]
    net.get_parameter("2.weight").data[:, useless] = 0
    images, labels = glyphs(6000, 3, size=16)
    chosen = labels < 4
    x, y = torch.from_numpy(images[chosen]), torch.from_numpy(labels[chosen])
    program = capture(net, x[:2])
    mask = torch.ones(12)
    mask[useless] = 0
    program.tensor("2.weight").register_hook(lambda grad: grad * mask[:, None, None])
    facts = kfe_fx.train(
        program, (x, y), optimizer="adamw", lr=3e-3, steps=400, l0=6.0, **{**SETTINGS, "batch_size": 32}
    )
    gates = Learned.of(program)
    closed = {unit for unit, value in gates.at_test().items() if value == 0}
    first = next(group for group in gates.analysis.groups if group.name == "0")
    gone = {first.units.index(unit) for unit in closed & set(first.units)}
    assert gone == set(useless)
    assert facts["last_loss"] < 0.3 * facts["first_loss"]
    small = FinaliseGates().run(program).program
    assert small.tensor("0.weight").shape[0] == 6
    torch.testing.assert_close(small(x[:50]), program(x[:50]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "ekfac"])
@pytest.mark.parametrize("normal", [None, "input", "full"])
def test_recurrent_layers_are_trained_with_gates(optimizer: str, normal: str | None):
    """A task of the first input: most of nine units have nothing to do."""
    torch.manual_seed(0)
    x = torch.randn(240, 7, INPUTS)
    y = torch.stack([x[:, :, 0].cumsum(1).tanh(), x[:, :, 0]], 2)
    program = capture(NETS["lstm"](), x[:6])
    if normal is not None:
        program = BatchnormRecurrent(data=[x[:64]], mode=normal).run(program).program
    before = {name: value.clone() for name, value in program.module().named_parameters()}
    settings = {**SETTINGS, "batch_size": 24, "optimizer": optimizer, "lr": 1e-2 if optimizer == "adamw" else None}
    facts = kfe_fx.train(program, (x, y), "mse", epochs=25, l0=1.0, **settings)
    assert facts["last_loss"] < 0.7 * facts["first_loss"]
    found = dict(program.module().named_parameters())
    assert all(not torch.equal(found[name], value) for name, value in before.items())
    result = FinaliseGates().run(program)
    assert result.facts["removed"] == result.facts["zero"] == facts["l0"]["zero"]
    torch.testing.assert_close(result.program(x), program(x), rtol=0, atol=1e-5)


def test_interrupted_training_goes_on_bit_for_bit(tmp_path: Path):
    class Stop(Exception):
        pass

    data = examples(200, 1)
    settings = {**SETTINGS, "optimizer": "adamw", "epochs": 4, "l0": 5.0}
    whole = made()
    kfe_fx.train(whole, data, **settings)

    def stop(stage: str, _: float | None) -> None:
        if stage.startswith("epoch 2"):
            raise Stop

    place = tmp_path / "run.checkpoint"
    with pytest.raises(Stop):
        kfe_fx.train(made(), data, checkpoint=place, progress=stop, **settings)
    again = made()
    with pytest.raises(UsageError, match="l0 5"):
        kfe_fx.train(made(), data, checkpoint=place, resume=True, **{**settings, "l0": 6.0})
    facts = kfe_fx.train(again, data, checkpoint=place, resume=True, **settings)
    assert facts["resumed"] is not None
    mine, theirs = whole.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def test_gates_that_are_there_are_kept():
    program = InsertGates(mode="hard_concrete", drop_rate=0.4).run(made()).program
    facts = kfe_fx.train(program, examples(100, 1), optimizer="sgd", steps=1, l0=1.0, l0_weight="time", **SETTINGS)
    assert not facts["l0"]["inserted"]
    assert facts["l0"]["weight"] == "time"
    (value,) = learned(program).values()
    assert abs(value.detach().mean().item() - math.log(0.6 / 0.4)) < 0.3


def test_all_gates_closed_is_told():
    program = InsertGates(mode="hard_concrete", drop_rate=0.95).run(made()).program
    facts = kfe_fx.train(program, examples(100, 1), optimizer="sgd", steps=1, l0=1.0, **SETTINGS)
    assert any("every gate of 1 groups (first) is closed" in note for note in facts["notes"])
    assert not any("were given" in note for note in facts["notes"])


def test_options_that_mean_nothing():
    data = examples(100, 1)
    program = made()
    before = program.hash()
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"l0": -1.0}, "strength of l0"),
        ({"l0": math.nan}, "strength of l0"),
        ({"l0": 1.0, "group_lasso": 0.1}, "give one of them"),
    )
    for options, words in wrong:
        with pytest.raises(UsageError, match=words) as caught:
            kfe_fx.train(program, data, **SETTINGS, **options)
        assert "\n" not in str(caught.value)
    assert program.hash() == before
    facts = kfe_fx.train(program, data, optimizer="sgd", steps=1, l0=0.0, **SETTINGS)
    assert facts["l0"] is None
    assert program.hash() == before
    with pytest.raises(UsageError, match="no removable units to gate"):
        kfe_fx.train(capture(nn.Linear(6, 3), torch.randn(2, 6)), data, l0=1.0, **SETTINGS)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    x, y = drawn(200, 1)
    np.savez(tmp_path / "data.npz", x=x.numpy(), y=y.numpy())
    kfe_fx.save(made(), tmp_path / "model.pt")
    names = {name: str(tmp_path / f"{name}") for name in ("model.pt", "data.npz", "gated.pt", "small.pt", "small.onnx")}
    train = ["train", names["model.pt"], "--data", names["data.npz"], "--optimizer", "adamw", "--steps", "120"]
    assert run([*train, "--l0", "60", "--l0-weight", "time", "-o", names["gated.pt"], "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["l0"]["lambda"] == 60
    assert facts["l0"]["weight"] == "time"
    assert run(["export", names["gated.pt"], "-o", names["small.onnx"]]) == 3
    assert "finalise-gates" in capsys.readouterr().err
    assert (
        run(["rewrite", names["gated.pt"], "finalise-gates", "--data", names["data.npz"], "-o", names["small.pt"]]) == 0
    )
    assert run(["export", names["small.pt"], "-o", names["small.onnx"], "-q"]) == 0
    assert run([*train, "--l0", "10", "-o", names["gated.pt"], "--force"]) == 0
    assert "gates closed" in capsys.readouterr().out
    assert run([*train, "--l0", "-1", "-o", names["gated.pt"], "--force"]) == 2
    assert "l0" in capsys.readouterr().err
