"""Gates: multipliers on activations, one per unit (and per example), whose gradient scores the units.

With every gate at one the network is what it was, and the gradient of the loss of example n by the gate of unit u is

    d loss_n / d gate[n, u] = sum over the members and positions of u of  a * d loss_n / d a

(Theis et al. 2018, section 2; Molchanov et al. 2019, section 3). A gate at zero is the unit masked where it is minted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from kfe_fx.errors import UsageError
from kfe_fx.labels.analysis import Analysis
from kfe_fx.labels.sites import GateSite
from kfe_fx.program import Program, ProgramModule, copy_graph
from kfe_fx.recurrent.op import RECURRENT, Arguments
from kfe_fx.structure import pack

PREFIX = "kfe_gate_"

# A composite operation: one node in the graph, differentiable to any order and in any mode without a rule of its own.
_LIBRARY = torch.library.Library("kfe_fx", "FRAGMENT")
_LIBRARY.define(
    "gate(Tensor value, Tensor? gate, int dim, int[]? index=None, int? example_dim=None, str layout='plain') -> Tensor"
)


def gate(
    value: Tensor,
    gate: Tensor | None,
    dim: int,
    index: list[int] | None = None,
    example_dim: int | None = None,
    layout: str = "plain",
) -> Tensor:
    """Multiply ``value`` along ``dim`` by gates.

    Args:
        value: an activation.
        gate: [N, units], or [units] or [1, units] for all examples alike; None is the identity.
        dim: where the units lie; its index i has the multiplier ``gate[:, index[i]]``.
        index: column of each index, -1 for the multiplier one; None where they are in order.
        example_dim: the dim that counts examples, of size N times something.
        layout: how examples lie there: "plain" (one index each), "outer" (an example's rows together), "inner" (the
            examples alternate).

    Returns:
        A tensor like ``value``.
    """
    if gate is None:
        return value
    table = gate if gate.dim() == 2 else gate.unsqueeze(0)  # [N, units]
    if index is not None:
        columns = torch.tensor(index, device=table.device)
        if min(index, default=0) < 0:
            table = torch.cat([table, table.new_ones(len(table), 1)], 1)
            columns = torch.where(columns < 0, table.shape[1] - 1, columns)
        table = table.index_select(1, columns)  # [N, size of dim]
    shape = [1] * value.dim()
    shape[dim] = table.shape[1]
    if len(table) > 1:
        if example_dim is None:
            raise UsageError("this activation mixes examples: gate them one at a time (a gate of one row)")
        times = max(1, value.shape[example_dim] // len(table))  # of size one it is what the gates are to be written in
        if layout == "outer":
            table = table.repeat_interleave(times, 0)
        elif layout == "inner":
            table = table.repeat(times, 1)
        shape[example_dim] = len(table)
        table = table if example_dim < dim else table.t()
    return value * table.reshape(shape).to(value.dtype)


_LIBRARY.impl("gate", gate, "CompositeImplicitAutograd")
GATE = torch.ops.kfe_fx.gate.default


def insert(graph: fx.Graph, analysis: Analysis) -> list[str]:
    """Gate every unit of ``analysis`` in one of its graphs, in place; return the gate sites it does not have.

    Each group of units becomes a placeholder ``kfe_gate_<group>`` behind the inputs, with the default None, so that
    the graph can still be called without gates.
    """
    nodes = {node.name: node for node in graph.nodes}
    last = [node for node in graph.nodes if node.op == "placeholder"]
    after = last[-1] if last else next(iter(graph.nodes))
    gates: dict[int, fx.Node] = {}
    for group in analysis.groups:
        with graph.inserting_after(after):
            after = gates[group.id] = graph.placeholder(f"{PREFIX}{group.id}", default_value=None)
    missing = missing_sites(graph, analysis)
    left_out = {id(site) for site in missing}
    for site in analysis.gate_sites:
        if id(site) in left_out:
            continue
        node = nodes[site.node]
        if site.argument is not None:
            _gate_inside(graph, node, site, analysis, gates)
            state = Arguments.of(node).h0 if site.argument == "gate" else None
            if isinstance(state, fx.Node) and state in analysis.trackers["eval"].static:  # learned: not gated elsewhere
                with graph.inserting_before(node):
                    gated_state = graph.call_function(GATE, (state, *gate_arguments(site, analysis, gates)))
                gated_state.meta = dict(node.meta)
                set_argument(node, "h0", gated_state, state)
        else:
            gate_after(graph, node, site, analysis, gates)
    graph.lint()
    return [site.node for site in missing]


def has_gates(program: Program) -> bool:
    """Tell whether a graph of a Program has gates of any kind."""
    return any(graph.find_nodes(op="call_function", target=GATE) for graph in program.graphs.values())


def missing_sites(graph: fx.Graph, analysis: Analysis) -> list[GateSite]:
    """List the gate sites at which no gate can stand in a graph: it has no such node, or the dim counts examples."""
    nodes = {node.name: node for node in graph.nodes if node.op == "call_function"}
    return [site for site in analysis.gate_sites if site.node not in nodes or site.dim == site.example_dim]


def group_at(site: GateSite, analysis: Analysis) -> int:
    """Return the id of the group whose units a site gates."""
    return analysis.units[int(site.units[site.units >= 0][0])].group


def gate_arguments(site: GateSite, analysis: Analysis, gates: Mapping[int, fx.Node]) -> tuple[Any, ...]:
    """Return what the operation takes at a site behind the value, from the node of each group's gates."""
    group = analysis.groups[group_at(site, analysis)]
    columns = np.asarray(group.units)
    index = np.searchsorted(columns, site.units).clip(0, len(columns) - 1)
    index = np.where(columns[index] == site.units, index, -1)
    in_order = np.array_equal(index, np.arange(len(columns)))
    chosen = None if in_order else index.tolist()
    return gates[group.id], site.dim, chosen, site.example_dim, site.example_layout or "plain"


def _gate_inside(graph: fx.Graph, node: fx.Node, site: GateSite, analysis: Analysis, gates: dict[int, fx.Node]) -> None:
    # the operation multiplies by a table of its own, [N or 1, n]: ones, gated
    like = Arguments.of(node).weight_ih
    with graph.inserting_before(node):
        ones = graph.call_function(torch.ops.aten.new_ones.default, (like, [1, len(site.units)]))
        gated = graph.call_function(GATE, (ones, *gate_arguments(site, analysis, gates)))
    ones.meta, gated.meta = dict(node.meta), dict(node.meta)
    set_argument(node, str(site.argument), gated)


def set_argument(node: fx.Node, name: str, value: fx.Node | None, old: fx.Node | None = None) -> None:
    """Set an argument of a recurrent layer that is ``old`` now; the others stay as they are written."""
    place = [field.name for field in fields(Arguments)].index(name)
    if place < len(node.args):
        if node.args[place] is old:
            node.args = (*node.args[:place], value, *node.args[place + 1 :])
    elif node.kwargs.get(name) is old:
        rest = {key: given for key, given in node.kwargs.items() if key != name}
        node.kwargs = rest if value is None else {**rest, name: value}


def gate_after(
    graph: fx.Graph, node: fx.Node, site: GateSite, analysis: Analysis, gates: Mapping[int, fx.Node]
) -> None:
    """Let everything that read a node read it gated, in place."""
    with graph.inserting_after(node):
        gated = graph.call_function(GATE, (node, *gate_arguments(site, analysis, gates)))
    gated.meta = dict(node.meta)
    node.replace_all_uses_with(gated, delete_user_cb=lambda user: user is not gated)


def strip(graph: fx.Graph, inputs: tuple[str, ...]) -> int:
    """Take every gate out of a graph, in place, with whatever only fed gates; return how many there were."""
    found = [node for node in graph.nodes if node.target is GATE]
    feeding: set[fx.Node] = set()
    for node in found:
        source: Any = node.args[0]
        frontier = [arg for arg in node.all_input_nodes if arg is not source]
        while frontier:
            arg = frontier.pop()
            if arg not in feeding:
                feeding.add(arg)
                frontier += arg.all_input_nodes
        for user in [user for user in node.users if user.target is RECURRENT]:
            for name in ("gate", "cell_gate"):
                if getattr(Arguments.of(user), name) is node:
                    set_argument(user, name, None, node)
                    feeding.add(source)  # the ones that it was written in
        node.replace_all_uses_with(source)
        graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        unused = node.op == "placeholder" and node.name.startswith(PREFIX)
        if (node in feeding or unused) and not node.users and node.name not in inputs:
            graph.erase_node(node)
    return len(found)


@dataclass(frozen=True)
class GatedModule:
    """A Program with gates that shares its tensors; ``run`` takes the gates beside the inputs.

    ``units[group]`` are the units of that group's gate, in the order of its columns; ``per_example`` tells whether
    every gate site knows its examples, else the gates must have one row.
    """

    module: ProgramModule
    units: tuple[tuple[int, ...], ...]
    per_example: bool
    mode: str

    def ones(self, rows: int, dtype: torch.dtype) -> list[Tensor]:
        """Make gates that change nothing, [rows, units of the group] each, ready to be differentiated."""
        return [torch.ones(rows, len(units), dtype=dtype, requires_grad=True) for units in self.units]

    def run(self, inputs: list[Any], gates: list[Tensor]) -> Any:
        """Run with gates on flat inputs; return the outputs in the structure of the network."""
        flat = self.module.run_flat([*inputs, *gates], self.mode)
        return pack(self.module.signature.outputs[self.mode], flat)


def gated(program: Program, analysis: Analysis, mode: str = "eval") -> GatedModule:
    """Gate a copy of one graph of ``program``; tensors are shared, so this costs no memory."""
    source = program.module()
    graph = copy_graph(source.graphs[mode])
    insert(graph, analysis)
    view = ProgramModule({mode: graph}, source.signature)
    view._modules, view._parameters, view._buffers = source._modules, source._parameters, source._buffers
    per_example = all(site.example_layout is not None for site in analysis.gate_sites)
    return GatedModule(view, tuple(group.units for group in analysis.groups), per_example, mode)
