"""Criteria of Kronecker-factored curvature: what the loss rises by, in nats, when the lines go that make a unit.

Wang, Grosse, Fidler, Zhang, "EigenDamage: Structured Pruning in the Kronecker-Factored Eigenbasis" (2019), section 3,
with F ~ G (x) A in evaluation mode, and George et al. 2018 for S*. They are formulas for one filter, a row of
W [o, i] with its bias as the last column; here a unit is all rows R that make it, with the terms between them: the
gates of a recurrent unit, the queries, keys and values of a head. Where a block sees the unit from the other side (an
embedding, a transposed convolution), rows read as columns and A and G change places. Blocks add, so the curvature
between the members of a residual stream is left out; all scores are in nats and compare across layers.

**Which rows count.** Those of every use whose output has the unit along it, biases of the same block included, so for a
recurrent layer those of the input, recurrent and projecting weights. A convolution of whole groups (depthwise) carries
its units from input to output and makes none: they are counted where they are made, and only there. Affine parameters
of norms and other diagonals do not count beside rows: they scale what the rows make.

**Units without such rows** get 1/2 sum D_k theta_k^2 over the entries of their parameters that have second moments
alone (class tokens, computed weights); if there are none, the score of the lines that read them; if there are none
either, the largest score of all, so that they go last (``facts["unmeasured"]`` counts them).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from kfe_fx.criteria.base import SUMS, Criterion, ScoreContext, register
from kfe_fx.criteria.members import Sets, find_members
from kfe_fx.criteria.quadratics import (
    Lines,
    compensated_change,
    diagonal_change,
    eigenbasis_change,
    entrywise_surgery,
    lines_of,
    removed_change,
)
from kfe_fx.curvature.blocks import Block, Blocks, find_blocks
from kfe_fx.curvature.store import Store
from kfe_fx.errors import BadData

Model = Callable[[Lines, Sets], Tensor]
DAMPING = 1e-3
MADE, READ = "outputs", "inputs"


class CurvatureCriterion(Criterion):
    """A model of the change of the loss on the lines of blocks; see the module for which lines count.

    ``statistics`` is what the model reads: "kfac", "ekfac" or "diagonal".
    """

    needs: ClassVar[frozenset[str]] = frozenset({"curvature"})
    predicts: ClassVar[bool] = True
    statistics: ClassVar[str] = "kfac"

    @abstractmethod
    def change(self, lines: Lines, sets: Sets) -> Tensor:
        """Return what the loss rises by when the lines of each set go, [n]."""

    def score(self, context: ScoreContext) -> np.ndarray:
        """Return the sum over blocks of ``change``, [units]."""
        return Scoring(context).scores(self.statistics, [(MADE, self.change)], [(READ, self.change)])


class Scoring:
    """The blocks of a network and what is asked of them, one question after another."""

    def __init__(self, context: ScoreContext) -> None:
        """Find the units of all blocks."""
        self.context = context
        self.blocks: Blocks = find_blocks(context.program)
        self.members = find_members(context.program, context.analysis, self.blocks)

    def scores(
        self, statistics: str, models: Iterable[tuple[str, Model]], last: Iterable[tuple[str, Model]] = ()
    ) -> np.ndarray:
        """Score each unit by the first question that finds it anywhere, [units].

        Args:
            statistics: what the models read.
            models: side of the blocks ("outputs" or "inputs") and model, asked in turn.
            last: the same, asked for units that have no entries with second moments alone.
        """
        facts, units = self.context.facts, len(self.context.analysis.units)
        scores = np.full(units, np.nan)
        store = self.context.curvature(statistics) if self.members else None
        wanted = SUMS[statistics]
        for side, model in models:
            self._fill(scores, store, wanted, side, model)
        if np.isnan(scores).any():
            self._fill_diagonal(scores)
        for side, model in last:
            self._fill(scores, store, wanted, side, model)
        facts["unmeasured"] = int(np.isnan(scores).sum())
        self.context.changes = scores  # without the made-up ones
        return np.where(np.isnan(scores), scores[~np.isnan(scores)].max(initial=0.0), scores)

    def _fill(self, scores: np.ndarray, store: Store | None, wanted: tuple[str, ...], side: str, model: Model) -> None:
        if store is None or not np.isnan(scores).any():
            return
        total, found = np.zeros(len(scores)), np.zeros(len(scores), dtype=bool)
        for members in self.members:
            held = store.blocks[members.block.name]
            measured = all(key in held.sums for key in wanted)
            if not measured and members.block.name in store.facts.get("nonfinite", {}):
                raise BadData(f"nothing finite was measured of {members.block.name}; fit the curvature again")
            for lying in sorted(getattr(members, side)):
                every = list(members.sets(lying))
                for sets in every:
                    found[sets.units.numpy()] = True
                if not every or not measured:  # where no gradient comes nothing is lost
                    continue
                lines = lines_of(members, lying, self.context.program, held)
                for sets in every:
                    np.add.at(total, sets.units.numpy(), model(lines, sets).clamp_min(0).numpy())
        fresh = found & np.isnan(scores)
        scores[fresh] = total[fresh]

    def _fill_diagonal(self, scores: np.ndarray) -> None:
        """Score what is left by the entries of blocks that have second moments alone."""
        analysis, total = self.context.analysis, np.zeros(len(scores))
        missing = np.isnan(scores)
        wanted = []
        for block in self.blocks.blocks:
            layout = analysis.params.get(self.context.program.names_of(block.weight)[0], ())
            asked = any(missing[ids[ids >= 0]].any() for layers in layout for ids in layers)
            if block.kind != "kronecker" and block.uses.get("eval") and asked:
                wanted.append((block, layout))
        if not wanted:
            return
        store = self.context.curvature() if "curvature" in self.context.store else None
        if store is None or not _has_moments(store, [block for block, _ in wanted]):
            store = self.context.curvature("diagonal")
        found = np.zeros(len(scores), dtype=bool)
        for block, layout in wanted:
            measured = store.blocks[block.name]
            moments = measured.D if measured.D is not None else measured.S  # in no basis of its own S* is D
            weight = self.context.program.tensor(block.weight).detach().double().cpu()
            for ids in owned_entries(layout, tuple(weight.shape)):
                found[ids[ids >= 0]] = True
                if moments is not None:
                    change = 0.5 * moments.double().cpu().reshape(-1) * weight.reshape(-1).square()
                    total += np.bincount(ids[ids >= 0], change.numpy()[ids >= 0], len(total))
        fresh = found & missing
        scores[fresh] = total[fresh]


def _has_moments(store: Store, blocks: list[Block]) -> bool:
    """Tell whether a store has squares of entries of some of these blocks without asking for more."""
    return any({"D", "S"} & store.blocks[block.name].sums.keys() for block in blocks if block.name in store.blocks)


def owned_entries(layout: Iterable[tuple[np.ndarray, ...]], shape: tuple[int, ...]) -> list[np.ndarray]:
    """Return per layer the unit of each entry of a tensor, row-major, so that no unit has an entry twice.

    Args:
        layout: unit ids per dim and layer, -1 for none.
        shape: of the tensor.
    """
    made: list[np.ndarray] = []
    for dim, layers in enumerate(layout):
        for layer in layers:
            place = [-1 if other == dim else 1 for other in range(len(shape))]
            ids = np.broadcast_to(layer.reshape(place), shape).reshape(-1).copy()
            for earlier in made:
                ids[ids == earlier] = -1
            made.append(ids)
    return made


# criteria -------------------------------------------------------------------------------------------------------------


@register
class DiagonalDamage(CurvatureCriterion):
    """C-OBD: 1/2 sum over the entries k of the unit's rows of D_k theta_k^2 (Wang et al. 2019, section 3.1).

    D is the exact diagonal of the generalised Gauss-Newton matrix (up to 20 outputs), biases included. It has no terms
    between entries, which for whole rows are most of the curvature (Laurent et al. 2020): a baseline.
    """

    name: ClassVar[str] = "c-obd"
    statistics: ClassVar[str] = "diagonal"

    def change(self, lines: Lines, sets: Sets) -> Tensor:
        """Return 1/2 sum D_k theta_k^2, [n]."""
        return diagonal_change(lines, sets)


@register
@dataclass(frozen=True)
class DiagonalSurgery(CurvatureCriterion):
    """C-OBS: 1/2 sum over the entries k of the unit's rows of theta_k^2 / [F^-1]_kk (Wang et al. 2019, section 3.1).

    F^-1 = (G + damping mean(lam_G) I)^-1 (x) (A + damping mean(lam_A) I)^-1. It adds what single removals cost, each
    with its own compensation, and so is no bound on what the row costs.
    """

    damping: float = DAMPING
    name: ClassVar[str] = "c-obs"
    predicts: ClassVar[bool] = False  # of the network as it is cut: the change is that after a compensation

    def change(self, lines: Lines, sets: Sets) -> Tensor:
        """Return 1/2 sum theta_k^2 / [F^-1]_kk, [n]."""
        return entrywise_surgery(lines, sets, self.damping)


@register
class KronOBD(CurvatureCriterion):
    """Kron-OBD: 1/2 tr(G_RR W_R A W_R^T), the unit's rows go and nothing else moves (Wang et al. 2019, section 3.2)."""

    name: ClassVar[str] = "kron-obd"

    def change(self, lines: Lines, sets: Sets) -> Tensor:
        """Return 1/2 tr(G_RR W_R A W_R^T), [n]."""
        return removed_change(lines, sets)


@register
@dataclass(frozen=True)
class KronOBS(CurvatureCriterion):
    """Kron-OBS: 1/2 tr(([G^-1]_RR)^-1 W_R A W_R^T), the least that removing the rows costs (Wang et al. 2019, 3.2).

    The other rows of the layer make good what they can; G is damped by ``damping`` times its mean eigenvalue to find
    how, and the cost of that is taken in the undamped G (``compensated_change``), so it is never above Kron-OBD.
    """

    damping: float = DAMPING
    name: ClassVar[str] = "kron-obs"
    predicts: ClassVar[bool] = False  # of the network as it is cut: the change is that after a compensation

    def change(self, lines: Lines, sets: Sets) -> Tensor:
        """Return 1/2 tr(Z^T G Z W_R A W_R^T), [n]."""
        return compensated_change(lines, sets, self.damping)


@register
class Eigenbasis(CurvatureCriterion):
    """KFE: 1/2 theta^T F theta with F = (U_G (x) U_A) diag(S*) (U_G (x) U_A)^T, theta the unit's rows, zeros elsewhere.

    S* are EKFAC's second moments in the eigenbasis (George et al. 2018, equation 7).
    """

    name: ClassVar[str] = "kfe"
    statistics: ClassVar[str] = "ekfac"

    def change(self, lines: Lines, sets: Sets) -> Tensor:
        """Return 1/2 sum_jk S*_jk (U_G^T theta U_A)_jk^2, [n]."""
        return eigenbasis_change(lines, sets, product=False)


@register
class EigenbasisProduct(CurvatureCriterion):
    """KFE with the eigenvalues lam_G lam_A^T of K-FAC in place of S* (EigenDamage's own choice): equals Kron-OBD."""

    name: ClassVar[str] = "kfe-product"

    def change(self, lines: Lines, sets: Sets) -> Tensor:
        """Return 1/2 sum_jk lam_G_j lam_A_k (U_G^T theta U_A)_jk^2, [n]."""
        return eigenbasis_change(lines, sets, product=True)
