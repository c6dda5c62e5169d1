"""The pipeline ``sparsify``: single weights go to zero in rounds, each with a fresh model of the loss, and stay there.

Laurent, C. Ballas, George, N. Ballas, Vincent, "Revisiting Loss Modelling for Unstructured Pruning" (2020).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kfe_fx.cost.steps import matches
from kfe_fx.criteria.base import Criterion, ScoreContext, check_needs, names, resolve
from kfe_fx.data.dataset import ArrayData, check_seed
from kfe_fx.data.factory import from_python
from kfe_fx.errors import UnsupportedModel, UsageError
from kfe_fx.frontend.capture import capture
from kfe_fx.labels.analysis import analyze
from kfe_fx.passes.masks import SCHEDULES, sparsities
from kfe_fx.passes.proof import prove
from kfe_fx.passes.sparse_rounds import Progress, SparseRounds, SparsityCertificate
from kfe_fx.passes.strip_curvature import StripCurvature
from kfe_fx.plan import Plan
from kfe_fx.program import Program, ProgramModule
from kfe_fx.training.fit import fit_examples
from kfe_fx.training.losses import resolve_loss
from kfe_fx.training.metrics import resolve_metric
from kfe_fx.training.optimizer_state import trained_parameters
from kfe_fx.training.prune_data import arrange
from kfe_fx.weights import check_weights

ROUNDS = 14  # of criteria that look at the network anew each round
CONSTANT = ("lamp", "magnitude", "random")  # criteria whose ranks of what is left do not move: one round says it all


@dataclass(frozen=True)
class SparsifyResult:
    """A network of the same shapes in which most weights are zero.

    ``masks`` by name of a parameter: bool of its shape, True where a weight stays.
    """

    program: Program
    masks: dict[str, Tensor]
    certificate: SparsityCertificate

    def module(self) -> ProgramModule:
        """Return the network as an nn.Module with the original parameter names."""
        return self.program.module()

    def write(self, directory: str | Path, stem: str, *, force: bool = False) -> list[Path]:
        """Write ``stem.sparse.pruned.onnx``, ``.pt`` and last ``.json``; return the paths. ``verify`` reads them.

        Raises:
            BadFile: a file is there already (without ``force``) or cannot be written.
            VerificationFailed: ONNX Runtime computes something else; nothing is written.
            UnsupportedModel: the network has no ONNX form.
        """
        from kfe_fx.runtime.artifacts import write_set

        onnx = prove(self.program, self.certificate)
        return write_set(self.program, onnx, self._document(), Path(directory), f"{stem}.sparse", force=force)

    def to_json(self) -> str:
        """Return the certificate as JSON text, with a plan that removes nothing."""
        return json.dumps(self._document(), indent=1, sort_keys=True)

    def _document(self) -> dict[str, Any]:
        return {"plan": Plan().to_json(), "certificate": self.certificate.to_json()}


def sparsify(
    program_or_module: Program | nn.Module,
    example_inputs: Any = None,
    *,
    sparsity: float,
    criterion: Any = "magnitude",
    data: Any = None,
    loss: Any = None,
    val: Any = None,
    evaluate: Any = None,
    rounds: int | None = None,
    schedule: str = "exponential",
    penalty: float = 0.0,
    epochs: int | None = None,
    lr: float | None = None,
    batch_size: int = 64,
    optimizer: str = "adamw",
    keep: Sequence[str] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> SparsifyResult:
    """Set single weights to zero, the least important of the whole network first; what is given is never touched.

    Weights are the floating-point parameters of at least two dims (biases and affine parameters stay), ranked together
    by ``score + penalty / 2 * theta^2``. In each round they are scored on the network as it is then; what is zero stays
    zero, also while it is fine-tuned at the end. Zeros save no time in ONNX Runtime: ``prune`` is what does.

    Args:
        program_or_module: a Program, or an nn.Module with ``example_inputs``.
        example_inputs: as for ``kfe_fx.capture``.
        sparsity: s, above 0 and below 1: ``round(s * n)`` of the n ranked weights are zero at the end.
        criterion: "magnitude" (theta^2, without the scale of the batch norm that ``prune`` puts in), "lamp", "fisher",
            "taylor", "taylor-so", "lm", "qm", "obd", "random", "file.py:Class" or a Criterion with ``weights``.
        data: examples, ``(inputs, targets)`` or any data set; with targets and a loss the network is fine-tuned.
            Without data the calibration sample of the program file scores.
        loss: None (cross-entropy for integer targets, mean square for floats), "file.py:function" or a function.
        val: examples to report on; without them a seeded part of ``data`` is held out.
        evaluate: a metric, "file.py:function" or a function (module, loader) -> float.
        rounds: how often the weights are scored anew; by default 14, and 1 for "lamp", "magnitude", "random".
        schedule: "exponential" or "equal", see ``kfe_fx.passes.masks.sparsities``.
        penalty: lambda, which keeps a step of a loss model where it holds; a large one ranks by magnitude.
        epochs: of the fine-tuning, 0 for none.
        lr: its learning rate.
        batch_size: examples a step, in scoring too.
        optimizer: "adamw" or "sgd".
        keep: globs of parameters, or modules, that stay dense; they do not count in n.
        seed: of the split and all sampling.
        progress: called with (stage, share done or None).

    Returns:
        The network, its masks and the certificate.

    Raises:
        UsageError: an option that means nothing, a criterion that does not score single weights or gives a score that
            is not finite, or examples that it needs and that are not there.
        UnsupportedModel: the network cannot be captured, or has no weights to remove.
        BadData: the data does not fit the network, or derivatives of the loss are not finite.
    """
    _check(sparsity, rounds, schedule, penalty, epochs, lr, batch_size, optimizer)
    check_seed(seed)
    chosen = _resolve(criterion)
    program = StripCurvature().run(_program(program_or_module, example_inputs)).program.copy().eval()
    check_weights(program)
    examples, held = _fitting(program, data, loss, "data"), _fitting(program, val, loss, "val")
    arranged = arrange(examples, held, program.extras.get("calibration"), seed=seed)
    tunes = arranged.training is not None and epochs != 0
    if tunes:
        trained_parameters(program)
    sample = arranged.calibration
    check_needs(chosen, sample is not None, sample is not None and sample.targets is not None)
    report = progress or (lambda stage, done=None: None)
    report("reading the graph", None)
    analysis = analyze(program)
    weights = _ranked(ScoreContext(program, analysis), keep)
    certificate = SparsityCertificate(
        1 - sparsity, "weights", chosen.name, seed, sparsity=sparsity, schedule=schedule, penalty=penalty
    )
    masks = {name: torch.ones_like(value, dtype=torch.bool) for name, value in weights.items()}
    run = SparseRounds(program, analysis, arranged, chosen, loss, batch_size, certificate, report, masks)
    judge = None if arranged.held_out is None else resolve_metric(evaluate, arranged.held_out.targets)
    run.describe(judge)
    run.prune(sparsities(sparsity, rounds or (1 if chosen.name in CONSTANT else ROUNDS), schedule))
    run.repair()
    run.judge("right_after", judge)
    if tunes:
        run.finetune(optimizer, lr, epochs)
        run.judge("after", judge)
    run.tell()
    return SparsifyResult(run.program, run.masks, certificate)


def _ranked(context: ScoreContext, keep: Sequence[str]) -> dict[str, Tensor]:
    """Return the weights that are ranked, by name.

    Raises:
        UsageError: a glob that matches no parameter.
        UnsupportedModel: nothing is left to rank.
    """
    program = context.program
    every = {alias for name, _ in program.module().named_parameters() for alias in program.names_of(name)}
    for glob in keep:
        if not any(matches(name, glob) for name in every):
            raise UsageError(f"--keep {glob!r} matches no parameter; kfe-fx inspect lists their names")
    weights = {
        name: value
        for name, value in context.weights().items()
        if not any(matches(alias, glob) for alias in program.names_of(name) for glob in keep)
    }
    if not weights:
        why = (
            "--keep keeps all of its matrices and filters"
            if keep
            else "it has no floating-point matrices or filters but those of weight_norm"
        )
        raise UnsupportedModel(f"this network has no weights that could be zeroed: {why}")
    return weights


def _resolve(criterion: Any) -> Criterion:
    """Return the criterion, if it scores single weights.

    Raises:
        UsageError: it does not, or there is none.
    """
    chosen = resolve(criterion)
    if not chosen.scores_weights():
        known = ", ".join(names(weights=True))
        raise UsageError(
            f"the criterion {chosen.name!r} scores units, not single weights; choose {known}, or prune units with it"
        )
    return chosen


def _fitting(program: Program, data: Any, loss: Any, name: str) -> ArrayData | None:
    return None if data is None else fit_examples(program, from_python(data, name), resolve_loss(loss, None))


def _program(program_or_module: Any, example_inputs: Any) -> Program:
    if isinstance(program_or_module, Program):
        return program_or_module
    if isinstance(program_or_module, ProgramModule):
        raise UsageError("this module belongs to a Program; sparsify the Program")
    if not isinstance(program_or_module, nn.Module):
        raise UsageError(f"sparsify takes a Program or an nn.Module, got {type(program_or_module).__name__}")
    if example_inputs is None:
        raise UsageError(
            "example_inputs are needed to capture a module: sparsify(module, example_inputs, sparsity=...)"
        )
    return capture(program_or_module, example_inputs)


def _check(
    sparsity: Any, rounds: Any, schedule: Any, penalty: Any, epochs: Any, lr: Any, batch_size: Any, optimizer: Any
) -> None:
    if not _number(sparsity) or not 0 < sparsity < 1:
        raise UsageError(f"sparsity is the share of weights that go, above 0 and below 1, got {sparsity!r}")
    if schedule not in SCHEDULES:
        raise UsageError(f"schedule is {' or '.join(SCHEDULES)}, got {schedule!r}")
    if not _number(penalty) or penalty < 0:
        raise UsageError(f"penalty is a number of at least 0, got {penalty!r}")
    if lr is not None and (not _number(lr) or lr <= 0):
        raise UsageError(f"lr is a number above 0, got {lr!r}")
    if optimizer not in ("adamw", "sgd"):
        raise UsageError(f"optimizer is adamw or sgd, got {optimizer!r}")
    for name, value, least in (("rounds", rounds, 1), ("epochs", epochs, 0), ("batch_size", batch_size, 1)):
        wanted = value is not None or name == "batch_size"
        if wanted and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise UsageError(f"{name} is a whole number of at least {least}, got {value!r}")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
