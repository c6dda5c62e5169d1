"""Union-find over labels, vectorised, with the reason of each merge."""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass

import numpy as np

FROZEN = 0


@dataclass(frozen=True)
class Reason:
    """Why labels were merged or frozen: the node, the user's source line, and what it did."""

    text: str
    node: str = ""
    source: str = ""


class UnionFind:
    """Classes of labels. Label 0 is frozen: a class that meets it is never removed.

    A label is *free* when no parameter stands behind it (a broadcast, a constant fill); a class is free when all of its
    labels are.
    """

    def __init__(self) -> None:
        """Start with the frozen label alone."""
        self._parent = np.zeros(1, dtype=np.int64)
        self._free = np.zeros(1, dtype=bool)
        self._count = 1
        self._edges: list[tuple[np.ndarray, np.ndarray, Reason | None]] = []

    def fresh(self, count: int, *, free: bool = False) -> np.ndarray:
        """Mint ``count`` labels."""
        while self._count + count > len(self._parent):
            self._parent = np.concatenate([self._parent, np.arange(len(self._parent), 2 * len(self._parent))])
            self._free = np.concatenate([self._free, np.zeros_like(self._free)])
        labels = np.arange(self._count, self._count + count)
        self._free[labels] = free
        self._count += count
        return labels

    def __len__(self) -> int:
        """Return the number of labels, 0 included."""
        return self._count

    def find(self, labels: np.ndarray) -> np.ndarray:
        """Return the representative of each label; 0 stands for every frozen one."""
        roots = self._parent[labels]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                break
            roots = above
        self._parent[labels] = roots
        return roots

    def union(self, first: np.ndarray, second: np.ndarray, reason: Reason | None = None) -> None:
        """Merge the labels pair by pair; ``reason=None`` marks what needs no explanation (kernel positions)."""
        first, second = (side.ravel() for side in np.broadcast_arrays(first, second))
        roots = self.find(first), self.find(second)
        differ = roots[0] != roots[1]
        if not differ.any():
            return
        one, other = roots[0][differ], roots[1][differ]
        # the labels themselves, not their representatives: what meets a frozen label is traced back to what froze it
        self._edges.append((first[differ], second[differ], reason))
        if len(np.unique(np.concatenate([one, other]))) == 2 * len(one):  # each class in one pair: merge all at once
            low, high = np.minimum(one, other), np.maximum(one, other)
            self._parent[high] = low
            self._free[low] &= self._free[high]
            return
        for first_root, second_root in zip(one.tolist(), other.tolist(), strict=True):
            self._merge(first_root, second_root)

    def _merge(self, one: int, other: int) -> None:
        one, other = self._root(one), self._root(other)
        if one == other:
            return
        low, high = min(one, other), max(one, other)  # the lower label represents, so 0 wins
        self._parent[high] = low
        self._free[low] = self._free[low] and self._free[high]

    def _root(self, label: int) -> int:
        while self._parent[label] != label:
            label = int(self._parent[label])
        return label

    def freeze(self, labels: np.ndarray, reason: Reason | None = None) -> None:
        """Freeze labels for good."""
        self.union(np.asarray(labels), np.zeros(1, dtype=np.int64), reason)

    def is_free(self, labels: np.ndarray) -> bool:
        """Tell whether no parameter stands behind any of the labels' classes."""
        return bool(self._free[self.find(labels)].all())

    def distinct(self, labels: np.ndarray) -> int:
        """Count the classes among the labels that are not frozen."""
        roots = np.unique(self.find(labels))
        return int((roots != FROZEN).sum())

    def causes(self) -> dict[int, Reason | None]:
        """Say for each frozen label which event froze its class: a search from 0 along the merges."""
        links: dict[int, list[tuple[int, Reason | None]]] = defaultdict(list)
        for first, second, reason in self._edges:
            for one, other in zip(first.tolist(), second.tolist(), strict=True):
                links[one].append((other, reason))
                links[other].append((one, reason))
        causes: dict[int, Reason | None] = {}
        queue: deque[int] = deque([FROZEN])
        while queue:
            label = queue.popleft()
            for other, reason in links[label]:
                if other != FROZEN and other not in causes:
                    causes[other] = reason if label == FROZEN else causes[label]
                    queue.append(other)
        return causes
