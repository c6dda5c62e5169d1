"""What a certificate tells of a pruning run: counts, versions, limits and what was reached of them."""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
import torch

from kfe_fx.certificate import Certificate
from kfe_fx.cost.budget import Limit
from kfe_fx.cost.count import CostModel
from kfe_fx.cost.device import Device
from kfe_fx.cost.solver import Selection
from kfe_fx.criteria.base import resolve
from kfe_fx.curvature.fisher_rao import fisher_rao_norm
from kfe_fx.errors import BadData, UsageError
from kfe_fx.labels.analysis import Analysis
from kfe_fx.labels.states import resized
from kfe_fx.passes.settings import Settings
from kfe_fx.program import Program
from kfe_fx.training.losses import floating_outputs, main_output, resolve_loss
from kfe_fx.training.prune_data import PruneData
from kfe_fx.training.shared_norms import OWN_SHARES

COUNTED = {"macs": "macs", "params": "parameters", "memory": "peak_memory", "widths": "units"}
_ROUNDING = 1e-9
CAPACITY = 256  # examples of the Fisher-Rao norm
BEYOND = 0.05  # a round may be this much past its budget by whole units and steps of widths alone
LATENESS = 0.05  # how far a network may lie above a latency budget that it meets: the widest tolerance of the loop


def counts(model: CostModel, removed: frozenset[int]) -> dict[str, Any]:
    """Count what can be counted of a network without some of its units."""
    return {
        "parameters": model.parameters(removed),
        "macs": model.macs(removed),
        "peak_memory": model.memory(removed),
        "units": len(model.analysis.units) - len(removed),
    }


def describe(certificate: Certificate, program: Program, analysis: Analysis, dense: CostModel) -> None:
    """Tell what there was before."""
    import onnx
    import onnxruntime

    certificate.statistics = list(analysis.statistics)
    certificate.notes = list(program.notes)
    certificate.versions = {
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
    }
    certificate.before = counts(dense, frozenset())


def tell_counts(
    certificate: Certificate, settings: Settings, model: CostModel, removed: frozenset[int], small: Program
) -> None:
    """Tell what is left."""
    certificate.after = counts(model, removed)
    if settings.resize_state:
        certificate.measured["states"] = states = resized(small)
        certificate.notes += [
            f"the state that is {name} is {len(held['kept'])} wide, {held['width']} before"
            for name, held in states.items()
        ]


def tell_prediction(certificate: Certificate, device: Device, dense: float, pruned: float, name: str) -> None:
    """Tell the latency on a device that is not here, in milliseconds, and the name of what predicts it."""
    certificate.predicted = {
        "dense_ms": dense,
        "pruned_ms": pruned,
        "ratio": pruned / dense,
        "device": device.fingerprint.to_json(),
        "predictor": {"name": name},
    }
    notes = [f"the latency is predicted, not measured: {name} makes it of the device profile given by --target"]
    if device.fingerprint.precision == "int8":
        notes.append("the latency is that of an int8 copy; the ONNX file is float32: quantise it")
    certificate.notes += [note for note in notes if note not in certificate.notes]


def tell_step(certificate: Certificate, device: Device, settings: Settings) -> None:
    """Tell where widths go in finer steps than the device likes, though nobody asked for them."""
    used = min((entry["step"] for entry in certificate.rounds if "step" in entry), default=device.step)
    if used < device.step and settings.multiple_of is None:
        certificate.notes.append(
            f"widths are multiples of {used}, not of {device.step} as this device likes: those cannot meet the budget; "
            f"--multiple-of {device.step} insists"
        )


def tell_negative(certificate: Certificate) -> None:
    """Tell of units that go past the budget because the criterion says that the loss falls without them."""
    count = sum(entry.get("negative", 0) for entry in certificate.rounds)
    name = certificate.data.get("criterion", certificate.criterion)
    if count:
        certificate.notes.append(
            f"{count} of the units removed have negative scores: to the criterion {name!r} the loss "
            "falls without them, so they go though the budget does not ask for it"
        )


def tell_limits(certificate: Certificate, settings: Settings, ratios: dict[str, float]) -> None:
    """Tell every limit beside what was reached; of one budget alone, and of the first of several, as the budget."""
    certificate.limits = [_told(certificate, limit, ratios[limit.metric]) for limit in settings.limits]
    unmet = [limit["metric"] for limit in certificate.limits if not limit.get("met", True)]
    if unmet and certificate.feasible:  # what the rounds did not see coming
        above = f"{', '.join(unmet)} is above its limit"
        if certificate.measured.get("latency") and "latency" in unmet:
            above += ", now that it is measured anew"
        certificate.feasible, certificate.binding = False, "; ".join(filter(None, (above, certificate.binding)))
    certificate.reached = certificate.limits[0]["reached"]
    if not certificate.feasible:
        certificate.notes.append(f"the budget is out of reach ({certificate.binding}); this is the nearest point")


def _told(certificate: Certificate, limit: Limit, ratio: float) -> dict[str, Any]:
    told = {"metric": limit.metric, "asked": str(limit), "ratio": ratio}
    if limit.metric == "latency":
        found = certificate.measured.get("latency") or certificate.predicted
        told["reached"] = reached = found["ratio"] if found else 1.0
        # no failure that noise alone may be, and no success that is no gain
        least = found["interval"][0] if "interval" in found else reached
        return told | {"met": least <= ratio * (1 + LATENESS) and (reached < 1 or ratio >= 1)}
    name = COUNTED[limit.metric]
    told["reached"] = reached = certificate.after[name] / max(1, certificate.before[name])
    return told if limit.metric == "widths" else told | {"met": reached <= ratio + _ROUNDING}


def tell_losses(certificate: Certificate, examples: int) -> None:
    """Add up over the rounds what the scores promised of the loss, and what came of it before and after repair.

    The scores are of all calibration examples, what came of it of the first ``examples`` of them.
    """
    known = [entry["loss"] for entry in certificate.rounds if "loss" in entry]
    if not known:
        return
    promised = [entry["predicted_change"] for entry in known]
    certificate.loss = {
        "of": known[0]["of"],
        "examples": examples,
        "predicted_change": None if None in promised else sum(promised),
        "realised_change": sum(entry["removed"] - entry["before"] for entry in known),
        "repaired_change": sum(entry["repaired"] - entry["before"] for entry in known),
    }


def tell_capacity(certificate: Certificate, settings: Settings, sample: Any, dense: Program, small: Program) -> None:
    """Tell the Fisher-Rao norm of the parameters before and after, unless the loss has no likelihood it could be of."""
    for name, program in (("before", dense), ("after", small)):
        try:
            found = fisher_rao_norm(program, sample.first(CAPACITY), settings.loss, seed=settings.seed)
        except (UsageError, BadData):
            certificate.capacity = {}
            return
        certificate.capacity |= {name: found.norm, "source": found.source, "examples": found.examples}


def tell_data(
    certificate: Certificate,
    settings: Settings,
    data: PruneData,
    facts: dict[str, Any],
    program: Program,
    *,
    shared: bool,
) -> None:
    """Tell what was looked at; ``facts`` are of the scores, ``shared``: processes normalised their own shares."""
    certificate.data = {"note": data.note, **facts}
    tell_unseen(certificate, program, data, settings.loss, facts)
    if shared:
        certificate.notes.append(OWN_SHARES)
    if settings.store is not None and "curvature" not in resolve(settings.criterion).needs:
        certificate.notes.append(
            "the curvature statistics given are for the repair alone: the criterion does not look at them"
        )
    if facts and data.calibration is None:
        certificate.notes.append("data-free: scored on drawn inputs; give --data for better choices")


def tell_unseen(certificate: Certificate, program: Program, data: PruneData, loss: Any, facts: dict[str, Any]) -> None:
    """Tell which outputs the scores did not look at: a loss by name is of the main one, a user's of what it likes."""
    labelled = data.calibration is not None and data.calibration.targets is not None
    if not labelled or not facts.keys() & {"labels", "curvature"} or not (loss is None or _is_named(loss)):
        return
    from kfe_fx.runtime.onnx_file import named_outputs

    with torch.no_grad():
        outputs = program.module().run_flat(program.flat_examples(), "eval")
    named = [(name, outputs[place]) for place, name in named_outputs(program) if floating_outputs(outputs[place])]
    if not named:
        return
    main = main_output([value for _, value in named])
    seen = next(name for name, value in named if value is main)
    if unseen := [name for name, value in named if value is not main]:
        told = (
            f"the loss looks at the output {seen} alone: what only {', '.join(unseen)} "
            f"need{'s' * (len(unseen) == 1)} counts as worth nothing; name a --loss that looks at all of them"
        )
        certificate.notes.extend([told] if told not in certificate.notes else [])  # rounds tell it again


def _is_named(loss: Any) -> bool:
    found = resolve_loss(loss, None)
    return found is not None and bool(found.kind)


def unasked(
    settings: Settings, chosen: Selection, scores: np.ndarray | None, gone: frozenset[int], ratios: dict[str, float]
) -> int:
    """Count the units of a selection past the budget that go because their scores are negative."""
    metric = settings.metric
    if scores is None or metric == "widths" or chosen.predicted >= ratios[metric] * (1 - BEYOND):
        return 0
    fresh = np.array(sorted(chosen.removed - gone), dtype=np.int64)
    return int((np.isfinite(scores[fresh]) & (scores[fresh] < 0)).sum())
