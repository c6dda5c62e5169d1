"""Sites: the operations of a graph where parameters meet what depends on the examples."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from kfe_fx.curvature import rules as _rules  # registers the pairings
from kfe_fx.curvature.direct import CONTRIBUTIONS
from kfe_fx.curvature.examples import Examples
from kfe_fx.curvature.layout import Layout
from kfe_fx.curvature.operands import UNREACHED, Operand, Operands, draws
from kfe_fx.curvature.pairings import PAIRINGS, Pairing
from kfe_fx.labels.analysis import analysis_sizes
from kfe_fx.program import Program
from kfe_fx.recurrent.opened import STATES
from kfe_fx.shapes import propagate_all

assert _rules

Missing = Callable[[str, str], object]
_SILENT = {STATES, *UNREACHED}


@dataclass(frozen=True)
class Site:
    """One operation of one graph with parameters among its arguments.

    ``node`` is what its tap is set on: the operation, or the ``getitem`` of one of several outputs. ``inputs`` are the
    tensors that its arguments are, or take a size from, where they depend on the examples: what the tap keeps.
    ``layouts`` say where each of them, and under the node's own name the output, holds the examples.
    """

    node: fx.Node
    pairing: Pairing | None
    operands: tuple[Operand, ...]
    inputs: tuple[fx.Node, ...]
    layouts: dict[str, Layout | None]

    @property
    def name(self) -> str:
        """The name of the tapped node."""
        return self.node.name

    @property
    def operation(self) -> fx.Node:
        """The node that computes."""
        return self.node.args[0] if self.several else self.node  # type: ignore[return-value]

    @property
    def several(self) -> bool:
        """Whether the operation has several outputs, of which this is one."""
        return self.node.target is operator.getitem

    @property
    def batched(self) -> bool:
        """Whether the output tells its examples apart, and for pairs of rows the data too."""
        needed = [self.node.name, *([self.pairing.data.name] if self.pairing is not None else [])]
        return all(self.layouts[name] is not None for name in needed)


class Look:
    """What is known of one graph: which values are the same for all examples, and where the others hold them."""

    def __init__(self, program: Program, graph: fx.Graph, mode: str, trained: set[str]) -> None:
        """Look at a graph without taps that stands for ``program.graphs[mode]``."""
        twin = program.sharing()
        twin.module().graphs[mode] = graph
        fakes = propagate_all(twin, (mode,), analysis_sizes(program))[mode]
        self.graph = graph
        self.idle: dict[str, str] = {}  # parameters that no gradient comes to somewhere, and why
        self.evaluating = mode == "eval"
        self.examples = Examples(twin, graph, fakes)
        self.operands = Operands(program, graph, trained, self._counts)

    def _counts(self, node: fx.Node, dim: int) -> bool:
        """Tell whether the size of a node along a dim may depend on how many examples there are."""
        if node.op == "placeholder":
            name = str(node.target)
            return self.examples.program.axes.get(name, {}).get(dim) in self.examples.program.batch_axes()
        layout = self.layout(node)
        return layout is None or layout.dim == dim % len(self.shape(node))

    def fixed(self, node: fx.Node) -> bool:
        """Tell whether a node has the same value for all examples."""
        return self.operands.fixed(node)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Return the shape of a tensor node at the sizes of the analysis."""
        return self.examples.shape(node)

    def is_tensor(self, node: Any) -> bool:
        """Tell whether an argument is a node that holds one tensor."""
        return self.examples.is_tensor(node)

    def layout(self, node: fx.Node) -> Layout | None:
        """Return where a node holds the examples."""
        dim, order = self.examples.layout(node)
        return None if dim is None or order is None else Layout(dim, order)

    def differentiable(self, node: fx.Node) -> bool:
        """Tell whether a node holds a tensor that a gradient can come through."""
        fake = self.examples.fakes[node]
        return isinstance(fake, torch.Tensor) and (fake.dtype.is_floating_point or fake.dtype.is_complex)

    def _behind(self, node: fx.Node) -> list[fx.Node]:
        """List the tensors that the arguments are, or take their sizes from, and that depend on the examples."""
        found: list[fx.Node] = []
        for arg in node.all_input_nodes:
            if self.fixed(arg):
                found += [size for size in self.operands.sized(arg) if size.op != "placeholder"]
            elif isinstance(self.examples.fakes.get(arg), torch.Tensor):
                found.append(arg)
            else:
                found += self._behind(arg)
        return found

    def sites(self, missing: Missing) -> list[Site]:
        """Find the operations where parameters meet what depends on the examples; tell ``missing`` what has no site."""
        found: list[Site] = []
        for node in self.graph.nodes:
            if node.op in ("placeholder", "get_attr") or self.fixed(node) or node.target in _SILENT:
                continue
            tensors = [arg for arg in node.all_input_nodes if self.is_tensor(arg)]  # a size of a parameter is none
            operands = [operand for arg in tensors if (operand := self.operands.of(arg)) is not None]
            if not operands:
                continue
            tapped = self._tapped(node)
            made = [self._site(node, each, tuple(operands)) for each in tapped or ()]
            if not made and node.users:
                self.idle |= {
                    name: f"only {_goes(node)}, which has no gradient" for one in operands for name in one.names
                }
            if tapped is None or (self.evaluating and any(_drawn(site) for site in made)):
                for name in (name for operand in operands for name in operand.names):
                    missing(name, _reason(node))
            found += made
        return found

    def _tapped(self, node: fx.Node) -> list[fx.Node] | None:
        """Return the outputs of an operation that gradients come through, or None where it cannot be looked at."""
        if node.op != "call_function":
            return None
        if self.is_tensor(node):
            return [node] if self.differentiable(node) and node.users else []
        if not isinstance(self.examples.fakes.get(node), list | tuple):
            return []
        if any(user.target is not operator.getitem for user in node.users):
            return None
        return [user for user in node.users if self.differentiable(user) and user.users]

    def _site(self, node: fx.Node, tapped: fx.Node, operands: tuple[Operand, ...]) -> Site:
        plain = tapped is node and not self.examples.fakes[node].dtype.is_complex
        rule = PAIRINGS.get(node.target) if plain else None
        pairing = rule(self, node) if rule is not None else None
        inputs = tuple(dict.fromkeys(self._behind(node)))
        layouts = {arg.name: self.layout(arg) for arg in (*inputs, tapped)}
        made = Site(tapped, pairing, operands, inputs, layouts)
        return replace(made, layouts={**layouts, tapped.name: None}) if _drawn(made) else made


def _drawn(site: Site) -> bool:
    """Tell whether a site would have to be run again to be differentiated, and would then draw other numbers."""
    known = site.pairing is not None or site.operation.target in CONTRIBUTIONS
    return draws(site.operation) and not known


def _reason(node: fx.Node) -> str:
    if node.op == "output":
        return "is an output that no example goes into"
    return f"{_goes(node)}, which draws at random" if draws(node) else f"{_goes(node)}, which has no rule"


def _goes(node: fx.Node) -> str:
    return f"goes into {str(node.target).removesuffix('.default')}"
