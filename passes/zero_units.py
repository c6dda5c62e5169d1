"""Units that are zero for every input: which of them can go without a change, and what is to be done for the others.

A unit whose gate is zero may still reach what stays: an activation makes something else of zero (sigmoid(0) = 1/2), a
norm takes its statistic over it. Which do is found by running the network: where the slices of such units are not zero,
the operation that reads them is run again with them at zero, and what it makes of the units that stay must not differ.

A constant that reaches a contraction the same at every position becomes part of its bias, or of the running mean of the
batch norm behind it. Behind zero padding it is not the same at the border, and the unit stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from kfe_fx.labels.analysis import Analysis, analysis_sizes
from kfe_fx.labels.tracker import Dims
from kfe_fx.passes.fold_means import consumers
from kfe_fx.program import GraphInterpreter, Program
from kfe_fx.recurrent.op import RECURRENT
from kfe_fx.runtime.inputs import draw_inputs
from kfe_fx.taps import users_of

aten = torch.ops.aten

_DRAWS = (0, 1)  # seeds of the inputs that the network is run on
_ROUNDING = 1e3  # in units of the last place: what a constant may differ by from position to position


@dataclass(frozen=True)
class Removable:
    """Units that can go, why the others stay, and what is added to tensors (by name) when they go."""

    gone: frozenset[int]
    stays: dict[int, str]
    shifts: dict[str, Tensor] = field(repr=False)


def removable(analysis: Analysis, zero: Mapping[int, float], *, inexact: bool = False) -> Removable:
    """Find which units of those that are zero can be removed.

    Args:
        analysis: of a Program in which the units are zero where they are minted.
        zero: unit -> how much it is wanted; of what must not lose all of its units the most wanted one stays.
        inexact: remove also those whose removal changes what the network computes; a constant that they send counts
            with its mean over examples and positions.
    """
    gone, stays = set(zero), {}
    for floor in analysis.floors:
        if floor <= gone:
            kept = max(sorted(floor), key=lambda unit: zero[unit])
            gone.discard(kept)
            stays[kept] = "is the last one of its dim"
    while True:
        watch = _watch(analysis, gone, inexact=inexact)
        if inexact or not watch.stuck:
            return Removable(frozenset(gone), stays, watch.shifts())
        gone -= watch.stuck.keys()
        stays |= watch.stuck


def _watch(analysis: Analysis, gone: set[int], *, inexact: bool) -> _Watch:
    watch = _Watch(analysis, gone, inexact=inexact)
    sizes = analysis_sizes(analysis.program)
    with torch.no_grad():
        for seed in _DRAWS if gone else ():
            watch.run(*draw_inputs(analysis.program, None, seed, sizes))
    return watch


class _Watch(GraphInterpreter):
    """Run the evaluation graph and see what of ``gone`` units reaches those that stay."""

    def __init__(self, analysis: Analysis, gone: set[int], *, inexact: bool) -> None:
        super().__init__(analysis.program.module(), graph=analysis.program.graphs["eval"])
        self.analysis, self.inexact = analysis, inexact
        self.tracker = analysis.trackers["eval"]
        self.marks = np.zeros(len(analysis.units) + 1, dtype=bool)
        self.marks[sorted(gone)] = True
        self.stuck: dict[int, str] = {}
        plain = (one for one in consumers(analysis) if one.delayed is None and one.node.target is not RECURRENT)
        self.biased = {one.node.name: one for one in plain}
        self.found: dict[str, list[tuple[str, Tensor]]] = {}  # consumer -> (what takes it, how much) for each run

    def shifts(self) -> dict[str, Tensor]:
        """Return what is to be added to biases and running means."""
        total: dict[str, Tensor] = {}
        for runs in self.found.values():
            shift = torch.stack([shift for _, shift in runs]).mean(0)
            total[runs[0][0]] = total.get(runs[0][0], 0) + shift
        return total

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, and again without the units that go where they are not zero."""
        if getattr(getattr(n.target, "_schema", None), "is_mutable", False):
            return self.env[n.args[0]]  # type: ignore[index]  # buffers stay as they are
        result = super().run_node(n)
        if n.op == "call_function" and n not in self.tracker.static:
            self._see_statistic(n)
            reached = {unit for arg in n.all_input_nodes for unit in self._sent(arg)}
            if reached:
                self._see(n, result, reached)
        return result

    def _see_statistic(self, n: fx.Node) -> None:
        over = self.tracker.statistics.get(n.name, ())
        value: Any = self.tracker.values.get(n)
        for dim in over if isinstance(value, tuple) else ():
            units = {unit for _, away in self._lost(value[dim : dim + 1]) for unit in away}
            self._stick(units, f"{_told(n)} takes a statistic over it")

    def _stick(self, units: set[int], why: str) -> None:
        for unit in sorted(units) if not self.inexact else ():
            self.stuck.setdefault(unit, why)

    def _see(self, n: fx.Node, result: Any, reached: set[int]) -> None:
        args, kwargs = map_arg((n.args, n.kwargs), self._without)
        other = n.target(*args, **kwargs)  # type: ignore[operator]
        value = self.tracker.values.get(n)
        pairs = zip(_tensors(result), _tensors(other), value if isinstance(value, list) else [value], strict=False)
        if not any(self._differs(one, two, dims) for one, two, dims in pairs if isinstance(dims, tuple)):
            return
        shift = self._constant(n, result, other)
        if shift is None:
            self._stick(reached, f"{_told(n)} reads what it sends, which is not zero")
        else:
            self.found.setdefault(n.name, []).append(shift)

    # slices ----------------------------------------------------------------------------------------------------------

    def _lost(self, dims: Dims) -> Iterator[tuple[int, dict[int, list[int]]]]:
        """Yield each dim that loses indices, with these by unit."""
        for dim, layers in enumerate(self.analysis.table.layout(dims)):
            away: dict[int, list[int]] = {}
            for layer in layers:
                for index in np.flatnonzero(self.marks[layer]).tolist():
                    away.setdefault(int(layer[index]), []).append(index)
            if away:
                yield dim, away

    def _held(self, arg: fx.Node) -> list[tuple[Tensor, Dims]]:
        value, dims = self.env[arg], self.tracker.values.get(arg)
        if arg in self.tracker.static or dims is None:
            return []
        pairs = zip(_tensors(value), dims if isinstance(dims, list) else [dims], strict=False)
        return [(one, labels) for one, labels in pairs]

    def _sent(self, arg: fx.Node) -> set[int]:
        """Return the units that go and are not zero in a value."""
        found: set[int] = set()
        for value, dims in self._held(arg):
            for dim, away in self._lost(dims):
                on = (value != 0).movedim(dim, 0).flatten(1).any(1).tolist()
                found |= {unit for unit, indices in away.items() if any(on[index] for index in indices)}
        return found

    def _without(self, arg: fx.Node) -> Any:
        """Return the value of a node with the units that go at zero."""
        value, held = self.env[arg], self._held(arg)
        cut = [self._zeroed(one, dims) for one, dims in held]
        return value if not cut else cut[0] if isinstance(value, Tensor) else type(value)(cut)

    def _zeroed(self, value: Tensor, dims: Dims) -> Tensor:
        for dim, away in self._lost(dims):
            index = torch.tensor(sorted(i for indices in away.values() for i in indices), device=value.device)
            value = value.index_fill(dim, index, 0)
        return value

    def _differs(self, one: Tensor, other: Tensor, dims: Dims) -> bool:
        """Tell whether what stays of two values differs."""
        different = (one != other) & ~((one != one) & (other != other))
        return bool(self._zeroed(different.to(torch.uint8), dims).any())

    # constants -------------------------------------------------------------------------------------------------------

    def _constant(self, n: fx.Node, result: Any, other: Any) -> tuple[str, Tensor] | None:
        """Return the tensor that can take what is lost at a contraction, and how much, [channels]; or None."""
        consumer = self.biased.get(n.name)
        target = None if consumer is None else _takes(self.analysis.program, n, consumer.bias)
        if consumer is None or target is None:
            return None
        name, sign = target
        lost = (result - other).movedim(consumer.out, 0).flatten(1)  # [channels, examples and positions]
        dims = self.tracker.values[n][consumer.out : consumer.out + 1]
        lost = self._zeroed(lost, dims)
        shift = lost.mean(1)
        before = self.found.get(n.name, [(name, sign * shift)])[0][1] * sign
        eps = torch.finfo(lost.dtype).eps * _ROUNDING * max(1.0, float(result.abs().max()))
        same = bool(((lost - before.unsqueeze(1)).abs() <= eps).all())
        return (name, sign * shift) if same or self.inexact else None


def _takes(program: Program, n: fx.Node, bias: str | None) -> tuple[str, float] | None:
    """Return the vector that a constant at the output of a contraction can be added to, and its sign."""
    users = users_of(n)
    norm = users[0] if len(users) == 1 and users[0].target is aten.batch_norm.default else None
    if bias is not None:
        return (bias, 1.0) if _only(program, bias, {n.name, *(user.name for user in users)}) else None
    mean: Any = None if norm is None or norm.args[5] else norm.args[3]
    if not isinstance(mean, fx.Node) or mean.op != "get_attr" or norm is None:
        return None
    return (str(mean.target), -1.0) if _only(program, str(mean.target), {norm.name}) else None


def _only(program: Program, name: str, readers: set[str]) -> bool:
    """Tell whether nothing else reads a tensor."""
    names = program.names_of(name)
    held = (node for graph in program.graphs.values() for node in graph.find_nodes(op="get_attr"))
    return all(user.name in readers for node in held if node.target in names for user in users_of(node))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [one for one in value if isinstance(one, Tensor)] if isinstance(value, list | tuple) else []


def _told(n: fx.Node) -> str:
    return f"{str(n.target).removesuffix('.default')} at {n.meta.get('module') or n.meta.get('source') or n.name}"
