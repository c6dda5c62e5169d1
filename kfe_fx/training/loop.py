"""The loop behind fine-tuning and training: steps with a schedule, epochs, and the best state by a metric."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from kfe_fx.curvature.distributed import Group
from kfe_fx.errors import BadData, UsageError
from kfe_fx.hard_concrete import drawn_with
from kfe_fx.program import Program
from kfe_fx.structure import pack
from kfe_fx.training.batches import Batch, Batches
from kfe_fx.training.losses import Loss, ignored_label, main_output, settle
from kfe_fx.training.metrics import Metric, evaluate
from kfe_fx.training.parallel import average_gradients, share_tensors, stress_of, weighted_share
from kfe_fx.training.shared_norms import has_live_norms, shared_norms

EXAMPLES = 60_000  # seen by default, all epochs together
MIN_EPOCHS, MAX_EPOCHS = 3, 30
SCHEDULES = ("cosine", "constant")

Progress = Callable[[str, float | None], None]


def default_epochs(examples: int) -> int:
    """Return how many epochs training takes by default: about 60,000 examples in all, 3 to 30 epochs."""
    return min(MAX_EPOCHS, max(MIN_EPOCHS, math.ceil(EXAMPLES / max(examples, 1))))


def steps_of(batches: Batches, epochs: int | None, steps: int | None) -> int:
    """Return the number of steps that ``epochs`` or ``steps`` ask for, or the default where both are None.

    Raises:
        UsageError: both are given, or one is negative.
    """
    if steps is not None and epochs is not None:
        raise UsageError("give epochs or steps, not both")
    if (steps or 0) < 0 or (epochs or 0) < 0:
        raise UsageError("epochs and steps cannot be negative")
    if steps is not None:
        return steps
    wanted = default_epochs(batches.examples()) if epochs is None else epochs
    return wanted * batches.steps()


def probe(program: Program, batch: Batch) -> None:
    """Run forward and backward in evaluation mode without lasting effect and unseen by taps, for a measurement."""
    module = program.sharing().module()
    outputs = module.run_flat(batch.inputs, "eval")
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    total = sum(value.sum() for value in outputs if isinstance(value, Tensor) and value.requires_grad)
    if isinstance(total, Tensor):
        torch.autograd.grad(total, trained, allow_unused=True)


@dataclass
class Record:
    """What a run has seen: the loss of each step and of each epoch (its mean), the metric, and the best state."""

    epochs: int = 0
    losses: list[float] = field(default_factory=list)
    epoch_losses: list[float] = field(default_factory=list)
    judged: list[float] = field(default_factory=list)
    best: float | None = None
    kept: dict[str, Tensor] | None = None

    def last_loss(self) -> float:
        """Return the mean loss of the last tenth of the steps."""
        tail = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(tail) / len(tail)

    def best_epoch(self) -> int | None:
        """Return the number of the epoch whose state is kept, from 1, or None where none was judged."""
        return None if self.best is None else 1 + self.judged.index(self.best)


@dataclass(frozen=True)
class Judge:
    """Examples held out and the metric that the best state is known by; unless it ``chooses``, it only measures."""

    metric: Metric
    data: Any
    batch_size: int
    chooses: bool = True

    def value(self, program: Program, group: Group) -> float:
        """Return the metric of a Program; rank 0 measures for all."""
        found = torch.zeros(1, dtype=torch.float64, device=group.device)
        if group.rank == 0:
            found.fill_(evaluate(program, self.data, self.metric, self.batch_size))
        group.share(found, 0)
        return float(found)


class Penalty(Protocol):
    """What is minimised beside the loss: a function of the parameters alone."""

    def add_gradients(self) -> None:
        """Add its gradient to ``p.grad`` of every parameter in it."""
        ...


class Teacher(Protocol):
    """What else a network learns from; see ``kfe_fx.training.distil``."""

    weight: float

    @property
    def loss(self) -> Loss:
        """What is minimised where ``weight`` is 1."""
        ...

    @property
    def likelihood(self) -> str:
        """What it is a negative log-likelihood of, for curvature from drawn labels: "cross-entropy" or "mse"."""
        ...

    @property
    def ignored(self) -> int:
        """The label of positions of which nothing is learned."""
        ...

    def run(self, inputs: list[Any], mode: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Run the network that learns; return its flat outputs and activations."""
        ...

    def term(self, outputs: Any, activations: tuple[Any, ...], batch: Batch, stress: float = 1.0) -> Tensor:
        """Return what is minimised of it, the mean over the examples of a batch; ``stress`` as ``stress_of`` says."""
        ...


class Trainer:
    """One run: the optimiser, its schedule, and what was seen.

    In a process group each rank works on its share of every batch; gradients, and what batch norms normalise with, are
    those of the whole batch (``kfe_fx.training.shared_norms``). Penalties come on top of these, once: every rank has
    the same parameters, so every rank adds the same.
    """

    def __init__(
        self,
        program: Program,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        total: int,
        schedule: str,
        progress: Progress | None,
        group: Group | None = None,
        penalty: Penalty | Sequence[Penalty] | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        """Take ``total`` steps with an optimiser; ``schedule`` is "cosine" (down to zero) or "constant".

        ``penalty`` (one or several) is in the gradient that the optimiser gets, before it clips; losses are told
        without it. Of a loss that a ``teacher`` has a share w in, the rest is 1 - w times ``loss``.
        """
        self.program = program
        self.teacher = teacher
        self.loss = teacher.loss if teacher is not None and teacher.weight == 1 else loss
        self.optimizer = optimizer
        self.total = total
        self.cosine = schedule == "cosine"
        self.progress = progress
        self.group = group or Group()
        self.penalties = () if penalty is None else tuple(penalty) if isinstance(penalty, Sequence) else (penalty,)
        self.record = Record()
        self.stage = "fine-tuning"
        self.seed = 0
        self.ignored = ignored_label(loss), None if teacher is None else teacher.ignored
        self.stress: tuple[float, ...] = (1.0, 1.0)  # of the loss and of the teacher's part, see ``stress_of``
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.coupled = has_live_norms(program)
        self.parameters = [parameter for parameter in program.module().parameters() if parameter.requires_grad]

    @property
    def done(self) -> int:
        """How many steps were taken."""
        return len(self.record.losses)

    def step(self, batch: Batch) -> None:
        """Take one step on a batch."""
        factor = 0.5 * (1 + math.cos(math.pi * self.done / self.total)) if self.cosine else 1.0
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        share, weight = weighted_share(batch, self.group, coupled=self.coupled)
        self.stress = tuple(1.0 if label is None else stress_of(share, batch, label) for label in self.ignored)
        draws = drawn_with(self.seed * 1_000_003 + self.done)
        with draws, shared_norms(share, batch, self.group, coupled=self.coupled):
            value = self._loss(share) if share.count else None
        number = float(value.detach()) if value is not None else 0.0
        if self.group.size > 1:
            number = self.group.sum_number(number * weight if value is not None else 0.0)
        if not math.isfinite(number):
            self._refuse(number)
        if value is not None:
            value.backward()
        average_gradients(self.parameters, weight, self.group)
        for penalty in self.penalties:
            penalty.add_gradients()
        self.optimizer.step()
        self.record.losses.append(number)
        if self.progress is not None:
            self.progress(self.stage, self.done / self.total)

    def _loss(self, batch: Batch) -> Tensor:
        module = self.program.module()
        mode, teacher = module.mode(), self.teacher
        if teacher is None:
            outputs = pack(module.signature.outputs[mode], module.run_flat(batch.inputs, mode))
            self._scale(self.loss, outputs, batch.count)
            return self._mean(outputs, batch)
        flat, activations = teacher.run(batch.inputs, mode)
        outputs = pack(module.signature.outputs[mode], flat)
        taught = teacher.term(outputs, activations, batch, self.stress[1])
        if getattr(self.optimizer, "source", "") == "sampled":
            self.optimizer.sample(outputs, teacher.likelihood, batch.targets)  # type: ignore[attr-defined]  # of Preconditioned
        else:
            self._scale(teacher.loss if teacher.weight == 1 else self.loss, outputs, batch.count)
        if teacher.weight == 1:
            return taught
        return (1 - teacher.weight) * self._mean(outputs, batch) + teacher.weight * taught

    def _mean(self, outputs: Any, batch: Batch) -> Tensor:
        if not self.stress[0]:  # no label of this rank's share counts, and the mean over nothing is no number
            scores = main_output(outputs)
            return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool), 0.0).sum()
        self.loss = settle(self.loss, outputs, batch.targets, batch.count)
        return self.loss.mean(outputs, batch.targets, batch.count) * self.stress[0]

    def _scale(self, loss: Loss, outputs: Any, count: int) -> None:
        first = self.optimizer.param_groups[0]
        if loss.kind == "mse" and first.get("loss_scale") == 1.0:
            # the mean square error of O outputs is 2/O times the negative log-likelihood that lr and kl_clip are for
            first["loss_scale"] = max(1.0, main_output(outputs).numel() / count / 2)

    def _refuse(self, number: float) -> None:
        if self.done == 0:
            raise BadData(f"the loss {self.loss.name!r} is {number} before any training; check the data and the loss")
        damping = self.optimizer.param_groups[0].get("damping")
        raised = "" if damping is None else f", or raise --damping (now {damping:g})"
        raise UsageError(
            f"the loss became {number} at step {self.done + 1} of {self.total}; lower --lr (now {self.rates[0]:g})"
            + raised
        )

    def restore_rates(self) -> None:
        """Give the optimiser its own learning rates back."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate


def run_epochs(
    trainer: Trainer,
    batches: Batches,
    seed: int,
    judge: Judge | None,
    after_epoch: Callable[[Trainer], None] | None = None,
) -> None:
    """Take all steps that are left, judge each epoch, and end with the best state where a judge chooses it.

    Args:
        trainer: the run; its record may be that of an earlier part.
        batches: the data; epoch e is shuffled by ``seed`` + e.
        seed: of the order.
        judge: measures each epoch and chooses the best; without one the last state is kept.
        after_epoch: called when an epoch is over and its record complete.

    Raises:
        BadData: an epoch yields no batch, or a loss is not finite from the start.
        UsageError: a loss stopped being finite.
    """
    program, record = trainer.program, trainer.record
    trainer.seed = seed
    while trainer.done < trainer.total:
        before = trainer.done
        program.train()
        for batch in batches.epoch(seed + record.epochs, drop_last=True):
            if trainer.done >= trainer.total:
                break
            trainer.step(batch)
        if trainer.done == before:
            raise BadData("the data yields no more batches; an iterator that was used up before yields nothing")
        share_tensors(program, trainer.group, buffers_only=True)
        record.epochs += 1
        record.epoch_losses.append(sum(record.losses[before:]) / (trainer.done - before))
        if judge is not None:
            value = judge.value(program, trainer.group)
            record.judged.append(value)
            if judge.chooses and math.isfinite(value) and judge.metric.better(value, record.best):
                record.best, record.kept = value, copy.deepcopy(program.state_dict())
        if after_epoch is not None:
            after_epoch(trainer)
    if record.kept is not None:
        put_state(program, record.kept)
    if not all(bool(torch.isfinite(value).all()) for value in trainer.parameters):
        raise UsageError(
            f"the weights are not finite any more after {trainer.done} steps; lower --lr (now {trainer.rates[0]:g})"
        )


def put_state(program: Program, state: dict[str, Tensor]) -> None:
    """Write tensors into those of a Program, by name."""
    with torch.no_grad():
        for name, value in state.items():
            program.tensor(name).copy_(value)


def facts_of(record: Record) -> dict[str, Any]:
    """Return what every run reports: steps, epochs, first and last loss."""
    facts: dict[str, Any] = {"steps": len(record.losses), "epochs": record.epochs}
    if record.losses:
        facts |= {"first_loss": record.losses[0], "last_loss": record.last_loss()}
    return facts
