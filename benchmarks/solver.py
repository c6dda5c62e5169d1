"""How near the solver comes to the optimum, and how long it takes.

    python benchmarks/solver.py [--seeds 5]

Random scores (exponential) on the networks of models/, budgets of 0.7, 0.5 and 0.35 of the predicted latency, widths in
multiples of 16, 8 and 4: the loss of what the solver chooses, and of the search alone, relative to that of the exact
multiple-choice solver (HiGHS). Then the time of the solver for ResNet-50 (built from its configuration with
transformers, where that is installed).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

import kfe_fx
from kfe_fx.cost.count import CostModel
from kfe_fx.cost.exact import solve_exactly
from kfe_fx.cost.latency import RooflineLatency
from kfe_fx.cost.solver import CAP, Options, search_state, select_budget
from kfe_fx.errors import KfeError
from kfe_fx.labels.analysis import analyze
from kfe_fx.program import Program

MOST = 200_000  # combinations of stops; more take long to list
ROOT = Path(__file__).resolve().parents[1]


def networks() -> Iterator[tuple[str, Program]]:
    for path in sorted((ROOT / "models").glob("*.pt")):
        yield path.stem, kfe_fx.load(path)


def gaps(program: Program, seeds: int) -> tuple[list[tuple[float, float]], int]:
    """Return the loss of the solver and of the search alone relative to the optimum, less 1; and the cases refused."""
    model = CostModel(program, analyze(program))
    cost, found, refused = RooflineLatency(model), [], 0
    for seed in range(seeds):
        scores = np.random.default_rng(seed).exponential(size=len(model.analysis.units))
        for block in (16, 8, 4):
            for target in (0.7, 0.5, 0.35):
                chosen = select_budget(model, scores, cost, target, multiple_of=block)
                searched = select_budget(model, scores, cost, target, multiple_of=block, exact=0)
                if not searched.feasible:
                    continue
                state = search_state(model, scores, cost, Options(block, CAP))
                try:
                    best = solve_exactly([state], [target * cost.predict(())], MOST, searched.loss)  # type: ignore[list-item]  # latency is a sum
                except KfeError:
                    refused += 1
                    continue
                if best is not None and best.loss > 0:
                    found.append((100 * (chosen.loss / best.loss - 1), 100 * (searched.loss / best.loss - 1)))
    return found, refused


def _told(gaps: Iterable[float]) -> str:
    values = list(gaps)
    return f"{statistics.fmean(values):.2f} ({max(values):.2f})"


def resnet50() -> Program:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    return kfe_fx.capture(ResNetForImageClassification(ResNetConfig()).eval(), torch.randn(1, 3, 224, 224))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    print("| network | cases | solver: mean gap (largest), % | search alone | too large to be proved |")
    print("|---|---|---|---|---|")
    everything: list[tuple[float, float]] = []
    for name, program in networks():
        found, refused = gaps(program, arguments.seeds)
        everything += found
        print(f"| {name} | {len(found)} | {' | '.join(map(_told, zip(*found, strict=True)))} | {refused} |", flush=True)
    print(f"| all | {len(everything)} | {' | '.join(map(_told, zip(*everything, strict=True)))} | |\n")
    program = resnet50()
    model = CostModel(program, analyze(program))
    cost = RooflineLatency(model)
    scores = np.random.default_rng(0).exponential(size=len(model.analysis.units))
    for target in (0.7, 0.5, 0.35):
        started = time.process_time()
        select_budget(model, scores, cost, target)
        print(f"ResNet-50 at {target}: {time.process_time() - started:.3f} s")


if __name__ == "__main__":
    main()
