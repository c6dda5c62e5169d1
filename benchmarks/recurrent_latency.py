"""Latency of recurrent networks in ONNX Runtime, one thread, batch 1: dense, pruned, folded, Scan; what pruning costs.

    python benchmarks/recurrent_latency.py forms           # one layer of H units in each of its forms, interleaved
    python benchmarks/recurrent_latency.py prune           # models/glyph_rows.pt to 0.5 and 0.25 of its latency

``forms``: an LSTM of 128, 256 and 512 units over 28 steps of 28: the plain layer, the same with half its units,
batch-normalised on the input's side or throughout and folded, with a scalar norm of the cell state, and throughout with
statistics of every step and a cell norm per channel (one Scan). Ratios to the plain layer, interleaved in one run, with
95 % intervals.

``prune``: the row classifier (LSTM of 512 units) pruned to half and to a quarter of its latency, fine-tuned on 480,000
glyphs of the kind that it was trained on (800,000 of them) with the dense network as the teacher; asked and measured
latency, and accuracy on 10,000 held-out glyphs before and after with a paired 95 % interval.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import kfe_fx
from kfe_fx.data.glyphs import glyphs, held_out
from kfe_fx.passes.batchnorm_recurrent import BatchnormRecurrent
from kfe_fx.passes.finalise_recurrent import FinaliseRecurrent
from kfe_fx.passes.fold_recurrent_batchnorm import FoldRecurrentBatchnorm
from kfe_fx.runtime.inputs import feeds
from kfe_fx.runtime.measure import compare
from kfe_fx.runtime.onnx_file import onnx_bytes
from kfe_fx.runtime.session import make_session

MODEL = Path(__file__).resolve().parents[1] / "models" / "glyph_rows.pt"
STEPS, INPUTS = 28, 28
TRAINING, JUDGED, HELD = 480_000, 2_000, 10_000  # 120,000 glyphs for 10 epochs cost 0.9 points at a quarter
SECONDS = 20.0


class Layer(nn.Module):
    """One LSTM that gives its last step."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.layer = nn.LSTM(INPUTS, hidden, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0][:, -1]


def forms(hidden: int) -> dict[str, kfe_fx.Program]:
    """Build one layer in each of its forms."""
    torch.manual_seed(0)
    example = torch.randn(2, STEPS, INPUTS)
    dense = kfe_fx.capture(Layer(hidden), example)
    made = {"LSTM": dense, f"LSTM of {hidden // 2}": kfe_fx.capture(Layer(hidden // 2), example)}
    data = (torch.randn(64, STEPS, INPUTS), None)
    for name, options in (
        ("input norm, folded", {"mode": "input", "statistics": "shared"}),
        ("full norm, shared, folded", {"mode": "full", "statistics": "shared"}),
        ("full norm, scalar cell norm", {"mode": "full", "statistics": "shared", "cell_norm": "scalar"}),
        ("full norm by step, channel cell norm (Scan)", {"mode": "full", "cell_norm": "channel"}),
    ):
        program = BatchnormRecurrent(trained=True, data=data, **options).run(dense).program
        if options.get("statistics") == "shared":
            program = FoldRecurrentBatchnorm().run(FinaliseRecurrent().run(program).program).program
        made[name] = program
    return made


def show_forms(seconds: float) -> None:
    for hidden in (128, 256, 512):
        made = forms(hidden)
        sessions = [make_session(onnx_bytes(program), threads=1) for program in made.values()]
        example = feeds(next(iter(made.values())), 1, 0)
        found = compare(sessions, [example] * len(sessions), seconds=seconds)
        print(f"\nH = {hidden}, {STEPS} steps of {INPUTS}, batch 1: {found.latencies[0].p50:.3f} ms\n")
        print("| form | latency, 95 % |\n|---|---|")
        for name, ratio in zip(made, found.ratios, strict=True):
            print(f"| {name} | {ratio.value:.2f} ({ratio.low:.2f}-{ratio.high:.2f}) |", flush=True)


def right(program: Any, images: Tensor, labels: Tensor) -> np.ndarray:
    """Tell for each image whether it is named right."""
    with torch.no_grad():
        parts = [program(images[start : start + 500]).argmax(1) for start in range(0, len(images), 500)]
    return (torch.cat(parts) == labels).numpy()


def show_prune(budgets: list[float], **options: Any) -> None:
    program = kfe_fx.load(MODEL)
    images, labels = (torch.from_numpy(part) for part in held_out(HELD, size=28))
    data = tuple(torch.from_numpy(part) for part in glyphs(TRAINING, 0, size=28))
    judged = tuple(torch.from_numpy(part) for part in glyphs(JUDGED, 99, size=28))
    before = right(program, images, labels)
    print(f"dense: {100 * before.mean():.2f} % of {HELD:,} held out\n")
    print("| asked | measured, 95 % | units left | accuracy, % | change, points (95 %) |\n|---|---|---|---|---|")
    for budget in budgets:
        result = kfe_fx.prune(program, budget=budget, data=data, val=judged, **options)
        after = right(result.program.eval(), images, labels)
        change = 100 * (after.astype(float) - before.astype(float))
        half = 1.96 * change.std(ddof=1) / np.sqrt(len(change))
        measured = result.certificate.measured["latency"]
        low, high = measured["interval"]
        print(
            f"| {budget:g} | {measured['ratio']:.3f} ({low:.3f}-{high:.3f}) | {result.certificate.after['units']} | "
            f"{100 * after.mean():.2f} | {change.mean():+.2f} ({change.mean() - half:+.2f} to "
            f"{change.mean() + half:+.2f}) |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["forms", "prune"])
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of measuring, per width")
    parser.add_argument("--epochs", type=int, default=2, help="of fine-tuning in all")
    parser.add_argument("--lr", type=float, default=2e-3, help="of the fine-tuning")
    parser.add_argument("--distil", type=float, default=0.9, help="share of the dense network's outputs in the loss")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.25])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.part == "forms":
        show_forms(arguments.seconds)
    else:
        show_prune(arguments.budgets, epochs=arguments.epochs, lr=arguments.lr, distil=arguments.distil)


if __name__ == "__main__":
    main()
