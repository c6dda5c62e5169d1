"""Options that several commands share, and the values they take."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from kfe_fx.errors import UsageError

Function = TypeVar("Function", bound=Callable[..., Any])


class Fraction(click.ParamType):
    """A budget: what may remain, more than 0 and at most 1."""

    name = "fraction"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read the number, or say what a budget is."""
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0.0 < number <= 1.0:  # false for nan as well
            self.fail(
                f"{value!r} is no budget: give what may remain, more than 0 and at most 1, as in 0.5",
                param,
                ctx,
            )
        return number


class Budget(click.ParamType):
    """A budget as `kfe_fx.cost.budget` reads it; the text is handed on."""

    name = "budget"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Check the form."""
        from kfe_fx.cost.budget import read_limit

        try:
            read_limit(str(value), "latency")
        except UsageError as error:
            self.fail(str(error), param, ctx)
        return str(value)


class Number(click.ParamType):
    """A finite number above zero."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read the number, or say what is wrong with it."""
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0.0 < number < math.inf:
            self.fail(f"{value!r} is not a number above zero", param, ctx)
        return number


class Reference(click.ParamType):
    """A function by place and name: `file.py:name` or `package.module:name`."""

    name = "file.py:name"

    def __init__(self, *named: str) -> None:
        self.named = named  # words that stand for something built in

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Check the form; the file is read when it is needed."""
        if value in self.named:
            return str(value)
        place, _, name = str(value).rpartition(":")
        if not place or not name.isidentifier():
            forms = (*self.named, "file.py:name", "package.module:name")
            self.fail(f"{value!r} does not name a function: write {' or '.join(forms)}", param, ctx)
        return str(value)


MODEL = click.argument("model", type=click.Path(path_type=Path))

COUNT = click.IntRange(min=1)


def stack(*decorators: Callable[[Function], Function]) -> Callable[[Function], Function]:
    """Join options into one decorator; help lists them in this order."""

    def apply(function: Function) -> Function:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


# How a model file becomes a program.
loading = stack(
    click.option(
        "--arch",
        type=Reference(),
        help="For a state dict: the function that builds the module, and may return "
        "(module, example_inputs[, dynamic_axes]).",
    ),
    click.option(
        "--trust",
        is_flag=True,
        help="Load a pickled module or a .pt2, which can run any code from the file.",
    ),
    click.option(
        "--input",
        "inputs",
        multiple=True,
        metavar="NAME=TYPE[DIMS]",
        help="An example input where the file has none, as x=float32[b,3,224,224]; letters are axes that "
        "stay dynamic. Repeatable.",
    ),
)

data = click.option(
    "--data",
    metavar="DATA",
    help="Examples to score and fine-tune with: an .npz with arrays x and y, a folder of images with one folder "
    "per class, file.py:factory (which runs it), glyphs:COUNT, chars:COUNT, tags:COUNT or digits. Bytes are never "
    "scaled by guess: add ?scale=255, or ?scale=255&mean=0.5&std=0.2, as in training. Without data, a sample in the "
    "program file scores, or drawn inputs do, and nothing is fine-tuned.",
)

# Where the examples only show what the network reads.
example_data = click.option(
    "--data", metavar="DATA", help="Where the file has no example input: take the first of these, as for prune."
)

bounds = stack(
    click.option(
        "--keep",
        multiple=True,
        metavar="GLOB",
        help="Leave these layers alone, as 'head' or 'layer4.*'. Repeatable.",
    ),
    click.option(
        "--floor",
        multiple=True,
        metavar="GLOB=N",
        help="Keep at least N units of each of these layers, or that fraction of them (0.5). Repeatable.",
    ),
    click.option("--cap", multiple=True, metavar="GLOB=N", help="Keep at most N units, or that fraction. Repeatable."),
)

# What is removed, and how it is chosen.
selecting = stack(
    click.option(
        "--metric",
        type=click.Choice(["latency", "macs", "params", "memory", "widths"]),
        default="latency",
        show_default=True,
        help="What a budget without a unit is of: measured ONNX Runtime latency, multiply-accumulates, parameters, "
        "peak activation memory, or the width of every layer.",
    ),
    click.option(
        "--criterion",
        type=click.Choice(["fisher", "taylor", "magnitude", "random"]),
        default="fisher",
        show_default=True,
        help="How a unit is scored.",
    ),
    click.option(
        "--multiple-of",
        type=COUNT,
        help="Keep widths at multiples of this. Default: the smallest step that is faster on the device, where latency "
        "is budgeted.",
    ),
    click.option(
        "--depth/--no-depth",
        default=True,
        show_default=True,
        help="Whether whole residual branches may go too.",
    ),
    click.option(
        "--heads",
        type=click.Choice(["auto", "heads", "positions"]),
        default="auto",
        show_default=True,
        help="What attention loses: whole heads, or the same positions of every head.",
    ),
    click.option(
        "--resize-state",
        is_flag=True,
        help="Let states of recurrent layers that are inputs or outputs lose hidden units too; the certificate and the "
        "metadata of the ONNX file tell their new widths.",
    ),
)

# What a network is judged by, and on what.
judging = stack(
    click.option("--val", metavar="DATA", help="Held-out examples; without it a seeded part of --data is held out."),
    click.option(
        "--eval",
        "evaluate",
        type=Reference("accuracy", "mse"),
        help="What to report: accuracy, mse, or a function (module, loader) -> float of which larger is better. "
        "Default: accuracy for integer targets, mse for floats.",
    ),
    click.option(
        "--loss",
        type=Reference("cross-entropy", "mse"),
        help="cross-entropy, mse, or a function (outputs, targets) -> loss. Default: cross-entropy for integer "
        "targets, mse for floats.",
    ),
    click.option("--batch-size", type=COUNT, default=64, show_default=True, help="Of the fine-tuning."),
)

seed = click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the split and all sampling."
)

# What latency is measured, or predicted, on.
device = stack(
    click.option(
        "--provider", default="CPUExecutionProvider", show_default=True, help="Of ONNX Runtime, to measure with."
    ),
    click.option(
        "--precision",
        type=click.Choice(["fp32", "int8"]),
        default="fp32",
        show_default=True,
        help="What is measured: the networks as they are, or int8 copies of them; what is written is float32.",
    ),
    click.option(
        "--target",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Prune for the device of this profile (from kfe-fx calibrate): latency is predicted, not measured.",
    ),
)

measuring = stack(
    click.option(
        "--threads", type=COUNT, default=1, show_default=True, help="Threads of ONNX Runtime when it is measured."
    ),
    click.option("--batch", type=COUNT, default=1, show_default=True, help="Batch size when it is measured."),
)

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else.")

quiet = click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")

force = click.option("-f", "--force", is_flag=True, help="Replace output files that exist.")
