"""`kfe-fx capture`: a module as a program file."""

from __future__ import annotations

from pathlib import Path

import click

from kfe_fx.cli import options, output, targets


@click.command("capture")
@click.argument("factory", type=options.Reference())
@click.option(
    "-o",
    "--output",
    "target",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE",
    help="The program file to write.",
)
@click.option("--state", type=click.Path(path_type=Path), metavar="FILE", help="Trained weights: a state dict.")
@click.option("--input", "inputs", multiple=True, metavar="NAME=TYPE[DIMS]", help="As for prune. Repeatable.")
@options.data
@options.force
@options.quiet
def command(
    *,
    factory: str,
    target: Path,
    state: Path | None,
    inputs: tuple[str, ...],
    data: str | None,
    force: bool,
    quiet: bool,
) -> None:
    """Turn a module into a program file.

    FACTORY, as file.py:name, is a function that returns the module, or (module, example_inputs[,
    dynamic_axes]). A program file needs neither the class nor trust to be loaded, and torch.load reads it as
    a state dict.

    \b
    Example:
      kfe-fx capture net.py:build --state weights.pt -o model.pt
    """
    if state is not None:
        targets.require_model(state)
    targets.require_folder(target.parent)
    source = Path(factory.rpartition(":")[0])
    targets.require_free([target], sources=[p for p in (state, source) if p is not None], force=force)

    import kfe_fx
    from kfe_fx.data import load_data
    from kfe_fx.frontend.load import load_factory

    program = load_factory(factory, state=state, inputs=inputs, data=load_data(data) if data else None)
    kfe_fx.save(program, target)
    if not quiet:
        for note in program.notes:
            click.echo(f"note: {note}")
        click.echo(f"wrote {output.short(target)}")
