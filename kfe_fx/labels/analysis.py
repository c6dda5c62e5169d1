"""The label analysis of a Program: run the rules over its graphs, then gather the classes into units."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import fx

from kfe_fx import taps
from kfe_fx.labels import (  # noqa: F401  (importing a family registers its rules)
    contraction,
    convolution,
    creation,
    movement,
    normalisation,
    pointwise,
    recurrent,
    reduction,
    spatial,
)
from kfe_fx.labels.examples import follow_examples, freeze_irregular
from kfe_fx.labels.registry import RULES
from kfe_fx.labels.sites import GateSite, Site, gate_sites, mint_sites
from kfe_fx.labels.states import find_states, resizable
from kfe_fx.labels.tracker import Dims, Tracker
from kfe_fx.labels.unionfind import UnionFind
from kfe_fx.labels.units import FrozenDim, Group, Unit, UnitTable, build_units
from kfe_fx.program import Program, tied_names
from kfe_fx.shapes import propagate_all

BATCH = 2  # a batch of two tells the batch from dims of size one


@dataclass
class Analysis:
    """Which slices of a Program can be removed, and what goes with what.

    ``units`` are the least removable things; ``groups`` the dims that they are minted in; ``floors`` sets of which one
    unit must stay; ``frozen`` what cannot be removed and why; ``statistics`` the normalisations whose statistic runs
    over units, so that removing one changes the function there.
    """

    program: Program
    units: list[Unit]
    groups: list[Group]
    floors: list[frozenset[int]]
    sites: list[Site]
    gate_sites: list[GateSite]
    statistics: list[str]
    params: dict[str, list[tuple[np.ndarray, ...]]]
    trackers: dict[str, Tracker] = field(repr=False)
    table: UnitTable = field(repr=False)

    @cached_property
    def frozen(self) -> list[FrozenDim]:
        """What cannot be removed, and why; found when asked for."""
        return self.table.frozen_dims(self.trackers["eval"].parameters)

    def layout(self, name: str, graph: str = "eval") -> list[tuple[np.ndarray, ...]]:
        """Return per dim of a node the unit ids of its layers (-1: cannot be removed); () for a dim without units."""
        return self.table.layout(self.trackers[graph].values[name])

    def kept(self, name: str, removed: set[int] | frozenset[int]) -> list[np.ndarray | None]:
        """Return per dim of a parameter, buffer or constant the indices that stay, or None where all do."""
        return self._kept(self.params[name], removed)

    def kept_of(self, node: fx.Node, removed: set[int] | frozenset[int]) -> list[np.ndarray | None]:
        """Return per dim of a node of the evaluation graph the indices that stay, or None where all do."""
        return self._kept(self.layout(node.name), removed)

    def _kept(
        self, layout: list[tuple[np.ndarray, ...]], removed: set[int] | frozenset[int]
    ) -> list[np.ndarray | None]:
        gone = np.zeros(len(self.units) + 1, dtype=bool)
        gone[list(removed)] = True
        gone[-1] = False
        kept: list[np.ndarray | None] = []
        for layers in layout:
            lost = [gone[layer] for layer in layers]
            away = np.logical_or.reduce(lost) if lost else np.zeros(0, dtype=bool)
            kept.append(np.flatnonzero(~away) if away.any() else None)
        return kept


def analyze(program: Program, *, heads: str = "auto") -> Analysis:
    """Find the removable units of a Program.

    ``heads``: "heads" or "positions" pins whether attention loses whole heads or the same positions of every head;
    "auto" takes whole heads.
    """
    classes = UnionFind()
    parameters: dict[str, Dims] = {}
    sizes = analysis_sizes(program)
    bare = _without_taps(program)  # patterns of users are looked at, and a tap is a user
    graphs, graph = bare.graphs, bare.graphs["eval"]
    fakes = propagate_all(bare, sorted(graphs), sizes)
    trackers = {
        mode: track(Tracker(program, classes, parameters, heads=heads), graphs[mode], fakes[mode], sizes)
        for mode in sorted(graphs)
    }
    evaluation = trackers["eval"]
    examples = follow_examples(program, BATCH)
    track(examples, graph, fakes["eval"], sizes)
    freeze_irregular(evaluation, examples, graph, BATCH)
    mints = mint_sites(evaluation, graph)
    table = build_units(program, trackers, parameters, mints)
    sites = [site for mint in mints if (site := table.site(mint)) is not None]
    for mode, tracker in trackers.items():
        _label_taps(tracker, program.graphs[mode])
    return Analysis(
        program,
        table.units,
        table.groups(sites),
        table.floors,
        sites,
        gate_sites(graph, examples, sites),
        statistics_changed(evaluation, graph, table),
        {name: table.layout(dims) for name, dims in parameters.items()},
        trackers,
        table,
    )


def _without_taps(program: Program) -> Program:
    if not any(taps.tapped(graph) for graph in program.graphs.values()):
        return program
    twin = program.sharing()
    for graph in twin.graphs.values():
        taps.strip(graph)
    return twin


def _label_taps(tracker: Tracker, graph: fx.Graph) -> None:
    for node in graph.find_nodes(op="call_function", target=taps.TAP):
        source = node.args[0]
        if source in tracker.values:  # of what an opened recurrent layer is made of nothing is known
            tracker.fakes[node], tracker.values[node] = tracker.fakes[source], tracker.values[source]


def analysis_sizes(program: Program) -> dict[str, int]:
    """Return the sizes of the dynamic axes that an analysis runs at."""
    sizes: dict[str, int] = {}
    for name, value in zip(program.signature.input_names, program.flat_examples(), strict=True):
        for dim, axis in program.axes.get(name, {}).items():
            sizes[axis] = max(2, value.shape[dim], sizes.get(axis, 0))  # of size 1 a dim would hide what it does
    return sizes | dict.fromkeys(program.batch_axes(), BATCH)


def track(tracker: Tracker, graph: fx.Graph, fakes: dict[Any, Any], sizes: dict[str, int]) -> Tracker:
    """Run the rules over one graph and return the tracker with every node's labels."""
    tracker.sizes = sizes
    tracker.states, tracker.resizes = find_states(graph), resizable(tracker.program)
    tracker.fakes.fill(fakes)
    aliases = tied_names(tracker.program.module())
    for node in graph.nodes:
        if node.op == "placeholder":
            tracker.values[node] = tracker.input(node)
        elif node.op == "get_attr":
            name = aliases.get(str(node.target), (str(node.target),))[0]
            tracker.values[node] = tracker.parameter(name, tracker.program.tensor(name))
            tracker.static[node] = True
        elif node.op == "output":
            tracker.output(node)
        else:
            _apply(tracker, node)
    return tracker


def _apply(tracker: Tracker, node: fx.Node) -> None:
    tensors = [arg for arg in node.all_input_nodes if arg in tracker.values]
    if all(arg in tracker.static or not _is_data(tracker, arg) for arg in node.all_input_nodes):
        tracker.static[node] = True
    fake = tracker.fakes[node]
    if not isinstance(fake, torch.Tensor | list | tuple):
        return  # a size or other number
    rule = RULES.get(node.target) or (pointwise.pointwise if pointwise.is_pointwise(node.target) else None)
    value = tracker.apply(rule, node) if rule is not None else None
    tracker.values[node] = tracker.unknown(node, tensors) if value is None else value
    tracker.done(node)


def _is_data(tracker: Tracker, arg: fx.Node) -> bool:
    return isinstance(tracker.fakes.get(arg), torch.Tensor | list | tuple)


def _name(node: fx.Node) -> str:
    return str(node.target).removesuffix(".default")


def statistics_changed(tracker: Tracker, graph: fx.Graph, table: UnitTable) -> list[str]:
    """Name the normalisations whose statistic runs over units."""
    notes = []
    for node in graph.nodes:
        over = tracker.statistics.get(node.name, ())
        layout = table.layout(tracker.values[node]) if over else []
        if any((layer >= 0).any() for dim in over for layer in layout[dim]):
            notes.append(f"{_name(node)} at {node.meta.get('module') or node.meta.get('source') or node.name}")
    return notes
