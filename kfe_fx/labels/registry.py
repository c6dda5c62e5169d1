"""Which rule says how labels flow through an operation, and which one rewrites its literals after a removal."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import fx

if TYPE_CHECKING:
    from kfe_fx.labels.relocate import Relocation
    from kfe_fx.labels.tracker import Tracker

Rule = Callable[["Tracker", fx.Node], Any]
Relocator = Callable[["Relocation", fx.Node], None]

RULES: dict[Any, Rule] = {}
RELOCATORS: dict[Any, Relocator] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register the label rule of operations."""

    def register(function: Rule) -> Rule:
        for target in targets:
            RULES[target] = function
        return function

    return register


def relocator(*targets: Any) -> Callable[[Relocator], Relocator]:
    """Register how the literals of operations follow a removal."""

    def register(function: Relocator) -> Relocator:
        for target in targets:
            RELOCATORS[target] = function
        return function

    return register


def overloads(namespace: Any, *names: str) -> list[Any]:
    """Look up ``"op.overload"`` names, leaving out those that this torch does not have."""
    found = []
    for name in names:
        packet, _, overload = name.partition(".")
        operation = getattr(getattr(namespace, packet, None), overload or "default", None)
        if operation is not None:
            found.append(operation)
    return found
