"""Example inputs and dynamic axes: how a user's call becomes flat, named, dynamically sized inputs."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kfe_fx.errors import UsageError
from kfe_fx.structure import leaf_names, template_of


@dataclass(frozen=True)
class Call:
    """One call of a module: arguments, their template, and the names of the flat tensor inputs.

    ``variadic``: where the arguments that ``*args`` took begin, and its name.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    arg_names: tuple[str, ...]
    template: Any
    names: tuple[str, ...]
    leaves: tuple[torch.Tensor, ...]
    variadic: tuple[int, str] | None = None


def read_call(module: nn.Module, example_inputs: Any) -> Call:
    """Read example inputs: a tensor, a tuple of arguments, a dict of keywords, or ``(args, kwargs)``.

    Raises:
        UsageError: no tensor among the inputs, or arguments that ``forward`` does not take.
    """
    args, kwargs = _split(example_inputs)
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise UsageError(f"example inputs do not fit {type(module).__name__}.forward: {error}") from None
    names = _positional_names(bound, len(args)) + tuple(kwargs)
    template, leaves = template_of((args, kwargs), lambda item: isinstance(item, torch.Tensor))
    if not leaves:
        raise UsageError("example inputs hold no tensor; pass a tensor, a tuple of arguments or a dict of keywords")
    named: dict[int, str] = {}
    for name, part in zip(names, (*template[0], *template[1].values()), strict=True):
        leaf_names(part, named, name)
    flat = tuple(_distinct(named[i] for i in range(len(leaves))))
    return Call(args, kwargs, names, template, flat, tuple(leaves), _variadic(bound, len(args)))


def _split(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, tuple):
        if len(example_inputs) == 2 and isinstance(example_inputs[0], tuple) and isinstance(example_inputs[1], dict):
            return example_inputs
        return example_inputs, {}
    if isinstance(example_inputs, list):
        return tuple(example_inputs), {}
    if hasattr(example_inputs, "keys"):
        return (), dict(example_inputs)
    kind = type(example_inputs).__name__
    raise UsageError(f"example inputs must be a tensor, a tuple of arguments or a dict of keywords, got {kind}")


def _positional_names(bound: inspect.BoundArguments, count: int) -> tuple[str, ...]:
    names: list[str] = []
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            names += [f"{name}_{index}" for index in range(count - len(names))]
        elif len(names) < count:
            names.append(name)
    return tuple(names[:count])


def _variadic(bound: inspect.BoundArguments, count: int) -> tuple[int, str] | None:
    for place, (name, parameter) in enumerate(bound.signature.parameters.items()):
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL and count > place:
            return place, name
    return None


def _distinct(names: Any) -> list[str]:
    seen: dict[str, int] = {}
    result = []
    for raw in names:
        name = "".join(char if char.isalnum() or char == "_" else "_" for char in raw)
        seen[name] = seen.get(name, -1) + 1
        result.append(name if not seen[name] else f"{name}_{seen[name]}")
    return result


def read_axes(call: Call, dynamic_axes: Any) -> dict[str, dict[int, str | None]]:
    """Read ``dynamic_axes``: ``{input: {dim: name}}`` or ``{input: [dims]}``; None means dim 0 of every tensor input.

    Raises:
        UsageError: an input or a dim that does not exist.
    """
    if dynamic_axes is None:
        return {name: {0: None} for name, leaf in zip(call.names, call.leaves, strict=True) if leaf.dim()}
    if not hasattr(dynamic_axes, "items"):
        raise UsageError("dynamic_axes must map input names to {dim: axis name}, e.g. {'x': {0: 'batch', 1: 'time'}}")
    axes: dict[str, dict[int, str | None]] = {}
    ranks = {name: leaf.dim() for name, leaf in zip(call.names, call.leaves, strict=True)}
    for name, dims in dynamic_axes.items():
        if name not in ranks:
            raise UsageError(f"dynamic_axes names the input {name!r}; the inputs are {list(call.names)}")
        wanted = dict(dims) if hasattr(dims, "items") else dict.fromkeys(dims)
        for dim, axis in wanted.items():
            if not isinstance(dim, int) or not -ranks[name] <= dim < ranks[name]:
                raise UsageError(f"dynamic_axes: {name!r} has {ranks[name]} dims, got dim {dim!r}")
            axes.setdefault(name, {})[dim % ranks[name]] = axis if isinstance(axis, str) else None
    return axes


def repeated(call: Call, axes: dict[str, dict[int, str | None]]) -> list[torch.Tensor]:
    """Repeat size-1 dynamic dims to 2, since tracing specialises sizes 0 and 1."""
    leaves = []
    for name, leaf in zip(call.names, call.leaves, strict=True):
        for dim in axes.get(name, {}):
            if leaf.shape[dim] == 1:
                leaf = leaf.repeat_interleave(2, dim)
        leaves.append(leaf)
    return leaves
