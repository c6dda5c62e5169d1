"""Certificate: what was done to a network, what was proved of the result, and what was measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

CPU = "CPUExecutionProvider"


@dataclass
class Certificate:
    """Everything that a reader needs to trust a pruned network, as plain data.

    ``before`` and ``after`` hold exact counts (parameters, macs, peak_memory in bytes). ``rounds`` lists each surgery
    with the largest difference between the masked original and the shrunk network, relative to the output's rms.
    ``loss`` adds up over the rounds by how much the loss on the calibration examples grew with what went: as the scores
    predicted (None where they are no losses), as measured, and after repair; ``capacity`` holds the Fisher-Rao norm of
    the parameters before and after.
    ``measured`` holds what was measured on the machine. Two runs with equal seeds agree in all the rest, unless
    latency is budgeted: then what was selected follows from measurements too.
    """

    budget: float
    metric: str
    criterion: str
    seed: int
    reached: float = 1.0
    feasible: bool = True
    binding: str = ""
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    parity: dict[str, Any] = field(default_factory=dict)
    quality: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    statistics: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    predicted: dict[str, Any] = field(default_factory=dict)
    limits: list[dict[str, Any]] = field(default_factory=list)
    loss: dict[str, Any] = field(default_factory=dict)
    capacity: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the certificate as JSON-ready data."""
        return dict(self.__dict__)

    @property
    def masked_error(self) -> float:
        """The largest difference between a masked original and its shrunk network over all rounds."""
        return max((float(entry["masked_error"]) for entry in self.rounds), default=0.0)

    def table(self) -> list[tuple[str, str, str]]:
        """Return rows (what, before, after) for people."""
        rows = [
            ("parameters", f"{self.before['parameters']:,}", f"{self.after['parameters']:,}"),
            ("multiply-accumulates", f"{self.before['macs']:,}", f"{self.after['macs']:,}"),
            ("peak activation memory", _bytes(self.before["peak_memory"]), _bytes(self.after["peak_memory"])),
        ]
        rows += self._latency_rows() + self._quality_rows() + self._loss_rows()
        for number, entry in enumerate(self.rounds, 1):
            rows.append(
                (f"round {number}: masked = shrunk", f"{entry['removed']} units out", f"{entry['masked_error']:.1e}")
            )
        if self.parity:
            batches = ", ".join(str(batch) for batch in self.parity.get("batches", ()))
            verdict = f"{self.parity['error']:.1e}"
            rows.append(("ONNX = network, relative error", f"batches {batches}" if batches else "", verdict))
        return rows

    def remarks(self) -> list[str]:
        """Return what a reader should know beside the table, a line each."""
        changed = (
            f"the function changes at {where}: its statistic runs over what is left" for where in self.statistics
        )
        return [*changed, *self.notes]

    def _latency_rows(self) -> list[tuple[str, str, str]]:
        latency, told = self.measured.get("latency"), self.predicted
        if told:
            kind = _of_precision(told["device"]["precision"])
            where = f"latency{kind} on {told['device']['cpu']} (predicted, not measured)"
            return [(where, f"{told['dense_ms']:.3f} ms", f"{told['pruned_ms']:.3f} ms")]
        if not latency:
            return []
        low, high = latency["interval"]
        kind = _of_precision(latency.get("precision", "fp32"))
        threads = f"{latency['threads']} thread{'s' if latency['threads'] > 1 else ''}"
        provider = latency.get("provider", CPU)
        kind += "" if provider == CPU else f" on {provider}"
        label = f"latency{kind}, {threads}, batch {latency['batch']}"
        return [
            (label, f"{latency['dense_ms']:.3f} ms", f"{latency['pruned_ms']:.3f} ms"),
            ("... of dense (measured anew, 95 %)", "1", f"{latency['ratio']:.3f} ({low:.3f}-{high:.3f})"),
            *self._predictor_rows(),
        ]

    def _predictor_rows(self) -> list[tuple[str, str, str]]:
        """Return how far the first prediction was from the measurement, which then corrected it."""
        found = self.measured.get("predictor")
        if not found:
            return []
        return [(f"latency predicted by {found['name']}, first shot", "", f"{100 * found['error']:+.1f} %")]

    def _loss_rows(self) -> list[tuple[str, str, str]]:
        if not self.loss:
            return []
        promised = self.loss["predicted_change"]
        told = "" if promised is None else f"predicted {promised:+.3g}"
        rows = [(f"{self.loss['of']} of what went, unrepaired", told, f"{self.loss['realised_change']:+.3g}")]
        rows.append(("... repaired", "", f"{self.loss['repaired_change']:+.3g}"))
        if self.capacity:
            before, after = self.capacity["before"], self.capacity["after"]
            rows.append(("Fisher-Rao norm", f"{before:.3g}", f"{after:.3g}"))
        return rows

    def _quality_rows(self) -> list[tuple[str, str, str]]:
        rows = []
        name = self.quality.get("metric", "quality")
        before = self.quality.get("before")
        for key, label in (("right_after", f"{name} right after pruning"), ("after", f"{name} after fine-tuning")):
            value = self.quality.get(key)
            if value is not None:
                rows.append((label, "" if before is None else _quality(before), _quality(value)))
        return rows


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def _of_precision(precision: str) -> str:
    return "" if precision == "fp32" else f" in {precision}"


def _quality(value: float) -> str:
    return f"{value:.4f}"
