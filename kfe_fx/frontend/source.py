"""Which line of the user's code a node or an error comes from."""

from __future__ import annotations

import os
import re
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
_LIBRARIES = tuple(
    {os.path.realpath(path) for path in sysconfig.get_paths().values() if path and "site-packages" in path}
)
_STDLIB = os.path.realpath(sysconfig.get_paths()["stdlib"])
_OURS = str(Path(__file__).resolve().parents[1])
_PARTS = tuple(os.path.realpath(os.path.join(_OURS, part)) for part in ("passes", "cli"))  # links in a checkout
_OWN_MODELS = os.path.realpath(os.path.join(_OURS, "models"))


def _is_users(file: str) -> bool:
    real = os.path.realpath(file)
    if real.startswith(_OWN_MODELS):
        return True
    library = real.startswith((*_LIBRARIES, *_PARTS, _OURS, _STDLIB)) or "site-packages" in real
    return not library and not file.startswith("<")


def relative(file: str) -> str:
    """Shorten a path: from site-packages on, relative to the current folder, or its last two parts."""
    if "site-packages" in file:
        return file[file.index("site-packages") :]
    path = Path(os.path.realpath(file))
    try:
        return str(path.relative_to(Path.cwd().resolve()))
    except ValueError:
        return "/".join(path.parts[-2:])


def of_stack_trace(stack_trace: str | None) -> str:
    """Return ``file.py:line`` of the innermost user frame of a node's stack trace, else of its innermost frame."""
    frames = [(match["file"], match["line"]) for match in _FRAME.finditer(stack_trace or "")]
    users = [frame for frame in frames if _is_users(frame[0])] or frames
    return f"{relative(users[-1][0])}:{users[-1][1]}" if users else ""


def users(places: Iterable[str]) -> list[str]:
    """Keep the places that lie in the user's own code, sorted."""
    return sorted(place for place in set(places) if place and "site-packages" not in place)


def of_error(error: BaseException) -> str:
    """Return ``file.py:line`` of the innermost user frame that an error passed through, or an empty string."""
    found = ""
    seen: BaseException | None = error
    while seen is not None:
        for frame in traceback.extract_tb(seen.__traceback__):
            if _is_users(frame.filename):
                found = f"{relative(frame.filename)}:{frame.lineno}"
        seen = seen.__cause__ or seen.__context__
    return found
