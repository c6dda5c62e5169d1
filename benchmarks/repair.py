"""Accuracy without any training: what removal leaves, with statistics re-estimated, and with every layer fitted anew.

    python benchmarks/repair.py [NET ...] [--budgets 0.5 0.3 0.15]

The glyph networks of models/, scored by "fisher" on 2,048 examples, cut to a share of their multiply-accumulates in
widths of 8; accuracy on 2,000 held-out glyphs.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import kfe_fx
from kfe_fx.models.tasks import GLYPHS
from kfe_fx.passes.reconstruct import Reconstruct
from kfe_fx.passes.reestimate_statistics import ReestimateStatistics
from kfe_fx.passes.shrink import Shrink

MODELS = Path(__file__).resolve().parents[1] / "models"
NETS = ("glyphs_resnet", "glyphs_mobilenet", "glyphs_vit")
SCORED, HELD = 2048, 2000


def accuracy(program: kfe_fx.Program) -> float:
    images, labels = GLYPHS.held_out(HELD)
    with torch.no_grad():
        right = [program.eval()(images[i : i + 200]).argmax(1) == labels[i : i + 200] for i in range(0, HELD, 200)]
    return 100 * float(torch.cat(right).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nets", nargs="*", default=list(NETS))
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.5, 0.3, 0.15])
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = GLYPHS.draw(SCORED, 0)
    print("| network | dense, % | MACs | removed, % | statistics re-estimated, % | repaired, % | fit, CPU s |")
    print("|---" * 7 + "|")
    for name in args.nets:
        program = kfe_fx.load(MODELS / f"{name}.pt")
        for budget in args.budgets:
            options = {"budget": budget, "metric": "macs", "multiple_of": 8, "depth": False}
            result = kfe_fx.prune(program, data=data, epochs=0, **options)
            bare = Shrink(result.plan).run(program).program
            fresh = ReestimateStatistics(data).run(bare).program
            started = time.process_time()
            fitted = Reconstruct(program, result.plan, data).run(bare).program
            seconds = time.process_time() - started
            shown = " | ".join(f"{accuracy(each):.1f}" for each in (bare, fresh, fitted))
            print(f"| {name} | {accuracy(program):.1f} | {budget:g} | {shown} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
