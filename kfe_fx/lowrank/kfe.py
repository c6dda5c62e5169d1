"""A layer in its Kronecker-factored eigenbasis: importances of columns and rows, and what is left without some.

Wang, Grosse, Fidler & Zhang (2019), "EigenDamage: structured pruning in the Kronecker-factored eigenbasis".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from kfe_fx.curvature.blocks import Block
from kfe_fx.curvature.eigen import eigenbasis
from kfe_fx.curvature.store import BlockStore, Store
from kfe_fx.errors import UsageError
from kfe_fx.lowrank.axes import Axes, matrix_of, weight_of
from kfe_fx.lowrank.layers import Layer, Op
from kfe_fx.lowrank.surgery import Factors
from kfe_fx.program import Program

PRODUCT, MOMENTS = STATISTICS = ("product", "moments")
ZERO = 1e-10  # eigenvalues up to this are zero (the authors' code)
EQUAL = 1e-12  # of the largest: eigenvalues that differ by less are equal


@dataclass(frozen=True, eq=False)
class Kfe(Axes):
    """The weight W [o, i, t] of a layer (t kernel elements) in the basis of its factors.

        W'_jkt = (U_G^T W_t U_A)_jk        I_jk = sum_t W'_jkt^2 F_jkt        loss = 1/2 sum of I over what goes

    ``F`` is lam_G lam_A^T ("product") or S* ("moments"): the curvature G (x) A (x) 1, or its diagonal in this basis.
    A [i, i] is the second moment of the input channels over all positions of all patches, without a coordinate for the
    bias (a rotation that mixes it in is no convolution). A row goes by sum_k I_jk, a column by sum_j I_jk.

    Attributes:
        layer: what it is of; the weight is that of ``layer.measured``.
        U_A: columns are eigenvectors of A, the most important first, [i, i].
        U_G: of G likewise, [o, o].
        importance: I in this order, [o, i].
        statistics: "product" or "moments".
        lost: where it was measured, the loss itself with the first r rows and c columns left, [o + 1, i + 1]: see
            ``lowrank.losses``. Importances are small beside it in trained networks, whose errors add up over kernel
            elements and positions.
    """

    U_A: Tensor
    U_G: Tensor
    importance: Tensor
    statistics: str = PRODUCT
    lost: Tensor | None = None

    @classmethod
    def of(cls, program: Program, store: Store, layer: Layer, statistics: str = PRODUCT) -> Kfe:
        """Derive it from the statistics of a network.

        Raises:
            UsageError: the store holds too little about the layer.
        """
        held = block_of(store, program, layer.measured)
        A, G = channel_factor(held, layer.measured), _factor(held, "G", layer.measured)
        in_A, in_G = eigenbasis(A.unsqueeze(0)), eigenbasis(G.unsqueeze(0))
        assert in_A.vectors is not None
        assert in_G.vectors is not None
        U_A, U_G = in_A.vectors[0], in_G.vectors[0]
        if statistics == MOMENTS:
            U_G = held.basis["U_G"][0].to("cpu", torch.float64) if "U_G" in held.basis else U_G
            spectrum = moments_in(held, U_A, layer.measured)
        else:
            lam_A, lam_G = (torch.where(one.values[0] > ZERO, one.values[0], 0.0) for one in (in_A, in_G))
            spectrum = (lam_G[:, None] * lam_A).unsqueeze(-1)
            weight = weight_of(program, layer.measured)
            U_A = aligned(U_A, in_A.values[0], torch.einsum("oct,op,pdt->cd", weight, G, weight))
            U_G = aligned(U_G, in_G.values[0], torch.einsum("oct,cd,pdt->op", weight, A, weight))
        turned = rotated(weight_of(program, layer.measured), U_G, U_A)
        importance = (turned.square() * spectrum).sum(-1)
        rows = importance.sum(1).argsort(descending=True, stable=True)
        columns = importance.sum(0).argsort(descending=True, stable=True)
        return cls(layer, U_A[:, columns], U_G[:, rows], importance[rows][:, columns], statistics)

    @property
    def column_scores(self) -> Tensor:
        """``sum_j I_jk``, [i]."""
        return self.importance.sum(0)

    @property
    def row_scores(self) -> Tensor:
        """``sum_k I_jk``, [o]."""
        return self.importance.sum(1)

    @cached_property
    def _kept(self) -> Tensor:
        """``sum of I[:r, :c]`` at [r, c], [o + 1, i + 1]."""
        rows, columns = self.importance.shape
        made = self.importance.new_zeros(rows + 1, columns + 1)
        made[1:, 1:] = self.importance.cumsum(0).cumsum(1)
        return made

    def loss(self, c: int, r: int) -> float:
        """Return the predicted increase of the loss in nats: as it was measured, else half the importances that go."""
        return self.importance_lost(c, r) if self.lost is None else float(self.lost[r, c])

    def importance_lost(self, c: int, r: int) -> float:
        """Return half the sum of the importances that go, each counted once."""
        return float((self._kept[-1, -1] - self._kept[r, c]).clamp_min(0) / 2) if (c, r) != self._all else 0.0

    @property
    def _all(self) -> tuple[int, int]:
        return self.layer.columns, self.layer.rows

    def factors(self, program: Program, c: int, r: int, *, whole: bool = False) -> Factors:
        """Return ``U_G[:, :r] W'[:r, :c] U_A[:, :c]^T``; a rotation next to a factor multiplies into it."""
        P, Q = self.U_A[:, :c], self.U_G[:, :r]
        return (self._matrix if self.layer.pointwise else self._convolution)(program, P, Q, whole)

    def _convolution(self, program: Program, P: Tensor, Q: Tensor, whole: bool) -> Factors:
        layer = self.layer
        before, core, after = None, weight_of(program, layer.core), None
        if layer.before is not None or whole or P.shape[1] < layer.columns:
            core = torch.einsum("oct,ck->okt", core, P)
            before = P.T if layer.before is None else P.T @ matrix_of(program, layer.before)
        if layer.after is not None or whole or Q.shape[1] < layer.rows:
            core = torch.einsum("oct,oj->jct", core, Q)
            after = Q if layer.after is None else matrix_of(program, layer.after) @ Q
        return Factors(core, before, after)

    def _matrix(self, program: Program, P: Tensor, Q: Tensor, whole: bool) -> Factors:
        layer = self.layer
        weight, first = matrix_of(program, layer.measured), None
        fewer = P.shape[1] < layer.columns, Q.shape[1] < layer.rows
        if layer.after is not None:
            first = matrix_of(program, layer.core)
        elif not (whole or any(fewer)):
            return Factors(weight)
        if P.shape[1] <= Q.shape[1]:
            core, after = P.T, weight @ P
            after = Q @ (Q.T @ after) if fewer[1] else after
        else:
            core, after = Q.T @ weight, Q
            core = (core @ P) @ P.T if fewer[0] else core
        return Factors(core if first is None else core @ first, None, after)


def aligned(basis: Tensor, values: Tensor, carried: Tensor) -> Tensor:
    """Turn the eigenvectors of equal eigenvalues to the principal axes of what the weight carries there.

    Of equal eigenvalues any orthonormal basis is one of eigenvectors, and by chance none of it can go. With A = 1 the
    columns become the principal components of the rows of W under G.

    Args:
        basis: eigenvectors as columns, [n, n].
        values: their eigenvalues, ascending, [n].
        carried: W^T G W for the basis of A, W A W^T for that of G, [n, n].
    """
    found = basis.clone()
    steps = values.diff() > EQUAL * values.abs().max()
    starts = [0, *(int(at) + 1 for at in steps.nonzero()), len(values)]
    for start, stop in pairwise(starts):
        if stop - start > 1:
            inside = basis[:, start:stop]
            found[:, start:stop] = inside @ torch.linalg.eigh(inside.T @ carried @ inside).eigenvectors
    return found


def rotated(weight: Tensor, U_G: Tensor, U_A: Tensor) -> Tensor:
    """Return ``U_G^T W_t U_A`` for each kernel element t, [o, i, t]."""
    return torch.einsum("oct,oj,ck->jkt", weight, U_G, U_A)


def block_of(store: Store, program: Program, op: Op) -> BlockStore:
    """Return the statistics of a weight.

    Raises:
        UsageError: there are none.
    """
    names = program.names_of(op.weight)
    found = next((store.blocks[name] for name in names if name in store.blocks), None)
    if found is None or found.kind != "kronecker" or not {"A", "G"} <= found.sums.keys():
        raise UsageError(f"the curvature statistics hold no Kronecker factors of {op.weight}; fit 'kfac' or 'ekfac'")
    return found


def channel_factor(block: BlockStore, op: Op) -> Tensor:
    """Return the second moment of the input channels over all positions of all patches, [C, C] in float64.

        A_cd = 1/T sum_t A_(c,t),(d,t)

    the mean over the T kernel elements of the diagonal blocks of the patch factor: what is taken there is the second
    moment over patches of element t, and a mean of means over equally many is the mean over all. The homogeneous
    coordinate of the bias is left out.

    Raises:
        UsageError: the store keeps the diagonal of the factor alone.
    """
    whole = _factor(block, "A", op)
    channels = op.shape[1]
    taps = torch.Size(op.shape[2:]).numel()
    wide = channels * taps
    return torch.einsum("ctdt->cd", whole[:wide, :wide].reshape(channels, taps, channels, taps)) / taps


def _factor(block: BlockStore, side: str, op: Op) -> Tensor:
    found = block.A if side == "A" else block.G
    assert found is not None
    if found.dim() != 3:
        raise UsageError(
            f"of {op.weight} the diagonal of the factor {side} alone is known: it is too wide; leave it out"
        )
    return found[0].to("cpu", torch.float64)


def patch_basis(U_A: Tensor, taps: int, column: bool) -> Tensor:
    """Return the basis ``U_A (x) 1`` of whole patches, with a coordinate of its own for the bias where there is one."""
    made = torch.kron(U_A.contiguous(), torch.eye(taps, dtype=U_A.dtype, device=U_A.device))
    return torch.block_diag(made, torch.ones(1, 1, dtype=U_A.dtype, device=U_A.device)) if column else made


def moments_in(block: BlockStore, U_A: Tensor, op: Op) -> Tensor:
    """Return S* in the basis U_G (x) U_A (x) 1, [o, C, T].

    Where it was measured in another basis V of the patches it is the diagonal, in this one, of the curvature that the
    store stands for: ``S*_jk = sum_m S*_jm (V^T u_k)_m^2``.

    Raises:
        UsageError: there is none.
    """
    found = block.S
    if found is None:
        raise UsageError(f"the curvature statistics hold no S* of {op.weight}; fit 'ekfac', or take statistics=product")
    S = found[0].to("cpu", torch.float64)
    rows, channels = op.shape[:2]
    taps = torch.Size(op.shape[2:]).numel()
    wide = channels * taps
    held = block.basis.get("U_A")
    wanted = patch_basis(U_A, taps, S.shape[1] > wide)
    if held is not None and not torch.equal(held[0].cpu(), wanted.to(held.dtype)):
        S = S @ (held[0].to("cpu", torch.float64).T @ wanted).square()
    return S[:, :wide].reshape(rows, channels, taps)


def moment_basis(block: Block, held: BlockStore, op: Op) -> dict[str, Tensor]:
    """Return the basis to measure S* in so that ``moments_in`` finds it as it is: U_A, lam_A, U_G, lam_G."""
    A, G = channel_factor(held, op), _factor(held, "G", op)
    in_A, in_G = eigenbasis(A.unsqueeze(0)), eigenbasis(G.unsqueeze(0))
    assert in_A.vectors is not None
    assert in_G.vectors is not None
    taps = torch.Size(op.shape[2:]).numel()
    column = block.bias is not None
    lam_A = in_A.values[0].repeat_interleave(taps)
    if column:
        whole = _factor(held, "A", op)
        lam_A = torch.cat([lam_A, whole[-1:, -1]])
    like = held.sums["A"]
    made = {
        "U_A": patch_basis(in_A.vectors[0], taps, column).unsqueeze(0),
        "lam_A": lam_A.unsqueeze(0),
        "U_G": in_G.vectors,
        "lam_G": in_G.values,
    }
    return {name: value.to(like) for name, value in made.items()}
