"""`kfe-fx inspect`: what can be removed from a network, and what cannot and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kfe_fx.cli import options, output, targets
from kfe_fx.cli.examples import load_examples


def layers(program: Any, analysis: Any) -> list[dict[str, Any]]:
    """List every parameter with its shape and the units along each of its dims."""
    found = []
    for name, parameter in program.module().named_parameters():
        units = [sorted({int(u) for ids in dim for u in ids if u >= 0}) for dim in analysis.params.get(name, ())]
        found.append(
            {
                "parameter": name,
                "shape": list(parameter.shape),
                "units": [len(dim_units) for dim_units in units],
            }
        )
    return found


def describe(program: Any, analysis: Any) -> dict[str, Any]:
    """Gather what inspect shows, as plain values."""
    return {
        "inputs": list(program.signature.input_names),
        "axes": program.axes,
        "parameters": sum(p.numel() for p in program.module().parameters()),
        "units": len(analysis.units),
        "layers": layers(program, analysis),
        "groups": [
            {
                "name": group.name,
                "units": len(group.units),
                "dims": [f"{name}[{dim}]" for name, dim in group.dims],
            }
            for group in analysis.groups
        ],
        "frozen": [
            {
                "parameter": item.param,
                "dim": item.dim,
                "count": item.count,
                "why": item.reason,
                "source": item.source,
            }
            for item in analysis.frozen
        ],
        "notes": [
            *program.notes,
            *(f"{norm}: its statistic would run over fewer units" for norm in analysis.statistics),
        ],
        "lineage": list(program.lineage),
    }


def show(facts: dict[str, Any]) -> None:
    """Print the facts as tables."""
    click.echo(f"{facts['parameters']:,} parameters, {facts['units']:,} units that can be removed\n")
    output.show_table(
        (
            (
                layer["parameter"],
                "x".join(map(str, layer["shape"])),
                " ".join(f"{n or '-'}" for n in layer["units"]),
            )
            for layer in facts["layers"]
        ),
        ("parameter", "shape", "units along each dim"),
    )
    if facts["frozen"]:
        rows = ((f"{f['parameter']}[{f['dim']}]", f["count"], f["why"], f["source"]) for f in facts["frozen"])
        click.echo()
        output.show_table(rows, ("frozen", "indices", "why", "source"), numbers=(1,))
    if facts["notes"]:
        click.echo()
    for note in facts["notes"]:
        click.echo(f"note: {note}")


@click.command("inspect")
@options.MODEL
@options.loading
@options.example_data
@options.as_json
def command(
    *, model: Path, arch: str | None, trust: bool, inputs: tuple[str, ...], data: str | None, as_json: bool
) -> None:
    """Show the layers of a network, its units, and what is frozen and why.

    A unit is the least thing that can be removed: a channel with all its slices of all tensors. What kfe-fx
    does not understand is frozen, and stands here with the operation and the line of the source that froze
    it.

    \b
    Examples:
      kfe-fx inspect model.pt
      kfe-fx inspect weights.pt --arch net.py:build --json
    """
    targets.require_model(model)

    import kfe_fx

    program = kfe_fx.load(model, arch=arch, trust=trust, inputs=inputs, data=load_examples(data))
    facts = describe(program, kfe_fx.analyze(program))
    if as_json:
        output.show_json({"model": model, **facts})
    else:
        show(facts)
