"""Tables, goals and the plot of benchmarks/criteria.py.

The best of each side is chosen on the first half of the held-out glyphs and told on the second, so that the best of
many is not flattered; intervals are of paired differences on that second half, averaged over the seeds.
"""

from __future__ import annotations

import base64
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from criteria_peer import PEERS

from kfe_fx.criteria import names

NETS = ("resnet", "mobilenet", "vit", "vgg")
BUDGETS = (0.5, 0.3, 0.15)
SCAN = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
WHEN = ("after removal", "after repair", "fine-tuned")
OFF = 0.05  # a run this much slower than asked (the peer's: faster) is in the tables and not among the best
DEFAULT = "fisher"
WEIGHTS = ("magnitude", "lamp", "fpgm", "bn-scale", "random")
GRADIENTS = ("taylor", "group-fisher")
# what has not been run again since exponents of crowding are tried
OLD = "Where no crowding is told (the exponents that were chosen), kfe-fx chose by plain sums of scores (crowding 0)."

Rows = dict[str, Any]
Found = dict[str, list[Rows]]


def packed(right: np.ndarray) -> str:
    """Write which examples are named right, a bit each."""
    return base64.b64encode(np.packbits(right).tobytes()).decode()


def unpacked(text: str) -> np.ndarray:
    """Read what ``packed`` wrote, as numbers."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), dtype=np.uint8)).astype(float)


def methods(rows: Rows, net: str, budget: float, every: Sequence[str]) -> Found:
    """Gather the runs of a network at a budget by what chose."""
    found: Found = {}
    for key, row in rows.items():
        if key.startswith(f"{net} {budget:g} ") and "failed" not in row:
            found.setdefault(" ".join(key.split()[2:-1]), []).append({**row, "key": key})
    return {name: runs for name, runs in found.items() if name in every}


class Report:
    """What the rows of a grid say; ``right`` tells for each run which examples are named right at its end."""

    def __init__(self, rows: Rows, right: dict[str, str]) -> None:
        self.runs = {key: row for key, row in rows.items() if not key.startswith(("rates ", "dense "))}
        self.dense = {key.removeprefix("dense "): row for key, row in rows.items() if key.startswith("dense ")}
        self.scans = {key.removeprefix("rates "): row for key, row in rows.items() if key.startswith("rates ")}
        self.right = right

    def text(self) -> str:
        """Write all of it as markdown."""
        parts = [
            "# Criteria at equal latency",
            "`python benchmarks/criteria.py`: who is compared, and how, is said at its head. Latency is that of dense; "
            "`after repair` is without any training (the peer's: statistics re-estimated). Means (ranges) over seeds."
            + (f" {OLD}" if any(_plain(key, row) for key, row in self.runs.items()) else ""),
            self.marks(),
            self.goals(),
            self.kinds(),
            self.tables(),
            self.scan(),
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    # the best of each side -------------------------------------------------------------------------------------------

    def _vector(self, runs: list[Rows]) -> np.ndarray:
        return np.mean([unpacked(self.right[run["key"]]) for run in runs], axis=0)

    def _best(self, net: str, budget: float, every: Sequence[str], *, peer: bool = False) -> tuple[str, np.ndarray]:
        """Return the method that is best on the first half, and its mean of right answers on the second."""
        found = methods(self.runs, net, budget, every)
        found = {name: [run for run in runs if run["key"] in self.right] for name, runs in found.items()}
        late = {
            name: budget / statistics.fmean(run["latency"] for run in runs) - 1 for name, runs in found.items() if runs
        }
        near = [name for name, by in late.items() if (-by if not peer else by) <= OFF] or list(late)
        halves = {name: np.array_split(self._vector(found[name]), 2) for name in near}
        if not halves:
            return "", np.zeros(0)
        name = max(halves, key=lambda name: halves[name][0].mean())
        return name, halves[name][1]

    def _dense(self, net: str) -> np.ndarray | None:
        text = self.right.get(f"dense {net}")
        return None if text is None else np.array_split(unpacked(text), 2)[1]

    def goals(self) -> str:
        """Set the best of kfe-fx beside the best of the peer, after the same fine-tuning."""
        lines = []
        for net in NETS:
            dense = self._dense(net)
            for budget in BUDGETS:
                ours, a = self._best(net, budget, names())
                theirs, b = self._best(net, budget, PEERS, peer=True)
                if dense is None or not ours or not theirs:
                    continue
                gap, other = dense.mean() - a.mean(), dense.mean() - b.mean()
                share = f"{gap / other:.2f}" if other > 0 else ""
                lines.append(
                    f"| {net} | {budget:g} | {_percent(dense)} | {_percent(a)} ({ours}, "
                    f"{self._latency(net, budget, ours)}) | {_percent(b)} ({theirs}, "
                    f"{self._latency(net, budget, theirs)}) | {share} | {_paired(a, b)} |"
                )
        head = (
            "| network | asked | dense, % | kfe-fx, best, % (latency) | Torch-Pruning, best, % (latency) | gap to "
            "dense over the peer's | ahead, points (95 %) |"
        )
        return _section("The best of each, fine-tuned", head, lines)

    def _latency(self, net: str, budget: float, method: str) -> str:
        runs = methods(self.runs, net, budget, [method])[method]
        return f"{statistics.fmean(run['latency'] for run in runs):.3f}"

    def kinds(self) -> str:
        """Tell where curvature does not pay: its best criterion beside the best that looks at weights or gradients."""
        curved = [name for name in names() if name not in (*WEIGHTS, *GRADIENTS)]
        lines = []
        for net in NETS:
            for budget in BUDGETS:
                one, a = self._best(net, budget, curved)
                two, b = self._best(net, budget, WEIGHTS)
                three, c = self._best(net, budget, GRADIENTS)
                if one and two:
                    pays = "no" if (a - b).mean() <= 0 else "yes" if _low(a, b) > 0 else "not surely"
                    told = f"{_percent(c)} ({three})" if three else ""
                    lines.append(
                        f"| {net} | {budget:g} | {_percent(a)} ({one}) | {told} | {_percent(b)} ({two}) | "
                        f"{_paired(a, b)} | {pays} |"
                    )
        head = (
            "| network | asked | by curvature, % | by gradients, % | by weights, % | curvature ahead of weights, "
            "points (95 %) | pays |"
        )
        return _section("Where curvature pays", head, lines)

    # marks -----------------------------------------------------------------------------------------------------------

    def marks(self) -> str:
        """Say for each mark whether it is met."""
        told: list[tuple[str, float, float, str]] = []
        for net in NETS:
            dense = self._dense(net)
            for budget in BUDGETS:
                _, a = self._best(net, budget, names())
                theirs, b = self._best(net, budget, PEERS, peer=True)
                if dense is not None and len(a) and len(b) and dense.mean() > b.mean():
                    share = (dense.mean() - a.mean()) / (dense.mean() - b.mean())
                    slower = float(self._latency(net, budget, theirs)) / budget - 1
                    late = f" ({theirs} is {slower:.0%} slower than asked)" if slower > OFF else ""
                    what = f"{net} at {budget:g}: gap to dense over the peer's"
                    told.append((what, -share, -0.5, f"{share:.2f}{late}"))
        for net, budget, when, least, relative in (
            ("resnet", 0.5, "after repair", 0.85, True),
            ("resnet", 0.3, "after repair", 0.65, True),
            ("resnet", 0.15, "fine-tuned", 0.85, False),
            ("mobilenet", 0.15, "fine-tuned", 0.75, False),
        ):
            runs = methods(self.runs, net, budget, [DEFAULT]).get(DEFAULT, [])
            if runs:
                value = statistics.fmean(run[when] for run in runs) / (self.dense[net] if relative else 100)
                what = f"{net} at {budget:g}, {when}, {DEFAULT}" + (" over dense" if relative else "")
                told.append((what, value, least, f"{value:.3f}, at least {least}"))
        lines = [
            f"- {'met' if value >= least else '**missed**'}: {what}: {shown}" for what, value, least, shown in told
        ]
        return "\n".join(["## Marks\n", *lines]) if lines else ""

    # everything ------------------------------------------------------------------------------------------------------

    def tables(self) -> str:
        """Write a table per network and budget, the best after fine-tuning first."""
        parts = []
        for net in NETS:
            for budget in BUDGETS:
                found = methods(self.runs, net, budget, (*names(), *PEERS))
                if found:
                    parts.append(self._table(net, budget, found))
        failed = [f"- {key}: {row['failed']}" for key, row in self.runs.items() if "failed" in row]
        return "\n\n".join([*parts, *(["### Failed\n\n" + "\n".join(failed)] if failed else [])])

    def _table(self, net: str, budget: float, found: Found) -> str:
        seeds: dict[str, set[str]] = {}
        for row in (row for each in found.values() for row in each):
            seeds.setdefault(row["machine"], set()).add(row["key"].split()[-1])
        where = "; ".join(f"{name}: seeds {', '.join(sorted(each))}" for name, each in sorted(seeds.items()))
        lines = [
            f"### {net} at {budget:g} of its latency (dense {self.dense.get(net, math.nan):.2f} %)\n\n{where}\n",
            "| chosen by | seeds | latency | MACs | crowding | after removal | after repair | rates | fine-tuned "
            "| CPU s |",
            "|---" * 10 + "|",
        ]
        for method in sorted(found, key=lambda name: -_mean(found[name], "fine-tuned")):
            each = found[method]
            removed, repaired, tuned = (_spread([row[when] for row in each]) for when in WHEN)
            rates, crowding = _listed(each, "rate"), _listed(each, "crowding")
            peer = " (Torch-Pruning)" if method in PEERS else ""
            macs = f"{_mean(each, 'macs'):.3f}" if "macs" in each[0] else ""
            timed = [row for row in each if "cpu s" in row]  # those that scored
            cpu = f"{_mean(timed, 'cpu s'):.0f}" if timed else ""
            chosen = f"{method}{peer} | {len(each)} | {_mean(each, 'latency'):.3f} | {macs} | {crowding}"
            lines.append(f"| {chosen} | {removed} | {repaired} | {rates} | {tuned} | {cpu} |")
        return "\n".join(lines)

    def scan(self) -> str:
        """Write what each learning rate left."""
        rates = " | ".join(f"{rate:g}" for rate in SCAN)
        head = f"| network | asked | chosen by | after repair | {rates} |"
        lines = []
        for key, row in self.scans.items():
            net, budget, *method, _ = key.split()
            if "failed" not in row:
                told = " | ".join(f"{row[f'{rate:g}']:.2f}" for rate in SCAN)
                lines.append(f"| {net} | {budget} | {' '.join(method)} | {row['after repair']:.1f} | {told} |")
        return _section("After fine-tuning at several rates, on other glyphs", head, lines)

    def plot(self, place: Path) -> None:
        """Draw accuracy after repair against accuracy after fine-tuning, a panel per network that was run."""
        from matplotlib.figure import Figure

        nets = [net for net in NETS if any(key.startswith(net) for key in self.runs)]
        if not nets:
            return
        figure = Figure(figsize=(4 * len(nets), 3.6), layout="constrained")
        for axis, net in zip(figure.subplots(1, len(nets), squeeze=False)[0], nets, strict=True):
            for budget, marker in zip(BUDGETS, "os^", strict=True):
                for label, colour, every in (("kfe-fx", "tab:blue", names()), ("Torch-Pruning", "tab:orange", PEERS)):
                    runs = [run for each in methods(self.runs, net, budget, every).values() for run in each]
                    if runs:
                        points = [(run["after repair"], run["fine-tuned"]) for run in runs]
                        axis.scatter(
                            *zip(*points, strict=True), marker=marker, c=colour, s=14, label=f"{label}, {budget:g}"
                        )
            axis.set(title=net, xlabel="after repair, %", ylabel="fine-tuned, %")
            axis.legend(fontsize=6)
        figure.savefig(place)


def _plain(key: str, row: Rows) -> bool:
    """Tell whether a criterion of ours chose before crowding was known."""
    return "failed" not in row and "crowding" not in row and " ".join(key.split()[2:-1]) not in PEERS


def _listed(runs: list[Rows], name: str) -> str:
    return ", ".join(f"{value:g}" for value in sorted({row[name] for row in runs if name in row}))


def _section(title: str, head: str, lines: list[str]) -> str:
    rule = "|---" * (head.count("|") - 1) + "|"
    return "\n".join([f"## {title}\n", head, rule, *lines]) if lines else ""


def _mean(runs: list[Rows], name: str) -> float:
    return statistics.fmean(run[name] for run in runs)


def _spread(values: list[float]) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ({min(values):.1f}-{max(values):.1f})"


def _percent(right: np.ndarray) -> str:
    return f"{100 * right.mean():.2f}"


def _half(a: np.ndarray, b: np.ndarray) -> float:
    return 1.96 * float((a - b).std(ddof=1)) / math.sqrt(len(a))


def _low(a: np.ndarray, b: np.ndarray) -> float:
    return float((a - b).mean()) - _half(a, b)


def _paired(a: np.ndarray, b: np.ndarray) -> str:
    change, half = float((a - b).mean()), _half(a, b)
    return f"{100 * change:+.2f} ({100 * (change - half):+.2f} to {100 * (change + half):+.2f})"
