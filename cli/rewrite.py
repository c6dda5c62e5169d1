"""`kfe-fx rewrite`: run passes on a network and write what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kfe_fx.cli import options, output, targets
from kfe_fx.cli.examples import load_examples


@click.command("rewrite")
@options.MODEL
@click.argument("passes")
@click.option(
    "-o",
    "--output",
    "target",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The program file to write.",
)
@click.option("--data", type=options.Data(), metavar="DATA", help="Examples for passes that measure, as for prune.")
@click.option("--no-verify", is_flag=True, help="Do not compare the outputs of passes that keep the function.")
@options.force
@options.loading
@options.as_json
@options.quiet
def command(
    *,
    model: Path,
    passes: str,
    target: Path,
    data: str | None,
    no_verify: bool,
    force: bool,
    as_json: bool,
    quiet: bool,
    **loading: Any,
) -> None:
    """Run PASSES on a network, in order, and write a program file.

    PASSES is text: names with their options, separated by commas.

    \b
    batchnorm-recurrent       batch-normalise recurrent layers
        mode=input|full  cell_norm=none|scalar|channel  statistics=step|shared  t_max=N
    finalise-recurrent        pool and freeze their statistics, before the last fine-tuning
    fold-recurrent-batchnorm  fold them into plain layers
    decompose-kfe             layers as narrow products in their eigenbases, where that is faster (EigenDamage)
        time=0.7 | ratio=0.5 | importance=0.1  layers=GLOB  statistics=product|moments
    decompose-svd             the same by singular values
        time=0.7 | ratio=0.5 | importance=0.1  layers=GLOB  of=weights|outputs
    insert-gates              a gate per unit; mode=hard_concrete for kfe-fx train --l0
    finalise-gates            fold trained gates into the weights and remove the closed units
    strip-gates, capture-curvature, strip-curvature

    \b
    Examples:
      kfe-fx rewrite models/char_lstm.pt batchnorm-recurrent -o bn.pt
      kfe-fx rewrite bn.pt finalise-recurrent,fold-recurrent-batchnorm -o plain.pt
      kfe-fx rewrite models/glyphs_resnet.pt 'decompose-kfe{time=0.7}' -o low.pt
    """
    targets.require_model(model)
    targets.require_folder(target.parent)
    targets.require_free([target], sources=[model, *([Path(data)] if data else [])], force=force)

    import kfe_fx
    from kfe_fx.passes.pipeline import Pipeline

    pipeline = Pipeline.from_text(passes)  # what is quick to find wrong comes first
    examples = load_examples(data)
    program = kfe_fx.load(model, data=examples, **loading)
    result = pipeline.with_data(examples).run(program, verify=not no_verify)
    kfe_fx.save(result.program, target)
    facts: dict[str, Any] = {"model": model, "path": target, "passes": pipeline.to_text(), "facts": result.facts}
    if as_json:
        output.show_json({**facts, "modified": result.modified, "notes": list(result.program.notes)})
        return
    if quiet:
        return
    for name, told in result.facts.items():
        click.echo(f"{name}:{'' if told else ' nothing to do'}")
        for key, value in told.items():
            click.echo(f"  {key}: {value}")
    click.echo(f"wrote {output.short(target)}")
