"""Fine-tuning: train the live module of a Program for a while."""

from __future__ import annotations

from typing import Any

import torch

from kfe_fx.curvature.distributed import Group
from kfe_fx.data.dataset import check_seed
from kfe_fx.errors import BadData, UsageError
from kfe_fx.program import Program
from kfe_fx.training.batches import Batches
from kfe_fx.training.distil import Distillation, curvature_source, teach
from kfe_fx.training.features import Features
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
from kfe_fx.training.losses import counted, resolve_loss
from kfe_fx.training.metrics import resolve_metric
from kfe_fx.training.optimizer_state import close_optimizer, make_optimizer
from kfe_fx.training.parallel import check_shared, share_tensors
from kfe_fx.training.penalties import as_penalties, ewc_penalty
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
    teacher: Program | Distillation | None = None,
    distil: float | None = None,
    temperature: float | None = None,
    features: Features | None = None,
    ewc: Any = None,
    penalties: Any = None,
) -> dict[str, Any]:
    """Train ``program.module()`` in place and leave it in evaluation mode.

    The training graph says what trains: frozen norms stay frozen, dropout drops. The same seed, data and number of
    threads give the same weights, to the bit; in a process group each rank works on its share of every batch.
    ``kfe_fx.train`` is the same with checkpoints.

    Args:
        program: the network; its tensors are changed.
        data: examples, in any form; with targets, unless the teacher has all of the loss.
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
        teacher: a network to learn from, such as the one before a removal; or a ``Distillation``, which says more. By
            name, EKFAC and KFAC then measure curvature with labels drawn from the network's own distribution.
        distil: the teacher's share of the loss, 0 to 1; by default 0.9, and 1 where the data has no targets.
        temperature: that softens its classes; by default 1.
        features: activations that are compared with the teacher's, see ``Distillation`` and ``kept_features``.
        ewc: what holds the weights near those that they have now: (Store or Curvature, strength); near others with
            these as a third, {name: tensor}; or an ``EWC``.
        penalties: more of them, one or a list: a ``GroupLasso``, a ``Quadratic``. Losses are told without them.

    Returns:
        Facts for the report: epochs, steps, first and last loss, threads, the metric per epoch where there is val, and
        what the teacher was asked and what the weights were held by, where that is so.

    Raises:
        UsageError: options that mean nothing, a teacher of other inputs or outputs, or the loss stopped being finite:
            the learning rate is too high.
        BadData: no examples, or no targets and no teacher, or the loss is not finite from the start.
    """
    check_seed(seed)
    batches = Batches(program, data, batch_size)
    targets = batches.targets()
    found = counted(resolve_loss(loss, targets), batches.labels())
    taught = teach(program, batches, targets, found, teacher, distil, temperature, features)
    if taught is not None:
        batches, found = taught.batches, found if taught.weight < 1 else taught.loss
    if found is None or (taught is None and targets is None):
        raise BadData("fine-tuning needs targets or a teacher, and the data has none")
    if schedule not in SCHEDULES:
        raise UsageError(f"there is no schedule {schedule!r}; choose cosine or constant")
    total = steps_of(batches, epochs, steps)
    metric = None if val is None else resolve_metric(metric, Batches(program, val, batch_size).targets())
    judge = None if metric is None else Judge(metric, val, batch_size)
    held = None if ewc is None else ewc_penalty(program, ewc)
    beside = [*([] if held is None else [held]), *as_penalties(penalties)]
    learns = taught is not None and taught.weight > 0
    live = _optimizer(program, optimizer, lr, drawn=learns)
    facts: dict[str, Any] = {"optimizer": type(live).__name__, "loss": found.name, "seed": seed}
    group = Group.current()
    check_shared(batches, group)
    share_tensors(program, group)
    trainer = Trainer(program, found, live, total, schedule, progress, group, beside, taught if learns else None)
    try:
        if not total:
            return {**facts, "steps": 0, "epochs": 0}
        first = next(batches.epoch(seed, drop_last=True))
        with (
            fastest_threads(lambda: probe(program, first), threads or (1 if group.size > 1 else None)) as count,
            torch.random.fork_rng(devices=[]),
        ):
            if taught is not None:
                taught.begin(first)
                if learns:
                    taught.remember(seed, total, progress)
            torch.manual_seed(seed)
            run_epochs(trainer, batches, seed, judge)
            share_tensors(program, group)
        facts |= {"threads": count} | facts_of(trainer.record)
        if judge is not None:
            facts |= {judge.metric.name: trainer.record.judged, "best_epoch": trainer.record.best_epoch()}
        if taught is not None:
            facts |= {"loss": found.name if taught.weight < 1 else taught.loss.name, "distillation": taught.facts()}
        return facts | ({} if held is None else {"ewc": held.facts()})
    finally:
        trainer.restore_rates()
        if isinstance(optimizer, str):
            close_optimizer(live)
        program.eval()


def _optimizer(
    program: Program, spec: str | torch.optim.Optimizer, lr: float | None, *, drawn: bool
) -> torch.optim.Optimizer:
    if isinstance(spec, str):
        return make_optimizer(program, spec, lr, source=curvature_source(spec, drawn=drawn))
    ours = {id(parameter) for parameter in program.module().parameters()}
    if not any(id(parameter) in ours for group in spec.param_groups for parameter in group["params"]):
        raise UsageError("the optimizer trains no parameter of this Program; make it of program.module().parameters()")
    if lr is not None:
        for group in spec.param_groups:
            group["lr"] = lr
    return spec
