"""Proof of a pruned network: the masked original before anything is repaired, ONNX Runtime at the end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from kfe_fx.certificate import Certificate
from kfe_fx.errors import VerificationFailed
from kfe_fx.labels.analysis import Analysis
from kfe_fx.labels.oracle import run_masked
from kfe_fx.labels.states import narrow_input, resizable
from kfe_fx.program import Program
from kfe_fx.runtime.inputs import draw_inputs
from kfe_fx.runtime.onnx_file import onnx_bytes
from kfe_fx.runtime.parity import compare_output, parity
from kfe_fx.structure import pack

MASKED_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
MASKED_BATCHES = (1, 2, 3)


def check_masked(analysis: Analysis, shrunk: Program, removed: frozenset[int], seed: int) -> float:
    """Return the largest difference to the masked original, relative to an output's rms or spread.

    ``analysis`` holds the original with the weights of this round.

    Raises:
        VerificationFailed: it is more than rounding.
    """
    try:
        error, allowed = masked_error(analysis, shrunk, removed, seed)
    except (RuntimeError, IndexError, ValueError) as failure:
        first = str(failure).strip().splitlines()[0]
        raise VerificationFailed(
            f"the shrunk network fails at another batch size ({first}); nothing is written; please report this network"
        ) from failure
    if not error <= allowed:  # rounding of a deep network, or an error? In float64 rounding is gone
        wide = replace(analysis, program=_double(analysis.program))
        error, allowed = masked_error(wide, _double(shrunk), removed, seed)
    if not error <= allowed:
        raise VerificationFailed(
            f"the shrunk network differs from the masked original by {error:.1e} of the output (allowed "
            f"{allowed:.0e}); nothing is written; please report this network"
        )
    return error


def masked_error(analysis: Analysis, shrunk: Program, removed: frozenset[int], seed: int) -> tuple[float, float]:
    """Compare a shrunk network with the masked original on drawn inputs of several batch sizes.

    Returns:
        The largest difference relative to an output's rms or spread, and what rounding allows in its precision.
    """
    program = analysis.program
    leaves: Any = program.graphs["eval"].output_node().args[0]
    pairs = []
    with torch.no_grad():
        for turn, batch in enumerate(MASKED_BATCHES if program.batch_axes() else (None,)):
            flat = draw_inputs(program, batch, seed + turn)
            whole = zip(leaves, run_masked(analysis, removed, flat), strict=True)
            masked = [_kept(analysis, removed, leaf, value) for leaf, value in whole]
            names = program.signature.input_names
            cut = [narrow_input(shrunk, name, value) for name, value in zip(names, flat, strict=True)]
            pairs.append((masked, shrunk.module().run_flat(cut)))
    error, allowed = 0.0, MASKED_TOLERANCE[torch.float64]
    for place, value in enumerate(pairs[0][0]):
        if isinstance(value, torch.Tensor):
            values = [(masked[place].numpy(), small[place].numpy()) for masked, small in pairs]
            error = max(error, compare_output(str(place), values).error)
            allowed = max(allowed, MASKED_TOLERANCE.get(value.dtype, 1e-2) if value.is_floating_point() else 0.0)
    return error, allowed


def _kept(analysis: Analysis, removed: frozenset[int], leaf: Any, value: Any) -> Any:
    """Take of an output of the masked original what the shrunk network still has: states may have lost units."""
    if not isinstance(value, torch.Tensor) or not isinstance(leaf, fx.Node) or not resizable(analysis.program):
        return value
    for dim, index in enumerate(analysis.kept_of(leaf, removed)):
        if index is not None:
            value = value.index_select(dim, torch.from_numpy(index))
    return value


def _double(program: Program) -> Program:
    twin = program.copy()
    twin.module().double()
    flat = [value.double() if value.is_floating_point() else value for value in program.flat_examples()]
    twin.example_inputs = pack(program.signature.inputs, flat)
    return twin


def prove(program: Program, certificate: Certificate) -> bytes:
    """Export a Program, compare the ONNX model with it, and write the outcome into the certificate.

    Raises:
        VerificationFailed: ONNX Runtime computes something else.
        UnsupportedModel: the network has no ONNX form, or ONNX Runtime cannot run it.
    """
    model = onnx_bytes(program)
    report = parity(program, model, seed=certificate.seed)
    certificate.parity = report.to_json()
    certificate.parity["batches"] = [size[axis] for size in report.sizes for axis in sorted(program.batch_axes())[:1]]
    if not report.ok:
        raise VerificationFailed(
            f"ONNX Runtime differs from the network by {report.error:.1e} of the output (allowed "
            f"{report.tolerance:.0e}); nothing is written"
        )
    untested = [f"the output {name} does not vary over the probes: it is untested" for name in report.untested]
    certificate.notes += [note for note in untested if note not in certificate.notes]
    return model
