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
epochs of 5,000 glyphs, a cosine down to zero from the rate that ``rates`` found best for the tool at the budget
(``RATES``; what is repaired wants small steps, what is not large ones). Torch-Pruning gets its ratio by bisection until
it measures the same latency, widths in multiples of 16, and, in place of repair, re-estimated statistics. Seeds draw
examples and their order.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn

import kfe_fx
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
NETS = ("resnet", "mobilenet", "vit", "vgg")
BUDGETS = (0.5, 0.3, 0.15)
SEEDS = (0, 1, 2)
BEST = 6  # criteria (and settings of the peer) that the other networks get, by what they leave on the ResNet
RATES = {"kfe-fx": {0.5: 1e-4, 0.3: 1e-4, 0.15: 1e-3}, "peer": {0.5: 1e-3, 0.3: 1e-3, 0.15: 3e-3}}
SCAN = (1e-4, 3e-4, 1e-3, 3e-3)
TRAINING, HELD, BROKEN, EPOCHS, SCORED = 5_000, 10_000, 2_000, 2, 1024
NEAR, FINEST, TRIES = 0.02, 0.01, 9  # of the peer's bisection: in latency, in its ratio


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


def accuracy(program: Any, count: int = HELD) -> float:
    """Return the percentage of held-out examples that are named right."""
    images, labels = held()
    program.eval()
    with torch.no_grad():
        right = [(program(images[i : i + 250]).argmax(1) == labels[i : i + 250]).sum() for i in range(0, count, 250)]
    return 100 * float(torch.stack(right).sum()) / count


def tuned(program: kfe_fx.Program, seed: int, rate: float) -> float:
    finetune(program, training(seed), epochs=EPOCHS, lr=rate, seed=seed, threads=1)
    return accuracy(program)


def bare(program: kfe_fx.Program, plan: kfe_fx.Plan) -> kfe_fx.Program:
    """Remove what a plan names and repair nothing."""
    if plan.dropped:
        program = DropBranches(plan.dropped, always=True).run(program).program
    return Shrink(replace(plan, dropped=())).run(program).program


class Bench:
    """One network and the session that candidates are measured against."""

    def __init__(self, name: str, out: Path) -> None:
        self.name, self.program = name, network(name, out)
        self.session = make_session(onnx_bytes(self.program), threads=1)
        self.shared: Shared | None = None

    def latency(self, small: kfe_fx.Program) -> float:
        sessions = [self.session, make_session(onnx_bytes(small), threads=1)]
        return compare(sessions, [feeds(self.program, 1, 0), feeds(small, 1, 0)], seconds=2.0).ratios[1].value

    def ours(self, criterion: str, budget: float, seed: int) -> tuple[kfe_fx.Program, dict[str, Any]]:
        """Prune and repair with a criterion."""
        scored = tuple(part[:SCORED] for part in training(seed))
        job = prepare(
            self.program, budget=budget, criterion=criterion, data=scored, val=tuple(p[:2] for p in held()), epochs=0,
            seed=seed,
        )  # fmt: skip
        shared = Shared(stopwatch=None if self.shared is None else self.shared.stopwatch)
        started = time.process_time()
        small, plan, certificate = Rounds(job.program, job.settings, job.data, None, shared).run()
        seconds, self.shared = time.process_time() - started, shared
        row = {"after removal": accuracy(bare(self.program, plan), BROKEN), "after repair": accuracy(small)}
        row |= {"latency": self.latency(small), "cpu s": seconds}
        row["macs"] = certificate.after["macs"] / certificate.before["macs"]
        return small, row | {"dropped": list(plan.dropped), "loss": certificate.loss}

    def peer(self, setting: str, budget: float, seed: int) -> tuple[kfe_fx.Program, dict[str, Any]]:
        """Prune with Torch-Pruning to the same latency and re-estimate statistics."""
        images = GLYPHS.draw(2, 0)[0]
        low, high, best = 0.0, 0.99, None
        for _ in range(TRIES):
            ratio = (low + high) / 2
            module = pruned_by_peer(self.module(), setting, ratio, seed)
            small = kfe_fx.capture(module.eval(), images)
            found = self.latency(small)
            if best is None or abs(math.log(found / budget)) < abs(math.log(best[0] / budget)):
                best = found, ratio, small
            low, high = (low, ratio) if found < budget else (ratio, high)
            if abs(found / budget - 1) <= NEAR or high - low < FINEST:
                break
        assert best is not None
        found, ratio, small = best
        row: dict[str, Any] = {"after removal": accuracy(small, BROKEN), "ratio": ratio, "latency": self.latency(small)}
        small = ReestimateStatistics(tuple(part[:2048] for part in training(seed))).run(small).program
        return small, row | {"after repair": accuracy(small)}

    def run(self, method: str, budget: float, seed: int) -> dict[str, Any]:
        """Prune with a criterion or a setting of the peer, then fine-tune."""
        small, row = self.made(method, budget, seed)
        rates = RATES["peer" if method in PEERS else "kfe-fx"]
        return row | {"fine-tuned": tuned(small, seed, rates[min(rates, key=lambda at: abs(at - budget))])}

    def rates(self, method: str, budget: float, seed: int) -> dict[str, Any]:
        """Fine-tune the same pruned network at several rates."""
        small, row = self.made(method, budget, seed)
        found = {f"{rate:g}": tuned(copy.deepcopy(small), seed, rate) for rate in SCAN}
        return {name: row[name] for name in ("latency", "after repair")} | found

    def made(self, method: str, budget: float, seed: int) -> tuple[kfe_fx.Program, dict[str, Any]]:
        return (self.peer if method in PEERS else self.ours)(method, budget, seed)

    def module(self) -> nn.Module:
        """Build the network as a module of its source."""
        made: nn.Module = VGG() if self.name == "vgg" else import_module(f"kfe_fx.models.glyphs_{self.name}").build()
        made.load_state_dict(self.program.state_dict())
        return made.eval()


PEERS = tuple(
    f"{importance} {scope}"
    for importance in ("magnitude", "bn-scale", "lamp", "fpgm", "taylor", "hessian", "random")
    for scope in ("global", "local")
)


def pruned_by_peer(module: nn.Module, setting: str, ratio: float, seed: int) -> nn.Module:
    """Remove a share of all channels with Torch-Pruning, in widths of 16; the classifier's outputs stay."""
    import torch_pruning as tp

    kind, scope = setting.split()
    importances: dict[str, Callable[[], Any]] = {
        "magnitude": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "bn-scale": tp.importance.BNScaleImportance,
        "lamp": tp.importance.LAMPImportance,
        "fpgm": tp.importance.FPGMImportance,
        "taylor": tp.importance.GroupTaylorImportance,
        "hessian": tp.importance.GroupHessianImportance,
        "random": tp.importance.RandomImportance,
    }
    torch.manual_seed(seed)
    importance = importances[kind]()
    images, labels = (part[:SCORED] for part in training(seed))
    head = [child for child in module.modules() if isinstance(child, nn.Linear) and child.out_features == 36]
    pruner = tp.pruner.BasePruner(
        module, images[:2], importance=importance, pruning_ratio=ratio, global_pruning=scope == "global",
        ignored_layers=head, round_to=16, max_pruning_ratio=1.0, num_heads=heads_of(module),
    )  # fmt: skip
    if kind == "taylor":
        module.zero_grad()
        nn.functional.cross_entropy(module(images), labels).backward()
    elif kind == "hessian":
        module.zero_grad()
        importance.zero_grad()
        losses = nn.functional.cross_entropy(module(images[:128]), labels[:128], reduction="none")
        for number, loss in enumerate(losses):
            module.zero_grad()
            loss.backward(retain_graph=number + 1 < len(losses))
            importance.accumulate_grad(module)
    pruner.step()
    module.zero_grad()
    return module


def heads_of(module: nn.Module) -> dict[nn.Module, int]:
    """Name the heads of packed projections, which the peer cannot find by itself."""
    return {child.qkv: child.heads for child in module.modules() if hasattr(child, "qkv") and hasattr(child, "heads")}


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
            for budget in args.budgets:
                for method in chosen:
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


WHEN = ("after removal", "after repair", "fine-tuned")


def table(rows: dict[str, Any]) -> str:
    """Write a table per network and budget, the best after fine-tuning first, means (ranges) over seeds."""
    parts = []
    for net in NETS:
        for budget in BUDGETS:
            found = methods(rows, net, budget, (*names(), *PEERS))
            if not found:
                continue
            lines = [
                f"### {net} at {budget:g} of its latency (dense {rows.get(f'dense {net}', math.nan):.2f} %)\n",
                "| chosen by | seeds | latency | MACs | after removal | after repair | fine-tuned | CPU s |",
                "|---" * 8 + "|",
            ]
            for method in sorted(found, key=lambda name: -np.mean([row["fine-tuned"] for row in found[name]])):
                each = found[method]
                shown = [_spread([row[when] for row in each]) for when in WHEN]
                peer = " (Torch-Pruning)" if method in PEERS else ""
                macs = statistics.fmean(row.get("macs", math.nan) for row in each)
                cpu = statistics.fmean(row.get("cpu s", math.nan) for row in each)
                lines.append(
                    f"| {method}{peer} | {len(each)} | {statistics.fmean(row['latency'] for row in each):.3f} | "
                    f"{macs:.3f} | {' | '.join(shown)} | {cpu:.0f} |".replace("nan", "")
                )
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _spread(values: list[float]) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ({min(values):.1f}-{max(values):.1f})"


def plot(rows: dict[str, Any], place: Path) -> None:
    """Draw accuracy after repair against accuracy after fine-tuning, a panel per network."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(NETS), 3.6), layout="constrained")
    for axis, net in zip(figure.subplots(1, len(NETS), squeeze=False)[0], NETS, strict=True):
        for budget, marker in zip(BUDGETS, "os^", strict=True):
            for peer, colour in ((False, "tab:blue"), (True, "tab:orange")):
                points = [
                    (row["after repair"], row["fine-tuned"])
                    for key, row in rows.items()
                    if key.startswith(f"{net} {budget:g} ")
                    and "failed" not in row
                    and ((" ".join(key.split()[2:-1]) in PEERS) == peer)
                ]
                if points:
                    label = f"{'Torch-Pruning' if peer else 'kfe-fx'}, {budget:g}"
                    axis.scatter(*zip(*points, strict=True), marker=marker, c=colour, s=14, label=label)
        axis.set(title=net, xlabel="after repair, %", ylabel="fine-tuned, %")
        axis.legend(fontsize=6)
    figure.savefig(place)


ERRORS = (kfe_fx.KfeError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)


class Grid:
    """The file of what was run, and what is run into it; several processes may be at it."""

    def __init__(self, out: Path) -> None:
        self.out, self.place = out, out / "criteria.json"
        self.benches: dict[str, Bench] = {}

    @property
    def rows(self) -> dict[str, Any]:
        return json.loads(self.place.read_text()) if self.place.exists() else {}

    def keep(self, found: dict[str, Any]) -> None:
        with FileLock(self.place.with_suffix(".lock")):
            text = json.dumps(self.rows | found, indent=1, sort_keys=True)
            fresh = self.place.with_suffix(".part")
            fresh.write_text(text + "\n")
            fresh.replace(self.place)

    def run(self, part: str, net: str, budget: float, method: str, seed: int) -> None:
        key = f"{'rates ' if part == 'rates' else ''}{net} {budget:g} {method} {seed}"
        if key in self.rows:
            return
        if net not in self.benches:
            self.benches[net] = Bench(net, self.out)
            self.keep({f"dense {net}": accuracy(self.benches[net].program)})
        try:
            row = getattr(self.benches[net], part)(method, budget, seed)
        except ERRORS as error:
            row = {"failed": f"{type(error).__name__}: {error}"[:500]}
        self.keep({key: row})
        print(key, {name: value for name, value in row.items() if name not in ("dropped", "loss")}, flush=True)

    def document(self) -> str:
        rows = self.rows
        runs = {key: row for key, row in rows.items() if not key.startswith("rates ")}
        scans = {key.removeprefix("rates "): row for key, row in rows.items() if key.startswith("rates ")}
        plot({key: row for key, row in runs.items() if not key.startswith("dense ")}, self.out / "criteria.png")
        parts = [
            "# Criteria at equal latency",
            "`python benchmarks/criteria.py`",
            goals(runs),
            table(runs),
            scan(scans),
        ]
        return "\n\n".join(part for part in parts if part) + "\n"


def goals(rows: dict[str, Any]) -> str:
    """Set the best of kfe-fx beside the best of the peer: gaps to dense after fine-tuning."""
    lines = ["| network | of its latency | dense | kfe-fx, best | peer, best | gap over the peer's |", "|---" * 6 + "|"]
    for net in NETS:
        for budget in BUDGETS:
            ours, theirs = (methods(rows, net, budget, every) for every in (names(), PEERS))
            if not ours or not theirs or f"dense {net}" not in rows:
                continue
            dense = rows[f"dense {net}"]
            each = []
            for found in (ours, theirs):
                means = {name: statistics.fmean(row["fine-tuned"] for row in runs) for name, runs in found.items()}
                name = max(means, key=lambda name: means[name])
                each.append((name, means[name]))
            share = (dense - each[0][1]) / (dense - each[1][1]) if dense > each[1][1] else math.nan
            told = " | ".join(f"{value:.2f} ({name})" for name, value in each)
            lines.append(f"| {net} | {budget:g} | {dense:.2f} | {told} | {share:.2f} |".replace("nan", ""))
    return "\n".join(lines) if len(lines) > 2 else ""


def methods(rows: dict[str, Any], net: str, budget: float, every: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Gather the runs of a network at a budget by what chose."""
    found: dict[str, list[dict[str, Any]]] = {}
    for key, row in rows.items():
        if key.startswith(f"{net} {budget:g} ") and "failed" not in row:
            found.setdefault(" ".join(key.split()[2:-1]), []).append(row)
    return {name: runs for name, runs in found.items() if name in every}


def scan(rows: dict[str, Any]) -> str:
    """Write what each learning rate left."""
    head = "| network | of its latency | chosen by | after repair | " + " | ".join(f"{rate:g}" for rate in SCAN) + " |"
    lines = ["### After fine-tuning at several rates\n", head, "|---" * (4 + len(SCAN)) + "|"]
    for key, row in rows.items():
        net, budget, *method, _ = key.split()
        if "failed" not in row:
            told = " | ".join(f"{row[f'{rate:g}']:.2f}" for rate in SCAN)
            lines.append(f"| {net} | {budget} | {' '.join(method)} | {row['after repair']:.1f} | {told} |")
    return "\n".join(lines) if rows else ""


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
    text = grid.document()
    (args.out / "criteria.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
