"""Templates of nested inputs and outputs: plain containers whose leaves are flat indices.

A template says what torch's TreeSpec says, as plain data that a file can hold: ``(0, {"mask": 1}, None)``.
Constants that are not tensors stay in the template as ``Constant``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kfe_fx.errors import UsageError


@dataclass(frozen=True)
class Constant:
    """A leaf fixed at capture: a number, string, bool or None, not an input of the graph."""

    value: Any


def template_of(value: Any, is_leaf: Callable[[Any], bool]) -> tuple[Any, list[Any]]:
    """Split nested containers into a template and its flat leaves.

    Mappings (also those of model libraries) become dicts, named tuples become tuples.
    """
    leaves: list[Any] = []

    def visit(item: Any) -> Any:
        if is_leaf(item):
            leaves.append(item)
            return len(leaves) - 1
        if isinstance(item, tuple):
            return tuple(visit(part) for part in item)
        if isinstance(item, list):
            return [visit(part) for part in item]
        if hasattr(item, "keys") and hasattr(item, "__getitem__"):
            return {key: visit(item[key]) for key in item.keys()}  # noqa: SIM118  (not every mapping iterates its keys)
        return Constant(item)

    return visit(value), leaves


def pack(template: Any, flat: Any) -> Any:
    """Fill a template with flat values."""
    if isinstance(template, Constant):
        return template.value
    if isinstance(template, int):
        return flat[template]
    if isinstance(template, tuple):
        return tuple(pack(part, flat) for part in template)
    if isinstance(template, list):
        return [pack(part, flat) for part in template]
    return {key: pack(part, flat) for key, part in template.items()}


def flatten_like(template: Any, value: Any, where: str) -> list[Any]:
    """Read the leaves of ``value`` in the order of ``template``.

    Raises:
        UsageError: ``value`` has another structure.
    """
    found: dict[int, Any] = {}

    def visit(part: Any, item: Any, path: str) -> None:
        if isinstance(part, Constant):
            same = item is part.value or (type(item) is type(part.value) and item == part.value)
            if not same:
                raise UsageError(f"{path} was {part.value!r} at capture and is fixed in the graph, got {item!r}")
        elif isinstance(part, int):
            found[part] = item
        elif isinstance(part, dict):
            if not hasattr(item, "keys") or set(item.keys()) != set(part):
                raise UsageError(f"{path} must be a mapping with the keys {sorted(map(str, part))}")
            for key, inner in part.items():
                visit(inner, item[key], f"{path}[{key!r}]")
        else:
            if not isinstance(item, tuple | list) or len(item) != len(part):
                raise UsageError(f"{path} must be a sequence of {len(part)}, got {type(item).__name__}")
            for index, (inner, element) in enumerate(zip(part, item, strict=True)):
                visit(inner, element, f"{path}[{index}]")

    visit(template, value, where)
    return [found[index] for index in range(len(found))]


def leaf_names(template: Any, names: dict[int, str], prefix: str) -> None:
    """Name each leaf of a template by its path below ``prefix``, as torch.export does (``x``, ``batch_mask``)."""
    if isinstance(template, Constant):
        return
    if isinstance(template, int):
        names[template] = prefix
    elif isinstance(template, dict):
        for key, part in template.items():
            leaf_names(part, names, f"{prefix}_{key}")
    else:
        for index, part in enumerate(template):
            leaf_names(part, names, f"{prefix}_{index}")
