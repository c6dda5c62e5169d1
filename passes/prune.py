"""The pipeline ``prune``: score, select, shrink, repair and fine-tune in rounds, to a budget, with proof."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from kfe_fx.certificate import Certificate
from kfe_fx.cost.bounds import Bounds, read_bound
from kfe_fx.cost.budget import read_limits
from kfe_fx.cost.device import Device, read_device
from kfe_fx.cost.predictors import resolve as resolve_predictor
from kfe_fx.criteria.base import names, resolve
from kfe_fx.curvature.store import Store
from kfe_fx.data.factory import from_python
from kfe_fx.errors import UsageError
from kfe_fx.frontend.capture import capture
from kfe_fx.passes.options import check_options
from kfe_fx.passes.proof import prove
from kfe_fx.passes.rounds import Rounds
from kfe_fx.passes.schedules import round_ratios
from kfe_fx.passes.settings import Settings
from kfe_fx.passes.strip_curvature import StripCurvature
from kfe_fx.plan import Plan
from kfe_fx.program import Program, ProgramModule
from kfe_fx.training.fit import fit_examples
from kfe_fx.training.losses import resolve_loss
from kfe_fx.training.prune_data import PruneData, arrange
from kfe_fx.weights import check_weights

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
    threads: int | None = None,
    batch: int = 1,
    keep: Sequence[str] = (),
    floor: Sequence[str] = (),
    cap: Sequence[str] = (),
    depth: bool = True,
    target: Device | str | Path | None = None,
    provider: str = "CPUExecutionProvider",
    precision: str = "fp32",
    cost_model: Any = "roofline",
    plan: Plan | None = None,
    repair: str = "auto",
    decompose: bool = False,
    schedule: str = "exponential",
    penalty: float = 0.0,
    crowding: float | None = None,
    distil: float | None = None,
    temperature: float | None = None,
    features: Sequence[str] = (),
    ewc: float | None = None,
    store: Any = None,
    stop_at_loss: float | None = None,
    stop_at_accuracy: float | None = None,
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
        criterion: a name of ``kfe_fx.criteria.names()``: by gates "fisher", "taylor", "taylor-so", "lm", "qm", "obd",
            "group-fisher"; by curvature "kron-obd", "kron-obs", "c-obd", "c-obs", "kfe", "kfe-product",
            "reconstruction"; by weights "magnitude", "lamp", "fpgm", "bn-scale", "random". Or "file.py:Class", or a
            Criterion.
        data: examples, ``(inputs, targets)`` or any data set; with targets and a loss the network is fine-tuned.
            Without data the calibration sample of the program file scores, and without that drawn inputs do.
        loss: None (cross-entropy for integer targets, mean square for floats), "file.py:function" or a function.
        val: examples to report on; without them a seeded part of ``data`` is held out.
        evaluate: a metric, "file.py:function" or a function (module, loader) -> float.
        epochs: of the fine-tuning in all, 0 for none.
        lr: its learning rate; by default 3e-4 for AdamW and 3e-3 for SGD, without repair 1e-3 and 1e-2.
        batch_size: examples a step, in scoring too.
        optimizer: "adamw" or "sgd".
        rounds: of scoring, removal, repair and fine-tuning; by default 4 with fine-tuning, else 1.
        multiple_of: widths stay multiples of this; where latency counts that of the device when not given, else 1.
        threads: of the latency measurement; by default 1, or those of the profile that ``target`` is.
        batch: of the latency measurement.
        keep: globs of parameters whose units stay.
        floor: "GLOB=16" or "GLOB=0.5": how many units, or which fraction of them, each layer that matches keeps.
        cap: the same, at most.
        depth: whole residual branches may go too; what they are worth on the average stays as a constant.
        target: a device profile (or its file, from ``kfe-fx calibrate``) to prune for: latency is predicted then, not
            measured, unless the profile is of this machine.
        provider: of ONNX Runtime, for what is measured.
        precision: "fp32", or "int8": int8 copies are measured, of the dense network too; what is written is float32.
        cost_model: what predicts latency: "roofline", "file.py:Class", or a class or function (model, device) that
            makes a ``kfe_fx.cost.latency.LatencyModel``; the certificate tells its name and error.
        plan: remove what this plan says instead of selecting; ``budget`` is what it is judged by.
        repair: what becomes of the weights that stay after a removal, where there are examples: "auto" fits each layer
            to what it computed before, by the method that is best on held-out examples; "mean" folds means alone;
            "none" leaves them.
        decompose: layers may become narrow products in their eigenbases, where that loses less than channels for the
            same time (``decompose-kfe``); needs examples.
        schedule: how the rounds share out the removal: "exponential" (each leaves the same fraction of what the last
            one left), "equal" (each removes as much), "one-shot" (one round), "netadapt" or "theis", see
            ``kfe_fx.passes.schedules``.
        penalty: lambda of the step-size constraint, score + lambda/2 sum of the unit's squared weights.
        crowding: how much dearer the last units of a layer are than the first: the score of the unit that goes when i
            of n have gone counts (n / (n - i))^crowding times. By default 0, 1 or 2, by trial in each round.
        distil: the dense network's share of the loss that fine-tuning minimises, 0 to 1.
        temperature: that softens the classes of both; 1 if not given.
        features: globs of modules whose outputs are to stay those of the dense network, on the units that are left.
        ewc: lambda of the elastic penalty that holds the weights of the fine-tuning where repair left them, by the
            curvature of the pruned network.
        store: curvature statistics of this network and these weights (``kfe_fx.curvature.fit``), for the criteria that
            score by them in the first round, and for its repair by "auto"; where a criterion needs them they are
            measured on ``data`` if not given.
        stop_at_loss: rounds end, and the last is taken back, when the loss on the held-out examples lies above this.
        stop_at_accuracy: the same when the metric falls below this.
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
    options = dict(locals())
    for name in ("program_or_module", "example_inputs", "progress"):
        del options[name]
    job = prepare(program_or_module, example_inputs, **options)
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
    parameters = dict(list(inspect.signature(prune).parameters.items())[2:-1])
    unknown = [name for name in options if name not in parameters]
    if unknown:
        raise UsageError(f"there is no option {unknown[0]!r}; those of prune are {', '.join(parameters)}")
    given = {name: parameter.default for name, parameter in parameters.items()} | options
    if given["budget"] is inspect.Parameter.empty:
        raise UsageError("a budget is missing; say what may remain, as in budget=0.5")
    limits = read_limits(given.pop("budget"), given.pop("metric"))
    check_options(given, limits)
    given["cost_model"] = resolve_predictor(given["cost_model"])
    program = StripCurvature().run(_program(program_or_module, example_inputs)).program
    check_weights(program)
    plan, target, loss = given["plan"], given.pop("target"), given["loss"]
    if plan is not None:
        given |= {"heads": plan.heads, "resize_state": plan.resize_state}
    bounds = Bounds(tuple(map(read_bound, given.pop("floor"))), tuple(map(read_bound, given.pop("cap"))))
    device = target if isinstance(target, Device) or target is None else read_device(target)
    given["threads"] = _threads(given["threads"], device)
    foreign = device is not None and not device.is_this_machine()
    if device is not None and device.fingerprint.precision != given["precision"]:
        of = device.fingerprint.precision
        raise UsageError(f"the profile is of {of}, not {given['precision']}; say --precision {of}, or calibrate anew")
    if foreign and (given["batch"], given["provider"]) != (1, Settings.provider):
        raise UsageError("for another device only batch 1 is predicted; drop --batch, --provider")
    data, val = (_fitting(program, given.pop(name), loss, name) for name in ("data", "val"))
    given |= {"keep": tuple(given["keep"]), "features": tuple(given["features"])}
    given["distil"] = given["distil"] or 0.0
    settings = Settings(limits=limits, bounds=bounds, target=device if foreign else None, **given)
    examples = arrange(
        data, val, program.extras.get("calibration"), seed=settings.seed, unlabelled=settings.distil == 1
    )
    if settings.store is not None:
        _check_store(program, settings, examples)
    return Job(program, settings, examples)


def _check_store(program: Program, settings: Settings, examples: PruneData) -> None:
    """Refuse curvature statistics that are not of these weights, or that nobody would look at.

    Raises:
        UsageError: they are none, or of another network, or older than the weights, or not used.
    """
    store = settings.store
    if not isinstance(store, Store):
        raise UsageError(f"store is a {type(store).__name__}; give a kfe_fx.curvature.Store")
    store.check(program, weights=True)
    if settings.plan is not None:
        raise UsageError("a plan says what goes, and nothing is scored; drop store, or plan")
    criterion = resolve(settings.criterion)
    if "curvature" in criterion.needs and examples.calibration is None and _several(settings):
        raise UsageError(
            f"the statistics given are of the network before any round, and {criterion.name!r} needs those of each: "
            "give --data too, or --rounds 1"
        )
    has_factors = any({"A", "G"} <= block.sums.keys() for block in store.blocks.values())
    repairs = settings.repair == "auto" and examples.calibration is not None and has_factors
    if "curvature" not in criterion.needs and not repairs:
        known = ", ".join(name for name in names() if "curvature" in resolve(name).needs)
        raise UsageError(
            f"the criterion {criterion.name!r} does not look at curvature, and no repair does; drop store, or "
            f"choose {known}"
        )


def _several(settings: Settings) -> bool:
    return len(round_ratios(settings, {settings.metric: 0.5}, trains=False)) > 1


def _threads(asked: int | None, device: Device | None) -> int:
    """Return the threads that latency is of: a profile knows the times of its own number only."""
    if device is None:
        return asked or 1
    known = device.fingerprint.threads
    if asked not in (None, known):
        raise UsageError(
            f"the profile of --target is of {known} thread{'s' * (known > 1)}, --threads says {asked}; "
            f"drop --threads, or calibrate there with --threads {asked}"
        )
    return known


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
