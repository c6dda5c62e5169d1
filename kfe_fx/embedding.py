"""Between a shrunk network and the original: indices, tensors and scores carried back and forth.

A pruning run takes every decision on the units of the original network, and the weights live in the smaller one. So
after each round the weights are put back into their places in a copy of the original.
"""

from __future__ import annotations

import numpy as np
import torch

from kfe_fx.labels.analysis import Analysis
from kfe_fx.plan import is_literal
from kfe_fx.program import Program, named_tensors

Kept = dict[str, list[tuple[int, list[int]]]]


def embed(original: Program, small: Program, kept: Kept) -> Program:
    """Return a copy of ``original`` whose kept slices hold the tensors of ``small``; the others stay as they were."""
    full = original.copy()
    values = named_tensors(small.module())
    with torch.no_grad():
        for name, target in named_tensors(full.module()).items():
            if name not in values:
                continue
            view = target.detach()
            if is_literal(name):
                continue  # it follows the units and is never trained
            index = tuple(_axis(view, dim, kept.get(name, [])) for dim in range(view.dim()))
            if view.dim():
                view[index] = values[name].detach()
            else:
                view.copy_(values[name])
    return full


def _axis(tensor: torch.Tensor, dim: int, changes: list[tuple[int, list[int]]]) -> torch.Tensor:
    indices = dict(changes).get(dim)
    line = torch.arange(tensor.shape[dim]) if indices is None else torch.tensor(indices)
    return line.reshape([-1 if axis == dim else 1 for axis in range(tensor.dim())])


def relative(before: Kept, after: Kept) -> Kept:
    """Tell ``after`` (kept indices of the original) in the indices of the network that ``before`` left."""
    steps: Kept = {}
    for name, changes in after.items():
        old = dict(before.get(name, []))
        step = []
        for dim, indices in changes:
            if dim not in old:
                step.append((dim, indices))
            elif len(old[dim]) != len(indices):
                step.append((dim, np.searchsorted(old[dim], indices).tolist()))
        if step:
            steps[name] = step
    return steps


def lift_scores(original: Analysis, small: Analysis, scores: np.ndarray, kept: Kept) -> np.ndarray:
    """Give each unit of the original the score of its slices in the smaller network; removed units score 0.

    A unit of the smaller network that joins several of the original is shared out among them; one that is a part of an
    original unit adds to it.
    """
    touched = [units_at(small, unit.slices, kept) for unit in original.units]
    shares = np.zeros(len(small.units))
    for found in touched:
        for unit in found:
            shares[unit] += 1
    lifted = np.zeros(len(original.units))
    for number, found in enumerate(touched):
        lifted[number] = sum(scores[unit] / shares[unit] for unit in found)
    return lifted


def units_at(small: Analysis, slices: dict[str, dict[int, tuple[int, ...]]], kept: Kept) -> set[int]:
    """Return the units of the smaller network at slices of the original, read at the first tensor that has any."""
    found: set[int] = set()
    for name, dims in slices.items():
        if name not in small.params or is_literal(name):
            continue
        for dim, indices in dims.items():
            line = dict(kept.get(name, [])).get(dim)
            places = np.asarray(indices) if line is None else np.flatnonzero(np.isin(line, indices))
            for layer in small.params[name][dim]:
                found |= set(layer[places].tolist()) - {-1}
        if found:
            return found
    return found
