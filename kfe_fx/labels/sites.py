"""Where units enter the activations, and where a gate scores them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from kfe_fx.labels.examples import ExampleTracker
from kfe_fx.labels.score_masks import is_score_mask
from kfe_fx.labels.tracker import Tracker

aten = torch.ops.aten


@dataclass(frozen=True)
class Mint:
    """Labels that first appear in an activation at a node: ``fresh`` marks those that no input of it carries.

    Inside an operation they have no dim of its value: ``argument`` is then the one that multiplies them, [N or 1, n].
    """

    node: str
    dim: int
    labels: np.ndarray
    fresh: np.ndarray
    parameter: tuple[str, int] | None
    argument: str | None = None


@dataclass(frozen=True)
class Site:
    """A mint told in unit ids (-1: no unit), with the parameter dim that the units come from."""

    node: str
    dim: int
    units: np.ndarray
    parameter: tuple[str, int] | None = None
    argument: str | None = None


@dataclass(frozen=True)
class GateSite:
    """Where a gate multiplies units: after the normalisation that follows the mint.

    ``example_dim`` is the dim that counts examples; ``example_layout``: "plain" (index = example), "outer" (each
    example's rows lie together), "inner" (the examples alternate), or None where no dim counts them. ``argument``: the
    gate is that argument of the operation, [N or 1, units], which multiplies inside it.
    """

    node: str
    dim: int
    units: np.ndarray
    example_dim: int | None
    example_layout: str | None
    argument: str | None = None


def mint_sites(tracker: Tracker, graph: fx.Graph) -> list[Mint]:
    """Find where labels enter activations: by a contraction's parameter, or where no activation input carries them."""
    mints = []
    for node in graph.nodes:
        value = tracker.values.get(node)
        state = node.op == "placeholder" and node in tracker.minted
        if (node.op != "call_function" and not state) or node in tracker.static:
            continue
        if isinstance(value, list):
            mints += _inside(tracker, node)
        if not isinstance(value, tuple):
            continue
        if not any(value):
            continue
        carried = _carried(tracker, node)
        brought = tracker.minted.get(node, set())
        for dim, layers in enumerate(value):
            for layer in layers:
                roots = tracker.classes.find(layer)
                fresh = (roots != 0) if dim in brought else ~np.isin(roots, carried) & (roots != 0)
                if fresh.any():
                    mints.append(Mint(node.name, dim, layer, fresh, _parameter_of(tracker, node, roots)))
    return mints


def _inside(tracker: Tracker, node: fx.Node) -> list[Mint]:
    mints = []
    for argument, layers in tracker.minted.get(node, {}).items():
        for layer in layers:
            roots = tracker.classes.find(layer)
            if (roots != 0).any():
                parameter = _parameter_of(tracker, node, roots)
                mints.append(Mint(node.name, 1, layer, roots != 0, parameter, argument))
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


def gate_sites(graph: fx.Graph, examples: ExampleTracker, sites: list[Site]) -> list[GateSite]:
    """Move each site past the normalisation that follows it and say which dim counts the examples there.

    The mask of attention, spread over the heads, is left out: its heads are gated in the values, and a gate would give
    0 * -inf where it forbids a key.
    """
    nodes = {node.name: node for node in graph.nodes}
    masks = _score_masks(examples, nodes, sites)
    found = []
    for site in sites:
        node = nodes[site.node]
        if node.op == "placeholder":
            continue  # a state is gated where it is computed
        if site.node in masks:
            continue
        if site.argument is not None:
            rows = examples.layout_of(examples.values[node][1])  # of the last state, [N, units]
            layout = "plain" if rows == (0, "plain") else None
            found.append(GateSite(node.name, 1, site.units, 0, layout, site.argument))
            continue
        users = list(node.users)
        if len(users) == 1 and users[0].target in _NORMS:
            node = users[0]
        dim, layout = examples.layout(node)
        found.append(GateSite(node.name, site.dim, site.units, dim, layout))
    return found


def _score_masks(examples: ExampleTracker, nodes: dict[str, fx.Node], sites: list[Site]) -> set[str]:
    """Name the nodes that are masks of attention, where all their units have a gate at another node."""
    plain = [site for site in sites if nodes[site.node].op != "placeholder" and site.argument is None]
    masks = {site.node for site in plain if is_score_mask(examples.program, nodes[site.node])}
    elsewhere = [site.units for site in sites if site.node not in masks]
    gated = np.concatenate([np.array([-1]), *elsewhere])
    return {site.node for site in plain if site.node in masks and np.isin(site.units, gated).all()}
