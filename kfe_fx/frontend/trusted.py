"""Files that run code when they are read: pickled modules and .pt2; only for those who said --trust."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn
from torch.export import ExportedProgram

from kfe_fx.errors import BadFile
from kfe_fx.frontend.arch import Built
from kfe_fx.user_code import importable


def read_pickled(path: Path, handle: BinaryIO) -> Any:
    """Unpickle a file, running whatever code it names.

    Raises:
        BadFile: its classes cannot be imported here, or it is damaged.
    """
    handle.seek(0)
    try:
        with importable(Path.cwd()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(handle, map_location="cpu", weights_only=False)
    except (AttributeError, ImportError) as error:
        advice = "run where its classes can be imported, or save a state dict and give --arch"
        raise BadFile(f"{path}: {_line(error)}; {advice}") from error
    except (Exception, SystemExit) as error:  # its own code may raise anything
        raise BadFile(f"{path}: cannot be unpickled: {_line(error)}") from error


def read_exported(path: Path, handle: BinaryIO) -> Built:
    """Load a .pt2, running whatever code it holds; its own example inputs and dynamic dims come along.

    Raises:
        BadFile: torch cannot load it.
    """
    handle.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.load(handle)  # type: ignore[arg-type]
            module = exported.module(check_guards=False)
    except (Exception, SystemExit) as error:  # its own code may raise anything
        raise BadFile(f"{path}: torch {torch.__version__} cannot load this .pt2: {_line(error)}") from error
    for name in (
        "train",
        "eval",
    ):  # replaced by functions that refuse; the flags mean nothing here, but must be settable
        module.__dict__.pop(name, None)
    return Built(module, exported.example_inputs, _dynamic_axes(exported, module))


def _dynamic_axes(exported: ExportedProgram, module: nn.Module) -> dict[str, dict[int, None]] | None:
    """Return the dims that the file keeps dynamic, by the names that capture gives its inputs."""
    from kfe_fx.frontend.inputs import read_call

    if exported.example_inputs is None:
        return None
    users = set(exported.graph_signature.user_inputs)
    values = [node.meta.get("val") for node in exported.graph.nodes if node.op == "placeholder" and node.name in users]
    shapes = [value.shape for value in values if isinstance(value, torch.Tensor)]
    names = read_call(module, exported.example_inputs).names
    found = {
        name: {dim: None for dim, size in enumerate(shape) if not isinstance(size, int)}
        for name, shape in zip(names, shapes, strict=True)
    }
    return {name: dims for name, dims in found.items() if dims}


def _line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:300]
