"""Weights of recurrent layers as ONNX wants them: batch normalisation folded in, gates in its order.

Of normalisation whose statistics are fixed, s = gamma / sqrt(var + eps),

    s (W x - mean) + b = (s W) x + (b - s mean)

so one row of statistics is folded into weight and bias of its side, exactly; a GRU's hidden bias stays its own, since
r multiplies it. What differs from step to step, or acts on the cell state channel by channel, stays a table.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from kfe_fx.recurrent.op import CELLS, Arguments

# ONNX's gates in terms of PyTorch's: i, o, f, c of i, f, g, o; z, r, h of r, z, n
_ORDER = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn_tanh": (0,), "rnn_relu": (0,)}


@dataclass(frozen=True)
class Folded:
    """One direction of one layer with everything folded that can be; float64.

    Attributes:
        cell: a key of ``CELLS``.
        weight: [g H, I].
        recurrence: [g H, P].
        bias_ih: [g H] or None.
        bias_hh: [g H] or None.
        projection: [P, H] or None.
        scale: of the cell state on its way out, a number, or None.
        tables: what stays: ``x_scale``, ``x_shift``, ``h_scale`` [rows, g H], ``h_shift`` [rows, g H] (GRU),
            ``c_scale`` and ``c_shift`` [rows, H or 1]; step t reads row min(t, rows - 1).
    """

    cell: str
    weight: Tensor
    recurrence: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    projection: Tensor | None
    scale: float | None
    tables: dict[str, Tensor]

    @property
    def plain(self) -> bool:
        """Whether ONNX has an operation for it."""
        return not self.tables and self.projection is None


@dataclass
class _Side:
    """One of the two products: its weight, bias, and what stays a table (scale and shift, [rows, g H])."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None = None
    shift: Tensor | None = None


def fold(call: Arguments) -> Folded:
    """Fold what can be folded of the tensors in ``call``, which must hold values."""
    values: dict[str, Any] = {field.name: getattr(call, field.name) for field in fields(call)}
    given = {name: value.detach().double() for name, value in values.items() if isinstance(value, Tensor)}
    sides = [_side(given, side, call.eps) for side in ("ih", "hh")]
    tables = {}
    if sides[0].scale is not None:
        tables["x_scale"] = sides[0].scale
    if sides[1].scale is not None:
        tables["h_scale"] = sides[1].scale
    x_shift, h_shift = sides[0].shift, sides[1].shift
    if call.cell != "gru" and h_shift is not None:  # the sides meet in a sum
        x_shift, h_shift = h_shift if x_shift is None else _sum_of_rows(x_shift, h_shift), None
    if x_shift is not None:
        tables["x_shift"] = x_shift
    if h_shift is not None:
        tables["h_shift"] = h_shift
    scale = None
    if call.gamma_c is not None:
        out, shift = _cell(given, call.eps)
        if out.numel() == 1 and shift is None:
            scale = float(out)
        else:
            tables["c_scale"] = out
            if shift is not None:
                tables["c_shift"] = shift
    first, second = sides
    projection = given.get("weight_hr")
    return Folded(call.cell, first.weight, second.weight, first.bias, second.bias, projection, scale, tables)


def _side(given: dict[str, Tensor], side: str, eps: float) -> _Side:
    weight, bias = given[f"weight_{side}"], given.get(f"bias_{side}")
    if f"gamma_{side}" not in given:
        return _Side(weight, bias)
    mean, variance = _rows(given[f"mean_{side}"]), _rows(given[f"var_{side}"])
    scale = given[f"gamma_{side}"] / torch.sqrt(variance + eps)  # [rows, g H]
    shift = -scale * mean
    if len(scale) == len(shift) == 1:
        return _Side(scale[0].unsqueeze(1) * weight, _sum(bias, shift[0]))
    return _Side(weight, bias, scale, shift)


def _cell(given: dict[str, Tensor], eps: float) -> tuple[Tensor, Tensor | None]:
    scale = given["gamma_c"] / torch.sqrt(_rows(given["var_c"]) + eps)  # [rows, H or 1]
    if "beta_c" not in given:  # one scale of all, which does not centre
        return scale, None
    return scale, given["beta_c"] - scale * _rows(given["mean_c"])


def _sum(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return left + right


def _rows(table: Tensor) -> Tensor:
    """Keep one row where all are equal: the steps then share their statistics."""
    return table[:1] if bool((table == table[:1]).all()) else table


def _sum_of_rows(left: Tensor, right: Tensor) -> Tensor:
    rows = torch.arange(max(len(left), len(right)))
    return left[rows.clamp(max=len(left) - 1)] + right[rows.clamp(max=len(right) - 1)]


@dataclass
class Constants:
    """Tensors of the lowered graph by name, and numbers that become attributes by the name of a recurrence.

    The names say where the values come from, so that those of another width of the same network are called alike.
    """

    taken: set[str]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: Tensor) -> str:
        """Add a tensor and return its name; equal ones of one name are one."""
        chosen, count = name, 0
        while chosen in self.taken or (chosen in self.tensors and not _equal(self.tensors[chosen], value)):
            count += 1
            chosen = f"{name}_{count}"
        self.tensors[chosen] = value
        return chosen


def _equal(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left, right)


def of_operation(layers: list[Folded], like: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return W [dirs, g H, I], R [dirs, g H, H] and B [dirs, 2 g H] or None, as tensors like ``like``."""
    weight = torch.stack([_reordered(one.weight, one.cell) for one in layers])
    recurrence = torch.stack([_reordered(one.recurrence, one.cell) for one in layers])
    bias = None
    if any(side is not None for one in layers for side in (one.bias_ih, one.bias_hh)):
        zeros = torch.zeros_like(layers[0].weight[:, 0])
        sides = [[zeros if side is None else side for side in (one.bias_ih, one.bias_hh)] for one in layers]
        orders = [one.cell for one in layers]
        bias = torch.stack([torch.cat([_reordered(s, o) for s in pair]) for pair, o in zip(sides, orders, strict=True)])
    made = (weight, recurrence, bias)
    return tuple(None if one is None else one.to(like.dtype).contiguous() for one in made)  # type: ignore[return-value]


def _reordered(value: Tensor, cell: str) -> Tensor:
    return torch.cat([value.chunk(CELLS[cell])[gate] for gate in _ORDER[cell]])


def of_scan(layer: Folded, like: Tensor) -> dict[str, Tensor]:
    """Return what the steps of a Scan read, as tensors like ``like``, in PyTorch's order of the gates.

    Matrices are transposed, [I, g H], [P, g H] and [H, P]; tables [rows, 1, ...], or [1, ...] where there is one row;
    ``bias`` [g H] is added to the input's product and ``h_shift`` to the hidden state's; ``h_zero`` and ``c_zero``
    [1, ...] are the first states where none are given.
    """
    parts = {"weight": layer.weight.t(), "recurrence": layer.recurrence.t()}
    if layer.projection is not None:
        parts["projection"] = layer.projection.t()
    tables = dict(layer.tables)
    if layer.scale is not None:
        tables["c_scale"] = torch.full((1, 1), layer.scale, dtype=torch.float64)
    bias, h_shift = layer.bias_ih, tables.pop("h_shift", None)
    if layer.cell == "gru":
        h_shift = layer.bias_hh if h_shift is None else _sum(layer.bias_hh, h_shift)
    else:
        bias = _sum(bias, layer.bias_hh)
    if h_shift is not None:
        tables["h_shift"] = h_shift.reshape(-1, h_shift.shape[-1])
    if "x_shift" in tables and bias is not None:
        tables["x_shift"] = tables["x_shift"] + bias
    elif bias is not None:
        parts["bias"] = bias
    parts |= {name: table.unsqueeze(1) if len(table) > 1 else table for name, table in tables.items()}
    parts["h_zero"] = torch.zeros(1, layer.recurrence.shape[1])
    if layer.cell == "lstm":
        parts["c_zero"] = torch.zeros(1, len(layer.recurrence) // CELLS[layer.cell])
    return {name: value.to(like.device, like.dtype).contiguous() for name, value in parts.items()}
