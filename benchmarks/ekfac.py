"""EKFAC beside SGD, AdamW and K-FAC: loss against steps and against CPU seconds.

    python benchmarks/ekfac.py [--out docs/benchmarks]
    python benchmarks/ekfac.py --steps-only        # the time of a step alone, interleaved

Two networks on rendered glyphs of 28x28: the autoencoder 784-1000-500-250-30-mirror (tanh, batch 512, half the squared
error of an image) and a small convolutional classifier (batch 128). Each optimizer gets the same search, six settings
with one seed, is then run with its best setting and three seeds, and every run is one thread, at a constant learning
rate. First-order runs take 300 steps, second-order ones 100. Seconds are CPU seconds of the process. Runs that are in
``ekfac.json`` already are not run again, so a stopped benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfe_fx
from kfe_fx.data.glyphs import CLASSES, glyphs
from kfe_fx.optim import EKFAC, KFAC
from kfe_fx.optim.moving import decompose

IMAGES, SIZE, SMOOTH = 20_480, 28, 5
SEEDS = (0, 1, 2)
FIRST, SECOND = 300, 100
RATES = {
    ("autoencoder", "sgd"): (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    ("convnet", "sgd"): (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0),
    ("autoencoder", "adamw"): (2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2),
    ("convnet", "adamw"): (2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2),
}
DAMPINGS = (2e-4, 5e-4, 1e-3)
Make = Callable[..., torch.optim.Optimizer]


def autoencoder() -> nn.Module:
    widths = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.Identity() if after in (30, 784) else nn.Tanh()]
    return nn.Sequential(*layers)


def convnet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten()),
        nn.Linear(576, len(CLASSES)),
    )


def square(outputs: Tensor, inputs: Tensor, _: Tensor) -> Tensor:
    return 0.5 * (outputs - inputs).square().sum(1).mean()


def cross_entropy(outputs: Tensor, _: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels)


# network, loss, batch, what losses are divided by in tables, shape of an example, trust regions in nats (an image of
# 784 pixels has some 400, a label less than four)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Any, int, float, tuple[int, ...], tuple[float, float]]] = {
    "autoencoder": (autoencoder, square, 512, 784 / 2, (784,), (0.1, 0.3)),
    "convnet": (convnet, cross_entropy, 128, 1.0, (1, SIZE, SIZE), (3e-4, 1e-3)),
}
CURVATURE: dict[str, Make] = {
    "kfac": lambda program, **o: KFAC(program, **o),
    "ekfac": lambda program, **o: EKFAC(program, **o),
    "ekfac every 50": lambda program, **o: EKFAC(program, refresh=50, **o),
    "ekfac rank 64": lambda program, **o: EKFAC(program, rank=64, **o),
}


def make(name: str, program: kfe_fx.Program, options: dict[str, Any]) -> torch.optim.Optimizer:
    if name in CURVATURE:
        return CURVATURE[name](program, **options)
    parameters = program.module().parameters()
    if name == "adamw":
        return torch.optim.AdamW(parameters, **options)
    return torch.optim.SGD(parameters, momentum=0.9, nesterov=True, **options)


def settings(network: str, name: str) -> list[dict[str, Any]]:
    if name not in CURVATURE:
        return [{"lr": rate} for rate in RATES[network, name]]
    return [{"kl_clip": trust, "damping": damping} for trust in NETWORKS[network][5] for damping in DAMPINGS]


def batches(images: Tensor, labels: Tensor, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(images), generator=generator)
        for start in range(0, len(images) - size + 1, size):
            rows = order[start : start + size]
            yield images[rows], labels[rows]


def run(network: str, name: str, options: dict[str, Any], seed: int, data: tuple[Tensor, Tensor], steps: int) -> Any:
    """Train from scratch; return losses and CPU seconds after each step, or as far as it got."""
    build, loss_of, size, scale, shape, _ = NETWORKS[network]
    torch.manual_seed(seed)
    program = kfe_fx.capture(build(), (torch.zeros(2, *shape),)).train()
    module, optimizer = program.module(), make(name, program, options)
    losses: list[float] = []
    seconds: list[float] = []
    start = time.process_time()
    for inputs, labels in batches(data[0].reshape(-1, *shape), data[1], size, seed):
        optimizer.zero_grad()
        loss = loss_of(module(inputs), inputs, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item() / scale)
        seconds.append(time.process_time() - start)
        if len(losses) == steps or not np.isfinite(losses[-1]) or losses[-1] > 10 * losses[0]:
            break
    return {"losses": losses, "seconds": seconds}


def final(found: Any, steps: int) -> float:
    return statistics.fmean(found["losses"][-SMOOTH:]) if len(found["losses"]) == steps else float("inf")


def step_times(data: tuple[Tensor, Tensor], repeats: int) -> None:
    """Print the time of one step on the autoencoder over that of SGD, interleaved; decompositions on their own line."""
    build, loss_of, size, _, shape, _ = NETWORKS["autoencoder"]
    contenders: dict[str, tuple[Any, torch.optim.Optimizer]] = {}
    for name in ("sgd", "adamw", *CURVATURE):
        torch.manual_seed(0)
        program = kfe_fx.capture(build(), (torch.zeros(2, *shape),)).train()
        contenders[name] = program, make(name, program, {"lr": 1e-4})
    times: dict[str, list[float]] = {name: [] for name in contenders}
    feed = batches(data[0].reshape(-1, *shape), data[1], size, 0)
    for number in range(1 + 50 * repeats):  # whole periods of every schedule, after a first step that warms up
        inputs, labels = next(feed)
        for name, (program, optimizer) in contenders.items():
            start = time.process_time()
            optimizer.zero_grad()
            loss_of(program.module()(inputs), inputs, labels).backward()
            optimizer.step()
            if number:
                times[name].append(time.process_time() - start)
    plain = np.array(times["sgd"]).reshape(repeats, -1).mean(1)
    print(f"one step of SGD on the autoencoder, batch {size}: {1e3 * plain.mean():.0f} ms; a step in steps of SGD:")
    for name, taken in times.items():
        ratios = np.array(taken).reshape(repeats, -1).mean(1) / plain
        print(f"  {name:16} {np.median(ratios):5.2f}   ({ratios.min():.2f} to {ratios.max():.2f})")
    ekfac = contenders["ekfac"][1]
    assert isinstance(ekfac, EKFAC)
    start = time.process_time()
    for block in ekfac.blocks:
        decompose(dict(ekfac.block_state(block)))
    print(f"  all eigenbases   {(time.process_time() - start) / plain.mean():5.1f}   (float64, once every refresh)")


def report(network: str, results: dict[str, Any], out: Path) -> None:
    """Print and write the table and the plot of one network."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    names = [name for name in ("sgd", "adamw", *CURVATURE) if name in results]
    target = statistics.fmean(final(one, FIRST) for one in results["adamw"]["runs"])
    rows = [
        "| optimizer | setting | loss at 50 | 100 | 300 | steps to AdamW's 300 | CPU s to it |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        runs = results[name]["runs"]
        losses = np.array([smooth(one["losses"]) for one in runs])
        seconds = np.array([one["seconds"] for one in runs])
        for axis, across in ((axes[0], np.arange(1, losses.shape[1] + 1)), (axes[1], seconds.mean(0))):
            (line,) = axis.plot(across, losses.mean(0), label=name)
            axis.fill_between(across, losses.min(0), losses.max(0), alpha=0.2, color=line.get_color())
        told = [f"{losses[:, k - 1].mean():.4f}" if losses.shape[1] >= k else "" for k in (50, 100, 300)]
        reached = [next((k for k, value in enumerate(one) if value <= target), None) for one in losses]
        steps = [k + 1 for k in reached if k is not None]
        took = [seconds[n][k] for n, k in enumerate(reached) if k is not None]
        whole = len(steps) == len(runs)
        shown = f"{min(steps)} to {max(steps)}" if whole else f"{len(steps)} of {len(runs)} runs"
        options = ", ".join(f"{key} {value:g}" for key, value in results[name]["best"].items())
        cost = f"{min(took):.0f} to {max(took):.0f}" if whole else ""
        rows.append(f"| {name} | {options} | {' | '.join(told)} | {shown} | {cost} |")
    for axis, label in zip(axes, ("steps", "CPU seconds, one thread"), strict=True):
        axis.axhline(target, color="grey", linewidth=0.7, linestyle=":")
        axis.set(xlabel=label, ylabel="training loss", yscale="log")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(out / f"ekfac-{network}.png", dpi=110)
    table = "\n".join(rows)
    print(f"\n{network} (target: AdamW after 300 steps, {target:.4f}; means of {len(SEEDS)} seeds)\n{table}")
    (out / f"ekfac-{network}.md").write_text(f"{table}\n", encoding="utf-8")


def smooth(losses: list[float]) -> list[float]:
    return [statistics.fmean(losses[max(0, k - SMOOTH + 1) : k + 1]) for k in range(len(losses))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--steps-only", action="store_true", help="measure the time of a step and stop")
    parser.add_argument("--repeats", type=int, default=2, help="periods of 50 steps that are timed")
    parser.add_argument("--network", choices=sorted(NETWORKS), action="append", help="only this one; repeatable")
    given = parser.parse_args()
    torch.set_num_threads(1)
    images, labels = glyphs(IMAGES, 0, SIZE)
    data = torch.from_numpy(images), torch.from_numpy(labels)
    if given.steps_only:
        step_times(data, given.repeats)
        return
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "ekfac.json"
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def known(network: str, name: str, options: dict[str, Any], seed: int, steps: int) -> Any:
        key = f"{network} {name} {json.dumps(options, sort_keys=True)} seed {seed} steps {steps}"
        if key not in kept:
            found = run(network, name, options, seed, data, steps)
            kept[key] = {part: [round(value, 5) for value in values] for part, values in found.items()}
            path.write_text(json.dumps(kept), encoding="utf-8")
            print(f"{key}: {final(found, steps):.4f}", flush=True)
        return kept[key]

    for network in given.network or NETWORKS:
        results: dict[str, Any] = {}
        for name in ("sgd", "adamw", *CURVATURE):
            steps = SECOND if name in CURVATURE else FIRST
            tried = [(final(known(network, name, one, 0, steps), steps), one) for one in settings(network, name)]
            best = min(tried, key=lambda pair: pair[0])[1]
            results[name] = {"best": best, "runs": [known(network, name, best, seed, steps) for seed in SEEDS]}
        report(network, results, given.out)


if __name__ == "__main__":
    main()
