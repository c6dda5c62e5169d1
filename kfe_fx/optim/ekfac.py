"""EKFAC: natural gradient in the Kronecker-factored eigenbasis with second moments tracked in it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from kfe_fx.curvature.blocks import Block
from kfe_fx.curvature.distributed import Group
from kfe_fx.curvature.observation import Observation
from kfe_fx.curvature.pairs import OneHot, Pairs
from kfe_fx.curvature.statistics import EXPAND, REDUCE, Basis, Factors, Moments, MomentSums
from kfe_fx.errors import UsageError
from kfe_fx.optim import truncated
from kfe_fx.optim.moving import Moving, decompose, share
from kfe_fx.optim.preconditioned import EMPIRICAL, MEAN, Preconditioned
from kfe_fx.program import Program

_TOLERANCE = 1e-4  # of a probe of the gradient: beyond it p.grad is not what the taps saw
_TINY = 1e-30


class EKFAC(Preconditioned):
    """EKFAC (George, Laurent, Bouthillier, Ballas, Vincent 2018, algorithm 1).

        update = U_G [ (U_G^T grad U_A) / (S* + eps) ] U_A^T
        S*     = moving average of E_n[ (U_G^T dW_n U_A)^2 ], every step; reset to lam_G lam_A^T with each new basis

    Bases are the eigenvectors of moving averages of A and G, refreshed every ``refresh`` steps in float64. ``eps`` is
    one number for all blocks, ``damping`` times the mean of their traces now or at the start, whichever is less: it
    follows the scale of the loss, and does not grow with the curvature. Where no weights are shared the rotated
    gradient is ``(g U_G)^T (a U_A)`` at once; a random probe per step tells whether ``p.grad`` is still that (it was
    not clipped, nothing was added), else ``p.grad`` is rotated. Parameters without pairs of rows have the diagonal S*
    of their own gradients.

    With ``rank`` the basis of each wide factor keeps its leading eigenvectors alone, by subspace iteration; what is
    orthogonal to them is taken as isotropic (see ``kfe_fx.optim.truncated``).

    With the source "empirical" S* is that of the loss's own gradients: free, but it sees the signal as noise early in
    training. With "sampled" it is the Fisher of the model, for one more backward pass without weight gradients.

    In training mode batch norm couples the examples; S* is then of the total derivative by each row. Recurrent layers
    run step by step while a loss is differentiated; the gradient of an example is the sum over its steps.

    Example:
        >>> optimizer = kfe_fx.optim.EKFAC(program)
        >>> for inputs, targets in loader:
        ...     optimizer.zero_grad()
        ...     F.cross_entropy(program.module()(inputs), targets).backward()
        ...     optimizer.step()
        >>> optimizer.close()
    """

    tracks = True  # whether S* follows the data between two bases
    sharings: tuple[str, ...] = (EXPAND, REDUCE)

    def __init__(
        self,
        program: Program,
        params: Iterable[Any] | None = None,
        *,
        lr: float = 0.2,
        momentum: float = 0.5,
        weight_decay: float = 0.0,
        damping: float = 5e-4,
        refresh: int = 10,
        factor_every: int | None = None,
        rank: int | None = None,
        decay: float = 0.95,
        kl_clip: float | None = 1e-3,
        clip_norm: float | None = None,
        source: str = EMPIRICAL,
        reduction: str = MEAN,
        accumulation: int = 1,
        loss_scale: float = 1.0,
        fallback_lr: float = 1e-3,
        sharing: str = EXPAND,
        seed: int = 0,
    ) -> None:
        """Attach to a Program.

        Args:
            program: what is trained; its live module calls the taps until ``close``.
            params: parameters or groups of them, as for any optimizer; by default all of the Program's.
            lr: learning rate.
            momentum: of the preconditioned gradient, 0 to below 1.
            weight_decay: decoupled (Loshchilov & Hutter 2019).
            damping: eps over the mean trace of a block's curvature, above 0.
            refresh: steps between new bases.
            factor_every: steps between additions to A and G; by default a fifth of ``refresh``.
            rank: eigenvectors per factor, or None for all.
            decay: of the moving averages.
            kl_clip: bound on lr² <update, grad>, or None.
            clip_norm: bound on the norm of all updates together, after preconditioning, or None.
            source: "empirical" (the loss itself) or "sampled" (labels drawn from the network; call ``sample`` between
                the forward pass and ``loss.backward()``).
            reduction: "mean" or "sum", what the loss is over the examples of a batch.
            accumulation: number of backward passes per step whose losses are each divided by it.
            loss_scale: what the loss times makes a negative log-likelihood, 1 for cross-entropy, half the number of
                outputs for their mean square error: lr is measured in that, and kl_clip is multiplied by it.
            fallback_lr: of the AdamW steps for parameters that no block captures.
            sharing: how the factors count positions that share weights, "expand" or "reduce" (see ``FactorSums``); S*
                is that of whole examples in either basis.
            seed: of the labels that are drawn.

        Raises:
            UsageError: an argument has a value that means nothing.
        """
        if sharing not in self.sharings:
            raise UsageError(f"there is no sharing {sharing!r} here; choose {', '.join(self.sharings)}")
        self.rank = rank
        self._moving = Moving(decay, Factors(sharing))
        self._moments: dict[str, Moments] = {}
        self._rotated: dict[str, Tensor] = {}
        self._eps = 0.0
        self._probes: dict[str, tuple[Tensor, Tensor]] = {}
        super().__init__(
            program,
            params,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            damping=damping,
            refresh=refresh,
            factor_every=factor_every,
            decay=decay,
            kl_clip=kl_clip,
            clip_norm=clip_norm,
            source=source,
            reduction=reduction,
            accumulation=accumulation,
            loss_scale=loss_scale,
            fallback_lr=fallback_lr,
            seed=seed,
        )

    # during the backward pass ----------------------------------------------------------------------------------------

    def _see(self, observation: Observation) -> None:
        block, state = observation.block, self.block_state(observation.block)
        observation.scale = self.scale_of(observation)
        kronecker = block.kind == "kronecker"
        factors = kronecker and (self.steps % self.factor_every == 0 or "S" not in state)
        moments = not kronecker or (self.tracks and "S" in state)
        if not factors and not moments:
            return
        for pairs in observation.chunks():
            if factors:
                self._moving.sums.add(block, pairs, True)
            if moments:
                self._moments_of(block, state, pairs).add(block, pairs, True)

    def _moments_of(self, block: Block, state: dict[str, Any], pairs: Pairs) -> Moments:
        held = self._moments.get(block.name)
        if held is None:
            alone = block.kind == "kronecker" and not isinstance(pairs.left, OneHot) and pairs.left.shape[2] == 1
            basis = Basis(state.get("U_A"), state.get("U_G"))
            keeps = alone and self.source == EMPIRICAL and not self._is_truncated(state)
            held = self._moments[block.name] = Moments({block.name: basis}, means=keeps)
        return held

    # at the step -----------------------------------------------------------------------------------------------------

    def _settle(self, step: int) -> None:
        group = Group.current()
        self._rotated.clear()
        new = []
        for block in self.blocks:
            state = self.block_state(block)
            held = self._moments.pop(block.name, None)
            self._follow(block, state, None if held is None else held.sums.get(block.name), group)
            if block.kind == "kronecker":
                self._moving.absorb(block, state, group, self.program.tensor(block.weight))
                if "S" not in state and "A" in state:
                    new.append(block)
        self._refresh(new, group)
        self._eps = self._scale()

    def _scale(self) -> float:
        """Return what damping is relative to: the mean trace of a block, now or at the start, whichever is less."""
        now = float(self._traces())
        first = self.param_groups[0]
        if not first.get("trace", 0.0):
            first["trace"] = now
        return min(now, first["trace"])

    def _traces(self) -> Tensor:
        """Return the mean over all blocks of the trace of their curvature."""
        found = []
        for block in self.blocks:
            state = self.block_state(block)
            if self._is_truncated(state):
                found.append(truncated.trace(state, block.shape[1], block.shape[2]).sum())
            elif "S" in state:
                found.append(state["S"].sum())
        return torch.stack(found).mean() if found else torch.zeros(())

    def _follow(self, block: Block, state: dict[str, Any], sums: MomentSums | None, group: Group) -> None:
        """Move S* towards what the batch says, and keep the rotated gradient if it came along."""
        count = group.sum_number(0.0 if sums is None else sums.examples)
        if not count:
            return
        if group.size > 1:
            sums = self._whole(block, state, sums)
        assert sums is not None
        group.sum([sums.S] if sums.mean is None else [sums.S, sums.mean])
        decay = self._moving.decay
        if "S" in state:
            state["S"].mul_(decay).add_(sums.S, alpha=(1 - decay) / count)
        else:
            state["S"] = sums.S.div_(count)
        if sums.mean is not None:
            self._rotated[block.name] = sums.mean.div_(count if self.reduction == MEAN else self.accumulation)

    def _whole(self, block: Block, state: dict[str, Any], sums: MomentSums | None) -> MomentSums:
        """Give every rank the same tensors to sum: without the rotated gradient, which not all may have."""
        if sums is not None:
            sums.mean = None
            return sums
        shape = Basis(state.get("U_A"), state.get("U_G")).turned(block.shape)
        return MomentSums(self.program.tensor(block.weight).new_zeros(shape))

    def _finish(self, step: int) -> None:
        if (step + 1) % self.refresh == 0:
            known = [block for block in self.blocks if block.kind == "kronecker" and "A" in self.block_state(block)]
            self._refresh(known, Group.current())

    def _refresh(self, blocks: list[Block], group: Group) -> None:
        """Take the eigenbases of the factors as they are now, and start S* from lam_G lam_A^T in them.

        Each rank decomposes the factors of some blocks; then all share.
        """
        whole = {block.name: self._lead(block) for block in blocks}
        owners = {block.name: number % group.size for number, block in enumerate(blocks)}
        for block in blocks:
            if owners[block.name] == group.rank:
                decompose(self.block_state(block), whole[block.name])
        for block in blocks:
            state = self.block_state(block)
            if group.size > 1:
                share(state, group, owners[block.name], whole[block.name])
            state["S"] = state["lam_G"].unsqueeze(2) * state["lam_A"].unsqueeze(1)
            self._probes.pop(block.name, None)

    def _lead(self, block: Block) -> list[str]:
        """Refresh the leading eigenvectors of wide factors, the same on every rank; return which factors are whole."""
        state = self.block_state(block)
        whole = []
        for key, width in (("A", block.shape[2]), ("G", block.shape[1])):
            if state[key].dim() == 3 and self.rank is not None and truncated.truncates(width, self.rank):
                truncated.leading(state, key, self.rank)
            else:
                whole.append(key)
        return whole

    def _precondition(self, block: Block, grad: Tensor) -> tuple[Tensor, Tensor]:
        state = self.block_state(block)
        if "S" not in state:  # every batch so far had gradients that are not finite
            return torch.zeros_like(grad), grad.sum() * 0
        S: Tensor = state["S"]
        eps = S.new_tensor(self._eps * self._groups[id(self.program.tensor(block.weight))]["damping"])
        if self._is_truncated(state):
            return truncated.solve(state, grad, eps.clamp_min(_TINY).expand(len(S)))
        U_A, U_G = state.get("U_A"), state.get("U_G")
        turned = self._turned(block, grad, U_A, U_G)
        damped = S + eps.clamp_min(_TINY)  # a dead block has zero gradients, and steps by zero
        update = torch.div(turned, damped, out=damped)
        product = torch.dot(update.reshape(-1), turned.reshape(-1))
        update = update if U_A is None else torch.bmm(update, U_A.transpose(1, 2))
        return (update if U_G is None else torch.bmm(U_G, update)), product

    def _turned(self, block: Block, grad: Tensor, U_A: Tensor | None, U_G: Tensor | None) -> Tensor:
        """Return U_G^T grad U_A: what the taps have seen if a probe says that it is this gradient."""
        seen = self._rotated.pop(block.name, None)
        if seen is not None and U_A is not None and U_G is not None:
            left, right, left_turned, right_turned = self._probe(block, grad, U_A, U_G)
            given = torch.bmm(torch.bmm(left, grad), right)
            found = torch.bmm(torch.bmm(left_turned, seen), right_turned)
            length = seen.flatten(1).norm(dim=1).view(-1, 1, 1)
            if bool(((given - found).abs() <= _TOLERANCE * length).all()):
                return seen
        made = grad if U_G is None else torch.bmm(U_G.transpose(1, 2), grad)
        return made if U_A is None else torch.bmm(made, U_A)

    def _probe(self, block: Block, like: Tensor, U_A: Tensor, U_G: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return fixed random unit rows [K, 1, o] and columns [K, i, 1], plain and in the basis."""
        held: Any = self._probes.get(block.name)
        if held is None:
            generator = torch.Generator().manual_seed(sum(block.shape))
            groups, high, wide = block.shape
            left = torch.randn(groups, 1, high, generator=generator).to(like)
            right = torch.randn(groups, wide, 1, generator=generator).to(like)
            turned = torch.bmm(left, U_G), torch.bmm(U_A.transpose(1, 2), right)
            held = self._probes[block.name] = (left, right, *turned)  # type: ignore[assignment]
        return held

    @staticmethod
    def _is_truncated(state: dict[str, Any]) -> bool:
        return "rest_A" in state or "rest_G" in state
