"""Opened layers: the same values and gradients, statistics moved once, and closed again node for node."""

from __future__ import annotations

import operator
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import kfe_fx
from kfe_fx import taps
from kfe_fx.curvature import blocks
from kfe_fx.labels.analysis import analyze
from kfe_fx.passes.capture_curvature import CaptureCurvature
from kfe_fx.passes.insert_gates import InsertGates
from kfe_fx.passes.shrink import Shrink
from kfe_fx.passes.strip_curvature import StripCurvature
from kfe_fx.passes.strip_gates import StripGates
from kfe_fx.plan import Plan
from kfe_fx.program import Program, graph_text
from kfe_fx.recurrent.op import CELLS, RECURRENT, Arguments
from kfe_fx.recurrent.opened import OPENED, PRODUCT, STATES, close_layers, is_opened, open_layers
from kfe_fx.shapes import propagate
from tests.recurrent.oracle import slow

BATCH, STEPS, INPUTS, HIDDEN = 3, 4, 2, 4
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def made_call(cell: str = "lstm", *, seed: int = 0, **chosen: Any) -> Arguments:
    """Draw the tensors of a call; flags say which of the optional ones there are."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows, width = CELLS[cell] * HIDDEN, 3 if chosen.get("projected") and cell == "lstm" else HIDDEN
    first, lstm = bool(chosen.get("first")), cell == "lstm"
    bias = chosen.get("bias", True)
    batch_first = chosen.get("batch_first", True)
    values: dict[str, Any] = {
        "input": draw(BATCH, STEPS, INPUTS) if batch_first else draw(STEPS, BATCH, INPUTS),
        "h0": draw(BATCH, width) if first else None,
        "c0": draw(BATCH, HIDDEN) if first and lstm else None,
        "weight_ih": draw(rows, INPUTS),
        "weight_hh": 0.5 * draw(rows, width),
        "bias_ih": draw(rows) if bias else None,
        "bias_hh": draw(rows) if bias else None,
        "weight_hr": draw(width, HIDDEN) if width != HIDDEN else None,
        "lengths": torch.tensor([2, 4, 1]) if chosen.get("lengths") else None,
        "gate": draw(BATCH, width) if chosen.get("gated") else None,
        "cell_gate": draw(BATCH, HIDDEN) if chosen.get("gated") else None,
    }
    sizes = {"ih": rows, "hh": rows, "c": HIDDEN}
    for side in chosen.get("sides", ()):
        if side == "c" and not lstm:
            continue
        count = 1 if chosen.get("shared") else 3
        values[f"gamma_{side}"] = draw(sizes[side]) + 1
        values[f"mean_{side}"] = 0.1 * draw(count, sizes[side])
        values[f"var_{side}"] = draw(count, sizes[side]).square() + 0.3
        values["seen"] = torch.ones(count, dtype=torch.float64)
    if values.get("gamma_c") is not None:
        values["beta_c"] = draw(HIDDEN)
    options = {"reverse": bool(chosen.get("reverse")), "batch_first": batch_first}
    options |= {"training": bool(chosen.get("training")), "shared": bool(chosen.get("shared"))}
    return Arguments(cell=cell, **values, **options)


def tensors(call: Arguments) -> dict[str, Tensor]:
    return {field.name: value for field in fields(call) if isinstance(value := getattr(call, field.name), Tensor)}


def graph_of(call: Arguments) -> fx.Graph:
    """Write a graph of one layer, all of whose tensors are inputs."""
    graph = fx.Graph()
    nodes = {name: graph.placeholder(name) for name in tensors(call)}
    args, options = replace(call, **nodes).call()
    node = graph.call_function(RECURRENT, args, options, name="layer")
    outputs = 3 if call.cell == "lstm" else 2
    graph.output(tuple(graph.call_function(operator.getitem, (node, place)) for place in range(outputs)))
    return graph


def results(graph: fx.Graph, values: dict[str, Tensor]) -> list[Tensor]:
    """Return outputs and the gradients by everything that has one."""
    held = {name: value.clone().requires_grad_(value.is_floating_point()) for name, value in values.items()}
    running = [name for name in held if name.startswith(("mean_", "var_", "seen"))]
    held |= {name: values[name] for name in running}  # what training moves
    outs = fx.GraphModule(nn.Module(), graph)(*held.values())
    return [*outs, *gradients(outs, [value for value in held.values() if value.requires_grad])]


def gradients(outs: Any, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    total = sum((out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum() for out in outs)
    return torch.autograd.grad(total, leaves)


def check_equal(call: Arguments) -> None:
    """Compare closed, opened and the loop over sequences; in training also the running statistics."""
    graph, values = graph_of(call), tensors(call)
    text = str(graph)
    closed, moved = ({name: value.clone() for name, value in values.items()} for _ in range(2))
    expected = results(graph, closed)
    assert open_layers(graph) == 1
    found = results(graph, moved)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **TIGHT)
    for name in values:
        torch.testing.assert_close(moved[name], closed[name], **TIGHT)
    leaves = {name: value.clone().requires_grad_() for name, value in values.items() if value.is_floating_point()}
    leaves = {name: value for name, value in leaves.items() if not name.startswith(("mean_", "var_", "seen"))}
    truth = slow(replace(call, **leaves))
    outs = [truth.output, truth.h_n, truth.c_n][: len(found) - len(leaves)]
    for one, other in zip(found, [*outs, *gradients(outs, list(leaves.values()))], strict=True):
        torch.testing.assert_close(one, other, **TIGHT)
    assert close_layers(graph) == 1
    assert str(graph) == text


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_opened_is_closed(cell: str, reverse: bool, lengths: bool, first: bool) -> None:
    for bias, batch_first in product((True, False), repeat=2):
        check_equal(made_call(cell, reverse=reverse, lengths=lengths, first=first, bias=bias, batch_first=batch_first))
    if cell == "lstm":
        check_equal(made_call(cell, reverse=reverse, lengths=lengths, first=first, projected=True))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sides", [("ih",), ("hh",), ("ih", "hh"), ("c",), ("ih", "hh", "c")], ids="+".join)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_batch_normalised_layers_too(cell: str, sides: tuple[str, ...], training: bool) -> None:
    """Training moves the running statistics once, though the layer runs twice."""
    if cell == "gru" and sides == ("c",):
        sides = ("hh",)
    for lengths, first in product((False, True), repeat=2):
        call = made_call(cell, sides=sides, training=training, lengths=lengths, first=first, reverse=lengths)
        check_equal(call)
    check_equal(made_call(cell, sides=sides, training=training, bias=False, projected=True))
    check_equal(made_call(cell, sides=("ih",), training=training, shared=True))


@settings(max_examples=60)
@given(
    st.sampled_from(sorted(CELLS)),
    st.fixed_dictionaries(
        {
            **{name: st.booleans() for name in ("reverse", "lengths", "first", "bias", "batch_first", "gated")},
            **{name: st.booleans() for name in ("projected", "training", "shared")},
            "sides": st.sampled_from([(), ("ih",), ("hh",), ("ih", "hh"), ("ih", "hh", "c")]),
        }
    ),
)
def test_any_layer(cell: str, chosen: dict[str, Any]) -> None:
    if not chosen["sides"]:
        chosen |= {"training": False, "shared": False}
    check_equal(made_call(cell, **chosen))


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("lengths", [False, True])
def test_the_products_are_those_of_the_states(projected: bool, lengths: bool) -> None:
    """R = W_hh h_{t-1} + b_hh, whose states stand before their steps in the order of the input."""
    call = made_call("lstm", projected=projected, lengths=lengths, first=True, reverse=True)
    before, cells = STATES(*call.call()[0], **call.call()[1])
    output = slow(call).output
    ends = [STEPS] * BATCH if call.lengths is None else call.lengths.tolist()
    for n, end in enumerate(ends):
        for t in range(end):
            expected = call.h0[n] if t == end - 1 else output[n, t + 1]
            torch.testing.assert_close(before[n, t], expected, **TIGHT)
            if projected:
                torch.testing.assert_close(call.weight_hr @ cells[n, t], output[n, t], **TIGHT)
    assert cells.numel() > 0 or not projected


def test_shapes_are_those_of_the_run() -> None:
    net = Network(projected=True)
    program = kfe_fx.capture(net, (net.example,), AXES)
    for graph in program.graphs.values():
        open_layers(graph)
    program.module().recompile()
    fakes = propagate(program, "eval", {"batch": 2, "time": 3})
    seen: dict[str, Any] = {}

    class Runner(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            seen[n.name] = super().run_node(n)
            return seen[n.name]

        def fetch_attr(self, target: str) -> Any:
            return program.tensor(target)

    Runner(program.module(), graph=program.graphs["eval"]).run(net.example[:2, :3])
    for node, fake in fakes.items():
        if isinstance(fake, Tensor):
            assert fake.shape == seen[node.name].shape, node.name


# graphs ---------------------------------------------------------------------------------------------------------------

AXES = {"x": {0: "batch", 1: "time"}}


class Network(nn.Module):
    """Two layers in both directions, the second on the states of the first."""

    def __init__(self, *, projected: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        options: dict[str, Any] = {"batch_first": True, "bidirectional": True, "num_layers": 2}
        self.first = nn.LSTM(3, 4, **options, proj_size=2 if projected else 0)
        self.second = nn.GRU(4 if projected else 8, 4, batch_first=True)
        self.head = nn.Linear(4, 3)
        self.double()
        self.example = torch.randn(4, 5, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.first(x)
        y, h = self.second(y, torch.tanh(y[:, 0, :4]).unsqueeze(0).detach())
        return self.head(y[:, -1] + h[0])


def program_of(**options: Any) -> tuple[Program, Tensor]:
    net = Network(**options)
    return kfe_fx.capture(net, (net.example,), AXES), net.example


def test_closing_restores_every_node() -> None:
    program, _ = program_of(projected=True)
    graph = program.graphs["eval"]
    before = [(node.name, node.target, str(node.args), str(node.kwargs)) for node in graph.nodes]
    assert open_layers(graph) == 5
    assert is_opened(graph)
    assert not graph.find_nodes(op="call_function", target=RECURRENT)
    assert close_layers(graph) == 5
    assert [(node.name, node.target, str(node.args), str(node.kwargs)) for node in graph.nodes] == before
    assert not is_opened(graph)
    assert close_layers(graph) == 0


def test_copies_of_opened_graphs_have_the_same_names() -> None:
    program, _ = program_of()
    once = blocks.opened(program.graphs["eval"])
    again = blocks.opened(once)
    assert [node.name for node in again.nodes] == [node.name for node in once.nodes]
    assert graph_text(again) == graph_text(once)


def test_layers_that_nobody_wants_stay_closed() -> None:
    program, _ = program_of()
    names = [node.name for node in program.graphs["eval"].find_nodes(op="call_function", target=RECURRENT)]
    some = blocks.opened(program.graphs["eval"], {f"{names[1]}_hidden"})
    assert [node.name for node in some.find_nodes(op="call_function", target=OPENED)] == [names[1]]
    assert len(some.find_nodes(op="call_function", target=PRODUCT)) == 2
    assert not is_opened(blocks.opened(program.graphs["eval"], set()))


def test_a_program_with_taps_keeps_its_layers_closed() -> None:
    """Every other pass sees the layer; nobody observes, so that what runs is the kernel, bit for bit."""
    program, x = program_of()
    result = CaptureCurvature().run(program)
    tapped = result.program
    assert result.facts["covered"] == 1.0
    assert len(tapped.graphs["eval"].find_nodes(op="call_function", target=RECURRENT)) == 5
    assert result.facts["taps"] == 7  # outputs of four directions, output and state of a layer, the head
    assert torch.equal(tapped(x), program(x))
    assert StripCurvature().run(tapped).program.hash() == program.hash()
    assert not CaptureCurvature().run(tapped).modified


def test_opened_layers_have_a_form_in_the_file_and_run_closed(tmp_path: Path) -> None:
    program, x = program_of(projected=True)
    twin = program.copy()
    for mode, graph in program.graphs.items():
        twin.graphs[mode] = blocks.opened(graph)
    kfe_fx.save(twin, path=tmp_path / "opened.pt")
    again = kfe_fx.load(tmp_path / "opened.pt")
    assert again.hash() == twin.hash() != program.hash()
    assert torch.equal(again(x), program(x))
    assert StripCurvature().run(again).program.hash() == program.hash()


def test_gates_and_plans_go_into_tapped_layers() -> None:
    """What the other passes do to a tapped program is what they do to the plain one."""
    program, x = program_of(projected=True)
    tapped = CaptureCurvature().run(program).program
    analysis = analyze(program)
    assert [unit.slices for unit in analyze(tapped).units] == [unit.slices for unit in analysis.units]
    gated, other = (InsertGates().run(each).program for each in (program, tapped))
    assert {block.kind for block in blocks.find_blocks(gated).blocks} == {"kronecker"}
    gates = [torch.rand(len(x), len(group.units), dtype=torch.float64) + 0.5 for group in analysis.groups]
    (found,), (expected,) = (each.module().run_flat([x, *gates]) for each in (other, gated))
    assert torch.equal(found, expected)
    assert StripGates().run(other).program.hash() == tapped.hash()
    assert StripCurvature().run(other).program.hash() == gated.hash()
    plan = Plan.of_units(analysis, {group.units[0] for group in analysis.groups if len(group.units) > 1})
    small, with_taps = (Shrink(plan).run(each).program for each in (program, tapped))
    assert torch.equal(with_taps(x), small(x))
    assert StripCurvature().run(with_taps).program.hash() == small.hash()
    assert not CaptureCurvature().run(with_taps).modified


def test_without_gradients_even_who_observes_runs_the_kernel() -> None:
    program, x = program_of()
    seen: list[str] = []

    def observer(value: Tensor, inputs: list[Tensor], site: str) -> Tensor:
        seen.append(site)
        return value

    graphs = {mode: blocks.opened(graph) for mode, graph in program.graphs.items()}
    for graph in graphs.values():
        taps.insert(graph, [(node.name, []) for node in graph.find_nodes(op="call_function", target=PRODUCT)])
    expected = program(x)
    program.module().observe(observer, graphs)
    with torch.no_grad():
        assert torch.equal(program(x), expected)
    assert not seen
    torch.testing.assert_close(program(x), expected, **TIGHT)
    assert len(seen) == 10  # two products a layer and direction
    program.module().observe(None)


def test_stripping_taps_closes_layers() -> None:
    program, _ = program_of()
    graph = program.graphs["eval"]
    text = graph_text(graph)
    open_layers(graph)
    assert taps.tapped(graph)
    assert taps.strip(graph) == 0
    assert graph_text(graph) == text
