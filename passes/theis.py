"""Removal while training: signals of every step, and a few units masked every few steps (Theis et al. 2018).

Each step's forward pass has gates at one, an example each, so that the backward pass that trains the weights gives

    g[n, u] = d loss_n / d gate[n, u]     and     Delta_u <- decay Delta_u + (1 - decay) 1/(2N) sum_n g[n, u]^2

beside (section 2; the decay is the authors'). Every ``every`` steps the units with the least Delta per cost saved are
masked until the predicted cost has come down to that step's share of the way; a masked unit stays masked. The surgery
comes at the end of the round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kfe_fx.curvature.distributed import Group
from kfe_fx.gates import insert
from kfe_fx.labels.analysis import Analysis
from kfe_fx.program import Program, ProgramModule, copy_graph
from kfe_fx.training.batches import pinned_batch

DECAY = 0.96
EVERY = 10


class _Gated(ProgramModule):
    """Runs a network with the gates that ``Signals`` hands out."""

    signals: Signals

    def run_flat(self, flat: list[Any], mode: str = "eval") -> tuple[Any, ...]:
        return super().run_flat([*flat, *self.signals.gates(flat)], mode)


@dataclass
class Signals:
    """The running Fisher scores of a network in training, and the units that were masked on the way.

    Attributes:
        program: the network that is trained.
        analysis: its units.
        choose: called with (scores, share of the steps done); returns the units that are to be masked by then. In a
            process group rank 0 alone calls it.
        total: steps in all.
        masked: the units that are.
        scores: Delta, float64 [units].
    """

    program: Program
    analysis: Analysis
    choose: Callable[[np.ndarray, float], frozenset[int]]
    total: int
    every: int = EVERY
    decay: float = DECAY
    masked: frozenset[int] = frozenset()
    scores: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        """Start with scores of zero."""
        self.scores = np.zeros(len(self.analysis.units))
        self._steps = 0
        self._weight = 0.0
        self._seen: list[tuple[tuple[Tensor, ...], int]] = []
        self._columns = [np.asarray(group.units) for group in self.analysis.groups]
        self._pinned = pinned_batch(self.program)
        self._alone = self._pinned is not None or any(
            site.example_layout is None for site in self.analysis.gate_sites
        )  # one gate for all examples

    def view(self) -> Program:
        """Return the network with gates over the same tensors."""
        source = self.program.module()
        graphs = {mode: copy_graph(graph) for mode, graph in source.graphs.items()}
        for graph in graphs.values():
            insert(graph, self.analysis)
        view = _Gated(graphs, source.signature)
        view._modules, view._parameters, view._buffers = source._modules, source._parameters, source._buffers
        view.signals = self
        view.train(source.training)
        program = self.program
        return Program(view, program.example_inputs, program.axes, program.lineage, program.notes, dict(program.extras))

    def gates(self, flat: list[Any]) -> tuple[Tensor, ...]:
        """Return one gate per example and unit, ones but for masked units, to be differentiated."""
        rows = self._examples(flat)
        kind = next((p.dtype for p in self.program.module().parameters() if p.is_floating_point()), torch.float32)
        gates = []
        for units in self._columns:
            gate = torch.ones(1 if self._alone else rows, len(units), dtype=kind)
            gate[:, [unit in self.masked for unit in units.tolist()]] = 0.0
            gates.append(gate.requires_grad_(torch.is_grad_enabled()))
        if torch.is_grad_enabled():
            self._seen.append((tuple(gates), rows))
        return tuple(gates)

    def _examples(self, flat: list[Any]) -> int:
        dims = self.program.example_dims()
        for name, value in zip(self.program.signature.input_names, flat, strict=True):
            if name in dims and isinstance(value, Tensor):
                return value.shape[dims[name]]
        return self._pinned or 1

    def add_gradients(self) -> None:
        """Take in the signals of a step; called behind its backward pass, as penalties are. Adds nothing.

        In a process group every rank calls it in every step, with its share of the batch or none of it.
        """
        for units, per_unit in zip(self._columns, self._per_unit(), strict=True):
            if per_unit is not None:
                self.scores[units] *= self.decay
                self.scores[units] += (1 - self.decay) * per_unit
        self._seen.clear()
        self._steps += 1
        self._weight = 1 - self.decay**self._steps
        if self._steps % self.every == 0 or self._steps == self.total:
            # rank 0 chooses: sums that differ in the last bit would mask other units
            share = self._steps / self.total
            self.masked |= Group.current().lead(lambda: self.choose(self.estimates(), share))

    def _per_unit(self) -> list[np.ndarray | None]:
        """Return 1/(2N) sum_n g[n, u]^2 over the batch of all ranks, per group of units; None where nothing came back.

        A rank's gradients are those of the mean over its share, so times the share they are those of its examples. A
        gate of one row holds the sum of all examples, whose square is that of N independent ones: ranks add before it.
        """
        sums = [torch.zeros(len(units) + 1, dtype=torch.float64) for units in self._columns]  # and whether there is any
        examples = torch.tensor([float(sum(rows for _, rows in self._seen))], dtype=torch.float64)
        for gates, rows in self._seen:
            for total, gate in zip(sums, gates, strict=True):
                if gate.grad is not None:
                    found = gate.grad.double() * rows
                    total[:-1] += (found if self._alone else found.square()).sum(0)
                    total[-1] += 1
        Group.current().sum([examples, *sums])
        squares = [total[:-1].square() if self._alone else total[:-1] for total in sums]
        return [
            (each / (2 * float(examples))).numpy() if float(total[-1]) else None
            for each, total in zip(squares, sums, strict=True)
        ]

    def estimates(self) -> np.ndarray:
        """Return the scores without the bias of a short run: the average's start at zero is divided out."""
        return self.scores / max(self._weight, 1e-12)

    def scores_with_masked_first(self, penalty: np.ndarray | float = 0.0) -> np.ndarray:
        """Return the estimates plus a penalty, with the masked units at zero: they go before all others."""
        found = self.estimates() + penalty
        found[list(self.masked)] = 0.0
        return found
