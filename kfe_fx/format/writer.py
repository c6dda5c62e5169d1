"""Write a Program as a torch checkpoint of its state dict with the graph beside it."""

from __future__ import annotations

import errno
import os
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from kfe_fx import __version__
from kfe_fx.errors import UnsupportedModel, UsageError
from kfe_fx.format import layout
from kfe_fx.format.archive import Archive, seal
from kfe_fx.format.atomic import replacing
from kfe_fx.format.fields import Malformed, dump
from kfe_fx.format.graphs import encode_graph
from kfe_fx.format.reader import read_program
from kfe_fx.format.tensors import describe, prepared, raw
from kfe_fx.format.values import encode_template
from kfe_fx.hard_concrete import learned
from kfe_fx.program import Program, named_tensors, tied_names

Calibration = tuple[tuple[torch.Tensor, ...], torch.Tensor | None]


def save(
    model_or_program: nn.Module | Program,
    example_inputs: Any = None,
    path: str | os.PathLike[str] | None = None,
    *,
    calibration: Any = None,
    dynamic_axes: Any = None,
) -> Path:
    """Write a self-contained program file and return its path.

    The file is also an ordinary checkpoint: ``torch.load(path, weights_only=True)``, with or without ``mmap``, gives
    the state dict under the original names. Equal programs give equal bytes. The file is written whole or not at
    all, and read back before it takes its name. Of ``Program.extras`` it holds "calibration" and "sections".

    Args:
        model_or_program: an nn.Module, captured with ``example_inputs`` and ``dynamic_axes``, or a Program.
        example_inputs: as for ``kfe_fx.capture``; left out for a Program.
        path: the file. For a Program it may come second: ``save(program, "model.pt")``.
        calibration: a sample to score with, ``(inputs, targets)``: inputs a tensor or a tuple of tensors [N, ...] in
            the order of the network's inputs, targets [N, ...] or None. A bare tensor is inputs without targets.
            None keeps the sample the Program has.
        dynamic_axes: as for ``kfe_fx.capture``; left out for a Program.

    Raises:
        UsageError: no path, no inputs for a module, or a calibration sample that does not fit the inputs.
        UnsupportedModel: the network cannot be captured, or holds an operation or tensor that has no form in the file.
        BadFile: the file cannot be written there.
    """
    if path is None and isinstance(model_or_program, Program) and isinstance(example_inputs, str | os.PathLike):
        path, example_inputs = example_inputs, None
    if path is None:
        raise UsageError('save needs a path: kfe_fx.save(model, example_inputs, "model.pt")')
    target = Path(path)
    program = _program(model_or_program, example_inputs, dynamic_axes)
    sample = program.extras.get("calibration") if calibration is None else _sample(calibration)
    _check_sample(program, sample)
    with replacing(target) as handle:
        _write(program, sample, handle)
        try:
            again = read_program(handle, run=False)
        except Malformed as error:
            raise UnsupportedModel(f"the network has no form in a program file: {error}") from error
    if again.hash() != program.hash():
        raise UnsupportedModel(
            f"{target}: the file does not hold the same network; the program's graph was edited wrongly"
        )
    return target


def _program(given: Any, example_inputs: Any, dynamic_axes: Any) -> Program:
    if isinstance(given, Program):
        if example_inputs is not None or dynamic_axes is not None:
            raise UsageError("a Program has its example inputs and axes already; pass them with an nn.Module only")
        return given
    if not isinstance(given, nn.Module):
        raise UsageError(f"save takes an nn.Module or a Program, got {type(given).__name__}")
    if example_inputs is None:
        raise UsageError("save needs example inputs to capture a module: kfe_fx.save(model, example_inputs, path)")
    from kfe_fx.frontend.capture import capture

    return capture(given, example_inputs, dynamic_axes)


def _sample(given: Any) -> Calibration:
    inputs, targets = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    inputs = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    tensors = [*inputs, *([] if targets is None else [targets])]
    if not inputs or not all(isinstance(value, torch.Tensor) and value.dim() for value in tensors):
        raise UsageError("calibration is (inputs, targets): a tensor or a tuple of tensors, and a tensor or None")
    return inputs, targets


def _check_sample(program: Program, sample: Calibration | None) -> None:
    if sample is None:
        return
    inputs, targets = sample
    names = program.signature.input_names
    if len(inputs) != len(names):
        raise UsageError(f"calibration has {len(inputs)} inputs, the network takes {len(names)}: {', '.join(names)}")
    lengths = {len(value) for value in (*inputs, *([] if targets is None else [targets]))}
    if len(lengths) != 1:
        raise UsageError(f"calibration: inputs and targets have {sorted(lengths)} examples; give as many of each")


class _Extras:
    """Tensors outside the state dict, each in a record of its own."""

    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []

    def add(self, value: torch.Tensor, name: str) -> dict[str, Any]:
        """Keep a tensor for writing and return its line for the table."""
        self.values.append(prepared(value, name))
        return describe(self.values[-1], f"{layout.EXTRA}{len(self.values) - 1}")


def _write(program: Program, sample: Calibration | None, handle: BinaryIO) -> None:
    extras = _Extras()
    state, table = _tensors(program.module(), extras)
    document = _document(program, sample, table, extras)
    try:
        torch.save(state, handle)
    except RuntimeError as error:  # a full disk, in the words of torch's zip writer
        raise OSError(errno.EIO, "the disk is full or failing") from error
    with zipfile.ZipFile(handle, "a", zipfile.ZIP_STORED) as opened:
        root = opened.namelist()[0].split("/")[0]
        for index, value in enumerate(extras.values):
            _add(opened, f"{root}/{layout.EXTRA}{index}", raw(value))
        _add(opened, f"{root}/{layout.GRAPH}", memoryview(dump(document)))
    seal(handle)
    _check_records(handle, state, table)


def _add(opened: zipfile.ZipFile, name: str, data: memoryview) -> None:
    info = zipfile.ZipInfo(name)  # no time and no attributes: equal programs give equal bytes
    info.create_system = 0
    with opened.open(info, "w", force_zip64=len(data) >= 2**31) as record:
        record.write(data)


def _tensors(module: nn.Module, extras: _Extras) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    named = named_tensors(module)
    ties = tied_names(module)
    kept = module.state_dict(keep_vars=True)
    first = {names[0]: names for names in ties.values()}
    plain: dict[str, torch.Tensor] = {}  # by the first of the tensor's names
    state: dict[str, torch.Tensor] = {}
    storages: dict[int, str] = {}
    for name in kept:
        key = ties[name][0]
        if key not in plain:
            value = prepared(named[name], name)
            if value.untyped_storage().data_ptr() in storages and value.numel():
                value = value.clone()  # two parameters that share memory without being one
            storages[value.untyped_storage().data_ptr()] = key
            plain[key] = value
        state[name] = plain[key]
    numbers = {key: index for index, key in enumerate(plain)}  # torch.save numbers storages as it meets them
    table = []
    for key, names in first.items():
        value = named[key]
        stored = describe(plain[key], f"data/{numbers[key]}") if key in plain else extras.add(value, key)
        entry: dict[str, Any] = {"names": list(names), "transient": [name for name in names if name not in kept]}
        entry |= {"kind": "parameter" if isinstance(value, nn.Parameter) else "buffer"}
        table.append(entry | {"requires_grad": isinstance(value, nn.Parameter) and value.requires_grad} | stored)
    return state, table


def _check_records(handle: BinaryIO, state: dict[str, torch.Tensor], table: list[dict[str, Any]]) -> None:
    # that torch numbers its records in this order is not promised anywhere: the checksums prove it for this file
    members = Archive(handle).members
    for entry in table:
        name = next((name for name in entry["names"] if name in state), None)
        member = members.get(entry["record"])
        if name is not None and (member is None or member.crc != zlib.crc32(raw(state[name]))):
            raise UnsupportedModel(f"torch {torch.__version__} stores {name!r} elsewhere than expected; use torch 2.13")


def _document(
    program: Program, sample: Calibration | None, table: list[dict[str, Any]], extras: _Extras
) -> dict[str, Any]:
    signature = program.signature
    bounds = program.extras.get("axis_bounds", {})
    axes = sorted({axis for dims in program.axes.values() for axis in dims.values()})
    return {
        "format": layout.FORMAT,
        "version": layout.VERSION,
        "requires": [layout.GATES] if learned(program) else [],
        "written_by": {"kfe_fx": __version__, "torch": str(torch.__version__)},
        "byteorder": sys.byteorder,
        "graphs": {mode: encode_graph(graph) for mode, graph in program.graphs.items()},
        "signature": {
            "inputs": list(signature.input_names),
            "arguments": list(signature.arg_names),
            "positional": signature.positional,
            "input_template": encode_template(signature.inputs),
            "output_templates": {mode: encode_template(part) for mode, part in signature.outputs.items()},
        },
        "modules": [name for name, _ in program.module().named_modules(remove_duplicate=False) if name],
        "tensors": table,
        "examples": [_example(value, extras) for value in program.flat_examples()],
        "axes": {name: [[dim, axis] for dim, axis in sorted(dims.items())] for name, dims in program.axes.items()},
        "axis_bounds": {axis: list(bounds.get(axis, (None, None))) for axis in axes},
        "calibration": _encode_sample(sample, extras),
        "lineage": list(program.lineage),
        "notes": list(program.notes),
        "leaves": {},
        "subgraphs": {},
        "sections": program.extras.get("sections", {}),
    }


def _example(value: Any, extras: _Extras) -> dict[str, Any]:
    if not isinstance(value, torch.Tensor):
        raise UnsupportedModel(f"an example input of type {type(value).__name__} has no form in a program file")
    return extras.add(value, "an example input")


def _encode_sample(sample: Calibration | None, extras: _Extras) -> dict[str, Any] | None:
    if sample is None:
        return None
    inputs, targets = sample
    stored = [extras.add(value, "calibration") for value in inputs]
    return {"inputs": stored, "targets": None if targets is None else extras.add(targets, "calibration")}
