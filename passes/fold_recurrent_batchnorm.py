"""Pass ``fold-recurrent-batchnorm``: normalisation by frozen statistics goes into the weights of recurrent layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from kfe_fx.passes.base import Pass, PassResult
from kfe_fx.program import Program
from kfe_fx.recurrent.layers import Layer, drop_unread, find_layers, free_name, read_by_others, set_tensor
from kfe_fx.recurrent.norms import folded

_NAMES = {"ih": "input", "hh": "hidden"}
_PARTS = ("gamma", "mean", "var")


@dataclass(frozen=True)
class FoldRecurrentBatchnorm(Pass):
    """Fold each side that has one row of statistics, frozen, into its weight and its bias, exactly:

        W <- s W        b <- b - s mean        s = gamma / sqrt(var + eps)

    A GRU's hidden side is shifted in b_hh, inside r * (...). A layer without any normalisation left is the plain one,
    and runs in its kernels. The normalisation of the cell state stays: a scale of all channels goes into an ONNX LSTM
    as it is, one of each channel does not.
    """

    name: ClassVar[str] = "fold-recurrent-batchnorm"
    keeps: ClassVar[str] = "exact"

    def run(self, program: Program) -> PassResult:
        """Return the folded Program; facts say per layer what was ``folded``, and what was ``left`` and why."""
        twin = program.copy()
        done: dict[str, list[str]] = {}
        left: dict[str, dict[str, str]] = {}
        for layer in find_layers(twin):
            if not layer.call.normalised:
                continue
            reasons = {side: _reason(twin, layer, side) for side in _NAMES}
            sides = [side for side, reason in reasons.items() if reason == ""]
            for side in sides:
                _fold(twin, layer, side)
            why = {_NAMES[side]: reason for side, reason in reasons.items() if reason}
            if layer.call.gamma_c is not None:
                why["cell"] = _cell_reason(layer)
            elif layer.call.seen is not None and not layer.call.normalised:
                _drop(twin, layer, {"seen": None, "training": False, "shared": False})
            if sides:
                done[layer.name] = [_NAMES[side] for side in sides]
            if why:
                left[layer.name] = why
        facts: dict[str, Any] = {"folded": done, "left": left}
        if not done:
            return PassResult(program, False, facts)
        twin.module().recompile()
        twin.lineage = (*program.lineage, self.name)
        return PassResult(twin, True, facts)


def _reason(program: Program, layer: Layer, side: str) -> str | None:
    """Return why a side stays as it is, "" where it folds, or None where it is not normalised."""
    if getattr(layer.call, f"gamma_{side}") is None:
        return None
    held = layer.tensors(program)
    if layer.trains:
        return "its statistics move in training; run finalise-recurrent first"
    if (rows := len(getattr(held, f"var_{side}"))) > 1:
        return f"it has {rows} rows of statistics, for as many steps; run finalise-recurrent first"
    reader = read_by_others(program, layer, f"weight_{side}")
    if reader is not None:
        return f"its weight is read by {reader} too"
    return ""


def _cell_reason(layer: Layer) -> str:
    if layer.call.beta_c is None:
        return "the cell state is normalised by one scale, which stays"
    return "the cell state is normalised by channel, which no plain layer does"


def _fold(program: Program, layer: Layer, side: str) -> None:
    """Fold one side, in float64, and take what it leaves unused out of the module."""
    held = layer.tensors(program)
    names = [f"{part}_{side}" for part in ("weight", "bias", *_PARTS)]
    tensors = {name: None if (value := getattr(held, name)) is None else value.detach().double() for name in names}
    others = {f"{part}_{other}": None for other in _NAMES if other != side for part in _PARTS}
    found = folded(replace(held, **tensors, **others))
    weight, bias = (getattr(found, f"{part}_{side}") for part in ("weight", "bias"))
    like: Tensor = getattr(held, f"weight_{side}")
    changes: dict[str, Any] = {f"{part}_{side}": None for part in _PARTS}
    with torch.no_grad():
        like.copy_(weight)
        name = layer.tensor_name(f"bias_{side}")
        if name is None or read_by_others(program, layer, f"bias_{side}"):
            changes[f"bias_{side}"] = free_name(program, layer.name_of(f"bias_{side}"))
            set_tensor(program, changes[f"bias_{side}"], bias, like, learned=True)
        else:
            program.tensor(name).copy_(bias)
    _drop(program, layer, changes)


def _drop(program: Program, layer: Layer, changes: dict[str, Any]) -> None:
    """Change arguments, and take the tensors out that the layer was the only one to read."""
    gone = [name for argument in changes if (name := layer.tensor_name(argument)) is not None]
    layer.rewrite(program, changes)
    drop_unread(program, gone)
