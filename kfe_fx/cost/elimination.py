"""The least of a sum of small tables over many choices, and the least with each choice held: bucket elimination.

A table reads a few variables; variables are minimised out one by one (Dechter 1999), each with the tables and messages
that read it. One pass up the buckets gives the minimum, one down gives the min-marginals

    m[v, s] = min { sum_tables table(x) : x[v] = s },

exactly. The work is that of the largest bucket, so it is for sums whose variables form nearly a tree, as the layers of
a network do around its stream.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kfe_fx.errors import UsageError

Scope = tuple[int, ...]  # variables, ascending


@dataclass
class _Bucket:
    variable: int
    scope: Scope  # the variable itself included
    tables: list[int]
    children: list[int] = field(default_factory=list)
    parent: int | None = None

    @property
    def above(self) -> Scope:
        return tuple(v for v in self.scope if v != self.variable)


class Elimination:
    """An order of elimination for tables of given scopes."""

    def __init__(self, sizes: Sequence[int], scopes: Sequence[Scope], most: int) -> None:
        """Order the variables, the one with the smallest bucket first.

        Raises:
            UsageError: a bucket would hold more than ``most`` entries.
        """
        self._sizes, self._scopes = list(sizes), list(scopes)
        self._buckets: list[_Bucket] = []
        left: list[tuple[Scope, int]] = [(scope, table) for table, scope in enumerate(scopes) if scope]
        messages: list[tuple[Scope, int]] = []  # what a bucket hands on, and which
        waiting = set(range(len(sizes)))
        near: dict[int, set[int]] = {v: {v} for v in waiting}
        for scope in scopes:
            for v in scope:
                near[v].update(scope)
        while waiting:
            variable = min(waiting, key=lambda v: (self._entries(near[v]), v))
            whole = tuple(sorted(near[variable]))
            if self._entries(whole) > most:
                raise UsageError(f"{self._entries(whole)} choices meet at once, at most {most}")
            number = len(self._buckets)
            bucket = _Bucket(variable, whole, [table for scope, table in left if variable in scope])
            for scope, child in messages:
                if variable in scope:
                    bucket.children.append(child)
                    self._buckets[child].parent = number
            left = [(scope, table) for scope, table in left if variable not in scope]
            messages = [(scope, child) for scope, child in messages if variable not in scope]
            if bucket.above:
                messages.append((bucket.above, number))
            self._buckets.append(bucket)
            waiting.remove(variable)
            for v in bucket.above:
                near[v] = (near[v] | set(whole)) - {variable}

    def _entries(self, scope: Sequence[int] | set[int]) -> int:
        return math.prod(self._sizes[v] for v in scope)

    def minimum(self, tables: Sequence[np.ndarray]) -> tuple[float, list[int]]:
        """Return the least sum and the choices that give it; ``tables`` in the order of the scopes."""
        own, up = self._up(tables)
        value = math.fsum(float(table) for table, scope in zip(tables, self._scopes, strict=True) if not scope)
        value += math.fsum(float(up[i]) for i, bucket in enumerate(self._buckets) if bucket.parent is None)
        chosen = [0] * len(self._sizes)
        for i in reversed(range(len(self._buckets))):
            bucket = self._buckets[i]
            total = self._sum(own[i], bucket.scope, [(up[c], self._buckets[c].above) for c in bucket.children])
            at = tuple(slice(None) if v == bucket.variable else chosen[v] for v in bucket.scope)
            chosen[bucket.variable] = int(total[at].argmin())
        return value, chosen

    def marginals(self, tables: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return m[v], one array per variable."""
        own, up = self._up(tables)
        roots = [i for i, bucket in enumerate(self._buckets) if bucket.parent is None]
        constant = math.fsum(float(table) for table, scope in zip(tables, self._scopes, strict=True) if not scope)
        down: dict[int, np.ndarray] = {}
        found: list[np.ndarray] = [np.zeros(size) for size in self._sizes]
        for i in reversed(range(len(self._buckets))):
            bucket = self._buckets[i]
            base = own[i] if i not in down else own[i] + _spread(down[i], bucket.above, bucket.scope)
            parts = [_spread(up[c], self._buckets[c].above, bucket.scope) for c in bucket.children]
            before = [base]
            for part in parts:
                before.append(before[-1] + part)
            axes = tuple(axis for axis, v in enumerate(bucket.scope) if v != bucket.variable)
            root = i
            while (parent := self._buckets[root].parent) is not None:
                root = parent
            rest = math.fsum(float(up[other]) for other in roots if other != root)  # the other trees, at their least
            found[bucket.variable] = before[-1].min(axes) + rest + constant
            behind = np.zeros_like(base)
            for child, part, so_far in reversed(list(zip(bucket.children, parts, before, strict=False))):
                whole = so_far + behind
                keep = self._buckets[child].above
                down[child] = whole.min(tuple(axis for axis, v in enumerate(bucket.scope) if v not in keep))
                behind = behind + part
        return found

    def _up(self, tables: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        own: list[np.ndarray] = []
        up: list[np.ndarray] = []
        for bucket in self._buckets:
            own.append(
                self._sum(
                    np.zeros([self._sizes[v] for v in bucket.scope]),
                    bucket.scope,
                    [(tables[table], self._scopes[table]) for table in bucket.tables],
                )
            )
            total = self._sum(own[-1], bucket.scope, [(up[c], self._buckets[c].above) for c in bucket.children])
            up.append(total.min(bucket.scope.index(bucket.variable)))
        return own, up

    @staticmethod
    def _sum(base: np.ndarray, scope: Scope, parts: Sequence[tuple[np.ndarray, Scope]]) -> np.ndarray:
        for table, reads in parts:
            base = base + _spread(table, reads, scope)
        return base


def _spread(table: np.ndarray, reads: Scope, scope: Scope) -> np.ndarray:
    """Give a table the axes of a larger scope."""
    return np.asarray(table)[tuple(slice(None) if v in reads else None for v in scope)]
