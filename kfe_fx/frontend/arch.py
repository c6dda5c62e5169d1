"""Call the user's factory: ``file.py:function`` or ``package.module:function`` builds the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from kfe_fx.errors import UsageError
from kfe_fx.user_code import inside, load


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
    told = f"--arch {arch}"
    factory = load(arch, told)
    if isinstance(factory, nn.Module):
        return Built(factory)
    if not callable(factory):
        raise UsageError(f"{told}: {arch.rpartition(':')[2]!r} is a {type(factory).__name__}, not a function")
    with inside(arch, told):
        made = factory()
    return _built(arch, made)


def _built(arch: str, made: Any) -> Built:
    if isinstance(made, nn.Module):
        return Built(made)
    if isinstance(made, tuple) and 2 <= len(made) <= 3 and isinstance(made[0], nn.Module):
        return Built(*made)
    kind = type(made).__name__
    raise UsageError(f"--arch {arch}: returned a {kind}; return the module or (module, example_inputs[, dynamic_axes])")
