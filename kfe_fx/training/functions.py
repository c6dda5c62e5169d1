"""Functions of the user's own, by place and name: ``file.py:name`` or ``package.module:name``."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from kfe_fx.errors import UsageError


def load_function(reference: str) -> Any:
    """Import the function ``reference`` names; this runs the user's code, as its name says.

    Raises:
        UsageError: no such file, module or function, or it cannot be imported.
    """
    place, _, name = reference.rpartition(":")
    if not place or not name.isidentifier():
        raise UsageError(f"{reference!r} does not name a function: write file.py:name or package.module:name")
    try:
        if place.endswith(".py"):
            path = Path(place)
            spec = importlib.util.spec_from_file_location(f"kfe_fx_user_{path.stem}", path)
            if spec is None or spec.loader is None or not path.is_file():
                raise UsageError(f"{reference}: no such file {place}")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except (ImportError, SyntaxError) as error:
        raise UsageError(f"{reference}: cannot be imported ({type(error).__name__}: {error})") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(f"{reference}: {place} defines no function {name!r}")
    return function
