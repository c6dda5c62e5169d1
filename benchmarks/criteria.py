"""Every criterion at equal measured latency and equal fine-tuning, beside Torch-Pruning's importances.

    python benchmarks/criteria.py                  # the whole grid, some hours on two cores; goes on where it was
    python benchmarks/criteria.py --nets resnet --budgets 0.3 --criteria fisher kfe magnitude --seeds 0
    python benchmarks/criteria.py --peer           # Torch-Pruning on the same networks (pip install torch-pruning)
    python benchmarks/criteria.py rates            # what learning rates leave, for kfe-fx and for the peer
    python benchmarks/criteria.py table            # of what criteria.json holds

Networks: ``resnet``, ``mobilenet`` and ``vit`` of models/, and a ``vgg`` that is trained here once. Each criterion
scores 1,024 examples; kfe-fx selects to a budget of ONNX Runtime's latency (one thread, batch 1), measured in a closed
loop, whole branches included. Accuracy on 10,000 held-out glyphs (right after the removal 2,000) is told after the
removal, after repair (means and fits in closed form, no training), and after the same fine-tuning for all: AdamW, 2
epochs of 5,000 glyphs, a cosine down to zero from 1e-4 for what starts within two points of dense, else from the better
of 1e-3 and 3e-3, as 5,000 other glyphs tell (``rates``: what is whole wants small steps, what is broken large ones).
Torch-Pruning gets the ratio at which it measures the same latency, widths in multiples of the device's step, and, in
place of repair, re-estimated statistics; over all layers at once (global), each layer alike (local), or only what is
not the residual stream (inner). Seeds draw examples and their order. What one seed is measured on should be one
machine: steps differ.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from criteria_peer import PEERS, pruned_by_peer
from criteria_report import BUDGETS, NETS, SCAN, Report, packed
from filelock import FileLock
from torch import Tensor, nn

import kfe_fx
from kfe_fx.cost.device import this_device
from kfe_fx.criteria import names
from kfe_fx.models.tasks import GLYPHS
from kfe_fx.passes.drop_branches import DropBranches
from kfe_fx.passes.prune import prepare
from kfe_fx.passes.reestimate_statistics import ReestimateStatistics
from kfe_fx.passes.rounds import Rounds, Shared
from kfe_fx.passes.shrink import Shrink
from kfe_fx.runtime.inputs import feeds
from kfe_fx.runtime.measure import compare
from kfe_fx.runtime.onnx_file import onnx_bytes
from kfe_fx.runtime.session import make_session
from kfe_fx.training.finetune import finetune

MODELS = Path(__file__).resolve().parents[1] / "models"
SEEDS = (0, 1, 2)
BEST = 6  # criteria (and settings of the peer) that the other networks get, by what they leave on the ResNet
WHOLE, GENTLE, BOLD = 2.0, (1e-4,), (1e-3, 3e-3)  # points below dense, and rates for what is nearer and farther
TRAINING, HELD, BROKEN, EPOCHS, SCORED = 5_000, 10_000, 2_000, 2, 1024
UNTOLD = ("dropped", "loss", "machine")  # while it runs
NEAR, FINEST, TRIES = 0.02, 0.01, 9  # of the search for the peer's ratio: in latency, in the ratio


class VGG(nn.Module):
    """Six convolutions with norms, no residual connection: [N, 1, 32, 32] -> logits [N, 36]."""

    def __init__(self, classes: int = 36) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 1
        for width, stride in ((32, 2), (64, 1), (64, 2), (128, 1), (128, 2), (128, 1)):
            layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        self.features, self.head = nn.Sequential(*layers), nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images to logits."""
        return self.head(self.features(x).mean((2, 3)))


@cache
def network(name: str, out: Path) -> kfe_fx.Program:
    """Load a trained network; the VGG is trained when it is first asked for."""
    if name != "vgg":
        return kfe_fx.load(MODELS / f"glyphs_{name}.pt")
    place = out / "vgg.pt"
    if not place.exists():
        torch.manual_seed(0)
        program = kfe_fx.capture(VGG().eval(), GLYPHS.draw(2, 0)[0])
        finetune(program, GLYPHS.draw(40_000, 7), epochs=6, lr=3e-3, batch_size=128, seed=0, threads=1)
        kfe_fx.save(program, place)
    return kfe_fx.load(place)


@cache
def training(seed: int) -> tuple[Tensor, Tensor]:
    return GLYPHS.draw(TRAINING, 100 + seed)


@cache
def held() -> tuple[Tensor, Tensor]:
    return GLYPHS.held_out(HELD)


@cache
def others() -> tuple[Tensor, Tensor]:
    """Glyphs that rates are judged on; nothing that is told is."""
    return GLYPHS.draw(HELD // 2, 99)


def right(program: Any, examples: tuple[Tensor, Tensor], count: int | None = None) -> np.ndarray:
    """Tell for each example whether it is named right."""
    images, labels = (part[:count] for part in examples)
    program.eval()
    with torch.no_grad():
        parts = [program(images[i : i + 250]).argmax(1) == labels[i : i + 250] for i in range(0, len(images), 250)]
    return torch.cat(parts).numpy()


def accuracy(program: Any, count: int | None = None) -> float:
    """Return the percentage of held-out examples that are named right."""
    return 100 * float(right(program, held(), count).mean())


def tune(program: kfe_fx.Program, seed: int, rate: float) -> kfe_fx.Program:
    finetune(program, training(seed), epochs=EPOCHS, lr=rate, seed=seed, threads=1)
    return program


def bare(program: kfe_fx.Program, plan: kfe_fx.Plan) -> kfe_fx.Program:
    """Remove what a plan names and repair nothing."""
    if plan.dropped:
        program = DropBranches(plan.dropped, always=True).run(program).program
    return Shrink(replace(plan, dropped=())).run(program).program


def bracket(tried: dict[float, float], budget: float) -> tuple[float, float]:
    """Return the largest ratio that measured above the budget, and the smallest one beyond it that measured below."""
    low = max(ratio for ratio, found in tried.items() if found >= budget)
    return low, min((ratio for ratio, found in tried.items() if found < budget and ratio > low), default=0.99)


def between(tried: dict[float, float], budget: float) -> float:
    """Return the next ratio to try: where the line through both ends of the bracket meets the budget."""
    low, high = bracket(tried, budget)
    slope = (tried.get(high, 0.02) - tried[low]) / (high - low)
    return min(max(low + (budget - tried[low]) / slope, low + 0.15 * (high - low)), high - 0.15 * (high - low))


class Bench:
    """One network and the session that candidates are measured against."""

    def __init__(self, name: str, out: Path) -> None:
        self.name, self.program = name, network(name, out)
        self.marks = right(self.program, held())
        self.dense = 100 * float(self.marks.mean())
        self.session = make_session(onnx_bytes(self.program), threads=1)
        self.shared, self.scored_by = Shared(), ("", -1)
        self.tried: dict[tuple[str, int], dict[float, float]] = {}

    def latency(self, small: kfe_fx.Program) -> float:
        sessions = [self.session, make_session(onnx_bytes(small), threads=1)]
        return compare(sessions, [feeds(self.program, 1, 0), feeds(small, 1, 0)], seconds=2.0).ratios[1].value

    @staticmethod
    def scored(seed: int) -> tuple[Tensor, Tensor]:
        images, labels = training(seed)
        return images[:SCORED], labels[:SCORED]

    def ours(self, criterion: str, budget: float, seed: int) -> tuple[kfe_fx.Program, dict[str, Any]]:
        """Prune and repair with a criterion."""
        job = prepare(
            self.program, budget=budget, criterion=criterion, data=self.scored(seed),
            val=tuple(part[:2] for part in held()), epochs=0, seed=seed,
        )  # fmt: skip
        if (criterion, seed) != self.scored_by:  # budgets share the scores
            harms = self.shared.harms if seed == self.scored_by[1] else {}
            self.shared, self.scored_by = Shared(stopwatch=self.shared.stopwatch, harms=harms), (criterion, seed)
        fresh, started = self.shared.scored is None, time.process_time()
        small, plan, certificate = Rounds(job.program, job.settings, job.data, None, self.shared).run()
        seconds = {"cpu s": time.process_time() - started} if fresh else {}
        row = {"after removal": accuracy(bare(self.program, plan), BROKEN), "after repair": accuracy(small)}
        row |= {"latency": certificate.measured["latency"]["ratio"]} | seconds
        row["macs"] = certificate.after["macs"] / certificate.before["macs"]
        row["crowding"] = certificate.rounds[-1]["crowding"]
        return small, row | {"dropped": list(plan.dropped), "loss": certificate.loss}

    def peer(self, setting: str, budget: float, seed: int) -> tuple[kfe_fx.Program, dict[str, Any]]:
        """Prune with Torch-Pruning to the same latency and re-estimate statistics."""
        images, scored = GLYPHS.draw(2, 0)[0], self.scored(seed)
        tried = self.tried.setdefault((setting, seed), {0.0: 1.0})  # budgets share what was measured
        best: tuple[float, float, kfe_fx.Program] | None = None
        for _ in range(TRIES):
            ratio = between(tried, budget)
            module = pruned_by_peer(self.module(), setting, ratio, seed, scored, this_device().step)
            small = kfe_fx.capture(module.eval(), images)
            found = tried[ratio] = self.latency(small)
            if best is None or abs(math.log(found / budget)) < abs(math.log(best[0] / budget)):
                best = found, ratio, small
            low, high = bracket(tried, budget)
            if abs(found / budget - 1) <= NEAR or high - low < FINEST:
                break
        assert best is not None
        found, ratio, small = best
        row: dict[str, Any] = {"after removal": accuracy(small, BROKEN), "ratio": ratio, "latency": self.latency(small)}
        small = ReestimateStatistics(tuple(part[:2048] for part in training(seed))).run(small).program
        return small, row | {"after repair": accuracy(small)}

    def run(self, method: str, budget: float, seed: int) -> tuple[dict[str, Any], str]:
        """Prune with a criterion or a setting of the peer, then fine-tune; tell which examples are right at the end."""
        small, row = self.made(method, budget, seed)
        rates = GENTLE if self.dense - row["after repair"] <= WHOLE else BOLD
        tuned = {rate: tune(copy.deepcopy(small), seed, rate) for rate in rates}
        rate = max(rates, key=lambda rate: right(tuned[rate], others()).mean()) if len(rates) > 1 else rates[0]
        marks = right(tuned[rate], held())
        return row | {"rate": rate, "fine-tuned": 100 * float(marks.mean())}, packed(marks)

    def rates(self, method: str, budget: float, seed: int) -> tuple[dict[str, Any], str]:
        """Fine-tune the same pruned network at several rates."""
        small, row = self.made(method, budget, seed)
        found = {
            f"{rate:g}": 100 * float(right(tune(copy.deepcopy(small), seed, rate), others()).mean()) for rate in SCAN
        }
        return {name: row[name] for name in ("latency", "after repair")} | found, ""

    def made(self, method: str, budget: float, seed: int) -> tuple[kfe_fx.Program, dict[str, Any]]:
        return (self.peer if method in PEERS else self.ours)(method, budget, seed)

    def module(self) -> nn.Module:
        """Build the network as a module of its source."""
        made: nn.Module = VGG() if self.name == "vgg" else import_module(f"kfe_fx.models.glyphs_{self.name}").build()
        made.load_state_dict(self.program.state_dict())
        return made.eval()


# the grid ------------------------------------------------------------------------------------------------------------


def wanted(rows: dict[str, Any], args: argparse.Namespace) -> Iterable[tuple[str, float, str, int]]:
    """List the runs that are asked for: all criteria on the ResNet at three seeds, then the best on the others."""
    every = PEERS if args.peer else names()
    if args.part == "rates":
        yield from (("resnet", b, m, 0) for b in args.budgets for m in args.criteria or ("fisher", "magnitude global"))
        return
    for net in args.nets:
        chosen = args.criteria or (every if net == "resnet" else best(rows, every))
        for seed in args.seeds or (SEEDS if net == "resnet" and not args.peer else SEEDS[:1]):
            for method in chosen:
                for budget in args.budgets:
                    yield net, budget, method, seed


def best(rows: dict[str, Any], every: Sequence[str]) -> list[str]:
    """Return those of all methods that left the most on the ResNet after fine-tuning, by rank over the budgets."""
    ranks: dict[str, list[int]] = {}
    for budget in BUDGETS:
        means = {
            method: np.mean(found)
            for method in every
            if (found := [r["fine-tuned"] for k, r in rows.items() if k.startswith(f"resnet {budget:g} {method} ")])
        }
        for rank, method in enumerate(sorted(means, key=lambda name: -means[name])):
            ranks.setdefault(method, []).append(rank)
    return sorted(ranks, key=lambda name: np.mean(ranks[name]))[:BEST] or list(every)[:BEST]


ERRORS = (kfe_fx.KfeError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)


class Grid:
    """The file of what was run, and what is run into it; several processes may be at it."""

    def __init__(self, out: Path) -> None:
        self.out, self.place, self.marks = out, out / "criteria.json", out / "criteria_right.json"
        self.benches: dict[str, Bench] = {}

    @property
    def rows(self) -> dict[str, Any]:
        return json.loads(self.place.read_text()) if self.place.exists() else {}

    @property
    def right(self) -> dict[str, str]:
        return json.loads(self.marks.read_text()) if self.marks.exists() else {}

    def keep(self, key: str, row: Any, right: str = "") -> None:
        with FileLock(self.place.with_suffix(".lock")):
            _write(self.place, self.rows | {key: row})
            if right:
                _write(self.marks, self.right | {key: right})

    def run(self, part: str, net: str, budget: float, method: str, seed: int) -> None:
        key = f"{'rates ' if part == 'rates' else ''}{net} {budget:g} {method} {seed}"
        if key in self.rows:
            return
        if net not in self.benches:
            bench = self.benches[net] = Bench(net, self.out)
            self.keep(f"dense {net}", bench.dense, packed(bench.marks))
        try:
            row, marks = getattr(self.benches[net], part)(method, budget, seed)
            row["machine"] = f"{this_device().fingerprint.cpu}, steps of {this_device().step}"
        except ERRORS as error:
            row, marks = {"failed": f"{type(error).__name__}: {error}"[:500]}, ""
        self.keep(key, row, marks)
        print(key, {name: value for name, value in row.items() if name not in UNTOLD}, flush=True)


def _write(place: Path, found: dict[str, Any]) -> None:
    fresh = place.with_suffix(".part")
    fresh.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    fresh.replace(place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["run", "rates", "table"], default="run")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS))
    parser.add_argument("--criteria", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    grid = Grid(args.out)
    for net, budget, method, seed in wanted(grid.rows, args) if args.part != "table" else ():
        grid.run(args.part, net, budget, method, seed)
    report = Report(grid.rows, grid.right)
    report.plot(args.out / "criteria.png")
    (args.out / "criteria.md").write_text(report.text())
    print(report.text())


if __name__ == "__main__":
    main()
