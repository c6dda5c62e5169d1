"""The state of a search: how far each track has gone, what it costs, and what one more portion would save.

A portion touches a few widths and those a few terms of the cost; only these are evaluated again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from kfe_fx.cost.count import Cost, Term
from kfe_fx.cost.steps import Track
from kfe_fx.cost.widths import Widths
from kfe_fx.errors import UsageError


class State(Protocol):
    """What the solver asks of a search state."""

    tracks: Sequence[Track]
    stops: list[int]

    @property
    def cost(self) -> float:
        """What the search follows, now."""
        ...

    def after(self, track: int, stop: int) -> float | None:
        """Return the cost with one track at another stop, None where that is not allowed."""
        ...

    def move(self, track: int, stop: int) -> None:
        """Put a track at another stop."""
        ...

    def neighbours(self, track: int) -> Sequence[int] | None:
        """Return the tracks whose savings a move of ``track`` changes; None for all of them."""
        ...

    def predicted(self) -> float:
        """Return the cost that is budgeted, now."""
        ...


class Sizes:
    """The size of each width while tracks move."""

    def __init__(self, widths: Widths, tracks: Sequence[Track], aligned: Sequence[int], block: int) -> None:
        """Tabulate how each track shrinks each width; ``aligned`` widths stay multiples of ``block``."""
        self.widths = widths
        self.tracks = tracks
        self.stops = [0] * len(tracks)
        self.sizes: list[int] = list(widths.dense)
        self.mask = np.zeros(widths.units, dtype=bool)
        self._block = block
        # A dim with two layers (heads x positions) shrinks as a product: its alignment is only known as we go.
        self._joint_aligned = {
            w for w in aligned if len(widths.layers[w]) > 1 and widths.dense[w] % block == 0 and block > 1
        }
        owner = np.full(widths.units, -1, dtype=np.int64)
        for index, track in enumerate(tracks):
            owner[track.gone(len(track))] = index
        self.drops: list[list[tuple[int, list[int]]]] = [[] for _ in tracks]
        self.joint: list[list[int]] = [[] for _ in tracks]
        for width in range(len(widths)):
            units, counts = widths.members(width)
            for index in np.unique(owner[units]).tolist():
                if index < 0:
                    continue
                if len(widths.layers[width]) > 1:
                    self.joint[index].append(width)
                    continue
                owned = np.zeros(widths.units, dtype=np.int64)
                owned[units] = counts
                portions = [int(owned[list(portion)].sum()) for portion in tracks[index].portions]
                self.drops[index].append((width, np.cumsum([0, *portions]).tolist()))

    def touched(self, track: int) -> list[int]:
        """Return the widths that a track shrinks."""
        return [width for width, _ in self.drops[track]] + self.joint[track]

    def changed(self, track: int, stop: int) -> dict[int, int] | None:
        """Return the sizes that differ with a track at another stop, None where one is no multiple any more."""
        now = self.stops[track]
        sizes = {width: self.sizes[width] + drop[now] - drop[stop] for width, drop in self.drops[track]}
        if self.joint[track]:
            mask = self.mask.copy()
            self.mark(mask, track, now, stop)
            for width in self.joint[track]:
                sizes[width] = self.widths.size(width, mask)
                if width in self._joint_aligned and sizes[width] % self._block:
                    return None
        return sizes

    def move(self, track: int, stop: int) -> None:
        """Put a track at another stop."""
        changed = self.changed(track, stop)
        for width, size in (changed or {}).items():
            self.sizes[width] = size
        self.mark(self.mask, track, self.stops[track], stop)
        self.stops[track] = stop

    def put(self, track: int, stop: int) -> bool:
        """Put a track at another stop if that is allowed; return whether it is."""
        allowed = self.changed(track, stop) is not None
        if allowed:
            self.move(track, stop)
        return allowed

    def mark(self, mask: np.ndarray, track: int, now: int, stop: int) -> None:
        """Set or clear in ``mask`` the units between two stops of a track."""
        low, high = sorted((now, stop))
        for portion in self.tracks[track].portions[low:high]:
            mask[list(portion)] = stop > now


class SumState:
    """A cost that is a sum of terms, evaluated again only where a track touches it."""

    def __init__(self, sizes: Sizes, terms: Sequence[Term]) -> None:
        """Gather terms of the same widths into one."""
        self.tracks, self.stops = sizes.tracks, sizes.stops
        self._sizes = sizes
        by_widths: dict[tuple[int, ...], list[Term]] = {}
        for term in terms:
            by_widths.setdefault(tuple(sorted(set(term.widths))), []).append(term)
        self._bundles = list(by_widths.items())
        self._known: list[dict[tuple[int, ...], float]] = [{} for _ in self._bundles]
        self._values = [self._value(bundle) for bundle in range(len(self._bundles))]
        self.cost = float(sum(self._values))
        readers: dict[int, list[int]] = {}
        for bundle, (widths, _) in enumerate(self._bundles):
            for width in widths:
                readers.setdefault(width, []).append(bundle)
        touched = [sizes.touched(track) for track in range(len(self.tracks))]
        self._readers = [sorted({b for w in widths for b in readers.get(w, ())}) for widths in touched]
        users: dict[int, list[int]] = {}
        for track, bundles in enumerate(self._readers):
            for bundle in bundles:
                users.setdefault(bundle, []).append(track)
        self._neighbours = [sorted({t for b in bundles for t in users[b]}) for bundles in self._readers]

    def _value(self, bundle: int) -> float:
        widths, terms = self._bundles[bundle]
        sizes = self._sizes.sizes
        key = tuple([sizes[width] for width in widths])
        known = self._known[bundle]
        if key not in known:
            known[key] = float(sum(term.cost(sizes) for term in terms))
        return known[key]

    def after(self, track: int, stop: int) -> float | None:
        """Return the cost with one track at another stop."""
        changed = self._sizes.changed(track, stop)
        if changed is None:
            return None
        sizes = self._sizes.sizes
        before = {width: sizes[width] for width in changed}
        cost = self.cost
        for width, size in changed.items():
            sizes[width] = size
        for bundle in self._readers[track]:
            cost += self._value(bundle) - self._values[bundle]
        for width, size in before.items():
            sizes[width] = size
        return cost

    def move(self, track: int, stop: int) -> None:
        """Put a track at another stop."""
        self._sizes.move(track, stop)
        for bundle in self._readers[track]:
            self._values[bundle] = self._value(bundle)
        self.cost = float(sum(self._values))

    def tables(self, most: int) -> list[tuple[tuple[int, ...], dict[tuple[int, ...], float]]]:
        """Return, for terms that read the same tracks, these tracks and the cost at every choice of their stops.

        Raises:
            UsageError: more than ``most`` choices in all.
        """
        by_readers: dict[tuple[int, ...], list[int]] = {}
        for bundle in range(len(self._bundles)):
            readers = tuple(track for track, bundles in enumerate(self._readers) if bundle in bundles)
            by_readers.setdefault(readers, []).append(bundle)
        count = sum(math.prod(len(self.tracks[track]) + 1 for track in readers) for readers in by_readers)
        if count > most:
            raise UsageError(f"{count} choices of stops to tabulate, at most {most}: give the exact solver fewer stops")
        before, found = list(self.stops), []
        for readers, bundles in by_readers.items():
            table: dict[tuple[int, ...], float] = {}
            for stops in itertools.product(*(range(len(self.tracks[track]) + 1) for track in readers)):
                if all(self._sizes.put(track, stop) for track, stop in zip(readers, stops, strict=True)):
                    table[stops] = sum(self._value(bundle) for bundle in bundles)
            found.append((readers, table))
            for track in readers:
                self._sizes.move(track, before[track])
        return found

    def neighbours(self, track: int) -> Sequence[int]:
        """Return the tracks that share a term with ``track``, itself included."""
        return self._neighbours[track] or [track]

    def predicted(self) -> float:
        """Return the cost now."""
        return self.cost


class WholeState:
    """A cost that is no sum: every question evaluates all of it."""

    def __init__(self, sizes: Sizes, cost: Cost) -> None:
        """Follow ``cost.smooth`` where it has one, else ``cost.predict``."""
        self.tracks, self.stops = sizes.tracks, sizes.stops
        self._sizes = sizes
        self._exact = cost.predict
        self._guide: Callable[[np.ndarray], float] = getattr(cost, "smooth", cost.predict)
        self.cost = float(self._guide(sizes.mask))

    def after(self, track: int, stop: int) -> float | None:
        """Return the cost with one track at another stop."""
        if self._sizes.changed(track, stop) is None:
            return None
        mask = self._sizes.mask.copy()
        self._sizes.mark(mask, track, self.stops[track], stop)
        return float(self._guide(mask))

    def move(self, track: int, stop: int) -> None:
        """Put a track at another stop."""
        self._sizes.move(track, stop)
        self.cost = float(self._guide(self._sizes.mask))

    def neighbours(self, track: int) -> None:
        """Say that a move may change the savings of every track."""

    def predicted(self) -> float:
        """Return the exact cost now."""
        return float(self._exact(self._sizes.mask))
