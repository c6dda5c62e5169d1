"""`kfe-fx pareto`: several budgets of one network, from one scoring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kfe_fx.cli import options, output, targets
from kfe_fx.cli.examples import load_examples

COLUMNS = ("budget", "reached", "ms", "parameters", "multiply-accumulates", "before training")


def read_budgets(text: str) -> list[str]:
    """Split budgets at commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


@click.command("pareto")
@options.MODEL
@click.option(
    "--budgets",
    default="0.7,0.5,0.35,0.25",
    show_default=True,
    metavar="LIST",
    help="Budgets as for prune, of one metric, with commas between them.",
)
@options.selecting
@options.PENALTY
@options.STORE
@options.data
@options.judging
@options.measuring_for
@options.device
@options.bounds
@options.seed
@click.option(
    "-o",
    "--output",
    "folder",
    type=click.Path(path_type=Path),
    default=Path(),
    metavar="DIR",
    help="Where the files go. [default: the current folder]",
)
@options.force
@options.loading
@options.as_json
@options.quiet
def command(
    *,
    model: Path,
    budgets: str,
    folder: Path,
    force: bool,
    as_json: bool,
    quiet: bool,
    arch: str | None,
    trust: bool,
    inputs: tuple[str, ...],
    data: str | None,
    val: str | None,
    store: Path | None,
    **settings: Any,
) -> None:
    """Show what a network becomes at several budgets, without training any.

    The units are scored once; each budget is selected, measured and proved. Writes MODEL.pareto.json with
    the plans and MODEL.pareto.svg; `kfe-fx prune --plan` builds the point that you pick, and trains it.

    \b
    Examples:
      kfe-fx pareto model.pt --budgets 0.7,0.5,0.35,0.25 --data train.npz
      kfe-fx prune model.pt --plan model.pareto.json --budget 0.5 --data train.npz
    """
    targets.require_model(model)
    targets.require_folder(folder, make=True)
    table, picture = (folder / f"{model.stem}.pareto{ending}" for ending in (".json", ".svg"))
    targets.require_free([table, picture], sources=[Path(p) for p in (model, data, val) if p], force=force)

    import kfe_fx
    from kfe_fx.curvature.distributed import launched
    from kfe_fx.curvature.store import Store
    from kfe_fx.errors import MissingDependency
    from kfe_fx.passes.pareto import pareto

    examples, held = load_examples(data), load_examples(val)
    settings["store"] = None if store is None else Store.load(store)
    program = kfe_fx.load(model, data=examples, arch=arch, trust=trust, inputs=inputs)
    with launched() as group, output.progress(quiet=quiet or group.rank > 0) as report:
        front = pareto(program, budgets=read_budgets(budgets), data=examples, val=held, progress=report, **settings)
        if group.rank > 0:
            return
        folder.mkdir(parents=True, exist_ok=True)
        front.write(table, force=force)
        files = [table]
        try:
            front.plot(picture)
            files.append(picture)
        except MissingDependency as error:
            note = str(error)
        else:
            note = ""
    if as_json:
        points = [{"asked": str(point.budget), **point.certificate.to_json()} for point in front.points]
        output.show_json({"model": model, "metric": front.metric, "points": points, "files": files})
    elif not quiet:
        output.show_table(front.rows(), COLUMNS, numbers=range(1, len(COLUMNS)))
        for text in (*(f"wrote {file}" for file in files), *([note] if note else [])):
            click.echo(text)
