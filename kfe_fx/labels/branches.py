"""Branches: what becomes a constant when all units of a dim go, up to where it joins the rest of the network.

A network can be pruned in depth where that constant meets what still varies in additions and multiplications alone (a
residual branch, the gate of a squeeze-excite), or where nothing at all is left of an operand of a ``cat`` (a layer of
a DenseNet). How the network is written plays no part: everything is read from the labels and the graph.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from kfe_fx.labels.analysis import Analysis
from kfe_fx.labels.constancy import Emptied, Kind, Lines, factors_of, kinds_of, values_of
from kfe_fx.labels.joins import CATS, JOINS, Join, NoBranch, check_join, inputs_left, is_needless, operands, where
from kfe_fx.program import named_tensors, tied_names
from kfe_fx.shapes import propagate

_ROUNDING = 256  # units of the last place by which equal sums may differ between positions

Cuts = dict[str, set[int]]  # node -> places of the operands that it loses


@dataclass(frozen=True)
class Constant:
    """What a branch is worth without its units.

    ``value`` broadcasts against the value of ``source`` (a node of the evaluation graph), of whose dims it keeps
    ``dims``: [C, 1, 1] or [C]. ``module`` is the path of the module that joins it.
    """

    source: str
    module: str
    dims: tuple[int, ...]
    value: Tensor = field(repr=False, compare=False)


@dataclass(frozen=True)
class Branch:
    """A part of a network that can go as a whole.

    Masking ``units`` leaves ``constants`` of it. ``joins[mode]`` are the operands to be replaced in a graph,
    ``removed[mode]`` the nodes that nothing needs then, ``parameters`` and ``buffers`` the tensors, by every name.
    ``saved`` counts parameters: those that vanish or are cut, less the constants that are not zero.
    """

    name: str
    units: frozenset[int] = field(repr=False)
    joins: dict[str, tuple[Join, ...]]
    constants: tuple[Constant, ...]
    removed: dict[str, frozenset[str]] = field(repr=False)
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    saved: int


def find_branches(analysis: Analysis) -> list[Branch]:
    """List the branches of a network in the order of their joins; names are unique.

    Branches may lie inside others (a gate in a residual branch), and each is one that can go alone; several together
    need another look (``examine``).
    """
    finder = Finder(analysis)
    found: dict[tuple[Join, ...], Branch] = {}
    for floor in analysis.floors:
        try:
            branch = finder.branch(floor)
        except NoBranch:
            continue
        key = branch.joins["eval"]
        if len(branch.constants) <= 1 and (key not in found or len(branch.units) < len(found[key].units)):
            found[key] = branch
    order = {node.name: place for place, node in enumerate(analysis.program.graphs["eval"].nodes)}
    branches = sorted(
        found.values(), key=lambda each: [(order[join.node], join.position) for join in each.joins["eval"]]
    )
    return _with_unique_names(branches)


def examine(analysis: Analysis, units: Collection[int]) -> Branch:
    """Tell what goes when ``units`` are gone: whole dims, of one branch or of several.

    Raises:
        NoBranch: with the reason why no constants can take their place.
    """
    return Finder(analysis).branch(units)


def needless(analysis: Analysis, joins: Mapping[str, Iterable[Join]], place: int, value: Tensor) -> bool:
    """Tell whether constant number ``place``, if it is ``value``, does nothing at any of its joins in any graph."""
    for mode, found in joins.items():
        nodes = {node.name: node for node in analysis.program.graphs[mode].nodes}
        fakes = analysis.trackers[mode].fakes
        mine = [join for join in found if join.constant == place]
        if not all(is_needless(nodes[join.node], join.position, value, fakes) for join in mine):
            return False
    return True


def without(analysis: Analysis, units: Collection[int], constant: Constant, value: Tensor) -> Tensor:
    """Return a constant, or a mean in its place, without the channels that go with ``units``."""
    source = next(node for node in analysis.program.graphs["eval"].nodes if node.name == constant.source)
    kept = analysis.kept_of(source, frozenset(units))
    for dim, index in enumerate(kept[len(kept) - value.dim() :]):
        if index is not None and value.shape[dim] > 1:
            value = value.index_select(dim, torch.from_numpy(index).to(value.device))
    return value


def _with_unique_names(branches: list[Branch]) -> list[Branch]:
    counts: dict[str, int] = {}
    named = []
    for branch in branches:
        count = counts[branch.name] = counts.get(branch.name, 0) + 1
        name = branch.name if count == 1 else f"{branch.name}:{count}"
        named.append(replace(branch, name=name))
    return named


@dataclass
class _Cut:
    """One graph with some of its operands cut off: what is which kind, what is cut where, and what stays alive."""

    kinds: dict[fx.Node, Kind]
    joins: list[tuple[fx.Node, int, fx.Node]]
    alive: set[fx.Node]


class Finder:
    """Looks at sets of units of one analysis; what does not depend on the units is computed once."""

    def __init__(self, analysis: Analysis) -> None:
        """Read the lines of units of all nodes."""
        self.analysis = analysis
        self.program = analysis.program
        self.lines = Lines(analysis)
        self.aliases = tied_names(self.program.module())
        self.whole = {mode: self._alive(mode, {}, frozenset()) for mode in self.program.graphs}
        self.needed = {mode: self._alive(mode, {}, None) for mode in self.program.graphs}

    def branch(self, units: Collection[int]) -> Branch:
        """Return what goes with ``units``.

        Raises:
            NoBranch: with the reason.
        """
        gone = frozenset(units)
        while True:
            emptied = Emptied(self.lines, gone, len(self.analysis.units))
            cuts = self._cut(emptied)
            grown = gone | self._dead(cuts)
            if grown == gone:
                break
            gone = grown
        constants = self._constants(emptied, cuts["eval"])
        places = {constant.source: place for place, constant in enumerate(constants)}
        sources = {(node.name, position): source.name for node, position, source in cuts["eval"].joins}
        joins = {
            mode: tuple(
                Join(node.name, position, source.name, places.get(sources[node.name, position]))
                for node, position, source in cut.joins
            )
            for mode, cut in cuts.items()
        }
        removed = {
            mode: frozenset(node.name for node in graph.nodes if node not in cuts[mode].alive)
            for mode, graph in self.program.graphs.items()
        }
        names = self._vanished(cuts)
        held = dict(self.program.module().named_parameters(remove_duplicate=False))
        saved = self._saved(gone, {name for name in names if name in held})
        for place, constant in enumerate(constants):
            if not needless(self.analysis, joins, place, constant.value):
                saved -= without(self.analysis, gone, constant, constant.value).numel()
        return Branch(
            _name(cuts["eval"]),
            gone,
            joins,
            constants,
            removed,
            tuple(name for name in names if name in held),
            tuple(name for name in names if name not in held),
            saved,
        )

    # what is cut ---------------------------------------------------------------------------------------------------

    def _cut(self, emptied: Emptied) -> dict[str, _Cut]:
        cuts = {mode: self._cut_graph(mode, emptied) for mode in self.program.graphs}
        expected = [(node.name, position) for node, position, _ in cuts["eval"].joins]
        for mode, cut in cuts.items():
            if sorted((node.name, position) for node, position, _ in cut.joins) != sorted(expected):
                raise NoBranch(f"the {mode} graph joins other operands than the evaluation graph")
        dead = self._dead_modules({mode: self._places(cut.joins) for mode, cut in cuts.items()})
        for mode, cut in cuts.items():
            cut.alive = self._alive(mode, self._places(cut.joins), dead)
            self._check_alive(mode, emptied, cut)
        return cuts

    def _cut_graph(self, mode: str, emptied: Emptied) -> _Cut:
        kinds = kinds_of(self.analysis, mode, emptied)
        joins = []
        for node in self.program.graphs[mode].nodes:
            if node not in self.whole[mode]:
                continue
            still = (Kind.CONSTANT, Kind.EMPTY)
            if node.op == "placeholder" and emptied.touches(mode, node.name):
                raise NoBranch(f"the input {node.target!r} would lose units")
            if node.op == "output":
                if any(kinds[arg] in still for arg in node.all_input_nodes):
                    raise NoBranch("an output of the network would be constant")
            elif kinds[node] is Kind.VARYING:
                joins += [(node, place, arg) for place, arg in self._joined(node, kinds)]
        if not joins:
            raise NoBranch("nothing that varies meets what becomes constant")
        return _Cut(kinds, joins, set())

    def _joined(self, node: fx.Node, kinds: dict[fx.Node, Kind]) -> list[tuple[int, fx.Node]]:
        """Return the operands of a varying node that no longer vary, with their places."""
        still = [arg for arg in node.all_input_nodes if kinds[arg] in (Kind.CONSTANT, Kind.EMPTY)]
        if not still:
            return []
        allowed = Kind.EMPTY if node.target in CATS else Kind.CONSTANT if node.target in JOINS else None
        if allowed is None or any(kinds[arg] is not allowed for arg in still):
            raise NoBranch(f"{where(node)}: {node.target} would read a constant beside what varies")
        found = [(place, arg) for place, arg in enumerate(operands(node)) if arg in still]
        if {arg for _, arg in found} != set(still):
            raise NoBranch(f"{where(node)}: {node.target} reads a constant in an unusual place")
        return found  # type: ignore[return-value]

    def _check_alive(self, mode: str, emptied: Emptied, cut: _Cut) -> None:
        alive = [node for node in self.program.graphs[mode].nodes if node in cut.alive]
        for kind in (Kind.CONSTANT, Kind.EMPTY):
            for node in (node for node in alive if cut.kinds[node] is kind):
                raise NoBranch(f"{where(node)}: {node.target} would be constant, and its size or a buffer needs it")
        for node in (node for node in alive if any(emptied.parts(mode, node.name))):
            raise NoBranch(f"{where(node)}: nothing would be left of a dim of {node.target}")

    # what stays alive ----------------------------------------------------------------------------------------------

    @staticmethod
    def _places(joins: list[tuple[fx.Node, int, fx.Node]]) -> Cuts:
        places: Cuts = {}
        for node, position, _ in joins:
            places.setdefault(node.name, set()).add(position)
        return places

    def _alive(self, mode: str, cuts: Cuts, dead: Collection[str] | None) -> set[fx.Node]:
        """Return what the outputs need, and the writes to buffers but those of ``dead`` modules (None: no writes)."""
        graph = self.program.graphs[mode]
        frontier = [graph.output_node(), *graph.find_nodes(op="placeholder")]
        if dead is not None:
            frontier += [node for node in graph.nodes if _writes(node) and _owner(_written(node)) not in dead]
        alive: set[fx.Node] = set()
        while frontier:
            node = frontier.pop()
            if node in alive:
                continue
            alive.add(node)
            lost = cuts.get(node.name)
            frontier += node.all_input_nodes if lost is None else inputs_left(node, lost)
        return alive

    def _dead_modules(self, cuts: dict[str, Cuts]) -> frozenset[str]:
        """Return the paths of modules that lose all of their tensors: their counters go with them."""
        left = {mode: self._alive(mode, cuts[mode], None) for mode in cuts}
        before, after = _tensors(self.needed), _tensors(left)
        return frozenset(map(_owner, before)) - frozenset(map(_owner, after)) - {""}

    def _dead(self, cuts: dict[str, _Cut]) -> frozenset[int]:
        """Return the units that live in nothing but what goes."""
        lives = np.zeros(len(self.analysis.units) + 1, dtype=bool)
        lived = lives.copy()
        for mode, cut in cuts.items():
            for node in self.whole[mode]:
                for dims in self.lines.nodes[mode].get(node.name, []):
                    for number in (number for dim in dims for number in dim):
                        (lives if node in cut.alive else lived)[self.lines.lines[number]] = True
        dead = lived & ~lives
        return frozenset(np.flatnonzero(dead[:-1]).tolist())

    def _vanished(self, cuts: dict[str, _Cut]) -> list[str]:
        canonical = lambda names: {self.aliases.get(name, (name,))[0] for name in names}
        before = canonical(_tensors({mode: set(graph.nodes) for mode, graph in self.program.graphs.items()}))
        after = canonical(_tensors({mode: cut.alive for mode, cut in cuts.items()}))
        owners = self._dead_modules({mode: self._places(cut.joins) for mode, cut in cuts.items()})
        names = []
        for name in named_tensors(self.program.module()):
            held = self.aliases[name][0]
            # what no graph reads (the counter of a norm that was captured for evaluation) goes with its module
            if held not in after and (held in before or _owner(name) in owners):
                names.append(name)
        return names

    def _saved(self, gone: frozenset[int], vanished: set[str]) -> int:
        saved = 0
        for name, value in self.program.module().named_parameters():
            if name in vanished:
                saved += value.numel()
            elif name in self.analysis.params:
                kept = self.analysis.kept(name, gone)
                left = [size if at is None else len(at) for size, at in zip(value.shape, kept, strict=True)]
                saved += value.numel() - prod(left)
        return saved

    # what it is worth ----------------------------------------------------------------------------------------------

    def _constants(self, emptied: Emptied, cut: _Cut) -> tuple[Constant, ...]:
        joins = {source: node for node, _, source in cut.joins if cut.kinds[source] is Kind.CONSTANT}
        if not joins:
            return ()
        shapes = [self.analysis.trackers["eval"].fakes, self.others]
        values = [values_of(self.analysis, emptied, cut.kinds, joins, fakes) for fakes in shapes]
        found = []
        for source, join in joins.items():
            dims, value = self._reduced(source, [each[source] for each in values])
            found.append(Constant(source.name, str(join.meta.get("module") or ""), dims, value))
            for node, position, _ in (each for each in cut.joins if each[2] is source):
                check_join(node, position, value, shapes)
        return tuple(found)

    @cached_property
    def others(self) -> dict[fx.Node, Any]:
        """Shapes of the evaluation graph where every dynamic axis has another size than in the analysis.

        Raises:
            NoBranch: the network takes no other sizes that were tried.
        """
        sizes = self.analysis.trackers["eval"].sizes
        batch = {axis: size + 1 for axis, size in sizes.items() if axis in self.program.batch_axes()}
        tries = [{axis: change(size) for axis, size in sizes.items()} for change in (_odd, _next, _twice)]
        for tried in [*tries, sizes | batch]:
            try:
                return propagate(self.program, sizes=tried)
            except (RuntimeError, ValueError, IndexError, TypeError):
                continue  # a length that the network does not take
        raise NoBranch("the network takes inputs of one size alone, though its axes are dynamic")

    def _reduced(self, source: fx.Node, values: list[Tensor]) -> tuple[tuple[int, ...], Tensor]:
        """Return the channel dims of a constant and its value along them."""
        path = source.meta.get("module") or source.name
        first = values[0]
        if not first.is_floating_point() or not all(bool(value.isfinite().all()) for value in values):
            raise NoBranch(f"{path}: the constant is not a finite floating-point number")
        labels = self.analysis.trackers["eval"].values[source]
        dims, loose, wide = [], [], []
        for dim, size in enumerate(first.shape):
            static = all(value.shape[dim] == size for value in values)
            varies = any(not _equal(value, value.narrow(dim, 0, 1)) for value in values)
            if varies and not static:
                raise NoBranch(f"{path}: the constant is not the same along an axis of the input")
            labelled = static and size > 1 and len(labels[dim]) > 0
            dims += [dim] if varies else []
            wide += [dim] if labelled else []
            loose += [dim] if varies and not labelled else []
        if loose and len({*dims, *wide}) > 1:
            raise NoBranch(f"{path}: the constant is not the same at all positions (zero padding makes borders)")
        dims = dims or wide  # zeros and the like: as wide as a training may want it
        kept = first
        for dim in (each for each in range(first.dim()) if each not in dims):
            kept = kept.narrow(dim, 0, 1)
        if not all(_equal(value, kept) for value in values):
            raise NoBranch(f"{path}: what should be constant is not")
        lead = min(dims, default=max(first.dim() - 1, 0))
        return tuple(dims), kept.reshape(kept.shape[lead:]).clone()


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _written(node: fx.Node) -> str:
    target = node.args[0]
    return str(target.target) if isinstance(target, fx.Node) and target.op == "get_attr" else ""


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _tensors(nodes: dict[str, set[fx.Node]]) -> set[str]:
    return {str(node.target) for found in nodes.values() for node in found if node.op == "get_attr"}


def _equal(value: Tensor, other: Tensor) -> bool:
    if not value.numel():
        return True
    allowed = _ROUNDING * torch.finfo(value.dtype).eps * float(value.abs().max())
    return float((value - other).abs().max()) <= allowed


def _name(cut: _Cut) -> str:
    """Return the path of the contraction that turns constant first, or of the last one that leaves nothing."""
    frontier = [source for _, _, source in cut.joins]
    seen: set[fx.Node] = set()
    while frontier:
        node = frontier.pop()
        if node not in seen and cut.kinds[node] in (Kind.CONSTANT, Kind.EMPTY):
            seen.add(node)
            frontier += node.all_input_nodes
    layers = [node for node in cut.kinds if node in seen and _is_layer(node, cut.kinds)]
    turning = [node for node in layers if cut.kinds[node] is Kind.CONSTANT]
    named = turning[0] if turning else layers[-1] if layers else cut.joins[0][0]
    return str(named.meta.get("module") or cut.joins[0][0].meta.get("module") or named.name)


def _is_layer(node: fx.Node, kinds: dict[fx.Node, Kind]) -> bool:
    return any(kinds[factor] is Kind.STATIC for factor in factors_of(node))


def _odd(size: int) -> int:
    return 2 * size + 1


def _next(size: int) -> int:
    return size + 1


def _twice(size: int) -> int:
    return 2 * size
