"""Training: the live module of a Program, with checkpoints, in one process or several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kfe_fx.curvature.distributed import Group
from kfe_fx.data.dataset import ArrayData, check_seed
from kfe_fx.errors import BadData, UsageError
from kfe_fx.program import Program
from kfe_fx.training.batches import Batches
from kfe_fx.training.checkpoint import Identity, cuda_devices, load_checkpoint, restore, save_checkpoint, seed_random
from kfe_fx.training.distil import Distillation, curvature_source, teach
from kfe_fx.training.features import Features
from kfe_fx.training.fit import fit_examples
from kfe_fx.training.group_lasso import GroupLasso
from kfe_fx.training.l0 import L0, Weights, check_strength, ensure_gates, notes_of
from kfe_fx.training.loop import SCHEDULES, Judge, Progress, Trainer, facts_of, probe, run_epochs, steps_of
from kfe_fx.training.losses import Loss, counted, resolve_loss
from kfe_fx.training.metrics import resolve_metric
from kfe_fx.training.optimizer_state import close_optimizer, make_optimizer
from kfe_fx.training.parallel import check_shared, share_tensors
from kfe_fx.training.prune_data import HELD_OUT
from kfe_fx.training.shared_norms import OWN_SHARES, has_live_norms, has_own_norms
from kfe_fx.training.threads import fastest_threads


def train(
    program: Program,
    data: Any,
    loss: Any = None,
    *,
    optimizer: str = "ekfac",
    epochs: int | None = None,
    steps: int | None = None,
    lr: float | None = None,
    batch_size: int = 64,
    val: Any = None,
    evaluate: Any = None,
    schedule: str = "cosine",
    seed: int = 0,
    damping: float | None = None,
    refresh: int | None = None,
    rank: int | None = None,
    group_lasso: float | None = None,
    l0: float | None = None,
    l0_weight: Weights = "params",
    teacher: Program | Distillation | None = None,
    distil: float | None = None,
    temperature: float | None = None,
    features: Features = (),
    checkpoint: str | Path | None = None,
    resume: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train ``program.module()`` in place, leave it in evaluation mode with the best weights, and say what happened.

    The same seed, data, number of threads and of processes give the same weights to the bit, interrupted and resumed
    between epochs or not. In a process group (``torchrun``) every rank calls this with the same arguments: each works
    on its share of every batch, so that the result is that of one process to rounding, except that batch norms see the
    statistics of each rank's share, as in ``DistributedDataParallel``; rank 0's running statistics are kept.

    Args:
        program: the network; its tensors are changed.
        data: examples, in any form that ``Batches`` takes; with targets, unless the teacher has all of the loss.
        loss: see ``resolve_loss``.
        optimizer: "ekfac", "kfac", "adamw" or "sgd"; see ``make_optimizer``.
        epochs: passes over the data; by default about 60,000 examples in 3 to 30 epochs.
        steps: number of batches instead of epochs.
        lr: learning rate; that of ``make_optimizer`` if not given.
        batch_size: examples a step, all processes together.
        val: examples to know the best epoch by. None holds out a fifth of ``data``, drawn with the seed, where that is
            whole arrays; False holds out nothing and keeps the last state.
        evaluate: the metric, see ``resolve_metric``; by default accuracy or mean square error.
        schedule: "cosine" (the learning rate goes down to zero over all steps) or "constant".
        seed: of the split, the order of the examples, and dropout.
        damping: of EKFAC and KFAC, see ``kfe_fx.optim``.
        refresh: steps between their bases.
        rank: eigenvectors per factor of theirs; all if not given.
        group_lasso: lambda of a penalty that drives whole removable units to zero, see ``GroupLasso``; none if not
            given, or 0. Its gradient is added to that of the loss, and the optimizer takes the sum for the gradient:
            clips hold for the sum, and EKFAC and KFAC precondition the sum with the curvature of the loss alone. Losses
            are told without it. The last weights are kept: those of the best epoch may be from before any unit was
            near zero.
        l0: lambda of a penalty that closes hard concrete gates on whole removable units, see ``L0``; none if not given,
            or 0. A network without such gates is given them, in place: ``finalise-gates`` makes a plain one of it. Of
            gradients, losses and weights that are kept the same holds as of group lasso; log alpha takes steps of 30
            times the learning rate, without weight decay.
        l0_weight: what a unit costs, "params" or "time"; see ``L0``.
        teacher: a network to learn from; or a ``Distillation``, which says more. EKFAC and KFAC then measure curvature
            with labels that are drawn from the network's own distribution.
        distil: the teacher's share of the loss, 0 to 1; by default 0.9, and 1 where the data has no targets.
        temperature: that softens its classes; by default 1.
        features: activations that are compared with its own too, see ``Distillation.features``.
        checkpoint: a file that is written after every epoch.
        resume: go on from ``checkpoint``; the Program must be as it was when the run began.
        threads: number of threads; by default one or two, whichever is faster, and one for each of several processes.
        progress: called with (what is going on, share done).

    Returns:
        Facts: optimizer, loss, lr, seed, threads, processes, data, after which epoch it was resumed, steps, epochs,
        first and last loss, the mean loss of each epoch, the metric, its value after each epoch, the best epoch (None
        where the last weights are kept), with group lasso what ``GroupLasso.facts`` says of the weights that are kept
        (else None), what ``L0.facts`` says likewise, what the teacher was asked (None without one), and notes.

    Raises:
        UsageError: options that mean nothing, a teacher of other inputs or outputs, a checkpoint of another run, or the
            loss stopped being finite.
        BadData: no examples, or no targets and no teacher, or the loss is not finite from the start.
        BadFile: the checkpoint is missing, damaged or cannot be written.
    """
    if schedule not in SCHEDULES:
        raise UsageError(f"there is no schedule {schedule!r}; choose cosine or constant")
    check_seed(seed)
    if resume and checkpoint is None:
        raise UsageError("resume goes on from a checkpoint; say which file")
    if check_strength(l0 or 0.0) and group_lasso:
        raise UsageError("group lasso and l0 both drive units to zero; give one of them")
    place = None if checkpoint is None else Path(checkpoint)
    group = Group.current()
    batches, held, told = _divided(program, data, val, loss, batch_size, seed)
    check_shared(batches, group)
    targets = batches.targets()
    found = counted(resolve_loss(loss, targets), batches.labels())
    gated = bool(l0) and ensure_gates(program, seed)
    taught = teach(program, batches, targets, found, teacher, distil, temperature, features or None)
    if taught is not None:
        batches, found = taught.batches, found if taught.weight < 1 else taught.loss
    if found is None or (taught is None and targets is None):
        raise BadData("training needs targets or a teacher, and the data has none")
    total = steps_of(batches, epochs, steps)
    judge = None if held is None else _judge(program, held, evaluate, batch_size, chooses=not (group_lasso or l0))
    document = load_checkpoint(place) if resume and place is not None else None
    share_tensors(program, group)
    lasso = GroupLasso(program, group_lasso) if group_lasso else None
    closing = L0(program, l0, weight=l0_weight, examples=batches.examples()) if l0 else None
    learns = taught if taught is not None and taught.weight > 0 else None
    source = curvature_source(optimizer, drawn=learns is not None)
    live = make_optimizer(program, optimizer, lr, damping=damping, refresh=refresh, rank=rank, source=source)
    if closing is not None:
        closing.attach(live)
    trainer = Trainer(program, found, live, total, schedule, progress, group, lasso or closing, learns)
    trainer.stage = "training"
    name = None if judge is None else judge.metric.name
    if place is None:
        identity = None
    else:
        identity = Identity.of(
            program, (batches.data, held), optimizer=optimizer, loss=found.name, steps=total, batch_size=batch_size,
            lr=trainer.rates[0], schedule=schedule, seed=seed, damping=damping, refresh=refresh, rank=rank,
            metric=name, processes=group.size, group_lasso=None if lasso is None else lasso.strength,
            **({} if taught is None else taught.identity()),
            **({} if closing is None else {"l0": closing.strength, "l0_weight": closing.weight}),
        )  # fmt: skip
    if threads is None:
        threads = 1 if group.size > 1 else None if document is None else int(document.get("threads", 1))

    def after_epoch(run: Trainer) -> None:
        record = run.record
        told = f", {name} {record.judged[-1]:.4g}" if record.judged else ""
        run.stage = f"epoch {record.epochs}: loss {record.epoch_losses[-1]:.4g}{told}; next"
        if identity is not None and place is not None:
            save_checkpoint(place, identity, run, count)

    resumed = None
    try:
        first = next(batches.epoch(seed, drop_last=True))
        with (
            fastest_threads(lambda: probe(program, first), threads) as count,
            torch.random.fork_rng(devices=cuda_devices(program)),
        ):
            if taught is not None:
                taught.begin(first)
            if learns is not None and group.size == 1:  # several processes ask about their own shares
                learns.remember(seed, total, progress)
            seed_random(seed, group)
            if document is not None and identity is not None and place is not None:
                restore(place, document, identity, trainer)
                resumed = trainer.record.epochs
            run_epochs(trainer, batches, seed, judge, after_epoch)
            share_tensors(program, group)
    finally:
        trainer.restore_rates()
        close_optimizer(live)
        program.eval()
    record = trainer.record
    facts: dict[str, Any] = {"optimizer": optimizer, "loss": found.name, "lr": trainer.rates[0], "seed": seed}
    facts |= {"threads": count, "processes": group.size, "data": told, "resumed": resumed}
    facts |= facts_of(record) | {"epoch_losses": record.epoch_losses, "metric": name, "judged": record.judged}
    facts |= {"best_epoch": record.best_epoch(), "group_lasso": None if lasso is None else lasso.facts()}
    facts["distillation"] = None if taught is None else taught.facts()
    facts["l0"] = None if closing is None else {**closing.facts(), "inserted": gated}
    empty = [*_empty_groups(facts["group_lasso"]), *notes_of(facts["l0"])]
    return facts | {"notes": [*_notes(program, live, group), *empty]}


def _judge(program: Program, held: Any, evaluate: Any, batch_size: int, *, chooses: bool) -> Judge:
    metric = resolve_metric(evaluate, Batches(program, held, batch_size).targets())
    if metric is None:
        raise BadData("the held-out examples have no targets to know the best epoch by; give targets, or an --eval")
    return Judge(metric, held, batch_size, chooses)


def _divided(program: Program, data: Any, val: Any, loss: Any, batch_size: int, seed: int) -> tuple[Batches, Any, str]:
    """Return the batches to train on, the examples held out or None, and a line that says which."""
    known = resolve_loss(loss, None)
    batches = Batches(program, data, batch_size)
    whole = _fitted(program, batches.data, known)
    batches = Batches(program, whole, batch_size)
    if val is not None and val is not False:
        held = _fitted(program, Batches(program, val, batch_size).data, known)
        return batches, held, f"{_shown(whole)} to train on, {_shown(held)} held out"
    if val is False or not isinstance(whole, ArrayData) or whole.targets is None or len(whole) < 2:
        return batches, None, f"{_shown(whole)} to train on, nothing held out: the last weights are kept"
    training, held = whole.split(HELD_OUT, seed)
    told = f"{whole.name}: {len(training):,} to train on, {len(held):,} held out (seed {seed})"
    return Batches(program, training, batch_size), held, told


def _fitted(program: Program, data: Any, loss: Loss | None) -> Any:
    """Check whole arrays against the network; where it does not count examples along dim 0 they are not in its form."""
    if not isinstance(data, ArrayData) or any(program.example_dims().values()):
        return data
    return fit_examples(program, data, loss)


def _shown(data: Any) -> str:
    name = data.name if isinstance(data, ArrayData) else type(data).__name__
    return f"{name} ({len(data):,})" if hasattr(data, "__len__") else name


def _notes(program: Program, optimizer: torch.optim.Optimizer, group: Group) -> list[str]:
    notes = []
    left_out = getattr(optimizer, "left_out", None)  # an optimizer with curvature has it
    if left_out:
        few = ", ".join(list(left_out)[:3]) + (", ..." if len(left_out) > 3 else "")
        reason = next(iter(left_out.values()))
        notes.append(f"no curvature for {len(left_out)} parameters ({few}: {reason}): they took AdamW steps")
    skipped = getattr(optimizer, "skipped", 0)
    if skipped:
        notes.append(f"{skipped} steps were not taken: their gradients were not finite")
    if left_out is not None and has_live_norms(program):
        rows = "rows, not by examples" + (", of each process's share" if group.size > 1 else "")
        notes.append(f"batch norm couples the examples of a batch: curvature was taken by {rows}")
    if group.size > 1 and has_own_norms(program):
        notes.append(OWN_SHARES)
    return notes


def _empty_groups(facts: dict[str, Any] | None) -> list[str]:
    empty = [group["name"] for group in (facts or {}).get("groups", ()) if group["near_zero"] == group["units"]]
    if not empty:
        return []
    few = ", ".join(empty[:3]) + (", ..." if len(empty) > 3 else "")
    return [f"every unit of {len(empty)} groups ({few}) is near zero: lower group lasso to keep some"]
