"""Proof that an ONNX model computes what its Program computes, on probe inputs at several sizes."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from kfe_fx.errors import KfeError, UsageError, VerificationFailed
from kfe_fx.program import Program, copy_graph
from kfe_fx.runtime.inputs import draw_inputs, example_sizes, resolve_sizes, time_axes, to_feeds
from kfe_fx.runtime.lower import drop_buffer_writes, first_line
from kfe_fx.runtime.onnx_file import named_outputs
from kfe_fx.runtime.session import make_session, run

TOLERANCE = 1e-4
# An output that moves by less than this, relative to its size, tells nothing about the graph behind it.
_STILL = 1e-6


@dataclass(frozen=True)
class OutputParity:
    """One output: its largest error, absolute and relative to ``scale``; untested when it never varied."""

    name: str
    error: float
    absolute: float
    scale: float
    tested: bool
    exact: bool


@dataclass(frozen=True)
class ParityReport:
    """The comparison of an ONNX model with its Program; ``ok`` when no output is off by more than ``tolerance``."""

    ok: bool
    error: float
    tolerance: float
    outputs: tuple[OutputParity, ...]
    probes: int
    sizes: tuple[dict[str, int], ...]
    untested: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain data (infinities as text, which JSON lacks)."""
        return _finite(asdict(self))


def parity(
    program: Program,
    onnx_model: bytes | str | os.PathLike[str] | ort.InferenceSession,
    *,
    batches: Sequence[int] = (1, 2, 5),
    probes: int = 3,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]] = (),
) -> ParityReport:
    """Compare an ONNX model with the evaluation graph of its Program, output by output.

    Error of an output = max |onnx - program| / max(rms, spread): rms over all its values, spread the standard
    deviation over the probes of the position that varies most. Integer and boolean outputs must agree exactly.
    NaNs and infinities must stand at the same places. An output that does not vary over the probes is reported as
    untested and must agree too.

    Each batch size gets ``probes`` random inputs (see ``draw_inputs``); the examples and ``calls`` (further
    ``(args, kwargs)``) come on top. Other dynamic axes vary by one around the example's size, those that recurrent
    layers count steps by are longer, one, and shorter, and a second batch axis gets another size, where the Program
    itself takes that. A network with a fixed batch is tried at its own size.

    Raises:
        UsageError: fewer than two probes, or a batch size below 1.
        VerificationFailed: the model has other inputs, or another number of outputs, than the Program.
        BadFile, UnsupportedModel: the model cannot be loaded or run.
    """
    if probes < 2:
        raise UsageError(f"parity needs at least two probes to see whether an output varies, got {probes}")
    session = onnx_model if isinstance(onnx_model, ort.InferenceSession) else make_session(onnx_model)
    names = [declared.name for declared in session.get_inputs()]
    leaves = named_outputs(program)
    if names != list(program.signature.input_names) or len(session.get_outputs()) != len(leaves):
        raise VerificationFailed(
            f"the ONNX model has inputs {names} and {len(session.get_outputs())} outputs, the Program "
            f"{list(program.signature.input_names)} and {len(leaves)}; they do not belong together"
        )
    reference = _Reference(program)
    flats: list[list[torch.Tensor]] = []
    notes: list[str] = []
    tried: list[dict[str, int]] = []
    times = time_axes(program)
    for turn, wanted in enumerate(_sizes(program, batches, times)):
        usable, note = _usable(reference, wanted, _varied(program, wanted, batches, turn, times), seed)
        notes += [note] if note else []
        tried.append(usable)
        flats += [draw_inputs(program, None, seed + 1000 * turn + draw, usable) for draw in range(probes)]
    flats += [program.flat_examples()]
    flats += [program.signature.flatten(*call) for call in calls]

    results = [(reference(flat), [np.asarray(one) for one in run(session, to_feeds(program, flat))]) for flat in flats]
    outputs = tuple(
        compare_output(name, [(ours[leaf], theirs[place]) for ours, theirs in results])
        for place, (leaf, name) in enumerate(leaves)
    )
    error = max((output.error for output in outputs), default=0.0)
    return ParityReport(
        ok=all(output.error <= (0.0 if output.exact else tolerance) for output in outputs),
        error=error,
        tolerance=tolerance,
        outputs=outputs,
        probes=len(flats),
        sizes=tuple(tried),
        untested=tuple(output.name for output in outputs if not output.tested),
        notes=tuple(dict.fromkeys(notes)),
    )


def verify(program: Program, onnx_model: bytes | str | os.PathLike[str], **options: Any) -> ParityReport:
    """Compare as ``parity`` does and insist on the result.

    Raises:
        VerificationFailed: an output is off by more than the tolerance; the text names the worst one.
    """
    report = parity(program, onnx_model, **options)
    if not report.ok:
        worst = max(report.outputs, key=lambda output: output.error)
        raise VerificationFailed(
            f"output {worst.name!r} differs by {worst.error:.2g} of its size ({worst.absolute:.2g} absolute) from the "
            f"Program, {report.tolerance:.0e} is allowed; the ONNX model is not this network's"
        )
    return report


def compare_output(name: str, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> OutputParity:
    """Compare one output over probes: pairs of what the Program and the ONNX model gave."""
    by_shape: dict[tuple[int, ...], list[np.ndarray]] = {}
    for ours, _ in pairs:
        by_shape.setdefault(ours.shape, []).append(ours)
    groups = list(by_shape.values())
    exact = not np.issubdtype(pairs[0][0].dtype, np.inexact)
    varies = any(not _same(group[0], other) for group in groups for other in group[1:])
    if any(ours.shape != theirs.shape or ours.dtype != theirs.dtype for ours, theirs in pairs):
        return OutputParity(name, math.inf, math.inf, 0.0, varies, exact)
    if exact:
        wrong = sum(int((ours != theirs).sum()) for ours, theirs in pairs)
        return OutputParity(name, float(wrong > 0), float(wrong), 1.0, varies, exact)
    total = sum(int(np.isfinite(ours).sum()) for ours, _ in pairs)
    squares = sum(float((np.abs(_finite_part(ours)) ** 2).sum()) for ours, _ in pairs)
    rms = math.sqrt(squares / total) if total else 0.0
    spread = max(_spread(group) for group in groups)
    scale = max(rms, spread)
    absolute = max(_distance(ours, theirs) for ours, theirs in pairs)
    error = 0.0 if absolute == 0 else (absolute / scale if scale else math.inf)
    return OutputParity(name, error, absolute, scale, spread > _STILL * rms, exact)


def _spread(values: Sequence[np.ndarray]) -> float:
    if len(values) < 2 or not values[0].size:
        return 0.0
    deviation = np.stack([_finite_part(value) for value in values]).std(axis=0)
    return float(deviation.max())


def _finite_part(value: np.ndarray) -> np.ndarray:
    wide = value.astype(np.complex128 if np.iscomplexobj(value) else np.float64)
    return np.where(np.isfinite(wide), wide, 0.0)


def _distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    finite = np.isfinite(ours)
    if not np.array_equal(finite, np.isfinite(theirs)) or not _same(ours[~finite], theirs[~finite]):
        return math.inf
    difference = np.abs(_finite_part(ours) - _finite_part(theirs))
    return float(difference.max()) if difference.size else 0.0


def _same(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return np.array_equal(ours, theirs, equal_nan=np.issubdtype(ours.dtype, np.inexact))


class _Reference:
    """Run the evaluation graph whatever mode the Program is in, from the same state every time."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.stateful = bool(drop_buffer_writes(copy_graph(program.graphs["eval"])))

    def __call__(self, flat: list[torch.Tensor]) -> list[np.ndarray]:
        program = self.program.copy() if self.stateful else self.program
        with torch.no_grad():
            outputs = program.module().run_flat(flat, "eval")
        return [_array(value) for value in outputs]


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def _sizes(program: Program, batches: Sequence[int], times: set[str]) -> list[dict[str, int]]:
    if not program.batch_axes():
        return [example_sizes(program)] * (3 if times else 1)
    return [resolve_sizes(program, batch, None) for batch in dict.fromkeys(batches)]


def _varied(
    program: Program, sizes: dict[str, int], batches: Sequence[int], turn: int, times: set[str]
) -> list[dict[str, int]]:
    """Return other sizes to try, the boldest first.

    Batch axes are unequal, every other axis is moved by one from the second turn on, and axes of time are longer, one,
    and shorter than in the example.
    """
    counting = sorted(program.batch_axes())
    unequal = {axis: batches[(turn + place) % len(batches)] for place, axis in enumerate(counting)}
    step = (0, -1, 1)[turn % 3]
    others = {axis: max(1, size + step) for axis, size in sizes.items() if axis not in counting}
    varied = sizes | (unequal if len(counting) > 1 else {}) | others
    lengths = {axis: (size + 3, 1, max(2, size // 2))[turn % 3] for axis, size in sizes.items() if axis in times}
    return [varied | lengths, varied] if times else [varied]


def _usable(
    reference: _Reference, wanted: dict[str, int], varied: list[dict[str, int]], seed: int
) -> tuple[dict[str, int], str]:
    """Return the first of the varied sizes that the Program takes, else the wanted ones, and a note on refusals."""
    note = ""
    for sizes in varied:
        if sizes == wanted:
            break
        try:
            reference(draw_inputs(reference.program, None, seed, sizes))
        except (RuntimeError, IndexError, ValueError, KfeError) as error:
            note = note or f"the network does not take the sizes {sizes} ({first_line(error)[:120]}); not tried"
            continue
        return sizes, note
    return wanted, note


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
