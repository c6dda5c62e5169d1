"""What the reference networks are trained and measured on: examples to train with, and others that are held out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kfe_fx.data import source_text
from kfe_fx.data.glyphs import glyphs, held_out

Arrays = tuple[NDArray[np.generic], NDArray[np.generic]]


@dataclass(frozen=True)
class Task:
    """Inputs [N, ...] with a class each, or with a class for each of their positions.

    Attributes:
        drawn: (count, seed) to the first examples of a training stream.
        apart: count to the first examples that no training stream reaches.
        measured: how many of those the recorded accuracy is measured on.
        example: what one is called.
        bits: the classes are symbols of a text, whose cross-entropy is told in bits.
    """

    drawn: Callable[[int, int], Arrays]
    apart: Callable[[int], Arrays]
    measured: int = 10_000
    example: str = "images"
    bits: bool = False

    def draw(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Draw the first `count` examples of the training stream `seed`: inputs [N, ...], int64 targets."""
        inputs, targets = self.drawn(count, seed)
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def held_out(self, count: int) -> tuple[Tensor, Tensor]:
        """Draw the first `count` held-out examples: inputs [N, ...], int64 targets."""
        inputs, targets = self.apart(count)
        return torch.from_numpy(inputs), torch.from_numpy(targets)


GLYPHS = Task(glyphs, held_out)
SMALL_GLYPHS = Task(partial(glyphs, size=28), partial(held_out, size=28))
CHARS = Task(source_text.chars, source_text.held_out_chars, 2000, "windows", bits=True)
TAGS = Task(source_text.tags, source_text.held_out_tags, 2000, "windows")
