"""Whole attention heads, or the same positions of every head? Both are units; this file holds the choice."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from kfe_fx.labels.tracker import Tracker

aten = torch.ops.aten

_ATTENTION = {aten.scaled_dot_product_attention.default}
_PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.einsum.default, aten.baddbmm.default}
_FOLLOWED = 14  # operations between a head split and its attention: rotary embeddings are the longest


def preferred_axis(tracker: Tracker, node: Any, axes: list[int]) -> int | None:
    """Return the dim along which a split's units should lie where the split feeds attention, else no preference.

    ``tracker.heads`` is "heads", "positions" or "auto" (heads). A split is (..., heads, positions), as everywhere.
    """
    if not isinstance(node, fx.Node) or not _feeds_attention(tracker, node):
        return None
    packed = _packed_dims(node, len(tracker.shape(node)) if tracker.is_tensor(node) else 0)
    open_axes = [axis for axis in axes if axis not in packed] or axes
    if tracker.heads == "positions":
        return open_axes[-1]
    return open_axes[-2] if len(open_axes) > 1 else open_axes[0]


def _feeds_attention(tracker: Tracker, node: fx.Node) -> bool:
    frontier, seen = [node], {node}
    for _ in range(_FOLLOWED):
        reached: list[fx.Node] = []
        for current in frontier:
            for user in current.users:
                if user.target in _ATTENTION:
                    return True
                if user.target in _PRODUCTS:
                    operands = [arg for arg in user.all_input_nodes if not _is_size(arg)]
                    if len(operands) > 1 and not any(arg.op == "get_attr" for arg in operands):
                        return True
                    continue
                if user not in seen and user.target not in (aten.linear.default, aten.conv2d.default):
                    seen.add(user)
                    reached.append(user)
        frontier = reached
    return False


def _packed_dims(node: fx.Node, rank: int) -> set[int]:
    """Return the dims of ``node`` that are taken apart right after it (the 3 of a packed q, k, v)."""
    current = node
    where: list[int | None] = list(range(rank))  # where[d]: which dim of node lies at dim d now
    for _ in range(8):
        users = list(current.users)
        targets = {user.target for user in users}
        if targets & {aten.unbind.int, aten.select.int}:
            user = next(u for u in users if u.target in (aten.unbind.int, aten.select.int))
            dim = user.args[1] if len(user.args) > 1 else 0
            found = where[dim % len(where)] if isinstance(dim, int) and where else None
            return set() if found is None else {found}
        if len(users) != 1:
            return set()
        user = users[0]
        if user.target is aten.permute.default:
            where = [where[dim] for dim in user.args[1]]  # type: ignore[union-attr, index, misc]
        elif user.target is aten.transpose.int:
            first, second = (int(dim) % len(where) for dim in user.args[1:3])  # type: ignore[arg-type]
            where[first], where[second] = where[second], where[first]
        elif user.target is aten.unsqueeze.default:
            where.insert(user.args[1] % (len(where) + 1), None)  # type: ignore[operator]
        elif user.target is aten.squeeze.dim:
            where.pop(user.args[1])  # type: ignore[arg-type]
        elif user.target is not aten.contiguous.default:
            return set()
        current = user
    return set()


def _is_size(arg: fx.Node) -> bool:
    arithmetic = getattr(arg.target, "__module__", "") == "_operator" and arg.target is not operator.getitem
    return arg.target is aten.sym_size.int or arithmetic
