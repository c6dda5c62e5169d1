"""Taps in a Program: the same function and file, every other pass and lowering as without them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import kfe_fx
from kfe_fx import taps
from kfe_fx.curvature import fit
from kfe_fx.labels.analysis import analyze
from kfe_fx.passes.capture_curvature import CaptureCurvature
from kfe_fx.passes.fold_means import FoldMeans, measure_means
from kfe_fx.passes.insert_gates import InsertGates
from kfe_fx.passes.reestimate_statistics import ReestimateStatistics
from kfe_fx.passes.shrink import Shrink
from kfe_fx.passes.strip_curvature import StripCurvature
from kfe_fx.passes.strip_gates import StripGates
from kfe_fx.plan import Plan
from kfe_fx.program import Program, graph_text
from kfe_fx.runtime.lower import to_exported_program
from tests.criteria.nets import NAMES, program_of


def tapped(name: str) -> tuple[Program, Program, torch.Tensor]:
    program, x = program_of(name)
    return program, CaptureCurvature().run(program).program, x


@pytest.mark.parametrize("name", NAMES)
def test_taps_change_nothing(name: str):
    program, x = program_of(name)
    before = program.hash()
    result = CaptureCurvature().run(program)
    assert result.modified
    assert program.hash() == before != result.program.hash()
    assert result.program.lineage == ("capture-curvature",)
    assert torch.equal(result.program(x), program(x))
    counts = [sum(node.target is taps.TAP for node in graph.nodes) for graph in result.program.graphs.values()]
    assert sum(counts) == result.facts["taps"] > 0
    assert result.facts["covered"] == 1.0
    assert {row["parameter"] for row in result.facts["parameters"]} == dict(program.module().named_parameters()).keys()


@pytest.mark.parametrize("name", NAMES)
def test_a_second_time_nothing_is_done(name: str):
    _, twin, _ = tapped(name)
    result = CaptureCurvature().run(twin)
    assert not result.modified
    assert result.program is twin
    assert result.facts["taps"] > 0


def test_taps_that_are_missing_are_set():
    _, twin, _ = tapped("residual")
    whole = twin.hash()
    node = next(node for node in twin.graphs["train"].nodes if node.target is taps.TAP)
    node.replace_all_uses_with(node.args[0])
    twin.graphs["train"].erase_node(node)
    again = CaptureCurvature().run(twin)
    assert again.modified
    assert again.program.hash() == whole


def test_taps_have_the_same_names_in_both_graphs():
    _, twin, _ = tapped("residual")
    names = [
        {node.args[2]: node.name for node in graph.nodes if node.target is taps.TAP} for graph in twin.graphs.values()
    ]
    assert names[0] == names[1]


@pytest.mark.parametrize("name", ["residual", "attention"])
def test_the_program_file_keeps_taps(name: str, tmp_path: Path):
    _, twin, x = tapped(name)
    kfe_fx.save(twin, path=tmp_path / "tapped.pt")
    again = kfe_fx.load(tmp_path / "tapped.pt")
    assert again.hash() == twin.hash()
    for mode, graph in twin.graphs.items():
        assert graph_text(again.graphs[mode]) == graph_text(graph)
    assert torch.equal(again(x), twin(x))


@pytest.mark.parametrize("name", ["residual", "outer", "windows"])
def test_statistics_are_those_of_the_network_without_taps(name: str):
    program, twin, x = tapped(name)
    y = torch.tensor([0, 2, 1])
    one, other = (fit(each, (x, y), source="empirical") for each in (program, twin))
    assert one.graph == other.graph
    for key, block in one.blocks.items():
        for sums, value in block.sums.items():
            assert torch.equal(value, other.blocks[key].sums[sums])


@pytest.mark.parametrize("name", NAMES)
def test_the_units_are_those_of_the_network_without_taps(name: str):
    program, twin, _ = tapped(name)
    one, other = analyze(program), analyze(twin)
    assert [unit.slices for unit in one.units] == [unit.slices for unit in other.units]
    assert [group.dims for group in one.groups] == [group.dims for group in other.groups]
    assert one.floors == other.floors


@pytest.mark.parametrize("name", NAMES)
def test_shrinking_keeps_the_taps(name: str):
    program, twin, x = tapped(name)
    analysis = analyze(program)
    removed = {group.units[0] for group in analysis.groups if len(group.units) > 1}
    plan = Plan.of_units(analysis, removed)
    small, with_taps = (Shrink(plan).run(each).program for each in (program, twin))
    assert torch.equal(small(x), with_taps(x))
    assert StripCurvature().run(with_taps).program.hash() == small.hash()
    assert not CaptureCurvature().run(with_taps).modified


@pytest.mark.parametrize("name", NAMES)
def test_means_are_folded_as_without_taps(name: str):
    program, twin, x = tapped(name)
    results = []
    for each in (program, twin):
        analysis = analyze(each)
        plan = Plan.of_units(analysis, {group.units[0] for group in analysis.groups if len(group.units) > 1})
        means = measure_means(analysis, (x, None))
        results.append(FoldMeans(analysis, plan, means).run(Shrink(plan).run(each).program))
    one, other = results
    assert one.facts == other.facts
    assert one.facts["folded"]
    assert torch.equal(one.program(x), other.program(x))


def test_other_passes_do_not_mind():
    program, twin, x = tapped("residual")
    fresh = [ReestimateStatistics((x, None)).run(each).program for each in (program, twin)]
    assert torch.equal(fresh[0](x), fresh[1](x))
    gated = InsertGates().run(twin).program
    assert torch.equal(gated(x), program(x))
    assert StripCurvature().run(gated).program.hash() == InsertGates().run(program).program.hash()
    assert StripGates().run(gated).program.hash() == twin.hash()


def test_lowering_leaves_taps_out():
    program, twin, x = tapped("residual")
    hashed = twin.hash()
    one, other = (to_exported_program(each) for each in (program, twin))
    assert str(one.graph) == str(other.graph)
    assert twin.hash() == hashed
    assert torch.equal(other.module(check_guards=False)(x)[0], program(x))


@pytest.mark.parametrize("name", ["residual", "attention"])
def test_pruning_starts_without_taps(name: str):
    program, twin, x = tapped(name)
    results = [kfe_fx.prune(each, budget=0.5, metric="widths", criterion="magnitude") for each in (program, twin)]
    one, other = results
    assert one.plan.kept == other.plan.kept
    assert one.program.hash() == other.program.hash()
    assert other.program.lineage[:2] == ("capture-curvature", "strip-curvature")
    np.testing.assert_array_equal(one.program(x).detach(), other.program(x).detach())
