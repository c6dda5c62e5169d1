"""States of recurrent layers that enter or leave a network, as streaming models have them.

Inputs and outputs of a network keep their shape, so that the hidden units behind such states stay, unless whoever
prunes permits other widths: then the states lose their units like any other tensor. The permission is of one run
(``Program.extras["free_states"]``, the widths at its start; never in a file). What is left of each state stays on
record as the section "states" of the Program, with the indices of the original that stay.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from kfe_fx.labels.registry import overloads
from kfe_fx.program import Program
from kfe_fx.recurrent.op import CELL_OPS, RECURRENT, Arguments

if TYPE_CHECKING:
    from kfe_fx.labels.analysis import Analysis

aten = torch.ops.aten
SECTION, PERMISSION = "states", "free_states"
Record = dict[str, dict[str, dict[str, Any]]]
RESIZE = "--resize-state lets it shrink"  # what to do about a unit that stays because of a state

_JOINS = {*overloads(aten, "stack.default", "cat.default")}
_MOVES = {
    operator.getitem,
    *overloads(aten, "select.int", "slice.Tensor", "unsqueeze.default", "squeeze.dim", "squeeze.dims", "unbind.int"),
    *overloads(aten, "split.Tensor", "split_with_sizes.default", "chunk.default", "transpose.int", "permute.default"),
    *overloads(aten, "contiguous.default", "clone.default", "to.dtype", "detach.default", "alias.default"),
    *overloads(aten, "tensor_split.sections", "squeeze.default"),
}


@dataclass(frozen=True)
class States:
    """Which inputs (by name) and outputs (by place) of a graph are states of recurrent layers."""

    inputs: frozenset[str] = frozenset()
    outputs: frozenset[int] = frozenset()


def find_states(graph: fx.Graph) -> States:
    """Follow the states of all recurrent layers to the inputs and outputs that only moves of data lie between."""
    inputs: set[str] = set()
    ends: set[fx.Node] = set()
    for node in graph.nodes:
        if node.target is RECURRENT:
            call = Arguments.of(node)
            inputs |= _inputs_behind([call.h0, call.c0])
            picked = [user for user in node.users if user.target is operator.getitem and user.args[1] in (1, 2)]
            ends |= _moved(picked, _MOVES | _JOINS)
        elif node.target in CELL_OPS:
            states = node.args[1]
            inputs |= _inputs_behind(states if isinstance(states, list | tuple) else [states])
            ends |= _moved([node], _MOVES)  # joined, they are the steps of a sequence
    leaves: Any = graph.output_node().args[0]
    return States(frozenset(inputs), frozenset(place for place, leaf in enumerate(leaves) if leaf in ends))


def _inputs_behind(found: Iterable[Any]) -> set[str]:
    frontier = [node for node in found if isinstance(node, fx.Node)]
    names: set[str] = set()
    while frontier:
        node = frontier.pop()
        if node.op == "placeholder":
            names.add(str(node.target))
        elif node.target in _MOVES | _JOINS:
            frontier += node.all_input_nodes
    return names


def _moved(found: list[fx.Node], moves: set[Any]) -> set[fx.Node]:
    reached: set[fx.Node] = set()
    frontier = list(found)
    while frontier:
        node = frontier.pop()
        if node not in reached:
            reached.add(node)
            frontier += [user for user in node.users if user.target in moves]
    return reached


def resizable(program: Program) -> bool:
    """Tell whether the states of a Program may lose units now; never read from a file."""
    return PERMISSION in program.extras


def permit(program: Program, *, allowed: bool) -> Program:
    """Return a Program (of the same tensors) whose states may lose units, or may not; itself if it says so already."""
    if resizable(program) == allowed:
        return program
    extras = {name: value for name, value in program.extras.items() if name != PERMISSION}
    if allowed:
        extras[PERMISSION] = widths(program)  # what whoever permits it feeds the states with
    return Program(program.module(), program.example_inputs, program.axes, program.lineage, program.notes, extras)


def widths(program: Program) -> Record:
    """Return what is on record of the states: ``{"inputs": {name: {"width", "kept"}}, "outputs": {place: ...}}``.

    ``width`` is that of the original, ``kept`` the indices of it that are left. Empty where no state was ever let go.
    """
    return program.extras.get("sections", {}).get(SECTION, {})


def resized(program: Program) -> dict[str, dict[str, Any]]:
    """Return the states that lost units, as "input NAME" or "output PLACE", with their record."""
    return {
        f"{side.removesuffix('s')} {key}": held
        for side, states in widths(program).items()
        for key, held in states.items()
        if len(held["kept"]) < held["width"]
    }


def metadata(program: Program) -> dict[str, str]:
    """Return what a file for inference tells of states on record: ``{"kfe_fx.states": JSON of widths}``."""
    found = widths(program)
    return {"kfe_fx.states": json.dumps(found, sort_keys=True)} if found else {}


def narrow_input(program: Program, name: str, value: Any, before: Program | None = None) -> Any:
    """Cut a state to what the Program takes, if it is as wide as the original's, or as when the cut was permitted.

    With ``before``, a Program that this one was cut from, the state is as wide as that one takes it. Anything else is
    returned as it is.
    """
    held = widths(program).get("inputs", {}).get(name)
    if held is None or not isinstance(value, Tensor) or not value.dim() or value.shape[-1] == len(held["kept"]):
        return value
    known = [range(held["width"])] + [
        record.get("inputs", {}).get(name, {}).get("kept", [])
        for record in ({} if before is None else widths(before), program.extras.get(PERMISSION, {}))
    ]
    for indices in known:
        if value.shape[-1] == len(indices):
            place = {index: at for at, index in enumerate(indices)}
            return value.index_select(-1, torch.tensor([place[k] for k in held["kept"]], device=value.device))
    return value


def record_removal(program: Program, analysis: Analysis, removed: frozenset[int]) -> None:
    """Put on record, in a Program of its own that was just analysed, what a removal leaves of its states."""
    tracker, found = analysis.trackers["eval"], analysis.trackers["eval"].states
    leaves: Any = program.graphs["eval"].output_node().args[0]
    given = {str(node.target): node for node in program.graphs["eval"].find_nodes(op="placeholder")}
    ends = {"inputs": {name: given[name] for name in found.inputs}}
    ends["outputs"] = {str(place): leaves[place] for place in found.outputs}
    before = widths(program)
    record: Record = {}
    for side, nodes in ends.items():
        record[side] = {}
        for key, node in sorted(nodes.items()):
            size = tracker.shape(node)[-1]
            held = before.get(side, {}).get(key, {"width": size, "kept": list(range(size))})
            stay = analysis.kept_of(node, removed)[-1]
            left = held["kept"] if stay is None else [held["kept"][index] for index in stay]
            record[side][key] = {**held, "kept": left}
    program.extras["sections"] = {**program.extras.get("sections", {}), SECTION: record}
