"""Recurrent layers while a network is traced: each stands as an opaque operation that keeps its length symbolic.

``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` get another ``forward`` for as long as the trace runs; so do the functions that
pack and unpack padded batches, whose code is exchanged because networks import them by name. The network is left as
it was.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import rnn

from kfe_fx.errors import UnsupportedModel
from kfe_fx.program import argument
from kfe_fx.recurrent.op import CELL_OPS, OPAQUE
from kfe_fx.recurrent.sequences import valid_steps

aten = torch.ops.aten

LAYERS = (nn.LSTM, nn.GRU, nn.RNN)
TRIMS = (
    "a packed sequence is unpacked to the length that was packed, where the source trims to the longest sequence: feed "
    "batches whose longest sequence fills the padding, or give pad_packed_sequence a total_length"
)
_said: list[list[str]] = []  # what whoever traces now is told


class Padded(rnn.PackedSequence):
    """What stands for a packed sequence while a network is traced: the padded batch and its lengths."""

    value: Tensor
    lengths: Tensor
    batch_first: bool
    clean: bool

    def __new__(cls, value: Tensor, lengths: Tensor, batch_first: bool, *, clean: bool = False) -> Padded:
        """Hold a padded batch; ``clean``: its padding is zero."""
        made = tuple.__new__(cls, (None, None, None, None))
        made.value, made.lengths, made.batch_first, made.clean = value, lengths, batch_first, clean
        return made

    def __getattribute__(self, name: str) -> Any:
        """Refuse what only the packed form has."""
        if name in ("data", "batch_sizes", "sorted_indices", "unsorted_indices"):
            raise UnsupportedModel(
                f"the {name} of a packed sequence is read; unpack it with pad_packed_sequence before other operations"
            )
        return super().__getattribute__(name)


def pack(input: Tensor, lengths: Any, batch_first: bool = False, enforce_sorted: bool = True) -> Padded:
    """Stand for ``pack_padded_sequence``; the order of the batch does not matter here."""
    lengths = torch.as_tensor(lengths) if not isinstance(lengths, Tensor) else lengths
    return Padded(input, lengths.to(torch.int64), batch_first)


def unpack(
    sequence: Any, batch_first: bool = False, padding_value: float = 0.0, total_length: Any = None
) -> tuple[Tensor, Tensor]:
    """Stand for ``pad_packed_sequence``: the result has the length of what was packed, or ``total_length``."""
    if total_length is None and TRIMS not in _said[-1]:
        _said[-1].append(TRIMS)
    value, time_dim = sequence.value, 1 if sequence.batch_first else 0
    steps = value.shape[time_dim]
    if padding_value != 0.0 or not sequence.clean:
        valid = valid_steps(sequence.lengths, steps)  # [N, T]
        valid = (valid if sequence.batch_first else valid.t()).unsqueeze(-1)
        value = torch.where(valid, value, padding_value)
    if total_length is not None and total_length != steps:
        sides = (0, 0, 0, total_length - steps) if time_dim == 1 else (0, 0, 0, 0, 0, total_length - steps)
        value = F.pad(value, sides, value=padding_value)
    if sequence.batch_first != batch_first:
        value = value.transpose(0, 1)
    return value, sequence.lengths


def _pack_in_place(input, lengths, batch_first=False, enforce_sorted=True):  # lends its code
    from kfe_fx.frontend.recurrent import pack

    return pack(input, lengths, batch_first, enforce_sorted)


def _unpack_in_place(sequence, batch_first=False, padding_value=0.0, total_length=None):
    from kfe_fx.frontend.recurrent import unpack

    return unpack(sequence, batch_first, padding_value, total_length)


def has_recurrent_layers(module: nn.Module) -> bool:
    """Tell whether a network has layers that ``opaque_layers`` stands in for."""
    return any(isinstance(child, LAYERS) for child in module.modules())


@contextmanager
def opaque_layers() -> Iterator[list[str]]:
    """Let recurrent layers, also those that a subclass calls as its super, be traced as opaque operations.

    Yields a list that gets a note of what the traced network does differently.
    """
    _said.append([])
    codes: list[tuple[Any, types.CodeType]] = []
    forwards = [(layer, layer.forward) for layer in LAYERS]
    try:
        for function, lent in ((rnn.pack_padded_sequence, _pack_in_place), (rnn.pad_packed_sequence, _unpack_in_place)):
            codes.append((function, function.__code__))
            function.__code__ = lent.__code__
        for layer in LAYERS:
            layer.forward = _forward  # type: ignore[method-assign]
        yield _said[-1]
    finally:
        _said.pop()
        for layer, forward in forwards:
            layer.forward = forward  # type: ignore[method-assign]
        for function, code in codes:
            function.__code__ = code


def _forward(self: Any, input: Any, hx: Any = None) -> Any:
    lengths = input.lengths if isinstance(input, Padded) else None
    value = input.value if isinstance(input, Padded) else input
    batch_first = input.batch_first if isinstance(input, Padded) else self.batch_first
    single = value.dim() == 2  # one sequence, no batch
    if value.dim() not in (2, 3):
        raise ValueError(f"{type(self).__name__}: expected input of 2 or 3 dims, got {value.dim()}")
    if single:
        value, batch_first = value.unsqueeze(1), False
    states = None if hx is None else tuple(hx) if self.mode == "LSTM" else (hx,)
    if states is not None and single:
        states = tuple(state.unsqueeze(1) for state in states)
    output, ends = _stack(self, value, states, lengths, batch_first)
    if single:
        output, ends = output.squeeze(1), [end.squeeze(1) for end in ends]
    made = output if lengths is None else Padded(output, lengths, batch_first, clean=True)
    return made, tuple(ends) if self.mode == "LSTM" else ends[0]


def _stack(
    layer: Any, value: Tensor, states: tuple[Tensor, ...] | None, lengths: Tensor | None, batch_first: bool
) -> tuple[Tensor, list[Tensor]]:
    directions = 2 if layer.bidirectional else 1
    cell = layer.mode.lower()  # a key of CELLS
    ends: list[list[Tensor]] = [[], []]
    for depth in range(layer.num_layers):
        outputs = []
        for direction in range(directions):
            place = depth * directions + direction
            first = [None, None] if states is None else [*(state[place] for state in states), None][:2]
            weights = _weights(layer, f"_l{depth}{'_reverse' if direction else ''}")
            found = OPAQUE(value, *first, *weights, lengths, cell=cell, reverse=direction == 1, batch_first=batch_first)
            outputs.append(found[0])
            ends[0].append(found[1])
            ends[1].append(found[2])
        value = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        if layer.dropout and depth + 1 < layer.num_layers:
            value = F.dropout(value, layer.dropout, layer.training)
    return value, [torch.stack(end) for end in (ends if cell == "lstm" else ends[:1])]


def _weights(layer: Any, suffix: str) -> list[Tensor | None]:
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    return [getattr(layer, name + suffix, None) for name in names]


def simplify_states(graph: fx.Graph) -> None:
    """Read the states of single layers and directions directly where they are picked out of a stack, in place.

    Layers of different widths cannot be stacked, and mostly one asks for the last one alone.
    """
    for stack in graph.find_nodes(op="call_function", target=aten.stack.default):
        parts = stack.args[0]
        if argument(stack, 1, "dim", 0) != 0:
            continue
        for user in list(stack.users):
            if user.target is aten.select.int and argument(user, 1, "dim", 0) == 0 and isinstance(user.args[2], int):
                user.replace_all_uses_with(parts[user.args[2]])
                graph.erase_node(user)
            elif user.target is aten.slice.Tensor and (some := _sliced(user, parts)):
                with graph.inserting_before(user):
                    fewer = graph.call_function(aten.stack.default, (some,))
                fewer.meta = dict(user.meta)
                user.replace_all_uses_with(fewer)
                graph.erase_node(user)


def _sliced(node: fx.Node, parts: Any) -> list[fx.Node]:
    bounds = [argument(node, place, name) for place, name in ((2, "start"), (3, "end"), (4, "step"))]
    plain = all(bound is None or isinstance(bound, int) for bound in bounds)
    return list(parts)[slice(*bounds)] if plain and argument(node, 1, "dim", 0) == 0 else []


def loops_of_cells(graph: fx.Graph) -> list[str]:
    """Describe the cells that a network steps through in Python: what is captured is the traced number of steps."""
    steps: dict[tuple[str, str], list[fx.Node]] = {}
    for node in graph.nodes:
        if node.target in CELL_OPS:
            weight = node.args[2]
            name = str(getattr(weight, "target", "")).rpartition(".")[0] or node.name
            kind = CELL_OPS[node.target].partition("_")[0].upper()
            steps.setdefault((f"nn.{kind}Cell", name), []).append(node)
    return [
        f"{kind} {name} ({nodes[0].meta.get('source') or nodes[0].name}) runs {len(nodes)} steps: captured as one tied "
        f"layer at that length; call {kind.removesuffix('Cell')} on the sequence for a dynamic one"
        for (kind, name), nodes in steps.items()
        if len(nodes) > 1
    ]


def axes_of_sequences(exported: Any, names: tuple[str, ...], shapes: list[torch.Size]) -> dict[str, dict[int, str]]:
    """Name the dims of the inputs that recurrent layers count sequences ("batch") and steps ("time") by.

    Where sequences are made of both (the rows of each image), dim 0 counts examples and the others time.
    """
    sizes: dict[str, list[Any]] = {"time": [], "batch": []}
    for node in _opaque_nodes(exported.graph_module):
        value: Any = node.args[0]
        shape, steps = value.meta["val"].shape, 1 if node.kwargs.get("batch_first", True) else 0
        sizes["time"].append(shape[steps])
        sizes["batch"].append(shape[1 - steps])
    within = {role: {symbol for size in held for symbol in _symbols(size)} for role, held in sizes.items()}
    whole = {str(size) for size in sizes["batch"] if not isinstance(size, int)}
    found: dict[str, dict[int, str]] = {}
    by_symbol: dict[str, str] = {}
    taken: dict[str, int] = {}
    for name, shape in zip(names, shapes, strict=True):
        for dim, size in enumerate(shape):
            symbol = str(size)
            if isinstance(size, int) or symbol not in within["time"] | within["batch"]:
                continue
            if symbol not in by_symbol:
                counts = symbol in within["batch"] and (dim == 0 or symbol in whole)
                role = "batch" if counts else "time" if symbol in within["time"] else f"{name}_{dim}"
                taken[role] = taken.get(role, -1) + 1
                by_symbol[symbol] = role if not taken[role] else f"{role}_{taken[role]}"
            found.setdefault(name, {})[dim] = by_symbol[symbol]
    return found


def _opaque_nodes(module: fx.GraphModule) -> Iterator[fx.Node]:
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            yield from part.graph.find_nodes(op="call_function", target=OPAQUE)


def _symbols(size: Any) -> list[str]:
    return [] if isinstance(size, int) else sorted(str(symbol) for symbol in size.node.expr.free_symbols)


def candidates(shapes: list[torch.Size]) -> list[Callable[[int, int], bool]]:
    """Return, the boldest first, which dims (tensor, dim) may be dynamic; a dim of size 1 may be a channel."""
    return [
        lambda tensor, dim: dim == 0 or shapes[tensor][dim] > 1 or (dim == 1 and len(shapes[tensor]) <= 3),
        lambda tensor, dim: dim == 0 or shapes[tensor][dim] > 1,
    ]
