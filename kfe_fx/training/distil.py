"""Distillation: a network learns from a teacher what it says, with or without targets.

    loss = (1 - w) * task loss + w * ( teacher term + sum over features f of  c_f * mean (s_f - t_f)² / mean t_f² )

Outputs of examples beside the main one count by their mean square error, or, where their own mean square in the first
batch is above 1, by it over that: none outweighs the main one by its unit.
The teacher term of classes is T² KL( softmax(t / T) || softmax(s / T) ) (Hinton, Vinyals, Dean 2015), of values the
mean square of s - t. w = 0.9 and T = 1 by default: what pruned networks were fine-tuned with in the paper on Fisher
pruning (Theis, Korshunova, Tejani, Huszar 2018: 0.9 of the loss to the teacher's map as it is).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kfe_fx.data.checks import IGNORED
from kfe_fx.data.dataset import ArrayData
from kfe_fx.errors import BadData, UsageError
from kfe_fx.labels.states import widths
from kfe_fx.program import Program, named_tensors
from kfe_fx.structure import flatten_like, pack
from kfe_fx.training.activations import Compared, Watched
from kfe_fx.training.batches import Batch, Batches, pinned_batch
from kfe_fx.training.features import Features
from kfe_fx.training.lessons import Lesson, Lessons
from kfe_fx.training.losses import Loss, example_dim, main_output, mean_square, resolve_loss, settle
from kfe_fx.training.optimizer_state import CURVATURE
from kfe_fx.training.soft_targets import softened, with_classes

WEIGHT, TEMPERATURE = 0.9, 1.0
CLASSES, VALUES = "cross-entropy", "mse"
_MEMORY = 256 << 20


@dataclass(frozen=True, eq=False)
class Distillation:
    """A teacher and what is learned from it.

    Attributes:
        teacher: the network that is learned from: it runs in evaluation mode, and nothing of it changes.
        weight: w, its share of the loss, 0 to 1; by default 0.9, and 1 where the data has no targets.
        temperature: T, above 0, of outputs that are compared as classes; by default 1.
        match: how outputs are compared: "cross-entropy" (soft targets), "mse", or a function (outputs, teacher's
            outputs) -> loss. By default as the loss is: classes for integer targets, values for floating-point ones;
            where there is no loss and no target "mse", which is right for scores of classes and for values.
        features: activations that are compared too: names (or globs) of modules or nodes, {name: c_f}, or {name: (c_f,
            kept)} with the indices of the teacher's that this network still has; see ``kept_features``.
        memory: bytes that may be used to keep what the teacher says of whole arrays from epoch to epoch.
    """

    teacher: Program
    weight: float | None = None
    temperature: float | None = None
    match: Any = None
    features: Features | None = None
    memory: int = _MEMORY


def teach(
    program: Program,
    batches: Batches,
    targets: Tensor | None,
    loss: Loss | None,
    teacher: Program | Distillation | None,
    distil: float | None = None,
    temperature: float | None = None,
    features: Features | None = None,
) -> Teaching | None:
    """Prepare a network to learn from a teacher; return None where there is none.

    Args:
        program: the network that learns.
        batches: its data.
        targets: a sample of the targets in it, or None where there are none.
        loss: that of the targets.
        teacher: a Program, or a Distillation, which says the rest itself.
        distil: see ``Distillation.weight``.
        temperature: see there.
        features: see there.

    Raises:
        UsageError: an argument means nothing.
        BadData: the teacher leaves a share of the loss to targets, and there are none.
    """
    given = {"distil": distil, "temperature": temperature, "features": features}
    said = next((name for name, value in given.items() if value is not None), "")
    if teacher is None:
        if said:
            raise UsageError(f"{said} goes with a teacher; say which network is learned from")
        return None
    if isinstance(teacher, Program):
        teacher, said = Distillation(teacher, distil, temperature, features=features), ""
    if not isinstance(teacher, Distillation) or not isinstance(teacher.teacher, Program):
        raise UsageError(f"the teacher is a {type(teacher).__name__}; give a Program or a Distillation")
    if said:
        raise UsageError(f"{said} is a field of the Distillation; say it there alone")
    return Teaching(program, batches, targets, loss, teacher)


class Teaching:
    """A Distillation at work on one network and one data set.

    ``weight`` is w, ``batches`` the data with what the teacher reads, ``loss`` names what is minimised where w is 1,
    ``ignored`` is the label of positions of which nothing is learned.
    """

    def __init__(
        self, program: Program, batches: Batches, targets: Tensor | None, loss: Loss | None, spec: Distillation
    ) -> None:
        """Settle what is compared; see ``teach``. Nothing is run before ``begin``."""
        self.program, self.spec, self.teacher = program, spec, spec.teacher
        inputs, theirs = len(program.signature.input_names), len(self.teacher.signature.input_names)
        if inputs != theirs:
            names = ", ".join(self.teacher.signature.input_names)
            raise UsageError(
                f"the teacher reads {theirs} inputs ({names}), this network {inputs}; give one of the same"
            )
        self.weight = _share(spec.weight, loss, targets)
        self.temperature = _positive(spec.temperature)
        self.ignored = getattr(loss.function if loss is not None else None, "ignore_index", IGNORED)
        named = loss is not None and bool(loss.kind)
        self._guessed = spec.match is None and not named  # a loss of the user's: integer targets may be no classes
        if spec.match is not None:
            found = resolve_loss(spec.match, None)
        else:
            found = loss if named else resolve_loss(None, targets)
        self._compare_by(found or Loss(VALUES, mean_square, "mean"))
        self._features = Compared(spec.features)
        self._beside: dict[int, float] = {}  # flat outputs beside the main one -> what their errors are divided by
        self._student, self._asked = Watched(program, ()), Watched(self.teacher, ())
        self.batches = Lessons(program, self.teacher, batches, batches.batch_size)

    def _compare_by(self, match: Loss) -> None:
        if match.kind != CLASSES and self.spec.temperature is not None:
            raise UsageError(
                f"temperature softens classes, and the outputs are compared by {match.name}; leave it out, or name the "
                "loss cross-entropy"
            )
        self.match = match
        self.loss = Loss(f"distillation ({match.name})", match.function, match.reduction)

    @property
    def likelihood(self) -> str:
        """What outputs stand for: classes or values."""
        return CLASSES if self.match.kind == CLASSES else VALUES

    @property
    def _named(self) -> bool:
        return bool(self.match.kind)

    # before the first step -------------------------------------------------------------------------------------------

    def begin(self, first: Batch) -> None:
        """Check on one batch that the teacher fits, and measure what features are divided by.

        Raises:
            UsageError: inputs or outputs differ, or there is no such activation.
            BadData: what the teacher says is not finite.
        """
        assert isinstance(first, Lesson)
        assert first.asked is not None
        self._check_inputs(first.asked)
        mine = _storages(self.program)
        if mine & _storages(self.teacher):  # it would change with the network
            self.teacher = self.teacher.copy()
        self._features.choose(self.program, self.teacher)
        self._watch()
        with torch.no_grad():
            flat, activations = self._student.run(first.inputs, "eval")
        self._beside = {}
        said, theirs = self._say(first.asked)
        self._check_outputs(pack(self.program.signature.outputs["eval"], flat), said, first)
        self._measure_beside(flat, first)
        self._features.measure(activations, theirs)
        self._watch()

    def _watch(self) -> None:
        chosen = self._features.chosen
        self._student = Watched(self.program, [one.node for one in chosen])
        self._asked = Watched(self.teacher, [one.theirs for one in chosen])

    def _check_inputs(self, asked: Batch) -> None:
        teacher = self.teacher
        pinned = pinned_batch(teacher)
        if pinned not in (None, asked.count):
            raise UsageError(
                f"the teacher pins its batch at {pinned}, here it is {asked.count}; set the batch size to it"
            )
        for name, value, example in zip(
            teacher.signature.input_names, asked.inputs, teacher.flat_examples(), strict=True
        ):
            if not isinstance(value, Tensor) or not isinstance(example, Tensor):
                continue
            free = {*teacher.axes.get(name, {}), *([] if pinned is None else [0])}
            fits = value.dim() == example.dim() and all(
                dim in free or value.shape[dim] == example.shape[dim] for dim in range(value.dim())
            )
            if not fits or value.is_floating_point() != example.is_floating_point():
                raise UsageError(
                    f"the teacher's input {name!r} is {_form(example)}, what the data has for it {_form(value)}; give "
                    "a teacher of these inputs, and states as wide as it takes them"
                )

    def _check_outputs(self, outputs: Any, said: tuple[Any, ...], first: Lesson) -> None:
        # minus infinity is how scores rule a class out
        if any(bool((value.isnan() | (value == math.inf)).any()) for value in said if isinstance(value, Tensor)):
            raise BadData("what the teacher says of the first batch is not finite; check the teacher and the data")
        if not self._named:
            return
        mine = main_output(outputs)
        if mine.shape != said[0].shape:
            raise UsageError(
                f"the teacher's output is {list(said[0].shape)}, this network's {list(mine.shape)}; give a teacher of "
                "the same outputs, or Distillation(teacher, match=FUNCTION)"
            )
        if self.match.kind == CLASSES:
            try:
                with_classes(mine, said[0], first.targets, self.ignored, first.inputs)
            except BadData:
                if not self._guessed:
                    raise
                self._compare_by(Loss(VALUES, mean_square, "mean"))

    def _measure_beside(self, flat: tuple[Any, ...], first: Lesson) -> None:
        """Find the outputs beside the main one that both networks have at the same places, an example each."""
        assert first.asked is not None
        mine, theirs = self.program.signature.outputs, self.teacher.signature.outputs
        if not self._named or mine.get("train", mine["eval"]) != mine["eval"] or mine["eval"] != theirs["eval"]:
            return
        said = self._flat_said(first.asked.inputs)[0]
        main = main_output(pack(mine["eval"], flat))
        for place, (own, wanted) in enumerate(zip(flat, said, strict=True)):
            if own is main or not all(isinstance(v, Tensor) and v.is_floating_point() for v in (own, wanted)):
                continue
            finite = wanted.masked_fill(wanted == -math.inf, 0.0)
            if own.shape == wanted.shape and example_dim(own, first.count) is not None and finite.isfinite().all():
                self._beside[place] = max(1.0, float(finite.double().square().mean()))

    def remember(self, seed: int, total: int, progress: Callable[[str, float | None], None] | None) -> None:
        """Let the teacher speak once for all epochs where that is worth it and changes nothing; see ``Lessons``."""
        if isinstance(self.batches.data, ArrayData) and total > self.batches.steps():
            tell = progress or (lambda stage, done: None)
            self.batches.remember(self.ask, seed, self.spec.memory, lambda done: tell("asking the teacher", done))

    # in every step ---------------------------------------------------------------------------------------------------

    def run(self, inputs: list[Any], mode: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Run the network; return its flat outputs and its activations."""
        return self._student.run(inputs, mode)

    def term(self, outputs: Any, activations: tuple[Any, ...], batch: Batch, stress: float = 1.0) -> Tensor:
        """Return the teacher's part of the loss, before it is weighed by w: the mean over a batch.

        ``stress`` multiplies what is a mean over the labels that count, see ``kfe_fx.training.parallel.stress_of``.
        """
        assert isinstance(batch, Lesson)
        assert batch.asked is not None
        told = self.ask(batch.asked) if batch.told is None else batch.told
        count = len(told) - len(activations)
        parts = self._features.term(activations, told[count:])
        if self._beside:
            flat = flatten_like(self.program.signature.outputs["eval"], outputs, "the output")
            for (place, size), wanted in zip(self._beside.items(), told[1:count], strict=True):
                mine = _examples_first(flat[place], batch.count)
                parts.append(_squares(mine, wanted.to(mine)) / size)
        return torch.stack([self._output_term(outputs, told[:count], batch, stress), *parts]).sum()

    def _output_term(self, outputs: Any, told: tuple[Any, ...], batch: Batch, stress: float) -> Tensor:
        if not self._named:
            theirs = pack(self.teacher.signature.outputs["eval"], told)
            self.match = settle(self.match, outputs, theirs, batch.count)
            return self.match.mean(outputs, theirs, batch.count)
        scores = main_output(outputs)
        wanted = told[0].to(scores)
        if self.match.kind == VALUES:
            return F.mse_loss(scores, wanted)
        moved, goal, counted = with_classes(scores, wanted, batch.targets, self.ignored, batch.inputs)
        return softened(moved, goal, self.temperature, counted) * (1.0 if counted is None else stress)

    def ask(self, asked: Batch) -> tuple[Any, ...]:
        """Return what is compared: outputs of the teacher, then what stays of its activations."""
        said, activations = self._say(asked)
        return (*said, *self._features.cut(activations))

    @torch.no_grad()
    def _say(self, asked: Batch) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        said, activations = self._flat_said(asked.inputs)
        if not self._named:
            return said, activations
        if not any(isinstance(value, Tensor) and value.is_floating_point() for value in said):
            raise UsageError("the teacher has no floating-point output to learn from; give another one")
        main = main_output(pack(self.teacher.signature.outputs["eval"], said))
        return (main, *(_examples_first(said[place], asked.count) for place in self._beside)), activations

    @torch.no_grad()
    def _flat_said(self, inputs: list[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        flat, activations = self._asked.run(inputs, "eval")
        return tuple(self._narrowed(place, value) for place, value in enumerate(flat)), activations

    def _narrowed(self, place: int, value: Any) -> Any:
        """Cut a state that the teacher returns to the units that this network's still has."""
        held = widths(self.program).get("outputs", {}).get(str(place))
        if held is None or not isinstance(value, Tensor) or not value.dim():
            return value
        wide = widths(self.teacher).get("outputs", {}).get(str(place), {}).get("kept", range(held["width"]))
        at = {unit: index for index, unit in enumerate(wide)}
        if len(at) != value.shape[-1] or not all(unit in at for unit in held["kept"]):
            return value
        return value.index_select(-1, torch.tensor([at[unit] for unit in held["kept"]], device=value.device))

    # what is told ----------------------------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """Return what tells one distillation from another, for a checkpoint."""
        from kfe_fx.curvature.store import graph_hash, weights_hash

        return {
            "teacher": f"{graph_hash(self.teacher)} {weights_hash(self.teacher)}",
            "distil": self.weight,
            "temperature": self.temperature,
            "match": self.match.name,
            "features": self._features.identity(),
        }

    def facts(self) -> dict[str, Any]:
        """Return for the report: w, T where there are classes, what is compared, and whether answers were kept."""
        return {
            "weight": self.weight,
            "temperature": self.temperature if self.match.kind == CLASSES else None,
            "match": self.match.name,
            "features": [one.name for one in self._features.chosen],
            "remembered": self.batches.remembered,
        }


def curvature_source(optimizer: str, *, drawn: bool) -> str | None:
    """Return the labels that EKFAC or KFAC measures curvature with where a network learns from a teacher: drawn ones.

    The second derivative of the teacher term by the outputs is that of a likelihood, and stays so where the network is
    near its teacher. The gradients vanish there, and a curvature made of them is next to nothing: steps would stay
    long.
    """
    return "sampled" if drawn and optimizer in CURVATURE else None


def _share(weight: float | None, loss: Loss | None, targets: Tensor | None) -> float:
    if weight is None:
        return WEIGHT if targets is not None else 1.0
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= 1:
        raise UsageError(f"distil is the teacher's share of the loss, from 0 to 1, got {weight!r}")
    if weight < 1 and (loss is None or targets is None):
        raise BadData(f"distil {weight:g} leaves the rest of the loss to targets, and the data has none; leave it out")
    return float(weight)


def _examples_first(value: Tensor, count: int) -> Tensor:
    dim = example_dim(value, count)
    return value if dim is None else value.movedim(dim, 0)


def _squares(mine: Tensor, theirs: Tensor) -> Tensor:
    """Return the mean square difference, of nothing where minus infinity rules out or the teacher has no number."""
    told = theirs.isfinite() & (mine != -math.inf)
    return (mine.masked_fill(~told, 0.0) - theirs.masked_fill(~told, 0.0)).square().mean()


def _positive(temperature: float | None) -> float:
    if temperature is None:
        return TEMPERATURE
    number = not isinstance(temperature, bool) and isinstance(temperature, int | float)
    if not number or not 0 < temperature < math.inf:
        raise UsageError(f"temperature is a number above 0, got {temperature!r}")
    return float(temperature)


def _storages(program: Program) -> set[int]:
    held = named_tensors(program.module()).values()
    return {value.untyped_storage().data_ptr() for value in held if value.numel()}


def _form(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
