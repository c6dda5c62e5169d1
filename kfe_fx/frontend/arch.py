"""Call the user's factory: ``file.py:function`` or ``package.module:function`` builds the network."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from kfe_fx.errors import UsageError
from kfe_fx.frontend import source


@dataclass(frozen=True)
class Built:
    """What a factory returned."""

    module: nn.Module
    example_inputs: Any = None
    dynamic_axes: Any = None


def build(arch: str) -> Built:
    """Import the factory ``arch`` names and call it without arguments. This runs the user's code, as its name says.

    Raises:
        UsageError: no such file, module or name; the code raised (with type, message and line); or what it returned is
            neither a module nor ``(module, example_inputs[, dynamic_axes])``.
    """
    place, _, name = arch.rpartition(":")
    if not place or not name.isidentifier():
        raise UsageError(f"--arch {arch!r} does not name a function: write file.py:name or package.module:name")
    folder = Path(place).resolve().parent if place.endswith(".py") else Path.cwd()
    with importable(folder):
        module = _module(arch, place)
        factory = getattr(module, name, None)
        if factory is None:
            raise UsageError(f"--arch {arch}: {place} defines no {name!r}")
        if isinstance(factory, nn.Module):
            return Built(factory)
        if not callable(factory):
            raise UsageError(f"--arch {arch}: {name!r} is a {type(factory).__name__}, not a function")
        try:
            made = factory()
        except (Exception, SystemExit) as error:  # whatever the user's code raises
            raise _raised(arch, error) from error
    return _built(arch, made)


def _built(arch: str, made: Any) -> Built:
    if isinstance(made, nn.Module):
        return Built(made)
    if isinstance(made, tuple) and 2 <= len(made) <= 3 and isinstance(made[0], nn.Module):
        return Built(*made)
    kind = type(made).__name__
    raise UsageError(f"--arch {arch}: returned a {kind}; return the module or (module, example_inputs[, dynamic_axes])")


def _module(arch: str, place: str) -> ModuleType:
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{place}.".startswith(f"{error.name}."):
                raise UsageError(
                    f"--arch {arch}: there is no module {error.name!r}; is it installed, or is it a file.py?"
                ) from None
            raise _raised(arch, error) from error
        except (Exception, SystemExit) as error:  # whatever the user's code raises
            raise _raised(arch, error) from error
    path = Path(place)
    if not path.is_file():
        raise UsageError(f"--arch {arch}: no such file {place}")
    spec = importlib.util.spec_from_file_location(f"kfe_fx_arch_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"--arch {arch}: {place} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        del sys.modules[spec.name]
        raise _raised(arch, error) from error
    return module


def _raised(arch: str, error: BaseException) -> UsageError:
    where = source.of_error(error)
    if isinstance(error, SyntaxError) and error.filename:
        where = f"{source.relative(error.filename)}:{error.lineno}"
    text = " ".join(str(error).split())[:300]
    return UsageError(f"--arch {arch}: raised {type(error).__name__}: {text}{f' ({where})' if where else ''}")


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
