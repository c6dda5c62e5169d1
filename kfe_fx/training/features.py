"""Activations inside a network: what they are called, and what a removal has left of them."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kfe_fx import taps
from kfe_fx.errors import UsageError
from kfe_fx.labels.states import permit
from kfe_fx.plan import Plan
from kfe_fx.program import Program

Kept = list[tuple[int, list[int]]]  # (dim, indices that stay), changed dims only, as in Plan.kept
Features = Mapping[str, Any] | Sequence[str]


def points(program: Program) -> dict[str, str]:
    """Return where activations can be taken: name of a module (or of a node) -> name of the node.

    A module's activation is the last value that is computed in it or in a module inside it.
    """
    nodes, modules = {}, {}
    for node in program.graphs["eval"].nodes:
        if node.op != "call_function" or node.target in (taps.TAP, torch.ops.aten.sym_size.int):
            continue
        nodes[node.name] = node.name
        path = str(node.meta.get("module") or "")
        while path:
            modules[path] = node.name
            path = path.rpartition(".")[0]
    return nodes | modules


def matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Return the names that match any of the patterns, in their order.

    Raises:
        UsageError: a pattern matches none.
    """
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            known = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise UsageError(f"features: no activation is called {pattern!r}; there are {known}")
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def kept_features(
    dense: Program, plan: Plan, names: Sequence[str], weight: float = 1.0
) -> dict[str, tuple[float, Kept]]:
    """Say which part of a dense network's activations is left in the network that a plan made of it.

    Args:
        dense: the network whose units the plan removes, which is the teacher; where the plan dropped branches, the
            teacher without these (``DropBranches``), for the plan's indices are those of that network.
        plan: what was removed.
        names: modules ("layer3.0") or nodes, or globs of them; of a module the last value that is computed in it.
        weight: of each in the loss, c_f.

    Returns:
        What ``Distillation.features`` takes: name -> (weight, [(dim, indices that stay)]). Several names of one node
        count once.

    Raises:
        UsageError: a name matches nothing.
        PlanError: the plan is not of this network.

    Example:
        features = kept_features(program, result.plan, ["layer1.1", "layer2.1"])
        finetune(result.program, data, teacher=program, features=features)
    """
    from kfe_fx.labels.analysis import analyze

    analysis = analyze(permit(dense, allowed=plan.resize_state), heads=plan.heads)
    removed = plan.units(analysis)
    nodes = {node.name: node for node in analysis.program.graphs["eval"].nodes}
    known = points(dense)
    found: dict[str, tuple[float, Kept]] = {}
    taken: set[str] = set()
    for name in matching(list(known), names):
        if known[name] in taken:
            continue
        taken.add(known[name])
        kept = [
            (dim, [int(i) for i in indices])
            for dim, indices in enumerate(analysis.kept_of(nodes[known[name]], removed))
            if indices is not None
        ]
        found[name] = (weight, kept)
    return found


def read_features(features: Features) -> dict[str, tuple[float, Kept | list[int] | None]]:
    """Bring what a caller says of activations into one form: pattern -> (weight, kept or None).

    Raises:
        UsageError: it says something else, or a weight is negative or not finite.
    """
    if isinstance(features, str):
        features = [features]
    given = features if isinstance(features, Mapping) else dict.fromkeys(features, 1.0)
    found = {}
    for name, said in given.items():
        weight, kept = said if isinstance(said, tuple) and len(said) == 2 else (said, None)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            raise UsageError(f"features: {name!r} has the weight {weight!r}; give a number of at least 0")
        found[str(name)] = float(weight), None if kept is None else _read_kept(name, kept)
    return found


def _read_kept(name: str, kept: Any) -> Kept | list[int]:
    """Read {dim: indices}, [(dim, indices)] or the indices of the one dim that changed."""
    try:
        if isinstance(kept, Mapping):
            return [(int(dim), [int(i) for i in indices]) for dim, indices in kept.items()]
        items = list(kept)
        if all(isinstance(item, tuple | list) for item in items):
            return [(int(dim), [int(i) for i in indices]) for dim, indices in items]
        return [int(item) for item in items]
    except (TypeError, ValueError):
        raise UsageError(
            f"features: {name!r}: say which indices stay as [0, 2, ...] or as {{dim: [0, 2, ...]}}"
        ) from None


def left_of(name: str, teacher: Tensor, student: Tensor, kept: Kept | list[int] | None) -> Kept:
    """Check that what stays of a teacher's activation has the shape of the student's, and return it dim by dim.

    Raises:
        UsageError: it has another shape.
    """
    shapes = f"{list(teacher.shape)} in the teacher and {list(student.shape)} here"
    if kept and isinstance(kept[0], int):
        dims = [dim for dim, (wide, left) in enumerate(zip(teacher.shape, student.shape, strict=False)) if wide != left]
        if teacher.shape == student.shape:
            dims = [dim for dim, size in enumerate(teacher.shape) if dim and size == len(kept)][:1]
        if len(dims) != 1:
            raise UsageError(
                f"features: the activation {name!r} is {shapes}; say which indices stay by dim: {{1: ...}}"
            )
        kept = [(dims[0], kept)]  # type: ignore[list-item]
    changes: Kept = [change for change in kept or [] if isinstance(change, tuple)]
    shape = list(teacher.shape)
    for dim, indices in changes:
        if not -len(shape) <= dim < len(shape) or not all(0 <= index < teacher.shape[dim] for index in indices):
            raise UsageError(
                f"features: the activation {name!r} is {shapes}, and has no indices {indices} in dim {dim}"
            )
        shape[dim] = len(indices)
    if shape != list(student.shape):
        raise UsageError(
            f"features: the activation {name!r} is {shapes}; say which indices stay, as kept_features does for a plan"
        )
    return changes


def cut_to(value: Tensor, changes: Kept) -> Tensor:
    """Take the indices that stay."""
    for dim, indices in changes:
        value = value.index_select(dim, torch.tensor(indices, device=value.device))
    return value
