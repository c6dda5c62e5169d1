"""Read examples from Python: a function of the user's own, or any iterable of batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kfe_fx.data.dataset import ArrayData, Inputs
from kfe_fx.data.npz import TARGETS, check_memory, to_targets, to_tensor
from kfe_fx.errors import BadData
from kfe_fx.user_code import inside, load

COLLATE = 256  # examples that a torch Dataset is read in at a time


def load_factory(spec: str, limit: int | None = None) -> ArrayData:
    """Call `file.py:function` or `package.module:function` and read what it returns.

    This runs the user's code, as its name says.

    Args:
        spec: where the function is; it is called without arguments.
        limit: stop after this many examples.

    Returns:
        The examples.

    Raises:
        BadData: there is no such file, module or function, it raised, or it returns nothing that holds examples.
    """
    function = load(spec, error=BadData)
    with inside(spec, error=BadData):
        return from_python(function() if callable(function) else function, spec, limit)


def from_python(value: Any, name: str = "data", limit: int | None = None) -> ArrayData:
    """Read examples from what Python programs hold them in.

    Args:
        value: an ArrayData, a torch Dataset or DataLoader, a pair (inputs, targets) of whole arrays, or an
            iterable of batches. Inputs are an array, a sequence of arrays or a dict; a dict batch with y, targets
            or labels in it brings its own targets.
        name: what to call the data in messages.
        limit: stop after this many examples; needed for an iterable without end.

    Returns:
        The examples, copied to the CPU.

    Raises:
        BadData: it holds no examples, or arrays of different kinds or shapes.
    """
    if isinstance(value, ArrayData):
        return value if limit is None else value.first(limit)
    if isinstance(value, Dataset):
        return _concatenate(DataLoader(value, batch_size=COLLATE), name, limit)
    if isinstance(value, DataLoader):
        return _concatenate(value, name, limit)
    if _is_array(value) or isinstance(value, Mapping) or _is_pair(value):
        inputs, targets = _batch(value, name)
        data = ArrayData(inputs, targets, name=name)
        return data if limit is None else data.first(limit)
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return _concatenate(value, name, limit)
    raise BadData(f"{name}: got {type(value).__name__}; return (inputs, targets), a Dataset, a DataLoader or batches")


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def _is_pair(value: Any) -> bool:
    """Tell (inputs, targets) of whole arrays from two batches: its second part is an array or None."""
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and (value[1] is None or _is_array(value[1]))
        and (_is_array(value[0]) or isinstance(value[0], Mapping) or _is_arrays(value[0]))
    )


def _is_arrays(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(_is_array(one) for one in value)


def _batch(value: Any, name: str) -> tuple[Inputs, Tensor | None]:
    """Read one batch, or a whole data set in the form of one."""
    if _is_array(value):
        return (_tensor(value, "inputs", name),), None
    if isinstance(value, Mapping):
        marked = [key for key in value if key in TARGETS]
        if len(marked) > 1:
            raise BadData(f"{name}: both {marked[0]!r} and {marked[1]!r} look like targets; keep one of them")
        rest = {str(key): _tensor(one, str(key), name) for key, one in value.items() if key not in TARGETS}
        return rest, to_targets(_tensor(value[marked[0]], marked[0], name)) if marked else None
    if isinstance(value, Sequence) and not isinstance(value, str) and 0 < len(value) <= 2:
        inputs = value[0]
        targets = None if len(value) == 1 or value[1] is None else to_targets(_tensor(value[1], "targets", name))
        if isinstance(inputs, Mapping):
            return {str(key): _tensor(one, str(key), name) for key, one in inputs.items()}, targets
        if _is_array(inputs):
            return (_tensor(inputs, "inputs", name),), targets
        if _is_arrays(inputs):
            return tuple(_tensor(one, f"inputs[{i}]", name) for i, one in enumerate(inputs)), targets
    raise BadData(f"{name}: a batch is a {type(value).__name__}; yield (inputs, targets) or a dict of arrays")


def _tensor(value: Any, key: str, name: str) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, np.ndarray):
        return to_tensor(name, key, value)
    raise BadData(f"{name}: {key} is a {type(value).__name__}, not a tensor or array")


def _concatenate(batches: Iterable[Any], name: str, limit: int | None) -> ArrayData:
    parts: list[ArrayData] = []
    total = size = 0
    for batch in batches:
        inputs, targets = _batch(batch, name)
        part = ArrayData(inputs, targets, name=name)
        parts.append(part)
        total += len(part)
        size += sum(t.numel() * t.element_size() for _, t in part.named_inputs())
        check_memory(name, 2 * size)  # the parts and their concatenation
        if limit is not None and total >= limit:
            break
    if not parts:
        raise BadData(f"{name}: yields no batches; an iterator that was used up before yields nothing")
    keys = [key for key, _ in parts[0].named_inputs()]
    for part in parts:
        if [key for key, _ in part.named_inputs()] != keys or (part.targets is None) != (parts[0].targets is None):
            raise BadData(f"{name}: batches differ in their arrays; yield the same inputs and targets every time")
    joined = {key: _cat([dict(part.named_inputs())[key] for part in parts], key, name) for key in keys}
    targets = [part.targets for part in parts if part.targets is not None]
    inputs = joined if isinstance(parts[0].inputs, dict) else tuple(joined.values())
    data = ArrayData(inputs, _cat(targets, "targets", name) if targets else None, name=name)
    return data if limit is None else data.first(limit)


def _cat(tensors: list[Tensor], key: str, name: str) -> Tensor:
    for tensor in tensors:
        if tensor.shape[1:] != tensors[0].shape[1:]:
            sizes = f"{list(tensors[0].shape[1:])} and {list(tensor.shape[1:])}"
            raise BadData(f"{name}: {key} has examples of {sizes}; pad or crop them to one shape")
    return torch.cat(tensors)
