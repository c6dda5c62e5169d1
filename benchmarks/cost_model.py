"""How far predicted latency ratios are from measured ones, with the built-in profile and with this machine's own.

    python benchmarks/cost_model.py                       # a table per kind of plan
    python benchmarks/cost_model.py --keep measured.json  # measures once; later calls only predict again
    python benchmarks/cost_model.py --seed 1              # other widths, other plans
    python benchmarks/cost_model.py --detail              # every plan
    python benchmarks/cost_model.py --absolute            # and predicted over measured milliseconds of dense networks

Networks: those in models/, and convolutional ones and perceptrons of random widths built here. Plans: budgets of 0.7,
0.5 and 0.35 of predicted latency with random scores, and random widths, in multiples of the step (aligned) and of one
(ragged). The small networks take turns with the dense one in ONNX Runtime, one thread, batch 1; the error is predicted
over measured ratio less one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfe_fx
from kfe_fx.cost.count import CostModel
from kfe_fx.cost.device import this_device
from kfe_fx.cost.latency import RooflineLatency
from kfe_fx.cost.profile import Profile
from kfe_fx.cost.solver import CAP, select_budget
from kfe_fx.cost.steps import Stepper, protected_units
from kfe_fx.labels.analysis import Analysis, analyze
from kfe_fx.passes.shrink import Shrink
from kfe_fx.plan import Plan
from kfe_fx.runtime.inputs import feeds
from kfe_fx.runtime.measure import compare
from kfe_fx.runtime.session import make_session
from kfe_fx.runtime.template import Template

MODELS = Path(__file__).resolve().parents[1] / "models"
BUDGETS = (0.7, 0.5, 0.35)
STEP = 16
SECONDS = 8.0
KINDS = ("budget", "aligned", "ragged")


class Plain(nn.Module):
    """Convolutions and poolings in a row, then two linear layers."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        sizes = [3, *widths]
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(sizes, widths, strict=False))
        self.wide, self.last = nn.Linear(widths[-1] * 16, 128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = F.relu(layer(x))
            if index % 2:
                x = F.max_pool2d(x, 2)
        return self.last(F.relu(self.wide(x.flatten(1))))


class Separable(nn.Module):
    """Depthwise and pointwise convolutions in turn."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, 2, 1)
        pairs = list(pairwise(widths))
        self.depthwise = nn.ModuleList(nn.Conv2d(a, a, 3, 1 + i % 2, 1, groups=a) for i, (a, _) in enumerate(pairs))
        self.pointwise = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in pairs)
        self.last = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for depthwise, pointwise in zip(self.depthwise, self.pointwise, strict=True):
            x = F.relu(pointwise(F.relu(depthwise(x))))
        return self.last(x.mean((2, 3)))


class Branches(nn.Module):
    """Two branches that are concatenated, over and over."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, 2, 1)
        pairs = list(pairwise(widths))
        self.left = nn.ModuleList(nn.Conv2d(2 * a if i else a, b, 1) for i, (a, b) in enumerate(pairs))
        self.right = nn.ModuleList(nn.Conv2d(2 * a if i else a, b, 3, 1, 1) for i, (a, b) in enumerate(pairs))
        self.last = nn.Linear(2 * widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for left, right in zip(self.left, self.right, strict=True):
            x = torch.cat([F.relu(left(x)), F.relu(right(x))], 1)
        return self.last(x.mean((2, 3)))


class Perceptron(nn.Module):
    """Linear layers in a row."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def networks(seed: int) -> Iterable[tuple[str, kfe_fx.Program]]:
    for path in sorted(MODELS.glob("*.pt")):
        yield path.stem, kfe_fx.load(path)
    image = torch.randn(2, 3, 32, 32)
    made: list[tuple[str, Callable[[list[int]], nn.Module], int, Tensor]] = [
        ("plain", Plain, 6, image),
        ("separable", Separable, 6, image),
        ("branches", Branches, 5, image),
        ("perceptron", Perceptron, 5, torch.randn(2, 256)),
        ("tokens", Perceptron, 5, torch.randn(2, 64, 256)),
    ]
    random = np.random.default_rng(seed)
    for name, build, depth, example in made:
        torch.manual_seed(0)
        widths = (random.integers(2, 9, depth) * 16).tolist()
        if build is Perceptron:
            widths = [256, *(4 * width for width in widths), 10]
        yield name, kfe_fx.capture(build(widths).eval(), example)


def plans(model: CostModel, analysis: Analysis, seed: int) -> list[tuple[str, list[int]]]:
    """Return (kind, removed units)."""
    random = np.random.default_rng(seed)
    found: list[tuple[str, list[int]]] = []
    for budget in BUDGETS:
        scores = random.random(len(analysis.units))
        chosen = select_budget(model, scores, RooflineLatency(model), budget, multiple_of=STEP)
        found.append(("budget", sorted(chosen.removed)))
    for kind, step, count in (("aligned", STEP, 4), ("ragged", 1, 2)):
        for _ in range(count):
            scores = random.random(len(analysis.units))
            stepper, protected = Stepper(model, step), protected_units(analysis, scores)
            gone: set[int] = set()
            for group in analysis.groups:
                track = stepper.track(group, scores, protected, CAP)
                gone.update(track.gone(int(random.integers(0, len(track) + 1))))
            found.append((kind, sorted(gone)))
    return found


def measured(
    program: kfe_fx.Program, model: CostModel, analysis: Analysis, seconds: float, seed: int
) -> list[dict[str, Any]]:
    template = Template(program)
    dense = make_session(template.model(program))
    sessions, examples, rows = [dense], [feeds(program, 1, 0)], []
    for kind, removed in plans(model, analysis, seed):
        small = Shrink(Plan.of_units(analysis, removed)).run(program).program
        sessions.append(make_session(template.model(small)))
        examples.append(feeds(small, 1, 0))
        rows.append({"kind": kind, "removed": removed})
    found = compare(sessions, examples, seconds=seconds)
    for row, ratio in zip(rows, found.ratios[1:], strict=True):
        row |= {"ratio": ratio.value, "half_width": ratio.half_width, "dense_ms": found.latencies[0].p50}
    return rows


def percent(errors: list[float]) -> str:
    return f"{100 * median(errors):5.1f} {100 * max(errors):5.1f}" if errors else f"{'-':>5s} {'-':>5s}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of measuring, per network")
    parser.add_argument("--seed", type=int, default=0, help="of widths and plans")
    parser.add_argument("--keep", type=Path, help="file of measurements, made where it is missing")
    parser.add_argument("--detail", action="store_true", help="print every plan")
    parser.add_argument("--absolute", action="store_true", help="print dense milliseconds too")
    parser.add_argument("--only", nargs="+", help="these networks")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kept = json.loads(arguments.keep.read_text()) if arguments.keep and arguments.keep.exists() else {}
    profiles = {"built-in": Profile(), "calibrated": this_device().profile}
    errors: dict[tuple[str, str, str], list[float]] = {}
    names = []
    for name, program in networks(arguments.seed):
        if arguments.only and name not in arguments.only:
            continue
        names.append(name)
        analysis = analyze(program)
        model = CostModel(program, analysis)
        if name not in kept:
            kept[name] = measured(program, model, analysis, arguments.seconds, arguments.seed)
            if arguments.keep:
                arguments.keep.write_text(json.dumps(kept))
        for profile_name, profile in profiles.items():
            latency = RooflineLatency(model, profile)
            dense = latency.predict(())
            if arguments.absolute:
                ms = kept[name][0]["dense_ms"]
                print(
                    f"{name:18s} {profile_name:10s} dense {ms:.3f} ms, predicted over measured {dense / 1e6 / ms:.2f}"
                )
            for row in kept[name]:
                ratio = latency.predict(row["removed"]) / dense
                error = ratio / row["ratio"] - 1
                errors.setdefault((name, profile_name, row["kind"]), []).append(abs(error))
                if arguments.detail:
                    print(
                        f"{name:18s} {profile_name:10s} {row['kind']:8s} measured {row['ratio']:.3f} "
                        f"(±{100 * row['half_width']:.1f} %) predicted {ratio:.3f} {100 * error:+6.1f} %"
                    )
    print("error of predicted ratios in %, median and largest")
    columns = [(profile, kind) for profile in profiles for kind in KINDS]
    print(f"{'':18s}" + "".join(f"{profile + ' ' + kind:>20s}" for profile, kind in columns))
    for name in names:
        print(f"{name:18s}" + "".join(f"{percent(errors[name, profile, kind]):>20s}" for profile, kind in columns))
    together = [percent([e for name in names for e in errors[name, profile, kind]]) for profile, kind in columns]
    print(f"{'all':18s}" + "".join(f"{cell:>20s}" for cell in together))


if __name__ == "__main__":
    main()
