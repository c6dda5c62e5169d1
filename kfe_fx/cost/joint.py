"""Several budgets at once: one state for a search that is over when every one of them is met."""

from __future__ import annotations

from collections.abc import Sequence

from kfe_fx.cost.state import State


class JointState:
    """States of the same tracks under limits of their own; its cost is at most 1 when all of them are met.

    Where some are not, the cost is 1 plus the sum of what each lies above its limit, relative to it: a portion is
    priced by what it takes off the limits that still bind, and of those that are met nothing counts.
    """

    def __init__(self, states: Sequence[State], limits: Sequence[float]) -> None:
        """Take one state and one limit above 0 per budget; the states stand at the same stops and move together."""
        self._states = list(states)
        self._limits = list(limits)
        self.tracks, self.stops = states[0].tracks, states[0].stops

    @property
    def cost(self) -> float:
        """What the search follows, now."""
        return self._joint([state.cost for state in self._states])

    def _joint(self, costs: Sequence[float]) -> float:
        shares = [cost / limit for cost, limit in zip(costs, self._limits, strict=True)]
        above = sum(max(0.0, share - 1) for share in shares)
        return 1 + above if above else max(shares)

    def after(self, track: int, stop: int) -> float | None:
        """Return the cost with one track at another stop, None where that is not allowed."""
        costs = [state.after(track, stop) for state in self._states]
        known = [cost for cost in costs if cost is not None]
        return self._joint(known) if len(known) == len(costs) else None

    def move(self, track: int, stop: int) -> None:
        """Put a track at another stop."""
        for state in self._states:
            state.move(track, stop)

    def neighbours(self, track: int) -> Sequence[int] | None:
        """Return all tracks: once a limit is met, what moves save of it counts no more, wherever they are.

        None where a cost is no sum.
        """
        whole = any(state.neighbours(track) is None for state in self._states)
        return None if whole else range(len(self.tracks))

    def predicted(self) -> float:
        """Return the joint cost of what is budgeted exactly, now."""
        return self._joint([state.predicted() for state in self._states])
