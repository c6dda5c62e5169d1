"""The pipeline ``prune``: score, select, shrink, repair and fine-tune in rounds, to a budget, with proof."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from kfe_fx.certificate import Certificate
from kfe_fx.data.factory import from_python
from kfe_fx.errors import UsageError
from kfe_fx.frontend.capture import capture
from kfe_fx.passes.proof import prove
from kfe_fx.passes.rounds import Rounds, Settings
from kfe_fx.passes.strip_curvature import StripCurvature
from kfe_fx.plan import Plan
from kfe_fx.program import Program, ProgramModule
from kfe_fx.training.fit import fit_examples
from kfe_fx.training.losses import resolve_loss
from kfe_fx.training.prune_data import arrange

METRICS = ("latency", "macs", "params", "memory", "widths")
Progress = Callable[[str, float | None], None]


@dataclass(frozen=True)
class PruneResult:
    """A pruned network with the plan that made it and the certificate that proves it.

    ``program`` is the small network, ``plan.kept`` says what is left of each tensor of the original. The ONNX model is
    made and proved when it is first needed: by a latency budget, or by ``write``.
    """

    program: Program
    plan: Plan
    certificate: Certificate

    def module(self) -> ProgramModule:
        """Return the small network as an nn.Module with the original parameter names."""
        return self.program.module()

    def write(self, directory: str | Path, stem: str, *, force: bool = False) -> list[Path]:
        """Write ``stem.pruned.onnx``, ``.pt`` and last ``.json`` with the hashes of the other two; return the paths.

        Raises:
            BadFile: a file is there already (without ``force``) or cannot be written.
            VerificationFailed: ONNX Runtime computes something else; nothing is written.
            UnsupportedModel: the network has no ONNX form.
        """
        from kfe_fx.runtime.artifacts import write_set

        onnx = prove(self.program, self.certificate)
        document = {"plan": self.plan.to_json(), "certificate": self.certificate.to_json()}
        return write_set(self.program, onnx, document, Path(directory), stem, force=force)

    def to_json(self) -> str:
        """Return plan and certificate as JSON text."""
        document = {"plan": self.plan.to_json(), "certificate": self.certificate.to_json()}
        return json.dumps(document, indent=1, sort_keys=True)


def prune(
    program_or_module: Program | nn.Module,
    example_inputs: Any = None,
    *,
    budget: float,
    metric: str = "latency",
    criterion: Any = "fisher",
    data: Any = None,
    loss: Any = None,
    val: Any = None,
    evaluate: Any = None,
    epochs: int | None = None,
    lr: float | None = None,
    batch_size: int = 64,
    optimizer: str = "adamw",
    rounds: int | None = None,
    multiple_of: int | None = None,
    threads: int = 1,
    batch: int = 1,
    keep: Sequence[str] = (),
    heads: str = "auto",
    resize_state: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> PruneResult:
    """Make a network smaller until it meets a budget; what is given is never touched. Taps are left out.

    Args:
        program_or_module: a Program, or an nn.Module with ``example_inputs``.
        example_inputs: as for ``kfe_fx.capture``.
        budget: what may remain of ``metric``, above 0 and at most 1 (1 changes nothing).
        metric: "latency" (measured in ONNX Runtime), "macs", "params", "memory", or "widths" (max(1, ceil(budget·n)) of
            the n independent units of every removable dim stay; no cost model, no multiples).
        criterion: "fisher", "taylor", "magnitude", "random", or a Criterion.
        data: examples, ``(inputs, targets)`` or any data set; with targets and a loss the network is fine-tuned.
            Without data the calibration sample of the program file scores, and without that drawn inputs do.
        loss: None (cross-entropy for integer targets, mean square for floats), "file.py:function" or a function.
        val: examples to report on; without them a seeded part of ``data`` is held out.
        evaluate: a metric, "file.py:function" or a function (module, loader) -> float.
        epochs: of the fine-tuning in all, 0 for none.
        lr: its learning rate.
        batch_size: examples a step, in scoring too.
        optimizer: "adamw" or "sgd".
        rounds: of scoring, removal and fine-tuning, on an exponential schedule.
        multiple_of: widths stay multiples of this; probed on this machine when not given.
        threads: of the latency measurement.
        batch: of the latency measurement.
        keep: globs of parameters whose units stay.
        heads: whether attention loses whole "heads" or "positions" of every head; "auto" takes heads.
        resize_state: let states of recurrent layers that are inputs or outputs of the network lose hidden units too
            (streaming models); whoever calls it then holds the smaller states that the certificate tells.
        seed: of the split and all sampling.
        progress: called with (stage, share done or None).

    Returns:
        The result; ``certificate.feasible`` is false where the budget is out of reach and this is the nearest point.

    Raises:
        UsageError: an option that means nothing.
        UnsupportedModel: the network cannot be captured, has nothing to remove, or has no ONNX form.
        VerificationFailed: the result does not compute what the masked original computes.
    """
    _check(budget, metric, heads, threads, batch, batch_size, rounds, epochs, lr)
    if optimizer not in ("adamw", "sgd"):
        raise UsageError(f"optimizer is adamw or sgd, whose state goes through a removal, got {optimizer!r}")
    program = StripCurvature().run(_program(program_or_module, example_inputs)).program
    settings = Settings(
        budget, metric, criterion, loss, evaluate, epochs, lr, batch_size, optimizer, rounds, multiple_of, threads,
        batch, tuple(keep), heads, seed, resize_state,
    )  # fmt: skip
    if budget < 1:
        data, val = _fitting(program, data, loss, "data"), _fitting(program, val, loss, "val")
    arranged = arrange(data, val, program.extras.get("calibration"), seed=seed)
    return PruneResult(*Rounds(program, settings, arranged, progress).run())


def _fitting(program: Program, data: Any, loss: Any, name: str) -> Any:
    return None if data is None else fit_examples(program, from_python(data, name), resolve_loss(loss, None))


def _program(program_or_module: Program | nn.Module, example_inputs: Any) -> Program:
    if isinstance(program_or_module, Program):
        return program_or_module
    if isinstance(program_or_module, ProgramModule):
        raise UsageError("this module belongs to a Program; prune the Program")
    if not isinstance(program_or_module, nn.Module):
        raise UsageError(f"prune takes a Program or an nn.Module, got {type(program_or_module).__name__}")
    if example_inputs is None:
        raise UsageError("example_inputs are needed to capture a module: prune(module, example_inputs, budget=...)")
    return capture(program_or_module, example_inputs)


def _check(
    budget: float, metric: str, heads: str, threads: int, batch: int, batch_size: int, rounds: Any, epochs: Any, lr: Any
) -> None:
    if (
        not isinstance(budget, int | float)
        or isinstance(budget, bool)
        or not math.isfinite(budget)
        or not 0 < budget <= 1
    ):
        raise UsageError(f"a budget is a ratio above 0 and at most 1, got {budget!r}")
    if metric not in METRICS:
        raise UsageError(f"there is no metric {metric!r}; choose one of {', '.join(METRICS)}")
    if heads not in ("auto", "heads", "positions"):
        raise UsageError(f"heads is auto, heads or positions, got {heads!r}")
    if lr is not None and (not isinstance(lr, int | float) or not math.isfinite(lr) or lr <= 0):
        raise UsageError(f"lr is a number above 0, got {lr!r}")
    for name, value, least in (
        ("threads", threads, 1), ("batch", batch, 1), ("batch_size", batch_size, 1), ("rounds", rounds, 1),
        ("epochs", epochs, 0),
    ):  # fmt: skip
        if value is not None and (not isinstance(value, int) or value < least):
            raise UsageError(f"{name} is a whole number of at least {least}, got {value!r}")
