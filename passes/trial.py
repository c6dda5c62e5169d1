"""What a candidate loses, judged on a few examples: its loss on targets, else its distance from the dense network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from kfe_fx.labels.branches import Branch
from kfe_fx.labels.states import narrow_input
from kfe_fx.passes.settings import Settings
from kfe_fx.program import GraphInterpreter, Program
from kfe_fx.runtime.inputs import draw_inputs
from kfe_fx.structure import pack
from kfe_fx.training.batches import Batch, Batches, pinned_batch
from kfe_fx.training.losses import Loss, counted, resolve_loss, settle

EXAMPLES = 512
DRAWN = 8  # inputs that are drawn where there are no examples


class Trial:
    """Judges candidates of one run on the same examples."""

    def __init__(self, dense: Program, sample: Any, settings: Settings, examples: int = EXAMPLES) -> None:
        """Run the dense network where there are no targets to compare with; at most so many examples are looked at."""
        self._batches: list[Batch] = []
        if sample is None:
            self._batches = [Batch(draw_inputs(dense, DRAWN if dense.batch_axes() else None, settings.seed), None, 1)]
        else:
            self._batches = list(
                Batches(dense, sample.first(max(examples, pinned_batch(dense) or 0)), settings.batch_size)
            )
        targets = self._batches[0].targets
        self._whole: tuple[Program, float] | None = None
        self._loss: Loss | None = None
        if targets is not None:
            self._loss = counted(resolve_loss(settings.loss, targets), (batch.targets for batch in self._batches))
        self._dense = [] if self._loss is not None else [self._run(dense, batch) for batch in self._batches]

    @property
    def name(self) -> str:
        """What is measured: the loss by its name, or the distance from the dense network's outputs."""
        return "distance" if self._loss is None else self._loss.name

    @property
    def examples(self) -> int:
        """How many examples it is measured on."""
        return sum(batch.count for batch in self._batches)

    @property
    def judges_loss(self) -> bool:
        """Whether it is the loss on targets, which scores can promise something of."""
        return self._loss is not None

    @staticmethod
    def _run(program: Program, batch: Batch) -> tuple[Any, ...]:
        with torch.no_grad():
            return program.module().run_flat(_narrowed(program, batch))

    def loss(self, candidate: Program) -> float:
        """Return the mean loss of a candidate; lower is better."""
        return self._loss_of(candidate, lambda batch: self._run(candidate, batch))

    def harm(self, program: Program, branch: Branch) -> float:
        """Return by how much the loss grows when a branch gives its mean over each batch instead."""
        if self._whole is None or self._whole[0] is not program:
            self._whole = program, self.loss(program)  # many branches of one network are asked for
        runner = _Averaged(program, branch)
        return self._loss_of(program, lambda batch: runner.run(*_narrowed(program, batch))) - self._whole[1]

    def _loss_of(self, candidate: Program, run: Callable[[Batch], tuple[Any, ...]]) -> float:
        total, count = 0.0, 0
        for place, batch in enumerate(self._batches):
            with torch.no_grad():
                found = run(batch)
            if self._loss is not None and batch.targets is not None:
                outputs = pack(candidate.signature.outputs["eval"], found)
                # until it is seen nobody knows whether a function of the user's gives a mean
                self._loss = settle(self._loss, outputs, batch.targets, batch.count)
                with torch.no_grad():
                    total += float(self._loss.total(outputs, batch.targets, batch.count))
                count += batch.count
            else:
                total += _distance(found, self._dense[place])
                count += 1
        return total / max(1, count)


def _narrowed(program: Program, batch: Batch) -> list[Any]:
    # states may have lost units
    names = program.signature.input_names
    return [narrow_input(program, name, value) for name, value in zip(names, batch.inputs, strict=True)]


class _Averaged(GraphInterpreter):
    """Runs a network in which what a branch gives is its mean over examples and positions."""

    def __init__(self, program: Program, branch: Branch) -> None:
        super().__init__(program.module(), graph=program.graphs["eval"])
        self._dims = {constant.source: constant.dims for constant in branch.constants}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name not in self._dims:
            return value
        others = [dim for dim in range(value.dim()) if dim not in self._dims[n.name]]
        return value.mean(others, keepdim=True).expand_as(value).contiguous() if others else value


def _distance(found: tuple[Any, ...], wanted: tuple[Any, ...]) -> float:
    """Return the mean square difference of all outputs, relative to what they vary by."""
    parts = [
        float(F.mse_loss(ours.double(), theirs.double()) / theirs.double().var(correction=0).clamp_min(1e-12))
        for ours, theirs in zip(found, wanted, strict=True)
        if isinstance(theirs, Tensor) and theirs.is_floating_point() and ours.shape == theirs.shape
    ]
    return sum(parts) / max(1, len(parts))
