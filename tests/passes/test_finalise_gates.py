"""Finalising hard concrete gates: the function stays, closed units go, and what they send goes into biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import kfe_fx
from kfe_fx.errors import UsageError
from kfe_fx.frontend.capture import capture
from kfe_fx.hard_concrete import Learned, gate_at_test, learned
from kfe_fx.labels.analysis import analyze
from kfe_fx.labels.oracle import run_masked
from kfe_fx.passes.base import PassResult
from kfe_fx.passes.batchnorm_recurrent import BatchnormRecurrent
from kfe_fx.passes.finalise_gates import FinaliseGates
from kfe_fx.passes.insert_gates import InsertGates
from kfe_fx.passes.pipeline import Pipeline
from kfe_fx.program import Program
from kfe_fx.structure import pack
from tests.criteria.nets import build, program_of
from tests.labels.test_masked_equals_shrunk import PARTS, inputs_of
from tests.passes.recurrent_nets import INPUTS, NETS
from tests.random_nets import Case, nets, sample_net

FOLDED, REMOVED = 1e-12, 1e-11  # float64, of outputs of size 1
CLOSED, OPEN = -4.0, 4.0


def gated(program: Program, seed: int, values: tuple[float, ...] = (CLOSED, -1.0, 0.0, 1.0, OPEN)) -> Program:
    """Gate a network, each gate closed, open or in between."""
    result = InsertGates(mode="hard_concrete").run(program)
    generator = torch.Generator().manual_seed(seed)
    for held in learned(result.program).values():
        drawn = torch.tensor(values, dtype=held.dtype)[torch.randint(len(values), held.shape, generator=generator)]
        held.data.copy_(drawn)
    return result.program


def close(program: Program, **units: list[int]) -> Program:
    """Gate a network with open gates but for ``units`` of the groups named (dots as underscores)."""
    found = gated(program, 0, (OPEN,))
    gates = Learned.of(found)
    for group, value in gates.log_alpha.items():
        value.data[units.get(gates.analysis.groups[group].name.replace(".", "_"), [])] = CLOSED
    return found


def assert_same(one: Program, other: Program, flat: list[Any], tolerance: float) -> None:
    with torch.no_grad():
        pairs = zip(one.module().run_flat(flat), other.module().run_flat(flat), strict=True)
        for wanted, found in pairs:
            assert wanted.shape == found.shape
            scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
            assert float((wanted - found).abs().max()) <= tolerance * scale


def size(program: Program) -> int:
    return sum(value.numel() for value in program.module().parameters())


def assert_plain(program: Program) -> None:
    assert not [name for name, _ in program.module().named_parameters() if name.startswith("kfe_gates")]
    assert all("kfe_fx.gate" not in str(node.target) for graph in program.graphs.values() for node in graph.nodes)
    assert not program.extras.get("sections")


# random networks -------------------------------------------------------------------------------------------------


def check(case: Case, seed: int) -> PassResult:
    """T8.5: folded within rounding; without the closed units within rounding; and these are gone."""
    program = capture(case.module, case.inputs, case.dynamic_axes())
    found = gated(program, seed)
    before = found.hash(), {name: value.clone() for name, value in found.state_dict().items()}
    folded, result = FinaliseGates(remove=False).run(found), FinaliseGates().run(found)
    for batch in (2, 5):
        flat = inputs_of(found, batch, seed)
        assert_same(found, folded.program, flat, FOLDED)
        assert_same(found, result.program, flat, REMOVED)
    facts = result.facts
    assert facts["keeps"] == "exact"
    assert facts["zero"] == sum(int((gate_at_test(value) == 0).sum()) for value in learned(found).values())
    assert facts["zero"] == facts["removed"] + sum(one["units"] for one in facts["stays"])
    assert folded.facts["removed"] == 0
    assert (size(result.program) < size(folded.program)) == (facts["removed"] > 0)
    assert_plain(folded.program)
    assert_plain(result.program)
    assert found.hash() == before[0]
    assert all(torch.equal(value, before[1][name]) for name, value in found.state_dict().items())
    return result


@given(case=nets(max_blocks=3))
@settings(max_examples=15)
def test_all_families(case: Case) -> None:
    check(case, case.description["seed"])


@given(case=nets(max_blocks=3, families=PARTS["attention"]))
@settings(max_examples=12)
def test_attention(case: Case) -> None:
    check(case, case.description["seed"])


@given(case=nets(max_blocks=3, families=PARTS["convolution"]))
@settings(max_examples=12)
def test_convolutions(case: Case) -> None:
    check(case, case.description["seed"])


@given(case=nets(max_blocks=3, families=PARTS["movement"]))
@settings(max_examples=12)
def test_data_movement(case: Case) -> None:
    check(case, case.description["seed"])


@given(case=nets(max_blocks=3, families=PARTS["recurrence"]))
@settings(max_examples=10)
def test_recurrence(case: Case) -> None:
    check(case, case.description["seed"])


def test_most_gates_fold_and_most_closed_units_go():
    """Else all of the above could hold of a pass that does nothing."""
    totals = dict.fromkeys(("zero", "removed", "folded", "explicit"), 0)
    for seed in range(8):
        facts = check(sample_net(seed), seed).facts
        totals["zero"] += facts["zero"]
        totals["removed"] += facts["removed"]
        totals["folded"] += len(facts["folded"])
        totals["explicit"] += len(facts["explicit"])
    assert totals["removed"] >= 0.9 * totals["zero"] >= 50
    # the others are single steps of cells, outputs of recurrent layers, and weights that are tied or computed
    assert totals["folded"] >= 3 * totals["explicit"] > 0


@pytest.mark.thorough
@pytest.mark.parametrize("chunk", range(20))
def test_hundreds(chunk: int) -> None:
    for seed in range(30 * chunk, 30 * (chunk + 1)):
        check(sample_net(seed), seed)


# against masks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["outer", "inner", "plain", "windows"])
def test_gates_that_are_open_or_closed_are_masks(name: str):
    """The oracle of the labels knows no gate."""
    program, x = program_of(name)
    found = gated(program, 5, (CLOSED, OPEN))
    gates = Learned.of(found)
    closed = {unit for unit, value in gates.at_test().items() if value == 0}
    analysis = analyze(program)
    assert closed
    with torch.no_grad():
        expected = run_masked(analysis, closed, [x])
        small = FinaliseGates().run(found).program
        torch.testing.assert_close(small.module().run_flat([x]), expected, rtol=0, atol=1e-12)


# recurrent layers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NETS if name not in ("twice", "started")])
def test_recurrent_layers(name: str):
    torch.manual_seed(0)
    x = torch.randn(3, 5, INPUTS).double()
    args = (x, torch.tensor([5, 3, 2])) if name == "packed" else (x,)
    found = gated(capture(NETS[name]().double(), args), 3)
    result = FinaliseGates().run(found)
    assert_same(found, FinaliseGates(remove=False).run(found).program, list(args), FOLDED)
    assert_same(found, result.program, list(args), REMOVED)
    assert result.facts["removed"] == result.facts["zero"] > 0
    # the projection takes all of it, otherwise what leaves the layer is multiplied
    assert bool(result.facts["explicit"]) == (name != "projection")


@pytest.mark.parametrize("mode", ["input", "full"])
def test_batch_normalised_recurrent_layers(mode: str):
    torch.manual_seed(0)
    program = capture(NETS["lstm"]().double(), torch.randn(6, 7, INPUTS).double())
    x = torch.randn(6, 7, INPUTS).double()
    normal = BatchnormRecurrent(data=[x], mode=mode).run(program).program
    found = gated(normal, 3)
    result = FinaliseGates().run(found)
    assert result.facts["removed"] == result.facts["zero"] > 0
    assert_same(found, result.program, [x], REMOVED)


class Encoder(nn.Module):
    """The last cell state is read too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.LSTM(INPUTS, 6, batch_first=True), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        _, (h, c) = self.layer(x)
        return self.out(torch.cat([h[0], c[0]], 1))


def test_the_last_cell_state_is_gated_with_the_output():
    torch.manual_seed(0)
    x = torch.randn(3, 5, INPUTS).double()
    found = close(capture(Encoder().double(), x), layer_weight_ih_l0=[0, 4])
    result = FinaliseGates().run(found)
    assert result.facts["removed"] == 2
    assert_same(found, result.program, [x], REMOVED)
    assert result.program.tensor("out.weight").shape == (2, 8)
    # all that is left is open, so that nothing is multiplied any more
    assert not [node for node in result.program.graphs["eval"].nodes if "mul" in str(node.target)]


# where gates fold -----------------------------------------------------------------------------------------------


def folding(net: nn.Module, x: Tensor, seed: int = 0) -> tuple[Program, PassResult]:
    found = gated(capture(net.double().eval(), x), seed, (-1.0, 0.0, 1.0))
    result = FinaliseGates().run(found)
    assert_same(found, result.program, [x], FOLDED)
    return found, result


def test_transposed_and_grouped_convolutions_take_their_gates():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv1d(2, 6, 3), nn.ReLU(), nn.ConvTranspose1d(6, 4, 3, groups=2), nn.ReLU(), nn.Conv1d(4, 6, 1, groups=2),
        nn.ReLU(), nn.Conv1d(6, 2, 1),
    )  # fmt: skip
    found, result = folding(net, torch.randn(3, 2, 7).double())
    assert result.facts["explicit"] == []
    assert len(learned(found)) >= 3
    assert result.program.hash() == capture(net, torch.randn(3, 2, 7).double()).hash()


def test_norms_take_gates_behind_them():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.GroupNorm(4, 4), nn.ReLU(),
        nn.Conv2d(4, 6, 1), nn.InstanceNorm2d(6, affine=True), nn.Flatten(), nn.Linear(54, 2),
    )  # fmt: skip
    conv = net.get_parameter("0.weight").detach().double().clone()
    _, result = folding(net, torch.randn(3, 2, 5, 5).double())
    assert result.facts["explicit"] == []
    assert result.facts["folded"] == ["batch_norm", "group_norm", "instance_norm"]
    assert torch.equal(result.program.tensor("0.weight"), conv)  # what a norm undoes stays as it is


def test_a_norm_without_affine_parameters_is_multiplied():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6, affine=False), nn.ReLU(), nn.Conv2d(6, 2, 3))
    _, result = folding(net, torch.randn(3, 2, 5, 5).double())
    assert result.facts["explicit"] == ["batch_norm"]
    assert result.program.tensor("kfe_gates.multiplier_0").shape == (6, 1, 1)


class Tied(nn.Module):
    """One weight that makes gated units, and something else."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5, bias=False), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.tanh(self.first(x))
        return self.last(y), y @ self.first.weight


def test_a_weight_with_another_reader_is_left_alone():
    torch.manual_seed(0)
    net = Tied()
    weight = net.first.weight.detach().double().clone()
    _, result = folding(net, torch.randn(3, 4).double())
    assert result.facts["explicit"] == ["linear"]
    assert torch.equal(result.program.tensor("first.weight"), weight)


class Twice(nn.Module):
    """One layer that runs twice, gated alike."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.inner, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.inputs(x))
        return self.last(torch.tanh(self.inner(torch.tanh(self.inner(y)))) + y)


def test_a_weight_that_is_used_twice_alike_is_scaled_once():
    torch.manual_seed(0)
    net = Twice()
    weight = net.inner.weight.detach().double().clone()
    found, result = folding(net, torch.randn(3, 4).double())
    assert result.facts["explicit"] == []
    zhat = gate_at_test(learned(found)[0]).detach()
    torch.testing.assert_close(result.program.tensor("inner.weight"), weight * zhat[:, None], rtol=1e-14, atol=0)


def test_the_training_graph_is_folded_too():
    program, x = program_of("residual")
    found = gated(program, 2)
    result = FinaliseGates(remove=False).run(found)
    assert set(result.program.graphs) == {"eval", "train"}
    expected = found.copy()
    for node in expected.graphs["train"].nodes:  # with test gates in training
        if "hard_concrete" in str(node.target):
            node.args = (node.args[0], False)
    expected.module().recompile()
    with torch.no_grad():
        wanted, got = (one.copy().module().run_flat([x], "train")[0] for one in (expected, result.program))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


# what closed units still send ------------------------------------------------------------------------------------


def convolutional(
    kernel: int, *, bias: bool = True, norm: bool = False, activation: nn.Module | None = None
) -> Program:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.Sigmoid() if activation is None else activation,
        nn.Conv2d(6, 4, kernel, padding=kernel // 2, bias=bias),
        *([nn.BatchNorm2d(4)] if norm else []),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(100, 2),
    )
    return capture(net.double().eval(), torch.randn(3, 2, 5, 5).double())


@pytest.mark.parametrize(("bias", "norm"), [(True, False), (True, True), (False, True)])
def test_a_constant_goes_into_the_bias_or_the_running_mean(bias: bool, norm: bool):
    """sigmoid(0) is 1/2; a kernel of one position sees it the same everywhere."""
    found = close(convolutional(1, bias=bias, norm=norm), **{"0": [1, 3]})
    x = torch.randn(3, 2, 5, 5).double()
    result = FinaliseGates().run(found)
    assert result.facts["stays"] == []
    assert result.facts["removed"] == 2
    assert_same(found, result.program, [x], REMOVED)
    held = "2.bias" if bias else "3.running_mean"
    sent = 0.5 * found.tensor("2.weight")[:, [1, 3], 0, 0].sum(1) * (1 if bias else -1)
    torch.testing.assert_close(result.program.tensor(held), found.tensor(held) + sent, rtol=0, atol=1e-13)


def test_a_constant_that_nothing_can_take_keeps_its_unit():
    found = close(convolutional(1, bias=False), **{"0": [1, 3]})
    result = FinaliseGates().run(found)
    assert result.facts["removed"] == 0
    (stays,) = result.facts["stays"]
    assert stays == {"group": "0", "units": 2, "why": "aten.conv2d at 2 reads what it sends, which is not zero"}
    assert_same(found, result.program, [torch.randn(3, 2, 5, 5).double()], REMOVED)


def test_behind_zero_padding_a_constant_is_not_the_same_at_the_border():
    found = close(convolutional(3), **{"0": [1, 3]})
    x = torch.randn(3, 2, 5, 5).double()
    result = FinaliseGates().run(found)
    assert result.facts["removed"] == 0
    assert_same(found, result.program, [x], REMOVED)
    inexact = FinaliseGates(inexact=True).run(found)
    assert inexact.facts["removed"] == 2
    assert inexact.facts["keeps"] == "trained"
    with torch.no_grad():
        conv = [one.graphs["eval"].find_nodes(op="call_function", target=torch.ops.aten.conv2d.default) for one in
                (found, inexact.program)]  # fmt: skip
        assert [len(nodes) for nodes in conv] == [2, 2]
    # the mean over positions of what the two channels sent, 1/2 each
    kernel = found.tensor("2.weight").detach()[:, [1, 3]]
    sent = torch.nn.functional.conv2d(torch.full((1, 2, 5, 5), 0.5).double(), kernel, padding=1).mean((0, 2, 3))
    shifted = inexact.program.tensor("2.bias") - found.tensor("2.bias")
    torch.testing.assert_close(shifted.detach(), sent, rtol=0, atol=1e-13)
    # and one that sends nothing goes as it is
    silent = FinaliseGates().run(close(convolutional(3, activation=nn.Tanh()), **{"0": [1, 3]}))
    assert silent.facts["removed"] == 2
    assert silent.facts["stays"] == []


def test_a_norm_over_units_keeps_them():
    program, x = program_of("attention")
    found = close(program, embed=[0, 1], up=[2, 3, 4], qkv=[1])
    result = FinaliseGates().run(found)
    assert {one["name"]: one["removed"] for one in result.facts["groups"]} == {"embed": 0, "up": 3, "qkv": 1}
    assert [one["why"] for one in result.facts["stays"]] == ["aten.layer_norm at norm takes a statistic over it"]
    assert_same(found, result.program, [x], REMOVED)
    assert result.program.tensor("up.weight").shape == (13, 8)
    all_of_it = FinaliseGates(inexact=True).run(found)
    assert all_of_it.facts["removed"] == 6
    assert all_of_it.program.tensor("up.weight").shape == (13, 6)


def test_one_unit_of_each_dim_stays():
    torch.manual_seed(0)
    program = capture(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)).double(), torch.randn(2, 2).double())
    found = close(program, **{"0": [0, 1, 2, 3]})
    learned(found)[0].data[2] = -3.0  # the one that is wanted most
    result = FinaliseGates().run(found)
    assert result.facts["removed"] == 3
    assert result.facts["stays"] == [{"group": "0", "units": 1, "why": "is the last one of its dim"}]
    assert_same(found, result.program, [torch.randn(3, 2).double()], REMOVED)
    assert torch.equal(result.program.tensor("2.weight"), program.tensor("2.weight")[:, 2:3])


# statistics, files, ONNX ------------------------------------------------------------------------------------------


def test_statistics_are_measured_again_where_there_is_data():
    """X10: what a second norm sees changes with the gates of the first."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
    )
    x = torch.randn(64, 3).double()
    found = close(capture(net.double(), x[:2]), **{"0": [0, 5]})
    plain, fresh = FinaliseGates().run(found), FinaliseGates(data=x, batch_size=64).run(found)
    assert plain.facts["keeps"] == "exact"
    assert fresh.facts["keeps"] == "trained"
    assert fresh.facts["statistics"] == {"norms": 2, "batches": 1}
    small = fresh.program
    with torch.no_grad():
        y = torch.relu(
            torch.nn.functional.batch_norm(
                x @ small.tensor("0.weight").T + small.tensor("0.bias"), None, None, small.tensor("1.weight"),
                small.tensor("1.bias"), training=True,
            )
        )  # fmt: skip
        z = y @ small.tensor("3.weight").T + small.tensor("3.bias")
    torch.testing.assert_close(small.tensor("4.running_mean"), z.mean(0), rtol=0, atol=1e-12)
    assert (plain.program.tensor("4.running_mean") - z.mean(0)).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["residual", "attention", "lstm", "gru", "stack"])
def test_the_onnx_file_computes_the_same(name: str, tmp_path: Path):
    """In float32: ONNX Runtime has few kernels for more."""
    torch.manual_seed(0)
    if name in ("residual", "attention"):
        module, x = build(name)
    else:
        module, x = NETS[name](), torch.randn(3, 5, INPUTS)
    found = gated(capture(module.float(), x.float()), 3)
    result = FinaliseGates().run(found)
    assert result.facts["removed"]
    kfe_fx.save(result.program, tmp_path / "small.pt")
    again = kfe_fx.load(tmp_path / "small.pt")
    assert_same(result.program, again, [x.float()], 0.0)
    kfe_fx.export(again, tmp_path / "small.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.float().numpy()})
    with torch.no_grad():
        wanted = found(x.float()).numpy()
    assert np.abs(out - wanted).max() <= 1e-5 * max(1.0, np.abs(wanted).max())


def test_it_runs_in_a_pipeline():
    program, x = program_of("outer")
    pipeline = Pipeline.from_text("insert-gates{mode=hard_concrete drop_rate=0.95},finalise-gates{remove=false}")
    result = pipeline.run(program)
    assert result.program.lineage == ("insert-gates", "finalise-gates")
    assert result.facts["finalise-gates"]["zero"] == 6
    structure = program.signature.outputs["eval"]
    with torch.no_grad():
        wanted = pack(
            structure, InsertGates(mode="hard_concrete", drop_rate=0.95).run(program).program.module().run_flat([x])
        )
        assert torch.equal(result.program(x), wanted)


def test_without_gates():
    program, _ = program_of("outer")
    for one in (program, InsertGates().run(program).program):
        with pytest.raises(UsageError, match="no hard concrete gates") as caught:
            FinaliseGates().run(one)
        assert "\n" not in str(caught.value)
    found = gated(program, 0)
    with pytest.raises(UsageError, match="no hard concrete gates"):
        FinaliseGates().run(FinaliseGates().run(found).program)
    residual = gated(program_of("residual")[0], 0)
    with pytest.raises(UsageError, match="yields no batches"):
        FinaliseGates(data=[]).run(residual)
