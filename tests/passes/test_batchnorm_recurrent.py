"""Normalising recurrent layers: the function of a trained network, what an untrained one gets, names and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kfe_fx
from kfe_fx.errors import UsageError
from kfe_fx.frontend.capture import capture
from kfe_fx.passes.batchnorm_recurrent import BatchnormRecurrent
from kfe_fx.passes.capture_curvature import CaptureCurvature
from kfe_fx.passes.strip_curvature import StripCurvature
from kfe_fx.recurrent.op import RECURRENT
from tests.passes.recurrent_nets import (
    HIDDEN,
    INPUTS,
    NETS,
    STEPS,
    Net,
    batches,
    calls,
    data,
    difference,
    draw,
    program,
)

OPTIONS = [
    {"mode": "input"},
    {"mode": "full"},
    {"mode": "full", "statistics": "shared", "cell_norm": "scalar"},
    {"mode": "full", "cell_norm": "channel", "t_max": 4},
    {"mode": "full", "cell_norm": "scalar", "t_max": 9},
]
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(map(str, options.values())))
@pytest.mark.parametrize("name", NETS)
def test_a_trained_network_keeps_its_function_in_evaluation(name: str, options: dict[str, Any]):
    net = program(name)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    result = BatchnormRecurrent(data=batches(name, 2), **options).run(net)
    assert result.facts["keeps"] == "exact"
    assert not result.facts["skipped"]
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in before.items())
    for seed, steps in ((0, STEPS), (5, STEPS), (6, 12), (7, 2)):
        inputs = data(name, seed=seed, steps=max(steps, 3) if name == "packed" else steps)
        assert difference(net, result.program, inputs) < 1e-12
    for mode in ("eval", "train"):
        made = calls(result.program, mode)
        assert len(made) == len(calls(net))
        assert all(call.gamma_ih is not None and call.training == (mode == "train") for call in made)
    result.program.train()(*data(name)).square().sum().backward()  # the first step changes it
    assert difference(net, result.program.eval(), data(name)) > 1e-6


def test_in_float32():
    net = program("stack", torch.float32)
    x = data("stack")[0].float()
    result = BatchnormRecurrent(data=x, mode="full", cell_norm="channel").run(net)
    assert difference(net, result.program, (x,)) < 1e-6
    assert {value.dtype for value in result.program.state_dict().values()} == {torch.float32}


def test_both_graphs_have_the_same_nodes_and_names_beside_the_weights():
    result = BatchnormRecurrent(data=data("dropout"), mode="full", cell_norm="channel").run(program("dropout"))
    names = [
        [node.name for node in graph.nodes if node.target is RECURRENT] for graph in result.program.graphs.values()
    ]
    assert names[0] == names[1]
    shapes = {key: tuple(value.shape) for key, value in result.program.state_dict().items() if key.startswith("layer")}
    gates = 4 * HIDDEN
    learned_shapes = {"weight_ih": (gates, 4), "weight_hh": (gates, HIDDEN), "gamma_c": (HIDDEN,), "beta_c": (HIDDEN,)}
    learned_shapes |= dict.fromkeys(("bias_ih", "bias_hh", "gamma_ih", "gamma_hh"), (gates,))
    widths = {"ih": gates, "hh": gates, "c": HIDDEN}
    running = {f"running_{part}_{side}": (STEPS, wide) for part in ("mean", "var") for side, wide in widths.items()}
    assert shapes == {
        f"layer.{part}_l0": shape for part, shape in (learned_shapes | running | {"seen": (STEPS,)}).items()
    }
    module = result.program.module()
    learned = {name for name, _ in module.named_parameters()}
    assert {"layer.gamma_ih_l0", "layer.beta_c_l0"} <= learned
    assert not any("running" in name or "seen" in name for name in learned)
    twin = BatchnormRecurrent(data=data("stack")).run(program("stack")).program
    assert {"layer.gamma_ih_l1_reverse", "layer.running_var_ih_l1_reverse"} <= twin.state_dict().keys()


def test_the_pooled_statistics_are_those_of_all_valid_steps():
    net = program("packed")
    examples = batches("packed", 3)
    result = BatchnormRecurrent(data=examples, statistics="step", mode="full").run(net)
    weight = net.tensor("layer.weight_ih_l0_reverse")
    rows = []
    for (x, lengths), _ in examples:
        hidden = torch.nn.functional.linear(x, net.tensor("inputs.weight"), net.tensor("inputs.bias"))
        rows += [hidden[row, :length] @ weight.t() for row, length in enumerate(lengths.tolist())]
    products = torch.cat(rows)
    found = result.program
    for part, expected in (("mean", products.mean(0)), ("var", products.var(0, correction=0))):
        value = found.tensor(f"layer.running_{part}_ih_l0_reverse")
        torch.testing.assert_close(value, expected.expand_as(value), rtol=1e-12, atol=1e-12)
    shares = [float(sum((lengths > step).double().mean() for (_, lengths), _ in examples)) for step in range(STEPS)]
    torch.testing.assert_close(found.tensor("layer.seen_l0"), torch.tensor(shares).double(), rtol=1e-12, atol=0)


def test_t4_7_rows_of_their_own_cannot_keep_the_function():
    """The true statistics of each step, with the scales and shifts of the pooled ones, are another function."""
    net = program("lstm")
    x = data("lstm")[0]
    pooled = BatchnormRecurrent(data=x, mode="full").run(net).program
    assert difference(net, pooled, (x,)) < 1e-12
    apart = pooled.copy()
    layer = nn.LSTM(4, HIDDEN, batch_first=True).double()
    layer.load_state_dict({key: net.tensor(f"layer.{key}") for key in layer.state_dict()})
    hidden = nn.functional.linear(x, net.tensor("inputs.weight"), net.tensor("inputs.bias"))
    output, _ = layer(hidden)
    before = torch.cat([torch.zeros_like(output[:, :1]), output[:, :-1]], 1)
    with torch.no_grad():
        for side, value in (("ih", hidden @ layer.weight_ih_l0.t()), ("hh", before @ layer.weight_hh_l0.t())):
            start = side == "hh"  # the first product of the hidden side does not vary
            apart.tensor(f"layer.running_mean_{side}_l0")[start:] = value.mean(0)[start:]
            apart.tensor(f"layer.running_var_{side}_l0")[start:] = value.var(0, correction=0)[start:]
    assert difference(net, apart, (x,)) > 0.05


def test_channels_that_do_not_vary_are_safe():
    net = program("lstm")
    with torch.no_grad():
        net.tensor("layer.weight_ih_l0")[2] = 0
        net.tensor("layer.weight_hh_l0")[7] = 0
    result = BatchnormRecurrent(data=data("lstm"), mode="full", cell_norm="channel").run(net)
    assert difference(net, result.program, data("lstm", seed=3)) < 1e-12
    result.program.train()(*data("lstm")).sum().backward()
    grads = [parameter.grad for parameter in result.program.module().parameters()]
    assert all(grad is not None and torch.isfinite(grad).all() for grad in grads)


def test_inputs_that_are_equal_in_all_sequences_are_told():
    net = program("lstm")
    x = data("lstm")[0]
    x[:, 3] = x[0, 3]
    assert BatchnormRecurrent(data=x).run(net).facts["constant_inputs"] == {"layer.l0": [3]}
    assert BatchnormRecurrent(data=data("lstm")).run(net).facts["constant_inputs"] == {}


def test_untrained_networks_get_the_published_start():
    net = program("lstm")
    result = BatchnormRecurrent(mode="full", cell_norm="channel").run(net)
    assert result.facts["keeps"] == "trained"
    assert result.facts["layers"] == {"layer.l0": STEPS}
    state = result.program.state_dict()
    for name in ("gamma_ih", "gamma_hh", "gamma_c"):
        assert torch.equal(state[f"layer.{name}_l0"], torch.full_like(state[f"layer.{name}_l0"], 0.1))
    for side in ("ih", "hh", "c"):
        assert not state[f"layer.running_mean_{side}_l0"].any()
        assert (state[f"layer.running_var_{side}_l0"] == 1).all()
    assert not state["layer.seen_l0"].any()
    bias = state["layer.bias_ih_l0"] + state["layer.bias_hh_l0"]
    assert (bias.view(4, -1)[1] == 1).all()
    assert bias.sum() == HIDDEN
    assert torch.equal(state["layer.weight_hh_l0"], net.tensor("layer.weight_hh_l0"))
    gru = BatchnormRecurrent(gamma=0.3, t_max=2, statistics="step").run(program("gru without biases")).program
    assert not gru.tensor("layer.bias_ih_l0").any()
    assert gru.tensor("layer.running_var_ih_l0").shape == (2, 3 * HIDDEN)
    assert (gru.tensor("layer.gamma_ih_l0") == 0.3).all()


def test_what_decides_whether_a_network_is_trained():
    net, x = program("lstm"), data("lstm")[0]
    assert BatchnormRecurrent().run(net).facts["keeps"] == "trained"
    facts = BatchnormRecurrent(data=x, trained=False, statistics="step").run(net).facts
    assert facts == {"layers": {"layer.l0": STEPS}, "skipped": {}, "constant_inputs": {}, "keeps": "trained"}
    net.extras["calibration"] = ((x,), None)
    result = BatchnormRecurrent().run(net)
    assert result.facts["keeps"] == "exact"
    assert difference(net, result.program, (x,)) < 1e-12
    assert BatchnormRecurrent(trained=False).run(net).facts["keeps"] == "trained"


def test_the_longest_sequence_of_the_data_makes_the_rows():
    examples = [data("lstm", steps=steps) for steps in (4, 9, 5)]
    result = BatchnormRecurrent(data=examples, mode="full").run(program("lstm"))
    assert result.facts["layers"] == {"layer.l0": 9}
    shares = [3.0] * 4 + [2.0] + [1.0] * 4
    assert result.program.tensor("layer.seen_l0").tolist() == shares


def test_training_moves_statistics_and_learns():
    torch.manual_seed(0)
    net = BatchnormRecurrent(mode="full", cell_norm="channel").run(program("lstm")).program
    x = data("lstm", batch=16)[0]
    target = x.cumsum(1)[..., :2].tanh()
    optimizer = torch.optim.Adam(net.module().parameters(), 0.02)
    losses = []
    for _ in range(60):
        net.train()
        loss = (net(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
    assert (net.tensor("layer.seen_l0") == 60).all()
    assert net.eval()(x[:1]).shape == (1, STEPS, 2)


def test_a_frozen_layer_stays_frozen_and_a_copy_stands_alone():
    net = program("lstm")
    net.module().get_parameter("layer.weight_ih_l0").requires_grad_(False)
    made = BatchnormRecurrent(data=data("lstm")).run(net).program
    assert not made.module().get_parameter("layer.gamma_ih_l0").requires_grad
    twin = made.copy()
    twin.train()(*data("lstm", seed=8))
    assert not torch.equal(twin.tensor("layer.running_mean_ih_l0"), made.tensor("layer.running_mean_ih_l0"))


def test_biases_that_are_tied_elsewhere_are_untied():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.LSTM(INPUTS, INPUTS, batch_first=True) for _ in range(2))
            self.second.bias_ih_l0 = self.first.bias_ih_l0

        def forward(self, x):
            return self.second(self.first(x)[0])[0]

    x = draw(4, 5, INPUTS)
    net = capture(Tied().double(), x)
    made = BatchnormRecurrent(data=x, mode="full").run(net).program
    assert difference(net, made, (x,)) < 1e-12
    assert len(calls(made)) == 2


def test_weights_that_are_computed_are_left_alone():
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.utils.parametrizations.weight_norm(nn.GRU(INPUTS, 4, batch_first=True), "weight_hh_l0")
            self.other = nn.GRU(4, 4, batch_first=True)

        def forward(self, x):
            return self.other(self.layer(x)[0])[0]

    x = draw(4, 5, INPUTS)
    net = capture(Normed().double(), x)
    result = BatchnormRecurrent(data=x).run(net)
    assert list(result.facts["layers"]) == ["other.l0"]
    assert list(result.facts["skipped"].values()) == ["its weight_hh is computed in the network"]
    assert difference(net, result.program, (x,)) < 1e-12


def test_nothing_to_do():
    net = capture(nn.Linear(3, 2), torch.randn(2, 3))
    result = BatchnormRecurrent().run(net)
    assert not result.modified
    assert result.program is net
    once = BatchnormRecurrent().run(program("lstm")).program
    again = BatchnormRecurrent().run(once)
    assert not again.modified


def test_the_result_is_written_and_read_back(tmp_path: Path):
    made = BatchnormRecurrent(data=data("stack"), mode="full", cell_norm="scalar").run(program("stack")).program
    made.train()(*data("stack", seed=4))
    kfe_fx.save(made, path=tmp_path / "model.pt")
    read = kfe_fx.load(tmp_path / "model.pt")
    assert read.hash() == made.hash()
    assert difference(made.eval(), read, data("stack")) == 0.0
    for net in (made, read):
        net.train()(*data("stack", seed=5))
    assert torch.equal(made.tensor("layer.running_var_hh_l1"), read.tensor("layer.running_var_hh_l1"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"mode": "both"}, "mode is one of input, full"),
        ({"cell_norm": "layer", "mode": "full"}, "cell_norm is one of none, scalar, channel"),
        ({"statistics": "all"}, "statistics is one of step, shared"),
        ({"cell_norm": "scalar"}, "cell_norm=scalar needs mode=full"),
        ({"t_max": 0}, "t_max is a number of steps from 1"),
        ({"momentum": 0.0}, r"momentum is in \(0, 1\]"),
        ({"trained": True}, "needs examples to calibrate on"),
        ({"data": []}, "no batches"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], told: str):
    with pytest.raises(UsageError, match=told):
        BatchnormRecurrent(**options).run(program("lstm"))


def test_taps_stay():
    net = program("stack")
    tapped = CaptureCurvature().run(net).program
    found = []
    for each in (net, tapped):
        made = BatchnormRecurrent(data=data("stack"), mode="full").run(each).program
        assert difference(net, made, data("stack")) < 1e-12
        found.append(StripCurvature().run(made).program.hash())
    assert found[0] == found[1]


def test_cell_norms_are_for_lstms_alone():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Net(), Net(nn.GRU)

        def forward(self, x):
            return self.first(x) + self.second(x)

    x = data("lstm")[0]
    net = capture(Both().double(), x)
    made = BatchnormRecurrent(data=x, mode="full", cell_norm="channel").run(net).program
    assert sorted(name for name in made.state_dict() if "gamma_c" in name) == ["first.layer.gamma_c_l0"]
    assert difference(net, made, (x,)) < 1e-12
