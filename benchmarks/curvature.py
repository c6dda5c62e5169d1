"""What curvature statistics cost, in multiples of a plain forward and backward pass over the same batch.

    python benchmarks/curvature.py [autoencoder resnet transformer attention lstm] [--repeats 5] [--eigh] [--json FILE]

``factors`` is one pass that adds up A and G (K-FAC, expand), ``S*`` one that adds up the second moments in given
orthogonal bases (EKFAC): both of the empirical Fisher, the network in evaluation mode. ``plain`` is the mean loss and
the gradients of all parameters. Figures are CPU seconds of one thread over those of the plain pass of the same round,
all contenders taking turns in one process: the median, in brackets the least and the most. Who takes longer than
``--limit`` seconds runs once. ``covers`` is the share of the parameters that a contender has statistics of.

The eigendecomposition of all factors stands apart; where a factor is wider than 2048 it takes minutes, and is done
with ``--eigh`` only. Ours measure S* in these bases where they are known. All others are dense orthogonal matrices of
the right shape (Householder reflections): the arithmetic is the same, and so is the time.

Memory is what PyTorch's allocator hands out, in a process of its own per pass: the most bytes that were taken since
the pass began and not yet given back. Parameters, data and given bases do not count; the gradients that plain leaves
behind and the statistics that ours leave behind ("kept") do; what oneDNN and BLAS take for themselves is not seen.
``beside`` is the ratio without what is kept. The aim is 1.5 times plain.

Peers are measured where they are installed: each has the batch ready-made, no progress bar, and the layers that it
knows; of EKFAC the update of the diagonal alone is timed. The last table is sum(S*) of a layer over the mean of the
squared norms of the examples' gradients, which every orthogonal basis keeps: it is 1 where the statistics are right.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from analysis import Block
from curvature_peers import PEERS, Case, Contender, Field, numel, reflection
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import kfe_fx
from kfe_fx.curvature import Store, find_blocks
from kfe_fx.curvature.fit import Fitter
from kfe_fx.curvature.statistics import Basis, Factors, Moments
from kfe_fx.training.batches import Batches

FAILURES = (RuntimeError, ValueError, LookupError, AttributeError, TypeError, AssertionError)
WHAT = ("factors", "S*")


# networks ------------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """The basic block of ResNet-18 (He et al. 2016)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        up, out = nn.Conv2d(inputs, width, 3, stride, 1, bias=False), nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.body = nn.Sequential(up, nn.BatchNorm2d(width), nn.ReLU(), out, nn.BatchNorm2d(width))
        skip = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        self.skip = nn.Identity() if inputs == width else skip

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


class Layers(nn.Module):
    """A ``layer``, used in some way that returns features [B, width], and a ``head``."""

    def __init__(self, layer: nn.Module, width: int, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.head, self.use = layer, nn.Linear(width, 10), use

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.use(self.layer, x))


def autoencoder() -> Case:
    """Build the deep autoencoder of Hinton & Salakhutdinov (2006) for 28x28 images."""
    widths = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Identity() if outputs in (30, 784) else nn.Tanh()]
    x = torch.rand(512, 784)
    return Case(nn.Sequential(*layers), x, x.clone())


def resnet() -> Case:
    """Build ResNet-18 with a stem for 32x32 images."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
    layers += [Residual(inputs, width, 1 + (inputs != width)) for inputs, width in itertools.pairwise(widths)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)]
    return Case(nn.Sequential(*layers), torch.randn(16, 3, 32, 32), torch.randint(0, 10, (16,)))


def transformer() -> Case:
    """Build a transformer encoder of four layers of width 128 over 64 tokens."""
    layer = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    module = nn.Sequential(nn.Linear(64, 128), Layers(encoder, 128, lambda encode, x: encode(x).mean(1)))
    return Case(module, torch.randn(32, 64, 64), torch.randint(0, 10, (32,)))


def attention() -> Case:
    """Build the like of ``transformer`` with attention made of nn.Linear, which peers can see."""
    blocks = nn.Sequential(*(Block(128, 4) for _ in range(4)))
    module = nn.Sequential(nn.Linear(64, 128), Layers(blocks, 128, lambda encode, x: encode(x).mean(1)))
    return Case(module, torch.randn(32, 64, 64), torch.randint(0, 10, (32,)))


def lstm() -> Case:
    """Build an LSTM of 256 units over the rows of 28x28 images."""
    module = Layers(nn.LSTM(28, 256, batch_first=True), 256, lambda layer, x: layer(x)[0][:, -1])
    return Case(module, torch.randn(64, 28, 28), torch.randint(0, 10, (64,)))


NETWORKS = {each.__name__: each for each in (autoencoder, resnet, transformer, attention, lstm)}


def build(name: str) -> Case:
    """Build a network, the same each time, in evaluation mode."""
    torch.manual_seed(0)
    case = NETWORKS[name]()
    case.module.eval()
    return case


def usages() -> dict[str, Case]:
    """Build the networks of the last table: each uses a layer in a way of its own."""
    labels, tokens, images = torch.randint(0, 10, (8,)), torch.randn(8, 5, 6), torch.randn(8, 4, 6, 6)
    uses: dict[str, tuple[nn.Module, int, Callable[[Any, Tensor], Tensor], Tensor]] = {
        "linear": (nn.Linear(6, 7), 7, lambda layer, x: layer(x[:, 0]).tanh(), tokens),
        "linear on [T, B, D]": (nn.Linear(6, 7), 7, lambda layer, x: layer(x.transpose(0, 1)).tanh().mean(0), tokens),
        "linear called twice": (nn.Linear(6, 6), 6, lambda layer, x: layer(layer(x[:, 0]).tanh()).tanh(), tokens),
    }
    for name, groups in (("conv2d", 1), ("conv2d, 2 groups", 2), ("conv2d, depthwise", 4)):
        uses[name] = nn.Conv2d(4, 8, 3, groups=groups), 8, lambda layer, x: layer(x).tanh().mean((2, 3)), images
    made = {name: Case(Layers(layer, width, use), x, labels) for name, (layer, width, use, x) in uses.items()}
    made["linear called twice"].shared = True
    return made


# contenders ----------------------------------------------------------------------------------------------------------


def ours(case: Case) -> Contender:
    """Prepare the passes of ``kfe_fx.curvature.fit``."""
    program = kfe_fx.capture(case.module, (case.x[:2],))
    found = find_blocks(program)
    batches = Batches(program, (case.x, case.y), len(case.x))
    fitter = Fitter(program, found, batches, None, "empirical", 1, 0, None)
    blocks = {block.name: block for block in found.blocks if block.kind == "kronecker"}
    known = {}
    for name, block in blocks.items():
        groups, high, wide = block.shape
        known[name] = Basis(reflection(wide).repeat(groups, 1, 1), reflection(high).repeat(groups, 1, 1))

    def run(made: Any) -> Any:
        fitter.run([made], 0, 1)
        return made

    def trace(made: Moments) -> float:
        sums = {name: each for name, each in made.sums.items() if blocks[name].weight.startswith("layer.")}
        return sum(float(each.S.sum()) / each.examples for each in sums.values())

    def eigh(always: bool) -> float | None:
        if not always and max(max(block.shape[1:]) for block in blocks.values()) > 2048:
            return None
        store = Store.of(program, found, sharing="expand")
        store.add_factors(run(Factors()))
        began = time.process_time()
        store.decompose()
        known.update(store.bases())
        return time.process_time() - began

    left = numel(program.tensor(each.parameter) for each in found.left_out)
    covers = 1 - left / numel(case.module.parameters())
    return Contender(lambda: run(Factors()), lambda: run(Moments(known)), trace, covers, eigh)


# measuring -----------------------------------------------------------------------------------------------------------


def contenders() -> Field:
    """Return ours and the peers that are installed, and say which are not."""
    found: Field = {"kfe-fx": ours}
    for pinned, prepare in PEERS.items():
        try:
            found[f"{prepare.__name__} {metadata.version(pinned.split('==')[0])}"] = prepare
        except metadata.PackageNotFoundError:
            print(f"without {prepare.__name__}, which is not installed: pip install {pinned}")
    return found


def turns(jobs: dict[str, Callable[[], Any]], repeats: int, limit: float) -> tuple[dict[str, Any], dict[str, str]]:
    """Run jobs in turn; return the CPU seconds of each round but the first, and why some do not run."""
    times: dict[str, Any] = {name: [] for name in jobs}
    errors: dict[str, str] = {}
    for turn in range(repeats + 1):
        for name, job in jobs.items():
            if name in errors or (turn and times[name][0] > limit):
                continue
            began = time.process_time()
            try:
                job()
            except FAILURES as error:
                errors[name] = f"{type(error).__name__}: {error}".split("\n")[0][:72]
            times[name].append(time.process_time() - began)
    return {name: each[1:] or each for name, each in times.items() if name not in errors}, errors


def ratio(seconds: list[float], plain: list[float]) -> str:
    """Write times over those of plain."""
    if len(seconds) == 1:
        return f"{seconds[0] / statistics.median(plain):.2f} (one run)"
    each = [mine / theirs for mine, theirs in zip(seconds, plain, strict=True)]
    return f"{statistics.median(each):.2f} ({min(each):.2f}-{max(each):.2f})"


def compare(name: str, field: Field, options: argparse.Namespace) -> dict[str, Any]:
    """Time all contenders on one network and print its table."""
    case = build(name)
    ready = {peer: prepare(case.own()) for peer, prepare in field.items()}
    eigh = ready["kfe-fx"].eigh(options.eigh)
    jobs: dict[str, Callable[[], Any]] = {"plain": case.plain}
    for peer, each in ready.items():
        jobs |= {f"{peer} factors": each.factors, f"{peer} S*": each.moments}
    times, errors = turns(jobs, options.repeats, options.limit)
    plain, total = statistics.median(times["plain"]), numel(case.module.parameters())
    print(
        f"\n{name}: {total:,} parameters, batch {len(case.x)}, plain {plain:.3f} s; eigendecompositions "
        + ("not measured (--eigh)" if eigh is None else f"{eigh:.1f} s, {eigh / plain:.1f} times plain")
    )
    print(f"{'':20s}covers  {'factors':22s}S*")
    for peer, each in ready.items():
        cells = [errors.get(f"{peer} {what}") or ratio(times[f"{peer} {what}"], times["plain"]) for what in WHAT]
        cells[1] = "" if cells[0] == cells[1] else cells[1]
        print(f"{peer:20s}{each.covers:6.0%}  {cells[0]:22s}{cells[1]}", flush=True)
    return {"seconds": times, "errors": errors, "eigh": eigh, "covers": {k: v.covers for k, v in ready.items()}}


def peak(name: str, what: str) -> dict[str, float]:
    """Return the MiB that a pass takes at most, and what it keeps."""
    case = build(name)
    made = None if what == "plain" else ours(case)
    job = case.plain if made is None else made.factors if what == "factors" else made.moments
    job()  # what is set up once
    case.module.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        result = job()
    results: Any = found.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    held = list(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    del result
    return {"peak": max(held) / 2**20, "kept": held[-1] / 2**20}


def memory(name: str) -> dict[str, dict[str, float]]:
    """Measure the passes over one network in processes of their own and print a line."""
    found = {}
    for what in ("plain", *WHAT):
        command = [sys.executable, __file__, name, "--memory", what]
        printed = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ).stdout
        found[what] = json.loads(printed.splitlines()[-1])
    plain, line = found["plain"]["peak"], ""
    for most, kept in ((found[what]["peak"], found[what]["kept"]) for what in WHAT):
        line += f"{most:10.1f}{kept:7.1f}{most / plain:7.2f}{(most - kept) / plain:8.2f}"
    print(f"{name:14s}{plain:7.1f}{line}", flush=True)
    return found


def traces(field: Field) -> dict[str, dict[str, float | str]]:
    """Print sum(S*) of a layer over the mean squared norm of each example's gradient, per use of it."""
    print(f"\nsum(S*) / mean |gradient|^2\n{'':20s}{''.join(f'{peer:20s}' for peer in field)}".rstrip())
    torch.manual_seed(0)
    made: dict[str, dict[str, float | str]] = {}
    for usage, case in usages().items():
        parameters = list(case.module.get_submodule("layer").parameters())
        losses = case.loss(case.module(case.x), "none")
        grads = [grad for each in losses for grad in torch.autograd.grad(each, parameters, retain_graph=True)]
        truth = sum(float(grad.square().sum()) for grad in grads) / len(losses)
        row = made[usage] = {}
        for peer, prepare in field.items():
            try:
                ready = prepare(case.own())
                row[peer] = round(ready.trace(ready.moments()) / truth, 4)
            except FAILURES:
                row[peer] = "error"
        print(f"{usage:20s}{''.join(f'{value!s:20s}' for value in row.values())}".rstrip())
    return made


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Cost of curvature statistics over plain training.")
    parser.add_argument("networks", nargs="*", metavar="network", help=", ".join(NETWORKS))
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    parser.add_argument("--limit", type=float, default=15, help="who takes longer (in seconds) runs once")
    parser.add_argument("--eigh", action="store_true", help="decompose factors of any width")
    parser.add_argument("--json", type=Path, help="file for the raw figures")
    parser.add_argument("--memory", choices=("plain", *WHAT), help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.networks or list(NETWORKS)
    if unknown := [name for name in names if name not in NETWORKS]:
        parser.error(f"there is no network {unknown[0]}; choose {', '.join(NETWORKS)}")
    torch.set_num_threads(1)
    if options.memory:
        print(json.dumps(peak(names[0], options.memory)))
        return
    warnings.simplefilter("ignore", FutureWarning)  # peers use what torch is about to drop
    field = contenders()
    raw: dict[str, Any] = {"networks": {name: compare(name, field, options) for name in names}}
    side = f"{'peak':>8s}{'kept':>7s}{'ratio':>7s}{'beside':>8s}"
    print(f"\npeak memory, MiB{'factors':>14s}{'S*':>31s}\n{'':14s}{'plain':>7s}  {side}  {side}")
    raw["memory"] = {name: memory(name) for name in names}
    raw["traces"] = traces(field)
    if options.json is not None:
        options.json.write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
