"""What can be wrong with data, found before it is used: values, labels, and what the network reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kfe_fx.data.dataset import ArrayData, Inputs, kind, shape
from kfe_fx.errors import BadData

IGNORED = -100  # torch's cross_entropy leaves this label out
SIDES = range(8, 65)  # in which images are drawn to fit, pixels: the letters of glyphs are 64


def check_finite(data: ArrayData) -> ArrayData:
    """Refuse NaN and infinite values.

    Args:
        data: the examples, returned as they are.

    Returns:
        The same examples.

    Raises:
        BadData: an input or target is not finite; the text says how many and where the first one is.
    """
    arrays = data.named_inputs()
    if data.targets is not None:
        arrays.append(("targets", data.targets))
    for key, tensor in arrays:
        if not tensor.is_floating_point() or bool(torch.isfinite(tensor.sum())):
            continue  # a finite sum has finite terms; the exact test below costs a mask of the whole array
        bad = ~torch.isfinite(tensor)
        count = int(bad.sum())
        if count:
            examples = int(bad.reshape(len(tensor), -1).any(1).sum())
            where = shape(tuple(int(i) for i in torch.nonzero(bad)[0]))
            raise BadData(
                f"{data.name}: {key} holds {count:,} NaN or infinite value{'s' * (count != 1)} in {examples:,}"
                f" of {len(tensor):,} examples, the first at [{where}]; mend or remove these examples"
            )
    return data


def check_targets(targets: Tensor, classes: int, name: str = "data") -> None:
    """Refuse labels that a network of `classes` outputs cannot learn.

    Args:
        targets: class indices, [N] or [N, positions]; -100 marks a position that does not count.
        classes: number of classes of the network.
        name: where the labels come from, for the message.

    Raises:
        BadData: the labels are not whole numbers, or one is outside 0 to classes - 1.
    """
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise BadData(f"{name}: targets are {kind(targets)}, not class indices; give whole numbers from 0")
    wrong = ((targets < 0) & (targets != IGNORED)) | (targets >= classes)
    if bool(wrong.any()):
        where = torch.nonzero(wrong)[0]
        label = int(targets[tuple(where)])
        hint = ""
        if label == classes and int(targets.min()) == 1:
            hint = " (they seem to count from 1)"
        raise BadData(
            f"{name}: label {label} at [{shape(tuple(int(i) for i in where))}] is out of range:"
            f" the network has {classes} classes, 0 to {classes - 1}{hint}; {int(wrong.sum()):,} such labels"
        )


def validate_against(
    data: ArrayData,
    example_inputs: Any,
    names: Sequence[str] = (),
    axes: Mapping[str, Mapping[int, str]] | None = None,
) -> ArrayData:
    """Check that a network reads these inputs, and cast what may be cast without changing its meaning.

    Floating-point types are cast to the one that the network reads, integers likewise; integers are never
    made floating-point values, because only the user knows how they were scaled in training. Images that are drawn
    on the spot are drawn as large as the network reads them.

    Args:
        data: the examples.
        example_inputs: what the network was captured with: a tensor, a tuple of arguments, a dict of keyword
            arguments, or (arguments, keyword arguments).
        names: names of the flat inputs in order, so that data given by name can be matched to arguments.
        axes: free axes by input name, {"x": {0: "batch", 2: "height"}}; dim 0 is always free, and without
            `names` no other axis is.

    Returns:
        The examples, inputs in the structure of `data` and of the types that the network reads.

    Raises:
        BadData: an input is missing or left over, or its shape or type does not fit.
    """
    expected = _flat_examples(example_inputs)
    by_name = dict(data.inputs) if isinstance(data.inputs, dict) else None
    labels = [names[i] if i < len(names) else key for i, (key, _) in enumerate(expected)]
    tensors = [(i, example) for i, (_, example) in enumerate(expected) if isinstance(example, Tensor)]
    if by_name is not None and not set(by_name) <= set(labels):
        if len(by_name) != len(tensors) or len(tensors) != 1:
            unknown = next(key for key in by_name if key not in labels)
            raise BadData(f"{data.name}: the network has no input {unknown!r}; name the arrays {', '.join(labels)}")
        by_name = {labels[tensors[0][0]]: next(iter(by_name.values()))}
    data = _drawn_to_fit(data, [example for _, example in tensors])
    given = len(data.named_inputs())
    if given != len(tensors):
        raise BadData(f"{data.name}: holds {given} input arrays, the network reads {len(tensors)}: {', '.join(labels)}")
    cast: dict[str, Tensor] = {}
    for position, (i, example) in enumerate(tensors):
        if by_name is not None:
            key, tensor = labels[i], by_name[labels[i]]
        else:
            key, tensor = data.named_inputs()[position]
        free = {0} | set((axes or {}).get(labels[i], {}))
        _check_shape(data.name, key, tensor, example, free)
        cast[key] = _cast(data.name, key, tensor, example)
    inputs: Inputs = cast if by_name is not None else tuple(cast.values())
    return replace(data, inputs=inputs)


def _drawn_to_fit(data: ArrayData, examples: list[Tensor]) -> ArrayData:
    if data.redraw is None or len(examples) != 1 or examples[0].ndim != 4:
        return data
    side = examples[0].shape[3]  # the width: a network of free height may have been captured with another one
    if side not in SIDES or side == data.named_inputs()[0][1].shape[-1]:
        return data
    return data.redraw(side)


def _flat_examples(example_inputs: Any) -> list[tuple[str, Any]]:
    """List (name, value) of the example inputs; nested containers are flattened in order."""
    if isinstance(example_inputs, Tensor):
        return [("inputs", example_inputs)]
    if isinstance(example_inputs, dict):
        return [pair for key, value in example_inputs.items() for pair in _flat_one(str(key), value)]
    values = tuple(example_inputs)
    if len(values) == 2 and isinstance(values[0], tuple) and isinstance(values[1], dict):
        return _flat_examples(values[0]) + _flat_examples(values[1])
    if len(values) == 1:
        return _flat_one("inputs", values[0])
    return [pair for i, value in enumerate(values) for pair in _flat_one(f"inputs[{i}]", value)]


def _flat_one(key: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [pair for name, one in value.items() for pair in _flat_one(f"{key}.{name}", one)]
    if isinstance(value, list | tuple):
        return [pair for i, one in enumerate(value) for pair in _flat_one(f"{key}[{i}]", one)]
    return [(key, value)]


def _check_shape(name: str, key: str, tensor: Tensor, example: Tensor, free: set[int]) -> None:
    have, want = tensor.shape, example.shape
    if len(have) == len(want) and all(d in free or a == b for d, (a, b) in enumerate(zip(have, want, strict=True))):
        return
    wanted = shape(["N", *("*" if d in free else size for d, size in enumerate(want) if d)])
    text = f"{name}: {key} is [{shape(['N', *have[1:]])}], the network reads [{wanted}]"
    if len(have) == len(want) == 4 and (have[3], have[1], have[2]) == tuple(want[1:]):
        raise BadData(f"{text}: channels come last here; move axis 3 to axis 1")
    if len(have) == 3 and len(want) == 4 and want[1] == 1 and have[1:] == want[2:]:
        raise BadData(f"{text}: the channel axis is missing; add one with x[:, None]")
    raise BadData(f"{text}; resize or reshape the data, or capture the network with this size")


def _cast(name: str, key: str, tensor: Tensor, example: Tensor) -> Tensor:
    if tensor.dtype == example.dtype:
        return tensor
    if tensor.is_floating_point() and example.is_floating_point():
        return tensor.to(example.dtype)
    whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    if whole and not (example.is_floating_point() or example.is_complex() or example.dtype == torch.bool):
        return tensor.to(example.dtype)
    text = f"{name}: {key} is {kind(tensor)}, the network reads {kind(example)}"
    if whole and example.is_floating_point():
        raise BadData(
            f"{text}: values are not scaled by guess; say how they were scaled in training, such as"
            " ?scale=255 after the name of the data, or save them as float32"
        )
    raise BadData(f"{text}; save the data in that type")
