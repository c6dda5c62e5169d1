"""Taps: nodes that change nothing, in the code that runs, in the labels, and in the file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import kfe_fx
from kfe_fx import taps
from kfe_fx.curvature import find_blocks
from kfe_fx.labels.analysis import analyze
from kfe_fx.program import Program, graph_text
from tests.random_nets import Case, nets, sample_net

THOROUGH = os.environ.get("KFE_FX_THOROUGH", "") not in ("", "0")


def tapped(program: Program) -> Program:
    """Copy a Program with taps at every site."""
    twin = program.copy()
    blocks = find_blocks(program)
    for mode, graph in twin.graphs.items():
        taps.insert(graph, blocks.taps(mode))
    twin.module().recompile()
    return twin


class Watcher:
    """An observer that counts and changes nothing."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, tuple[int, ...], int]] = []

    def __call__(self, value: Tensor, inputs: list[Tensor], site: str) -> Tensor:
        self.seen.append((site, tuple(value.shape), len(inputs)))
        return value


def run(program: Program, inputs: tuple[Tensor, ...], mode: str) -> tuple[list[Tensor], list[Tensor]]:
    """Run forward and backward; return the outputs, and the gradients of floating-point inputs and parameters."""
    module = program.module()
    given = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    torch.manual_seed(0)
    outs = [out for out in module.run_flat(given, mode) if isinstance(out, Tensor)]
    wanted = [x for x in (*given, *module.parameters()) if x.requires_grad]
    differentiable = [out for out in outs if out.requires_grad]
    if not differentiable:
        return outs, []
    total = torch.stack([(out * out).sum() for out in differentiable]).sum()
    return outs, list(torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True))


def assert_same(program: Program, twin: Program, inputs: tuple[Tensor, ...]) -> None:
    """Compare outputs, gradients and whether outputs ask for gradients, bit for bit, in every mode."""
    for mode in program.graphs:
        mine, theirs = (run(each, inputs, mode) for each in (program, twin))
        for one, other in zip(mine[0] + mine[1], theirs[0] + theirs[1], strict=True):
            assert torch.equal(one, other)
            assert one.requires_grad == other.requires_grad


@settings(max_examples=300 if THOROUGH else 8)
@given(case=nets(max_blocks=2))
def test_taps_change_nothing_to_the_bit(case: Case) -> None:
    program = kfe_fx.capture(case.module, case.inputs)
    twin, inputs = tapped(program), case.make_inputs(3)
    state = {name: value.clone() for name, value in program.state_dict().items()}
    assert_same(program, twin, inputs)
    for each in (program, twin):  # batch norms have moved their statistics
        each.module().load_state_dict(state)
    watcher = Watcher()
    twin.module().observe(watcher)
    assert_same(program, twin, inputs)
    assert watcher.seen
    for each in (program, twin):
        for number, parameter in enumerate(each.module().parameters()):
            parameter.requires_grad_(number % 2 == 0)  # some frozen
    assert_same(program, twin, inputs)


def small() -> tuple[Program, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    x = torch.randn(3, 2, 4, 4)
    return kfe_fx.capture(net, x), x


def test_what_is_not_observed_is_not_in_the_code_that_runs() -> None:
    program, x = small()
    twin = tapped(program)
    watcher = Watcher()

    def names(module: Any) -> set[str]:
        run = module._compiled[("eval", None if module._observer is None else id(module._observer))]
        return set(run.func.__code__.co_names)

    assert taps.tapped(twin.graphs["eval"])
    twin(x)
    program(x)
    assert names(twin.module()) == names(program.module())
    twin.module().observe(watcher)
    twin(x)
    assert names(twin.module()) != names(program.module())
    assert [site for site, _, _ in watcher.seen] == ["conv2d", "batch_norm", "linear"]
    twin.module().observe(None)
    twin(x)
    assert len(watcher.seen) == 3
    assert names(twin.module()) == names(program.module())


def test_an_observer_may_bring_tapped_graphs_of_its_own() -> None:
    program, x = small()
    twin, watcher = tapped(program), Watcher()
    program.module().observe(watcher, twin.graphs)
    program(x)
    assert len(watcher.seen) == 3
    assert not taps.tapped(program.graphs["eval"])
    program.module().observe(None)
    program(x)
    assert len(watcher.seen) == 3


def test_an_observer_sees_what_goes_in_and_what_comes_out() -> None:
    program, x = small()
    twin = tapped(program)
    module, seen = twin.module(), {}

    def observer(value: Tensor, inputs: list[Tensor], site: str) -> Tensor:
        seen[site] = value, inputs
        return value

    module.observe(observer)
    twin(x)
    torch.testing.assert_close(
        seen["conv2d"][0], torch.conv2d(x, module.get_parameter("0.weight"), module.get_parameter("0.bias"), padding=1)
    )
    assert seen["conv2d"][1][0] is x
    assert seen["batch_norm"][1][0] is seen["conv2d"][0]


def test_stripping_gives_the_graph_from_before_node_for_node() -> None:
    program, _ = small()
    twin = tapped(program)
    assert twin.hash() != program.hash()
    for mode, graph in twin.graphs.items():
        assert taps.strip(graph) == len(find_blocks(program).taps(mode))
        assert graph_text(graph) == graph_text(program.graphs[mode])
        assert [node.name for node in graph.nodes] == [node.name for node in program.graphs[mode].nodes]
        assert not taps.tapped(graph)
    assert twin.hash() == program.hash()


def test_a_tap_by_itself_is_the_identity() -> None:
    x = torch.randn(3, requires_grad=True)
    y = taps.TAP(x * 2, [x], "here")
    y.sum().backward()
    assert torch.equal(y, x * 2)
    assert torch.equal(x.grad, torch.full((3,), 2.0))
    twin, given = tapped(small()[0]), small()[1]
    assert torch.equal(torch.fx.Interpreter(twin.module(), graph=twin.graphs["eval"]).run(given)[0], twin(given))


def test_a_copy_keeps_the_taps_and_not_the_observer() -> None:
    program, x = small()
    twin, watcher = tapped(program), Watcher()
    twin.module().observe(watcher)
    other = twin.copy()
    assert other.hash() == twin.hash()
    other(x)
    assert not watcher.seen


def test_a_file_keeps_the_taps(tmp_path: Path) -> None:
    program, x = small()
    twin = tapped(program)
    kfe_fx.save(twin, path=tmp_path / "tapped.pt")
    again = kfe_fx.load(tmp_path / "tapped.pt")
    assert again.hash() == twin.hash()
    assert all(graph_text(graph) == graph_text(twin.graphs[mode]) for mode, graph in again.graphs.items())
    assert torch.equal(again(x), program(x))
    watcher = Watcher()
    again.module().observe(watcher)
    again(x)
    assert [site for site, _, _ in watcher.seen] == ["conv2d", "batch_norm", "linear"]


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(k, marks=pytest.mark.thorough) for k in range(4, 200))])
def test_labels_are_those_of_the_network_without_taps(seed: int) -> None:
    case = sample_net(3000 + seed, max_blocks=2)
    program = kfe_fx.capture(case.module, case.inputs)
    twin = tapped(program)
    mine, theirs = analyze(program), analyze(twin)
    assert theirs.units == mine.units
    assert theirs.groups == mine.groups
    assert theirs.floors == mine.floors
    assert theirs.statistics == mine.statistics
    assert theirs.frozen == mine.frozen
    for one, other in zip(mine.sites + mine.gate_sites, theirs.sites + theirs.gate_sites, strict=True):
        assert (one.node, one.dim) == (other.node, other.dim)
        assert np.array_equal(one.units, other.units)
    for node in twin.graphs["eval"].nodes:
        if node.target is taps.TAP:
            for ours, source in zip(theirs.layout(node.name), mine.layout(node.args[0].name), strict=True):
                assert all(np.array_equal(a, b) for a, b in zip(ours, source, strict=True))
