"""The search itself: greedy on loss per cost saved with look-ahead, then hand back, relax and exchange what fits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kfe_fx.cost.state import State

LOOK_AHEAD = (1, 2, 4, 8)
# Where units go one by one, a wide layer has thousands of stops: the search strides, the hand-back refines.
MOST_STRIDES = 128
# What improves on the descent asks this many questions at most, so that the result does not hang on a clock.
MOST_QUESTIONS = 4000
PRICES, SWEEPS = 8, 6  # of the relaxation: prices tried, and rounds over the tracks at each


@dataclass(frozen=True)
class _Move:
    track: int
    stop: int
    lost: float
    saved: float

    @property
    def price(self) -> float:
        return self.lost / self.saved if self.saved > 0 else math.inf


class Search:
    """One search for the least loss at a cost of at most ``limit``."""

    def __init__(self, state: State, limit: float, look_ahead: Sequence[int] = LOOK_AHEAD) -> None:
        """Start where ``state`` is, and never go back behind that; ``limit`` is in the units of its cost."""
        self.state = state
        self.limit = limit
        self._first = list(state.stops)
        self._strides = [max(1, math.ceil(len(track) / MOST_STRIDES)) for track in state.tracks]
        self._look_ahead = tuple(look_ahead)
        self._least = 1e-9 * abs(state.cost)
        self._moves: list[list[_Move]] = [[] for _ in state.tracks]
        self._finish: tuple[float, list[int]] | None = None
        self._questions = 0
        self._pinned: int | None = None

    @property
    def loss(self) -> float:
        """The loss of what is removed now."""
        return math.fsum(track.loss[stop] for track, stop in zip(self.state.tracks, self.state.stops, strict=True))

    def run(self) -> bool:
        """Search; return whether the limit is met. The state is left at the best point found."""
        reached = self._descend()
        if not reached:
            return False
        self._hand_back()
        if self._finish is not None:  # a single large portion met the limit earlier, at another place
            first, first_loss = list(self.state.stops), self.loss
            self.go_to(self._finish[1])
            self._hand_back()
            if self.state.predicted() > self.limit or self.loss >= first_loss:
                self.go_to(first)
        if self.state.tracks and self.state.neighbours(0) is not None:
            self._relax()
            self._exchange()
        return True

    def _relax(self) -> None:
        """Try the stops that minimise loss + price·cost for a range of prices: they pay for a joint change at once."""
        found, best = list(self.state.stops), self.loss
        low, high = 0.0, None
        price = self._guess()
        last = self._questions + MOST_QUESTIONS
        for _ in range(PRICES):
            self._settle(price)
            if self._questions > last:
                break
            if self.state.predicted() <= self.limit:
                high = price
                self._hand_back()
                if self.loss < best:
                    found, best = list(self.state.stops), self.loss
                price = (low + price) / 2
            else:
                low = price
                price = 2 * price if high is None else (price + high) / 2
        self.go_to(found)

    def _guess(self) -> float:
        dense = max(self.state.cost - self.limit, self.limit)
        return self.loss / dense if dense else 0.0

    def _settle(self, price: float) -> None:
        changed = True
        for _ in range(SWEEPS):
            if not changed:
                break
            changed = False
            for track, line in enumerate(self.state.tracks):
                now = self.state.stops[track]
                least, stop = line.loss[now] + price * self.state.cost, now
                for other in self._others(track):
                    self._questions += 1
                    cost = self.state.after(track, other)
                    if cost is not None and line.loss[other] + price * cost < least * (1 - 1e-12):
                        least, stop = line.loss[other] + price * cost, other
                if stop != now:
                    self.state.move(track, stop)
                    changed = True

    def go_to(self, stops: Sequence[int]) -> None:
        """Put every track at a stop of its own."""
        for track, stop in enumerate(stops):
            if self.state.stops[track] != stop:
                self.state.move(track, stop)

    # down ------------------------------------------------------------------------------------------------------------

    def _descend(self) -> bool:
        stale = set(range(len(self.state.tracks)))
        while self.state.predicted() > self.limit:
            best = self._cheapest(stale)
            if best is None:
                best = self._far_move()
            if best is None:
                return False
            self.state.move(best.track, best.stop)
            touched = self.state.neighbours(best.track)
            stale |= set(range(len(self.state.tracks)) if touched is None else touched)
        return True

    def _cheapest(self, stale: set[int]) -> _Move | None:
        # Sums are looked at exactly. Where every question costs a full evaluation, old prices serve until one of them
        # is the best: savings mostly shrink as others are cut, so an old price is mostly too good, not too bad.
        lazy = bool(self.state.tracks) and self.state.neighbours(0) is None
        if not lazy or not any(self._moves):
            for track in sorted(stale):
                self._ask(track)
            stale.clear()
        while True:
            ranked = [
                (move.price, track, move)
                for track, moves in enumerate(self._moves)
                for move in moves
                if move.saved > self._least
            ]
            if not ranked:
                if not stale:
                    return None
                for track in sorted(stale):
                    self._ask(track)
                stale.clear()
                continue
            _, track, move = min(ranked, key=lambda entry: entry[:2])
            if track not in stale:
                if not lazy:
                    self._note_finish(ranked)
                return move
            self._ask(track)
            stale.discard(track)

    def _ask(self, track: int) -> None:
        line, now = self.state.tracks[track], self.state.stops[track]
        if track == self._pinned:
            self._moves[track] = []
            return
        ahead = sorted({min(now + look * self._strides[track], len(line)) for look in self._look_ahead} - {now})
        self._moves[track] = [move for stop in ahead if (move := self._move(track, stop)) is not None]

    def _move(self, track: int, stop: int) -> _Move | None:
        self._questions += 1
        cost = self.state.after(track, stop)
        if cost is None:
            return None
        line, now = self.state.tracks[track], self.state.stops[track]
        return _Move(track, stop, line.loss[stop] - line.loss[now], self.state.cost - cost)

    def _note_finish(self, ranked: list[tuple[float, int, _Move]]) -> None:
        wanted = self.state.cost - self.limit
        enough = [(move.lost, track, move.stop) for _, track, move in ranked if move.saved >= wanted]
        if not enough:
            return
        lost, track, stop = min(enough)
        total = self.loss + lost
        if self._finish is None or total < self._finish[0]:
            stops = list(self.state.stops)
            stops[track] = stop
            self._finish = total, stops

    def _far_move(self) -> _Move | None:
        # no look-ahead leaves its tread: look as far as each track goes
        far: list[_Move] = []
        for track, line in enumerate(self.state.tracks):
            if track == self._pinned:
                continue
            for stop in range(self.state.stops[track] + 1, len(line) + 1, self._strides[track]):
                move = self._move(track, stop)
                if move is not None and move.saved > self._least:
                    far.append(move)
                    break
        return min(far, key=lambda move: (move.price, move.track), default=None)

    # up --------------------------------------------------------------------------------------------------------------

    def _hand_back(self) -> float:
        """Put back what fits under the limit, the most important first; return the loss regained."""
        regained = 0.0
        while (best := self._best_return()) is not None:
            track, stop = best
            line = self.state.tracks[track]
            gain = line.loss[self.state.stops[track]] - line.loss[stop]
            before = self.state.stops[track]
            self.state.move(track, stop)
            if self.state.predicted() > self.limit:  # the state follows a smooth cost, the limit is on the exact one
                self.state.move(track, before)
                return regained
            regained += gain
        return regained

    def _best_return(self, least: float = 0.0) -> tuple[int, int] | None:
        best: tuple[float, int, int] | None = None
        for track, line in enumerate(self.state.tracks):
            if track == self._pinned:
                continue
            now = self.state.stops[track]
            strides = {1, self._strides[track]}
            backs = {max(self._first[track], now - look * stride) for look in self._look_ahead for stride in strides}
            for stop in sorted(backs - {now}):
                gain = line.loss[now] - line.loss[stop]
                if gain <= least or (best is not None and gain <= best[0]):
                    continue
                self._questions += 1
                cost = self.state.after(track, stop)
                if cost is not None and cost <= self.limit:
                    best = gain, track, stop
        return best[1:] if best is not None else None

    def _exchange(self) -> None:
        """Try every track at every other stop, mend what that breaks, and keep what lowers the loss.

        A stop that saves more is answered by handing back elsewhere, one that costs more by going on elsewhere and
        handing back what that leaves.
        """
        last = self._questions + MOST_QUESTIONS
        improved = True
        while improved:
            improved = False
            for track in range(len(self.state.tracks)):
                for stop in self._others(track):
                    if self._questions > last:
                        return
                    improved |= self._try(track, stop)

    def _others(self, track: int) -> list[int]:
        now, line = self.state.stops[track], self.state.tracks[track]
        stops = range(self._first[track], len(line) + 1, self._strides[track])
        return sorted((stop for stop in stops if stop != now), key=lambda stop: abs(stop - now))

    def _try(self, track: int, stop: int) -> bool:
        before, start = list(self.state.stops), self.loss
        if stop == before[track] or self.state.after(track, stop) is None:
            return False
        self.state.move(track, stop)
        self._pinned = track  # or the first answer would be to take the trial back
        if self.state.predicted() <= self.limit or self._descend():
            self._hand_back()
        self._pinned = None
        if self.state.predicted() <= self.limit:
            self._hand_back()
            if self.loss < start - 1e-12 * abs(start):
                return True
        self.go_to(before)
        return False


def farthest(state: State) -> np.ndarray:
    """Move every track to its last allowed stop, in order; return the stops."""
    for track, line in enumerate(state.tracks):
        for stop in range(len(line), state.stops[track], -1):
            if state.after(track, stop) is not None:
                state.move(track, stop)
                break
    return np.asarray(state.stops)
