"""Code of the user's own, by place and name: ``file.py:name`` or ``package.module:name``."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from kfe_fx.errors import KfeError, UsageError
from kfe_fx.frontend import source

LONGEST = 300  # characters of a message of the user's code that are told


def load(reference: str, told: str = "", error: type[KfeError] = UsageError) -> Any:
    """Import what ``reference`` names; this runs the user's code, as its name says.

    Args:
        reference: where it is; modules beside a file can be imported by it.
        told: what to begin messages with; the reference if not given.
        error: the type of what is raised.

    Raises:
        KfeError: of the type ``error``: no such file, module or name, or the code raised, with type, message and line.
    """
    told = told or reference
    place, _, name = reference.rpartition(":")
    if not place or not name.isidentifier():
        raise error(f"{told}: does not name a function: write file.py:name or package.module:name")
    with importable(folder_of(reference)):
        module = _module(place, told, error)
    if not hasattr(module, name):
        raise error(f"{told}: the {'file' if place.endswith('.py') else 'module'} defines no {name!r}")
    return getattr(module, name)


def load_function(reference: str) -> Callable[..., Any]:
    """Import a function whose errors are told as the user's: its type, message and line.

    Raises:
        UsageError: it cannot be imported, or is no function.
    """
    found = load(reference)
    if not callable(found):
        raise UsageError(f"{reference}: {type(found).__name__}, not a function")

    @functools.wraps(found, updated=())
    def called(*args: Any, **kwargs: Any) -> Any:
        with inside(reference):
            return found(*args, **kwargs)

    return called


@contextmanager
def inside(reference: str, told: str = "", error: type[KfeError] = UsageError) -> Iterator[None]:
    """Run what ``reference`` names: as ``running``, and modules beside its file can be imported.

    Raises:
        KfeError: of the type ``error``.
    """
    with importable(folder_of(reference)), running(told or reference, error):
        yield


def folder_of(reference: str) -> Path:
    """Return where the modules of a reference lie: beside its file, or in the current folder."""
    place = reference.rpartition(":")[0]
    return Path(place).resolve().parent if place.endswith(".py") else Path.cwd()


@contextmanager
def running(told: str, error: type[KfeError] = UsageError) -> Iterator[None]:
    """Tell in one line what the user's code raises inside, and where; our own errors come through as they are.

    Raises:
        KfeError: of the type ``error``.
    """
    try:
        yield
    except KfeError:
        raise
    except (Exception, SystemExit) as raised:  # whatever the user's code raises
        where = source.of_error(raised)
        if isinstance(raised, SyntaxError) and raised.filename:
            where = f"{source.relative(raised.filename)}:{raised.lineno}"
        text = " ".join(str(raised).split())[:LONGEST]
        raise error(f"{told}: raised {type(raised).__name__}: {text}{f' ({where})' if where else ''}") from raised


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Let modules of ``folder`` be imported by the code that runs inside."""
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)


def _module(place: str, told: str, error: type[KfeError]) -> ModuleType:
    if not place.endswith(".py"):
        with running(told, error):
            try:
                return importlib.import_module(place)
            except ModuleNotFoundError as missing:
                if missing.name is None or not f"{place}.".startswith(f"{missing.name}."):
                    raise  # of something that the module imports
                missed = missing.name
        raise error(f"{told}: there is no module {missed!r}; is it installed, or is it a file.py?")
    path = Path(place)
    if not path.is_file():
        raise error(f"{told}: no such file {place}")
    spec = importlib.util.spec_from_file_location(f"kfe_fx_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise error(f"{told}: {place} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(spec.name)
    sys.modules[spec.name] = module  # dataclasses, pickles and DataLoader workers look their module up
    try:
        with running(told, error):
            spec.loader.exec_module(module)
    except BaseException:
        if before is None:
            del sys.modules[spec.name]
        else:
            sys.modules[spec.name] = before
        raise
    return module
