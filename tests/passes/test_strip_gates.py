"""Stripping gates: the graphs before, node for node, whatever fed the gates."""

from __future__ import annotations

import pytest
import torch

from kfe_fx.gates import PREFIX
from kfe_fx.passes.insert_gates import InsertGates
from kfe_fx.passes.strip_gates import StripGates
from kfe_fx.program import graph_text
from tests.criteria.nets import NAMES, program_of


@pytest.mark.parametrize("name", NAMES)
def test_strip_restores_the_graphs(name: str):
    program, x = program_of(name)
    before = program.hash()
    inserted = InsertGates().run(program).program
    result = StripGates().run(inserted)
    assert result.modified
    assert result.program.hash() == before != inserted.hash()
    assert result.program.lineage == ("insert-gates", "strip-gates")
    assert torch.equal(result.program(x), program(x))
    for mode, graph in program.graphs.items():
        assert graph_text(result.program.graphs[mode]) == graph_text(graph)
        names = [node.name for node in graph.nodes]
        assert [node.name for node in result.program.graphs[mode].nodes] == names


def test_what_only_fed_gates_goes_with_them():
    program, _ = program_of("outer")
    twin = InsertGates().run(program).program
    for graph in twin.graphs.values():
        gate = next(node for node in graph.nodes if node.name.startswith(PREFIX))
        with graph.inserting_after(gate):
            trained = graph.call_function(torch.ops.aten.sigmoid.default, (gate,))
        gate.replace_all_uses_with(trained, delete_user_cb=lambda user, trained=trained: user is not trained)
    assert StripGates().run(twin).program.hash() == program.hash()


def test_without_gates_nothing_is_done():
    program, _ = program_of("outer")
    result = StripGates().run(program)
    assert not result.modified
    assert result.program is program
