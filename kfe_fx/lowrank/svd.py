"""A layer by its singular directions: the best approximation of given rank, of its weight or of its outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kfe_fx.curvature.eigen import eigenbasis
from kfe_fx.curvature.store import Store
from kfe_fx.errors import UsageError
from kfe_fx.lowrank.axes import Axes, matrix_of, weight_of
from kfe_fx.lowrank.kfe import block_of
from kfe_fx.lowrank.layers import Layer
from kfe_fx.lowrank.surgery import Factors
from kfe_fx.program import Program

WEIGHTS, OUTPUTS = OF = ("weights", "outputs")


@dataclass(frozen=True, eq=False)
class Svd(Axes):
    """The weight W [o, i T] of a layer (a convolution's as a matrix of its patches) as a sum over its rows' directions.

        W ~ U_k U_k^T W        loss = sum of sigma_j^2 over what goes / sum of all

    "weights": W = U diag(sigma) V^T, so that U_k^T W = diag(sigma_k) V_k^T (Eckart & Young 1936): the share of the
    squared norm that is lost. "outputs": U and sigma are those of W A^(1/2) with A = E[x x^T] of the layer's patches
    x, so that it is the share of E|W x|^2 that is lost; U are the eigenvectors of W A W^T = E[(W x)(W x)^T]. All
    columns stay; a layer in two factors is decomposed as their product.

    Attributes:
        layer: what it is of.
        U: the directions, the most important first, [o, n].
        shares: sigma_j^2 / sum, descending, [n].
    """

    U: Tensor
    shares: Tensor

    @classmethod
    def of(cls, program: Program, layer: Layer, store: Store | None = None) -> Svd:
        """Decompose the weight, or with the statistics of a network the outputs.

        Raises:
            UsageError: the store holds too little about the layer.
        """
        weight = _product(program, layer).flatten(1)
        if store is None:
            U, sigma, _ = torch.linalg.svd(weight, full_matrices=False)
            squares = sigma.square()
        else:
            block = block_of(store, program, layer.core)
            A = block.A
            if A is None or A.dim() != 3:
                raise UsageError(
                    f"of {layer.core.weight} the diagonal of A alone is known: it is too wide; leave it out"
                )
            A = A[0, : weight.shape[1], : weight.shape[1]].to("cpu", torch.float64)
            found = eigenbasis((weight @ A @ weight.T).unsqueeze(0))
            assert found.vectors is not None
            U, squares = found.vectors[0].flip(1), found.values[0].flip(0)
        count = min(layer.rows, U.shape[1])
        return cls(layer, U[:, :count], squares[:count] / squares.sum().clamp_min(torch.finfo(squares.dtype).tiny))

    @property
    def column_scores(self) -> Tensor:
        """Nothing: all columns stay, [0]."""
        return self.shares.new_zeros(0)

    @property
    def row_scores(self) -> Tensor:
        """The shares of the directions, [rows]; those that there is no direction for have 0."""
        return torch.cat([self.shares, self.shares.new_zeros(self.layer.rows - len(self.shares))])

    def loss(self, c: int, r: int) -> float:
        """Return the share that is lost when ``r`` directions stay."""
        return float(self.shares[r:].sum())

    def factors(self, program: Program, c: int, r: int, *, whole: bool = False) -> Factors:
        """Return ``U_r^T W`` and ``U_r``, behind the matrix that may be in front of the layer already."""
        layer = self.layer
        weight = _product(program, layer)
        before = None if layer.before is None else matrix_of(program, layer.before)
        if layer.after is None and r >= layer.rows and not whole:
            return Factors(weight, before)
        U = self.U[:, :r]
        return Factors(torch.einsum("oct,oj->jct", weight, U), before, U)


def _product(program: Program, layer: Layer) -> Tensor:
    """Return the core times what is behind it, [o, i, T]."""
    core = weight_of(program, layer.core)
    return core if layer.after is None else torch.einsum("oj,jct->oct", matrix_of(program, layer.after), core)
