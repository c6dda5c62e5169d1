"""Criteria ``bn-scale``, ``lamp`` and ``fpgm``: what the weights alone say, without data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, fx

from kfe_fx.criteria.base import Criterion, ScoreContext, register
from kfe_fx.criteria.magnitude import norm_scales
from kfe_fx.criteria.members import ROWS, Members, find_members, gathered
from kfe_fx.errors import UsageError
from kfe_fx.program import Program
from kfe_fx.recurrent.op import RECURRENT, Arguments

aten = torch.ops.aten


@register
class BatchNormScale(Criterion):
    """Score by the mean |gamma| of the batch norms that normalise a unit (network slimming, Liu et al. 2017, eq. 1).

    It means something where training pressed the gammas down (an L1 penalty), as the paper does. Batch norms inside
    recurrent layers count too, with one gamma a gate. A unit that no batch norm with a gamma normalises gets more than
    all others together, so that it goes last; ``facts["unnormalised"]`` counts these.
    """

    name: ClassVar[str] = "bn-scale"

    def score(self, context: ScoreContext) -> np.ndarray:
        """Return mean |gamma| over the unit's entries of all gammas, [units].

        Raises:
            UsageError: the network has no batch norm with a gamma over a unit.
        """
        units = len(context.analysis.units)
        total, count = np.zeros(units), np.zeros(units)
        for name in sorted(_gammas(context.program)):
            values = context.program.tensor(name).detach().double().abs().reshape(-1).cpu().numpy()
            for ids in (ids for layers in context.analysis.params[name] for ids in layers):
                total += np.bincount(ids[ids >= 0], values[ids >= 0], units)
                count += np.bincount(ids[ids >= 0], minlength=units)
        if units and not count.any():
            raise UsageError(
                "the criterion 'bn-scale' ranks by the scales of batch norms, and no unit has one; choose another"
            )
        scores = total / np.maximum(count, 1)
        context.facts["unnormalised"] = int((count == 0).sum())
        return np.where(count > 0, scores, scores.sum() + scores.max(initial=0.0))


def _gammas(program: Program) -> set[str]:
    """Return the names of all scales of batch norms, outside and inside of recurrent layers."""
    found: set[str] = set()
    for node in program.graphs["eval"].nodes:
        scales = []
        if node.target is aten.batch_norm.default:
            scales = [node.args[1]]
        elif node.target is RECURRENT:
            call = Arguments.of(node)
            scales = [call.gamma_ih, call.gamma_hh, call.gamma_c]
        read = [one for one in scales if isinstance(one, fx.Node) and one.op == "get_attr"]
        found |= {program.names_of(str(one.target))[0] for one in read}
    return found


@register
class LAMP(Criterion):
    """Layer-adaptive magnitude (Lee et al. 2021, equation 3), with units in place of weights and groups of layers.

        score_u = |w_u|^2 / sum of |w_v|^2 over the units v of the same group with |w_v| >= |w_u|

    |w_u|^2 sums over all weights that go with the unit, each with the scale of the batch norm behind it folded in
    (``magnitude``); vectors count only for units that own nothing else. The largest unit of each group has the score 1.
    """

    name: ClassVar[str] = "lamp"

    def score(self, context: ScoreContext) -> np.ndarray:
        """Return the share of each unit's energy among those not smaller, [units]."""
        energy = _energies(context)
        scores = np.zeros(len(energy))
        for group in context.analysis.groups:
            units = np.array(group.units)
            scores[units] = _shares(energy[units])
        return scores

    def weights(self, context: ScoreContext) -> dict[str, Tensor]:
        """Return theta_k^2 / sum of theta_v^2 over the v of the same weight that are not smaller, float64.

        This is the criterion as it was published: equal entries come one after another, so that the last of the largest
        has the score 1 and no layer is emptied before the others. The scale of a batch norm does not enter.
        """
        return {name: _ordered_shares(weight.detach().double().square()) for name, weight in context.weights().items()}


def _shares(energy: np.ndarray) -> np.ndarray:
    """Return the share of each entry in the sum of those that are not smaller, ties included; 0 where all are 0."""
    ascending = np.sort(energy)
    above = np.cumsum(ascending[::-1])[::-1]
    total = above[np.searchsorted(ascending, energy)]
    return np.divide(energy, total, out=np.zeros(len(energy)), where=total > 0)


def _ordered_shares(energy: Tensor) -> Tensor:
    """Return the share of each entry in the sum of itself and those behind it in ascending order; 0 where all are 0."""
    ascending, order = energy.flatten().sort(stable=True)
    total = ascending.flip(0).cumsum(0).flip(0)
    found = torch.empty_like(ascending)
    found[order] = torch.where(total > 0, ascending / total, 0.0)
    return found.view_as(energy)


def _energies(context: ScoreContext) -> np.ndarray:
    """Return the sum of the squares of each unit's weights behind their norms, [units]; see ``LAMP``."""
    units = len(context.analysis.units)
    matrices, vectors, owning = np.zeros(units), np.zeros(units), np.zeros(units, dtype=bool)
    for weight, layout in _scaled(context):
        squares = weight.square()
        for dim, layers in enumerate(layout):
            along = squares.movedim(dim, 0).reshape(weight.shape[dim], -1).sum(1).numpy()
            for ids in layers:
                owned = ids >= 0
                added = np.bincount(ids[owned], along[owned], units)
                if weight.dim() > 1:
                    matrices += added
                    owning[ids[owned]] = True
                else:
                    vectors += added
    return np.where(owning, matrices, vectors)


def _scaled(context: ScoreContext) -> Iterator[tuple[Tensor, list[tuple[np.ndarray, ...]]]]:
    """Yield each parameter with the scale of the norm behind it, and its layout."""
    program, scales = context.program, norm_scales(context.program)
    parameters = {name for name, _ in program.module().named_parameters(remove_duplicate=False)}
    for name, layout in context.analysis.params.items():
        if name in parameters and any(layout):
            yield (program.tensor(name).detach().double() * scales.get(name, 1.0)).cpu(), layout


@register
class GeometricMedian(Criterion):
    """FPGM (He et al. 2019, equation 4), as a mean: how far it is to the other filters of the layer.

        score_u = 1 / (n - 1) * sum over the n units v of the layer of |w_u - w_v|_2

    Within a layer the mean ranks as the published sum does; across layers the sum grows with their width.

    w_u are the rows that make the unit (all gates, or all rows of a head, in their order), without biases and with the
    scale of the batch norm behind them folded in. It takes away what others can stand in for, not what is small. A unit
    that several layers make gets the mean over them; one that none makes is compared by all weights that it owns.
    """

    name: ClassVar[str] = "fpgm"

    def score(self, context: ScoreContext) -> np.ndarray:
        """Return the mean distance, itself a mean over the layers that make the unit, [units]."""
        units = len(context.analysis.units)
        total, count = np.zeros(units), np.zeros(units)
        scales = norm_scales(context.program)
        for members in find_members(context.program, context.analysis):
            for ids, filters in _filters(members, context.program, scales):
                np.add.at(total, ids, _distances(filters))
                np.add.at(count, ids, 1)
        missing = count == 0
        if missing.any():
            self._compare_all(context, missing, total, count)
        return total / np.maximum(count, 1)

    def _compare_all(self, context: ScoreContext, missing: np.ndarray, total: np.ndarray, count: np.ndarray) -> None:
        """Add the distances by every dim of every parameter for units that no layer makes."""
        for weight, layout in _scaled(context):
            for dim, ids in ((dim, ids) for dim, layers in enumerate(layout) for ids in layers):
                for units, places in _by_count(np.zeros_like(ids), ids):
                    if missing[units].any():
                        found = _distances(weight.movedim(dim, 0).reshape(len(ids), -1)[places[:, :, 1]].flatten(1))
                        np.add.at(total, units[missing[units]], found[missing[units]])
                        np.add.at(count, units[missing[units]], 1)


def _filters(members: Members, program: Program, scales: dict[str, Tensor]) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Yield the units that a block makes and their rows one after another, [n, entries]."""
    block = members.block
    weight = program.tensor(block.weight).detach().double()
    matrix = gathered(block, (weight * scales.get(program.names_of(block.weight)[0], 1.0)).cpu())
    for side in sorted(members.outputs):
        lines = matrix if side == ROWS else matrix.mT
        for ids in members.rows if side == ROWS else members.columns:
            ids = ids[:, : lines.shape[1]]  # the column of the bias is no unit's
            groups = np.broadcast_to(np.arange(len(ids))[:, None], ids.shape)
            for units, places in _by_count(groups, ids):
                yield units, lines[places[..., 0], places[..., 1]].flatten(1)


def _by_count(groups: np.ndarray, ids: np.ndarray) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Yield units with equally many lines and the places (group, line) of these, [n] and [n, r, 2]."""
    owned = np.flatnonzero(ids >= 0)
    order = owned[np.argsort(ids.reshape(-1)[owned], kind="stable")]
    units, starts, counts = np.unique(ids.reshape(-1)[order], return_index=True, return_counts=True)
    for size in np.unique(counts):
        chosen = order[starts[counts == size][:, None] + np.arange(size)]
        yield units[counts == size], np.stack([groups.reshape(-1)[chosen], chosen % ids.shape[-1]], -1)


def _distances(filters: Tensor) -> np.ndarray:
    """Return the mean distance of each row to the others, [n]."""
    return (torch.cdist(filters, filters).sum(1) / max(1, len(filters) - 1)).numpy()
