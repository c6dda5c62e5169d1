"""The masked original: what a removal must equal.

A removed unit is set to zero where its label was minted, and again after an operation only where that operation makes
something else of zero (a norm's shift, a bias, sigmoid): decided by running the operation on zeros, not by the labels.
A label that spread wrongly therefore shows as a difference. Where a statistic runs over removed units, the masked
norm takes it over those that stay, which is the change of function that the report names.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.fx.node import map_arg

from kfe_fx.labels.analysis import BATCH, Analysis
from kfe_fx.labels.sites import Site
from kfe_fx.program import GraphInterpreter
from kfe_fx.recurrent.op import RECURRENT, Arguments

aten = torch.ops.aten


def run_masked(analysis: Analysis, removed: set[int] | frozenset[int], flat_inputs: list[Any]) -> tuple[Any, ...]:
    """Run the original network of ``analysis`` with the ``removed`` units masked; return its flat outputs."""
    return _Masked(analysis, removed).run(*flat_inputs)


class _Masked(GraphInterpreter):
    def __init__(self, analysis: Analysis, removed: set[int] | frozenset[int]) -> None:
        super().__init__(analysis.program.module(), graph=analysis.program.graphs["eval"])
        self.tracker = analysis.trackers["eval"]
        self.table = analysis.table
        self.gone = np.zeros(len(analysis.units) + 1, dtype=bool)
        self.gone[list(removed)] = True
        self.gone[-1] = False
        self.minted: dict[str, set[int]] = {}
        self.inside: dict[str, list[Site]] = {}
        for site in analysis.sites:
            if site.argument is None:
                self.minted.setdefault(site.node, set()).add(site.dim)
            else:
                self.inside.setdefault(site.node, []).append(site)

    def run_node(self, n: fx.Node) -> Any:
        if n.name in self.inside:
            return self._masked_inside(n)
        value = self.tracker.values.get(n)
        state = n.op == "placeholder" and n.name in self.minted
        if (n.op != "call_function" and not state) or n in self.tracker.static or not isinstance(value, tuple):
            return super().run_node(n)
        result = super().run_node(n)
        masks = self._masks(value, result.shape)
        if not masks:
            return result
        if n.name in self.tracker.statistics and any(dim in masks for dim in self.tracker.statistics[n.name]):
            result = self._norm(n, masks)
            forced = set(masks)  # centring moves zero wherever it stands
        else:
            forced = {dim for dim in masks if dim in self.minted.get(n.name, ())}
        if not state:
            forced |= {dim for dim in masks if dim not in forced and self._moves_zero(n, dim, masks[dim])}
        for dim in forced:
            shaped = masks[dim].reshape([-1 if axis == dim else 1 for axis in range(result.dim())])
            result = torch.where(shaped, torch.zeros((), dtype=result.dtype), result)
        return result

    def _masked_inside(self, n: fx.Node) -> Any:
        """Multiply removed units by zero where they stand inside the operation, at every step."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        call = Arguments(*args, **kwargs)
        for site in self.inside[n.name]:
            gone = torch.from_numpy(self.gone[site.units])
            if not gone.any():
                continue
            stays = (~gone).to(call.weight_ih.dtype).unsqueeze(0)
            call = replace(call, **{str(site.argument): stays})
            if site.argument == "gate" and Arguments.of(n).h0 in self.tracker.static:  # learned: not masked elsewhere
                call = replace(call, h0=call.h0 * stays)
        args, kwargs = call.call()
        return RECURRENT(*args, **kwargs)

    def _masks(self, value: Any, shape: torch.Size) -> dict[int, torch.Tensor]:
        masks = {}
        for dim, layers in enumerate(self.table.layout(value)):
            lost = [self.gone[at_size(layer, shape[dim])] for layer in layers]
            if lost and np.logical_or.reduce(lost).any():
                masks[dim] = torch.from_numpy(np.logical_or.reduce(lost))
        return masks

    def _moves_zero(self, n: fx.Node, dim: int, mask: torch.Tensor) -> bool:
        """Run the operation with zeros for every activation that carries the units removed along ``dim``.

        Other operands stay as they are: what is subtracted from a removed unit (a mean over all) moves it.
        """
        gone = self._removed_in(self.tracker.values[n][dim : dim + 1])

        def zeroed(arg: fx.Node) -> Any:
            value = self.env[arg]
            if not isinstance(value, torch.Tensor) or arg in self.tracker.static:
                return value
            return torch.zeros_like(value) if gone & self._removed_in(self.tracker.values[arg]) else value

        args, kwargs = map_arg((n.args, n.kwargs), zeroed)
        result = n.target(*args, **kwargs)  # type: ignore[operator]
        return bool((result.movedim(dim, 0)[mask] != 0).any())

    def _removed_in(self, dims: Any) -> set[int]:
        found = (layer[self.gone[layer]] for layers in self.table.layout(dims) for layer in layers)
        return {int(unit) for units in found for unit in units}

    def _norm(self, n: fx.Node, masks: dict[int, torch.Tensor]) -> torch.Tensor:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        names = [argument.name for argument in n.target._schema.arguments]  # type: ignore[union-attr]
        given = dict(zip(names, args, strict=False)) | kwargs
        return masked_norm(str(n.target), given, masks)


def at_size(layer: np.ndarray, size: int) -> np.ndarray:
    """Stretch unit ids along a dim that the batch is folded into, from the analysis batch to another one."""
    if len(layer) == size:
        return layer
    units = len(layer) // BATCH
    if np.array_equal(layer, np.tile(layer[:units], BATCH)):
        return np.tile(layer[:units], size // units)
    return layer[::BATCH].repeat(size // units)


def masked_norm(target: str, given: dict[str, Any], masks: dict[int, torch.Tensor]) -> torch.Tensor:
    """Normalise with the statistic over the indices that stay; ``masks[dim]`` marks those that go."""
    inputs = given["input"]
    stays = torch.ones(inputs.shape, dtype=inputs.dtype)
    for dim, mask in masks.items():
        stays = stays * (~mask).to(inputs.dtype).reshape([-1 if axis == dim else 1 for axis in range(inputs.dim())])
    if "group_norm" in target:
        groups = given["num_groups"]
        table = inputs.reshape(inputs.shape[0], groups, -1)
        normal = _standardised(table, stays.reshape(table.shape), (2,), given.get("eps", 1e-5)).reshape(inputs.shape)
        affine = [-1 if axis == 1 else 1 for axis in range(inputs.dim())]
    else:
        over = tuple(range(inputs.dim() - len(given["normalized_shape"]), inputs.dim()))
        eps = given.get("eps")
        eps = torch.finfo(inputs.dtype).eps if eps is None else eps
        normal = _standardised(inputs, stays, over, eps, centred="layer_norm" in target)
        affine = list(inputs.shape[-len(over) :])
    if given.get("weight") is not None:
        normal = normal * given["weight"].reshape(affine)
    return normal if given.get("bias") is None else normal + given["bias"].reshape(affine)


def _standardised(
    values: torch.Tensor, stays: torch.Tensor, over: tuple[int, ...], eps: float, *, centred: bool = True
) -> torch.Tensor:
    count = stays.sum(over, keepdim=True)
    mean = (values * stays).sum(over, keepdim=True) / count if centred else torch.zeros((), dtype=values.dtype)
    variance = ((values - mean) ** 2 * stays).sum(over, keepdim=True) / count
    return (values - mean) * torch.rsqrt(variance + eps)
