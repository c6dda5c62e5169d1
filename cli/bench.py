"""`kfe-fx bench`: ONNX files measured against each other."""

from __future__ import annotations

from pathlib import Path

import click

from kfe_fx.cli import options, output, targets


@click.command("bench")
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path))
@options.measuring
@options.as_json
def command(*, models: tuple[Path, ...], threads: int | None, batch: int, as_json: bool) -> None:
    """Measure ONNX files in ONNX Runtime, interleaved, each against the first.

    The files take turns, so that a machine that slows down meanwhile slows them all.

    \b
    Example:
      kfe-fx bench model.onnx model.pruned.onnx
    """
    for model in models:
        targets.require_model(model)

    from kfe_fx.runtime.bench import bench

    rows = bench(models, threads=threads or 1, batch=batch)
    if as_json:
        output.show_json({"threads": threads or 1, "batch": batch, "rows": rows})
    else:
        output.show_table([row.values() for row in rows], list(rows[0]), numbers=range(1, len(rows[0])))
