"""Weights of recurrent layers as ONNX wants them: batch normalisation folded in, gates in its order.

Of normalisation whose statistics are fixed, s = gamma / sqrt(var + eps),

    s (W x - mean) + b = (s W) x + (b - s mean)

so one row of statistics is folded into weight and bias of its side, exactly; a GRU's hidden bias stays its own, since
r multiplies it. What differs from step to step, or acts on the cell state channel by channel, stays a table.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kfe_fx.recurrent.norms import SIDES, folded, scale_of, shared_rows
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


def fold(call: Arguments) -> Folded:
    """Fold what can be folded of the tensors in ``call``, which must hold values."""
    call = folded(_one_row_each(call))
    tables: dict[str, Tensor] = {}
    if call.gamma_ih is not None:
        tables["x_scale"], tables["x_shift"] = _affine(call, "ih")
    if call.gamma_hh is not None:
        tables["h_scale"], shift = _affine(call, "hh")
        if call.cell == "gru":
            tables["h_shift"] = shift
        else:  # the sides meet in a sum
            tables["x_shift"] = _sum_of_rows(tables["x_shift"], shift) if "x_shift" in tables else shift
    scale = None
    if call.gamma_c is not None:
        table = scale_of(call.gamma_c, call.var_c, call.eps)  # [rows, H or 1]
        if call.beta_c is not None:
            tables["c_scale"], tables["c_shift"] = table, call.beta_c - table * call.mean_c
        elif table.numel() == 1:  # one scale of all, which does not centre
            scale = float(table)
        else:
            tables["c_scale"] = table
    sides = call.weight_ih, call.weight_hh, call.bias_ih, call.bias_hh
    return Folded(call.cell, *sides, call.weight_hr, scale, tables)


def _one_row_each(call: Arguments) -> Arguments:
    """Take tensors in float64, and one row of statistics of a side where all are equal."""
    given = {name: value.detach().double() for name, value in vars(call).items() if isinstance(value, Tensor)}
    for side in SIDES:
        held = {name: given[name] for name in (f"mean_{side}", f"var_{side}") if name in given}
        if shared_rows(*held.values()):
            given |= {name: table[:1] for name, table in held.items()}
    return replace(call, **given)


def _affine(call: Arguments, side: str) -> tuple[Tensor, Tensor]:
    """Return what normalisation multiplies by and adds, [rows, g H] each."""
    gamma, mean, var = (getattr(call, f"{part}_{side}") for part in ("gamma", "mean", "var"))
    scale = scale_of(gamma, var, call.eps)
    return scale, -scale * mean


def _sum(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return left + right


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
    weight, recurrence = (one.to(like.dtype).contiguous() for one in (weight, recurrence))
    return weight, recurrence, None if bias is None else bias.to(like.dtype).contiguous()


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
