"""`kfe-fx verify`: are the files those that prune wrote, and do they still compute the same."""

from __future__ import annotations

from pathlib import Path

import click

from kfe_fx.cli import options, output
from kfe_fx.errors import VerificationFailed

SUFFIX = ".pruned.json"


def require_finished(certificate: Path) -> None:
    """Tell a set that was never finished, or lost its certificate, from a name that is none.

    Raises:
        VerificationFailed: the certificate is missing and files of its set are there.
    """
    if certificate.exists() or not certificate.name.endswith(SUFFIX):
        return
    for ending in (".onnx", ".pt"):
        beside = certificate.with_suffix(ending)
        if beside.exists():
            raise VerificationFailed(f"{certificate} is missing, so nothing vouches for {beside}; prune again")


@click.command("verify")
@click.argument("certificate", type=click.Path(path_type=Path))
@options.as_json
@options.quiet
def command(*, certificate: Path, as_json: bool, quiet: bool) -> None:
    """Check what prune wrote: the files by their hashes, the ONNX against the checkpoint.

    CERTIFICATE is the MODEL.pruned.json, or the folder it is in. A set of files without its certificate was
    never finished, and a file that does not match it was changed: both are exit code 5.

    \b
    Examples:
      kfe-fx verify out/model.pruned.json
      kfe-fx verify out
    """
    require_finished(certificate)

    import kfe_fx

    report = kfe_fx.verify(certificate)
    if as_json:
        output.show_json(report.to_json())
    elif not quiet:
        output.show_table(report.table(), ("check", "result", ""))
