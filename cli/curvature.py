"""`kfe-fx curvature`: which statistics of the gradients exist for which parameter, and their values on data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kfe_fx.cli import options, output, targets
from kfe_fx.cli.examples import load_examples
from kfe_fx.errors import UsageError


def show_coverage(coverage: Any) -> None:
    """Print the completeness table."""
    counts = coverage.entries
    click.echo(
        f"{sum(counts.values()):,} parameters, {coverage.share:.1%} with curvature: {counts['kronecker']:,} in "
        f"Kronecker blocks, {counts['diagonal']:,} with a diagonal, {counts['left out']:,} left out\n"
    )
    rows = []
    for row in coverage.parameters:
        cells: tuple[object, ...] = ("", "", "")
        if row.owner and row.blocks:
            block = coverage.blocks[row.blocks[0]]
            cells = (block.positions, block.factors(), block.pace())
        rows.append((row.name, "x".join(map(str, row.shape)) or "1", row.told, *cells))
    columns = ("parameter", "shape", "statistics", "positions", "factors", "examples")
    output.show_table(rows, columns, numbers=(3,))
    click.echo(
        "\nKronecker [K, o, i]: K groups of o x i entries; S* in the eigenbasis of A and G is exact. diagonal: exact."
    )


def measured(store: Any, norm: Any) -> dict[str, Any]:
    """Gather what a fit found, as plain values; a trace is E||grad||² over the block's entries, if S* or D is there."""
    blocks = []
    for name, block in store.blocks.items():
        blocks.append(
            {
                "block": name,
                "trace": trace(block),
                "examples": int(block.examples),
                "nonfinite": store.facts["nonfinite"].get(name, 0),
                "fallback": block.fallback,
            }
        )
    facts = {key: value for key, value in store.facts.items() if key not in ("format", "kfe_fx", "nonfinite")}
    total = sum(block["trace"] or 0.0 for block in blocks)
    rao = {"squared": norm.squared, "norm": norm.norm, "skipped": norm.skipped}
    return {**facts, "trace": total, "fisher_rao": rao, "measured": blocks}


def trace(block: Any) -> float | None:
    """Return the trace of a block: of S*, else of the diagonal, else of A times that of G."""
    whole = block.S if block.S is not None else block.D
    if whole is not None:
        return float(whole.double().sum())
    if block.A is None or block.G is None:
        return None
    sides = ((one.diagonal(dim1=1, dim2=2) if one.dim() == 3 else one).double().sum(1) for one in (block.A, block.G))
    first, second = sides
    return float((first * second).sum())


def show_measured(facts: dict[str, Any]) -> None:
    """Print the traces and where they come from."""
    told = [f"{facts['examples']:,} examples", f"source {facts['source']}", f"sharing {facts['sharing']}"]
    click.echo(f"\n{', '.join(told)}\n")
    rows = (
        (
            row["block"],
            "-" if row["trace"] is None else f"{row['trace']:.4g}",
            f"{row['examples']:,}",
            row["nonfinite"] or "",
            row["fallback"],
        )
        for row in facts["measured"]
    )
    output.show_table(rows, ("block", "trace", "examples", "not finite", "eigenbasis"), numbers=(1, 2, 3))
    click.echo(f"\ntrace of all blocks: {facts['trace']:.6g}")
    click.echo(f"Fisher-Rao norm of the parameters: {facts['fisher_rao']['norm']:.6g}")


@click.command("curvature")
@options.MODEL
@click.option(
    "--data",
    type=options.Data(),
    metavar="DATA",
    help="Examples to measure on, as for prune; without it nothing is measured.",
)
@click.option(
    "--loss",
    type=options.Reference("cross-entropy", "mse"),
    help="cross-entropy, mse, or a function (outputs, targets) -> loss. Default: cross-entropy for integer targets, "
    "mse for floats.",
)
@click.option(
    "--source",
    type=click.Choice(["auto", "empirical", "sampled", "exact"]),
    default="auto",
    show_default=True,
    help="Whose labels: the data's, drawn from the network, or all that it could draw (one backward pass per output). "
    "auto: exact for up to 20 outputs, else sampled.",
)
@click.option(
    "--sharing",
    type=click.Choice(["expand", "reduce", "rnn1", "rnn2"]),
    default="expand",
    show_default=True,
    help="How factors count the positions of an example that share weights. rnn1, rnn2: expand, and how the steps of "
    "recurrent layers are correlated.",
)
@click.option(
    "--statistics",
    type=click.Choice(["ekfac", "ekfac-ra", "kfac", "diagonal"]),
    multiple=True,
    default=("ekfac",),
    show_default=True,
    help="What to measure. Repeatable.",
)
@click.option("--samples", type=options.COUNT, default=1, show_default=True, help="Labels drawn per example.")
@click.option("--batch-size", type=options.COUNT, default=64, show_default=True, help="Examples at a time.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the labels drawn.")
@click.option(
    "-o",
    "--output",
    "target",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where the statistics go. [default: MODEL with .curvature.safetensors, in the current folder]",
)
@options.force
@options.loading
@options.as_json
@options.quiet
def command(
    *,
    model: Path,
    data: str | None,
    loss: str | None,
    target: Path | None,
    force: bool,
    arch: str | None,
    trust: bool,
    inputs: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Show the curvature statistics of a network, parameter by parameter, and measure them on data.

    A parameter has a Kronecker block (factors A and G, and S* in their eigenbasis), a diagonal, or stands here as
    left out with the reason. With --data they are measured, the Fisher-Rao norm of the parameters with them, and
    written to a file that kfe_fx.curvature.Store loads.

    \b
    Examples:
      kfe-fx curvature model.pt
      kfe-fx curvature model.pt --data train.npz --source empirical -o model.curvature.safetensors
    """
    targets.require_model(model)
    if data is None and target is not None:
        raise UsageError("--output writes what is measured on --data, which is not given")
    target = target or Path(f"{model.stem}.curvature.safetensors")
    if data is not None:
        targets.require_folder(target.parent)
        targets.require_free([target], sources=[model, Path(data)], force=force)

    import kfe_fx
    from kfe_fx.curvature.blocks import find_blocks
    from kfe_fx.curvature.coverage import cover
    from kfe_fx.curvature.distributed import launched
    from kfe_fx.curvature.fisher_rao import fisher_rao_norm
    from kfe_fx.training.fit import fit_examples
    from kfe_fx.training.losses import resolve_loss

    chosen = resolve_loss(loss, None)
    examples = load_examples(data)
    program = kfe_fx.load(model, arch=arch, trust=trust, inputs=inputs, data=examples)
    examples = fit_examples(program, examples, chosen)
    blocks = find_blocks(program)
    coverage = cover(program, blocks)
    facts: dict[str, Any] = {}
    with launched() as group:
        if examples is not None:
            with output.progress(quiet=quiet or group.rank > 0) as report:
                store = kfe_fx.curvature.fit(program, examples, chosen, blocks=blocks, progress=report, **settings)
            drawn = {key: settings[key] for key in ("source", "samples", "batch_size", "seed")}
            facts = measured(store, fisher_rao_norm(program, examples, chosen, blocks=blocks, **drawn))
            if group.rank == 0:
                store.save(target)
        if group.rank > 0:
            return
    files = [target] if facts else []
    if as_json:
        output.show_json({"model": model, **coverage.to_json(), **facts, "files": files, "notes": list(program.notes)})
    elif not quiet:
        show_coverage(coverage)
        if facts:
            show_measured(facts)
        for note in program.notes:
            click.echo(f"note: {note}")
        for path in files:
            click.echo(f"wrote {output.short(path)}")
