"""`kfe-fx prune`: a trained network under a budget."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from kfe_fx.cli import options, output, targets
from kfe_fx.cli.examples import load_examples
from kfe_fx.errors import InfeasibleBudget

SUFFIXES = (".pruned.onnx", ".pruned.pt", ".pruned.json")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One call of the library, as the command line spelled it."""

    model: Path
    folder: Path
    force: bool
    as_json: bool
    quiet: bool
    loading: dict[str, Any]  # arch, trust, inputs
    data: str | None
    val: str | None
    evaluate: str | None
    loss: str | None
    plan: Path | None = None
    store: Path | None = None
    settings: dict[str, Any]  # budget, metric, criterion, ... handed on as they are


def check_targets(job: Job) -> None:
    """Refuse what cannot be written before any work is done."""
    targets.require_model(job.model)
    targets.require_folder(job.folder, make=True)
    wanted = [job.folder / f"{job.model.stem}{suffix}" for suffix in SUFFIXES]
    given = (job.model, job.data, job.val, job.plan, job.store, job.settings.get("target"))
    inputs = [Path(p) for p in given if p]
    targets.require_free(wanted, sources=inputs, force=job.force)


def run(job: Job) -> None:
    """Prune, write the three files, and show what became of the network."""
    check_targets(job)
    from kfe_fx.cost.budget import Limit, read_limits

    limits = read_limits(job.settings["budget"], job.settings.get("metric", "latency"))
    if limits == (Limit(limits[0].metric, 1.0),) and job.plan is None and not job.settings.get("cap"):
        text = "nothing to do: a budget of 1 keeps the whole network; no file was written"
        if job.as_json:
            output.show_json({"model": job.model, "budget": 1.0, "modified": False, "note": text, "files": []})
        elif not job.quiet:
            click.echo(text)
        return

    import kfe_fx
    from kfe_fx.curvature.distributed import launched
    from kfe_fx.curvature.store import Store
    from kfe_fx.plan import read_plan
    from kfe_fx.training.losses import resolve_loss
    from kfe_fx.training.metrics import resolve_metric

    # what is quick to find wrong comes first
    loss, evaluate = resolve_loss(job.loss, None), resolve_metric(job.evaluate, None)
    data, val = load_examples(job.data), load_examples(job.val)
    plan = None if job.plan is None else read_plan(job.plan, str(limits[0]))
    store = None if job.store is None else Store.load(job.store)
    program = kfe_fx.load(job.model, data=data, **job.loading)
    with launched() as group, output.progress(quiet=job.quiet or group.rank > 0) as report:
        result = kfe_fx.prune(
            program, data=data, val=val, evaluate=evaluate, loss=loss, plan=plan, store=store,
            progress=report, **job.settings,
        )  # fmt: skip
        if group.rank > 0:
            return
        paths = result.write(job.folder, job.model.stem, force=job.force)
    show(job, result, paths)
    certificate = result.certificate
    if not certificate.feasible:
        reached = f"the nearest point, {certificate.reached:.3f} of the {certificate.metric}, was written"
        binding = certificate.binding.removeprefix("the budget is out of reach: ")
        why = f" ({binding})" if binding else ""
        raise InfeasibleBudget(f"the budget {certificate.budget:g} is out of reach{why}; {reached}")


def show(job: Job, result: Any, paths: Any) -> None:
    """Print the certificate, as a table and its notes, or as JSON."""
    certificate = result.certificate
    if job.as_json:
        output.show_json({"model": job.model, "modified": True, "files": paths, **certificate.to_json()})
    elif not job.quiet:
        click.echo(f"data: {certificate.data['note']}\n")
        output.show_table(certificate.table(), ("", "before", "after"), numbers=(1, 2))
        click.echo()
        for limit in certificate.limits:
            asked = limit["asked"].rpartition("=")[2]
            plain = asked in (f"{limit['ratio']:g}", str(limit["ratio"]))
            budget = f"{limit['ratio']:.3g}" + ("" if plain else f" ({asked})")
            click.echo(f"{limit['metric']}: {limit['reached']:.3f} of the original; the budget was {budget}")
        for text in certificate.remarks():
            click.echo(f"note: {text}")
        for path in paths:
            click.echo(f"wrote {path}")


@click.command("prune")
@options.MODEL
@click.option(
    "--budget",
    type=options.Budget(),
    multiple=True,
    required=True,
    help="What may remain: a fraction of the metric (0.5 is half, 1 is nothing to do), 12ms, 4MB of activations, 2M "
    "parameters, or with the metric's name as in macs=300M. Repeatable: all are met.",
)
@options.selecting
@options.data
@options.judging
@options.training
@options.measuring_for
@options.device
@options.bounds
@click.option(
    "--plan",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Remove what this file says (of prune, or of pareto the point of the budget) instead of selecting.",
)
@options.STORE
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
    plan: Path | None,
    store: Path | None,
    **settings: Any,
) -> None:
    """Make a trained network smaller until it meets a budget.

    Writes MODEL.pruned.onnx, MODEL.pruned.pt and MODEL.pruned.json: the network for ONNX Runtime, the same
    as a checkpoint that can be trained on, and the plan with the proof. MODEL is never touched.

    Under torchrun the plan is that of one process, but for dropout and batch norms inside recurrent layers,
    which see the share of a process.

    \b
    Examples:
      kfe-fx prune model.pt --budget 0.5
      kfe-fx prune model.pt --budget 12ms --budget 2M --data train.npz --epochs 5 -o out
      kfe-fx prune weights.pt --arch net.py:build --budget 0.5 --metric macs
      kfe-fx prune model.pt --budget 0.3 --data train.npz --distil 0.5 --stop-at-accuracy 0.92
      torchrun --nproc-per-node 2 --no-python kfe-fx prune model.pt --budget 0.5 --data train.npz
    """
    run(
        Job(
            model=model,
            folder=folder,
            force=force,
            as_json=as_json,
            quiet=quiet,
            loading={"arch": arch, "trust": trust, "inputs": inputs},
            data=data,
            val=val,
            evaluate=evaluate,
            loss=loss,
            plan=plan,
            store=store,
            settings=settings,
        )
    )
