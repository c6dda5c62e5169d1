"""What batch normalisation inside an LSTM costs in training, in multiples of nn.LSTM.

    python benchmarks/bn_cell_speed.py [--hidden 128 256] [--steps 64 256] [--batch 64] [--repeats 5] [--json FILE]

One forward and backward pass, gradients of all parameters, float32, one thread, as many inputs as hidden units.
``loop`` is the same layer step by step without any normalisation; ``input`` normalises the products with the inputs
(Laurent et al. 2016), ``full`` those with the hidden state too (Cooijmans et al. 2017), ``+ scalar`` and ``+ channel``
the cell state as well: each with statistics of its own at every step, except ``shared``. Figures are CPU seconds over
those of nn.LSTM in the same round, all taking turns in one process: the median, in brackets the least and the most.
The aim is 1.3 from 256 hidden units on, and 2 for 128.

``padded`` are batches whose lengths are uniform in 1 to T: ours against nn.LSTM on a packed sequence, both over nn.LSTM
on the padded batch, which computes the padding too. ``memory`` is the most bytes that PyTorch's allocator has handed
out in a pass, for T steps and for 2 T: the ratio is 2 where memory is linear in the length.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.profiler import ProfilerActivity, profile

from kfe_fx.recurrent.op import Arguments, recurrent

Job = Callable[[], Any]


class Case:
    """One layer and one batch, and what can be run of them."""

    def __init__(self, hidden: int, steps: int, batch: int) -> None:
        torch.manual_seed(0)
        self.hidden, self.steps = hidden, steps
        self.layer = nn.LSTM(hidden, hidden, batch_first=True)
        self.x = torch.randn(batch, steps, hidden)
        self.lengths = torch.randint(1, steps + 1, (batch,))
        self.lengths[0] = steps
        layer: Any = self.layer
        weights = (layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0)
        self.plain = Arguments(self.x, None, None, *weights)

    def normalised(self, sides: str, *, shared: bool = False, scalar: bool = False) -> Arguments:
        """Normalise some of "ih", "hh" and "c"."""
        rows = 1 if shared else self.steps
        added: dict[str, Any] = {"seen": torch.zeros(rows)}
        for side in sides.split():
            width = 4 * self.hidden if side != "c" else 1 if scalar else self.hidden
            added[f"gamma_{side}"] = nn.Parameter(torch.full((width,), 0.1))
            added[f"mean_{side}"] = None if scalar and side == "c" else torch.zeros(rows, width)
            added[f"var_{side}"] = torch.ones(rows, width)
        if "c" in sides and not scalar:
            added["beta_c"] = nn.Parameter(torch.zeros(self.hidden))
        return Arguments(**{**vars(self.plain), **added, "training": True, "shared": shared})

    def run(self, call: Arguments) -> Job:
        """Return a forward and backward pass of the operation."""
        args, options = call.call()
        learned = [value for value in args if isinstance(value, nn.Parameter)]

        def job() -> None:
            torch.autograd.grad(recurrent(*args, **options)[0].square().mean(), learned)

        return job

    def pytorch(self, *, packed: bool = False) -> Job:
        """Return a forward and backward pass of nn.LSTM."""
        learned = list(self.layer.parameters())

        def outputs() -> Tensor:
            if not packed:
                return self.layer(self.x)[0]
            sequence = pack_padded_sequence(self.x, self.lengths, batch_first=True, enforce_sorted=False)
            return pad_packed_sequence(self.layer(sequence)[0], batch_first=True)[0]

        def job() -> None:
            torch.autograd.grad(outputs().square().mean(), learned)

        return job

    def cells(self) -> dict[str, Job]:
        """Return the layers on whole sequences; the first is what the others are compared with."""
        gates = {"gate": torch.ones(1, self.hidden)}
        return {
            "nn.LSTM": self.pytorch(),
            "loop": self.run(Arguments(**{**vars(self.plain), **gates})),
            "input": self.run(self.normalised("ih")),
            "input, shared": self.run(self.normalised("ih", shared=True)),
            "full": self.run(self.normalised("ih hh")),
            "full, shared": self.run(self.normalised("ih hh", shared=True)),
            "full + scalar": self.run(self.normalised("ih hh c", scalar=True)),
            "full + channel": self.run(self.normalised("ih hh c")),
        }

    def padded(self) -> dict[str, Job]:
        """Return the layers on padded batches, by turns with nn.LSTM that does not know the lengths."""
        lengths = {"lengths": self.lengths}
        return {
            "nn.LSTM": self.pytorch(),
            "nn.LSTM, packed": self.pytorch(packed=True),
            "ours, plain": self.run(Arguments(**{**vars(self.plain), **lengths})),
            "ours, full": self.run(Arguments(**{**vars(self.normalised("ih hh")), **lengths})),
        }


def turns(jobs: dict[str, Job], repeats: int) -> dict[str, list[float]]:
    """Run jobs in turn; return the CPU seconds of each round but the first."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats + 1):
        for name, job in jobs.items():
            began = time.process_time()
            job()
            times[name].append(time.process_time() - began)
    return {name: found[1:] for name, found in times.items()}


def told(times: dict[str, list[float]]) -> dict[str, str]:
    """Return a cell of the table for each job but the first, and the first's milliseconds."""
    first, *others = times
    cells = {first: f"{1000 * statistics.median(times[first]):.0f} ms"}
    for name in others:
        ratios = [one / base for one, base in zip(times[name], times[first], strict=True)]
        cells[name] = f"{statistics.median(ratios):.2f} [{min(ratios):.2f} {max(ratios):.2f}]"
    return cells


def peak(job: Job) -> int:
    """Return the most bytes that a pass has held at once."""
    job()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        job()
    results: Any = found.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def table(title: str, rows: dict[str, dict[str, str]]) -> None:
    """Print cells, one case a column."""
    print(f"\n{title:18s}{''.join(f'{case:>20s}' for case in rows)}")
    for name in next(iter(rows.values())):
        print(f"{name:18s}{''.join(f'{cells[name]:>20s}' for cells in rows.values())}", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Training time of batch-normalised LSTMs over nn.LSTM.")
    parser.add_argument("--hidden", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--steps", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    parser.add_argument("--json", type=Path, help="file for the raw figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    raw: dict[str, Any] = {"whole": {}, "padded": {}, "memory": {}}
    cases = list(itertools.product(options.hidden, options.steps))
    for kind, jobs in (("whole", Case.cells), ("padded", Case.padded)):
        for hidden, steps in cases:
            case = Case(hidden, steps, options.batch)
            raw[kind][f"H={hidden} T={steps}"] = turns(jobs(case), options.repeats)
        table(kind, {case: told(times) for case, times in raw[kind].items()})
    hidden, steps = min(options.hidden), min(options.steps)
    once, twice = (Case(hidden, count, options.batch).cells() for count in (steps, 2 * steps))
    print(f"\nmemory, H={hidden}      T={steps}, MiB    2 T over T")
    for name in once:
        low, high = raw["memory"][name] = peak(once[name]), peak(twice[name])
        print(f"{name:18s}{low / 2**20:12.1f}{high / low:14.2f}")
    if options.json is not None:
        options.json.write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
