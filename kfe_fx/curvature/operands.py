"""What an operation takes from parameters: nodes that no example reaches, and the parameters behind them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from kfe_fx.labels.registry import overloads
from kfe_fx.program import Program, argument, run_node, tied_names

aten = torch.ops.aten

# Every entry of the result is one entry of the input: run on indices they say which.
MOVEMENTS = frozenset(
    overloads(
        aten,
        *("view", "reshape", "_unsafe_view", "flatten.using_ints", "unflatten.int", "transpose.int", "permute", "t"),
        *("numpy_T", "mT", "swapaxes", "movedim.intlist", "movedim.int", "unsqueeze", "squeeze", "squeeze.dim"),
        *("squeeze.dims", "select.int", "slice.Tensor", "unbind.int", "narrow", "split.Tensor", "split_with_sizes"),
        *("chunk", "flip", "roll", "contiguous", "clone", "alias", "expand", "expand_as", "repeat", "tile"),
        *("dropout", "feature_dropout", "alpha_dropout"),  # what draws is not the same for all examples
        *("index_select", "view_as", "reshape_as", "repeat_interleave.self_int", "embedding", "index.Tensor"),
    )
) | {operator.getitem}


# What takes a shape or a value and passes no gradient on.
UNREACHED = frozenset(
    overloads(
        aten,
        *("detach", "new_ones", "new_zeros", "new_full", "new_empty"),
        *("ones_like", "zeros_like", "full_like", "empty_like"),
    )
)


@dataclass(frozen=True)
class Operand:
    """A value that is the same for all examples, made of parameters.

    ``names`` are the canonical names of the floating-point parameters it depends on, ``movement`` says that it is a
    rearrangement of one of them; ``steps`` are the nodes that make it, in order, the last is its own; ``sized`` are the
    nodes outside of them that only a size is taken from.
    """

    node: fx.Node
    names: tuple[str, ...]
    movement: bool
    steps: tuple[fx.Node, ...] = field(repr=False)
    sized: tuple[fx.Node, ...] = field(repr=False)
    canonical: Mapping[str, str] = field(repr=False, compare=False)

    @property
    def plain(self) -> bool:
        """Whether it is a parameter as it stands."""
        return len(self.steps) == 1

    @property
    def constant(self) -> bool:
        """Whether its shape is the same for all inputs."""
        return not self.sized

    def value(self, program: Program, parameters: Mapping[str, Tensor], sized: Mapping[fx.Node, Any]) -> Any:
        """Compute it from given parameters (by canonical name) and the nodes that sizes are taken from."""
        known: dict[fx.Node, Any] = {node: sized[node] for node in self.sized}
        for node in self.steps:
            if node.op == "get_attr":
                name = self.canonical.get(str(node.target), str(node.target))
                known[node] = parameters[name] if name in parameters else program.tensor(name).detach()
            else:
                known[node] = run_node(node, known.__getitem__)
        return known[self.node]

    def index(self, program: Program, sized: Mapping[fx.Node, Any] | None = None) -> Tensor:
        """Return which entry of its parameter (row-major) each of its entries is, for a movement."""
        (name,) = self.names
        tensor = program.tensor(name)
        entries = torch.arange(tensor.numel(), dtype=torch.float64, device=tensor.device).view(tensor.shape)
        return self.value(program, {name: entries}, sized or {}).to(torch.int64)


def canonical_names(program: Program) -> dict[str, str]:
    """Map every name of a tensor to its first one."""
    return {name: names[0] for name, names in tied_names(program.module()).items()}


class Operands:
    """Sort the nodes of a graph: which values depend on the examples, which only on parameters and sizes."""

    def __init__(
        self, program: Program, graph: fx.Graph, trained: set[str], counts: Callable[[fx.Node, int], bool]
    ) -> None:
        """Walk the graph.

        Args:
            program: whose graph it is.
            graph: one of its graphs.
            trained: canonical names of the parameters that statistics are for.
            counts: whether the size of a node along a dim may depend on the number of examples.
        """
        self._canonical = canonical_names(program)
        self._trained = trained
        self._steps: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self._reached: dict[fx.Node, tuple[str, ...]] = {}  # names of tensors that a gradient comes to
        self._sized: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self._found: dict[fx.Node, Operand | None] = {}
        for node in graph.nodes:
            if node.op == "get_attr":
                self._steps[node], self._sized[node] = (node,), ()
                self._reached[node] = (self._name(node),)
            elif node.op == "call_function" and not draws(node):
                self._follow(node, counts)

    def _follow(self, node: fx.Node, counts: Callable[[fx.Node, int], bool]) -> None:
        args = node.all_input_nodes
        if node.target is aten.sym_size.int and args[0] not in self._steps:
            if not counts(args[0], int(node.args[1])):  # type: ignore[arg-type]
                self._steps[node], self._sized[node] = (node,), (args[0],)
                self._reached[node] = ()
        elif all(arg in self._steps for arg in args):
            self._steps[node] = (*dict.fromkeys(step for arg in args for step in self._steps[arg]), node)
            self._sized[node] = tuple(dict.fromkeys(size for arg in args for size in self._sized[arg]))
            found = dict.fromkeys(name for arg in args for name in self._reached[arg])
            self._reached[node] = () if node.target in UNREACHED else tuple(found)

    def fixed(self, node: fx.Node) -> bool:
        """Tell whether a node has the same value for all examples."""
        return node in self._steps

    def sized(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """Return the nodes that a fixed node takes a size from, and nothing else."""
        return self._sized[node]

    def of(self, node: fx.Node) -> Operand | None:
        """Return the operand that a fixed node is, or None where no trained parameter is behind it."""
        if node not in self._steps:
            return None
        if node not in self._found:
            self._found[node] = self._operand(node)
        return self._found[node]

    def _operand(self, node: fx.Node) -> Operand | None:
        steps = self._steps[node]
        names = tuple(name for name in self._reached[node] if name in self._trained)
        if not names:
            return None
        moved = len(names) == 1 and self._is_movement(node)
        return Operand(node, names, moved, steps, self._sized[node], self._canonical)

    def _name(self, node: fx.Node) -> str:
        return self._canonical.get(str(node.target), str(node.target))

    def _is_movement(self, node: fx.Node) -> bool:
        while node.op != "get_attr":
            source = node.args[0]
            if node.target not in MOVEMENTS or not isinstance(source, fx.Node) or _skips(node):
                return False
            if any(self.of(other) is not None for other in node.all_input_nodes if other is not source):
                return False
            node = source
        return self._name(node) in self._trained


def draws(node: fx.Node) -> bool:
    """Tell whether an operation draws random numbers."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    given = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
    given |= dict(zip([argument.name for argument in arguments], node.args, strict=False)) | node.kwargs
    off = any(given.get(name) is False for name in ("train", "training"))
    return not off and not any(given.get(name) == 0 for name in ("p", "dropout", "dropout_p"))


def _skips(node: fx.Node) -> bool:
    """Tell whether a look-up has a row, for padding, or a scale that gradients do not see as they are."""
    if node.target is not aten.embedding.default:
        return False
    return argument(node, 2, "padding_idx", -1) != -1 or bool(argument(node, 3, "scale_grad_by_freq", False))
