"""States of recurrent layers that enter or leave a network, as streaming models have them.

Inputs and outputs of a network keep their shape, so that the hidden units behind such states stay, unless the Program
says that whoever calls it will take other widths: then the states lose their units like any other tensor. What is left
of each state is kept as the section "states" of the Program, with the indices of the original that stay.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kfe_fx.labels.registry import overloads
from kfe_fx.program import Program
from kfe_fx.recurrent.op import RECURRENT, Arguments

aten = torch.ops.aten
SECTION = "states"
RESIZE = "--resize-state lets it shrink"  # what to do about a unit that stays because of a state

_JOINS = {*overloads(aten, "stack.default", "cat.default")}
_MOVES = {
    operator.getitem,
    *overloads(aten, "select.int", "slice.Tensor", "unsqueeze.default", "squeeze.dim", "squeeze.dims", "unbind.int"),
    *overloads(aten, "split.Tensor", "split_with_sizes.default", "chunk.default", "transpose.int", "permute.default"),
    *overloads(aten, "contiguous.default", "clone.default", "to.dtype", "detach.default", "alias.default"),
    *overloads(aten, "tensor_split.sections", "squeeze.default"),
}
_CELLS = {*overloads(aten, "lstm_cell.default", "gru_cell.default", "rnn_tanh_cell.default", "rnn_relu_cell.default")}


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
        elif node.target in _CELLS:
            states = node.args[1]
            inputs |= _inputs_behind(states if isinstance(states, list | tuple) else [states])
            ends |= _moved([node], _MOVES)  # joined, they are the steps of a sequence
    output = graph.output_node()
    leaves = list(output.args[0])  # type: ignore[arg-type]
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


def free_states(program: Program) -> Program:
    """Return a Program (of the same tensors) that says that its states may lose units; itself if it does already."""
    if resizable(program):
        return program
    found = find_states(program.graphs["eval"])
    flat = dict(zip(program.signature.input_names, program.flat_examples(), strict=True))
    held = {name: _whole(flat[name]) for name in sorted(found.inputs)}
    twin = Program(
        program.module(), program.example_inputs, program.axes, program.lineage, program.notes, dict(program.extras)
    )
    twin.extras["sections"] = {**program.extras.get("sections", {}), SECTION: held}
    return twin


def _whole(value: Tensor) -> dict[str, Any]:
    return {"width": int(value.shape[-1]), "kept": list(range(value.shape[-1]))}


def resizable(program: Program) -> bool:
    """Tell whether the states of a Program may lose units."""
    return SECTION in program.extras.get("sections", {})


def widths(program: Program) -> dict[str, dict[str, Any]]:
    """Return per state input the width of the original and the indices that are kept of it."""
    return program.extras.get("sections", {}).get(SECTION, {})


def metadata(program: Program) -> dict[str, str]:
    """Return what a file for inference tells of resized states: ``{"kfe_fx.states": JSON of widths}``."""
    return {"kfe_fx.states": json.dumps(widths(program), sort_keys=True)} if resizable(program) else {}


def narrow_input(program: Program, name: str, value: Any) -> Any:
    """Cut a state of the original's width to what the Program takes; anything else is returned as it is."""
    held = widths(program).get(name)
    if held is None or not isinstance(value, Tensor) or not value.dim() or value.shape[-1] != held["width"]:
        return value
    if len(held["kept"]) == held["width"]:
        return value
    return value.index_select(-1, torch.tensor(held["kept"], device=value.device))


def record_removal(program: Program, kept: dict[str, list[int]]) -> None:
    """Note, in a Program of its own, that of these state inputs only some indices of the present ones are left."""
    sections = dict(program.extras.get("sections", {}))
    states = dict(sections.get(SECTION, {}))
    for name, indices in kept.items():
        states[name] = {**states[name], "kept": [states[name]["kept"][index] for index in indices]}
    program.extras["sections"] = {**sections, SECTION: states}
