"""`kfe-fx bench`: ONNX files measured against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kfe_fx.cli import options, output, targets
from kfe_fx.errors import UsageError


def read_axes(given: tuple[str, ...]) -> dict[str, int]:
    """Read sizes of dynamic axes, as in length=128.

    Raises:
        UsageError: a text that is no name and size.
    """
    axes = {}
    for text in given:
        name, _, size = text.partition("=")
        if not (name and size.isascii() and size.isdigit() and int(size) > 0):
            raise UsageError(f"--axis {text!r}: write NAME=SIZE, as in length=128")
        axes[name] = int(size)
    return axes


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Show one file's measurement."""
    ratio = f"{row['ratio']:.3f} ({row['ratio_low']:.3f} to {row['ratio_high']:.3f})" if "ratio" in row else "-"
    times = (f"{row[key]:.3f}" for key in ("p50_ms", "p10_ms", "p90_ms"))
    return (row["path"], f"{row['megabytes']:.2f}", *times, str(row["runs"]), ratio)


@click.command("bench")
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path))
@options.measuring
@click.option("--seconds", type=options.Number(), default=2.0, show_default=True, help="How long to measure, in all.")
@click.option("--axis", "axes", multiple=True, metavar="NAME=SIZE", help="Size of a dynamic axis. Repeatable.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of inputs and order.")
@options.as_json
def command(
    *,
    models: tuple[Path, ...],
    threads: int,
    batch: int,
    seconds: float,
    axes: tuple[str, ...],
    seed: int,
    as_json: bool,
) -> None:
    """Measure ONNX files in ONNX Runtime, interleaved, each against the first.

    The files take turns, so that a machine that slows down meanwhile slows them all.

    \b
    Example:
      kfe-fx bench model.onnx model.pruned.onnx
    """
    for model in models:
        targets.require_model(model)
    sizes = read_axes(axes)

    from kfe_fx.runtime.bench import bench

    rows = bench(models, threads=threads, batch=batch, seconds=seconds, axes=sizes, seed=seed)
    if as_json:
        output.show_json({"threads": threads, "batch": batch, "rows": rows})
    else:
        columns = ("file", "MB", "median ms", "10 %", "90 %", "runs", "to the first")
        output.show_table([cells(row) for row in rows], columns, numbers=range(1, len(columns)))
