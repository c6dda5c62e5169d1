"""The gradients that gates must give, on the networks that criteria are tested on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from kfe_fx.labels.analysis import Analysis
from kfe_fx.program import Program
from kfe_fx.testing.nets import CLASSES, NAMES, build, program_of, randomise

__all__ = ["CLASSES", "NAMES", "build", "expected_gradients", "program_of", "randomise"]


def expected_gradients(program: Program, analysis: Analysis, flat: list[Any], loss: Any) -> np.ndarray:
    """Compute sum over members and positions of a * dl_n/da without gates, one example at a time, [N, units]."""
    rows = []
    for n in range(len(flat[0])):
        runner = _Recorder(program, {site.node for site in analysis.gate_sites})
        one = [value[n : n + 1] for value in flat]
        total = loss(runner.run(*one), n)
        kept = list(runner.kept.items())
        gradients = torch.autograd.grad(total, [value for _, value in kept], allow_unused=True)
        products = {
            name: torch.zeros_like(value) if grad is None else (value * grad).detach()
            for (name, value), grad in zip(kept, gradients, strict=True)
        }
        row = np.zeros(len(analysis.units))
        for site in analysis.gate_sites:
            product = products[site.node].movedim(site.dim, 0).flatten(1).sum(1).numpy()
            owned = site.units >= 0
            np.add.at(row, site.units[owned], product[owned])
        rows.append(row)
    return np.stack(rows)


class _Recorder(fx.Interpreter):
    def __init__(self, program: Program, names: set[str]) -> None:
        super().__init__(program.module(), graph=program.graphs["eval"])
        self.names = names
        self.kept: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.names:
            self.kept[n.name] = value
        return value
