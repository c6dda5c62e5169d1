"""`kfe-fx sparsify`: single weights to zero, by a model of the loss or by magnitude."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from kfe_fx.cli import options, output, targets
from kfe_fx.cli.examples import load_examples

SUFFIXES = (".sparse.pruned.onnx", ".sparse.pruned.pt", ".sparse.pruned.json")
ROWS = 14  # of the table of rounds; the JSON file has them all
COLUMNS = ("round", "sparsity", "loss change, predicted", "realised", "loss")


class Share(click.ParamType):
    """A number above 0 and below 1."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read the number, or say what it is."""
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0.0 < number < 1.0:  # false for nan as well
            self.fail(f"{value!r} is no share of weights: give more than 0 and less than 1, as in 0.9", param, ctx)
        return number


class Penalty(click.ParamType):
    """A finite number of at least zero."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read the number, or say what is wrong with it."""
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0.0 <= number < math.inf:
            self.fail(f"{value!r} is not a number of at least zero", param, ctx)
        return number


@click.command("sparsify")
@options.MODEL
@click.option("--sparsity", type=Share(), required=True, help="Share of the weights that become zero, as 0.9.")
@click.option(
    "--criterion",
    type=options.Reference(*options.WEIGHT_CRITERIA, unoffered=options.CRITERIA),
    default="magnitude",
    show_default=True,
    metavar="NAME",
    help=f"How a weight is scored: {', '.join(options.WEIGHT_CRITERIA)}, or file.py:Class of your own with weights(). "
    "magnitude is the plain square, without the scale of the batch norm behind the weight that prune puts in; lamp is "
    "its share of the squares of its layer that are not smaller. lm and qm need targets; taylor and taylor-so look at "
    "one example at a time, which takes long.",
)
@click.option(
    "--rounds",
    type=options.COUNT,
    help="How often weights are scored anew on what is left. [default: 14; 1 for lamp, magnitude and random]",
)
@click.option(
    "--schedule",
    type=click.Choice(["exponential", "equal"]),
    default="exponential",
    show_default=True,
    help="Whether each round keeps the same fraction of what is left, or removes the same number.",
)
@click.option(
    "--penalty",
    type=Penalty(),
    default=0.0,
    show_default=True,
    help="Lambda: half of it times the squared weight is added to a score, which keeps steps small.",
)
@options.data
@options.judging
@click.option("--epochs", type=click.IntRange(min=0), help="Epochs of fine-tuning at the end; 0 for none.")
@click.option("--lr", type=options.Number(), help="Learning rate of the fine-tuning.")
@click.option("--optimizer", type=click.Choice(["adamw", "sgd"]), default="adamw", show_default=True)
@click.option(
    "--keep", multiple=True, metavar="GLOB", help="Keep these layers dense, as 'head' or 'layer4.*'. Repeatable."
)
@options.seed
@click.option(
    "-o",
    "--output",
    "folder",
    type=click.Path(path_type=Path),
    default=Path(),
    metavar="DIR",
    help="Where the three files go. [default: the current folder]",
)
@options.force
@options.loading
@options.as_json
@options.quiet
def command(
    *,
    model: Path,
    folder: Path,
    force: bool,
    as_json: bool,
    quiet: bool,
    arch: str | None,
    trust: bool,
    inputs: tuple[str, ...],
    data: str | None,
    val: str | None,
    evaluate: str | None,
    loss: str | None,
    **settings: Any,
) -> None:
    """Set single weights of a network to zero, the least important of all layers first.

    This makes no network faster: ONNX Runtime computes with zeros as with any number, and the files stay as
    large. `kfe-fx prune` removes whole units, which does save time. Sparse weights are for other runtimes and
    compressors, and to compare criteria.

    Weights are ranked together over the whole network; biases and affine parameters stay. What is zero stays
    zero through the fine-tuning. Writes MODEL.sparse.pruned.onnx, MODEL.sparse.pruned.pt and
    MODEL.sparse.pruned.json, which `kfe-fx verify` checks. MODEL is never touched.

    \b
    Examples:
      kfe-fx sparsify model.pt --sparsity 0.9 --data train.npz
      kfe-fx sparsify model.pt --sparsity 0.95 --criterion qm --rounds 140 --penalty 1e-3 --data train.npz
    """
    targets.require_model(model)
    targets.require_folder(folder, make=True)
    wanted = [folder / f"{model.stem}{suffix}" for suffix in SUFFIXES]
    targets.require_free(wanted, sources=[Path(p) for p in (model, data, val) if p], force=force)

    import kfe_fx
    from kfe_fx.curvature.distributed import launched
    from kfe_fx.training.losses import resolve_loss
    from kfe_fx.training.metrics import resolve_metric

    # what is quick to find wrong comes first
    found_loss, metric = resolve_loss(loss, None), resolve_metric(evaluate, None)
    examples, held = load_examples(data), load_examples(val)
    program = kfe_fx.load(model, data=examples, arch=arch, trust=trust, inputs=inputs)
    with launched() as group, output.progress(quiet=quiet or group.rank > 0) as report:
        result = kfe_fx.sparsify(
            program, data=examples, val=held, evaluate=metric, loss=found_loss, progress=report, **settings
        )
        if group.rank > 0:
            return
        paths = result.write(folder, model.stem, force=force)
    certificate = result.certificate
    if as_json:
        output.show_json({"model": model, "modified": True, "files": paths, **certificate.to_json()})
    elif not quiet:
        show(certificate, paths)


def show(certificate: Any, paths: Any) -> None:
    """Print the certificate as tables and notes."""
    click.echo(f"data: {certificate.data['note']}\n")
    rows = certificate.rounds_table()
    every = -(-len(rows) // ROWS)
    output.show_table(rows[::-1][::every][::-1], COLUMNS, numbers=range(len(COLUMNS)))
    click.echo()
    output.show_table(certificate.table(), ("", "before", "after"), numbers=(1, 2))
    click.echo(f"\nsparsity: {1 - certificate.reached:.4f} of the ranked weights; asked for {certificate.sparsity:g}")
    for text in certificate.remarks():
        click.echo(f"note: {text}")
    for path in paths:
        click.echo(f"wrote {path}")
