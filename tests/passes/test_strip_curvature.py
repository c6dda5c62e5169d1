"""Stripping taps: the graphs before, node for node."""

from __future__ import annotations

import pytest
import torch

from kfe_fx.passes.capture_curvature import CaptureCurvature
from kfe_fx.passes.strip_curvature import StripCurvature
from kfe_fx.program import graph_text
from tests.criteria.nets import NAMES, program_of


@pytest.mark.parametrize("name", NAMES)
def test_strip_restores_the_graphs(name: str):
    program, x = program_of(name)
    before = program.hash()
    tapped = CaptureCurvature().run(program).program
    hashed = tapped.hash()
    result = StripCurvature().run(tapped)
    assert result.modified
    assert tapped.hash() == hashed != before == result.program.hash()
    assert result.program.lineage == ("capture-curvature", "strip-curvature")
    assert torch.equal(result.program(x), program(x))
    for mode, graph in program.graphs.items():
        assert graph_text(result.program.graphs[mode]) == graph_text(graph)
        assert [node.name for node in result.program.graphs[mode].nodes] == [node.name for node in graph.nodes]


def test_without_taps_nothing_is_done():
    program, _ = program_of("outer")
    result = StripCurvature().run(program)
    assert not result.modified
    assert result.program is program
