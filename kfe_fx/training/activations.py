"""Activations of a network beside its outputs, and how far they are from a teacher's."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from kfe_fx.errors import BadData, UsageError
from kfe_fx.program import Program, ProgramModule, copy_graph
from kfe_fx.training.features import Features, Kept, cut_to, left_of, matching, points, read_features


class Watched:
    """Run a Program and get the activations of some nodes beside its outputs.

    Tensors, statistics and whoever observes the module's taps are the Program's own: a backward pass through what this
    returns is one through the Program.
    """

    def __init__(self, program: Program, names: Sequence[str]) -> None:
        """Name the nodes; without any this runs the Program as it is."""
        self.program = program
        self.names = tuple(names)
        self._views: dict[tuple[str, int], ProgramModule] = {}

    def run(self, flat: list[Any], mode: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Run graph ``mode`` and return the flat outputs and the activations.

        Raises:
            UsageError: a node is not in the graph that runs, as inside a recurrent layer that an optimizer opened.
        """
        module = self.program.module()
        if not self.names:
            return module.run_flat(flat, mode), ()
        observer = module._observer if torch.is_grad_enabled() else None
        key = mode, id(observer)
        if key not in self._views:
            graph = module.graphs[mode] if observer is None else module._observed.get(mode, module.graphs[mode])
            twin = copy.copy(module)  # of its class, which may hand the graph more than its inputs
            twin.graphs, twin._compiled = {**module.graphs, mode: self._extended(graph)}, {}
            twin._observer, twin._observed = None, {}
            if observer is not None:
                twin.observe(observer, {mode: twin.graphs[mode]})
            self._views[key] = twin
        found = tuple(self._views[key].run_flat(flat, mode))
        return found[: -len(self.names)], found[-len(self.names) :]

    def _extended(self, graph: fx.Graph) -> fx.Graph:
        """Return a copy of a graph that returns the activations, too."""
        twin = copy_graph(graph)
        nodes = {node.name: node for node in twin.nodes}
        absent = [name for name in self.names if name not in nodes]
        if absent:
            raise UsageError(
                f"the activation {absent[0]!r} is not in the graph that trains; name another one in features, or train "
                "with adamw or sgd"
            )
        output = twin.output_node()
        leaves: Any = output.args[0]
        output.args = ((*leaves, *(nodes[name] for name in self.names)),)
        return twin


@dataclass(frozen=True)
class Chosen:
    """An activation: its name, its node in the network and in the teacher, c_f, what stays, and if it was named so."""

    name: str
    node: str
    theirs: str
    weight: float
    kept: Kept | list[int] | None
    exact: bool


class Compared:
    """The activations that a network and its teacher are compared by.

        sum over features f of  c_f * mean (s_f - t_f)² / mean t_f²

    The second mean is that of the batch that ``measure`` sees, a constant: so each part of a batch counts by its number
    of examples.
    """

    def __init__(self, features: Features | None) -> None:
        """Read what is wanted; see ``Distillation.features``.

        Raises:
            UsageError: it means nothing.
        """
        self._wanted = read_features(features or {})
        self._scales: list[float] = []
        self._kept: list[Kept] = []
        self.chosen: list[Chosen] = []

    def choose(self, program: Program, teacher: Program) -> None:
        """Find the activations that both networks have under a name that is wanted, each once.

        Raises:
            UsageError: a name matches none.
        """
        known, own = points(teacher), points(program)
        both = [name for name in known if name in own]
        chosen: dict[str, Chosen] = {}
        for pattern, (weight, kept) in self._wanted.items():
            for name in matching(both, [pattern]):
                one = Chosen(name, own[name], known[name], weight, kept, exact=name == pattern)
                chosen.setdefault(own[name], one)
        self.chosen = list(chosen.values())

    def measure(self, mine: tuple[Any, ...], theirs: tuple[Any, ...]) -> None:
        """Check the shapes of one batch and take the mean squares of the teacher's; drop what is no tensor of numbers.

        Raises:
            UsageError: what stays of an activation has another shape than this network's, or one named is no tensor.
            BadData: an activation of the teacher's is zero, or not finite.
        """
        chosen = []
        for one, own, wanted in zip(self.chosen, mine, theirs, strict=True):
            if not all(isinstance(value, Tensor) and value.is_floating_point() for value in (own, wanted)):
                if one.exact:
                    raise UsageError(f"features: {one.name!r} is no floating-point tensor; name another activation")
                continue
            changes = left_of(one.name, wanted, own, one.kept)
            size = float(cut_to(wanted, changes).square().mean())
            if not 0 < size < math.inf:
                raise BadData(f"features: the teacher's {one.name!r} has the mean square {size:g}; name another one")
            chosen.append(one)
            self._scales.append(one.weight / size)
            self._kept.append(changes)
        self.chosen = chosen

    def cut(self, theirs: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """Take what stays of the teacher's activations."""
        return tuple(cut_to(value, changes) for value, changes in zip(theirs, self._kept, strict=True))

    def term(self, mine: tuple[Any, ...], wanted: tuple[Any, ...]) -> list[Tensor]:
        """Return the part of each activation; ``wanted`` is what ``cut`` returns."""
        triples = zip(self._scales, mine, wanted, strict=True)
        return [scale * F.mse_loss(own, value.to(own)) for scale, own, value in triples]

    def identity(self) -> str:
        """Tell one choice from another."""
        return hashlib.sha256(repr(self._wanted).encode()).hexdigest() if self._wanted else ""
