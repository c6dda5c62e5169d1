"""Many budgets of one network from one scoring: what each costs, and the plan that builds it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from kfe_fx.certificate import Certificate
from kfe_fx.cost.budget import Limit, read_limits
from kfe_fx.errors import BadFile, MissingDependency, UsageError
from kfe_fx.format.atomic import replacing
from kfe_fx.passes.prune import prepare
from kfe_fx.passes.rounds import Rounds, Shared
from kfe_fx.plan import Plan
from kfe_fx.program import Program

FORMAT = "kfe-fx pareto"
VERSION = 1
BUDGETS = (0.7, 0.5, 0.35, 0.25)


@dataclass(frozen=True)
class Point:
    """One budget: the plan that meets it, and the certificate of what came of it before any training."""

    budget: Limit
    plan: Plan
    certificate: Certificate

    @property
    def quality(self) -> float | None:
        """The metric on held-out examples right after removal and repair, None without such examples."""
        return self.certificate.quality.get("right_after", self.certificate.quality.get("before"))

    def to_json(self) -> dict[str, Any]:
        """Return the point as JSON-ready data."""
        return {"asked": str(self.budget), "plan": self.plan.to_json(), "certificate": self.certificate.to_json()}


@dataclass(frozen=True)
class Front:
    """The points of a network, the largest budget first."""

    metric: str
    points: tuple[Point, ...]

    def rows(self) -> list[tuple[str, ...]]:
        """Return rows (budget, reached, milliseconds, parameters, multiply-accumulates, quality) for people."""
        return [_row(point) for point in self.points]

    def write(self, path: Path, *, force: bool = False) -> None:
        """Write all points with their plans, whole or not at all; ``kfe-fx prune --plan`` builds one.

        Raises:
            BadFile: the file exists (without ``force``) or cannot be written.
        """
        if path.exists() and not force:
            raise BadFile(f"{path} exists; remove it or say --force")
        points = [point.to_json() for point in self.points]
        document = {"format": FORMAT, "version": VERSION, "metric": self.metric, "points": points}
        with replacing(path) as handle:
            handle.write(json.dumps(document, indent=1, sort_keys=True).encode() + b"\n")

    def plot(self, path: Path) -> None:
        """Draw what is kept of the quality (or of the parameters) against what is left of the metric.

        Raises:
            MissingDependency: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise MissingDependency("the plot needs matplotlib: pip install 'kfe-fx[data]'") from None
        figure = Figure(figsize=(5, 3.6), layout="constrained")
        axis = figure.subplots()
        first = self.points[0].certificate
        judged = "before" in first.quality
        name = str(first.quality.get("metric", "quality")) if judged else "parameters, of dense"
        ends = [1.0, *(point.certificate.reached for point in self.points)]
        values = [first.quality["before"] if judged else 1.0, *(_height(point, judged) for point in self.points)]
        axis.plot(ends, values, marker="o")
        axis.set(xlabel=f"{self.metric}, of dense", ylabel=f"{name}, before training" if judged else name)
        axis.grid(alpha=0.3)
        with replacing(path) as handle:
            figure.savefig(handle, format=path.suffix.removeprefix(".") or "svg")


def _height(point: Point, judged: bool) -> float:
    if judged and point.quality is not None:
        return point.quality
    return point.certificate.after["parameters"] / max(1, point.certificate.before["parameters"])


def _row(point: Point) -> tuple[str, ...]:
    certificate = point.certificate
    measured = certificate.measured.get("latency")
    reached = f"{certificate.reached:.3f}"
    if measured:
        reached += f" ({measured['interval'][0]:.3f}-{measured['interval'][1]:.3f})"
    if not certificate.feasible:
        reached += " (out of reach)"
    times = measured or certificate.predicted
    quality = point.quality
    return (
        str(point.budget),
        reached,
        f"{times['pruned_ms']:.3f}" if times else "",
        f"{certificate.after['parameters']:,}",
        f"{certificate.after['macs']:,}",
        "" if quality is None else f"{quality:.4f}",
    )


def pareto(
    program_or_module: Program | nn.Module,
    example_inputs: Any = None,
    *,
    budgets: Sequence[Any] = BUDGETS,
    progress: Callable[[str, float | None], None] | None = None,
    **options: Any,
) -> Front:
    """Find what a network becomes at several budgets: scored once, each selected, measured and proved; no training.

    Args:
        program_or_module: as for ``prune``.
        example_inputs: as for ``prune``.
        budgets: each as for ``prune``, of one metric.
        progress: called with (stage, share done or None).
        options: those of ``prune`` but for epochs and rounds.

    Raises:
        UsageError: no budget, budgets of several metrics, or an option that means nothing.
    """
    if not budgets:
        raise UsageError("pareto needs budgets, as 0.7,0.5,0.35")
    job = prepare(program_or_module, example_inputs, **{**options, "budget": budgets[0], "epochs": 0, "rounds": 1})
    metric, shared, points = job.settings.metric, Shared(), []
    asked = [read_limits(budget, options.get("metric", "latency")) for budget in budgets]
    if {limits[0].metric for limits in asked} != {metric}:
        raise UsageError("pareto takes budgets of one metric; run it once for each")
    for limits in sorted(asked, key=lambda limits: -limits[0].value):
        settings = replace(job.settings, limits=limits)
        _, plan, certificate = Rounds(job.program, settings, job.data, progress, shared).run()
        points.append(Point(limits[0], plan, certificate))
    return Front(metric, tuple(points))
