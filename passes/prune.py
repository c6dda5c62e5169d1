"""The pipeline ``prune``: score, select, shrink, repair and fine-tune in rounds, to a budget, with proof."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from kfe_fx.certificate import Certificate
from kfe_fx.cost.bounds import Bounds, read_bound
from kfe_fx.cost.budget import read_limits
from kfe_fx.cost.device import Device, read_device
from kfe_fx.data.factory import from_python
from kfe_fx.errors import UsageError
from kfe_fx.frontend.capture import capture
from kfe_fx.passes.proof import prove
from kfe_fx.passes.rounds import Rounds
from kfe_fx.passes.settings import Settings
from kfe_fx.passes.strip_curvature import StripCurvature
from kfe_fx.plan import Plan
from kfe_fx.program import Program, ProgramModule
from kfe_fx.runtime.quantise import PRECISIONS
from kfe_fx.training.fit import fit_examples
from kfe_fx.training.losses import resolve_loss
from kfe_fx.training.prune_data import PruneData, arrange

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
    budget: Any,
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
    floor: Sequence[str] = (),
    cap: Sequence[str] = (),
    depth: bool = True,
    target: Device | str | Path | None = None,
    provider: str = "CPUExecutionProvider",
    precision: str = "fp32",
    plan: Plan | None = None,
    heads: str = "auto",
    resize_state: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> PruneResult:
    """Make a network smaller until it meets a budget; what is given is never touched. Taps are left out.

    Args:
        program_or_module: a Program, or an nn.Module with ``example_inputs``.
        example_inputs: as for ``kfe_fx.capture``.
        budget: what may remain: a fraction of ``metric`` (1 changes nothing), "12ms", "4MB" (of activations), "2M"
            (parameters), "macs=300M"; a list, or ``{metric: fraction or text}``, for several at once.
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
        multiple_of: widths stay multiples of this; where latency counts that of the device when not given, else 1.
        threads: of the latency measurement.
        batch: of the latency measurement.
        keep: globs of parameters whose units stay.
        floor: "GLOB=16" or "GLOB=0.5": how many units, or which fraction of them, each layer that matches keeps.
        cap: the same, at most.
        depth: whole residual branches may go too; what they are worth on the average stays as a constant.
        target: a device profile (or its file, from ``kfe-fx calibrate``) to prune for: latency is predicted then, not
            measured, unless the profile is of this machine.
        provider: of ONNX Runtime, for what is measured.
        precision: "fp32", or "int8": int8 copies are measured, of the dense network too; what is written is float32.
        plan: remove what this plan says instead of selecting; ``budget`` is what it is judged by.
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
    job = _prepare(
        program_or_module, example_inputs, budget, metric, criterion, data, loss, val, evaluate, epochs, lr, batch_size,
        optimizer, rounds, multiple_of, threads, batch, keep, floor, cap, depth, target, provider, precision, plan,
        heads, resize_state, seed,
    )  # fmt: skip
    return PruneResult(*Rounds(job.program, job.settings, job.data, progress).run())


@dataclass(frozen=True)
class Job:
    """A run that was checked: what to prune, how, with which examples."""

    program: Program
    settings: Settings
    data: PruneData


def prepare(program_or_module: Program | nn.Module, example_inputs: Any = None, **options: Any) -> Job:
    """Check the arguments of ``prune`` and read the data; those that are not given have its defaults.

    Raises:
        UsageError: an option that there is not, or that means nothing.
    """
    known = inspect.signature(prune).parameters
    unknown = [name for name in options if name not in known or name == "progress"]
    if unknown:
        raise UsageError(f"there is no option {unknown[0]!r}; those of prune are {', '.join(list(known)[2:-1])}")
    defaults = {name: parameter.default for name, parameter in list(known.items())[2:-1]}
    return _prepare(program_or_module, example_inputs, *(options.get(name, value) for name, value in defaults.items()))


def _prepare(
    program_or_module: Program | nn.Module, example_inputs: Any, budget: Any, metric: str, criterion: Any, data: Any,
    loss: Any, val: Any, evaluate: Any, epochs: int | None, lr: float | None, batch_size: int, optimizer: str,
    rounds: int | None, multiple_of: int | None, threads: int, batch: int, keep: Sequence[str], floor: Sequence[str],
    cap: Sequence[str], depth: bool, target: Any, provider: str, precision: str, plan: Plan | None, heads: str,
    resize_state: bool, seed: int,
) -> Job:  # fmt: skip
    limits = read_limits(budget, metric)
    _check(heads, threads, batch, batch_size, rounds, epochs, lr)
    if precision not in PRECISIONS:
        raise UsageError(f"precision is {' or '.join(PRECISIONS)}, got {precision!r}")
    if optimizer not in ("adamw", "sgd"):
        raise UsageError(f"optimizer is adamw or sgd, whose state goes through a removal, got {optimizer!r}")
    program = StripCurvature().run(_program(program_or_module, example_inputs)).program
    if limits[0].metric == "widths" and (keep or floor or cap):
        raise UsageError("a budget of widths cuts all layers alike: keep, floor and cap go with the other metrics")
    if plan is not None:
        heads, resize_state = plan.heads, plan.resize_state
    bounds = Bounds(tuple(map(read_bound, floor)), tuple(map(read_bound, cap)))
    device = target if isinstance(target, Device) or target is None else read_device(target)
    foreign = device is not None and not device.is_this_machine()
    if foreign and (batch, precision, provider) != (1, "fp32", Settings.provider):
        raise UsageError(
            "for another device only batch 1 and fp32 are predicted; drop --batch, --precision, --provider"
        )
    settings = Settings(
        limits, criterion, loss, evaluate, epochs, lr, batch_size, optimizer, rounds, multiple_of, threads, batch,
        tuple(keep), heads, seed, resize_state, bounds, depth, provider, precision,
        device if foreign else None, plan,
    )  # fmt: skip
    data, val = _fitting(program, data, loss, "data"), _fitting(program, val, loss, "val")
    return Job(program, settings, arrange(data, val, program.extras.get("calibration"), seed=seed))


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


def _check(heads: str, threads: int, batch: int, batch_size: int, rounds: Any, epochs: Any, lr: Any) -> None:
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
