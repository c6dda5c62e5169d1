"""Hard concrete gates folded into weights: the test gates become part of the parameters that make what they multiply.

    zhat_c (sum_k W_ck x_k + b_c) = sum_k (zhat_c W_ck) x_k + zhat_c b_c

and likewise what a norm scales and shifts by.

The columns of a recurrent weight take those of the states it reads. A parameter is scaled once, and only where all that
reads it, in both graphs, is gated alike; any other gate becomes a product with a constant buffer, which the label
analysis and ONNX know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from kfe_fx import taps
from kfe_fx.gates import GATE
from kfe_fx.hard_concrete import HARD_CONCRETE, MODULE, forget, gate_at_test, learned
from kfe_fx.labels.registry import overloads
from kfe_fx.program import Program, get_tensor, put_tensor, tied_names
from kfe_fx.shapes import propagate_all

aten = torch.ops.aten

MULTIPLIER = f"{MODULE}.multiplier_"

# operation -> (place, name, dim) of each parameter that its last dim comes from; the first one is a matrix
_PRODUCTS: dict[Any, tuple[tuple[int, str, int], ...]] = {
    aten.linear.default: ((1, "weight", 0), (2, "bias", 0)),
    aten.matmul.default: ((1, "other", 1),),
    aten.mm.default: ((1, "mat2", 1),),
    aten.addmm.default: ((2, "mat2", 1), (0, "self", 0)),
    aten.embedding.default: ((0, "weight", 1),),
}
_CONVOLUTIONS = overloads(aten, *(f"conv{n}d.{kind}" for n in (1, 2, 3) for kind in ("default", "padding")))
_TRANSPOSED = overloads(aten, "conv_transpose1d.default", "conv_transpose2d.input", "conv_transpose3d.input")
_NORMS = {aten.batch_norm.default: 1, aten.instance_norm.default: 1, aten.group_norm.default: 2}


@dataclass(frozen=True)
class _Scale:
    """What one gate multiplies: index i along ``dim`` by ``index[i]`` of a group's gates (-1: by one)."""

    group: int
    dim: int
    index: tuple[int, ...]


@dataclass(frozen=True)
class _Part:
    """A parameter that takes a scale along ``dim``, which holds one of ``groups`` equal parts of the channels."""

    held: fx.Node
    dim: int
    scale: _Scale
    groups: int = 1

    @property
    def claim(self) -> tuple[int, int, _Scale]:
        """What becomes of the parameter."""
        return self.dim, self.groups, self.scale

    def scaled(self, value: Tensor, by: Tensor) -> Tensor:
        """Return a parameter times ``by``, [channels]."""
        by = by.to(value.device, value.dtype)
        if self.groups == 1:
            return value * by.reshape([-1 if dim == self.dim else 1 for dim in range(value.dim())])
        split = value.reshape(self.groups, -1, *value.shape[1:])  # [groups, inputs of one, outputs of one, ...]
        return (split * by.reshape(self.groups, 1, -1, *[1] * (value.dim() - 2))).reshape(value.shape)


@dataclass(frozen=True)
class _Base:
    """A value that is gated, the gates on it (the innermost first) and what they multiply."""

    mode: str
    node: fx.Node
    gates: list[fx.Node]
    scales: list[_Scale]

    @property
    def key(self) -> tuple[str, str]:
        """The graph and the innermost gate."""
        return self.mode, self.gates[0].name

    @property
    def reader(self) -> tuple[str, str]:
        """The graph and what reads the parameters: the operation, or the gate on a parameter itself."""
        return self.key if self.node.op == "get_attr" else (self.mode, self.node.name)


_Claim = tuple[tuple[int, int, _Scale], ...]


def fold(program: Program) -> dict[str, list[str]]:
    """Fold the hard concrete gates of a Program, in place: its evaluation graph computes what it did.

    Returns:
        ``folded`` and ``explicit``: names of the gated nodes of the evaluation graph. Explicit gates that are one
        everywhere leave nothing behind.
    """
    folding = _Folding(program)
    folding.run()
    forget(program)
    for graph in program.graphs.values():
        graph.lint()
    program.module().recompile()
    return folding.facts


def drop_ones(program: Program) -> int:
    """Take out, in place, the products with buffers of ``fold`` that are one everywhere; return how many."""
    module, count = program.module(), 0
    for graph in program.graphs.values():
        for held in [node for node in graph.find_nodes(op="get_attr") if str(node.target).startswith(MULTIPLIER)]:
            if not bool((get_tensor(module, str(held.target)) == 1).all()):
                continue
            for user in list(held.users):
                user.replace_all_uses_with(user.args[0])  # type: ignore[arg-type]
                graph.erase_node(user)
                count += 1
            graph.erase_node(held)
    read = {str(node.target) for graph in program.graphs.values() for node in graph.find_nodes(op="get_attr")}
    held_by = module._modules.get(MODULE)
    if held_by is not None:
        for name in [name for name in held_by._buffers if f"{MODULE}.{name}" not in read]:
            del held_by._buffers[name]
        if not held_by._buffers:
            del module._modules[MODULE]
    module.recompile()
    return count


class _Folding:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.gates = {group: gate_at_test(value.detach()) for group, value in learned(program).items()}
        self.canonical = {name: names[0] for name, names in tied_names(program.module()).items()}
        self.fakes = propagate_all(program, sorted(program.graphs))
        self.bases = [base for mode, graph in program.graphs.items() for base in self._bases(mode, graph)]
        self.facts: dict[str, list[str]] = {"folded": [], "explicit": []}
        self.buffers: dict[Any, str] = {}

    def run(self) -> None:
        parts = self._foldable()
        with torch.no_grad():
            scaled: set[str] = set()
            for found in parts.values():
                for name in dict.fromkeys(self._name(part.held) for part in found):
                    if name not in scaled:  # the same elsewhere
                        value = get_tensor(self.program.module(), name)
                        for part in found:
                            if self._name(part.held) == name:
                                value.copy_(part.scaled(value, self._by(part.scale)))
                        scaled.add(name)
        for base in self.bases:
            folded = base.key in parts
            if base.mode == "eval":
                self.facts["folded" if folded else "explicit"].append(base.node.name)
            for gate, scale in zip(base.gates, base.scales, strict=True):
                self._replace(base, gate, None if folded else scale)
        for graph in self.program.graphs.values():
            for node in graph.find_nodes(op="call_function", target=HARD_CONCRETE):
                source: Any = node.args[0]
                graph.erase_node(node)
                graph.erase_node(source)

    # finding ---------------------------------------------------------------------------------------------------------

    def _bases(self, mode: str, graph: fx.Graph) -> list[_Base]:
        found: list[_Base] = []
        for node in graph.find_nodes(op="call_function", target=GATE):
            source: Any = node.args[0]
            base = next((one for one in found if source is one.gates[-1]), None)  # several gates on one value
            if base is None:
                base = _Base(mode, source, [], [])
                found.append(base)
            base.gates.append(node)
            base.scales.append(self._scale_of(mode, node))
        return found

    def _scale_of(self, mode: str, node: fx.Node) -> _Scale:
        given: Any = node.args[1]
        group = int(str(given.args[0].target).split(".")[1])
        dim = int(node.args[2])  # type: ignore[arg-type]
        index: Any = node.args[3] if len(node.args) > 3 else None
        size = int(self.fakes[mode][node].shape[dim])
        return _Scale(group, dim, tuple(range(size) if index is None else index))

    def _by(self, scale: _Scale) -> Tensor:
        """Return what a scale multiplies by, [size of its dim]."""
        gates = self.gates[scale.group]
        index = torch.tensor(scale.index, device=gates.device)
        return torch.where(index < 0, 1.0, gates[index.clamp(min=0)])

    def _name(self, held: fx.Node) -> str:
        return self.canonical[str(held.target)]

    # folding ---------------------------------------------------------------------------------------------------------

    def _foldable(self) -> dict[tuple[str, str], list[_Part]]:
        """Return by key the parameters that take the gates of each value that can be folded."""
        parts = {base.key: found for base in self.bases if (found := self._parts(base)) is not None}
        while True:
            claims: dict[str, dict[tuple[str, str], _Claim]] = {}
            for base in self.bases:
                for part in parts.get(base.key, ()):
                    claimed = claims.setdefault(self._name(part.held), {})
                    claimed[base.reader] = (*claimed.get(base.reader, ()), part.claim)
            stuck = {name for name, claimed in claims.items() if not self._is_whole(name, claimed)}
            lost = [key for key, found in parts.items() if any(self._name(part.held) in stuck for part in found)]
            if not lost:
                return parts
            for key in lost:
                del parts[key]

    def _is_whole(self, name: str, claimed: dict[tuple[str, str], _Claim]) -> bool:
        """Tell whether all that reads a parameter is gated, and alike."""
        if len(set(claimed.values())) != 1:
            return False
        for mode, graph in self.program.graphs.items():
            for held in graph.find_nodes(op="get_attr"):
                if self.canonical.get(str(held.target)) != name:
                    continue
                for user in taps.users_of(held):
                    if user.target is aten.sym_size.int:
                        continue
                    if (mode, user.name) not in claimed or _times(user, held) != 1:
                        return False
        return True

    def _parts(self, base: _Base) -> list[_Part] | None:
        """Return the parameters that a value takes its channels from, for each gate, or None where there are others."""
        found: list[_Part] = []
        for scale in base.scales:
            made = self._made_by(base, scale)
            if not made or any(part.held.op != "get_attr" for part in made):
                return None
            found += made
        return found

    def _made_by(self, base: _Base, scale: _Scale) -> list[_Part]:
        node, fakes = base.node, self.fakes[base.mode]
        if node.op == "get_attr":
            return [_Part(node, scale.dim, scale)]
        target: Any = node.target
        rank, groups = fakes[node].dim(), 1
        if target in _PRODUCTS:
            places = _PRODUCTS[target]
            channel, wanted = rank - 1, 2
        elif target in _CONVOLUTIONS or target in _TRANSPOSED:
            places = ((1, "weight", 1 if target in _TRANSPOSED else 0), (2, "bias", 0))
            groups = int(_given(node, 6, "groups") or 1) if target in _TRANSPOSED else 1
            wanted = None
            kernel: Any = node.args[1]
            channel = rank - fakes[kernel].dim() + 1
        elif target in _NORMS:
            first = _NORMS[target]
            places = ((first, "weight", 0), (first + 1, "bias", 0))
            channel, wanted = 1, 1
        else:
            return []
        (weight, dim), *others = ((_given(node, place, name), dim) for place, name, dim in places)
        others = [(held, dim) for held, dim in others if isinstance(held, fx.Node)]
        if (
            not isinstance(weight, fx.Node)
            or scale.dim != channel
            or fakes[weight].dim() != (wanted or fakes[weight].dim())
        ):
            return []
        if any(fakes[held].dim() != 1 for held, _ in others):
            return []
        return [_Part(weight, dim, scale, groups), *(_Part(held, dim, scale) for held, dim in others)]

    def _replace(self, base: _Base, gate: fx.Node, scale: _Scale | None) -> None:
        """Put a product with a buffer where a gate is, or nothing."""
        graph, source = gate.graph, gate.args[0]
        if scale is not None:
            by = self._by(scale)
            if not bool((by == 1).all()):
                with graph.inserting_before(gate):
                    held = graph.create_node("get_attr", self._buffer(scale, by, self.fakes[base.mode][gate]))
                    made = graph.call_function(aten.mul.Tensor, (source, held))
                made.meta, source = dict(gate.meta), made
        gate.replace_all_uses_with(source)  # type: ignore[arg-type]
        graph.erase_node(gate)

    def _buffer(self, scale: _Scale, by: Tensor, fake: Tensor) -> str:
        shape = (len(by), *[1] * (fake.dim() - scale.dim - 1))
        dtype = fake.dtype.to_real()
        key = (scale.group, scale.index, shape, dtype)
        if key not in self.buffers:
            name = self.buffers[key] = f"{MULTIPLIER}{len(self.buffers)}"
            put_tensor(self.program.module(), name, by.to(dtype).reshape(shape).clone())
        return self.buffers[key]


def _given(node: fx.Node, place: int, name: str) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name)


def _times(user: fx.Node, held: fx.Node) -> int:
    """Count how often an operation takes a value."""
    found: list[fx.Node] = []
    map_arg((user.args, user.kwargs), lambda arg: found.append(arg) if arg is held else None)
    return len(found)
