"""`kfe-fx calibrate`: how fast this machine's kernels are, as a device profile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kfe_fx.cli import options, output, targets
from kfe_fx.errors import UsageError

# What a constant of the profile means and its unit, in the order shown.
MEANINGS = {
    "conv_mac": ("convolution in blocks, 3x3", "ns/MAC"),
    "pointwise_mac": ("convolution in blocks, 1x1", "ns/MAC"),
    "narrow_mac": ("first convolution, few channels", "ns/MAC"),
    "depthwise_mac": ("depthwise convolution in blocks", "ns/MAC"),
    "plain_mac": ("convolution outside the blocks", "ns/MAC"),
    "column": ("... each gathered column element", "ns"),
    "plain_depthwise_mac": ("depthwise convolution outside the blocks", "ns/MAC"),
    "group": ("... each group", "ns"),
    "gemm_mac": ("matrix product", "ns/MAC"),
    "gemm_output": ("... each output element", "ns"),
    "near_byte": ("weights streamed from near the core", "ns/byte"),
    "weight_byte": ("weights streamed from afar", "ns/byte"),
    "core_byte": ("weights of a recurrent step", "ns/byte"),
    "cache": ("... that stay near the core", "bytes"),
    "miss_byte": ("weights of convolutions that miss", "ns/byte"),
    "reach": ("... beyond", "bytes"),
    "element": ("element read and written", "ns"),
    "row": ("row of a broadcast or norm", "ns"),
    "reorder": ("element into or out of the blocked layout", "ns"),
    "transpose": ("element transposed", "ns"),
    "call": ("run of the session", "ns"),
    "kernel": ("kernel", "ns"),
    "conv_kernel": ("kernel of a convolution", "ns"),
    "recurrent_kernel": ("kernel of a recurrent layer", "ns"),
    "step": ("step of a recurrent layer", "ns"),
    "tap": ("address of a tap of a convolution", "ns"),
    "requantise": ("output of a convolution brought to 8 bits", "ns"),
}


def show(device: Any, place: str) -> None:
    """Print what was found as tables."""
    found = device.fingerprint
    threads = f"{found.threads} thread{'s' * (found.threads > 1)}"
    click.echo(f"{found.cpu}, ONNX Runtime {found.onnxruntime}, {found.precision}, {threads}")
    click.echo(f"widths save time in steps of {device.step}\n")
    constants = {name: value for name in MEANINGS if (value := getattr(device.profile, name))}
    rows = [
        (name, f"{value:,.4g}", *MEANINGS[name][::-1], "not believed" * (name in device.kept))
        for name, value in constants.items()
    ]
    for blocks, value in enumerate(device.profile.tail[1:], 1):
        meaning = f"MAC of the last blocks where {blocks} of 4 remain"
        rows.append((f"tail {blocks}", f"{value:.3f}", "ratio", meaning, "not believed" * ("tail" in device.kept)))
    output.show_table(rows, ("constant", "value", "unit", "of", ""), numbers=(1,))
    if device.kept:
        click.echo("\nWhat is not believed keeps its built-in value, scaled to this machine's pace.")
    click.echo(f"\n{place}")


@click.command("calibrate")
@click.option(
    "-o", "--output", "target", type=click.Path(path_type=Path), help="Write the device profile to a file too."
)
@click.option("--threads", type=options.COUNT, default=1, show_default=True, help="Threads of ONNX Runtime.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "int8"]),
    default="fp32",
    show_default=True,
    help="Of the networks to prune: int8 kernels have steps and rates of their own.",
)
@click.option(
    "--emit-bundle",
    "bundle",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Measure nothing; write models and a script that measure a device with nothing but onnxruntime and numpy.",
)
@click.option("-f", "--force", is_flag=True, help="Measure again, and replace output files that exist.")
@options.as_json
@options.quiet
def command(
    *, target: Path | None, threads: int, precision: str, bundle: Path | None, force: bool, as_json: bool, quiet: bool
) -> None:
    """Measure this machine for the prediction of latency.

    About thirty tiny networks run in ONNX Runtime for about a second; the constants of the cost model follow from
    their times. The result is kept in the user's cache directory, for this processor, ONNX Runtime, number of threads
    and precision, until --force.

    \b
    Examples:
      kfe-fx calibrate
      kfe-fx calibrate -o device.json
      kfe-fx calibrate --precision int8
      kfe-fx calibrate --emit-bundle probes

    The last one writes a folder to copy to a device without PyTorch and kfe-fx. There, `python run_probes.py -o
    device.json` measures and writes the same kind of file (--threads and --precision are options there).
    """
    if bundle is not None:
        if target is not None:
            raise UsageError("--emit-bundle measures nothing: leave -o to run_probes.py on the device")
        if precision != "fp32":
            raise UsageError("a bundle holds the probes of every precision: give --precision to run_probes.py there")
        emit(bundle, force=force, as_json=as_json, quiet=quiet)
        return
    if target is not None:
        targets.require_folder(target.absolute().parent)
        targets.require_free([target], sources=[], force=force)

    from kfe_fx.cost.device import cache_path, this_device, write_device

    with output.progress(quiet=quiet or as_json) as report:
        if report is not None:
            report("measuring this machine")
        device = this_device(threads, precision, force=force)
    if target is not None:
        write_device(device, target)
    cached = cache_path(device.fingerprint)
    place = f"cached in {cached}" if cached.exists() else f"not cached: {cached} cannot be written"
    if as_json:
        files = [] if target is None else [str(target)]
        output.show_json({**device.to_json(), "cached": str(cached) if cached.exists() else None, "files": files})
    elif target is not None and not quiet:
        click.echo(f"wrote {output.short(target)}; {place}")
    elif not quiet:
        show(device, place)


def emit(folder: Path, *, force: bool, as_json: bool, quiet: bool) -> None:
    """Write a bundle and say how to run it."""
    from kfe_fx.cost.bundle import SCRIPT, write_bundle

    files = write_bundle(folder, force=force)
    if as_json:
        output.show_json({"files": [str(file) for file in files]})
    elif not quiet:
        click.echo(f"wrote {output.short(folder)} ({sum(file.stat().st_size for file in files) / 1e6:.1f} MB)")
        click.echo(f"copy it to the device and run: python {folder.name}/{SCRIPT} -o device.json")
