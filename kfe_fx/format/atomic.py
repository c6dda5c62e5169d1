"""Write a file whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from kfe_fx.errors import BadFile


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file in the folder of ``path``; sync it and rename it to ``path`` at the end.

    Whatever goes wrong, ``path`` is as it was and the temporary file is gone.

    Raises:
        BadFile: ``path`` is no place for a file, or the disk refuses.
    """
    if path.is_dir() or (path.exists() and not path.is_file()):
        raise BadFile(f"{path}: a folder or device is in the way; name a file")
    draft = path.with_name(f".{path.name[:100]}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            with open(draft, "x+b") as handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(draft, path)
            _sync_folder(path.parent)
        finally:
            with suppress(FileNotFoundError):
                draft.unlink()
    except OSError as error:
        raise BadFile(f"{path}: cannot be written ({error.strerror or error}); choose another place") from error


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
