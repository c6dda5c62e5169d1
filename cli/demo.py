"""`kfe-fx demo`: the main job, on a network that comes along."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import click

from kfe_fx.cli import options, output, prune
from kfe_fx.errors import BadFile

DATA = "glyphs:8000"
EPOCHS = 1
HELD_OUT = "glyphs:held-out"


@click.command("demo")
@click.option(
    "-o",
    "--output",
    "folder",
    type=click.Path(path_type=Path),
    default=Path("demo"),
    show_default=True,
    metavar="DIR",
    help="Where the files go; those of an earlier demo are replaced.",
)
@click.option("--budget", type=options.Fraction(), default=0.5, show_default=True, help="What latency may remain.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of all sampling.")
@options.as_json
@options.quiet
def command(*, folder: Path, budget: float, seed: int, as_json: bool, quiet: bool) -> None:
    """Prune a small trained network that comes along, in a few minutes.

    A residual network that reads characters is made twice as fast in ONNX Runtime, fine-tuned on characters
    drawn on the spot, measured on others, and proved. The first line is the `kfe-fx prune` that does the same.

    \b
    Example:
      kfe-fx demo
    """
    with resources.as_file(resources.files("kfe_fx.models") / "glyphs_resnet.pt") as model:
        if not model.exists():
            raise BadFile(f"{model}: the network of the demo is missing; install kfe-fx again")
        if not (as_json or quiet):
            click.echo(
                f"$ kfe-fx prune {output.short(model)} --budget {budget:g} --data {DATA} --val {HELD_OUT} "
                f"--epochs {EPOCHS} --seed {seed} -o {folder} --force"
            )
        prune.run(
            prune.Job(
                model=model,
                folder=folder,
                force=True,
                as_json=as_json,
                quiet=quiet,
                loading={},
                data=DATA,
                val=HELD_OUT,
                evaluate=None,
                loss=None,
                settings={"budget": budget, "epochs": EPOCHS, "seed": seed},
            )
        )
