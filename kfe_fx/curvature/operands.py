"""What an operation takes from parameters: nodes that no example reaches, and the parameters behind them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from kfe_fx.labels.registry import overloads
from kfe_fx.program import Program, tied_names

aten = torch.ops.aten

# Every entry of the result is one entry of the input: run on indices they say which.
MOVEMENTS = frozenset(
    overloads(
        aten,
        *("view", "reshape", "_unsafe_view", "flatten.using_ints", "unflatten.int", "transpose.int", "permute", "t"),
        *("numpy_T", "mT", "swapaxes", "movedim.intlist", "movedim.int", "unsqueeze", "squeeze", "squeeze.dim"),
        *("squeeze.dims", "select.int", "slice.Tensor", "unbind.int", "narrow", "split.Tensor", "split_with_sizes"),
        *("chunk", "flip", "roll", "contiguous", "clone", "alias", "expand", "repeat", "tile", "index_select"),
    )
) | {torch.ops.aten.embedding.default, torch.ops.aten.index.Tensor, __import__("operator").getitem}


@dataclass(frozen=True)
class Operand:
    """A value that is the same for all examples, made of parameters.

    ``names`` are the canonical names of the floating-point parameters it depends on, ``movement`` says that it is a
    rearrangement of one of them; ``steps`` are the nodes that make it, in order, the last is its own.
    """

    node: fx.Node
    names: tuple[str, ...]
    movement: bool
    steps: tuple[fx.Node, ...] = field(repr=False)

    @property
    def plain(self) -> bool:
        """Whether it is a parameter as it stands."""
        return len(self.steps) == 1

    def value(self, program: Program, parameters: dict[str, Tensor], inputs: dict[str, Any]) -> Any:
        """Compute it from given parameters (by canonical name) and the flat inputs, of which only sizes are read."""
        known: dict[fx.Node, Any] = {}
        canonical = canonical_names(program)
        for node in self.steps:
            if node.op == "get_attr":
                name = canonical.get(str(node.target), str(node.target))
                known[node] = parameters[name] if name in parameters else program.tensor(name)
            elif node.op == "placeholder":
                known[node] = inputs[str(node.target)]
            else:
                args, kwargs = map_arg((node.args, node.kwargs), lambda arg: known[arg])
                known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return known[self.node]

    def index(self, program: Program, inputs: dict[str, Any]) -> Tensor:
        """Return which entry of its parameter (row-major) each of its entries is, for a movement."""
        (name,) = self.names
        tensor = program.tensor(name)
        entries = torch.arange(tensor.numel(), dtype=torch.float64, device=tensor.device).view(tensor.shape)
        return self.value(program, {name: entries}, inputs).to(torch.int64)


def canonical_names(program: Program) -> dict[str, str]:
    """Map every name of a tensor to its first one."""
    return {name: names[0] for name, names in tied_names(program.module()).items()}


class Operands:
    """Sort the nodes of a graph: which values depend on the examples, which only on parameters and sizes."""

    def __init__(self, program: Program, graph: fx.Graph, trained: set[str]) -> None:
        """Walk the graph; ``trained`` are the canonical names of the parameters that statistics are for."""
        self._canonical = canonical_names(program)
        self._trained = trained
        self._steps: dict[fx.Node, tuple[fx.Node, ...]] = {}
        batch = program.batch_axes()
        self._sized = {
            (name, dim) for name, dims in program.axes.items() for dim, axis in dims.items() if axis not in batch
        }
        self._axes = program.axes
        for node in graph.nodes:
            if node.op == "get_attr":
                self._steps[node] = (node,)
            elif node.op == "call_function" and self._is_fixed(node):
                steps = dict.fromkeys(step for arg in node.all_input_nodes for step in self._parts(arg))
                self._steps[node] = (*steps, node)

    def _is_fixed(self, node: fx.Node) -> bool:
        if _draws(node):
            return False
        if node.target is aten.sym_size.int and isinstance(node.args[0], fx.Node) and node.args[0].op == "placeholder":
            name, dim = str(node.args[0].target), node.args[1]
            return (name, dim) in self._sized or dim not in self._axes.get(name, {})
        return all(arg in self._steps for arg in node.all_input_nodes)

    def _parts(self, arg: fx.Node) -> tuple[fx.Node, ...]:
        return (arg,) if arg.op == "placeholder" else self._steps[arg]

    def fixed(self, node: fx.Node) -> bool:
        """Tell whether a node has the same value for all examples."""
        return node in self._steps

    def of(self, node: fx.Node) -> Operand | None:
        """Return the operand that a fixed node is, or None where no trained parameter is behind it."""
        steps = self._steps.get(node)
        if steps is None:
            return None
        names: list[str] = []
        for step in steps:
            name = self._canonical.get(str(step.target), str(step.target)) if step.op == "get_attr" else ""
            if name in self._trained and name not in names:
                names.append(name)
        if not names:
            return None
        moved = len(names) == 1 and self._is_movement(node)
        return Operand(node, tuple(names), moved, steps)

    def _is_movement(self, node: fx.Node) -> bool:
        while node.op != "get_attr":
            if node.target not in MOVEMENTS:
                return False
            source = node.args[0]
            others = [arg for arg in node.all_input_nodes if arg is not source]
            if not isinstance(source, fx.Node) or any(self.of(other) is not None for other in others):
                return False
            node = source
        return self._canonical.get(str(node.target), str(node.target)) in self._trained


def _draws(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
