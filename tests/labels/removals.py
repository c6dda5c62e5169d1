"""Units to remove, drawn at random."""

from __future__ import annotations

import random

from kfe_fx.labels.analysis import Analysis


def some(analysis: Analysis, seed: int = 0, share: float = 0.4) -> frozenset[int]:
    """A share of the units of each group, but none that leaves a tensor without any."""
    choose = random.Random(seed)
    removed: set[int] = set()
    for group in analysis.groups:
        for unit in choose.sample(group.units, max(1, round(len(group.units) * share))):
            if not any(floor <= removed | {unit} for floor in analysis.floors):
                removed.add(unit)
    return frozenset(removed)
