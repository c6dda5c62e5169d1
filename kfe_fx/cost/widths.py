"""Widths: the sizes of labelled dims as functions of what is removed.

Most dims of a network are the same few dims over and over (a residual stream, a hidden layer), so they are interned: a
*width* is one distinct way in which units lie along a dim, and every shape is a product of constants and widths.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

# What is removed: ids of units, or one bool per unit.
Removed = Collection[int] | np.ndarray
Layers = Sequence[np.ndarray]


@dataclass(frozen=True)
class Product:
    """A size or a count: ``coefficient`` times the sizes of ``widths``."""

    coefficient: int
    widths: tuple[int, ...] = ()

    def __mul__(self, other: Product | int) -> Product:
        """Multiply by a number or by another product."""
        if isinstance(other, Product):
            return Product(self.coefficient * other.coefficient, tuple(sorted(self.widths + other.widths)))
        return Product(self.coefficient * other, self.widths)

    def at(self, sizes: Sequence[int]) -> int:
        """Return the value where width ``w`` has the size ``sizes[w]``."""
        value = self.coefficient
        for width in self.widths:
            value *= sizes[width]
        return value


ONE = Product(1)


def product_of(factors: Iterable[Product]) -> Product:
    """Multiply factors; nothing gives 1."""
    total = ONE
    for factor in factors:
        total = total * factor
    return total


class Widths:
    """The distinct labelled dims of a network and how units lie along them.

    ``dense[w]`` is the size of width ``w`` when nothing is removed; ``layers[w]`` holds one array of unit ids per layer
    (-1: never removed). An index goes when the unit of any layer goes.
    """

    def __init__(self, units: int) -> None:
        """Start empty, for units numbered from 0 to ``units - 1``."""
        self.units = units
        self.layers: list[tuple[np.ndarray, ...]] = []
        self.dense: list[int] = []
        self._known: dict[tuple[bytes, ...], int] = {}
        self._folded: list[int] = []
        self._units: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []
        self._flat: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        """Count the widths."""
        return len(self.dense)

    def product(self, layers: Layers, size: int) -> Product:
        """Return the size of a dim with ``layers`` (none: the constant ``size``) as a product.

        Layers may be a whole multiple as long as ``size``: labels are read at another batch size than counts, and a
        dim that the batch was folded into then holds every unit that much oftener.
        """
        labelled = [np.asarray(layer, dtype=np.int64) for layer in layers]
        labelled = [layer for layer in labelled if layer.size and layer.max() >= 0]
        if not labelled:
            return Product(size)
        folded = max(1, len(labelled[0]) // max(1, size))
        if len(labelled) == 1:
            # only the multiset of units decides the size, not their order
            labelled, folded = [np.sort(labelled[0])[::folded]], 1
        key = (bytes([folded]), *(layer.tobytes() for layer in labelled))
        if key not in self._known:
            self._known[key] = len(self.dense)
            self._add(tuple(labelled), folded)
        return Product(1, (self._known[key],))

    def _add(self, layers: tuple[np.ndarray, ...], folded: int) -> None:
        self.layers.append(layers)
        self.dense.append(len(layers[0]) // folded)
        self._folded.append(folded)
        everything = np.concatenate(layers)
        units, counts = np.unique(everything[everything >= 0], return_counts=True)
        self._units.append(units)
        self._counts.append(counts // folded)
        self._flat = None

    def members(self, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the units along a width and how many indices each of them owns."""
        return self._units[width], self._counts[width]

    def mask(self, removed: Removed) -> np.ndarray:
        """Return ``removed`` as one bool per unit."""
        if isinstance(removed, np.ndarray) and removed.dtype == bool:
            return removed
        mask = np.zeros(self.units, dtype=bool)
        mask[np.fromiter(removed, dtype=np.int64, count=len(removed))] = True
        return mask

    def size(self, width: int, mask: np.ndarray) -> int:
        """Return the size of one width when the units in ``mask`` are gone."""
        extended = np.append(mask, False)  # -1 reads the last entry
        gone = np.logical_or.reduce([extended[layer] for layer in self.layers[width]])
        return int(np.count_nonzero(~gone)) // self._folded[width]

    def sizes(self, removed: Removed) -> np.ndarray:
        """Return the size of every width when ``removed`` is gone, int64."""
        mask = self.mask(removed)
        dense = np.asarray(self.dense, dtype=np.int64)
        if not len(dense) or not mask.any():
            return dense
        units, owners, counts = self._flattened()
        drop = np.bincount(owners, weights=np.where(mask[units], counts, 0), minlength=len(dense))
        sizes = dense - drop.astype(np.int64)
        for width, layers in enumerate(self.layers):
            if len(layers) > 1:  # two ways to lose the same index do not add up
                sizes[width] = self.size(width, mask)
        return sizes

    def _flattened(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self._flat is None:
            owners = np.repeat(np.arange(len(self.dense)), [len(row) for row in self._units])
            self._flat = np.concatenate(self._units), owners, np.concatenate(self._counts)
        return self._flat
