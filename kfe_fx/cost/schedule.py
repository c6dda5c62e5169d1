"""Intermediate budgets for pruning in rounds."""

from __future__ import annotations

from kfe_fx.errors import UsageError


def exponential_schedule(target: float, rounds: int) -> list[float]:
    """Return the ratio after each round, r_k = target^(k / rounds), so that each round keeps the same fraction.

    The last entry is ``target`` exactly (Laurent et al., "Revisiting Loss Modelling for Unstructured Pruning", 2020).

    Raises:
        UsageError: a target outside (0, 1], or no round.
    """
    if not 0 < target <= 1:
        raise UsageError(f"a budget is a ratio above 0 and at most 1, got {target}")
    if rounds < 1:
        raise UsageError(f"pruning takes at least one round, got {rounds}")
    return [*(target ** (k / rounds) for k in range(1, rounds)), target]


def equal_schedule(target: float, rounds: int) -> list[float]:
    """Return the ratio after each round, r_k = 1 - (1 - target) k / rounds, so that each round removes as much.

    Raises:
        UsageError: a target outside (0, 1], or no round.
    """
    exponential_schedule(target, rounds)
    return [*(1 - (1 - target) * k / rounds for k in range(1, rounds)), target]
