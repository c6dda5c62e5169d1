"""load_data: the usual formats of examples behind one name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kfe_fx.data import source_text
from kfe_fx.data.checks import check_finite, check_targets, validate_against
from kfe_fx.data.dataset import ArrayData, Inputs, Redraw
from kfe_fx.data.factory import load_factory
from kfe_fx.data.glyphs import CLASSES, glyphs, held_out
from kfe_fx.data.images import load_images
from kfe_fx.data.npz import load_npz
from kfe_fx.errors import BadData, MissingDependency

DRAWN = 10_000  # where glyphs, chars or tags come without a count


def load_data(
    spec: str | Path,
    example_inputs: Any = None,
    *,
    classes: int | None = None,
    limit: int | None = None,
) -> ArrayData:
    """Load examples.

    | spec | what |
    |---|---|
    | `data.npz` | arrays x (or inputs, images) and y (or targets, labels), or one or two in order |
    | `folder/` | images, a sub-folder per class, all of one size |
    | `file.py:function` | what it returns: (inputs, targets), a Dataset, a DataLoader, batches; runs its code |
    | `glyphs:N`, `glyphs:N:SEED` | N drawn characters [1, 32, 32] in 36 classes, seed 0 unless told |
    | `glyphs:held-out`, `glyphs:held-out:N` | the characters that accuracy is measured on |
    | `chars:N`, `chars:N:SEED` | N windows [100] of Python source, 98 characters; targets are those one further on |
    | `tags:N`, `tags:N:SEED` | the same windows; targets are 8 kinds of token, one per character |
    | `chars:held-out:N`, `tags:held-out:N` | windows of files that no training window is cut from |
    | `digits` | scikit-learn's 1,797 handwritten digits [1, 8, 8] in 10 classes, 0 to 1 |

    `:N` may be left out for 10,000. Glyphs are drawn as large as the network reads them.

    Bytes are not scaled by guess. `spec?scale=255` divides by 255 in float32; `spec?scale=255&mean=0.5&std=0.2` also
    standardises, (x / scale - mean) / std; three values after = are one per channel.

    Args:
        spec: what to load.
        example_inputs: what the network reads; when given, the data is checked against it and cast.
        classes: number of classes; when given, labels outside it are refused.
        limit: load no more than this many examples.

    Returns:
        The examples, all values finite.

    Raises:
        BadData: the data is missing, damaged, not finite, or does not fit.
        MissingDependency: the package that this format needs is not installed.
    """
    text, scaling = _options(str(spec))
    data = _load(text, limit)
    if limit is not None:
        data = data.first(limit)
    data = check_finite(scaling.apply(data))
    if example_inputs is not None:
        data = validate_against(data, example_inputs)
    if classes is not None and data.targets is not None:
        check_targets(data.targets, classes, data.name)
    return data


def _load(text: str, limit: int | None) -> ArrayData:
    name = text.partition(":")[0]
    if name == "glyphs":
        return _glyphs(text, limit)
    if name in ("chars", "tags"):
        return _source(text, limit)
    if text == "digits":
        return _digits()
    path = Path(text)
    if path.is_dir():
        return load_images(path)
    if ":" in text and not path.exists():
        return load_factory(text, limit)
    return load_npz(path)


def _glyphs(text: str, limit: int | None, side: int = 32) -> ArrayData:
    count, seed = _asked(text, limit)
    images, labels = held_out(count, side) if seed is None else glyphs(count, seed, side)
    return ArrayData(
        (torch.from_numpy(images),),
        torch.from_numpy(labels),
        name=text,
        classes=tuple(CLASSES),
        redraw=partial(_glyphs, text, limit),
    )


def _source(text: str, limit: int | None) -> ArrayData:
    count, seed = _asked(text, limit)
    if text.partition(":")[0] == "chars":
        classes, drawn, apart = source_text.VOCABULARY, source_text.chars, source_text.held_out_chars
    else:
        classes, drawn, apart = source_text.TAGS, source_text.tags, source_text.held_out_tags
    inputs, targets = apart(count) if seed is None else drawn(count, seed)
    return ArrayData((torch.from_numpy(inputs),), torch.from_numpy(targets), name=text, classes=classes)


def _asked(text: str, limit: int | None) -> tuple[int, int | None]:
    """Read NAME, NAME:COUNT, NAME:COUNT:SEED or NAME:held-out:COUNT; the seed of held-out examples is None."""
    name, *words = text.split(":")
    held = words[:1] == ["held-out"]
    numbers = words[held:]
    if len(numbers) > 2 - held or not all(word.isascii() and word.isdigit() for word in numbers):
        raise BadData(f"{text!r} is not {name}:COUNT, {name}:COUNT:SEED or {name}:held-out:COUNT; try {name}:20000")
    count = int(numbers[0]) if numbers else DRAWN
    if limit is not None:
        count = min(count, limit)  # a longer set begins with the shorter one
    if held:
        return count, None
    return count, int(numbers[1]) if len(numbers) > 1 else 0


def _digits() -> ArrayData:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependency("digits come with scikit-learn: pip install scikit-learn") from error
    pixels, labels = load_digits(return_X_y=True)
    images = np.asarray(pixels, np.float32).reshape(-1, 1, 8, 8) / 16.0
    classes = tuple("0123456789")
    return ArrayData((torch.from_numpy(images),), torch.from_numpy(labels).long(), name="digits", classes=classes)


@dataclass(frozen=True)
class _Scaling:
    """(x / scale - mean) / std on every input, per channel (dim 1) where there are several values."""

    scale: float | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def apply(self, data: ArrayData) -> ArrayData:
        if self == _Scaling():
            return data
        scaled = {key: self._one(data.name, key, tensor) for key, tensor in data.named_inputs()}
        inputs: Inputs = scaled if isinstance(data.inputs, dict) else tuple(scaled.values())
        redraw = None if data.redraw is None else partial(self._redrawn, data.redraw)
        return replace(data, inputs=inputs, redraw=redraw)

    def _redrawn(self, redraw: Redraw, side: int) -> ArrayData:
        return self.apply(redraw(side))

    def _one(self, name: str, key: str, tensor: Tensor) -> Tensor:
        tensor = tensor.float() / (self.scale or 1.0)
        for option, values in (("mean", self.mean), ("std", self.std)):
            if len(values) > 1 and (tensor.ndim < 2 or tensor.shape[1] != len(values)):
                have = tensor.shape[1] if tensor.ndim > 1 else 1
                raise BadData(f"{name}: {option} has {len(values)} values, {key} has {have} channels; give one each")
            if values:
                constant = torch.tensor(values).reshape(-1, *[1] * (tensor.ndim - 2))
                tensor = tensor - constant if option == "mean" else tensor / constant
        return tensor


def _options(text: str) -> tuple[str, _Scaling]:
    """Split `spec?scale=255&mean=...` unless a file has that very name."""
    if "?" not in text or Path(text).exists():
        return text, _Scaling()
    text, _, tail = text.rpartition("?")
    options: dict[str, Any] = {}
    for word in tail.split("&"):
        key, _, value = word.partition("=")
        if key not in ("scale", "mean", "std"):
            raise BadData(f"{text}: unknown option {key!r} after ?; known are scale, mean and std")
        try:
            numbers = tuple(float(number) for number in value.split(","))
        except ValueError:
            raise BadData(f"{text}: {key}={value} is not a number; write it as ?scale=255") from None
        if not np.isfinite(numbers).all() or (key != "mean" and min(numbers) <= 0.0):
            raise BadData(f"{text}: {key}={value} must be finite and, but for a mean, above 0")
        if key == "scale" and len(numbers) > 1:
            raise BadData(f"{text}: scale={value} has several values; give one, and mean and std per channel")
        options[key] = next(iter(numbers)) if key == "scale" else numbers
    return text, _Scaling(**options)
