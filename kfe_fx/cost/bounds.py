"""Floors and caps of single layers: how many of its units a layer keeps at least, and at most."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kfe_fx.cost.steps import matches
from kfe_fx.errors import UsageError

if TYPE_CHECKING:
    from kfe_fx.labels.analysis import Analysis


@dataclass(frozen=True)
class Bound:
    """A glob over parameter names or modules, and what its layers keep: a count of units, or a fraction of them."""

    glob: str
    value: int | float

    def count(self, units: int) -> int:
        """Return the bound in units of a layer that has ``units``; a fraction is rounded up, and never to nothing."""
        found = max(1, math.ceil(self.value * units - 1e-9)) if isinstance(self.value, float) else self.value
        return min(found, units)


@dataclass(frozen=True)
class Bounds:
    """All floors and caps of a run; of several that meet in a layer the strictest holds."""

    floors: tuple[Bound, ...] = ()
    caps: tuple[Bound, ...] = ()

    def of_groups(self, analysis: Analysis, frozen: Collection[int] = ()) -> dict[int, tuple[int | None, int | None]]:
        """Return per group the least and the most units that it keeps, None where nothing was said.

        Raises:
            UsageError: a glob that matches no parameter, a floor above a cap, or a cap on what --keep keeps whole.
        """
        found: dict[int, tuple[int | None, int | None]] = {}
        for bound in (*self.floors, *self.caps):
            if not any(matches(name, bound.glob) for name in analysis.params):
                raise UsageError(f"{bound.glob!r} matches no parameter; kfe-fx inspect lists their names")
        for group in analysis.groups:
            units = len(group.units)
            names = [name for name, _ in group.dims]
            floors = [(one.count(units), one) for one in _that_match(self.floors, names)]
            caps = [(one.count(units), one) for one in _that_match(self.caps, names)]
            least, floor = max(floors, key=lambda pair: pair[0], default=(None, None))
            most, cap = min(caps, key=lambda pair: pair[0], default=(None, None))
            if cap is not None and group.id in frozen:
                raise UsageError(f"--cap {cap.glob!r} cuts {group.name}, which --keep keeps whole; drop one of them")
            if least is not None and most is not None and floor is not None and cap is not None and least > most:
                raise UsageError(
                    f"--floor {floor.glob!r} keeps {least} units of {group.name}, --cap {cap.glob!r} only {most}; "
                    "drop one of them"
                )
            if least is not None or most is not None:
                found[group.id] = (least, most)
        return found


def _that_match(bounds: Iterable[Bound], names: Iterable[str]) -> list[Bound]:
    return [bound for bound in bounds if any(matches(name, bound.glob) for name in names)]


def read_bound(text: str) -> Bound:
    """Read ``GLOB=0.5`` (a fraction of the layer's units) or ``GLOB=16`` (units).

    Raises:
        UsageError: it is neither.
    """
    glob, _, number = text.rpartition("=")
    try:
        value: int | float = int(number) if number.strip().isdecimal() else float(number)
    except ValueError:
        value = math.nan
    if not glob or not value > 0 or (isinstance(value, float) and value > 1):
        raise UsageError(f"{text!r}: write GLOB=N units or GLOB=FRACTION of them, as in 'layer1.*=16' or 'head=0.5'")
    return Bound(glob, value)
