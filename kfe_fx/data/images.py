"""Read a folder of images: one sub-folder per class, every image of one size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from kfe_fx.data.dataset import ArrayData
from kfe_fx.data.npz import check_memory
from kfe_fx.errors import BadData, MissingDependency

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
GREY = frozenset({"1", "L"})


def load_images(folder: Path) -> ArrayData:
    """Read every image of `folder/CLASS/`; classes are the sub-folders in sorted order.

    Hidden files and files whose suffix is not that of an image are passed over. Grey images give one channel;
    as soon as one image has colour, all give three.

    Args:
        folder: the folder of class folders.

    Returns:
        Images [N, channels, H, W] as uint8, not scaled; targets [N]; the names of the classes.

    Raises:
        BadData: there is no class folder or image, an image cannot be read, or sizes differ; the text names
            the file.
        MissingDependency: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependency("a folder of images is read with Pillow: pip install pillow") from error
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not classes:
        raise BadData(f"{folder}: has no sub-folders; put the images of each class into a folder of its name")
    files: list[Path] = []
    targets: list[int] = []
    for index, name in enumerate(classes):
        found = sorted(p for p in (folder / name).iterdir() if _is_image(p))
        if not found:
            raise BadData(f"{folder / name}: this class has no images; add some or remove the folder")
        files += found
        targets += [index] * len(found)
    first: tuple[int, int] | None = None
    colour = False
    for file in files:
        try:
            with Image.open(file) as image:
                size, mode = image.size, image.mode
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise BadData(f"{file}: not a readable image ({error}); replace or remove it") from error
        first = first or size
        colour = colour or mode not in GREY
        if size != first:
            raise BadData(
                f"{file}: is {size[0]} x {size[1]} pixels where {files[0].name} is {first[0]} x {first[1]};"
                " give all images one size"
            )
    width, height = first or (0, 0)
    channels = 3 if colour else 1
    check_memory(str(folder), len(files) * channels * width * height)
    pixels = np.empty((len(files), height, width, channels), np.uint8)
    for row, file in zip(pixels, files, strict=True):
        try:
            with Image.open(file) as image:
                row[...] = np.asarray(image.convert("RGB" if colour else "L")).reshape(row.shape)
        except (OSError, SyntaxError, ValueError) as error:
            raise BadData(f"{file}: not a readable image ({error}); replace or remove it") from error
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()  # [N, channels, H, W]
    return ArrayData((images,), torch.tensor(targets), name=folder.name or str(folder), classes=tuple(classes))


def _is_image(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".") and path.suffix.lower() in SUFFIXES
