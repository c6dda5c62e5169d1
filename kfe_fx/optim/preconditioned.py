"""What KFAC and EKFAC share: taps, moving averages, trust region, momentum, decay, and steps for what is left out."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kfe_fx.curvature.blocks import Block, find_blocks
from kfe_fx.curvature.collector import Collector
from kfe_fx.curvature.observation import Observation
from kfe_fx.errors import UsageError
from kfe_fx.program import Program, tied_names
from kfe_fx.training.batches import Batch
from kfe_fx.training.likelihood import GAUSSIAN, Likelihood
from kfe_fx.training.losses import resolve_loss

MEAN, SUM = "mean", "sum"
EMPIRICAL, SAMPLED = "empirical", "sampled"
_ADAM = (0.9, 0.999, 1e-8)


class Preconditioned(torch.optim.Optimizer):
    """Steps along ``-(F + damping I)^{-1} grad`` per block of a Program, ``F`` from taps during ``loss.backward()``.

    A step is ``p <- (1 - lr·weight_decay) p - lr·m`` with ``m <- momentum·m + nu·clip(update)``; momentum lives in
    parameter space, so that a new basis does not touch it. ``nu = min(1, sqrt(kl_clip / (lr0² sum <update, grad>)))``
    with the first learning rate lr0 bounds the step's length in the metric of F (Ba et al. 2017, section 5), and leaves
    a schedule its say; ``loss_scale`` multiplies kl_clip, as many outputs may move further together.

    Parameters that no block captures take AdamW steps of ``fallback_lr`` (``left_out`` names them). A step with a
    gradient that is not finite is not taken, and counted in ``skipped``; statistics leave out batches with such
    gradients (``nonfinite``). Under torch.distributed the statistics are summed over the ranks and decompositions are
    spread; averaging ``p.grad`` is the caller's, as with any optimizer.
    """

    def __init__(
        self,
        program: Program,
        params: Iterable[Any] | None = None,
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        damping: float = 1e-3,
        refresh: int = 10,
        factor_every: int | None = None,
        decay: float = 0.95,
        kl_clip: float | None = 1e-3,
        clip_norm: float | None = None,
        source: str = EMPIRICAL,
        reduction: str = MEAN,
        accumulation: int = 1,
        loss_scale: float = 1.0,
        fallback_lr: float = 1e-3,
        seed: int = 0,
    ) -> None:
        """Attach to a Program; see the subclasses for the arguments.

        Raises:
            UsageError: an argument has a value that means nothing.
        """
        if reduction not in (MEAN, SUM):
            raise UsageError(f"the loss is a mean or a sum over the examples of a batch, not {reduction!r}")
        if source not in (EMPIRICAL, SAMPLED):
            raise UsageError(f"there is no source {source!r} for an optimizer; choose {EMPIRICAL} or {SAMPLED}")
        for name, value, least in (("refresh", refresh, 1), ("accumulation", accumulation, 1), ("lr", lr, 0.0)):
            if value < least:
                raise UsageError(f"{name} is {value}; give at least {least}")
        if loss_scale <= 0:
            raise UsageError(f"loss_scale is {loss_scale}; give a number above 0")
        if damping <= 0 or not 0 <= decay < 1 or not 0 <= momentum < 1:
            raise UsageError("damping is above 0, decay and momentum are at least 0 and below 1")
        self.program = program
        self.accumulation = accumulation
        self.reduction = reduction
        self.source = source
        self.seed = seed
        self.refresh = refresh
        self.factor_every = factor_every or max(1, refresh // 5)
        self.skipped = 0
        given = list(program.module().parameters()) if params is None else list(params)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "damping": damping,
            "decay": decay,
            "kl_clip": kl_clip,
            "clip_norm": clip_norm,
            "fallback_lr": fallback_lr,
            "loss_scale": loss_scale,
            "steps": 0,
        }
        super().__init__(given, defaults)
        for group in self.param_groups:
            group.setdefault("base_lr", group["lr"])
        self._names = _names(program)
        self._groups = {id(p): group for group in self.param_groups for p in group["params"]}
        foreign = [p for group in self.param_groups for p in group["params"] if id(p) not in self._names]
        if foreign:
            raise UsageError("the optimizer is given a parameter that is not the Program's; use program.module()")
        blocks = find_blocks(program)
        self.blocks = [block for block in blocks.blocks if self._captures(block)]
        covered = {name for block in self.blocks for name in block.parameters}
        self.left_out = {
            self._names[id(p)]: _reason(self._names[id(p)], blocks)
            for group in self.param_groups
            for p in group["params"]
            if p.requires_grad and self._names[id(p)] not in covered
        }
        self._collector = Collector(program, blocks, self.blocks, self._see)
        self._collector.enabled = source == EMPIRICAL
        # the cheapest parameter of each site: a backward pass that ends there goes by every tap
        self._ends = sorted({block.bias or block.weight for block in self.blocks})
        self._collector.attach()

    def sample(self, outputs: Any, loss: str | None = None, targets: Any = None) -> None:
        """Observe a backward pass with labels drawn from the network's own distribution, for the source "sampled".

        Call it between the forward pass and ``loss.backward()``. ``p.grad`` stays as it is, and no weight's gradient is
        formed.

        Args:
            outputs: what the forward pass returned.
            loss: what the loss is the negative log-likelihood of: "cross-entropy", "mse" (the mean over elements),
                "gaussian" (half the sum of squares), or None: cross-entropy for scores [N, C, ...], else gaussian.
            targets: class targets of the batch, where there are any: their shape alone is looked at, which says where
                scores of more than two dims have their classes.

        Raises:
            UsageError: the optimizer's source is another.
        """
        if self.source != SAMPLED:
            raise UsageError(f"the optimizer's source is {self.source!r}: sample is for EKFAC(..., source='sampled')")
        run = self._collector.latest()
        if run is None:
            return
        gaussian = loss == "gaussian"
        spec, seed = None if gaussian else resolve_loss(loss, None), self.seed * 1_000_003 + self._drawn
        likelihood = Likelihood(spec, seed, main=True)
        likelihood.family = GAUSSIAN if gaussian else likelihood.family
        self._drawn += 1
        total = likelihood.total(outputs, Batch(list(run.inputs.values()), targets, run.examples))
        ends = [self.program.tensor(name) for name in self._ends]
        self._collector.enabled = True
        try:
            torch.autograd.grad(total, ends, retain_graph=True, allow_unused=True)
            self._collector.flush()
        finally:
            self._collector.enabled = False

    def _captures(self, block: Block) -> bool:
        tensors = [self.program.tensor(name) for name in block.parameters]
        return all(block.batched.values()) and all(id(t) in self._groups and t.requires_grad for t in tensors)

    def close(self) -> None:
        """Take the taps out of the code that runs; the optimizer takes no more steps."""
        self._collector.detach()

    @property
    def nonfinite(self) -> dict[str, int]:
        """How often a block's gradients were not finite and its statistics left out the batch."""
        return self._collector.nonfinite

    # to be filled in -------------------------------------------------------------------------------------------------

    @abstractmethod
    def _see(self, observation: Observation) -> None:
        """Take in what one backward pass says about a block."""

    @abstractmethod
    def _settle(self, step: int) -> None:
        """Turn what was seen since the last step into moving averages."""

    @abstractmethod
    def _finish(self, step: int) -> None:
        """Prepare for the next step once the updates of this one are made: new bases when it is time."""

    @abstractmethod
    def _precondition(self, block: Block, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return the update [K, o, i] of a block and its inner product with the gradient."""

    # the protocol of torch.optim -------------------------------------------------------------------------------------

    def block_state(self, block: Block) -> dict[str, Any]:
        """Return what is kept of a block; it lies in the state of its weight, so that ``state_dict`` has it."""
        return self.state[self.program.tensor(block.weight)].setdefault("blocks", {}).setdefault(block.name, {})

    def scale_of(self, observation: Observation) -> float:
        """Return what makes gradients of the loss gradients of each example's own."""
        if self.source == SAMPLED:
            return 1.0  # the drawn loss is a sum over the examples
        return float((observation.examples if self.reduction == MEAN else 1) * self.accumulation)

    @property
    def _drawn(self) -> int:
        return int(self.param_groups[0].get("drawn", 0))

    @_drawn.setter
    def _drawn(self, value: int) -> None:
        self.param_groups[0]["drawn"] = value

    @property
    def steps(self) -> int:
        """How many steps were taken."""
        return int(self.param_groups[0]["steps"])

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step; the gradients of ``loss.backward()`` are in ``p.grad``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._step()
        return loss

    def _step(self) -> None:
        if self.source == EMPIRICAL:
            self._collector.flush()
        self._settle(self.steps)
        updates: dict[int, Tensor] = {}
        inner: list[Tensor] = []
        for block in self.blocks:
            tensors = {name: self.program.tensor(name) for name in block.parameters}
            if any(p.grad is None for p in tensors.values()):
                continue
            update, product = self._precondition(block, block.matrix({n: p.grad for n, p in tensors.items()}))  # type: ignore[misc]
            for p in tensors.values():
                if id(p) not in updates:
                    updates[id(p)] = torch.zeros_like(p) if block.partial else torch.empty_like(p)
            made = {name: updates[id(p)] for name, p in tensors.items()}
            # c times a loss has c times the gradient and c² times the curvature: its update is shorter by c, and the
            # product is the same
            scale = self.param_groups[0]["loss_scale"]
            block.put(update if scale == 1 else update / scale, made)
            inner.append(product)
        self._finish(self.steps)
        total = float(torch.stack([one.double().cpu() for one in inner]).sum()) if inner else 0.0
        for group in self.param_groups:
            group["steps"] += 1
        if not math.isfinite(total):
            self.skipped += 1
            return
        scales = self._scales(total, updates)
        for group, scale in zip(self.param_groups, scales, strict=True):
            for p in group["params"]:
                if p.grad is None:
                    continue
                if group["weight_decay"]:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                if id(p) in updates:
                    self._move(p, updates[id(p)], group, scale)
                else:
                    self._fall_back(p, group)

    def _scales(self, total: float, updates: dict[int, Tensor]) -> list[float]:
        """Return what each group's updates are multiplied by: trust region, then the clip by norm."""
        norm = None
        scales = []
        for group in self.param_groups:
            scale = 1.0
            length = group["base_lr"] ** 2 * total  # a schedule of lr shortens steps that are clipped, too
            if group["kl_clip"] is not None and length > 0:
                scale = min(1.0, math.sqrt(group["kl_clip"] * group["loss_scale"] / length))
            if group["clip_norm"] is not None and updates:
                if norm is None:
                    norm = float(torch.stack([one.norm().double() for one in updates.values()]).norm())
                scale *= min(1.0, group["clip_norm"] / max(norm * scale, 1e-30))
            scales.append(scale)
        return scales

    def _move(self, p: Tensor, update: Tensor, group: dict[str, Any], scale: float) -> None:
        momentum = group["momentum"]
        if momentum:
            state = self.state[p]
            buffer = state.get("momentum")
            if buffer is None:
                buffer = state["momentum"] = update.mul(scale)
            else:
                buffer.mul_(momentum).add_(update, alpha=scale)
            update, scale = buffer, 1.0
        p.add_(update, alpha=-group["lr"] * scale)

    def _fall_back(self, p: Tensor, group: dict[str, Any]) -> None:
        """Take an AdamW step (Loshchilov & Hutter 2019) that follows the schedule of the group."""
        state, grad = self.state[p], p.grad
        assert grad is not None
        if not bool(torch.isfinite(grad.sum())):
            return
        if "first" not in state:
            state |= {"first": torch.zeros_like(p), "second": torch.zeros_like(p), "count": 0}
        one, two, eps = _ADAM
        state["count"] += 1
        state["first"].lerp_(grad, 1 - one)
        state["second"].mul_(two).addcmul_(grad, grad, value=1 - two)
        rate = group["fallback_lr"] * (group["lr"] / group["base_lr"] if group["base_lr"] else 0.0)
        first = state["first"] / (1 - one ** state["count"])
        second = state["second"] / (1 - two ** state["count"])
        p.addcdiv_(first, second.sqrt_().add_(eps), value=-rate)


def _names(program: Program) -> dict[int, str]:
    """Map each parameter to its canonical name."""
    tied = tied_names(program.module())
    return {id(p): tied[name][0] for name, p in program.module().named_parameters() if isinstance(p, nn.Parameter)}


def _reason(name: str, blocks: Any) -> str:
    for left in blocks.left_out:
        if left.parameter == name:
            return str(left.reason)
    return "its examples cannot be told apart within a batch"
