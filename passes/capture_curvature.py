"""Pass ``capture-curvature``: a tap behind every operation with weights, for curvature statistics."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from kfe_fx import taps
from kfe_fx.curvature.blocks import find_blocks
from kfe_fx.curvature.coverage import cover
from kfe_fx.passes.base import Pass, PassResult
from kfe_fx.program import Program, graph_text
from kfe_fx.recurrent.op import RECURRENT


@dataclass(frozen=True)
class CaptureCurvature(Pass):
    """Tap, in both graphs, the output of each operation that takes parameters.

    A tap is the identity and costs nothing where nobody observes; it stays in the program file. A recurrent layer has
    its outputs tapped; who collects statistics opens it into products with taps of their own
    (``kfe_fx.recurrent.opened``). Taps that are there already are set anew, so that the pass can be run again after a
    change of the network.
    """

    name: ClassVar[str] = "capture-curvature"
    keeps: ClassVar[str] = "observes"

    def run(self, program: Program) -> PassResult:
        """Return the tapped Program; the facts say for each parameter which statistics exist (``Coverage``)."""
        blocks = find_blocks(program)
        twin = program.copy()
        count = 0
        for mode, graph in twin.graphs.items():
            taps.strip(graph)
            names = {node.name for node in graph.nodes}
            plain = [(site, inputs) for site, inputs in blocks.taps(mode) if names.issuperset((site, *inputs))]
            count += taps.insert(graph, dict([*plain, *_outputs(graph)]).items())
        facts = {"taps": count, **cover(program, blocks).to_json()}
        if all(graph_text(graph) == graph_text(program.graphs[mode]) for mode, graph in twin.graphs.items()):
            return PassResult(program, False, facts)
        twin.module().recompile()
        twin.lineage = (*program.lineage, self.name)
        return PassResult(twin, True, facts)


def _outputs(graph: fx.Graph) -> list[tuple[str, list[str]]]:
    """Return the outputs of recurrent layers with what goes into these, for ``taps.insert``."""
    found = []
    for node in graph.find_nodes(op="call_function", target=RECURRENT):
        inputs = [arg.name for arg in node.all_input_nodes if arg.op != "get_attr"]
        found += [(user.name, inputs) for user in node.users if user.target is operator.getitem and user.users]
    return found
