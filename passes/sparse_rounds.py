"""The rounds of making a network sparse, one method a step, and what is told of them."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kfe_fx.certificate import Certificate
from kfe_fx.criteria.base import Criterion, ScoreContext, asking, normalised_parameters
from kfe_fx.criteria.loss_models import LossModel
from kfe_fx.errors import UsageError, VerificationFailed
from kfe_fx.labels.analysis import Analysis
from kfe_fx.passes.cutting import STATISTICS_EXAMPLES
from kfe_fx.passes.masks import apply_masks, hold_masks, prune_lowest
from kfe_fx.passes.reestimate_statistics import ReestimateStatistics
from kfe_fx.passes.telling import tell_unseen
from kfe_fx.program import Program
from kfe_fx.structure import pack
from kfe_fx.training.batches import Batches
from kfe_fx.training.finetune import finetune
from kfe_fx.training.losses import Loss, counted, resolve_loss, settle
from kfe_fx.training.metrics import Metric, evaluate
from kfe_fx.training.optimizer_state import make_optimizer
from kfe_fx.training.prune_data import PruneData

Progress = Callable[[str, float | None], None]

NO_TIME = (
    "the zeros save no time and no memory in ONNX Runtime, which computes with them as with any number; "
    "kfe-fx prune makes a network faster"
)


@dataclass
class SparsityCertificate(Certificate):
    """What was done to the weights of a network, and what came of it.

    ``budget`` is the share of the weights that was to stay, ``reached`` the share that does. ``before`` and ``after``
    count parameters, the weights that could go, and zeros among these; ``layers`` counts weights and zeros by name.
    ``rounds`` holds per round the sparsity, the weights removed, and the change of the mean loss on the examples that
    were scored with: predicted by the model (None where the criterion is none) and realised, before any repair.
    """

    sparsity: float = 0.0
    schedule: str = ""
    penalty: float = 0.0
    layers: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def masked_error(self) -> float:
        """Zero: no tensor changes its shape, the network is the masked original."""
        return 0.0

    def table(self) -> list[tuple[str, str, str]]:
        """Return rows (what, before, after) for people."""
        rows = [
            (what, f"{self.before[key]:,}", f"{self.after[key]:,}")
            for what, key in (("parameters", "parameters"), ("weights ranked", "weights"), ("... that are 0", "zeros"))
        ]
        rows += self._quality_rows()
        if self.parity:
            rows.append(("ONNX = network, relative error", "", f"{self.parity['error']:.1e}"))
        return rows

    def rounds_table(self) -> list[tuple[str, ...]]:
        """Return a row per round: number, sparsity, change of the loss as predicted and as realised, loss after."""
        told = lambda value: "" if value is None else f"{value:+.4g}"
        return [
            (
                str(number),
                f"{entry['sparsity']:.2%}",
                told(entry["predicted"]),
                told(entry["realised"]),
                "" if entry["loss"] is None else f"{entry['loss']:.4g}",
            )
            for number, entry in enumerate(self.rounds, 1)
        ]


@dataclass
class SparseRounds:
    """The state of one run, a step a method."""

    program: Program
    analysis: Analysis
    data: PruneData
    criterion: Criterion
    loss: Any
    batch_size: int
    certificate: SparsityCertificate
    progress: Progress
    masks: dict[str, Tensor]
    finite: bool = field(default=True, init=False)  # the outputs of the network that was given

    def describe(self, judge: Metric | None) -> None:
        """Tell what there was before."""
        import onnx
        import onnxruntime

        certificate = self.certificate
        certificate.before = self._counts()
        certificate.versions = {
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            "python": platform.python_version(),
        }
        certificate.notes = [*self.program.notes, NO_TIME]
        if normalised := sorted(normalised_parameters(self.program)):
            certificate.notes.append(
                f"{', '.join(normalised)}: weight_norm makes the weights of them, so they stay dense and do not count"
            )
        self.finite = _finite_outputs(self.program)
        if judge is not None:
            certificate.quality = {"metric": judge.name}
        self.judge("before", judge)

    def prune(self, shares: list[float]) -> None:
        """Zero weights in rounds, up to each share of all that are ranked.

        Raises:
            VerificationFailed: the mean loss, finite before, is not finite any more.
        """
        total, gone = sum(mask.numel() for mask in self.masks.values()), 0
        before = self._mean_loss()
        for number, share in enumerate(shares):
            self.progress(f"round {number + 1} of {len(shares)}: scoring", number / len(shares))
            scores, changes = self._scores()
            count = round(share * total)
            masks = prune_lowest(scores, self.masks, count)
            predicted = None
            if changes is not None:
                # what was out before is zero by now, and so is its change
                predicted = sum(float(changes[name][~mask].sum()) for name, mask in masks.items())
            self.masks = masks
            apply_masks(self.program, masks)
            after = self._mean_loss()
            if after is None and before is not None:
                raise VerificationFailed(
                    f"at a sparsity of {count / total:.1%} the loss is not finite any more: a layer divides by weights "
                    "that are all zero, or overflows; --keep it, or ask for less"
                )
            self.certificate.rounds.append(
                {
                    "sparsity": count / total,
                    "removed": count - gone,
                    "predicted": predicted,
                    "realised": None if after is None or before is None else after - before,
                    "loss": after,
                }
            )
            before, gone = after, count

    def repair(self) -> None:
        """Measure the statistics of batch norms anew, where there are examples."""
        source = self.data.training if self.data.training is not None else self.data.calibration
        if source is not None:
            self.progress("measuring statistics", None)
            sample = source.sample(STATISTICS_EXAMPLES, self.certificate.seed)
            result = ReestimateStatistics(sample, self.batch_size).run(self.program)
            self.program = result.program

    def finetune(self, optimizer: str, lr: float | None, epochs: int | None) -> None:
        """Train what is left."""
        live = make_optimizer(self.program, optimizer, lr)
        hold_masks(live, self.program, self.masks)
        facts = finetune(
            self.program,
            self.data.training,
            self.loss,
            epochs=epochs,
            batch_size=self.batch_size,
            optimizer=live,
            seed=self.certificate.seed,
            progress=self.progress,
        )
        self.certificate.measured["training_threads"] = facts.pop("threads", None)
        self.certificate.data["finetune"] = facts

    def judge(self, when: str, judge: Metric | None) -> None:
        """Measure the metric on what was held out."""
        if judge is not None:
            self.progress(f"measuring {judge.name}", None)
            self.certificate.quality[when] = evaluate(self.program, self.data.held_out, judge)

    def tell(self) -> None:
        """Count what is left.

        Raises:
            VerificationFailed: a weight that is out is not zero, or outputs that were finite are not any more.
        """
        certificate = self.certificate
        if self.finite and not _finite_outputs(self.program):
            raise VerificationFailed(
                "with these weights at zero the outputs are not finite any more: a layer divides by weights that are "
                "all zero, or overflows; --keep it, or ask for less"
            )
        for name, mask in self.masks.items():
            value = self.program.tensor(name).detach()
            if bool((value[~mask] != 0).any()):
                raise VerificationFailed(f"a weight of {name} that was removed is not zero; please report this network")
            certificate.layers[name] = {"weights": mask.numel(), "zeros": int((value == 0).sum())}
            if not bool(mask.any()):
                certificate.notes.append(
                    f"every weight of {name} is zero: its layer gives a constant; --keep it, or ask for less"
                )
        certificate.after = self._counts()
        stays = sum(int(mask.sum()) for mask in self.masks.values())
        certificate.reached = stays / certificate.after["weights"]
        certificate.data = {"note": self.data.note, **certificate.data}
        self.program.lineage = (*self.program.lineage, "sparsify")

    def _scores(self) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """Return what weights are ranked by, and the signed changes of the loss where the criterion models it.

        Raises:
            UsageError: the criterion returns something that is no score of every weight.
        """
        context = ScoreContext.of(
            self.program,
            self.analysis,
            self.data.calibration,
            self.loss,
            batch_size=self.batch_size,
            seed=self.certificate.seed,
        )
        with asking(self.criterion, self.program):
            changes = self.criterion.changes(context) if isinstance(self.criterion, LossModel) else None
            returned = self.criterion.weights(context) if changes is None else changes
        found = {name: torch.as_tensor(value) for name, value in returned.items()}
        told = found if changes is None and self.criterion.predicts else changes
        scores: dict[str, Tensor] = {}
        for name in self.masks:
            value = self.program.tensor(name).detach()
            if name not in found or found[name].shape != value.shape:
                raise UsageError(
                    f"the criterion {self.criterion.name!r} gives no score per entry of {name} {list(value.shape)}"
                )
            score = (found[name] if changes is None else found[name].abs()).detach().double()
            if not bool(torch.isfinite(score).all()):
                wrong = float(score[~torch.isfinite(score)][0])
                raise UsageError(
                    f"the criterion {self.criterion.name!r} gives a score of {wrong} to an entry of {name}; check "
                    "the weights and the data"
                )
            scores[name] = score + 0.5 * self.certificate.penalty * value.double().square()
        self.certificate.data |= context.facts
        tell_unseen(self.certificate, self.program, self.data, self.loss, context.facts)
        return scores, told

    def _mean_loss(self) -> float | None:
        """Return the mean loss on the examples that are scored with, or None where they have no targets."""
        if self.data.calibration is None or self.data.calibration.targets is None:
            return None
        batches = Batches(self.program, self.data.calibration, self.batch_size)
        loss = resolve_loss(self.loss, self.data.calibration.targets)
        value = mean_loss(self.program, batches, counted(loss, batches.labels()))
        return value if math.isfinite(value) else None

    def _counts(self) -> dict[str, int]:
        parameters = list(self.program.module().parameters())
        return {
            "parameters": sum(value.numel() for value in parameters),
            "weights": sum(mask.numel() for mask in self.masks.values()),
            "zeros": sum(int((self.program.tensor(name) == 0).sum()) for name in self.masks),
        }


def _finite_outputs(program: Program) -> bool:
    """Tell whether the outputs of the examples are finite, in evaluation mode."""
    with torch.no_grad():
        outputs = program.module().run_flat(program.flat_examples(), "eval")
    return all(bool(torch.isfinite(value).all()) for value in outputs if isinstance(value, Tensor))


def mean_loss(program: Program, batches: Batches, loss: Loss | None) -> float:
    """Return the mean over examples of the loss on their targets, in evaluation mode.

    Raises:
        UsageError: the loss has no meaning per example.
    """
    module, total, count = program.module(), 0.0, 0
    with torch.no_grad():
        for batch in batches:
            if loss is None or batch.targets is None:
                continue
            outputs = pack(module.signature.outputs["eval"], module.run_flat(batch.inputs, "eval"))
            loss = settle(loss, outputs, batch.targets, batch.count)
            total += float(loss.total(outputs, batch.targets, batch.count))
            count += batch.count
    return total / count if count else math.nan
