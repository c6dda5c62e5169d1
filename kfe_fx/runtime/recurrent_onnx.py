"""Recurrent layers on their way to ONNX: two operations of the lowered graph, and how the exporter writes them.

``kfe_fx.onnx_layer`` becomes one LSTM, GRU or RNN node. ``kfe_fx.onnx_scan`` becomes a node of a domain of ours, which
``kfe_fx.runtime.recurrent_scan`` writes out as one Scan once the exporter is done: the exporter has no form for a node
with a body. Both are only traced and translated; neither has a kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kfe_fx.recurrent.op import CELLS

DOMAIN = "kfe_fx"
SCAN = "Recurrence"
# what a Scan reads besides input, lengths and first states; see ``recurrent_weights.of_scan``
PARTS = (
    "weight", "recurrence", "projection", "bias", "x_scale", "x_shift", "h_scale", "h_shift", "c_scale", "c_shift",
    "h_zero", "c_zero",
)  # fmt: skip
_OPERATORS = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN", "rnn_relu": "RNN"}
_ACTIVATIONS = {"rnn_tanh": ["Tanh"], "rnn_relu": ["Relu"]}

_LIBRARY = torch.library.Library("kfe_fx", "FRAGMENT")
_LIBRARY.define(
    "onnx_layer(Tensor input, Tensor weight, Tensor recurrence, Tensor? bias, Tensor? lengths, Tensor? h0, Tensor? c0, "
    "*, str cell, str direction, float[] scales=[], bool batch_first=False) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    f"onnx_scan(Tensor input, Tensor? lengths, Tensor? h0, Tensor? c0, {', '.join(f'Tensor? {p}' for p in PARTS)}, "
    "*, str cell, bool reverse=False) -> (Tensor, Tensor, Tensor)"
)
LAYER_OP = torch.ops.kfe_fx.onnx_layer.default
SCAN_OP = torch.ops.kfe_fx.onnx_scan.default


def _layer_shapes(
    input: Tensor,
    weight: Tensor,
    recurrence: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    *,
    cell: str,
    direction: str,
    scales: tuple[float, ...] = (),
    batch_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    steps, batch, _ = input.shape
    directions, _, hidden = recurrence.shape
    dims = (batch, steps) if batch_first else (steps, batch)
    end = (directions, batch, hidden)
    output = input.new_empty((*dims, directions * hidden))
    return output, input.new_empty(end), input.new_empty(end if cell == "lstm" else (0,))


def _scan_shapes(
    input: Tensor, lengths: Tensor | None, h0: Tensor | None, c0: Tensor | None, *parts: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    steps, batch, _ = input.shape
    recurrence = parts[PARTS.index("recurrence")]
    projection = parts[PARTS.index("projection")]
    assert recurrence is not None
    hidden = recurrence.shape[1] // CELLS[options["cell"]]
    width = hidden if projection is None else projection.shape[1]
    c_n = (batch, hidden) if options["cell"] == "lstm" else (0,)
    return input.new_empty((steps, batch, width)), input.new_empty((batch, width)), input.new_empty(c_n)


torch.library.register_fake("kfe_fx::onnx_layer", _layer_shapes, lib=_LIBRARY)
torch.library.register_fake("kfe_fx::onnx_scan", _scan_shapes, lib=_LIBRARY)


@functools.cache
def translations() -> dict[Any, Callable[..., Any]]:
    """Return what ``torch.onnx.export`` takes as its custom translation table."""
    return {LAYER_OP: _layer, SCAN_OP: _scan}


def _layer(
    input, weight, recurrence, bias, lengths, h0, c0, *, cell, direction, scales=(), batch_first=False
):  # without annotations: the exporter would read types of ONNX from them
    import onnxscript

    op: Any = onnxscript.opset18  # what is used of it is the same from 17 to 23
    directions, _, hidden = recurrence.shape
    options: dict[str, Any] = {"hidden_size": hidden, "direction": direction}
    if cell == "gru":
        options["linear_before_reset"] = 1
    if cell in _ACTIVATIONS:
        options["activations"] = _ACTIVATIONS[cell] * directions
    if scales:
        # h = o tanh(a c): alpha and beta are lists of those functions alone that take one
        options["activations"] = ["Sigmoid", "Tanh", "ScaledTanh"] * directions
        options["activation_alpha"], options["activation_beta"] = [1.0] * directions, list(scales)
    states = (h0, c0) if cell == "lstm" else (h0,)
    found: Any = getattr(op, _OPERATORS[cell])(input, weight, recurrence, bias, lengths, *states, **options)
    output, ends = found[0], found[1:]  # [T, dirs, N, H]
    if directions == 1:
        output = op.Squeeze(output, op.Constant(value_ints=[1]))
        if batch_first:
            output = op.Transpose(output, perm=[1, 0, 2])
    else:
        output = op.Transpose(output, perm=[2, 0, 1, 3] if batch_first else [0, 2, 1, 3])
        output = op.Reshape(output, op.Constant(value_ints=[0, 0, -1]))
    return (output, *ends)


def _scan(input, lengths, h0, c0, *parts, cell, reverse=False):
    from onnxscript import values

    opset = values.Opset(DOMAIN, 1)
    return values.Op(opset, SCAN, _schema())(input, lengths, h0, c0, *parts, cell=cell, reverse=int(reverse))


@functools.cache
def _schema() -> Any:
    from onnx.defs import OpSchema

    kind = OpSchema.FormalParameterOption
    names = ("input", "lengths", "h0", "c0", *PARTS)
    inputs = [OpSchema.FormalParameter(n, "L" if n == "lengths" else "T", param_option=kind.Optional) for n in names]
    floats = ["tensor(float16)", "tensor(bfloat16)", "tensor(float)", "tensor(double)"]
    return OpSchema(
        SCAN,
        DOMAIN,
        1,
        inputs=inputs,
        outputs=[OpSchema.FormalParameter(name, "T") for name in ("output", "h_n", "c_n")],
        type_constraints=[("T", floats, ""), ("L", ["tensor(int64)"], "")],
        attributes=[
            OpSchema.Attribute("cell", OpSchema.AttrType.STRING),
            OpSchema.Attribute("reverse", OpSchema.AttrType.INT),
        ],
    )
