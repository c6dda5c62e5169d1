"""What a layer can lose: its columns and rows in some basis, each with a score, and the factors that are left."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from kfe_fx.lowrank.layers import Layer, Op
from kfe_fx.lowrank.surgery import Factors
from kfe_fx.program import Program


@dataclass(frozen=True, eq=False)
class Axes(ABC):
    """The columns and rows of one layer, most important first; what stays is the first ``c`` and the first ``r``."""

    layer: Layer

    @property
    @abstractmethod
    def column_scores(self) -> Tensor:
        """Scores of the columns, descending, [columns]; [0] where none can go."""

    @property
    @abstractmethod
    def row_scores(self) -> Tensor:
        """Scores of the rows, descending, [rows]."""

    @abstractmethod
    def loss(self, c: int, r: int) -> float:
        """Return what it costs to keep no more than ``c`` columns and ``r`` rows."""

    def importance_lost(self, c: int, r: int) -> float:
        """Return what goes by the scores alone; it never falls as more goes."""
        return self.loss(c, r)

    @abstractmethod
    def factors(self, program: Program, c: int, r: int, *, whole: bool = False) -> Factors:
        """Return the factors that keep ``c`` columns and ``r`` rows of a layer of ``program``.

        With ``whole`` a layer gets all its operations, also where nothing is removed.
        """

    @property
    def total(self) -> float:
        """The importance of everything."""
        return self.importance_lost(0, 0)


def weight_of(program: Program, op: Op) -> Tensor:
    """Return a weight in float64 on the CPU, [out, in, taps]; a matrix has one tap."""
    held = program.tensor(op.weight).detach().to("cpu", torch.float64)
    return held.reshape(*held.shape[:2], -1)


def matrix_of(program: Program, op: Op) -> Tensor:
    """Return the weight of a pointwise operation in float64 on the CPU, [out, in]."""
    return weight_of(program, op)[..., 0]
