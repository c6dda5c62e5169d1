"""Hard concrete gates: their distribution against closed forms, and what they do in a network."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import kfe_fx
from kfe_fx.errors import KfeError, UnsupportedModel, UsageError
from kfe_fx.frontend.capture import capture
from kfe_fx.gates import gated
from kfe_fx.hard_concrete import (
    BETA,
    GAMMA,
    HARD_CONCRETE,
    ZETA,
    Learned,
    cdf,
    gate_at_test,
    gate_sample,
    learned,
    nonzero_probability,
    one_probability,
)
from kfe_fx.labels.analysis import analyze
from kfe_fx.optim import EKFAC
from kfe_fx.passes.insert_gates import InsertGates
from kfe_fx.passes.strip_gates import StripGates
from kfe_fx.program import Program
from kfe_fx.runtime.lower import to_exported_program
from tests.criteria.nets import NAMES, program_of
from tests.passes.recurrent_nets import NETS
from tests.random_nets import sample_net

ALPHAS = torch.tensor([-4.0, -2.0, -0.5, 0.0, 1.0, 2.0, 4.0], dtype=torch.float64)
HARD = InsertGates(mode="hard_concrete")


def gated_program(program: Program, **options: object) -> Program:
    return InsertGates(mode="hard_concrete", **options).run(program).program  # type: ignore[arg-type]


def set_gates(program: Program, seed: int, values: tuple[float, ...] = (-4.0, -1.0, 0.0, 1.0, 4.0)) -> None:
    """Write values of log alpha drawn from a few: closed, open and in between."""
    generator = torch.Generator().manual_seed(seed)
    for held in learned(program).values():
        drawn = torch.tensor(values, dtype=held.dtype)[torch.randint(len(values), held.shape, generator=generator)]
        held.data.copy_(drawn)


# the distribution ------------------------------------------------------------------------------------------------


def test_shares_of_zeros_and_ones_are_those_of_the_closed_forms():
    """T8.1: a million draws each, within four standard deviations of their share."""
    count = 1_000_000
    u = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for log_alpha in ALPHAS:
        z = gate_sample(log_alpha.expand(count), u)
        assert float(z.min()) >= 0
        assert float(z.max()) <= 1
        for found, expected in (
            ((z != 0).double().mean(), nonzero_probability(log_alpha)),
            ((z == 1).double().mean(), one_probability(log_alpha)),
            ((z <= 0.3).double().mean(), cdf(0.3, log_alpha)),
        ):
            deviation = math.sqrt(float(expected * (1 - expected)) / count)
            assert abs(float(found - expected)) <= 4 * deviation


def test_the_distribution_at_zero_and_one_is_what_the_shares_say():
    """T8.2, by a path of its own."""
    torch.testing.assert_close(cdf(0.0, ALPHAS), 1 - nonzero_probability(ALPHAS), rtol=0, atol=1e-15)
    torch.testing.assert_close(cdf(1.0, ALPHAS), 1 - one_probability(ALPHAS), rtol=0, atol=1e-15)
    expected = torch.sigmoid(ALPHAS - BETA * math.log(-GAMMA / ZETA))
    torch.testing.assert_close(nonzero_probability(ALPHAS), expected, rtol=0, atol=0)


def test_test_gates_are_exactly_zero_and_one():
    """T8.3: from |log alpha| = log(1.1/0.1) = 2.398 on; and zhat is no expected value."""
    edge = math.log(-ZETA / GAMMA)
    assert edge == pytest.approx(2.398, abs=1e-3)
    alphas = torch.tensor([-4.6, -edge - 1e-9, -edge + 1e-6, edge - 1e-6, edge + 1e-9, 4.6], dtype=torch.float64)
    found = gate_at_test(alphas)
    assert (found[:2] == 0).all()
    assert (found[4:] == 1).all()
    assert ((found[2:4] > 0) & (found[2:4] < 1)).all()
    two = torch.tensor(2.0, dtype=torch.float64)
    u = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    assert gate_at_test(two).item() == pytest.approx(0.957, abs=5e-4)
    assert gate_sample(two, u).mean().item() == pytest.approx(0.857, abs=5e-4)


def test_draws_at_the_edge_are_finite():
    for u in (0.0, 1.0):
        for dtype in (torch.float32, torch.float64):
            value = torch.tensor([-4.6, 0.0, 4.6], dtype=dtype, requires_grad=True)
            found = gate_sample(value, torch.full((3,), u, dtype=dtype))
            (grad,) = torch.autograd.grad(found.sum(), value)
            assert found.isfinite().all()
            assert grad.isfinite().all()


def test_the_gradient_of_a_draw():
    u = torch.tensor([0.2, 0.4, 0.5, 0.6], dtype=torch.float64)
    value = torch.tensor([0.3, -0.2, 0.1, 0.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda alpha: gate_sample(alpha, u), value)


def test_the_gradient_of_the_expected_loss():
    """The mean of gradients of drawn losses is the derivative of their mean, here by quadrature and differences."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(2, 3), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.first(x)))

    x, y = torch.randn(4, 2).double(), torch.randn(4, 1).double()
    program = gated_program(capture(Net().double(), x)).train()
    (log_alpha,) = learned(program).values()
    log_alpha.data.copy_(torch.tensor([-0.5, 0.3, 1.0]))
    first: Any = program.module().get_submodule("first")
    last: Any = program.module().get_submodule("last")
    u = (torch.arange(400, dtype=torch.float64) + 0.5) / 400

    def expected_loss(alpha: Tensor) -> float:
        """The mean over a grid of all three draws."""
        with torch.no_grad():
            z = torch.stack(torch.meshgrid(*(gate_sample(one, u[::4]) for one in alpha), indexing="ij"), -1)
            h = F.linear(x, first.weight, first.bias)  # the gate stands where units are minted: before tanh
            out = F.linear(torch.tanh(z.view(-1, 1, 3) * h), last.weight, last.bias)
            return float((out - y).square().mean())

    step = 1e-3
    wanted = []
    for place in range(3):
        moved = torch.zeros(3, dtype=torch.float64)
        moved[place] = step
        wanted.append((expected_loss(log_alpha.data + moved) - expected_loss(log_alpha.data - moved)) / (2 * step))
    torch.manual_seed(1)
    rows = []
    for _ in range(4000):
        (grad,) = torch.autograd.grad(F.mse_loss(program(x), y), log_alpha)
        rows.append(grad)
    found = torch.stack(rows)
    error = found.std(0) / math.sqrt(len(rows))
    assert (np.abs(np.array(wanted)) > 10 * error.numpy()).any()  # it tells something else from zero
    assert ((found.mean(0) - torch.tensor(wanted)).abs() <= 4 * error + 1e-4).all()


# in a network ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_multiplies_by_the_test_gates(name: str):
    program, x = program_of(name)
    analysis = analyze(program)
    found = gated_program(program)
    set_gates(found, 1)
    tables = [gate_at_test(learned(found)[group.id].detach()).unsqueeze(0) for group in analysis.groups]
    expected = gated(program, analysis).run([x], tables)
    torch.testing.assert_close(found(x), expected, rtol=0, atol=1e-13)
    assert (found(x) - program(x)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["lstm", "stack", "tanh", "relu", "projection", "packed"])
def test_recurrent_layers_are_gated_inside_the_recurrence(name: str):
    """Where the state is read through weights alone it is the gate on h_t; from the state zero."""
    torch.manual_seed(0)
    net = NETS[name]().double()
    x = torch.randn(3, 5, 3).double()
    args = (x, torch.tensor([5, 3, 2])) if name == "packed" else (x,)
    program = capture(net, args)
    analysis = analyze(program)
    found = gated_program(program)
    set_gates(found, 2)
    tables = [gate_at_test(learned(found)[group.id].detach()).unsqueeze(0) for group in analysis.groups]
    expected = gated(program, analysis).run(list(args), tables)
    torch.testing.assert_close(found(*args), expected, rtol=0, atol=1e-13)


def test_a_gru_carries_its_own_state_on():
    torch.manual_seed(0)
    net: Any = NETS["gru"]().double()
    x = torch.randn(3, 5, 3).double()
    found = gated_program(capture(net, x))
    set_gates(found, 3)
    gates = Learned.of(found)
    by_name = {gates.analysis.groups[group].name: gate_at_test(value) for group, value in gates.log_alpha.items()}
    z, y = by_name["layer.weight_ih_l0"], net.inputs(x) * by_name["inputs"]
    layer, h, outputs = net.layer, torch.zeros(3, 5).double(), []
    for t in range(x.shape[1]):
        ri, zi, ni = F.linear(y[:, t], layer.weight_ih_l0, layer.bias_ih_l0).chunk(3, 1)
        rh, zh, nh = F.linear(z * h, layer.weight_hh_l0, layer.bias_hh_l0).chunk(3, 1)
        update = torch.sigmoid(zi + zh)
        h = (1 - update) * torch.tanh(ni + torch.sigmoid(ri + rh) * nh) + update * h
        outputs.append(z * h)
    torch.testing.assert_close(found(x), net.out(torch.stack(outputs, 1)), rtol=0, atol=1e-13)


def test_training_draws_once_for_a_batch_and_evaluation_never():
    program, x = program_of("residual")
    found = gated_program(program, drop_rate=0.5)
    assert set(found.graphs) == {"eval", "train"}
    assert torch.equal(found(x), found(x))
    one = found.module().run_flat([x], "train")[0]
    assert not torch.equal(one, found.module().run_flat([x], "train")[0])
    drawn = [node for node in found.graphs["train"].nodes if node.target is HARD_CONCRETE]
    assert [node.args[1] for node in drawn] == [True] * len(learned(found))
    # all that stands at one draw is the same for all examples
    plain = gated_program(capture(nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(2, 2)))
    rows = plain.train()(torch.ones(5, 2))
    assert torch.equal(rows, rows[:1].expand(5, 3))


def test_a_network_without_a_training_graph_is_given_one():
    program = capture(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 2))
    assert set(program.graphs) == {"eval"}
    found = gated_program(program)
    assert set(found.graphs) == {"eval", "train"}
    assert set(StripGates().run(found).program.graphs) == {"eval"}


@pytest.mark.parametrize("seed", range(3))
def test_seeds_give_the_same_draws_after_a_file_and_a_retrace(seed: int, tmp_path: Path):
    """T8.6."""
    case = sample_net(seed)
    program = gated_program(capture(case.module, case.inputs), drop_rate=0.5, seed=seed)
    kfe_fx.save(program, tmp_path / "gated.pt")
    again = kfe_fx.load(tmp_path / "gated.pt")
    assert again.hash() == program.hash()
    flat = list(case.make_inputs(3))

    def draw(run: object) -> list[Tensor]:
        torch.manual_seed(7)
        with torch.no_grad():
            return [value for value in run(*flat) if isinstance(value, Tensor)]  # type: ignore[operator]

    copied, loaded = (one.copy().module() for one in (program, again))
    expected = draw(lambda *values: copied.run_flat(list(values), "train"))
    assert all(map(torch.equal, expected, draw(lambda *values: loaded.run_flat(list(values), "train"))))
    assert not all(map(torch.equal, expected, draw(lambda *values: loaded.run_flat(list(values), "eval"))))
    held = program.copy()
    retraced = fx.Tracer().trace(fx.GraphModule(held.module(), held.graphs["train"]))
    assert all(map(torch.equal, expected, draw(fx.GraphModule(held.module(), retraced))))


@pytest.mark.parametrize("name", NAMES)
def test_stripping_restores_the_network(name: str, tmp_path: Path):
    program, x = program_of(name)
    found = gated_program(program)
    kfe_fx.save(found, tmp_path / "gated.pt")
    for one in (found, kfe_fx.load(tmp_path / "gated.pt")):
        result = StripGates().run(one)
        assert result.modified
        assert result.facts["keeps"] == "trained"
        bare = result.program
        assert bare.hash() == program.hash()
        assert bare.state_dict().keys() == program.state_dict().keys()
        assert bare.signature == program.signature
        assert not bare.extras.get("sections")
        assert torch.equal(bare(x), program(x))


def test_a_file_says_that_it_cannot_be_read_without_gates(tmp_path: Path):
    program, _ = program_of("outer")
    for one, wanted in ((program, []), (gated_program(program), ["hard-concrete-gates"])):
        kfe_fx.save(one, tmp_path / "model.pt")
        with zipfile.ZipFile(tmp_path / "model.pt") as opened:
            (name,) = (name for name in opened.namelist() if name.endswith("kfe/graph.json"))
            assert json.loads(opened.read(name))["requires"] == wanted


def test_log_alpha_starts_at_the_drop_rate():
    program, _ = program_of("residual")
    found, again = gated_program(program, drop_rate=0.2, seed=3), gated_program(program, drop_rate=0.2, seed=3)
    other = gated_program(program, drop_rate=0.2, seed=4)
    values = torch.cat(list(learned(found).values())).detach()
    assert torch.equal(values, torch.cat(list(learned(again).values())))
    assert not torch.equal(values, torch.cat(list(learned(other).values())))
    assert ((values - math.log(0.8 / 0.2)).abs() < 5 * 0.01).all()
    assert 0.003 < float(values.std()) < 0.02
    assert {name for name, _ in found.module().named_parameters()} - {
        name for name, _ in program.module().named_parameters()
    } == {f"kfe_gates.{group}.log_alpha" for group in learned(found)}


def test_gradients_reach_log_alpha():
    program, x = program_of("attention")
    found = gated_program(program, drop_rate=0.5).train()
    torch.manual_seed(0)
    found(x).square().sum().backward()
    assert all(value.grad is not None and bool((value.grad != 0).any()) for value in learned(found).values())


def test_half_precision_activations_stay_so():
    program = capture(
        nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)).bfloat16(), torch.ones(2, 2).bfloat16()
    )
    found = gated_program(program)
    assert {value.dtype for value in learned(found).values()} == {torch.float32}
    for mode in found.graphs:
        assert found.module().run_flat([torch.ones(3, 2).bfloat16()], mode)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["residual", "attention", "outer"])
def test_gates_do_not_hide_the_examples_from_curvature(name: str):
    """All that EKFAC captured it still captures; log alpha takes the steps of what is left out."""
    program, _ = program_of(name)
    found = gated_program(program)
    optimizers = [EKFAC(one) for one in (program, found)]
    try:
        before, after = (set(optimizer.left_out) for optimizer in optimizers)
        assert after - before == {f"kfe_gates.{group}.log_alpha" for group in learned(found)}
    finally:
        for optimizer in optimizers:
            optimizer.close()


def test_what_is_refused():
    program, _ = program_of("outer")
    found = gated_program(program)
    for mode in ("hard_concrete", "multiplier"):
        for one in (found, InsertGates().run(program).program):
            with pytest.raises(UsageError, match="has gates already") as caught:
                InsertGates(mode=mode).run(one)
            assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="there is no mode 'soft'"):
        InsertGates(mode="soft").run(program)
    for rate in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(UsageError, match="drop rate"):
            InsertGates(mode="hard_concrete", drop_rate=rate).run(program)
    with pytest.raises(UsageError, match="has no hard concrete gates"):
        Learned.of(program)
    lonely = HARD.run(capture(nn.Linear(3, 2), torch.randn(2, 3)))
    assert not lonely.modified


def test_units_do_not_go_before_their_gates():
    program, x = program_of("outer")
    found = gated_program(program)
    before = found.hash(), {name: value.clone() for name, value in found.state_dict().items()}
    y = torch.zeros(len(x), dtype=torch.int64)
    attempts = (
        lambda: analyze(found),
        lambda: to_exported_program(found),
        lambda: kfe_fx.prune(found, budget=0.5, metric="params", data=(x, y)),
    )
    for attempt in attempts:
        with pytest.raises(UnsupportedModel, match="finalise-gates") as caught:
            attempt()
        assert isinstance(caught.value, KfeError)
        assert "\n" not in str(caught.value)
    assert found.hash() == before[0]
    assert all(torch.equal(value, before[1][name]) for name, value in found.state_dict().items())


def test_gates_of_another_network_are_told():
    program, _ = program_of("outer")
    found = gated_program(program)
    held = found.module().get_submodule("kfe_gates.0")
    held._parameters["log_alpha"] = nn.Parameter(torch.zeros(3))
    with pytest.raises(UsageError, match="do not fit the units"):
        Learned.of(found)
