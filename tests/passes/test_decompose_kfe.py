"""Pass ``decompose-kfe``: what it says is what stands in the file, again and again, and what it refuses."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import numpy_helper, shape_inference
from torch import Tensor, nn

import kfe_fx
from kfe_fx import lowrank, taps
from kfe_fx.cli.main import cli
from kfe_fx.cost.device import Device
from kfe_fx.cost.probes import fingerprint
from kfe_fx.cost.profile import Profile
from kfe_fx.curvature import Store, fit
from kfe_fx.errors import InfeasibleBudget, UsageError
from kfe_fx.frontend.capture import capture
from kfe_fx.lowrank.finding import find_layers
from kfe_fx.passes.capture_curvature import CaptureCurvature
from kfe_fx.passes.decompose_kfe import DecomposeKfe
from kfe_fx.passes.pipeline import Pipeline
from kfe_fx.program import Program
from kfe_fx.runtime.onnx_file import onnx_bytes
from kfe_fx.runtime.parity import parity

# kernels that start at once, in small blocks: else nothing this small is worth three operations
DEVICE = Device(fingerprint(1, "fp32"), Profile(block=4, conv_kernel=1.0, kernel=1.0, call=1.0), step=4)
WIDTH = 24


class Net(nn.Module):
    """Three convolutions, one with a norm behind it, one depthwise, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(4, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH)
        self.body = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.depthwise = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.down = nn.Conv2d(WIDTH, 16, 3, stride=2, padding=2, dilation=2)
        self.hidden, self.head = nn.Linear(16, 20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.tanh(self.depthwise(torch.tanh(self.body(x))))
        return self.head(torch.relu(self.hidden(self.down(x).mean((2, 3)))))


def made(dtype: torch.dtype = torch.float64) -> tuple[Program, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.randn(24, 4, 10, 10, dtype=dtype)
        return capture(Net().to(dtype).eval(), x[:2]), x


@cache
def known() -> tuple[Program, Tensor, Store]:
    program, x = made()
    return program, x, fit(program, x, statistics="kfac", source="exact", batch_size=24)


def step(**options: Any) -> DecomposeKfe:
    store = known()[2]
    return DecomposeKfe(**{"store": store, "device": DEVICE, **options})


def names(program: Program) -> list[str]:
    return [str(node.target) for node in program.graphs["eval"].nodes if node.op == "call_function"]


# facts ---------------------------------------------------------------------------------------------------------------


def in_file(model: bytes) -> dict[str, tuple[int, int]]:
    """Return by name of a weight in an ONNX file how many numbers it has and how many multiplications it makes."""
    graph = shape_inference.infer_shapes(onnx.load_from_string(model), data_prop=True).graph
    weights = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    shapes = {
        value.name: [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]
        for value in [*graph.value_info, *graph.output, *graph.input]
    }
    found = {}
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        weight = weights[node.input[1]]
        out = shapes[node.output[0]]
        positions = int(np.prod(out[2:])) if node.op_type == "Conv" else 1
        found[node.input[1]] = weight.size, weight.size * positions
    return found


@pytest.mark.parametrize("options", [{"ratio": 0.5}, {"importance": 0.1}, {"time": 0.7}])
def test_facts_are_what_stands_in_the_file(options: dict[str, float], tmp_path: Path) -> None:
    """T3.6, in float32: sizes of initialisers and shapes of nodes, as ONNX's own inference knows them."""
    program, x = made(torch.float32)
    result = DecomposeKfe(data=(x, None), device=DEVICE, source="sampled", **options).run(program)
    assert result.modified
    layers = result.facts["layers"]
    assert layers
    before, after = (in_file(onnx_bytes(each)) for each in (program, result.program))
    found = {layer.name: layer for layer in find_layers(result.program).layers}
    for name, told in layers.items():
        ops = [op.weight for op in found[name].ops]
        assert told["weights"] == [before[f"{name}.weight"][0], sum(after[op][0] for op in ops)]
        assert told["macs"] == [before[f"{name}.weight"][1], sum(after[op][1] for op in ops)]
        assert told["operations"] == [result.program.tensor(op).shape[0] for op in ops]
        assert told["weights"][1] < told["weights"][0]
        assert told["predicted_ms"][1] < told["predicted_ms"][0]
        assert all(rank % 4 == 0 or rank == full for rank, full in zip(told["ranks"], told["of"], strict=True))
    counts = [sum(value.numel() for value in each.module().parameters()) for each in (program, result.program)]
    assert result.facts["parameters"] == counts
    report = parity(result.program, onnx_bytes(result.program))
    assert report.ok, report
    json.dumps(result.facts)


def test_every_layer_is_told_of() -> None:
    result = step(ratio=0.3).run(known()[0])
    told = result.facts["layers"].keys() | result.facts["left"].keys()
    assert told == {"stem", "body", "depthwise", "down", "hidden", "head"}
    assert result.facts["left"]["depthwise"].startswith(f"it has {WIDTH} groups")
    assert result.facts["left"]["head"] == "it makes the outputs; last=true decomposes it too"
    assert result.program.lineage[-1] == "decompose-kfe"


def test_the_least_importance_goes_for_the_time_that_was_asked_for() -> None:
    program, _, _ = known()
    losses = []
    for time in (0.9, 0.8, 0.7):
        facts = step(time=time).run(program).facts
        whole, left = facts["predicted_ms"]
        assert left <= time * whole * (1 + 1e-9)
        losses.append(facts["loss"])
    assert losses == sorted(losses)
    with pytest.raises(InfeasibleBudget, match=r"decompositions alone reach time=0\.\d+ as predicted, not 0\.010"):
        step(time=0.01).run(program)


def test_losses_are_measured_where_there_are_examples() -> None:
    program, x, store = known()
    options: dict[str, Any] = {"ratio": 0.4, "metric": "params", "store": store, "source": "exact", "layers": "body"}
    losses = {
        predict: DecomposeKfe(data=x, predict=predict, **options).run(program).facts["loss"]
        for predict in (None, "fisher", "importances")
    }
    assert losses[None] == losses["fisher"] != losses["importances"]
    assert losses["importances"] == DecomposeKfe(**options).run(program).facts["loss"]
    with pytest.raises(UsageError, match="there are no examples to measure on"):
        DecomposeKfe(predict="fisher", **options).run(program)


def test_a_device_on_which_nothing_is_faster_leaves_everything() -> None:
    program, _, _ = known()
    slow = Device(DEVICE.fingerprint, Profile(block=4, conv_kernel=1e7, kernel=1e7), step=4)
    result = step(ratio=0.5, device=slow).run(program)
    assert not result.modified
    assert result.program is program
    assert "it would not be faster" in result.facts["left"]["body"]
    assert "ms predicted, now" in result.facts["left"]["body"]


# rounds --------------------------------------------------------------------------------------------------------------


def test_rounds_keep_three_operations_and_multiply_into_the_outer_ones(tmp_path: Path) -> None:
    """T3.4, with a file between the rounds; a round that keeps everything changes nothing."""
    program, x, _ = known()
    options: dict[str, Any] = {"data": (x, None), "metric": "none", "source": "exact", "batch_size": 24}
    operations, last = [], (WIDTH, WIDTH)
    for turn in range(3):
        result = DecomposeKfe(ratio=0.3, step=4, layers="body", **options).run(program)
        assert result.facts["layers"].keys() == {"body"}
        kfe_fx.save(result.program, tmp_path / f"{turn}.pt")
        program = kfe_fx.load(tmp_path / f"{turn}.pt")
        layer = next(each for each in find_layers(program).layers if each.name == "body")
        assert [op.weight for op in layer.ops] == ["body.0.weight", "body.1.weight", "body.2.weight"]
        operations.append(names(program))
        widths = layer.columns, layer.rows
        assert widths[0] <= last[0]
        assert widths[1] <= last[1]
        assert widths != last
        last = widths
    assert operations[0] == operations[1] == operations[2]
    held = fit(program, x, statistics="kfac", source="exact", batch_size=24)
    same = lowrank.apply(program, held, {"body": last}, whole=True)
    with torch.no_grad():
        assert float((same(x) - program(x)).abs().max()) <= 1e-12
    assert {name: tuple(value.shape) for name, value in same.state_dict().items()} == {
        name: tuple(value.shape) for name, value in program.state_dict().items()
    }


def test_a_pair_stays_a_pair() -> None:
    program, x, _ = known()
    for _ in range(2):
        options: dict[str, Any] = {"layers": "hidden", "metric": "none", "cap": 0.9, "step": 1}
        result = DecomposeKfe(data=x, importance=0.2, **options).run(program)
        program = result.program
        assert result.facts["layers"]["hidden"]["operations"][1] == 20
        assert [name for name in program.state_dict() if name.startswith("hidden")] == [
            "hidden.0.weight", "hidden.1.weight", "hidden.1.bias",
        ]  # fmt: skip


# what comes before and behind ----------------------------------------------------------------------------------------


def test_new_widths_are_units_that_prune_cuts_further() -> None:
    program, x, _ = known()
    result = step(ratio=0.4, metric="params", step=4).run(program)
    assert {"body", "down"} <= result.facts["layers"].keys()
    analysis = kfe_fx.analyze(result.program)
    for name in result.facts["layers"]:
        for place in range(len(find_named(result.program, name).ops) - 1):
            assert all(len(layer) for layer in analysis.params[f"{name}.{place}.weight"][0])
    pruned = kfe_fx.prune(result.program, budget=0.7, metric="macs", data=(x, torch.zeros(len(x)).long()), epochs=0)
    assert pruned.program.tensor("body.0.weight").shape[0] < result.program.tensor("body.0.weight").shape[0]
    assert pruned.certificate.rounds
    assert pruned.certificate.masked_error <= 1e-12


def find_named(program: Program, name: str) -> Any:
    return next(layer for layer in find_layers(program).layers if layer.name == name)


def test_training_moves_the_factors_in_the_training_graph() -> None:
    program, x, store = known()
    small = lowrank.apply(program, store, {"body": (12, 8)}).train()
    small(x).square().mean().backward()
    for name in ("body.0.weight", "body.1.weight", "body.2.weight", "body.2.bias"):
        grad = small.tensor(name).grad
        assert grad is not None
        assert float(grad.abs().max()) > 0


def test_taps_are_set_again_where_there_were_some() -> None:
    program, _, _ = known()
    tapped = CaptureCurvature().run(program).program
    small = step(ratio=0.4, metric="params", step=4).run(tapped).program
    plain = step(ratio=0.4, metric="params", step=4).run(program).program
    assert all(taps.tapped(graph) for graph in small.graphs.values())
    assert small.hash() == CaptureCurvature().run(plain).program.hash()


def test_it_runs_from_the_command_line_on_the_calibration_of_a_file(tmp_path: Path) -> None:
    program, x = made(torch.float32)
    program.extras["calibration"] = (x, None)
    kfe_fx.save(program, tmp_path / "net.pt", calibration=(x, torch.zeros(len(x)).long()))
    text = "decompose-kfe{layers=body importance=0.3 statistics=moments metric=params step=4}"
    assert Pipeline.from_text(text).to_text() == text
    arguments = ["rewrite", str(tmp_path / "net.pt"), text, "-o", str(tmp_path / "small.pt"), "--json"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    facts = json.loads(result.output)["facts"]["decompose-kfe"]
    assert list(facts["layers"]) == ["body"]
    assert kfe_fx.load(tmp_path / "small.pt").tensor("body.1.weight").shape[1] == facts["layers"]["body"]["ranks"][0]


# what it refuses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "give one of ratio, importance and time, such as decompose-kfe{ratio=0.5}"),
        ({"ratio": 0.5, "time": 0.5}, "give one of ratio, importance and time, not ratio and time"),
        ({"ratio": 1.0}, "ratio is between 0 and 1, got 1"),
        ({"ratio": float("nan")}, "ratio is between 0 and 1, got nan"),
        ({"importance": -0.1}, "importance is between 0 and 1, got -0.1"),
        ({"time": 2.0}, "time is between 0 and 1, got 2"),
        ({"ratio": 0.5, "cap": 1.5}, "cap is between 0 and 1, got 1.5"),
        ({"ratio": 0.5, "metric": "speed"}, "metric is one of latency, macs, params, none, got 'speed'"),
        ({"time": 0.5, "metric": "macs"}, "time is predicted with metric=latency, got metric=macs"),
        ({"ratio": 0.5, "step": 0}, "step is a number from 1, got 0"),
        ({"ratio": 0.5, "threads": 0}, "threads is a number from 1, got 0"),
        ({"ratio": 0.5, "predict": "x"}, "predict is fisher or importances, got 'x'"),
        ({"ratio": 0.5, "statistics": "sum"}, "statistics is product or moments, got 'sum'"),
        ({"ratio": 0.5, "layers": "stages.*"}, "layers='stages.*' matches no layer with weights"),
    ],
)
def test_what_means_nothing_is_one_line(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        step(**options).run(known()[0])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_examples_and_statistics_of_other_networks_are_refused() -> None:
    program, _, store = known()
    with pytest.raises(UsageError, match="decompose-kfe: there are no examples to measure on; give data, or a store"):
        DecomposeKfe(ratio=0.5).run(program)
    with pytest.raises(UsageError, match="of another network"):
        DecomposeKfe(ratio=0.5, store=store).run(capture(nn.Linear(3, 3), torch.randn(2, 3)))
    trained = program.copy()
    with torch.no_grad():
        trained.tensor("body.weight").add_(0.1)
    with pytest.raises(UsageError, match="older than the weights"):
        DecomposeKfe(ratio=0.5, store=store).run(trained)


def test_a_store_without_some_layers_leaves_these() -> None:
    program, x, _ = known()
    held = lowrank.measure(program, x, [find_named(program, "body")], source="sampled")
    result = DecomposeKfe(ratio=0.4, metric="params", store=held).run(program)
    assert list(result.facts["layers"]) == ["body"]
    assert "hold no Kronecker factors of down.weight" in result.facts["left"]["down"]
    moments = DecomposeKfe(ratio=0.4, metric="params", store=held, statistics="moments").run(program)
    assert not moments.modified
    assert "fit 'ekfac', or take statistics=product" in moments.facts["left"]["body"]
