"""Transposes around recurrent layers: ONNX counts steps first, networks often sequences; between layers none stays."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from kfe_fx.recurrent.op import Arguments

aten = torch.ops.aten

# what keeps values and shape
SAME = {aten.clone.default, aten.alias.default, aten.detach.default, aten.contiguous.default}
# what acts on each element of operands that are laid out alike
_ELEMENTWISE = {
    aten.relu.default, aten.tanh.default, aten.sigmoid.default, aten.gelu.default, aten.silu.default,
    aten.leaky_relu.default, aten.elu.default, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor,
}  # fmt: skip


class Transposes:
    """What of a graph is known with steps first, [T, N, ...], by the node that holds it as [N, T, ...]."""

    def __init__(self, graph: fx.Graph) -> None:
        """Know nothing yet."""
        self.graph = graph
        self.steps_first: dict[fx.Node, fx.Node] = {}

    def turned(self, value: fx.Node) -> fx.Node:
        """Transpose [T, N, ...] to [N, T, ...], and remember it."""
        made = self.graph.call_function(aten.transpose.int, (value, 0, 1))
        self.steps_first[made] = value
        return made

    def input(self, call: Arguments) -> fx.Node:
        """Return the input of a layer, [T, N, I]."""
        if call.batch_first:
            return self._known(call.input) or self.graph.call_function(aten.transpose.int, (call.input, 0, 1))
        before = _transposed(call.input)
        return (self._known(before) if before is not None else None) or call.input

    def _known(self, value: Any, *, sequence: bool = True) -> fx.Node | None:
        """Return ``value`` [N, T, ...] as [T, N, ...] where that takes no transpose, else None.

        ``sequence``: it has three dims for certain; what stands beside a sequence may have fewer.
        """
        if not isinstance(value, fx.Node) or value in self.steps_first:
            return self.steps_first.get(value)
        if any(user.args and user.args[0] is value and _mutates(user) for user in value.users):
            return None
        made = None
        with self.graph.inserting_after(value):
            if value.target in SAME or (value.target is aten.dropout.default and value.args[2:] == (False,)):
                made = self._known(value.args[0], sequence=sequence)
            elif sequence and (before := _transposed(value)) is not None:
                made = before
            elif value.target in _ELEMENTWISE:
                operands = {arg: self._known(arg, sequence=False) for arg in value.all_input_nodes}
                if all(operands.values()):
                    made = self.graph.node_copy(value, lambda arg: operands[arg])  # type: ignore[return-value]
            elif value.target is aten.cat.default and value.args[1:] in ((-1,), (2,)):
                parts = [self._known(part, sequence=sequence) for part in value.args[0]]  # type: ignore[union-attr]
                if all(parts):
                    made = self.graph.call_function(aten.cat.default, (parts, -1))
        if made is not None:
            self.steps_first[value] = made
        return made

    def join_directions(self) -> None:
        """Transpose what two directions of different widths bring together once, not each of them."""
        for cat in list(self.graph.find_nodes(op="call_function", target=aten.cat.default)):
            if cat in self.steps_first.values():
                continue
            if (made := self._known(cat, sequence=False)) is not None:
                with self.graph.inserting_after(made):
                    cat.replace_all_uses_with(self.turned(made))

    def into(self, layers: list[fx.Node]) -> None:
        """Let a layer whose output is only read with sequences first give it so: one transpose instead of two."""
        for layer in layers:
            outputs = [user for user in layer.users if user.args[1] == 0]
            users = [user for output in outputs for user in output.users]
            if users and all(_transposed(user) is not None for user in users):
                layer.kwargs = {**layer.kwargs, "batch_first": True}
                for user in users:
                    user.replace_all_uses_with(outputs[0])
                    self.graph.erase_node(user)


def _transposed(value: Any) -> fx.Node | None:
    """Return what ``value`` is the transpose of its first two dims of."""
    if not isinstance(value, fx.Node):
        return None
    swapped = value.target is aten.transpose.int and set(value.args[1:]) == {0, 1}
    permuted = value.target is aten.permute.default and list(value.args[1]) == [1, 0, 2]  # type: ignore[arg-type]
    return value.args[0] if swapped or permuted else None  # type: ignore[return-value]


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable
