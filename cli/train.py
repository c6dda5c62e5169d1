"""`kfe-fx train`: a network on examples, first or second order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from kfe_fx.cli import options, output, targets
from kfe_fx.cli.examples import load_examples
from kfe_fx.errors import BadData, BadFile, UsageError

SUFFIX = ".checkpoint"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One call of the library, as the command line spelled it."""

    model: Path
    target: Path
    force: bool
    as_json: bool
    quiet: bool
    loading: dict[str, Any]  # arch, trust, inputs
    data: str
    val: str | None
    teacher: Path | None
    resume: bool
    settings: dict[str, Any]  # loss, evaluate, optimizer, epochs, ... handed on as they are

    @property
    def checkpoint(self) -> Path:
        """Where the run is kept until it is finished."""
        return Path(f"{self.target}{SUFFIX}")


def check_targets(job: Job) -> None:
    """Refuse what cannot be written, or gone on from, before any work is done.

    Raises:
        BadFile: the output exists or is an input, or there is a checkpoint too many or too few.
    """
    targets.require_model(job.model)
    if job.teacher is not None:
        targets.require_model(job.teacher)
    targets.require_folder(job.target.parent)
    sources = [Path(p) for p in (job.model, job.data, job.val, job.teacher) if p]
    targets.require_free([job.target], sources=sources, force=job.force)
    targets.require_free([job.checkpoint], sources=sources, force=True)
    there = job.checkpoint.exists()
    if job.resume and not there:
        raise BadFile(f"{job.checkpoint}: there is no checkpoint to go on from; leave out --resume to start")
    if there and not (job.resume or job.force):
        raise BadFile(f"{job.checkpoint}: a run was not finished; go on with --resume, or start anew with --force")


def run(job: Job) -> None:
    """Train, write the program file, and show how it went."""
    check_targets(job)

    import kfe_fx
    from kfe_fx.curvature.distributed import launched
    from kfe_fx.training.losses import resolve_loss
    from kfe_fx.training.metrics import resolve_metric

    # what is quick to find wrong comes first
    settings = dict(job.settings)
    settings["loss"] = resolve_loss(settings["loss"], None)
    settings["evaluate"] = resolve_metric(settings["evaluate"], None)
    data, val = load_examples(job.data), load_examples(job.val)
    program = kfe_fx.load(job.model, data=data, **job.loading)
    settings["teacher"] = None if job.teacher is None else kfe_fx.load(job.teacher, data=data, **job.loading)
    fresh = not job.checkpoint.exists()
    with launched() as group, output.progress(quiet=job.quiet or group.rank > 0) as report:
        try:
            facts = kfe_fx.train(
                program, data, val=val, checkpoint=job.checkpoint, resume=job.resume, progress=report, **settings
            )
        except (UsageError, BadData):
            if fresh and group.rank == 0:  # to be run again with other settings, which a checkpoint would not fit
                job.checkpoint.unlink(missing_ok=True)
            raise
        if group.rank > 0:
            return
        kfe_fx.save(program, job.target)
    job.checkpoint.unlink(missing_ok=True)
    show(job, facts, program.notes)


def show(job: Job, facts: dict[str, Any], notes: tuple[str, ...]) -> None:
    """Print the epochs as a table, or all facts as JSON."""
    told = [*notes, *facts["notes"]]
    if job.as_json:
        output.show_json({"model": job.model, "path": job.target, **facts, "notes": told})
        return
    if job.quiet:
        return
    click.echo(f"data: {facts['data']}")
    shared = f", {facts['processes']} processes" if facts["processes"] > 1 else ""
    again = f", resumed after epoch {facts['resumed']}" if facts["resumed"] is not None else ""
    click.echo(f"{facts['optimizer']}, lr {facts['lr']:g}, {facts['steps']:,} steps{shared}{again}\n")
    name, judged, best = facts["metric"], facts["judged"], facts["best_epoch"]
    rows = [
        (epoch, f"{loss:.4g}", *(f"{value:.4f}" for value in judged[epoch - 1 : epoch]))
        for epoch, loss in enumerate(facts["epoch_losses"], 1)
    ]
    columns = ("epoch", "training loss", *([name] if judged else []))
    output.show_table(rows, columns, numbers=range(len(columns)))
    if best is not None:
        click.echo(f"\nkept: epoch {best}, {name} {judged[best - 1]:.4f}")
    if lasso := facts["group_lasso"]:
        near, units = lasso["near_zero"], lasso["units"]
        click.echo(f"\nkept: the last epoch; group lasso {lasso['lambda']:g}: {near:,} of {units:,} units near zero")
    if closing := facts["l0"]:
        off, units = closing["zero"], closing["units"]
        click.echo(f"\nkept: the last epoch; l0 {closing['lambda']:g}: {off:,} of {units:,} gates closed")
    if taught := facts["distillation"]:
        heat = "" if taught["temperature"] is None else f", temperature {taught['temperature']:g}"
        click.echo(f"\nteacher: {taught['weight']:g} of the loss, compared by {taught['match']}{heat}")
    for note in told:
        click.echo(f"note: {note}")
    click.echo(f"wrote {output.short(job.target)}")


@click.command("train")
@options.MODEL
@click.option(
    "--data",
    required=True,
    type=options.Data(),
    metavar="DATA",
    help="Examples with targets: an .npz with arrays x and y, a folder of images, file.py:factory, glyphs:COUNT, "
    "chars:COUNT, tags:COUNT or digits, as for prune.",
)
@click.option(
    "--val",
    type=options.Data(),
    metavar="DATA",
    help="Held-out examples; without it a seeded fifth of --data is held out.",
)
@click.option(
    "--optimizer",
    type=click.Choice(["ekfac", "kfac", "adamw", "sgd"]),
    default="ekfac",
    show_default=True,
    help="EKFAC and KFAC precondition with Kronecker-factored curvature.",
)
@click.option("--epochs", type=options.COUNT, help="Passes over the data. [default: about 60,000 examples in all]")
@click.option("--steps", type=options.COUNT, help="Batches, instead of epochs.")
@click.option("--lr", type=options.Number(), help="Learning rate. [default: 0.2; adamw 0.001, sgd 0.01]")
@click.option("--batch-size", type=options.COUNT, default=64, show_default=True, help="Examples a step.")
@click.option(
    "--schedule",
    type=click.Choice(["cosine", "constant"]),
    default="cosine",
    show_default=True,
    help="Of the learning rate: down to zero over all steps, or not at all.",
)
@click.option(
    "--loss",
    type=options.Reference("cross-entropy", "mse"),
    help="cross-entropy, mse, or a function (outputs, targets) -> loss. Default: cross-entropy for integer targets, "
    "mse for floats.",
)
@click.option(
    "--eval",
    "evaluate",
    type=options.Reference("accuracy", "mse"),
    help="What the best epoch is known by: accuracy, mse, or a function (module, loader) -> float of which larger is "
    "better. Default: accuracy for integer targets, mse for floats.",
)
@click.option("--damping", type=options.Number(), help="Of ekfac and kfac: what is added to the curvature, relative.")
@click.option("--refresh", type=options.COUNT, help="Of ekfac and kfac: steps between new bases.")
@click.option("--rank", type=options.COUNT, help="Of ekfac and kfac: eigenvectors kept per factor. [default: all]")
@click.option(
    "--group-lasso",
    type=options.Number(),
    metavar="LAMBDA",
    help="Drive whole removable units to zero: LAMBDA times the sum of their norms is added to what is minimised. Try "
    "0.001.",
)
@click.option(
    "--l0",
    type=options.Number(),
    metavar="LAMBDA",
    help="Close hard concrete gates on whole removable units: LAMBDA times the chance that they are open is added to "
    "what is minimised, over the number of examples. Then: kfe-fx rewrite OUTPUT finalise-gates. Try 10.",
)
@click.option(
    "--l0-weight",
    type=click.Choice(["params", "time"]),
    default="params",
    show_default=True,
    help="What a unit costs: its parameters, or the time that it is predicted to take.",
)
@click.option(
    "--teacher",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Learn from this network, too, such as the one before pruning; then examples may be without targets.",
)
@click.option(
    "--distil",
    type=click.FloatRange(0.0, 1.0),
    metavar="W",
    help="The teacher's share of the loss, 0 to 1. [default: 0.9; 1 without targets]",
)
@click.option("--temperature", type=options.Number(), help="Softens the classes that the teacher says. [default: 1]")
@options.feature("the teacher's")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the split and all sampling.")
@click.option(
    "-o",
    "--output",
    "target",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The program file to write. [default: MODEL with .trained.pt, in the current folder]",
)
@click.option("--resume", is_flag=True, help="Go on from OUTPUT.checkpoint, which an interrupted run left.")
@options.force
@options.loading
@options.as_json
@options.quiet
def command(
    *,
    model: Path,
    target: Path | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    arch: str | None,
    trust: bool,
    inputs: tuple[str, ...],
    data: str,
    val: str | None,
    teacher: Path | None,
    resume: bool,
    **settings: Any,
) -> None:
    """Train a network, and write it as a program file.

    The weights of the best epoch on held-out examples are written (with --group-lasso or --l0 of the last). MODEL is
    never touched. After every epoch OUTPUT.checkpoint holds all that the next one depends on, and an interrupted run
    goes on with --resume to the same weights, bit for bit. Under torchrun each process takes its share of every batch;
    batch norms see all of it, those inside recurrent layers the share.

    \b
    Examples:
      kfe-fx train model.pt --data train.npz
      kfe-fx train model.pt --data train.npz --optimizer adamw --lr 3e-4 --epochs 20 -o better.pt
      kfe-fx train small.pt --data unlabelled.npz --teacher model.pt
      torchrun --nproc-per-node 2 --no-python kfe-fx train model.pt --data train.npz
    """
    run(
        Job(
            model=model,
            target=target or Path(f"{model.stem}.trained.pt"),
            force=force,
            as_json=as_json,
            quiet=quiet,
            loading={"arch": arch, "trust": trust, "inputs": inputs},
            data=data,
            val=val,
            teacher=teacher,
            resume=resume,
            settings=settings,
        )
    )
