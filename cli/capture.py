"""`kfe-fx capture`: a module as a program file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kfe_fx.cli import options, output, targets
from kfe_fx.cli.examples import load_examples
from kfe_fx.errors import UsageError

if TYPE_CHECKING:
    from kfe_fx.data import ArrayData
    from kfe_fx.program import Program


def capture(factory: str, state: Path | None, inputs: tuple[str, ...], data: ArrayData | None) -> Program:
    """Build the module, load its weights and capture it.

    Raises:
        UsageError: neither the factory nor an option gives example inputs.
    """
    import kfe_fx

    if state is not None:
        return kfe_fx.load(state, arch=factory, inputs=inputs, data=data)

    from kfe_fx.frontend.arch import build
    from kfe_fx.frontend.specs import read_specs

    built = build(factory)
    if built.example_inputs is not None:
        return kfe_fx.capture(built.module, built.example_inputs, built.dynamic_axes)
    if inputs:
        return kfe_fx.capture(built.module, *read_specs(inputs))
    if data is not None:
        return kfe_fx.capture(built.module, data.first(2).inputs, built.dynamic_axes)
    choices = f"let {factory} return (module, example_inputs), or pass --input x=float32[b,3,224,224], or --data"
    raise UsageError(f"no example inputs to run the network with: {choices}")


def sample(program: Program, data: ArrayData, count: int) -> tuple[tuple[Any, ...], Any]:
    """Draw examples as (inputs in the order of the network, targets or None).

    Raises:
        BadData: the network does not read them.
    """
    from kfe_fx.training.fit import fit_inputs

    chosen = fit_inputs(program, data.sample(count))
    given = chosen.inputs
    if isinstance(given, dict):
        return tuple(given[name] for name in program.signature.input_names if name in given), chosen.targets
    return tuple(given), chosen.targets


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
@options.example_data
@click.option(
    "--calibration",
    type=options.COUNT,
    metavar="COUNT",
    help="Keep so many examples of --data in the file, drawn at random, so that it can be pruned without data.",
)
@options.force
@options.quiet
def command(
    *,
    factory: str,
    target: Path,
    state: Path | None,
    inputs: tuple[str, ...],
    data: str | None,
    calibration: int | None,
    force: bool,
    quiet: bool,
) -> None:
    """Turn a module into a program file.

    FACTORY, as file.py:name, is a function that returns the module, or (module, example_inputs[, dynamic_axes]).
    A program file needs neither the class nor trust to be loaded, and torch.load reads it as a state dict.

    \b
    Example:
      kfe-fx capture net.py:build --state weights.pt -o model.pt
    """
    if calibration is not None and data is None:
        raise UsageError("--calibration keeps examples of --data, which is not given")
    if state is not None:
        targets.require_model(state)
    targets.require_folder(target.parent)
    source = Path(factory.rpartition(":")[0])
    targets.require_free([target], sources=[p for p in (state, source) if p is not None], force=force)

    import kfe_fx

    examples = load_examples(data)
    program = capture(factory, state, inputs, examples)
    kept = None
    if examples is not None and calibration is not None:
        kept = sample(program, examples, calibration)
    kfe_fx.save(program, path=target, calibration=kept)
    if not quiet:
        for note in program.notes:
            click.echo(f"note: {note}")
        click.echo(f"wrote {output.short(target)}")
