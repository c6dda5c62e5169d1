"""Recurrent layers: one label for each hidden unit, over all gates, the recurrent column, biases and statistics.

A removed unit is zero at every step, so what reads it (the recurrent weight, the projection, whoever comes next) loses
a column; and nobody sees its gates any more, so that they go too (Wen et al. 2018, section 3). With a projection there
are two kinds of units: those of the cell, which the projection reads, and those that leave the layer.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from kfe_fx.labels.registry import rule
from kfe_fx.labels.states import RESIZE
from kfe_fx.labels.tracker import Dims, Layers, Tracker
from kfe_fx.program import argument
from kfe_fx.recurrent.op import CELL_OPS, CELLS, RECURRENT, Arguments


@rule(RECURRENT)
def layer(tracker: Tracker, node: fx.Node) -> list[Dims]:
    """Trace one direction of one layer: output, last hidden state and last cell state."""
    call = Arguments.of(node)
    cells = _gate_rows(tracker, node, call)
    if call.weight_hr is None:
        hidden = cells
    else:
        rows, columns = tracker.dims(call.weight_hr)
        cells = tracker.unify(cells, columns, node)
        hidden = rows
    hidden = tracker.unify(hidden, tracker.dims(call.weight_hh)[1], node)
    if tracker.shape(call.weight_ih)[1] > 1:
        tracker.unify(tracker.dims(call.weight_ih)[1], tracker.dims(call.input)[2], node)
    tracker.freeze(tracker.dims(call.input)[call.time_dim], node, "is stepped through by a recurrent layer")
    batch = tracker.dims(call.input)[1 - call.time_dim]
    for state, units in ((call.h0, hidden), (call.c0, cells)):
        if state is not None:
            batch = tracker.unify(batch, tracker.dims(state)[0], node)
            _join_state(tracker, node, units, tracker.dims(state)[1])
    if call.lengths is not None:
        batch = tracker.unify(batch, tracker.dims(call.lengths)[0], node)
    tracker.minted[node] = {"gate": hidden} | ({"cell_gate": cells} if call.weight_hr is not None else {})
    output = (batch, (), hidden) if call.batch_first else ((), batch, hidden)
    return [output, (batch, hidden), (batch, cells) if call.cell == "lstm" else ((),)]


def _gate_rows(tracker: Tracker, node: fx.Node, call: Arguments) -> Layers:
    """Merge the rows of all gates in everything that has one row a gate and unit; return the units."""
    rows = [(one, 0) for one in (call.weight_ih, call.weight_hh, call.bias_ih, call.bias_hh)]
    rows += [(call.gamma_ih, 0), (call.gamma_hh, 0)]
    rows += [(one, 1) for one in (call.mean_ih, call.var_ih, call.mean_hh, call.var_hh)]
    units: Layers | None = None
    for tensor, dim in rows:
        if tensor is not None:
            units = _blocks(tracker, node, tracker.dims(tensor)[dim], CELLS[call.cell], units)
    assert units is not None
    for tensor, dim in ((call.gamma_c, 0), (call.beta_c, 0), (call.mean_c, 1), (call.var_c, 1)):
        if tensor is not None and tracker.shape(tensor)[dim] > 1:
            units = tracker.unify(units, tracker.dims(tensor)[dim], node)
    statistics = (call.mean_ih, call.var_ih, call.mean_hh, call.var_hh, call.mean_c, call.var_c, call.seen)
    for tensor in statistics:
        if tensor is not None:
            tracker.freeze(tracker.dims(tensor)[0], node)  # one row a step
    return units


def _blocks(tracker: Tracker, node: fx.Node, layers: Layers, gates: int, units: Layers | None) -> Layers:
    """Merge the blocks of one dim of size g H with each other and with ``units``, [H]."""
    layers = tracker.single(layers, node)
    for block in range(gates):
        part = tuple(labels.reshape(gates, -1)[block] for labels in layers)
        units = part if units is None else tracker.unify(units, part, node)
    return units or ()


def _join_state(tracker: Tracker, node: fx.Node, units: Layers, state: Layers) -> None:
    if units and not state:
        tracker.freeze(units, node, f"has a state from outside ({RESIZE})")
    else:
        tracker.unify(units, state, node)


@rule(*CELL_OPS)
def cell(tracker: Tracker, node: fx.Node) -> Any:
    """Trace one step of a cell that the network calls by itself; the weights tie its steps."""
    states = node.args[1]
    hidden_state, cell_state = states if isinstance(states, list | tuple) else (states, None)
    weights = [node.args[2], node.args[3], argument(node, 4, "b_ih"), argument(node, 5, "b_hh")]
    call = Arguments(node.args[0], hidden_state, cell_state, *weights, cell=CELL_OPS[node.target])
    units = _gate_rows(tracker, node, call)
    units = tracker.unify(units, tracker.dims(call.weight_hh)[1], node)
    if tracker.shape(call.weight_ih)[1] > 1:
        tracker.unify(tracker.dims(call.weight_ih)[1], tracker.dims(call.input)[-1], node)
    batch = tracker.dims(call.input)[:-1]
    for state in (hidden_state, cell_state):
        if state is not None:
            dims = tracker.dims(state)
            batch = tuple(tracker.unify(one, other, node) for one, other in zip(batch, dims[:-1], strict=True))
            _join_state(tracker, node, units, dims[-1])
    output = (*batch, units)
    if cell_state is None:
        tracker.minted[node] = {len(output) - 1}
        return output
    for user in node.users:  # h is what a gate multiplies; c only leads to it
        if user.args[1] == 0:
            tracker.minted[user] = {len(output) - 1}
    return [output, output]
