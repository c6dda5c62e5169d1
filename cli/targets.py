"""Where outputs go, checked before any work starts."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from kfe_fx.errors import BadFile


def require_model(model: Path) -> None:
    """Refuse a model that is missing or no regular file, before anything heavy is imported.

    Raises:
        BadFile: there is no such file, or it is a folder, a device or a pipe, or it cannot be read.
    """
    if not model.exists():
        raise BadFile(f"{model}: no such file")
    if not model.is_file():
        raise BadFile(f"{model}: not a regular file; give the model file itself")
    if not os.access(model, os.R_OK):
        raise BadFile(f"{model}: not readable; check its permissions")


def require_folder(folder: Path, *, make: bool = False) -> None:
    """Refuse a folder that cannot be written to; with `make` also one that cannot be made.

    Raises:
        BadFile: the folder is missing (unless `make`), or it or its nearest parent is a file or not writable.
    """
    if not (folder.exists() or make):
        raise BadFile(f"{folder}: no such folder; make it first or choose another with -o")
    parent = folder
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise BadFile(f"{parent}: not a folder, so nothing can be written to {folder}; choose another with -o")
    try:
        # what the permissions say is not all: a read-only or foreign file system, or root
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise BadFile(f"{parent}: not writable ({error.strerror}); choose another folder with -o") from error


def require_free(targets: Iterable[Path], *, sources: Iterable[Path], force: bool) -> None:
    """Refuse outputs that would replace an input, or a file without --force.

    Raises:
        BadFile: a target is an input (under whatever name), a folder, or exists already and `force` is false.
    """
    inputs = [source for source in sources if source.exists()]
    for target in targets:
        if not (target.exists() or target.is_symlink()):
            continue
        if target.exists() and any(target.samefile(source) for source in inputs):
            raise BadFile(f"{target}: output equal to input; choose another place with -o")
        if target.is_dir():
            raise BadFile(f"{target}: a folder is in the way; choose another place with -o")
        if not force:
            raise BadFile(f"{target}: exists already; replace it with --force or choose another place with -o")
