"""Gradients of each example's loss by each unit's gate: the one measurement behind Taylor and Fisher scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfe_fx.criteria import synthetic
from kfe_fx.errors import BadData
from kfe_fx.gates import GatedModule, gated
from kfe_fx.labels.analysis import Analysis
from kfe_fx.program import Program
from kfe_fx.training.batches import Batch, Batches, pinned_batch
from kfe_fx.training.likelihood import Likelihood
from kfe_fx.training.losses import Loss, settle

DATA_FREE_EXAMPLES = 256


@dataclass
class Source:
    """Where gradients come from; see ``ScoreContext``."""

    program: Program
    analysis: Analysis
    batches: Batches | None
    loss: Loss | None
    seed: int
    facts: dict[str, Any]


def gate_gradients(source: Source) -> Iterator[Tensor]:
    """Yield d loss_n / d gate[n, u] as [N, units] batch by batch, in evaluation mode.

    Where an activation mixes examples in a way that no dim tells apart, examples run one at a time: as correct, slower.
    A network that pins a batch above one and mixes it is scored per batch, as one example.

    Raises:
        BadData: a loss without targets to take it on, or gradients that are not finite.
    """
    module = gated(source.program, source.analysis)
    batches: Any = source.batches
    if batches is None:
        batches = synthetic.draw(source.program, DATA_FREE_EXAMPLES, source.seed, source.facts)
    sampler = Likelihood(source.loss, source.seed)
    loss = source.loss
    pinned = pinned_batch(source.program)
    split = not module.per_example and pinned is None
    source.facts.update(inputs="drawn" if source.batches is None else "data", per_example="loop" if split else "batch")
    examples = 0
    for whole in batches:
        pieces = [whole.rows(i, i + 1) for i in range(whole.count)] if split else [whole]
        for batch in pieces:
            empirical = batch.targets is not None
            source.facts["labels"] = "data" if empirical else f"sampled ({sampler.family})"
            if empirical and loss is None:
                raise BadData("there are targets but no loss to take on them; name a --loss")
            rows, loss = _gradients(module, batch, loss, sampler)
            examples += batch.count
            yield rows
    source.facts["examples"] = examples
    if not examples:
        raise BadData("the data yields no batches to score with; give at least one example")


def _gradients(module: GatedModule, batch: Batch, loss: Loss | None, sampler: Likelihood) -> tuple[Tensor, Loss | None]:
    rows = batch.count if module.per_example else 1
    first = next((v.dtype for v in batch.inputs if isinstance(v, Tensor) and v.is_floating_point()), None)
    gates = module.ones(rows, first or _parameter_type(module))
    with torch.enable_grad():
        outputs = module.run(batch.inputs, gates)
        if batch.targets is not None and loss is not None:
            loss = settle(loss, outputs, batch.targets, batch.count)
            total = loss.total(outputs, batch.targets, batch.count)
        else:
            total = sampler.total(outputs, batch)
    found = torch.autograd.grad(total, gates, allow_unused=True) if total.requires_grad else (None,) * len(gates)
    result = torch.zeros(rows, sum(map(len, module.units)), dtype=torch.float64)
    for units, grad in zip(module.units, found, strict=True):
        if grad is not None:
            result[:, list(units)] = grad.double()
    if not bool(torch.isfinite(result).all()):
        raise BadData(
            f"the loss of a batch is {float(total.detach()):g} and its gradients are not finite; check the data"
        )
    return result, loss


def _parameter_type(module: GatedModule) -> torch.dtype:
    floating = (p.dtype for p in module.module.parameters() if p.is_floating_point())
    return next(floating, torch.get_default_dtype())
