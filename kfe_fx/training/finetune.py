"""Fine-tuning: train the live module of a Program for a while."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch

from kfe_fx.errors import BadData, UsageError
from kfe_fx.program import Program
from kfe_fx.structure import pack
from kfe_fx.training.batches import Batch, Batches
from kfe_fx.training.losses import Loss, resolve_loss, settle
from kfe_fx.training.metrics import Metric, evaluate, resolve_metric
from kfe_fx.training.optimizer_state import make_optimizer
from kfe_fx.training.threads import fastest_threads

EXAMPLES = 60_000  # seen by default, all epochs together
MIN_EPOCHS, MAX_EPOCHS = 3, 30

Progress = Callable[[str, float | None], None]


def default_epochs(examples: int) -> int:
    """Return how many epochs fine-tuning takes by default: about 60,000 examples in all, 3 to 30 epochs."""
    return min(MAX_EPOCHS, max(MIN_EPOCHS, math.ceil(EXAMPLES / max(examples, 1))))


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
    threads give the same weights, to the bit.

    Args:
        program: the network; its tensors are changed.
        data: examples with targets, in any form.
        loss: see ``resolve_loss``.
        epochs: passes over the data; by default about 60,000 examples in 3 to 30 epochs.
        steps: number of batches instead of epochs.
        lr: learning rate; 0.001 for AdamW, 0.01 for SGD; a live optimiser keeps its own if not given.
        batch_size: examples a step.
        optimizer: "adamw", "sgd", or a live one over the Program's parameters, which keeps its state.
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
    if schedule not in ("cosine", "constant"):
        raise UsageError(f"there is no schedule {schedule!r}; choose cosine or constant")
    total = _steps(batches, epochs, steps)
    trainer = _Trainer(program, found, _optimizer(program, optimizer, lr), total, schedule, progress)
    judge = None if val is None else resolve_metric(metric, Batches(program, val, batch_size).targets())
    facts: dict[str, Any] = {"optimizer": type(trainer.optimizer).__name__, "loss": found.name, "seed": seed}
    if not total:
        return {**facts, "steps": 0, "epochs": 0.0}
    first = next(batches.epoch(seed, drop_last=True))
    try:
        with fastest_threads(lambda: trainer.probe(first), threads) as count, torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            facts |= {"threads": count} | _train(trainer, batches, seed, val, judge, batch_size)
    finally:
        trainer.restore_rates()
        program.eval()
    return facts


def _train(
    trainer: _Trainer, batches: Batches, seed: int, val: Any, judge: Metric | None, batch_size: int
) -> dict[str, Any]:
    program = trainer.program
    best: float | None = None
    kept: dict[str, torch.Tensor] | None = None
    judged: list[float] = []
    epoch = 0
    while trainer.done < trainer.total:
        before = trainer.done
        program.train()
        for batch in batches.epoch(seed + epoch, drop_last=True):
            if trainer.done >= trainer.total:
                break
            trainer.step(batch)
        if trainer.done == before:
            raise BadData("the data yields no more batches; an iterator that was used up before yields nothing")
        epoch += 1
        if judge is not None:
            judged.append(evaluate(program, val, judge, batch_size))
            if judge.better(judged[-1], best):
                best, kept = judged[-1], copy.deepcopy(program.state_dict())
    if kept is not None:
        _restore(program, kept)
    facts = {"steps": trainer.done, "epochs": epoch, "first_loss": trainer.losses[0], "last_loss": trainer.last_loss()}
    if judge is not None:
        facts |= {judge.name: judged, "best_epoch": 1 + judged.index(best)}  # type: ignore[arg-type]
    return facts


def _restore(program: Program, state: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, value in state.items():
            program.tensor(name).copy_(value)


class _Trainer:
    """One run: the optimiser, its schedule, and what was seen."""

    def __init__(
        self,
        program: Program,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        total: int,
        schedule: str,
        progress: Progress | None,
    ) -> None:
        self.program = program
        self.loss = loss
        self.optimizer = optimizer
        self.total = total
        self.cosine = schedule == "cosine"
        self.progress = progress
        self.done = 0
        self.losses: list[float] = []
        self.rates = [group["lr"] for group in optimizer.param_groups]

    def probe(self, batch: Batch) -> None:
        """Run forward and backward in evaluation mode, where nothing is changed."""
        module = self.program.module()
        outputs = module.run_flat(batch.inputs, "eval")
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        total = sum(value.sum() for value in outputs if isinstance(value, torch.Tensor) and value.requires_grad)
        if isinstance(total, torch.Tensor):
            torch.autograd.grad(total, trained, allow_unused=True)

    def step(self, batch: Batch) -> None:
        """Take one step on a batch."""
        module = self.program.module()
        mode = module.mode()
        factor = 0.5 * (1 + math.cos(math.pi * self.done / self.total)) if self.cosine else 1.0
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        outputs = pack(module.signature.outputs[mode], module.run_flat(batch.inputs, mode))
        self.loss = settle(self.loss, outputs, batch.targets, batch.count)
        value = self.loss.mean(outputs, batch.targets, batch.count)
        number = float(value.detach())
        if not math.isfinite(number):
            self._refuse(number)
        value.backward()
        self.optimizer.step()
        self.losses.append(number)
        self.done += 1
        if self.progress is not None:
            self.progress("fine-tuning", self.done / self.total)

    def _refuse(self, number: float) -> None:
        if self.done == 0:
            raise BadData(f"the loss {self.loss.name!r} is {number} before any training; check the data and the loss")
        raise UsageError(
            f"the loss became {number} at step {self.done + 1} of {self.total}; lower --lr (now {self.rates[0]:g})"
        )

    def last_loss(self) -> float:
        """Return the mean loss of the last tenth of the steps."""
        tail = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(tail) / len(tail)

    def restore_rates(self) -> None:
        """Give the optimiser its own learning rates back."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate


def _steps(batches: Batches, epochs: int | None, steps: int | None) -> int:
    if steps is not None and epochs is not None:
        raise UsageError("give epochs or steps, not both")
    if (steps or 0) < 0 or (epochs or 0) < 0:
        raise UsageError("epochs and steps cannot be negative")
    if steps is not None:
        return steps
    wanted = default_epochs(batches.examples()) if epochs is None else epochs
    return wanted * batches.steps()


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
