"""K-FAC: natural gradient with Kronecker factors, damped exactly or by factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kfe_fx.curvature.blocks import Block
from kfe_fx.curvature.distributed import Group
from kfe_fx.curvature.statistics import SHARINGS
from kfe_fx.curvature.temporal import OPTIONS, Inverse
from kfe_fx.errors import UsageError
from kfe_fx.optim.ekfac import EKFAC
from kfe_fx.optim.moving import factor, lagged
from kfe_fx.program import Program


class KFAC(EKFAC):
    """K-FAC (Martens & Grosse 2015; Grosse & Martens 2016 for convolutions; "expand" of Eschenhagen et al. 2023).

        damping_kind="exact":     update = U_G [ (U_G^T grad U_A) / (lam_G lam_A^T + eps) ] U_A^T
        damping_kind="factored":  update = (G + sqrt(eps)/pi I)^{-1} grad (A + pi sqrt(eps) I)^{-1},
                                  pi = sqrt( (tr A / dim A) / (tr G / dim G) ), 1 where a trace is zero

    With the ``sharing`` "rnn1" or "rnn2" weights that are shared over the steps of sequences have a model of how these
    are correlated (Martens, Ba & Johnson 2018; ``kfe_fx.curvature.temporal``), damped by factors. The rest, ``eps``
    too, is as in ``EKFAC``, whose arguments it takes; S* is not tracked.
    """

    tracks = False
    sharings = SHARINGS

    def __init__(self, program: Program, params: Any = None, *, damping_kind: str = "exact", **options: Any) -> None:
        """Attach to a Program; see ``EKFAC``.

        Raises:
            UsageError: an argument has a value that means nothing.
        """
        if damping_kind not in ("exact", "factored"):
            raise UsageError(f"there is no damping_kind {damping_kind!r}; choose exact or factored")
        if options.get("sharing") in OPTIONS and damping_kind != "factored":
            raise UsageError(f"sharing={options['sharing']!r} is damped by factors; take damping_kind='factored'")
        if damping_kind == "factored" and options.get("rank") is not None:
            raise UsageError("factored damping needs whole factors; leave out rank, or take damping_kind='exact'")
        self.damping_kind = damping_kind
        self._stale: set[str] = set()  # blocks whose inverses are of older factors
        super().__init__(program, params, **options)

    def _refresh(self, blocks: list[Block], group: Group) -> None:
        if self.damping_kind == "exact":
            super()._refresh(blocks, group)
            return
        for block in blocks:
            state = self.block_state(block)
            state["traces"] = torch.stack([_trace(factor(state, "A")), _trace(factor(state, "G"))])  # [2, K]
            state["S"] = (state["traces"][0] * state["traces"][1]).view(-1, 1, 1)  # what the damping is relative to
            self._stale.add(block.name)

    def _precondition(self, block: Block, grad: Tensor) -> tuple[Tensor, Tensor]:
        state = self.block_state(block)
        if self.damping_kind == "exact" or "traces" not in state:
            return super()._precondition(block, grad)
        if block.name in self._stale or ("inverse_A" not in state and "inverse" not in state):
            self._invert(block, state)
        if "inverse" in state:
            update = Inverse(**state["inverse"]).apply(grad)
            return update, (update * grad).sum()
        A, G = state["inverse_A"], state["inverse_G"]
        made = torch.bmm(G, grad) if G.dim() == 3 else G.unsqueeze(2) * grad
        update = torch.bmm(made, A) if A.dim() == 3 else made * A.unsqueeze(1)
        return update, (update * grad).sum()

    def _invert(self, block: Block, state: dict[str, Any]) -> None:
        self._stale.discard(block.name)
        A, G = factor(state, "A"), factor(state, "G")
        sharing = self._moving.sums.sharing
        eps = A.new_tensor(self._eps * self._groups[id(self.program.tensor(block.weight))]["damping"])
        if sharing in OPTIONS and "A1" in state:
            found = lagged(state).damped(float(eps)).inverse(sharing)
            state["inverse"] = {"terms": found.terms, "weight": found.weight}
            return
        means = [total / width for total, width in zip(state["traces"], (A.shape[-1], G.shape[-1]), strict=True)]
        live = (means[0] > 0) & (means[1] > 0)
        pi = torch.where(live, (means[0] / means[1].where(live, 1.0)).sqrt(), 1.0)
        state["inverse_A"] = _inverse(A, pi * eps.sqrt())
        state["inverse_G"] = _inverse(G, eps.sqrt() / pi)


def _trace(matrix: Tensor) -> Tensor:
    return (matrix.diagonal(dim1=1, dim2=2) if matrix.dim() == 3 else matrix).sum(1)


def _inverse(matrix: Tensor, damping: Tensor) -> Tensor:
    """Invert [K, d, d] + damping [K], or a diagonal [K, d]; a dead factor inverts to zero."""
    dead = damping <= 0
    if matrix.dim() == 2:
        return torch.where(dead.view(-1, 1), 0.0, 1 / (matrix + damping.view(-1, 1)).clamp_min(1e-30))
    eye = torch.eye(matrix.shape[-1], dtype=torch.float64, device=matrix.device)
    wide = matrix.double() + damping.where(~dead, 1.0).double().view(-1, 1, 1) * eye
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(wide)).to(matrix)
    return inverse * (~dead).view(-1, 1, 1)
