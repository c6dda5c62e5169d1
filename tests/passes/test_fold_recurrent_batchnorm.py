"""Folding into the plain layers: exact, side by side, and nothing left over."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import kfe_fx
from kfe_fx.passes.batchnorm_recurrent import BatchnormRecurrent
from kfe_fx.passes.finalise_recurrent import FinaliseRecurrent
from kfe_fx.passes.fold_recurrent_batchnorm import FoldRecurrentBatchnorm
from kfe_fx.passes.pipeline import Pipeline
from kfe_fx.program import Program
from kfe_fx.recurrent.layers import find_layers
from tests.passes.recurrent_nets import NETS, STEPS, batches, calls, data, difference, moved, program

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def final(name: str, **options: object) -> Program:
    made = moved(BatchnormRecurrent(**options).run(program(name)).program, name)  # type: ignore[arg-type]
    return FinaliseRecurrent().run(made).program


@pytest.mark.parametrize("mode", ["input", "full"])
@pytest.mark.parametrize("name", NETS)
def test_folded_is_the_plain_network_with_other_weights(name: str, mode: str):
    net = final(name, mode=mode)
    result = FoldRecurrentBatchnorm().run(net)
    assert result.modified
    assert not result.facts["left"]
    sides = ["input"] if mode == "input" else ["input", "hidden"]
    assert all(found == sides for found in result.facts["folded"].values())
    for seed, steps in ((1, STEPS), (2, 12)):
        assert difference(net, result.program, data(name, seed=seed, steps=steps)) < 1e-12
    plain = program(name)
    state = result.program.state_dict()
    added = state.keys() - plain.state_dict().keys()
    assert all(".bias_" in key for key in added)  # of layers that had none
    assert bool(added) == (name in ("no biases", "gru without biases"))
    if not added:
        assert result.program.hash() == plain.hash()
        assert list(state) == list(plain.state_dict())
    assert not torch.equal(state["layer.weight_ih_l0"], net.tensor("layer.weight_ih_l0"))
    again = FoldRecurrentBatchnorm().run(result.program)
    assert not again.modified


def test_in_float32():
    made = BatchnormRecurrent(data=batches("stack", 1), mode="full").run(program("stack", torch.float32)).program
    net = FinaliseRecurrent().run(made).program
    x = data("stack", seed=2)[0].float()
    assert difference(net, FoldRecurrentBatchnorm().run(net).program, (x,)) < 1e-6


def test_the_whole_way_of_a_trained_network():
    net = program("stack")
    text = "batchnorm-recurrent{mode=full},finalise-recurrent,fold-recurrent-batchnorm"
    pipeline = Pipeline.from_text(text).with_data(data("stack"))
    result = pipeline.run(net)
    assert result.program.hash() == net.hash()
    assert result.program.lineage == ("batchnorm-recurrent", "finalise-recurrent", "fold-recurrent-batchnorm")


def test_moving_statistics_and_several_rows_are_left_with_the_reason():
    moving = BatchnormRecurrent(mode="full").run(program("lstm")).program
    result = FoldRecurrentBatchnorm().run(moving)
    assert not result.modified
    assert result.program is moving
    told = "its statistics move in training; run finalise-recurrent first"
    assert result.facts == {"folded": {}, "left": {"layer.l0": {"input": told, "hidden": told}}}
    frozen = FinaliseRecurrent().run(moving).program
    layer = find_layers(frozen)[0]
    rows = frozen.tensor("layer.running_mean_hh_l0").repeat(3, 1)
    for part in ("mean", "var"):
        name = f"layer.running_{part}_hh_l0"
        frozen.module().get_submodule("layer").register_buffer(
            f"running_{part}_hh_l0", frozen.tensor(name).repeat(3, 1)
        )
    assert frozen.tensor("layer.running_mean_hh_l0").shape == rows.shape
    with torch.no_grad():
        frozen.tensor("layer.running_mean_hh_l0")[1] += 0.3
    result = FoldRecurrentBatchnorm().run(frozen)
    assert result.facts["folded"] == {layer.name: ["input"]}
    assert "3 rows of statistics" in result.facts["left"][layer.name]["hidden"]
    assert difference(frozen, result.program, data("lstm")) < 1e-12
    assert calls(result.program)[0].gamma_ih is None
    assert calls(result.program)[0].gamma_hh is not None
    assert not any("ih" in key and ("gamma" in key or "running" in key) for key in result.program.state_dict())


@pytest.mark.parametrize("cell_norm", ["scalar", "channel"])
def test_the_norm_of_the_cell_state_stays_alone(cell_norm: str):
    net = final("stack", mode="full", cell_norm=cell_norm)
    result = FoldRecurrentBatchnorm().run(net)
    assert difference(net, result.program, data("stack", seed=4)) < 1e-12
    assert all(found == ["input", "hidden"] for found in result.facts["folded"].values())
    assert all(set(why) == {"cell"} for why in result.facts["left"].values())
    for call in calls(result.program):
        assert call.gamma_ih is None
        assert call.gamma_hh is None
        assert call.gamma_c is not None
        assert (call.beta_c is None) == (call.mean_c is None) == (cell_norm == "scalar")
    extra = {key.rpartition("_l")[0] for key in result.program.state_dict() if key not in program("stack").state_dict()}
    parts = ("gamma_c", "running_var_c") + (("beta_c", "running_mean_c") if cell_norm == "channel" else ())
    assert extra == {f"layer.{part}" for part in parts}


def test_a_program_without_training_graph_folds_and_one_that_runs_a_layer_twice():
    net = final("twice", mode="full")
    assert len(find_layers(net)) == 1
    assert len(calls(net)) == 2
    assert difference(net, FoldRecurrentBatchnorm().run(net).program, data("twice", seed=6)) < 1e-12
    made = BatchnormRecurrent(mode="full", statistics="shared", data=data("gru")).run(program("gru")).program
    del made.module().graphs["train"]  # evaluation alone
    result = FoldRecurrentBatchnorm().run(made)
    assert result.facts["folded"] == {"layer.l0": ["input", "hidden"]}
    assert difference(made, result.program, data("gru")) < 1e-12
    assert "layer.seen_l0" not in result.program.state_dict()


def test_a_weight_that_is_read_elsewhere_stays():
    class Shared(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.GRU(3, 3, batch_first=True)

        def forward(self, x):
            return self.layer(x)[0] + self.layer.weight_ih_l0.sum()

    x = data("lstm")[0]
    net = kfe_fx.capture(Shared().double(), x)
    made = FinaliseRecurrent().run(BatchnormRecurrent(data=x, mode="full").run(net).program).program
    result = FoldRecurrentBatchnorm().run(made)
    assert result.facts["folded"] == {"layer.l0": ["hidden"]}
    assert "is read by" in result.facts["left"]["layer.l0"]["input"]
    assert difference(net, result.program, (x,)) < 1e-12


def test_gates_ride_along():
    """Folded on the fly and folded for good agree where units are gated inside the recurrence."""
    net = final("lstm", mode="full", cell_norm="scalar")
    call = find_layers(net)[0].tensors(net)
    folded = FoldRecurrentBatchnorm().run(net).program
    other = find_layers(folded)[0].tensors(folded)
    gate = torch.rand(6, 5, generator=torch.Generator().manual_seed(0)).double()
    outputs = []
    for each in (call, other):
        args, options = replace(each, input=data("lstm")[0] @ torch.ones(3, 4).double(), gate=gate).call()
        outputs.append(torch.ops.kfe_fx.recurrent(*args, **options)[0])
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
