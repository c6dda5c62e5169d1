"""Glyph images without end: capitals and digits drawn from the fonts that matplotlib carries.

Each image is one character under a random affine map (rotation, shear, scale, shift), with pieces of other
characters reaching in from the border, strokes across it, a slope of brightness and pixel noise. Nothing is
downloaded.

Images come in blocks of `BLOCK`; block b of a stream draws everything from
`numpy.random.SeedSequence((TAG, stream, seed, b))`. So the same seed always gives the same images, a longer set
begins with the shorter one, two seeds share no draw (fonts, affine maps, clutter and noise all differ), and the
held-out set is a stream of its own that no training seed can reach. The 20 fonts are the same everywhere.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kfe_fx.errors import BadData, MissingDependency

CLASSES = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    *("cmr10", "cmb10", "cmss10", "cmtt10"),
)
BLOCK = 1000
TAG = 0x676C7970  # keeps these streams apart from any other use of the same small seeds
TRAIN, HELD_OUT = 0, 1
MASK = 64  # side of a rendered character, pixels
EM = 48  # font size, pixels: the widest capital (a bold W) is 53 pixels
MEAN, STD = 0.15, 0.33

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]


def glyphs(count: int, seed: int, size: int = 32) -> tuple[Floats, Labels]:
    """Draw `count` training images of the stream `seed`.

    Args:
        count: number of images, at least 1.
        seed: non-negative; different seeds share no draw.
        size: side of an image in pixels, at least 8.

    Returns:
        Images [count, 1, size, size], float32, about zero mean and unit variance; labels [count], int64,
        indices into `CLASSES`.

    Raises:
        BadData: count, seed or size is out of range.
        MissingDependency: matplotlib, whose fonts are drawn, is not installed.
    """
    return _stream(count, TRAIN, seed, size)


def held_out(count: int = 10_000, size: int = 32) -> tuple[Floats, Labels]:
    """Draw the first `count` images of the held-out stream, which no training seed reaches.

    Args:
        count: number of images, at least 1.
        size: side of an image in pixels, at least 8.

    Returns:
        As `glyphs`.

    Raises:
        BadData: count or size is out of range.
        MissingDependency: matplotlib is not installed.
    """
    return _stream(count, HELD_OUT, 0, size)


def _stream(count: int, stream: int, seed: int, size: int) -> tuple[Floats, Labels]:
    if count < 1:
        raise BadData(f"glyphs: {count} images were asked for; ask for 1 or more")
    if seed < 0:
        raise BadData(f"glyphs: the seed {seed} is negative; take 0 or more")
    if size < 8:
        raise BadData(f"glyphs: a side of {size} pixels is too small to read; take 8 or more")
    images = np.empty((count, 1, size, size), np.float32)
    labels = np.empty(count, np.int64)
    for block, start in enumerate(range(0, count, BLOCK)):
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((TAG, stream, seed, block))))
        block_images, block_labels = _block(rng, size)
        stop = min(start + BLOCK, count)
        images[start:stop, 0] = block_images[: stop - start]
        labels[start:stop] = block_labels[: stop - start]
    return images, labels


def _block(rng: np.random.Generator, size: int) -> tuple[Floats, Labels]:
    """Draw one block: images [BLOCK, size, size] and labels [BLOCK]."""
    labels = rng.integers(len(CLASSES), size=BLOCK)
    canvas = _warp(
        labels,
        rng,
        size,
        zoom=rng.uniform(1.0, 1.45, (BLOCK, 1)) * rng.uniform(0.9, 1.1, (BLOCK, 2)),
        angle=rng.normal(0.0, 0.17, BLOCK),
        shear=rng.normal(0.0, 0.13, BLOCK),
        shift=rng.uniform(-0.16, 0.16, (BLOCK, 2)),
    )
    canvas *= rng.uniform(0.5, 1.0, (BLOCK, 1, 1)).astype(np.float32)
    for _ in range(2):  # characters reaching in from the border
        direction = rng.uniform(0.0, 2.0 * np.pi, BLOCK)
        shift = rng.uniform(1.0, 1.35, (BLOCK, 1)) * np.stack([np.cos(direction), np.sin(direction)], 1)
        piece = _warp(
            rng.integers(len(CLASSES), size=BLOCK),
            rng,
            size,
            zoom=rng.uniform(0.7, 1.4, (BLOCK, 1)) * np.ones((1, 2)),
            angle=rng.uniform(-np.pi, np.pi, BLOCK),
            shear=rng.normal(0.0, 0.2, BLOCK),
            shift=shift,
        )
        piece *= rng.uniform(0.2, 0.8, (BLOCK, 1, 1)).astype(np.float32)
        np.maximum(canvas, piece, out=canvas)
    np.maximum(canvas, _strokes(rng, size), out=canvas)
    grid = _grid(size)
    slope = rng.normal(0.0, 0.12, (BLOCK, 2)).astype(np.float32)
    canvas += slope[:, 0, None, None] * grid[None, None, :] + slope[:, 1, None, None] * grid[None, :, None]
    noise = rng.standard_normal((BLOCK, size, size), np.float32)
    noise *= rng.uniform(0.04, 0.26, (BLOCK, 1, 1)).astype(np.float32)
    canvas += noise
    canvas -= MEAN
    canvas /= STD
    return canvas, labels


def _grid(size: int) -> Floats:
    """Pixel centres of one axis on [-1, 1], [size]."""
    return ((2.0 * np.arange(size) + 1.0) / size - 1.0).astype(np.float32)


def _warp(
    labels: Labels,
    rng: np.random.Generator,
    size: int,
    zoom: NDArray[np.float64],  # [BLOCK, 2]
    angle: NDArray[np.float64],  # [BLOCK], radians
    shear: NDArray[np.float64],  # [BLOCK]
    shift: NDArray[np.float64],  # [BLOCK, 2], half sides
) -> Floats:
    """Sample the characters `labels`, each in a drawn font, under x -> zoom rotate shear x + shift."""
    masks = _masks()
    fonts = rng.integers(len(FONTS), size=len(labels))
    cos, sin = np.cos(angle), np.sin(angle)
    # the rows of the inverse map, from the image to the character
    rows = np.stack([cos - shear * sin, sin + shear * cos, -sin, cos], 1) / np.repeat(zoom, 2, axis=1)
    rows = rows.astype(np.float32)[:, :, None, None]
    grid = _grid(size)
    x = grid[None, None, :] - shift[:, 0, None, None].astype(np.float32)  # [BLOCK, 1, size]
    y = grid[None, :, None] - shift[:, 1, None, None].astype(np.float32)  # [BLOCK, size, 1]
    half = np.float32(MASK / 2)
    u = (rows[:, 0] * x + rows[:, 1] * y + 1.0) * half - 0.5  # [BLOCK, size, size], in pixels of the mask
    v = (rows[:, 2] * x + rows[:, 3] * y + 1.0) * half - 0.5
    # masks carry an empty border, so that clamping to it reads zero outside
    np.clip(u, 0.0, MASK - 1.001, out=u)
    np.clip(v, 0.0, MASK - 1.001, out=v)
    column, row = u.astype(np.int32), v.astype(np.int32)
    u -= column
    v -= row
    base = ((fonts * len(CLASSES) + labels) * (MASK * MASK)).astype(np.int32)
    index = row * np.int32(MASK) + column + base[:, None, None]
    one = np.float32(1.0)
    top = masks[index] * (one - u) + masks[index + 1] * u
    bottom = masks[index + MASK] * (one - u) + masks[index + MASK + 1] * u
    top *= one - v
    bottom *= v
    top += bottom
    return top.astype(np.float32, copy=False)


def _strokes(rng: np.random.Generator, size: int) -> Floats:
    """One straight stroke per image, half of them absent, [BLOCK, size, size]."""
    angle = rng.uniform(0.0, np.pi, BLOCK).astype(np.float32)[:, None, None]
    offset = rng.uniform(-0.9, 0.9, BLOCK).astype(np.float32)[:, None, None]
    start = rng.uniform(-1.2, 0.6, BLOCK).astype(np.float32)[:, None, None]
    length = rng.uniform(0.4, 1.6, BLOCK).astype(np.float32)[:, None, None]
    width = rng.uniform(0.04, 0.12, BLOCK).astype(np.float32)[:, None, None]
    ink = (rng.uniform(0.2, 0.6, BLOCK) * (rng.random(BLOCK) < 0.5)).astype(np.float32)[:, None, None]
    grid = _grid(size)
    x, y = grid[None, None, :], grid[None, :, None]
    along = np.cos(angle) * x + np.sin(angle) * y - start
    across = np.cos(angle) * y - np.sin(angle) * x - offset
    edge = np.float32(2.0 / size)  # one pixel of soft edge
    body = np.clip((width - np.abs(across)) / edge + 0.5, 0.0, 1.0)
    image = body * np.clip(np.minimum(along, length - along) / edge + 0.5, 0.0, 1.0) * ink
    return image.astype(np.float32, copy=False)


@functools.cache
def _masks() -> Floats:
    """Every character in every font, [fonts * classes * MASK * MASK] flat, 0 to 1."""
    try:
        import matplotlib
        from matplotlib.ft2font import FT2Font
    except ImportError as error:
        raise MissingDependency("glyphs are drawn from matplotlib's fonts: pip install matplotlib") from error
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    masks = np.zeros((len(FONTS), len(CLASSES), MASK, MASK), np.float32)
    for i, name in enumerate(FONTS):
        path = folder / f"{name}.ttf"
        if not path.is_file():
            raise MissingDependency(f"glyphs: {path} is missing from this matplotlib; reinstall matplotlib")
        font: Any = FT2Font(str(path))
        font.set_size(EM, 72)
        for j, character in enumerate(CLASSES):
            masks[i, j] = _render(font, character)
    return masks.reshape(-1)


def _render(font: Any, character: str) -> Floats:
    """One character, centred by its ink, [MASK, MASK]."""
    font.set_text(character, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        font.draw_glyphs_to_bitmap(antialiased=True)
    ink = np.asarray(font.get_image(), np.float32) / 255.0
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    top, left = (MASK - ink.shape[0]) // 2, (MASK - ink.shape[1]) // 2
    mask = np.zeros((MASK, MASK), np.float32)
    mask[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    return mask
