"""Recurrent layers in a graph that is being lowered: what ONNX has one operator for, and one Scan for the rest.

ONNX counts steps first, [T, N, I]: layers that count sequences first are transposed, and where one layer reads another
the transposes between them are left out. Two directions of a layer become one node. In float64 all are Scans: ONNX
Runtime has the operators in float32 alone.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from kfe_fx.errors import UnsupportedModel
from kfe_fx.program import Program, argument, get_tensor, named_tensors, run_node
from kfe_fx.recurrent.op import RECURRENT, Arguments
from kfe_fx.runtime.recurrent_onnx import LAYER_OP, PARTS, SCAN_OP
from kfe_fx.runtime.recurrent_transposes import SAME, Transposes
from kfe_fx.runtime.recurrent_weights import Constants, Folded, fold, of_operation, of_scan

aten = torch.ops.aten

_WEIGHTS = (
    "weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr", "gamma_ih", "mean_ih", "var_ih", "gamma_hh",
    "mean_hh", "var_hh", "gamma_c", "beta_c", "mean_c", "var_c",
)  # fmt: skip
_CASTS = {*SAME, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default}


def lower_recurrent(graph: fx.Graph, program: Program) -> Constants:
    """Replace each ``kfe_fx.recurrent`` of an evaluation graph, in place, and return the tensors that it reads now.

    Raises:
        UnsupportedModel: a layer holds gates, takes statistics from the batch, or has weights that depend on inputs.
    """
    constants = Constants(set(named_tensors(program.module())))
    found = graph.find_nodes(op="call_function", target=RECURRENT)
    if found:
        _Lowering(graph, program, constants).run(list(found))
    return constants


def lengths_source(node: fx.Node) -> fx.Node:
    """Return what the lengths of a recurrent layer are before they were cast."""
    source: Any = node
    while source.target in _CASTS:
        source = source.args[0]
    return source


class _Lowering:
    def __init__(self, graph: fx.Graph, program: Program, constants: Constants) -> None:
        self.graph = graph
        self.program = program
        self.constants = constants
        self.values: dict[fx.Node, Any] = {}
        self.folded: dict[fx.Node, Folded] = {}
        self.transposes = Transposes(graph)
        self.ends: dict[fx.Node, tuple[fx.Node, int, int]] = {}  # last state -> all of [dirs, N, H], which, how many
        self.layers: list[fx.Node] = []

    def run(self, found: list[fx.Node]) -> None:
        for node in found:
            self._read(node)
        pairs = self._pairs(found)
        for node in found:
            pair = pairs.get(node, (node,))
            if node is max(pair, key=found.index):
                with self.graph.inserting_before(node):
                    if self._has_operator(node):
                        self._layer(pair, node)
                    else:
                        self._scan(node)
        self._join_ends()
        self.transposes.join_directions()
        self.graph.eliminate_dead_code()
        self.transposes.into(self.layers)
        self.graph.lint()

    # reading ---------------------------------------------------------------------------------------------------------

    def _read(self, node: fx.Node) -> None:
        call = Arguments.of(node)
        where = node.meta.get("source") or node.name
        if call.gate is not None or call.cell_gate is not None:
            raise UnsupportedModel(f"{where}: {node.target} still holds gates; strip the gates before lowering")
        if call.training and call.normalised:
            raise UnsupportedModel(
                f"{where}: this recurrent layer normalises with the statistics of each batch, which has no ONNX form; "
                "capture it in evaluation mode"
            )
        held = {name: getattr(call, name) for name in _WEIGHTS}
        with torch.no_grad():
            tensors = {name: self._constant(one, where) for name, one in held.items() if isinstance(one, fx.Node)}
        # what was no weight stays a node, which folding does not look at
        self.folded[node] = fold(Arguments(**{**vars(call), **tensors}))

    def _constant(self, node: fx.Node, where: str) -> Any:
        """Compute what depends on no input."""
        if node not in self.values:
            if node.op == "get_attr":
                self.values[node] = get_tensor(self.program.module(), str(node.target))
            elif node.op == "call_function":
                self.values[node] = run_node(node, lambda arg: self._constant(arg, where))
            else:
                raise UnsupportedModel(
                    f"{where}: the weights of this recurrent layer depend on {node.name}; ONNX takes fixed ones"
                )
        return self.values[node]

    def _pairs(self, found: list[fx.Node]) -> dict[fx.Node, tuple[fx.Node, fx.Node]]:
        """Find the two directions of a layer, (forward, backward) under the name of either."""
        place = {node: index for index, node in enumerate(self.graph.nodes)}
        pairs: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
        for index, first in enumerate(found):
            for second in found[index + 1 :]:
                if first in pairs or second in pairs or not self._one_layer(first, second):
                    continue
                # the pair stands where the second one did: nobody may need the first before
                users = [user for picked in first.users for user in picked.users]
                if all(place[user] > place[second] for user in users):
                    pair = (second, first) if Arguments.of(first).reverse else (first, second)
                    pairs[first] = pairs[second] = pair
        return pairs

    def _has_operator(self, node: fx.Node) -> bool:
        return self.folded[node].plain and self.values[Arguments.of(node).weight_ih].dtype is not torch.float64

    def _one_layer(self, first: fx.Node, second: fx.Node) -> bool:
        one, other = Arguments.of(first), Arguments.of(second)
        left, right = self.folded[first], self.folded[second]
        return (
            one.reverse != other.reverse
            and one.input is other.input
            and (one.cell, one.batch_first) == (other.cell, other.batch_first)
            and self._source(one) is self._source(other)
            and self._has_operator(first)
            and self._has_operator(second)
            and left.recurrence.shape == right.recurrence.shape
        )

    @staticmethod
    def _source(call: Arguments) -> fx.Node | None:
        return None if call.lengths is None else lengths_source(call.lengths)

    # writing ---------------------------------------------------------------------------------------------------------

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def _pick(self, node: fx.Node, index: int) -> fx.Node:
        return self._call(operator.getitem, node, index)

    def _store(self, node: fx.Node, role: str, value: Tensor | None) -> fx.Node | None:
        """Put a tensor into the lowered module, named after the weight that it comes from."""
        if value is None:
            return None
        weight = Arguments.of(node).weight_ih
        path, _, leaf = str(weight.target).rpartition(".") if weight.op == "get_attr" else ("", "", node.name)
        name = f"onnx_{role}_{leaf.removeprefix('weight_ih').strip('_')}".rstrip("_")
        return self.graph.get_attr(self.constants.add(f"{path}.{name}" if path else name, value))

    def _lengths(self, call: Arguments, dtype: torch.dtype) -> fx.Node | None:
        source = self._source(call)
        return None if source is None else self._call(aten.to.dtype, source, dtype)

    def _layer(self, pair: tuple[fx.Node, ...], last: fx.Node) -> None:
        calls, folded = [Arguments.of(node) for node in pair], [self.folded[node] for node in pair]
        lead = calls[0]
        like = self.values[lead.weight_ih]
        parts = of_operation(folded, like)
        stored = [self._store(pair[0], role, part) for role, part in zip("WRB", parts, strict=True)]
        scales = [1.0 if one.scale is None else one.scale for one in folded]
        scaled = any(one.scale is not None for one in folded)
        if scaled and stored[1] is not None:
            self.constants.scales[str(stored[1].target)] = scales
        made = self._call(
            LAYER_OP,
            self.transposes.input(lead),
            *stored,
            self._lengths(lead, torch.int32),
            self._states([call.h0 for call in calls]),
            self._states([call.c0 for call in calls]),
            cell=lead.cell,
            direction="bidirectional" if len(pair) > 1 else "reverse" if lead.reverse else "forward",
            **({"scales": scales} if scaled else {}),
        )
        made.meta = _traced(last)
        self.layers.append(made)
        output = self._pick(made, 0)
        if len(pair) == 1:
            self._substitute(pair[0], 0, self._laid_out(pair[0], output))
        else:
            self._replace_pair(pair, output)
        self._replace_ends(pair, made, 1)
        if lead.cell == "lstm":
            self._replace_ends(pair, made, 2)
        else:
            self._no_cell_states(pair)

    def _scan(self, node: fx.Node) -> None:
        call = Arguments.of(node)
        parts = of_scan(self.folded[node], self.values[call.weight_ih])
        stored = [self._store(node, part, parts.get(part)) for part in PARTS]
        made = self._call(
            SCAN_OP,
            self.transposes.input(call),
            self._lengths(call, torch.int64),
            call.h0,
            call.c0,
            *stored,
            cell=call.cell,
            reverse=call.reverse,
        )
        made.meta = _traced(node)
        self._substitute(node, 0, self._laid_out(node, self._pick(made, 0)))
        self._substitute(node, 1, self._pick(made, 1))
        if call.cell == "lstm":
            self._substitute(node, 2, self._pick(made, 2))
        else:
            self._no_cell_states((node,))

    def _no_cell_states(self, nodes: tuple[fx.Node, ...]) -> None:
        for node in nodes:
            self._substitute(node, 2, self._call(aten.new_zeros.default, node.args[0], [0]))

    def _substitute(self, node: fx.Node, index: int, value: fx.Node) -> None:
        """Let the users of an output read ``value``; what nobody reads is swept out at the end."""
        for user in [user for user in node.users if user.args[1] == index]:
            user.replace_all_uses_with(value)

    def _laid_out(self, node: fx.Node, value: fx.Node) -> fx.Node:
        """Return an output [T, N, ...] as the users of the layer expect it."""
        return self.transposes.turned(value) if Arguments.of(node).batch_first else value

    def _replace_pair(self, pair: tuple[fx.Node, ...], joint: fx.Node) -> None:
        whole = self._laid_out(pair[0], joint)
        picked = [[user for user in node.users if user.args[1] == 0] for node in pair]
        for cat in {user for one in picked[0] for user in one.users if user.target is aten.cat.default}:
            parts: Any = cat.args[0]
            both = len(parts) == 2 and parts[0] in picked[0] and parts[1] in picked[1]
            if both and argument(cat, 1, "dim", 0) in (-1, 2):
                cat.replace_all_uses_with(whole)
                self.graph.erase_node(cat)
        width = self.folded[pair[0]].recurrence.shape[1]
        for direction, node in enumerate(pair):
            start = direction * width
            self._substitute(node, 0, self._call(aten.slice.Tensor, whole, 2, start, start + width))

    def _replace_ends(self, pair: tuple[fx.Node, ...], made: fx.Node, index: int) -> None:
        whole = self._pick(made, index)
        for direction, node in enumerate(pair):
            end = self._call(aten.select.int, whole, 0, direction)
            self.ends[end] = (whole, direction, len(pair))
            self._substitute(node, index, end)

    def _states(self, states: list[Any]) -> fx.Node | None:
        """Bring the first states [N, H] of the directions together, [dirs, N, H]."""
        given = [state for state in states if state is not None]
        if not given:
            return None
        whole = [state if state is not None else self._call(aten.zeros_like.default, given[0]) for state in states]
        picked = [state.args for state in whole if state.target is aten.select.int and state.args[1] == 0]
        if len(picked) == len(whole) and all(args[0] is picked[0][0] for args in picked):
            source, first = picked[0][0], picked[0][2]
            if isinstance(first, int) and first >= 0:
                last = first + len(picked)
                if [args[2] for args in picked] == list(range(first, last)):
                    return self._call(aten.slice.Tensor, source, 0, first, last)
        return self._call(aten.stack.default, whole)

    def _join_ends(self) -> None:
        """Read the last states of whole layers where they are stacked, instead of taking them apart before."""
        for stack in list(self.graph.find_nodes(op="call_function", target=aten.stack.default)):
            parts: Any = stack.args[0]
            if argument(stack, 1, "dim", 0) != 0 or not all(part in self.ends for part in parts):
                continue
            known = [self.ends[part] for part in parts]
            wholes = list(dict.fromkeys(whole for whole, _, _ in known))
            counts = {whole: count for whole, _, count in known}
            if known != [(whole, place, counts[whole]) for whole in wholes for place in range(counts[whole])]:
                continue
            with self.graph.inserting_before(stack):
                made = wholes[0] if len(wholes) == 1 else self._call(aten.cat.default, wholes)
            stack.replace_all_uses_with(made)
            self.graph.erase_node(stack)


def _traced(node: fx.Node) -> dict[str, Any]:
    return {name: node.meta[name] for name in ("source", "stack_trace", "nn_module_stack") if name in node.meta}
