"""Fine-tuning: train the live module of a Program for a while."""

from __future__ import annotations

from typing import Any

import torch

from kfe_fx.errors import BadData, UsageError
from kfe_fx.program import Program
from kfe_fx.training.batches import Batches
from kfe_fx.training.loop import (
    SCHEDULES,
    Judge,
    Progress,
    Trainer,
    default_epochs,
    facts_of,
    probe,
    run_epochs,
    steps_of,
)
from kfe_fx.training.losses import resolve_loss
from kfe_fx.training.metrics import resolve_metric
from kfe_fx.training.optimizer_state import close_optimizer, make_optimizer
from kfe_fx.training.threads import fastest_threads

__all__ = ["default_epochs", "finetune"]


def finetune(
    program: Program,
    data: Any,
    loss: Any = None,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    lr: float | None = None,
    batch_size: int = 64,
    optimizer: str | torch.optim.Optimizer = "adamw",
    schedule: str = "cosine",
    seed: int = 0,
    progress: Progress | None = None,
    val: Any = None,
    metric: Any = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Train ``program.module()`` in place and leave it in evaluation mode.

    The training graph says what trains: frozen norms stay frozen, dropout drops. The same seed, data and number of
    threads give the same weights, to the bit. ``kfe_fx.train`` is the same with checkpoints and several processes.

    Args:
        program: the network; its tensors are changed.
        data: examples with targets, in any form.
        loss: see ``resolve_loss``.
        epochs: passes over the data; by default about 60,000 examples in 3 to 30 epochs.
        steps: number of batches instead of epochs.
        lr: learning rate; that of ``make_optimizer`` if not given; a live optimiser keeps its own.
        batch_size: examples a step.
        optimizer: see ``make_optimizer``, or a live one over the Program's parameters, which keeps its state.
        schedule: "cosine" (down to zero over all steps) or "constant".
        seed: of the order of the examples and of dropout.
        progress: called with ("fine-tuning", share done).
        val: examples to choose the best epoch by; without them the last state is kept.
        metric: see ``resolve_metric``; by default accuracy or mean square error.
        threads: number of threads; by default one or two, whichever is faster.

    Returns:
        Facts for the report: epochs, steps, first and last loss, threads, and the metric per epoch where there is val.

    Raises:
        UsageError: options that mean nothing, or the loss stopped being finite: the learning rate is too high.
        BadData: no examples or no targets, or the loss is not finite from the start.
    """
    batches = Batches(program, data, batch_size)
    targets = batches.targets()
    found = resolve_loss(loss, targets)
    if found is None or targets is None:
        raise BadData("fine-tuning needs targets, and the data has none")
    if schedule not in SCHEDULES:
        raise UsageError(f"there is no schedule {schedule!r}; choose cosine or constant")
    total = steps_of(batches, epochs, steps)
    metric = None if val is None else resolve_metric(metric, Batches(program, val, batch_size).targets())
    judge = None if metric is None else Judge(metric, val, batch_size)
    live = _optimizer(program, optimizer, lr)
    facts: dict[str, Any] = {"optimizer": type(live).__name__, "loss": found.name, "seed": seed}
    trainer = Trainer(program, found, live, total, schedule, progress)
    try:
        if not total:
            return {**facts, "steps": 0, "epochs": 0}
        first = next(batches.epoch(seed, drop_last=True))
        with (
            fastest_threads(lambda: probe(program, first), threads) as count,
            torch.random.fork_rng(devices=[]),
        ):
            torch.manual_seed(seed)
            run_epochs(trainer, batches, seed, judge)
        facts |= {"threads": count} | facts_of(trainer.record)
        if judge is not None:
            facts |= {judge.metric.name: trainer.record.judged, "best_epoch": trainer.record.best_epoch()}
        return facts
    finally:
        trainer.restore_rates()
        if isinstance(optimizer, str):
            close_optimizer(live)
        program.eval()


def _optimizer(program: Program, spec: str | torch.optim.Optimizer, lr: float | None) -> torch.optim.Optimizer:
    if isinstance(spec, str):
        return make_optimizer(program, spec, lr)
    ours = {id(parameter) for parameter in program.module().parameters()}
    if not any(id(parameter) in ours for group in spec.param_groups for parameter in group["params"]):
        raise UsageError("the optimizer trains no parameter of this Program; make it of program.module().parameters()")
    if lr is not None:
        for group in spec.param_groups:
            group["lr"] = lr
    return spec
