"""Calls of PyTorch's recurrent kernels in a traced graph become layers: in exported files, in layers of the user's own.

Their length is the traced one; everything else is that of ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from kfe_fx.recurrent.op import RECURRENT, Arguments

aten = torch.ops.aten

_KERNELS: dict[Any, str] = {
    aten.lstm.input: "lstm",
    aten.gru.input: "gru",
    aten.rnn_tanh.input: "rnn_tanh",
    aten.rnn_relu.input: "rnn_relu",
}


def open_kernels(graph: fx.Graph) -> int:
    """Replace every call of a kernel by one operation a layer and direction, in place; return how many there were."""
    found = [node for node in graph.nodes if node.target in _KERNELS]
    for node in found:
        users = list(node.users)
        if any(user.target is not operator.getitem for user in users):
            continue
        with graph.inserting_before(node):
            made = _Builder(graph, node).layers()
        for user in users:
            place: Any = user.args[1]
            user.replace_all_uses_with(made[place])
            graph.erase_node(user)
        graph.erase_node(node)
    return len(found)


class _Builder:
    def __init__(self, graph: fx.Graph, node: fx.Node) -> None:
        self.graph = graph
        self.node = node
        # (input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)
        given: tuple[Any, ...] = node.args
        self.input, states, params, biased, self.count, self.dropout, self.train, both, self.batch_first = given
        self.cell = _KERNELS[node.target]
        self.states: list[Any] = list(states) if isinstance(states, list | tuple) else [states]
        self.directions = 2 if both else 1
        self.params: list[Any] = list(params)
        self.biased = bool(biased)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        made = self.graph.call_function(target, args, kwargs)
        made.meta = {key: value for key, value in self.node.meta.items() if key != "val"}
        return made

    def layers(self) -> list[fx.Node]:
        """Build the stack and return output, h_n and, of an LSTM, c_n."""
        value: Any = self.input
        ends: list[list[fx.Node]] = [[], []]
        for depth in range(self.count):
            outputs = []
            for direction in range(self.directions):
                output, h_n, c_n = self._direction(value, depth * self.directions + direction, direction == 1)
                outputs.append(output)
                ends[0].append(h_n)
                ends[1].append(c_n)
            value = outputs[0] if len(outputs) == 1 else self.call(aten.cat.default, outputs, -1)
            if self.dropout and depth + 1 < self.count:
                value = self.call(aten.dropout.default, value, self.dropout, self.train)
        return [value, *(self.call(aten.stack.default, end) for end in ends[: len(self.states)])]

    def _direction(self, value: Any, place: int, reverse: bool) -> tuple[fx.Node, fx.Node, fx.Node]:
        each = len(self.params) // (self.count * self.directions)
        weights = self.params[place * each : (place + 1) * each]
        if not self.biased:
            weights[2:2] = [None, None]
        first = [None if _zeros(state) else self.call(aten.select.int, state, 0, place) for state in self.states]
        held = Arguments(value, *[*first, None][:2], *weights, cell=self.cell, reverse=reverse)
        args, options = held.call()
        made = self.call(RECURRENT, *args, **options, **({} if self.batch_first else {"batch_first": False}))
        output, h_n, c_n = (self.call(operator.getitem, made, index) for index in range(3))
        return output, h_n, c_n


def _zeros(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in (aten.zeros.default, aten.new_zeros.default)
