"""`kfe-fx export`: a network as ONNX."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from kfe_fx.cli import options, output, targets
from kfe_fx.cli.examples import load_examples
from kfe_fx.errors import BadFile, UnsupportedModel


@click.command("export")
@options.MODEL
@click.option(
    "-o",
    "--output",
    "target",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The file to write. [default: MODEL with .onnx, in the current folder]",
)
@options.force
@options.loading
@options.example_data
@options.as_json
@options.quiet
def command(
    *,
    model: Path,
    target: Path | None,
    force: bool,
    arch: str | None,
    trust: bool,
    inputs: tuple[str, ...],
    data: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write a network as ONNX, and prove it equal in ONNX Runtime.

    Dynamic axes keep their names. The file is written only when ONNX Runtime computes what PyTorch computes,
    at several batch sizes.

    \b
    Example:
      kfe-fx export model.pt -o model.onnx
    """
    targets.require_model(model)
    target = target or Path(f"{model.stem}.onnx")
    targets.require_folder(target.parent)
    targets.require_free([target], sources=[model], force=force)

    import kfe_fx
    from kfe_fx.runtime.parity import verify

    program = kfe_fx.load(model, arch=arch, trust=trust, inputs=inputs, data=load_examples(data))
    # written beside the target and proved there; only then does it take its name
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as aside:
        report = kfe_fx.export(program, Path(aside) / target.name)
        try:
            proof = verify(program, report.path)
        except BadFile as error:  # it was written a moment ago: what ONNX Runtime refuses is the network
            reason = str(error).removeprefix(f"{report.path}: ")
            raise UnsupportedModel(f"{model}: the network has an ONNX form that does not run: {reason}") from error
        files = [target.parent / Path(file).name for file in report.files]
        # the weights first, where they are a file of their own: a graph in place always finds them
        for file in sorted(files, key=lambda file: file == target):
            (Path(aside) / file.name).replace(file)
    if as_json:
        output.show_json(
            {"model": model, **report.to_json(), "path": target, "files": files, "parity": proof.to_json()}
        )
    elif not quiet:
        for note in dict.fromkeys((*report.notes, *proof.notes)):
            click.echo(f"note: {note}")
        click.echo(f"largest error of an output, relative to its size: {proof.error:.1e}")
        for file in files:
            click.echo(f"wrote {file}")
