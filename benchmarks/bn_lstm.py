"""Batch-normalised LSTMs beside the plain one: held-out accuracy or bits per character against epochs.

    python benchmarks/bn_lstm.py [TASK ...] [--out docs/benchmarks]      # all tasks, or some of them

Tasks: ``sequential`` and ``permuted`` (the ten digits among the glyphs, 14x14, one pixel a step, 196 steps, in reading
order or in one fixed true permutation of it), ``sequential784`` (28x28, a few epochs), ``chars`` (the next character of
Python source, 100 steps). Cells: ``lstm``, ``input`` (the input's side normalised, Laurent et al. 2015) and ``full``
(both sides and the cell state per channel, statistics of every step, Cooijmans et al. 2016). Each gets the same search,
the same learning rates at one seed, and is then run with its best one at three seeds: Adam, gradients clipped to norm
1, one thread, float32. Epochs are judged on the first quarter of what is held out, the ends on all of it. After
training the statistics are pooled and frozen (``finalise-recurrent``), all cells get some more steps at a quarter of
the rate, and the norms are folded where algebra allows: the last columns say what is left. Runs that ``bn_lstm.json``
holds already are not run again, so a stopped benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfe_fx
from kfe_fx.data.glyphs import glyphs, held_out
from kfe_fx.data.source_text import VOCABULARY, chars, held_out_chars
from kfe_fx.passes.batchnorm_recurrent import BatchnormRecurrent
from kfe_fx.passes.finalise_recurrent import FinaliseRecurrent
from kfe_fx.passes.fold_recurrent_batchnorm import FoldRecurrentBatchnorm

SEEDS = (0, 1, 2)
CELLS = ("lstm", "input", "full")
RATES = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
MORE_STEPS = 40  # behind the end, at a quarter of the rate, batch norms frozen
GAMMA = 0.1
DIGITS = 10  # the first classes of the glyphs; of all 36 no cell learns much in as many steps


@dataclass(frozen=True)
class Task:
    """One task: data, network, optimizer and how long."""

    hidden: int
    batch: int
    examples: int
    held: int
    epochs: int
    search_epochs: int
    rates: tuple[float, ...]
    pixels: int = 0  # side of a glyph, or 0 for characters
    permuted: bool = False


TASKS = {
    "sequential": Task(100, 50, 10_000, 10_000, 12, 3, RATES, 14),
    "permuted": Task(100, 50, 10_000, 10_000, 12, 3, RATES, 14, True),
    "sequential784": Task(100, 50, 5_000, 2_000, 3, 1, (2e-3,), 28),
    "chars": Task(200, 64, 6_400, 1_000, 6, 2, RATES),
}


class Classifier(nn.Module):
    """One pixel a step; the last hidden state says the class."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.layer, self.head = nn.LSTM(1, hidden, batch_first=True), nn.Linear(hidden, DIGITS)
        orthogonal(self.layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


class Characters(nn.Module):
    """Each step says the next character."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(VOCABULARY), 64)
        self.layer, self.head = nn.LSTM(64, hidden, batch_first=True), nn.Linear(hidden, len(VOCABULARY))
        orthogonal(self.layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(x))[0])


def orthogonal(layer: nn.LSTM) -> None:
    """Orthogonal matrices gate by gate and a forget gate that is open, for all cells alike."""
    with torch.no_grad():
        for part in layer.weight_hh_l0.chunk(4):
            nn.init.orthogonal_(part)
        nn.init.xavier_uniform_(layer.weight_ih_l0)
        layer.bias_ih_l0.zero_()
        layer.bias_hh_l0.zero_()
        layer.bias_ih_l0[layer.hidden_size : 2 * layer.hidden_size] = 1.0


def data_of(task: Task) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Draw what is trained on and what is held out."""
    if not task.pixels:
        (x, y), (u, v) = chars(task.examples, 0), held_out_chars(task.held)
        return (torch.from_numpy(x), torch.from_numpy(y)), (torch.from_numpy(u), torch.from_numpy(v))
    order = torch.arange(task.pixels**2)
    if task.permuted:
        order = torch.randperm(task.pixels**2, generator=torch.Generator().manual_seed(0))
    training = digits(glyphs(5 * task.examples, 1, size=task.pixels), order, task.examples)
    return training, digits(held_out(5 * task.held, size=task.pixels), order, task.held)


def digits(drawn: Any, order: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Keep the first ``count`` digits of what was drawn, their pixels in ``order`` as steps."""
    images, labels = torch.from_numpy(drawn[0]), torch.from_numpy(drawn[1])
    rows = (labels < DIGITS).nonzero().squeeze(1)[:count]
    return images[rows].flatten(1)[:, order].unsqueeze(-1), labels[rows]


def program_of(task: Task, cell: str, seed: int, example: Tensor) -> kfe_fx.Program:
    """Build, capture and, for two of the cells, rewrite an untrained network."""
    torch.manual_seed(seed)
    net = Classifier(task.hidden) if task.pixels else Characters(task.hidden)
    program = kfe_fx.capture(net, example[:2])
    if cell == "lstm":
        return program
    options: dict[str, Any] = {"mode": cell, "trained": False, "gamma": GAMMA, "t_max": example.shape[1]}
    if cell == "full":
        options |= {"cell_norm": "channel", "statistics": "step"}
    return BatchnormRecurrent(**options).run(program).program


def batches(data: tuple[Tensor, Tensor], size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(seed))
    for start in range(0, len(order) - size + 1, size):
        rows = order[start : start + size]
        yield data[0][rows], data[1][rows]


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def judge(task: Task, program: kfe_fx.Program, data: tuple[Tensor, Tensor]) -> float:
    """Return the held-out accuracy in percent, or bits per character."""
    program.eval()
    right, total = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(data[0]), 500):
            x, y = data[0][start : start + 500], data[1][start : start + 500]
            outputs = program(x)
            if task.pixels:
                right += float((outputs.argmax(-1) == y).sum())
            else:
                right += float(loss_of(outputs, y)) * y.numel() / math.log(2)
            total += y.numel()
    return right / total * (100 if task.pixels else 1)


def steps(program: kfe_fx.Program, optimizer: torch.optim.Optimizer, found: Iterator[tuple[Tensor, Tensor]]) -> None:
    program.train()
    for x, y in found:
        optimizer.zero_grad()
        loss_of(program(x), y).backward()
        nn.utils.clip_grad_norm_(program.module().parameters(), 1.0)
        optimizer.step()


def run(task: Task, cell: str, rate: float, seed: int, epochs: int, data: Any, *, end: bool) -> dict[str, Any]:
    """Train from scratch; return what is held out after each epoch, CPU seconds, and what folding leaves."""
    training, held = data
    few = held[0][: len(held[0]) // 4], held[1][: len(held[1]) // 4]
    program = program_of(task, cell, seed, training[0])
    optimizer = torch.optim.Adam(program.module().parameters(), lr=rate)
    curve: list[float] = []
    started = time.process_time()
    for epoch in range(epochs):
        steps(program, optimizer, batches(training, task.batch, 1000 * seed + epoch))
        curve.append(judge(task, program, few))
    made: dict[str, Any] = {"curve": curve, "seconds": time.process_time() - started}
    if end:
        made["end"] = judge(task, program, held)
    if end and cell != "lstm":
        program = FinaliseRecurrent().run(program).program
        made["pooled"] = judge(task, program, held)
    if end:  # the plain cell as well: what is gained may be due to the smaller rate
        some = (pair for _, pair in zip(range(MORE_STEPS), batches(training, task.batch, 77), strict=False))
        steps(program, torch.optim.Adam(program.module().parameters(), lr=rate / 4), some)
        made["more"] = judge(task, program, held)
    if end and cell != "lstm":
        folded = FoldRecurrentBatchnorm().run(program)
        made |= {"folded": judge(task, folded.program, held), "fold": str(folded.facts)}
    return made


def measure(name: str, place: Path) -> dict[str, Any]:
    """Search, then run three seeds; keep every run in ``place``."""
    task = TASKS[name]
    runs: dict[str, Any] = json.loads(place.read_text()) if place.exists() else {}
    data = data_of(task)

    def once(cell: str, rate: float, seed: int, epochs: int, *, end: bool) -> dict[str, Any]:
        key = f"{name} {cell} lr={rate:g} seed={seed} epochs={epochs}"
        if key not in runs:
            runs[key] = run(task, cell, rate, seed, epochs, data, end=end)
            place.write_text(json.dumps(runs, indent=1, sort_keys=True))
            print(f"{key}: {runs[key]['curve'][-1]:.2f} {runs[key]['seconds']:.0f} s", flush=True)
        return runs[key]

    found: dict[str, Any] = {}
    for cell in CELLS:
        searched = {rate: once(cell, rate, 0, task.search_epochs, end=False)["curve"][-1] for rate in task.rates}
        best = (max if task.pixels else min)(searched, key=lambda rate: searched[rate])
        found[cell] = (best, [once(cell, best, seed, task.epochs, end=True) for seed in SEEDS])
    return found


def table(name: str, found: dict[str, Any]) -> str:
    """Write the curves of one task: mean and range over the seeds."""
    task = TASKS[name]
    unit = "accuracy, %" if task.pixels else "bits per character"
    lines = [f"### {name}: {unit} on {task.held:,} held out, mean (range) of {len(SEEDS)} seeds", ""]
    epochs = " | ".join(f"epoch {n + 1}" for n in range(task.epochs))
    lines += [f"| cell | lr | {epochs} | end | {MORE_STEPS} more steps | folded | s |"]
    lines += ["|---" * (task.epochs + 6) + "|"]
    for cell, (rate, runs) in found.items():
        columns = [spread([one["curve"][epoch] for one in runs]) for epoch in range(task.epochs)]
        columns += [spread([one[key] for one in runs]) if key in runs[0] else "" for key in ("end", "more", "folded")]
        seconds = statistics.fmean(one["seconds"] for one in runs)
        lines.append(f"| {cell} | {rate:g} | {' | '.join(columns)} | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


def plot(found: dict[str, dict[str, Any]], place: Path) -> None:
    """Draw the curves of all tasks, one line a seed."""
    figure, axes = plt.subplots(1, len(found), figsize=(4.5 * len(found), 3.5), squeeze=False, layout="constrained")
    for axis, (name, cells) in zip(axes[0], found.items(), strict=True):
        for colour, (cell, (_, runs)) in enumerate(cells.items()):
            for seed, one in enumerate(runs):
                curve = one["curve"]
                axis.plot(range(1, len(curve) + 1), curve, color=f"C{colour}", label=cell if not seed else None)
        axis.set(title=name, xlabel="epoch", ylabel="accuracy, %" if TASKS[name].pixels else "bits per character")
        axis.legend()
    figure.savefig(place, dpi=100)


def spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", choices=[[], *TASKS], default=list(TASKS))
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    for name in arguments.tasks or list(TASKS):
        found[name] = measure(name, arguments.out / "bn_lstm.json")
        print(table(name, found[name]), flush=True)
    told = [
        "# Batch-normalised LSTMs beside the plain one\n\n`python benchmarks/bn_lstm.py`\n",
        *(table(name, cells) for name, cells in found.items()),
    ]
    (arguments.out / "bn_lstm.md").write_text("\n".join(told))
    plot(found, arguments.out / "bn_lstm.png")


if __name__ == "__main__":
    main()
