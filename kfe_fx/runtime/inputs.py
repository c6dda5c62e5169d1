"""Probe inputs: what to feed a network when all that is known of its inputs is one example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from kfe_fx.errors import UnsupportedModel, UsageError
from kfe_fx.program import Program
from kfe_fx.shapes import sized_examples

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

    Raises:
        UsageError: ``batch`` or a size is asked of an axis that is not dynamic.
    """
    wanted = resolve_sizes(program, batch, sizes)
    generator = torch.Generator().manual_seed(seed)
    pairs = zip(sized_examples(program, wanted), program.flat_examples(), strict=True)
    return [_like(value.detach(), example.detach(), generator) for value, example in pairs]


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
