"""Losses: what fine-tuning minimises and what scores are gradients of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from kfe_fx.data.checks import IGNORED
from kfe_fx.errors import BadData, UsageError
from kfe_fx.program import Program
from kfe_fx.structure import pack
from kfe_fx.training.batches import Batch
from kfe_fx.user_code import load_function

LossFunction = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Loss:
    """A loss of outputs and targets with a meaning per example.

    ``function(outputs, targets)`` returns a vector [N], or a scalar that is their "mean" or "sum" as ``reduction``
    says ("none" for the vector).

    ``positions``: of a cross-entropy of labels some of which are -100: how many positions of an example count, on the
    average over the data. The loss of an example is the sum over those that count, over this number: that is a loss of
    each example alone, and the mean over the data is the mean over what counts. None where all count.
    """

    name: str
    function: LossFunction
    reduction: str
    positions: float | None = None

    @property
    def kind(self) -> str:
        """Which of ours it is, "cross-entropy" or "mse"; "" for a function of the user's, whatever it is called."""
        return next((kind for kind, function in _KINDS.items() if function is self.function), "")

    def total(self, outputs: Any, targets: Any, count: int) -> Tensor:
        """Return the sum of the losses of ``count`` examples; a mean is multiplied back."""
        if self.positions is not None:
            logits, classes = class_scores(outputs, targets)
            return F.cross_entropy(logits, classes.long(), reduction="sum") / self.positions
        value = self.function(outputs, targets)
        return value.sum() if self.reduction != "mean" else value.sum() * count

    def mean(self, outputs: Any, targets: Any, count: int) -> Tensor:
        """Return the mean loss of ``count`` examples; of a cross-entropy over the positions here that count."""
        if self.positions is not None:
            logits, classes = class_scores(outputs, targets)
            valid = (classes != IGNORED).sum().clamp_min(1)
            return F.cross_entropy(logits, classes.long(), reduction="sum") / valid
        value = self.function(outputs, targets)
        return value.sum() if self.reduction == "mean" else value.sum() / count


def counted(loss: Loss | None, targets: Iterable[Any]) -> Loss | None:
    """Count which labels of a cross-entropy count: see ``Loss.positions``.

    Args:
        loss: any loss, or None; only a cross-entropy by name changes.
        targets: of all the examples that it will be a mean over, in any number of parts.
    """
    if loss is None or loss.kind != "cross-entropy":
        return loss
    examples = valid = total = 0
    for part in targets:
        if not isinstance(part, Tensor) or part.is_floating_point():
            return loss
        examples, total, valid = examples + len(part), total + part.numel(), valid + int((part != IGNORED).sum())
    return loss if valid in (0, total) else replace(loss, positions=valid / examples)


def ignored_label(loss: Loss) -> int | None:
    """Return the label that a mean leaves out: -100 where the data has such, or what a module of torch is told."""
    if loss.positions is not None:
        return IGNORED
    told = getattr(loss.function, "ignore_index", None)
    return told if isinstance(told, int) and getattr(loss.function, "reduction", "") == "mean" else None


def cross_entropy(outputs: Any, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits [N, C, ...] (or [N, ..., C] where only that fits) and classes [N, ...].

    Raises:
        BadData: the shapes do not fit each other.
    """
    logits, classes = class_scores(outputs, targets)
    return F.cross_entropy(logits, classes.long())


def mean_square(outputs: Any, targets: Tensor) -> Tensor:
    """Return the mean square error over all elements.

    Raises:
        BadData: the shapes differ.
    """
    values = main_output(outputs)
    if values.numel() != targets.numel() or len(values) != len(targets):
        raise BadData(f"targets {list(targets.shape)} do not fit the output {list(values.shape)}; name a --loss")
    return F.mse_loss(values, targets.to(values.dtype).reshape(values.shape))


def main_output(outputs: Any) -> Tensor:
    """Return the first floating-point output with a class or feature dim, else the first floating-point one.

    Raises:
        UsageError: no output is floating-point.
    """
    found = floating_outputs(outputs)
    if not found:
        raise UsageError("the network has no floating-point output to take a loss of; name a --loss")
    return next((value for value in found if value.dim() >= 2), found[0])


def floating_outputs(outputs: Any) -> list[Tensor]:
    """Return the floating-point tensors among nested outputs, in order."""
    return [value for value in _leaves(outputs) if isinstance(value, Tensor) and value.is_floating_point()]


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for part in value.values() for leaf in _leaves(part)]
    if isinstance(value, tuple | list):
        return [leaf for part in value for leaf in _leaves(part)]
    return [value]


def class_scores(outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits with the classes in dim 1 and targets of the shape that goes with them.

    Raises:
        BadData: the shapes do not fit each other.
    """
    logits = main_output(outputs)
    shape = tuple(targets.shape)
    if logits.dim() >= 2 and logits.shape[1] > 1 and (logits.shape[0], *logits.shape[2:]) == shape:
        return logits, targets
    if logits.dim() >= 3 and tuple(logits.shape[:-1]) == shape:
        return logits.movedim(-1, 1), targets
    if logits.dim() == 2 and shape == (len(logits), 1):
        return logits, targets[:, 0]
    raise BadData(
        f"class targets {list(shape)} do not fit the output {list(logits.shape)}: classes in dim 1 are expected; "
        "name a --loss"
    )


_KINDS: dict[str, LossFunction] = {"cross-entropy": cross_entropy, "mse": mean_square}
_NAMED = {kind: Loss(kind, function, "mean") for kind, function in _KINDS.items()}


def resolve_loss(spec: Any, targets: Tensor | None) -> Loss | None:
    """Find the loss that ``spec`` says.

    Args:
        spec: None (cross-entropy for integer targets, mean square for floating-point ones, None without targets),
            "cross-entropy", "mse", "file.py:function", a function of (outputs, targets), or a Loss.
        targets: a sample of the targets, or None where there are none.

    Returns:
        The loss; the reduction of a function of the user's is found when it is first seen, see ``settle``.

    Raises:
        UsageError: there is no such loss.
    """
    if spec is None:
        if targets is None:
            return None
        return _NAMED["mse" if targets.is_floating_point() else "cross-entropy"]
    if isinstance(spec, Loss):
        return spec
    if isinstance(spec, str):
        return _NAMED[spec] if spec in _NAMED else Loss(spec, load_function(spec), "")
    if not callable(spec):
        raise UsageError(f"the loss is a {type(spec).__name__}: give a function (outputs, targets) -> loss")
    name = getattr(spec, "__name__", type(spec).__name__)
    return Loss(name, cast(LossFunction, spec), getattr(spec, "reduction", ""))


def settle(loss: Loss, outputs: Any, targets: Any, count: int) -> Loss:
    """Find out whether a function of the user's returns a mean, a sum or a vector, by giving it the batch twice over.

    Args:
        loss: one whose ``reduction`` may be "" (not known).
        outputs: of one batch.
        targets: of the same.
        count: its number of examples N.

    Returns:
        The loss with its reduction.

    Raises:
        UsageError: the value is no scalar and no vector [N], or a batch twice over gives neither the same nor twice it.
        BadData: it is not finite.
    """
    if loss.reduction in ("mean", "sum", "none"):
        return loss
    with torch.no_grad():
        once = loss.function(outputs, targets)
        if not isinstance(once, Tensor):
            raise UsageError(f"the loss {loss.name!r} returns a {type(once).__name__}; return a tensor")
        if once.dim() == 1 and len(once) == count and count > 1:
            return Loss(loss.name, loss.function, "none")
        if once.numel() != 1:
            raise UsageError(f"the loss {loss.name!r} returns {list(once.shape)}; return a mean, a sum or [N]")
        if not bool(torch.isfinite(once).all()):
            raise BadData(f"the loss {loss.name!r} is {float(once.sum()):g} on a batch; check the data and the loss")
        again = loss.function(_twice(outputs, count), _twice(targets, count)).sum()
        once = once.sum()
    for reduction, expected in (("mean", once), ("sum", 2 * once)):
        if torch.allclose(again, expected, rtol=1e-3, atol=1e-12):
            return Loss(loss.name, loss.function, reduction)
    raise UsageError(
        f"the loss {loss.name!r} has no meaning per example: on a batch given twice over it is neither the same "
        "(a mean) nor the double (a sum); return a vector [N]"
    )


def separable(loss: Loss, outputs: Any, targets: Any, count: int) -> None:
    """Check that a loss of the user's is a sum or mean over examples, by taking it of two parts of a batch.

    Raises:
        UsageError: the parts do not add up to the whole, so no gradient belongs to one example alone.
    """
    if count < 2 or loss.kind:
        return
    half = count // 2
    with torch.no_grad():
        whole = loss.total(outputs, targets, count)
        parts = [
            loss.total(cut(outputs, count, start, stop), cut(targets, count, start, stop), stop - start)
            for start, stop in ((0, half), (half, count))
        ]
    if bool(torch.isfinite(whole)) and not torch.allclose(parts[0] + parts[1], whole, rtol=1e-3, atol=1e-12):
        raise UsageError(
            f"the loss {loss.name!r} mixes the examples of a batch, so no gradient belongs to one alone; return a "
            "vector [N], or a mean or sum of such"
        )


class Settling:
    """Settles a loss of the user's on whole batches, before their examples are taken one by one.

    It looks until a batch of several examples has shown that the loss is one of each example.
    """

    def __init__(self, program: Program, loss: Loss | None) -> None:
        """Nothing is to be settled of a loss by name, or of none."""
        self._module, self._loss = program.module(), loss
        self._done = loss is None or bool(loss.kind)

    def see(self, batch: Batch) -> Loss | None:
        """Return the loss, settled as far as this batch and those before it tell.

        Raises:
            UsageError: it mixes the examples of a batch; see ``settle`` and ``separable``.
            BadData: it is not finite.
        """
        if self._done or self._loss is None or batch.targets is None:
            return self._loss
        module = self._module
        with torch.no_grad():
            outputs = pack(module.signature.outputs["eval"], module.run_flat(batch.inputs, "eval"))
        self._loss = settle(self._loss, outputs, batch.targets, batch.count)
        separable(self._loss, outputs, batch.targets, batch.count)
        self._done = batch.count > 1
        return self._loss


def cut(value: Any, count: int, start: int, stop: int) -> Any:
    """Take the examples from ``start`` to ``stop`` of nested outputs of ``count``."""
    if isinstance(value, Tensor):
        dim, rows = _examples_of(value, count)
        return value if dim is None else value.narrow(dim, start * rows, (stop - start) * rows)
    if isinstance(value, dict):
        return {key: cut(part, count, start, stop) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(cut(part, count, start, stop) for part in value)
    return value


def _twice(value: Any, count: int) -> Any:
    if isinstance(value, Tensor):
        dim, _ = _examples_of(value, count)
        return value if dim is None else torch.cat([value, value], dim)
    if isinstance(value, dict):
        return {key: _twice(part, count) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_twice(part, count) for part in value)
    return value


def example_dim(value: Tensor, count: int) -> int | None:
    """Return the dim that counts the examples: the first, or, where that does not fit, the only one that does."""
    fitting = [dim for dim, size in enumerate(value.shape) if size == count]
    return fitting[0] if fitting and (fitting[0] == 0 or len(fitting) == 1) else None


def _examples_of(value: Tensor, count: int) -> tuple[int | None, int]:
    """Return the dim that counts the examples and its entries an example: positions may be folded into the first."""
    dim = example_dim(value, count)
    if dim is None and value.dim() and count and len(value) and len(value) % count == 0:
        return 0, len(value) // count
    return dim, 1
