"""Where units enter the activations, and where a gate scores them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import fx

from kfe_fx.labels.tracker import Layers, Tracker
from kfe_fx.labels.unionfind import UnionFind
from kfe_fx.program import Program

if TYPE_CHECKING:
    from kfe_fx.labels.units import UnitTable

aten = torch.ops.aten


@dataclass(frozen=True)
class Mint:
    """Labels that first appear in an activation at a node: ``fresh`` marks those that no input of it carries."""

    node: str
    dim: int
    labels: np.ndarray
    fresh: np.ndarray
    parameter: tuple[str, int] | None


@dataclass(frozen=True)
class Site:
    """A mint told in unit ids (-1: no unit), with the parameter dim that the units come from."""

    node: str
    dim: int
    units: np.ndarray
    parameter: tuple[str, int] | None = None


@dataclass(frozen=True)
class GateSite:
    """Where a gate multiplies units: after the normalisation that follows the mint.

    ``example_dim`` is the dim that counts examples; ``example_layout``: "plain" (index = example), "outer" (each
    example's rows lie together), "inner" (the examples alternate), or None where no dim counts them.
    """

    node: str
    dim: int
    units: np.ndarray
    example_dim: int | None
    example_layout: str | None


def mint_sites(tracker: Tracker, graph: fx.Graph) -> list[Mint]:
    """Find where labels enter activations: on the output of a node none of whose activation inputs carries them."""
    mints = []
    for node in graph.nodes:
        value = tracker.values.get(node)
        if node.op != "call_function" or node in tracker.static or not isinstance(value, tuple):
            continue
        if not any(value):
            continue
        carried = _carried(tracker, node)
        for dim, layers in enumerate(value):
            for layer in layers:
                roots = tracker.classes.find(layer)
                fresh = ~np.isin(roots, carried) & (roots != 0)
                if fresh.any():
                    mints.append(Mint(node.name, dim, layer, fresh, _parameter_of(tracker, node, roots)))
    return mints


def _carried(tracker: Tracker, node: fx.Node) -> np.ndarray:
    found = [np.zeros(1, dtype=np.int64)]
    for arg in node.all_input_nodes:
        value = tracker.values.get(arg)
        if arg in tracker.static or value is None:
            continue
        for dims in value if isinstance(value, list) else [value]:
            found += [tracker.classes.find(layer) for layers in dims for layer in layers]
    return np.concatenate(found)


def _parameter_of(tracker: Tracker, node: fx.Node, roots: np.ndarray) -> tuple[str, int] | None:
    for arg in node.all_input_nodes:
        if arg.op != "get_attr":
            continue
        for dim, layers in enumerate(tracker.values[arg]):
            if any(np.isin(roots[roots != 0], tracker.classes.find(layer)).any() for layer in layers):
                return str(arg.target), dim
    return None


_NORMS = {aten.batch_norm.default, aten.instance_norm.default, aten.group_norm.default}


def gate_sites(program: Program, tracker: Tracker, sites: list[Site], table: UnitTable) -> list[GateSite]:
    """Move each site past the normalisation that follows it and say which dim counts the examples there."""
    graph = program.graphs["eval"]
    nodes = {node.name: node for node in graph.nodes}
    examples = _track_examples(program)
    found = []
    for site in sites:
        node = nodes[site.node]
        users = list(node.users)
        if len(users) == 1 and users[0].target in _NORMS:
            node = users[0]
        dim, layout = _example_dim(examples, node)
        found.append(GateSite(node.name, site.dim, site.units, dim, layout))
    return found


def _track_examples(program: Program) -> tuple[Tracker, np.ndarray]:
    """Follow the batch axis as labels of its own: inputs carry one label per example, parameters none."""
    from kfe_fx.labels.analysis import BATCH, track

    tracker = _ExampleTracker(program, UnionFind(), {})
    labels = tracker.classes.fresh(BATCH)
    tracker.examples = labels
    return track(tracker, program.graphs["eval"], "eval"), labels


class _ExampleTracker(Tracker):
    examples: np.ndarray

    def input(self, node: fx.Node) -> tuple[Layers, ...]:
        shape = getattr(self.fakes[node], "shape", ())
        batched = len(shape) > 0 and shape[0] == len(self.examples)
        return tuple((self.examples,) if batched and dim == 0 else () for dim in range(len(shape)))

    def output(self, node: fx.Node) -> None:
        """Leave the examples at the output alone."""

    def parameter(self, name: str, tensor: torch.Tensor) -> tuple[Layers, ...]:
        return tuple(() for _ in tensor.shape)


def _example_dim(examples: tuple[Tracker, np.ndarray], node: fx.Node) -> tuple[int | None, str | None]:
    tracker, labels = examples
    wanted = tracker.classes.find(labels)
    if (wanted == 0).any() or len(set(wanted.tolist())) < len(wanted):
        return None, None
    for dim, layers in enumerate(tracker.values[node]):
        for layer in layers:
            roots = tracker.classes.find(layer)
            if np.array_equal(roots, wanted):
                return dim, "plain"
            times = len(roots) // len(wanted)
            if np.array_equal(roots, wanted.repeat(times)):
                return dim, "outer"
            if np.array_equal(roots, np.tile(wanted, times)):
                return dim, "inner"
    return None, None
