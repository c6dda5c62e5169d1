"""Units: merged labels with all their slices of all tensors; groups, floors and what is frozen."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from kfe_fx.labels.sites import Mint, Site
from kfe_fx.labels.tracker import Dims, Tracker
from kfe_fx.labels.unionfind import Reason, UnionFind
from kfe_fx.program import Program, tied_names


@dataclass(frozen=True)
class Unit:
    """The least thing that can be removed: ``slices[parameter][dim]`` are the indices that go with it."""

    id: int
    group: int
    slices: dict[str, dict[int, tuple[int, ...]]]


@dataclass(frozen=True)
class Group:
    """A removable dim: the units minted along it and along the dims that share them."""

    id: int
    units: tuple[int, ...]
    dims: tuple[tuple[str, int], ...]
    name: str


@dataclass(frozen=True)
class FrozenDim:
    """Indices of a parameter dim that cannot be removed, and why."""

    param: str
    dim: int
    count: int
    reason: str
    source: str


class UnitTable:
    """Numbers for the classes that are units, and everything told in those numbers."""

    def __init__(self, classes: UnionFind, roots: np.ndarray, floors: list[frozenset[int]]) -> None:
        """Give numbers to ``roots`` (representatives of unit classes), in order."""
        self.classes = classes
        self.roots = roots
        self.floors = floors
        self.units: list[Unit] = []
        self.lone: set[int] = set()

    def numbers(self, labels: np.ndarray) -> np.ndarray:
        """Return the unit id of each label, -1 where it is none."""
        roots = self.classes.find(labels)
        if not len(self.roots):
            return np.full(labels.shape, -1, dtype=np.int64)
        place = np.minimum(np.searchsorted(self.roots, roots), len(self.roots) - 1)
        return np.where(self.roots[place] == roots, place, -1)

    def gone(self, removed: Iterable[int]) -> np.ndarray:
        """Mark, label by label, which representatives go with the removed units."""
        marks = np.zeros(len(self.classes), dtype=bool)
        marks[self.roots[sorted(removed)]] = True
        return marks

    def layout(self, dims: Dims) -> list[tuple[np.ndarray, ...]]:
        """Return unit ids per dim and layer; layers without any unit are left out."""
        return [tuple(ids for ids in (self.numbers(layer) for layer in layers) if (ids >= 0).any()) for layers in dims]

    def site(self, mint: Mint) -> Site | None:
        """Tell a mint in unit ids, or None when no unit is minted there."""
        ids = np.where(mint.fresh, self.numbers(mint.labels), -1)
        return Site(mint.node, mint.dim, ids, mint.parameter, mint.argument) if (ids >= 0).any() else None

    def groups(self, sites: Iterable[Site]) -> list[Group]:
        """Join units that are minted along the same dims; number the groups and tell each unit its group."""
        parent = list(range(len(self.units)))

        def top(unit: int) -> int:
            while parent[unit] != unit:
                parent[unit] = parent[parent[unit]]
                unit = parent[unit]
            return unit

        names: dict[int, str] = {}
        for site in sites:
            present = np.unique(site.units[site.units >= 0]).tolist()
            for unit in present[1:]:
                low, high = sorted((top(present[0]), top(unit)))
                parent[high] = low
        members: dict[int, list[int]] = defaultdict(list)
        for unit in range(len(self.units)):
            members[top(unit)].append(unit)
        dims: dict[int, dict[tuple[str, int], None]] = defaultdict(dict)
        for site in sites:
            key = top(int(site.units[site.units >= 0][0]))
            if site.parameter is not None:
                dims[key].setdefault(site.parameter)
                names.setdefault(key, site.parameter[0].removesuffix(".weight"))
            names.setdefault(key, site.node)
        groups = []
        for number, (key, units) in enumerate(sorted(members.items())):
            groups.append(Group(number, tuple(units), tuple(dims[key]), names.get(key, f"group {number}")))
            for unit in units:
                self.units[unit] = Unit(unit, number, self.units[unit].slices)
        return groups

    def frozen_dims(self, parameters: dict[str, Dims]) -> list[FrozenDim]:
        """Tell what cannot be removed and why; kernel positions and the like go without saying."""
        causes = self.classes.causes()
        frozen = []
        for name, dims in parameters.items():
            for dim, layers in enumerate(dims):
                if layers:
                    frozen += self._frozen_in(name, dim, layers[0], causes)
        return frozen

    def _frozen_in(self, name: str, dim: int, labels: np.ndarray, causes: dict[int, Reason | None]) -> list[FrozenDim]:
        counts: dict[tuple[str, str], int] = defaultdict(int)
        for label, root, number in zip(
            labels.tolist(), self.classes.find(labels).tolist(), self.numbers(labels).tolist(), strict=True
        ):
            if number >= 0:
                continue
            reason = causes.get(label) if root == 0 else Reason("is the only unit of its dim")
            if reason is not None:
                where = f"{reason.text} ({reason.node})" if reason.node else reason.text
                counts[where, reason.source] += 1
        return [FrozenDim(name, dim, count, text, source) for (text, source), count in counts.items()]


def build_units(
    program: Program, trackers: dict[str, Tracker], parameters: dict[str, Dims], mints: list[Mint]
) -> UnitTable:
    """Find the classes that are units: minted in an activation, with a slice of a parameter, not alone in a dim."""
    classes = trackers["eval"].classes
    minted = [classes.find(mint.labels[mint.fresh]) for mint in mints]
    roots = np.unique(np.concatenate([*minted, np.zeros(1, dtype=np.int64)]))
    roots = roots[roots != 0]
    held = [classes.find(layer) for dims in parameters.values() for layers in dims for layer in layers]
    roots = np.intersect1d(roots, np.concatenate([*held, np.zeros(0, dtype=np.int64)]))
    lines = _lines(classes, trackers, parameters)
    while True:  # a unit that is all of a dim must stay; without it another dim may be down to one unit
        table = UnitTable(classes, roots, [])
        floors = {floor for line in lines if (floor := _floor(table, line)) is not None}
        alone = {next(iter(floor)) for floor in floors if len(floor) == 1}
        if not alone:
            break
        roots = np.delete(roots, sorted(alone))
    table.floors = sorted(floors, key=lambda floor: (len(floor), sorted(floor)))
    table.units = _units(program, table, parameters)
    return table


def _lines(classes: UnionFind, trackers: dict[str, Tracker], parameters: dict[str, Dims]) -> list[np.ndarray]:
    seen: dict[bytes, np.ndarray] = {}
    values = [dims for tracker in trackers.values() for dims in tracker.values.values()] + list(parameters.values())
    for value in values:
        for dims in value if isinstance(value, list) else [value]:
            for layers in dims:
                for layer in layers:
                    line = np.unique(classes.find(layer))
                    seen[line.tobytes()] = line
    return list(seen.values())


def _floor(table: UnitTable, line: np.ndarray) -> frozenset[int] | None:
    numbers = table.numbers(line)
    return None if (numbers < 0).any() or not len(numbers) else frozenset(numbers.tolist())


def _units(program: Program, table: UnitTable, parameters: dict[str, Dims]) -> list[Unit]:
    slices: list[dict[str, dict[int, tuple[int, ...]]]] = [{} for _ in table.roots]
    aliases = tied_names(program.module())
    for name, dims in parameters.items():
        for dim, layers in enumerate(dims):
            for number, indices in _indices_of_units(table, layers):
                for alias in aliases.get(name, (name,)):
                    slices[number].setdefault(alias, {})[dim] = indices
    return [Unit(number, -1, held) for number, held in enumerate(slices)]


def _indices_of_units(table: UnitTable, layers: tuple[np.ndarray, ...]) -> list[tuple[int, tuple[int, ...]]]:
    found: dict[int, list[int]] = {}
    for layer in layers:
        numbers = table.numbers(layer)
        order = np.argsort(numbers, kind="stable")
        order = order[np.searchsorted(numbers[order], 0) :]  # -1 is no unit
        if not len(order):
            continue
        starts = np.flatnonzero(np.diff(numbers[order], prepend=-1))
        places, bounds = order.tolist(), [*starts.tolist(), len(order)]
        for unit, first, last in zip(numbers[order][starts].tolist(), bounds, bounds[1:], strict=False):
            found.setdefault(unit, []).extend(places[first:last])
    return [(unit, tuple(sorted(set(indices)))) for unit, indices in found.items()]
