"""Load a network from a file; the content decides what the file is, not its name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from torch import nn

from kfe_fx.errors import BadFile, UsageError
from kfe_fx.format.reader import load, open_regular
from kfe_fx.frontend import sniff
from kfe_fx.frontend.arch import Built, build
from kfe_fx.frontend.capture import capture
from kfe_fx.frontend.specs import read_specs
from kfe_fx.frontend.trusted import read_exported, read_pickled
from kfe_fx.frontend.weights import HoldsCode, candidates, check_zip, load_weights, read_pickle, read_safetensors
from kfe_fx.program import Program


def load_program(
    path: str | os.PathLike[str],
    *,
    arch: str | None = None,
    trust: bool = False,
    inputs: Sequence[str] = (),
    data: Any = None,
) -> Program:
    """Load a program file, a state dict with ``arch``, or, with ``trust``, a pickled module or .pt2.

    No code from the file runs unless ``trust`` is set; the code that ``arch`` names does. Example inputs come from
    the file, else from the factory, else from ``inputs``, else from the first two examples of ``data``.

    Args:
        path: the file.
        arch: the function that builds the module of a state dict, ``file.py:name`` or ``package.module:name``; it
            returns the module or (module, example_inputs[, dynamic_axes]).
        trust: let the file run its own code.
        inputs: example inputs as text, ``x=float32[b,3,224,224]``; letters are dynamic axes.
        data: a data set (``kfe_fx.data``) whose ``first(n).inputs`` are inputs of the network.

    Raises:
        BadFile: missing, damaged, foreign or hostile, or a state dict that does not fit ``arch``.
        UsageError: ``arch`` or ``trust`` or example inputs are needed, or do not work.
        UnsupportedModel: the network cannot be captured.
    """
    place = Path(path)
    with open_regular(place) as handle:
        kind, problem = sniff.sniff(handle)
        if not kind:
            raise BadFile(f"{place}: {problem}")
        if kind != sniff.PROGRAM:
            built = _build(place, handle, kind, arch, trust)
            examples, axes = _examples(built, inputs, data)
            return capture(built.module, examples, axes)
    return load(place)


def _build(path: Path, handle: BinaryIO, kind: str, arch: str | None, trust: bool) -> Built:
    if kind == sniff.EXPORTED:
        if not trust:
            raise UsageError(
                f"{path}: a .pt2 can run code when it is loaded; pass --trust if you know where it comes from"
            )
        check_zip(path, handle)
        return read_exported(path, handle)
    content = read_safetensors(path) if kind == sniff.SAFETENSORS else _content(path, handle, trust)
    if isinstance(content, nn.Module):
        return Built(content)
    if arch is None:
        if not candidates(content):
            raise BadFile(
                f"{path}: holds no network but a {type(content).__name__}; write the network with kfe_fx.save"
            )
        raise UsageError(f"{path}: a state dict holds no network, only its weights; pass --arch file.py:factory")
    built = build(arch)
    load_weights(path, content, built.module, arch)
    return built


def _content(path: Path, handle: BinaryIO, trust: bool) -> Any:
    try:
        return read_pickle(path, handle)
    except HoldsCode as found:
        if trust:
            return read_pickled(path, handle)
        advice = "pass --trust if you know where it comes from, or save a state dict"
        raise UsageError(f"{path}: a pickle that runs code ({found}) when it is loaded; {advice}") from None


def _examples(built: Built, inputs: Sequence[str], data: Any) -> tuple[Any, Any]:
    if built.example_inputs is not None:
        return built.example_inputs, built.dynamic_axes
    if inputs:
        return read_specs(inputs)
    if data is not None:
        found = data.first(2).inputs
        return (dict(found) if hasattr(found, "keys") else tuple(found)), built.dynamic_axes
    choices = (
        "let the --arch factory return (module, example_inputs), or pass --input x=float32[b,3,224,224], or --data"
    )
    raise UsageError(f"no example inputs to run the network with: {choices}")
