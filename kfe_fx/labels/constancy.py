"""What becomes constant when units are gone: kinds of nodes, and the values of the constant ones.

A masked unit is zero, so a node that lost all units of a dim is zero altogether: it is *empty*. A contraction over
nothing gives its bias, and what is computed from constants alone is constant. No input of the network is needed to
find such a value, only sizes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from kfe_fx import taps
from kfe_fx.labels.analysis import Analysis
from kfe_fx.labels.joins import NoBranch
from kfe_fx.labels.oracle import at_size
from kfe_fx.labels.registry import overloads
from kfe_fx.program import run_node
from kfe_fx.recurrent.op import RECURRENT

aten = torch.ops.aten

# operation -> places of its factors: where one of them is zero, only what is added is left
_FACTORS: dict[Any, tuple[int, ...]] = {
    **dict.fromkeys(overloads(aten, "linear.default", "matmul.default", "mm.default", "bmm.default"), (0, 1)),
    **dict.fromkeys(overloads(aten, "mv.default", "dot.default"), (0, 1)),
    **dict.fromkeys(overloads(aten, "conv1d.default", "conv2d.default", "conv3d.default"), (0, 1)),
    **dict.fromkeys(overloads(aten, "conv1d.padding", "conv2d.padding", "conv3d.padding"), (0, 1)),
    **dict.fromkeys(overloads(aten, "conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input"), (0, 1)),
    **dict.fromkeys(overloads(aten, "addmm.default", "baddbmm.default"), (1, 2)),
    aten.bilinear.default: (0, 1, 2),
    aten.einsum.default: (1,),
}


class Kind(Enum):
    """What a node holds once units are gone."""

    STATIC = "computed from parameters alone"
    NUMBER = "a size"
    VARYING = "depends on an input"
    CONSTANT = "the same for every input"
    EMPTY = "lost a whole dim"


class Lines:
    """The unit ids along every dim of every node and parameter; equal lines are kept once."""

    def __init__(self, analysis: Analysis) -> None:
        """Read the layouts of all graphs of an analysis."""
        self.lines: list[np.ndarray] = []
        self._known: dict[bytes, int] = {}
        self.nodes: dict[str, dict[str, list[list[tuple[int, ...]]]]] = {}  # mode -> node -> output -> dim -> lines
        for mode, graph in analysis.program.graphs.items():
            tracker = analysis.trackers[mode]
            self.nodes[mode] = {}
            for node in graph.nodes:
                value = tracker.values.get(node)
                if value is None:
                    continue
                parts = value if isinstance(value, list) else [value]
                self.nodes[mode][node.name] = [self._dims(analysis.table.layout(dims)) for dims in parts]
        self.params = {name: self._dims(layout) for name, layout in analysis.params.items()}

    def _dims(self, layout: list[tuple[np.ndarray, ...]]) -> list[tuple[int, ...]]:
        return [tuple(self._number(layer) for layer in layers) for layers in layout]

    def _number(self, layer: np.ndarray) -> int:
        number = self._known.setdefault(layer.tobytes(), len(self.lines))
        if number == len(self.lines):
            self.lines.append(layer)
        return number


class Emptied:
    """Which dims of which nodes are left empty, or smaller, when units go."""

    def __init__(self, lines: Lines, units: Collection[int], count: int) -> None:
        """Mark ``units`` out of ``count`` as gone."""
        self.lines = lines
        self.gone = np.zeros(count + 1, dtype=bool)
        self.gone[list(units)] = True
        self.gone[-1] = False
        self._lost: dict[tuple[int, ...], np.ndarray] = {}

    def lost(self, dim: tuple[int, ...]) -> np.ndarray:
        """Mark the indices of a dim that go; an array of no length for a dim without units."""
        if dim not in self._lost:
            marks = [self.gone[self.lines.lines[number]] for number in dim]
            self._lost[dim] = np.logical_or.reduce(marks) if marks else np.zeros(0, dtype=bool)
        return self._lost[dim]

    def empties(self, dims: list[tuple[int, ...]]) -> bool:
        """Tell whether one of the dims of a tensor lost every index."""
        return any(len(dim) > 0 and bool(self.lost(dim).all()) for dim in dims)

    def parts(self, mode: str, name: str) -> list[bool]:
        """Tell of each output of a node whether it is empty."""
        return [self.empties(dims) for dims in self.lines.nodes[mode].get(name, [])]

    def touches(self, mode: str, name: str) -> bool:
        """Tell whether a node lost an index at all."""
        parts = self.lines.nodes[mode].get(name, [])
        return any(bool(self.lost(dim).any()) for dims in parts for dim in dims)


def kinds_of(analysis: Analysis, mode: str, emptied: Emptied) -> dict[fx.Node, Kind]:
    """Tell of every node of a graph what it holds once the units are gone."""
    kinds: dict[fx.Node, Kind] = {}
    for node in analysis.program.graphs[mode].nodes:
        kinds[node] = _kind(analysis, mode, emptied, node, kinds)
    return kinds


def _kind(analysis: Analysis, mode: str, emptied: Emptied, node: fx.Node, kinds: Mapping[fx.Node, Kind]) -> Kind:
    tracker = analysis.trackers[mode]
    if node.op == "get_attr" or (node.op == "call_function" and node in tracker.static and _is_data(tracker, node)):
        return Kind.STATIC
    if node.op != "call_function" or node not in tracker.fakes:
        return Kind.VARYING
    if not _is_data(tracker, node):
        return Kind.NUMBER
    parts = emptied.parts(mode, node.name)
    if parts and all(parts):
        return Kind.EMPTY
    inputs = [node.args[0]] if node.target is taps.TAP else node.all_input_nodes
    found = [kinds[arg] for arg in inputs if kinds[arg] not in (Kind.STATIC, Kind.NUMBER)]  # type: ignore[index]
    if found and Kind.VARYING not in found:
        return Kind.CONSTANT
    factors = factors_of(node)
    if not any(kinds[factor] is Kind.EMPTY for factor in factors):
        return Kind.VARYING
    others = [kinds[arg] for arg in node.all_input_nodes if arg not in factors]
    return Kind.VARYING if Kind.VARYING in others else Kind.CONSTANT


def _is_data(tracker: Any, node: fx.Node) -> bool:
    return isinstance(tracker.fakes.get(node), Tensor | list | tuple)


def factors_of(node: fx.Node) -> list[fx.Node]:
    """Return the operands of a contraction that are multiplied; none for another operation."""
    found: list[fx.Node] = []
    for place in _FACTORS.get(node.target, ()):
        arg = node.args[place] if len(node.args) > place else None
        found += [each for each in (arg if isinstance(arg, list | tuple) else [arg]) if isinstance(each, fx.Node)]
    return found


def values_of(
    analysis: Analysis,
    emptied: Emptied,
    kinds: Mapping[fx.Node, Kind],
    sources: Iterable[fx.Node],
    fakes: Mapping[Any, Any],
) -> dict[fx.Node, Tensor]:
    """Compute constant nodes of the evaluation graph, from shapes alone.

    Empty operands, and what only meets them, are zero; units that are gone are masked as in ``oracle.run_masked``.

    Args:
        analysis: of the network with all units.
        emptied: which units are gone.
        kinds: from ``kinds_of``.
        sources: the constant nodes that are wanted.
        fakes: shape of every node at the sizes to compute with.

    Raises:
        NoBranch: a statistic runs over a part of the units that are gone, or a recurrent layer loses some of them.
    """
    wanted = set(sources)
    frontier = list(wanted)
    while frontier:
        node = frontier.pop()
        for arg in node.all_input_nodes:
            if arg not in wanted and kinds[arg] in (Kind.CONSTANT, Kind.STATIC):
                wanted.add(arg)
                frontier.append(arg)
    values: dict[fx.Node, Any] = {}

    def value_of(arg: fx.Node) -> Any:
        if arg in values:
            return values[arg]
        return fakes[arg] if kinds[arg] is Kind.NUMBER else _zeros(fakes[arg])

    with torch.no_grad():
        for node in analysis.program.graphs["eval"].nodes:
            if node not in wanted:
                continue
            if node.op == "get_attr":
                values[node] = analysis.program.tensor(str(node.target)).detach()
            else:
                values[node] = run_node(node, value_of)
                if kinds[node] is Kind.CONSTANT:
                    values[node] = _masked(analysis, emptied, node, values[node])
    return {source: values[source] for source in sources}


def _zeros(fake: Any) -> Any:
    if isinstance(fake, Tensor):
        return torch.zeros(fake.shape, dtype=fake.dtype, device=fake.device)
    return [_zeros(part) for part in fake]


def _masked(analysis: Analysis, emptied: Emptied, node: fx.Node, value: Any) -> Any:
    if not emptied.touches("eval", node.name):
        return value
    over = analysis.trackers["eval"].statistics.get(node.name, ())
    dims = emptied.lines.nodes["eval"][node.name][0]
    if node.target is RECURRENT or any(emptied.lost(dims[dim]).any() for dim in over):
        where = node.meta.get("module") or node.name
        raise NoBranch(f"{where}: the constant depends on a part of the units that go")
    if not isinstance(value, Tensor):
        return value  # each output is masked where it is picked
    for dim, numbers in enumerate(dims):
        for number in numbers:
            away = emptied.gone[at_size(emptied.lines.lines[number], value.shape[dim])]
            shaped = torch.from_numpy(away).reshape([-1 if axis == dim else 1 for axis in range(value.dim())])
            value = torch.where(shaped.to(value.device), torch.zeros((), dtype=value.dtype, device=value.device), value)
    return value
