"""Find the layers of a network that can be decomposed, and which operations are factors of one layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from kfe_fx import taps
from kfe_fx.cost.multiplications import ANY_CONVOLUTION, CONVOLUTIONS, PRODUCTS, TRANSPOSED, aten
from kfe_fx.lowrank.layers import LINEAR, Found, Layer, Op, base_of
from kfe_fx.program import Program, argument, tied_names
from kfe_fx.shapes import propagate

_PADDED = {aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding}
_PLAIN = CONVOLUTIONS | {LINEAR}


def bare(program: Program) -> Program:
    """Return a Program over the same tensors whose graphs have no taps; nodes keep their names."""
    if not any(taps.tapped(graph) for graph in program.graphs.values()):
        return program
    twin = program.sharing()
    for graph in twin.graphs.values():
        taps.strip(graph)
    return twin


def find_layers(program: Program) -> Found:
    """Find the linear layers and convolutions of a Program, and which of them are factors of one layer.

    Factors are known by structure alone, so that files and other tools may pass them on: an operation without bias
    whose value nothing else reads, in front of another one, one of the two a matrix at each position with stride 1.
    """
    return _Finder(bare(program)).run()


class _Finder:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.canonical = {name: names[0] for name, names in tied_names(program.module()).items()}
        self.nodes = {mode: {node.name: node for node in graph.nodes} for mode, graph in program.graphs.items()}
        sizes = {axis: 1 for dims in program.axes.values() for axis in dims.values() if axis == "batch"}
        self.values = propagate(program, sizes=sizes)
        self.refused: dict[str, str] = {}

    def run(self) -> Found:
        ops = self._ops()
        taken: set[str] = set()
        chains: dict[str, tuple[Op | None, Op, Op | None]] = {}
        # a convolution takes the matrices around it first: what is left over are pairs of matrices
        for core in sorted(ops.values(), key=lambda op: op.pointwise):
            if core.weight in taken:
                continue
            others = [op for op in ops.values() if op is not core and op.weight not in taken and op.pointwise]
            after = next((op for op in others if self._leads(core, op) and self._at_each(op)), None)
            before = None
            if not core.pointwise:
                before = next((op for op in others if self._leads(op, core) and self._at_each(op)), None)
            elif after is None and any(self._leads(op, core) for op in others) and self._at_each(core):
                continue  # the second of two matrices: the first one claims it
            chains[core.weight] = (before, core, after)
            taken |= {op.weight for op in (before, core, after) if op is not None}
        last = self._last()
        order = list(ops)
        layers = [self._layer(*chain, last) for chain in chains.values()]
        return Found(tuple(sorted(layers, key=lambda layer: order.index(layer.core.weight))), self.refused)

    # operations -------------------------------------------------------------------------------------------------------

    def _ops(self) -> dict[str, Op]:
        """Return by weight the operations that can be replaced, in the order of the evaluation graph."""
        uses: dict[str, dict[str, list[fx.Node]]] = {}
        for mode in sorted(self.program.graphs):
            for node in self.program.graphs[mode].nodes:
                reason, weight = self._weight_of(node)
                if reason:
                    self.refused.setdefault(weight, reason)
                elif weight:
                    uses.setdefault(weight, {}).setdefault(mode, []).append(node)
        found: dict[str, Op] = {}
        for weight, nodes in uses.items():
            reason = self._refusal(weight, nodes)
            if reason:
                self.refused[base_of(weight)] = reason
                continue
            names = {mode: tuple(node.name for node in some) for mode, some in nodes.items()}
            found[weight] = Op(weight, tuple(self.program.tensor(weight).shape), names)
        return found

    def _weight_of(self, node: fx.Node) -> tuple[str, str]:
        """Return ("", weight) of a layer, (reason, name) of what is none though it has weights, else ("", "")."""
        if node.op != "call_function":
            return "", ""
        place = 1 if node.target in _PLAIN | TRANSPOSED | ANY_CONVOLUTION else None
        weights = [node.args[place]] if place is not None else []
        if (places := PRODUCTS.get(node.target)) is not None:  # type: ignore[arg-type]
            weights = [arg for each in places if self._is_matrix(arg := node.args[each])]
        read = [arg for arg in weights if isinstance(arg, fx.Node) and arg.op == "get_attr"]
        if not weights:
            return "", ""
        if not read:
            return "its weight is computed in the network", str(node.meta.get("module") or node.name)
        weight = self.canonical.get(str(read[0].target), str(read[0].target))
        kind = str(node.target).removeprefix("aten.").split(".")[0]
        if node.target in _PLAIN:
            return "", weight
        transposed = node.target in TRANSPOSED
        reason = "it is a transposed convolution" if transposed else f"its weight is used by {kind}"
        return f"{reason}; linear layers and convolutions are decomposed", base_of(weight)

    def _is_matrix(self, arg: Any) -> bool:
        if not isinstance(arg, fx.Node) or arg.op != "get_attr":
            return False
        held = self.program.tensor(str(arg.target))
        return isinstance(held, nn.Parameter) and held.dim() > 1

    def _refusal(self, weight: str, nodes: Mapping[str, list[fx.Node]]) -> str:
        """Return why a weight stays as it is, or ""."""
        held = self.program.tensor(weight)
        if "eval" not in nodes:
            return "it runs in training only"
        if not isinstance(held, nn.Parameter) or not held.is_floating_point():
            return "its weight is no parameter of real numbers"
        if held.dim() < 2:
            return "its weight is a vector"
        every = {user for mode in nodes for user in nodes[mode]}
        for mode, graph in self.program.graphs.items():
            for read in graph.find_nodes(op="get_attr"):
                if self.canonical.get(str(read.target)) != weight:
                    continue
                for user in read.users:
                    own = user in every and [arg for arg in user.all_input_nodes if arg is read] == [user.args[1]]
                    if not own or user.args[0] is read or argument(user, 2, "bias") is read:
                        return f"its weight is also read by {user.meta.get('module') or user.name} ({mode} graph)"
        groups = {int(argument(user, 6, "groups", 1)) for user in every if user.target is not LINEAR}
        if groups - {1}:
            return f"it has {max(groups)} groups; convolutions without groups are decomposed"
        return ""

    # chains -----------------------------------------------------------------------------------------------------------

    def _pairs(self, one: Op, other: Op) -> Iterator[tuple[fx.Node, fx.Node]]:
        for mode, names in one.nodes.items():
            for name, follower in zip(names, other.nodes[mode], strict=True):
                yield self.nodes[mode][name], self.nodes[mode][follower]

    def _leads(self, one: Op, other: Op) -> bool:
        """Tell whether one operation, without bias, goes into another and nowhere else, wherever the two run."""
        counts = [{mode: len(names) for mode, names in op.nodes.items()} for op in (one, other)]
        if counts[0] != counts[1] or len(one.shape) != len(other.shape) or one.shape[0] != other.shape[1]:
            return False
        return all(
            list(node.users) == [user] and user.args[0] is node and argument(node, 2, "bias") is None
            for node, user in self._pairs(one, other)
        )

    def _at_each(self, op: Op) -> bool:
        """Tell whether an operation is one matrix at each position, and leaves none out."""
        if not op.pointwise:
            return False
        for mode, names in op.nodes.items():
            for node in (self.nodes[mode][name] for name in names):
                if node.target is LINEAR:
                    continue
                stride, padding = argument(node, 3, "stride", 1), argument(node, 4, "padding", 0)
                if node.target not in _PADDED and _numbers(padding) - {0}:
                    return False
                if _numbers(stride) - {1}:
                    return False
        return True

    def _layer(self, before: Op | None, core: Op, after: Op | None, last: set[str]) -> Layer:
        layer = Layer("", core, before, after, {})
        bases = [base_of(op.weight) for op in layer.ops]
        stem = bases[0].rpartition(".")[0]
        numbered = len(bases) > 1 and stem and bases == [f"{stem}.{place}" for place in range(len(bases))]
        made = [self.nodes["eval"][name] for name in core.nodes["eval"]]
        outputs = sum(self.values[node].numel() // core.shape[0] for node in made)
        inputs = sum(self.values[node.args[0]].numel() // core.shape[1] for node in made)  # type: ignore[index]
        makes = bool(last & set(layer.ops[-1].nodes["eval"]))
        return replace(
            layer,
            name=stem if numbered else base_of(core.weight),
            positions={"before": inputs, "core": outputs, "after": outputs},
            last=makes,
        )

    def _last(self) -> set[str]:
        """Return the names of the layers that make the outputs: between the two are no norm, sum or other layer."""
        graph = self.program.graphs["eval"]
        waiting = [arg for node in graph.find_nodes(op="output") for arg in node.all_input_nodes]
        found: set[str] = set()
        while waiting:
            node = waiting.pop()
            if node.target in _PLAIN:
                found.add(node.name)
            behind = [arg for arg in node.all_input_nodes if self._is_tensor(arg)]
            layer = node.target in _PLAIN | TRANSPOSED | ANY_CONVOLUTION or "norm" in str(node.target)
            if node.op == "call_function" and not layer and len(behind) == 1:
                waiting += behind
        return found

    def _is_tensor(self, node: fx.Node) -> bool:
        return node.op != "get_attr" and isinstance(self.values.get(node), torch.Tensor | list | tuple)


def _numbers(value: Any) -> set[int]:
    return {int(each) for each in value} if isinstance(value, list | tuple) else {int(value)}
