"""`kfe-fx bench`: ONNX files measured against each other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from kfe_fx.cli import options, output, targets
from kfe_fx.errors import UsageError

# How many layers a table shows; --json has all of them.
SHOWN = 40


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


def percentiles(row: dict[str, Any]) -> list[str]:
    """Return the keys of a row's percentiles, the median first."""
    return sorted((key for key in row if re.fullmatch(r"p\d+_ms", key)), key=lambda key: (key != "p50_ms", key))


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Show one file's measurement."""
    ratio = f"{row['ratio']:.3f} ({row['ratio_low']:.3f} to {row['ratio_high']:.3f})" if "ratio" in row else "-"
    times = (f"{row[key]:.3f}" for key in percentiles(row))
    return (row["path"], f"{row['megabytes']:.2f}", *times, str(row["runs"]), ratio)


def conditions(row: dict[str, Any]) -> str:
    """Say under which conditions the files were measured."""
    threads = f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"
    return f"{row['provider']} asked for, {threads}, times by the {row['clock']} clock"


def strays(row: dict[str, Any]) -> str | None:
    """Say what ran elsewhere than was asked for, or nothing."""
    from kfe_fx.runtime.profile import strays

    where = strays(row["provider"], row.get("kernels_on", {}))
    return f"{row['path']}: not all of it ran there: {where}" if where else None


def label(layer: dict[str, Any]) -> str:
    """Name a layer: its module, or in brackets what there is instead."""
    if layer["kind"] == "module":
        return layer["name"] or "(the network itself)"
    return f"({layer['name']})" if layer["name"] else "(added by ONNX Runtime)"


def layer_cells(layer: dict[str, Any], total: float) -> tuple[str, ...]:
    """Show one layer of all files; `total` is a run of the first, in ms."""
    times = ["-" if ms is None else f"{ms:.4f}" for ms in layer["ms"]]
    if len(times) == 1:
        against = [f"{100 * layer['ms'][0] / total:.1f} %" if total else "-"]
    elif "difference" in layer:
        against = [f"{layer['difference']:+.4f}", "-" if layer["ratio"] is None else f"{layer['ratio']:.3f}"]
    else:
        against = []
    kinds = layer["operators"]
    return (label(layer), *times, *against, ", ".join(kinds[:3]) + (", ..." if len(kinds) > 3 else ""))


def show_layers(rows: Sequence[dict[str, Any]], layers: Sequence[dict[str, Any]]) -> None:
    """Print the layers of all files as a table, and how their times were made."""
    times = ["ms"] if len(rows) == 1 else [f"ms in {chr(ord('a') + index % 26)}" for index in range(len(rows))]
    against = {1: ["share"], 2: ["b - a", "b / a"]}.get(len(rows), [])
    columns = ["layer", *times, *against, "operators"]
    total = rows[0]["layers"]["run_ms"]
    table = [layer_cells(layer, total) for layer in layers[:SHOWN]]
    output.show_table(table, columns, numbers=range(1, len(columns) - 1))
    if len(layers) > SHOWN:
        click.echo(f"and {len(layers) - SHOWN} more layers, see --json")
    for row, name in zip(rows, times, strict=True):
        made = row["layers"]
        loops = f", less {made['tracing_ms']:.3f} ms of tracing inside loops" if made["tracing_ms"] else ""
        kernels = f"kernels in the fastest of {made['runs']} traced runs ({made['kernels_ms']:.3f} ms{loops})"
        click.echo(f"{name}: {row['path']}, {kernels} times {made['scale']:.3f}, which makes their sum the median run")
    if any(row["kernels_on"].keys() - {"CPUExecutionProvider"} for row in rows):
        click.echo("kernels outside the CPU are timed at their start; they may run on")


@click.command("bench")
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path))
@options.measuring
@click.option("--seconds", type=options.Number(), default=2.0, show_default=True, help="How long to measure, in all.")
@click.option("--axis", "axes", multiple=True, metavar="NAME=SIZE", help="Size of a dynamic axis. Repeatable.")
@click.option(
    "--provider",
    default="cpu",
    show_default=True,
    metavar="NAME",
    help="Where ONNX Runtime runs the files, as cpu, cuda or CUDAExecutionProvider; what ran elsewhere is told.",
)
@click.option("--layers", is_flag=True, help="Trace the files too, and tell what each module of the network takes.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of inputs and order.")
@options.as_json
def command(
    *,
    models: tuple[Path, ...],
    threads: int,
    batch: int,
    seconds: float,
    axes: tuple[str, ...],
    provider: str,
    layers: bool,
    seed: int,
    as_json: bool,
) -> None:
    """Measure ONNX files in ONNX Runtime, interleaved, each against the first.

    The files take turns, so that a machine that slows down meanwhile slows them all.

    \b
    Example:
      kfe-fx bench model.onnx model.pruned.onnx
      kfe-fx bench model.onnx model.pruned.onnx --layers
    """
    for model in models:
        targets.require_model(model)
    sizes = read_axes(axes)

    from kfe_fx.runtime.bench import bench
    from kfe_fx.runtime.layers import side_by_side

    rows = bench(
        models,
        threads=threads,
        batch=batch,
        seconds=seconds,
        axes=sizes,
        seed=seed,
        provider=provider,
        layers=layers,
    )
    joined = side_by_side([row["layers"] for row in rows]) if layers else []
    if as_json:
        found: dict[str, Any] = {"threads": threads, "batch": batch, "provider": rows[0]["provider"], "rows": rows}
        output.show_json(found | ({"layers": joined} if layers else {}))
        return
    shares = [f"{key[1:-3]} %" for key in percentiles(rows[0])[1:]]
    columns = ("file", "MB", "median ms", *shares, "runs", "to the first")
    output.show_table([cells(row) for row in rows], columns, numbers=range(1, len(columns)))
    click.echo(conditions(rows[0]))
    for row in rows:
        stray = strays(row)
        if stray is not None:
            click.echo(stray)
    if layers:
        click.echo()
        show_layers(rows, joined)
