"""Steps: in which portions the units of a group may go, so that widths stay multiples of what the device likes."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import fx

from kfe_fx.cost.count import CostModel
from kfe_fx.cost.multiplications import ANY_CONVOLUTION, CONVOLUTIONS, PRODUCTS, TRANSPOSED, aten
from kfe_fx.errors import UsageError
from kfe_fx.recurrent.op import RECURRENT, Arguments

if TYPE_CHECKING:
    from kfe_fx.labels.analysis import Analysis

LARGEST_SCORE = 1e200  # sums of scores, and their products with costs, are finite


@dataclass(frozen=True)
class Track:
    """The order in which a group's units go: at stop ``j`` those of ``portions[:j]``, at a loss of ``loss[j]``."""

    group: int
    portions: tuple[tuple[int, ...], ...]
    loss: tuple[float, ...]

    def __len__(self) -> int:
        """Count the portions."""
        return len(self.portions)

    def gone(self, stop: int) -> list[int]:
        """Return the units that are gone at a stop."""
        return [unit for portion in self.portions[:stop] for unit in portion]


def check_scores(analysis: Analysis, scores: Any) -> np.ndarray:
    """Return scores as float64, one per unit; infinity means never.

    Raises:
        UsageError: not one number per unit, NaN among them, or numbers too large to add up.
    """
    array = np.asarray(scores, dtype=np.float64)
    if array.shape != (len(analysis.units),):
        raise UsageError(f"one score per unit is needed: {len(analysis.units)} units, scores of shape {array.shape}")
    if np.isnan(array).any():
        raise UsageError(f"the score of unit {int(np.isnan(array).argmax())} is NaN; see to the data or the criterion")
    large = np.isfinite(array) & (np.abs(array) > LARGEST_SCORE)
    if large.any():
        unit = int(large.argmax())
        raise UsageError(f"the score of unit {unit} is {array[unit]:g}, too large to add up; scale the scores down")
    return array


def by_score(units: Iterable[int], scores: np.ndarray) -> list[int]:
    """Sort units by score, the least important first, ties by id."""
    return sorted(units, key=lambda unit: (scores[unit], unit))


def protected_units(analysis: Analysis, scores: np.ndarray) -> set[int]:
    """Return units that must stay so that every floor keeps one: the best of each floor that no other protects."""
    kept: set[int] = set()
    for floor in sorted(analysis.floors, key=lambda floor: (len(floor), sorted(floor))):
        if floor and kept.isdisjoint(floor):
            kept.add(by_score(floor, scores)[-1])
    return kept


def frozen_groups(analysis: Analysis, keep: Sequence[str]) -> dict[int, str]:
    """Return the groups that the globs ``keep`` freeze, each with the glob that does.

    A glob matches the name of a parameter in which the group's units are minted ("head.*"), or its module ("head").

    Raises:
        UsageError: a glob that matches no tensor at all.
    """
    frozen: dict[int, str] = {}
    for glob in keep:
        if not any(matches(name, glob) for name in analysis.params):
            raise UsageError(f"--keep {glob!r} matches no parameter; kfe-fx inspect lists their names")
        for group in analysis.groups:
            if any(matches(name, glob) for name, _ in group.dims):
                frozen.setdefault(group.id, glob)
    return frozen


def matches(name: str, glob: str) -> bool:
    """Tell whether a glob means a parameter: by its name, or by its module's."""
    return fnmatch.fnmatchcase(name, glob) or fnmatch.fnmatchcase(name.rpartition(".")[0], glob)


def kernel_widths(model: CostModel) -> list[int]:
    """Return the widths that kernels see as channels or features: the first two dims of every weight they contract.

    Hidden units of recurrent layers are left out: no staircase was seen in their number, which is that of columns of
    weights, and with four gates a fourth of their rows.
    """
    found: set[int] = set()
    hidden: set[int] = set()
    for node in model.graph.nodes:
        for weight in _weights(node):
            for dim in model.shape(weight)[:2]:
                found.update(dim.widths)
        if node.target is RECURRENT:
            hidden.update(model.shape(Arguments.of(node).weight_hh)[1].widths)
    return sorted(found - hidden)


def _weights(node: fx.Node) -> list[fx.Node]:
    positions: tuple[int, ...] = ()
    if node.target in CONVOLUTIONS | TRANSPOSED | ANY_CONVOLUTION | {aten.linear.default}:
        positions = (1,)
    elif node.target in PRODUCTS:
        positions = PRODUCTS[node.target]  # type: ignore[index]
    operands = [node.args[position] for position in positions]
    return [operand for operand in operands if isinstance(operand, fx.Node) and operand.op == "get_attr"]


@dataclass(frozen=True)
class _Rule:
    """A width that must stay a multiple: ``base`` slices that count, ``owned[u]`` of them per unit."""

    base: int
    owned: np.ndarray


class Stepper:
    """Makes the tracks of all groups of a network for one block size."""

    def __init__(self, model: CostModel, multiple_of: int = 16) -> None:
        """Read which units lie along the widths of kernels.

        Raises:
            UsageError: ``multiple_of`` is less than 1.
        """
        if multiple_of < 1:
            raise UsageError(f"--multiple-of takes a whole number of at least 1, got {multiple_of}")
        self.model = model
        self.analysis = model.analysis
        self.block = multiple_of
        self._group_of = np.full(model.widths.units, -1, dtype=np.int64)
        for group in self.analysis.groups:
            self._group_of[list(group.units)] = group.id
        self._rules: dict[int, list[tuple[int, bool, _Rule]]] = {}
        self._collect()

    def _collect(self) -> None:
        widths = self.model.widths
        minted: dict[int, set[int]] = {}
        for group in self.analysis.groups:
            products = (self.model.tensor_shape(name)[dim] for name, dim in group.dims)
            minted[group.id] = {width for product in products for width in product.widths}
        kernels = set(kernel_widths(self.model))
        for width in sorted(kernels.union(*minted.values())):
            units, counts = widths.members(width)
            owners = self._group_of[units]
            groups = np.unique(owners)
            fixed = widths.dense[width] - int(counts.sum()) if len(widths.layers[width]) == 1 else 0
            for group in groups[groups >= 0].tolist():
                inside = owners == group
                owned = np.zeros(widths.units, dtype=np.int64)
                owned[units[inside]] = counts[inside]
                # Where several groups share a dim (a concatenation), each keeps its own part a multiple.
                base = int(owned.sum()) + (fixed if len(groups) == 1 else 0)
                entry = (width, width in minted[group], _Rule(base, owned))
                self._rules.setdefault(group, []).append(entry)
        for group, entries in self._rules.items():
            seen = [entry for entry in entries if entry[0] in kernels]
            self._rules[group] = seen or entries

    def rules(self, group: int) -> list[_Rule]:
        """Return what must stay a multiple when a group is cut; empty when the group is too small to be cut."""
        entries = self._rules.get(group, [])
        wide = [(minted, rule) for _, minted, rule in entries if rule.base >= self.block]
        if self.block > 1 and not any(rule.base > self.block for _, rule in wide):
            return []
        # a dim that is no multiple to begin with is brought to one where the group is minted, and left alone elsewhere
        return [rule for minted, rule in wide if rule.base % self.block == 0 or (minted and rule.base > self.block)]

    def track(self, group: Any, scores: np.ndarray, protected: set[int], cap: float, least: int | None = None) -> Track:
        """Return in which portions the units of a group may go, the least important first.

        At most the fraction ``cap`` of the units go, or all but ``least``, and none that is protected or has an
        infinite score.
        """
        order = [unit for unit in by_score(group.units, scores) if unit not in protected and scores[unit] != math.inf]
        allowed = math.floor(cap * len(group.units) + 1e-9) if least is None else len(group.units) - least
        most = min(len(order), allowed)
        rules = self.rules(group.id)
        if not rules and self.block > 1:
            return Track(group.id, (), (0.0,))
        portions = self._portions(order, most, rules)
        if not portions and len(rules) > 1:  # rules that contradict each other: the widest decides
            portions = self._portions(order, most, [max(rules, key=lambda rule: rule.base)])
        lost = np.where(np.isneginf(scores), 0.0, scores)  # what is gone already
        loss = np.cumsum([0.0, *(float(lost[list(portion)].sum()) for portion in portions)])
        return Track(group.id, tuple(portions), tuple(loss.tolist()))

    def _portions(self, order: list[int], most: int, rules: list[_Rule]) -> list[tuple[int, ...]]:
        if not order or not most:
            return []
        if self.block == 1:
            return [(unit,) for unit in order[:most]]
        owned = np.array([rule.owned[order] for rule in rules]).reshape(len(rules), len(order))
        base = np.array([rule.base for rule in rules], dtype=np.int64)[:, None]
        if (owned == owned[:, :1]).all():  # units of one size: every prefix of the order is a candidate
            left = base - owned[:, :1] * np.arange(1, most + 1)
            fits = ((left % self.block == 0) & (left >= self.block)).all(axis=0)
            stops = [0, *(np.flatnonzero(fits) + 1).tolist()]
            return [tuple(order[a:b]) for a, b in pairwise(stops)]
        return self._packed(order, most, owned, base[:, 0])

    def _packed(self, order: list[int], most: int, owned: np.ndarray, base: np.ndarray) -> list[tuple[int, ...]]:
        """Fill each portion with the least important units that fit exactly, where units differ in size."""
        lead = int(base.argmax())
        weight = owned[lead].tolist()
        left = base.copy()
        free = [index for index, owns in enumerate(weight) if owns]
        portions: list[tuple[int, ...]] = []
        room = most
        for target in range((int(left[lead]) - 1) // self.block * self.block, 0, -self.block):
            need, picked = int(left[lead]) - target, []
            for index in free:
                if weight[index] <= need and len(picked) < room:
                    picked.append(index)
                    need -= weight[index]
            rest = left - owned[:, picked].sum(axis=1)
            if need == 0 and (rest % self.block == 0).all() and (rest >= self.block).all():
                portions.append(tuple(order[index] for index in picked))
                left, room = rest, room - len(picked)
                gone = set(picked)
                free = [index for index in free if index not in gone]
        return portions
