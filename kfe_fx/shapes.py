"""Concrete shapes of every node, from fake tensors at chosen sizes of the dynamic axes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import (
    FakeTensorMode,  # the one place that imports it; tests/test_shapes.py probes it
)

from kfe_fx.program import GraphInterpreter, Program
from kfe_fx.recurrent.op import OPAQUE, RECURRENT
from kfe_fx.recurrent.opened import OPENED, STATES, opened_shapes, states_shapes

# of these only shapes are computed, the kernels would be traced step by step
_SHAPES = {RECURRENT: OPAQUE, STATES: states_shapes, OPENED: opened_shapes}


class _Propagator(GraphInterpreter):
    def __init__(self, program: Program, graph: fx.Graph, fakes: dict[int, torch.Tensor]) -> None:
        super().__init__(program.module(), garbage_collect_values=False, graph=graph)
        self._fakes = fakes

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(_SHAPES.get(target, target), args, kwargs)

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        if not isinstance(value, torch.Tensor):
            return value
        fake = self._fakes.get(id(value))
        if fake is None:
            # under the mode this makes a fake one, twenty times as fast as asking for the fake of a tensor
            fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
            self._fakes[id(value)] = fake
        return fake


def sized_examples(program: Program, sizes: dict[str, int] | None = None) -> list[Any]:
    """Return the flat example inputs with each dynamic axis repeated or cut to ``sizes[axis]``.

    Axes that ``sizes`` does not name keep the example's size.
    """
    flat = program.flat_examples()
    resized = []
    for name, value in zip(program.signature.input_names, flat, strict=True):
        if isinstance(value, torch.Tensor):
            for dim, axis in program.axes.get(name, {}).items():
                if sizes and axis in sizes and value.shape[dim] != sizes[axis]:
                    wanted = sizes[axis]
                    index = torch.arange(wanted) % max(1, value.shape[dim])
                    value = value.index_select(dim, index)
        resized.append(value)
    return resized


def propagate(program: Program, graph: str = "eval", sizes: dict[str, int] | None = None) -> dict[fx.Node, Any]:
    """Return the fake value (shape, dtype) or plain value of each node of ``program.graphs[graph]``.

    ``sizes`` maps axis names to concrete sizes, e.g. ``{"batch": 2}``; nothing is computed, no memory is taken.
    """
    return propagate_all(program, (graph,), sizes)[graph]


def propagate_all(
    program: Program, graphs: Iterable[str], sizes: dict[str, int] | None = None
) -> dict[str, dict[fx.Node, Any]]:
    """Propagate through several graphs, making fake parameters once."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    inputs = sized_examples(program, sizes)
    fakes: dict[int, torch.Tensor] = {}
    found = {}
    with mode, torch.no_grad():
        for graph in graphs:
            given = [mode.from_tensor(v, static_shapes=True) if isinstance(v, torch.Tensor) else v for v in inputs]
            runner = _Propagator(program, program.graphs[graph], fakes)
            runner.run(*given)
            found[graph] = dict(runner.env)
    return found
