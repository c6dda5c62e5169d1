"""Two networks side by side, node by node, over all batches at one time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from kfe_fx.program import GraphInterpreter, Program

Line = list[Any]  # the value of one node, batch by batch


class Lines(GraphInterpreter):
    """Runs an evaluation graph in step with somebody who may change its weights on the way.

    A value is dropped behind its last user, so that what is held at one time is what lives between two nodes.
    """

    def __init__(self, program: Program, batches: list[list[Any]]) -> None:
        """Take the flat inputs of every batch."""
        super().__init__(program.module(), graph=program.graphs["eval"])
        self._nodes = list(self.graph.nodes)  # type: ignore[union-attr]  # it was given one
        inputs = [node for node in self._nodes if node.op == "placeholder"]  # in the order of a batch; gates come last
        self._inputs = {
            node: [batch[number] if number < len(batch) else None for batch in batches]
            for number, node in enumerate(inputs)
        }
        self._next = 0
        self._left = {node: len(node.users) for node in self._nodes}
        self._held: dict[fx.Node, Line] = {}
        self._order = {node.name: number for number, node in enumerate(self._nodes)}
        self._count = len(batches)

    def line(self, node: fx.Node) -> Line:
        """Return the values of a node that was run and is still to be used."""
        return self._held[node]

    def step(self) -> fx.Node:
        """Run the next node over all batches and return it."""
        node = self._nodes[self._next]
        self._next += 1
        if node.op == "placeholder":
            values = self._inputs[node]
        elif node.op == "output":
            return node
        else:
            values = []
            for number in range(self._count):
                self.env = {arg: self._held[arg][number] for arg in node.all_input_nodes}
                values.append(self.run_node(node))
        self._held[node] = values
        self._drop(node)
        return node

    def _drop(self, user: fx.Node) -> None:
        for arg in user.all_input_nodes:
            self._left[arg] -= 1
            if not self._left[arg]:
                self._held.pop(arg, None)

    def upcoming(self) -> fx.Node | None:
        """Return the node that the next ``step`` runs."""
        return self._nodes[self._next] if self._next < len(self._nodes) else None

    def reach(self, name: str) -> Line | None:
        """Run on up to the node of that name and return its values; None where there is none, or nobody needs it."""
        number = self._order.get(name)
        if number is None:
            return None
        while self._next <= number:
            self.step()
        return self._held.get(self._nodes[number])


def live_bytes(program: Program, inputs: list[Any]) -> int:
    """Return how many bytes of activations live at one time for these inputs, at most."""
    runner = _Peak(program, [inputs])
    with torch.no_grad():
        while runner.upcoming() is not None:
            runner.step()
    return runner.most


class _Peak(Lines):
    most = 0

    def _drop(self, user: fx.Node) -> None:
        self.most = max(self.most, self._bytes())
        super()._drop(user)

    def _bytes(self) -> int:
        found: dict[int, int] = {}
        for node, line in self._held.items():
            for value in line if node.op != "get_attr" else ():
                for part in value if isinstance(value, tuple | list) else [value]:
                    if isinstance(part, Tensor):
                        storage = part.untyped_storage()
                        found[storage.data_ptr()] = storage.nbytes()  # views share one
        return sum(found.values())
