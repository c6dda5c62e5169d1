"""Probe inputs: what to feed a network when all that is known of its inputs is one example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from kfe_fx.errors import UnsupportedModel, UsageError
from kfe_fx.program import Program
from kfe_fx.recurrent.op import RECURRENT, Arguments
from kfe_fx.runtime.recurrent import lengths_source
from kfe_fx.shapes import propagate, sized_examples

_NO_NUMPY = (torch.bfloat16, torch.complex32)


def example_sizes(program: Program) -> dict[str, int]:
    """Return the size that each named axis has in the example inputs."""
    sizes: dict[str, int] = {}
    for name, value in zip(program.signature.input_names, program.flat_examples(), strict=True):
        for dim, axis in program.axes.get(name, {}).items():
            sizes.setdefault(axis, value.shape[dim])
    return sizes


def draw_inputs(
    program: Program, batch: int | None = None, seed: int = 0, sizes: Mapping[str, int] | None = None
) -> list[torch.Tensor]:
    """Draw flat inputs like the examples, at another batch size and at other sizes of named axes.

    Floats are normal with the example's mean and deviation, cut to its range, so that a probability stays one; a
    constant example is varied around its value. Floats that take two values at most (masks), floats with infinities
    and whole numbers take values that the example holds, so that indices stay in range. Booleans are the example's own.
    Lengths of sequences are 1 to T, one of them T.

    Raises:
        UsageError: ``batch`` or a size is asked of an axis that is not dynamic.
    """
    wanted = resolve_sizes(program, batch, sizes)
    generator = torch.Generator().manual_seed(seed)
    pairs = zip(sized_examples(program, wanted), program.flat_examples(), strict=True)
    flat = [_like(value.detach(), example.detach(), generator) for value, example in pairs]
    steps = _steps_of_lengths(program, wanted)
    names = program.signature.input_names
    return [
        _lengths(value, steps[name], generator) if name in steps else value
        for name, value in zip(names, flat, strict=True)
    ]


def time_axes(program: Program) -> set[str]:
    """Return the names of the dynamic axes that recurrent layers count steps by."""
    layers = list(program.graphs["eval"].find_nodes(op="call_function", target=RECURRENT))
    return _axes_of_steps(program, layers)


def _axes_of_steps(program: Program, layers: list[fx.Node]) -> set[str]:
    sizes = example_sizes(program)
    axes = set(sizes) - program.batch_axes()
    if not layers or not axes:
        return set()
    before = _steps(program, layers, sizes)
    return {axis for axis in axes if _steps(program, layers, sizes | {axis: sizes[axis] + 1}) != before}


def _steps(program: Program, layers: list[fx.Node], sizes: Mapping[str, int]) -> list[int]:
    try:
        values = propagate(program, sizes=dict(sizes))
    except (RuntimeError, ValueError, IndexError, TypeError):
        return []  # the network does not take these sizes
    calls = [Arguments.of(layer) for layer in layers]
    return [int(values[call.input].shape[call.time_dim]) for call in calls]


def full_lengths(program: Program) -> dict[str, str | int]:
    """Return by name of an input that holds lengths what they are at most: the name of an axis, or a number."""
    found: dict[str, str | int] = {}
    sizes = example_sizes(program)
    for name, layers in lengths_inputs(program).items():
        steps = _steps(program, layers, sizes)
        if steps:
            # the axis itself, not one from which the steps are computed
            axes = [axis for axis in _axes_of_steps(program, layers) if sizes[axis] == min(steps)]
            found[name] = min(axes, default=min(steps))
    return found


def lengths_inputs(program: Program) -> dict[str, list[fx.Node]]:
    """Return the inputs that are lengths of sequences, by name, with the recurrent layers that read them.

    An input is one when it reaches the lengths of a recurrent layer through changes of its type alone.
    """
    names = dict(zip(_placeholders(program), program.signature.input_names, strict=True))
    found: dict[str, list[fx.Node]] = {}
    for layer in program.graphs["eval"].find_nodes(op="call_function", target=RECURRENT):
        lengths = Arguments.of(layer).lengths
        source = None if lengths is None else lengths_source(lengths)
        if source in names:
            found.setdefault(names[source], []).append(layer)
    return found


def _placeholders(program: Program) -> list[fx.Node]:
    return list(program.graphs["eval"].find_nodes(op="placeholder"))[: len(program.signature.input_names)]


def _steps_of_lengths(program: Program, sizes: Mapping[str, int]) -> dict[str, int]:
    found = lengths_inputs(program)
    steps = {name: _steps(program, layers, sizes) for name, layers in found.items()}
    return {name: min(counts) for name, counts in steps.items() if counts}


def _lengths(value: torch.Tensor, steps: int, generator: torch.Generator) -> torch.Tensor:
    drawn = torch.randint(1, steps + 1, value.shape, generator=generator)
    if drawn.numel():
        drawn.view(-1)[int(torch.randint(drawn.numel(), (), generator=generator))] = steps
    return drawn.to(value.dtype).to(value.device)


def resolve_sizes(program: Program, batch: int | None, sizes: Mapping[str, int] | None) -> dict[str, int]:
    """Return the size of every named axis: the example's, or what ``batch`` and ``sizes`` ask for.

    Raises:
        UsageError: an axis that is not dynamic, or a size below 1.
    """
    result = example_sizes(program)
    asked = dict(sizes or {})
    if batch is not None:
        counting = program.batch_axes()
        asked = dict.fromkeys(counting, batch) | asked
        if not counting and any(value.dim() and value.shape[0] != batch for value in program.flat_examples()):
            raise UsageError(
                f"the batch size is fixed in this network, {batch} was asked for; capture it with a dynamic axis"
            )
    for axis, size in asked.items():
        if axis not in result:
            raise UsageError(f"no dynamic axis is called {axis!r}; the axes are {sorted(result)}")
        if size < 1:
            raise UsageError(f"axis {axis!r} needs a size of at least 1, got {size}")
    return result | asked


def to_feeds(program: Program, flat: list[torch.Tensor]) -> dict[str, np.ndarray]:
    """Name flat inputs as ONNX Runtime takes them.

    Raises:
        UnsupportedModel: a type that numpy lacks.
    """
    feeds = {}
    for name, value in zip(program.signature.input_names, flat, strict=True):
        if value.dtype in _NO_NUMPY:
            raise UnsupportedModel(
                f"input {name!r} is {value.dtype}, which cannot be fed to ONNX Runtime from Python; use float32"
            )
        feeds[name] = np.array(value.detach().cpu().numpy(), order="C")
    return feeds


def feeds(
    program: Program, batch: int | None = None, seed: int = 0, sizes: Mapping[str, int] | None = None
) -> dict[str, np.ndarray]:
    """Return named arrays for a session of the Program's ONNX form; see ``draw_inputs``.

    Raises:
        UsageError: ``batch`` or a size is asked of an axis that is not dynamic.
        UnsupportedModel: an input type that numpy lacks.
    """
    return to_feeds(program, draw_inputs(program, batch, seed, sizes))


def _like(value: torch.Tensor, example: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    device, value, example = value.device, value.cpu(), example.cpu()
    if value.dtype == torch.bool or not value.numel() or not example.numel():
        return value.to(device)
    if not value.is_floating_point():
        # complex numbers too
        return _resampled(value, example, generator).to(device)
    if not torch.isfinite(example).all() or (example.numel() > 2 and 1 < len(example.unique()) <= 2):
        return _resampled(value, example, generator).to(device)
    work = example.double()
    low, high = work.min(), work.max()
    if low == high:
        noise = torch.rand(value.shape, generator=generator, dtype=torch.float64)
        drawn = 2 * noise - 1 if low == 0 else low * (0.5 + noise)
    else:
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        drawn = (work.mean() + work.std() * noise).clamp(low, high)
    return drawn.to(value.dtype).to(device)


def _resampled(value: torch.Tensor, example: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    index = torch.randint(example.numel(), value.shape, generator=generator)
    return example.reshape(-1)[index]


def describe(feeds: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return the shapes of named arrays as plain data."""
    return {name: list(array.shape) for name, array in feeds.items()}
