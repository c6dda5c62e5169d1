"""Options that several commands share, and the values they take."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

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
    """A finite number above zero, or zero as well, or any."""

    name = "number"

    def __init__(self, *, zero: bool = False, signed: bool = False) -> None:
        self.zero = zero
        self.signed = signed

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read the number, or say what is wrong with it."""
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if self.signed and not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        if not (self.signed or 0.0 < number < math.inf or (self.zero and number == 0.0)):
            self.fail(f"{value!r} is not a number {'of at least' if self.zero else 'above'} zero", param, ctx)
        return number


class Reference(click.ParamType):
    """A function by place and name: `file.py:name` or `package.module:name`."""

    name = "file.py:name"

    def __init__(self, *named: str, unoffered: tuple[str, ...] = ()) -> None:
        self.named = named  # words that stand for something built in
        self.unoffered = unoffered  # others, which are refused later by a better message

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Check the form; the file is read when it is needed."""
        if value in self.named or value in self.unoffered:
            return str(value)
        place, _, name = str(value).rpartition(":")
        if not place or not name.isidentifier():
            forms = (*self.named, "file.py:name", "package.module:name")
            self.fail(f"{value!r} does not name a function: write {' or '.join(forms)}", param, ctx)
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Offer what is built in, and files."""
        return _words_or_files(self.named, incomplete)


class Data(click.ParamType):
    """Examples, as ``kfe_fx.data`` reads them; the text is handed on."""

    name = "data"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Hand the text on."""
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Offer what is built in, and files and folders."""
        return _words_or_files(("glyphs:", "chars:", "tags:", "digits"), incomplete)


def _words_or_files(words: tuple[str, ...], incomplete: str) -> list[CompletionItem]:
    # files first: bash forgets what came before them
    made = [CompletionItem(incomplete, type="file")]
    return made + [CompletionItem(word) for word in words if word.startswith(incomplete)]


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
    type=Data(),
    metavar="DATA",
    help="Examples to score with, and to fine-tune on: an .npz with arrays x and y, a folder of images with one folder "
    "per class, file.py:factory (which runs it), glyphs:COUNT, chars:COUNT, tags:COUNT or digits. Bytes are never "
    "scaled by guess: add ?scale=255, or ?scale=255&mean=0.5&std=0.2, as in training. Without data, a sample in the "
    "program file scores, or drawn inputs do, and nothing is fine-tuned.",
)

# Where the examples only show what the network reads.
example_data = click.option(
    "--data",
    type=Data(),
    metavar="DATA",
    help="Where the file has no example input: take the first of these, as for prune.",
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

CRITERIA = (
    "bn-scale", "c-obd", "c-obs", "fisher", "fpgm", "group-fisher", "kfe", "kfe-product", "kron-obd", "kron-obs",
    "lamp", "lm", "magnitude", "obd", "qm", "random", "reconstruction", "taylor", "taylor-so",
)  # fmt: skip

# Those that score single weights too.
WEIGHT_CRITERIA = ("fisher", "lamp", "lm", "magnitude", "obd", "qm", "random", "taylor", "taylor-so")

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
        type=Reference(*CRITERIA),
        default="fisher",
        show_default=True,
        metavar="NAME",
        help=f"How a unit is scored: {', '.join(CRITERIA)}, or file.py:Class of your own.",
    ),
    click.option(
        "--repair",
        type=click.Choice(["auto", "mean", "none"]),
        default="auto",
        show_default=True,
        help="What mends the layers that stay, where there is data: a fit of each to what it computed before, by the "
        "method that is best on held-out examples; folded means alone; or nothing.",
    ),
    click.option(
        "--decompose/--no-decompose",
        default=False,
        show_default=True,
        help="Whether layers may become narrow products in their eigenbases, where that loses less than channels.",
    ),
    click.option(
        "--multiple-of",
        type=COUNT,
        help="Keep widths at multiples of this. Default: the smallest step that is faster on the device, where latency "
        "is budgeted.",
    ),
    click.option(
        "--crowding",
        type=Number(zero=True),
        help="How much dearer the last units of a layer are than the first: the score of the one that goes when i of "
        "n have gone counts (n/(n-i))^CROWDING times. Default: 0, 1 or 2, by trial.",
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
    click.option(
        "--val", type=Data(), metavar="DATA", help="Held-out examples; without it a seeded part of --data is held out."
    ),
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
    click.option("--batch-size", type=COUNT, default=64, show_default=True, help="Examples at a time."),
)

PENALTY = click.option(
    "--penalty",
    type=Number(zero=True),
    default=0.0,
    show_default=True,
    help="Lambda: half of it times a unit's squared weights is added to its score, which keeps steps small.",
)

STORE = click.option(
    "--store",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Curvature statistics of this model (from kfe-fx curvature) for the criteria that score by them, and for the "
    "repair. They must be as old as the weights.",
)


def feature(whose: str) -> Callable[[Function], Function]:
    """Make the option for activations that distillation compares with those of another network."""
    return click.option(
        "--feature",
        "features",
        multiple=True,
        metavar="GLOB",
        help=f"Compare the outputs of these modules with {whose} too. Repeatable.",
    )


# How rounds of removal and training share the work, and what is learned beside the targets.
training = stack(
    click.option("--epochs", type=click.IntRange(min=0), help="Epochs of fine-tuning in all; 0 for none."),
    click.option(
        "--lr",
        type=Number(),
        help="Learning rate of the fine-tuning. [default: 3e-4, sgd 3e-3; 1e-3, 1e-2 without repair]",
    ),
    click.option("--optimizer", type=click.Choice(["adamw", "sgd"]), default="adamw", show_default=True),
    click.option("--rounds", type=COUNT, help="Rounds of pruning, with fine-tuning between them."),
    click.option(
        "--schedule",
        type=click.Choice(["exponential", "equal", "one-shot", "netadapt", "theis"]),
        default="exponential",
        show_default=True,
        help="How rounds share out the removal: each keeps the same fraction, each removes as much, one round, one "
        "group of layers a round by trial (NetAdapt), or unit by unit in the middle of training (Theis).",
    ),
    PENALTY,
    click.option(
        "--distil",
        type=Number(zero=True),
        help="The share, 0 to 1, of the fine-tuning's loss that is the distance from the dense network's outputs; at 1 "
        "no targets are needed.",
    ),
    click.option("--temperature", type=Number(), help="Softens the classes that are compared. [default: 1]"),
    feature("the dense network's"),
    click.option(
        "--ewc",
        type=Number(zero=True),
        help="Lambda of the elastic penalty that holds the fine-tuned weights where the removal left them.",
    ),
    click.option(
        "--stop-at-loss", type=Number(signed=True), help="End the rounds before the held-out loss lies above this."
    ),
    click.option(
        "--stop-at-accuracy", type=Number(signed=True), help="End the rounds before the metric falls below this."
    ),
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
        "--cost-model",
        type=Reference("roofline"),
        default="roofline",
        show_default=True,
        metavar="NAME",
        help="What predicts latency: roofline, or file.py:Class of your own.",
    ),
    click.option(
        "--target",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Prune for the device of this profile (from kfe-fx calibrate): latency is predicted, not measured.",
    ),
)

batch = click.option("--batch", type=COUNT, default=1, show_default=True, help="Batch size when it is measured.")

# Of files; a network that is pruned for a profile takes the profile's threads.
measuring = stack(
    click.option(
        "--threads", type=COUNT, default=1, show_default=True, help="Threads of ONNX Runtime when it is measured."
    ),
    batch,
)

measuring_for = stack(
    click.option(
        "--threads",
        type=COUNT,
        help="Threads of ONNX Runtime when it is measured. [default: 1, with --target those of the profile]",
    ),
    batch,
)

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else.")

quiet = click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")

force = click.option("-f", "--force", is_flag=True, help="Replace output files that exist.")
