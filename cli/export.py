"""`kfe-fx export`: a network as ONNX."""

from __future__ import annotations

from pathlib import Path

import click

from kfe_fx.cli import options, output, targets


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

    program = kfe_fx.load(model, arch=arch, trust=trust, inputs=inputs)
    kfe_fx.export(program, target)
    if as_json:
        output.show_json({"model": model, "file": target, "bytes": target.stat().st_size})
    elif not quiet:
        click.echo(f"wrote {target}")
