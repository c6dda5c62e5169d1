"""Read a program file: checks first, then bytes, never the pickle, and no code from the file."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from kfe_fx.errors import BadFile
from kfe_fx.format import layout
from kfe_fx.format.archive import Archive
from kfe_fx.format.check import check_runs
from kfe_fx.format.fields import Malformed, distinct, integer, items, parse, record, table, text, texts
from kfe_fx.format.graphs import check_code, decode_graph, identifier
from kfe_fx.format.states import check_states
from kfe_fx.format.tensors import Entry, decode_entry, read, tensor_name
from kfe_fx.format.values import decode_template
from kfe_fx.program import Program, ProgramModule, Signature, get_module, put_tensor
from kfe_fx.structure import pack


def load(path: str | os.PathLike[str]) -> Program:
    """Read a program file. No code from the file runs, and its pickle is not touched.

    The calibration sample is ``program.extras["calibration"]``: ``(inputs, targets or None)``.

    Raises:
        BadFile: missing, damaged, hostile, or not a program file.
    """
    place = Path(path)
    with open_regular(place) as handle:
        try:
            return read_program(handle)
        except Malformed as error:
            raise BadFile(f"{place}: not a valid program file: {error}; write it again with kfe_fx.save") from error
        except MemoryError:
            raise BadFile(f"{place}: larger than the memory of this machine") from None


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading.

    Raises:
        BadFile: there is none, or it is a folder, a device or a pipe, or not readable.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise BadFile(f"{path}: not a regular file; give the model file itself")
        return open(path, "rb")
    except FileNotFoundError:
        raise BadFile(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise BadFile(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


_BARE = nn.Module()


def read_program(handle: BinaryIO, *, run: bool = True) -> Program:
    """Read a program file from an open file; ``run=False`` leaves out the trial on fake tensors.

    Raises:
        Malformed: it is not a valid program file.
    """
    archive = Archive(handle)
    archive.check_seal()
    document = _document(archive)
    entries = [decode_entry(value, f"tensors[{i}]") for i, value in enumerate(items(document["tensors"], "tensors"))]
    kinds = {name: entry.kind for entry in entries for name in entry.names}
    if len(kinds) != sum(len(entry.names) for entry in entries):
        raise Malformed("tensors: a name stands twice")
    signature = _signature(document)
    graphs = {
        mode: decode_graph(value, f"graphs.{mode}", signature.input_names, kinds)
        for mode, value in sorted(record(document["graphs"], "graphs", ("eval",), ("train",)).items())
    }
    _check_outputs(signature, graphs)
    for mode, graph in graphs.items():
        check_code(graph, signature.input_names, f"graphs.{mode}")
    module = ProgramModule(graphs, signature)
    _add_modules(module, document["modules"], kinds)
    used: set[str] = set()
    for index, entry in enumerate(entries):
        _add_tensor(module, entry, read(archive, entry.stored, f"tensors[{index}]", used))
    examples = _tensors(archive, document["examples"], "examples", used)
    if len(examples) != len(signature.input_names):
        raise Malformed("examples: one for each input is expected")
    axes = _axes(document, signature, examples)
    extras = _extras(archive, document, signature, examples, used)
    _check_rest(archive, used)
    lineage, notes = (tuple(texts(document[key], key)) for key in ("lineage", "notes"))
    program = Program(module.eval(), pack(signature.inputs, examples), axes, lineage, notes, extras)
    if run:
        check_runs(program)
    return program


def _document(archive: Archive) -> dict[str, Any]:
    if layout.GRAPH not in archive.members:
        raise Malformed("it holds no graph")
    value = table(parse(archive.read(layout.GRAPH, layout.LARGEST_GRAPH), layout.GRAPH), layout.GRAPH)
    if value.get("format") != layout.FORMAT:
        raise Malformed(f"{layout.GRAPH}: the format is not named {layout.FORMAT!r}")
    version = integer(value.get("version"), "version", 1, 2**31)
    unknown = sorted(set(texts(value.get("requires"), "requires")) - layout.FEATURES)
    if version > layout.VERSION or unknown:
        what = f"the feature {unknown[0][:40]!r}" if unknown else f"version {version} of the format"
        raise Malformed(f"it needs {what}, which this kfe-fx does not know: update kfe-fx")
    document = record(value, layout.GRAPH, layout.FIELDS)
    if document["leaves"] != {} or document["subgraphs"] != {}:
        raise Malformed("it holds leaves or sub-graphs, which this kfe-fx does not know: update kfe-fx")
    if document["byteorder"] != sys.byteorder:
        raise Malformed(f"its numbers are not stored {sys.byteorder}-endian as on this machine")
    for value in table(document["written_by"], "written_by").values():
        text(value, "written_by")
    return document


def _signature(document: dict[str, Any]) -> Signature:
    where = "signature"
    keys = ("inputs", "arguments", "positional", "input_template", "output_templates")
    found = record(document[where], where, keys)
    inputs = distinct([identifier(name, where) for name in texts(found["inputs"], where)], where)
    arguments = distinct(texts(found["arguments"], where), where)
    positional = integer(found["positional"], where, 0, len(arguments))
    leaves: list[int] = []
    template = decode_template(found["input_template"], where, leaves)
    if sorted(leaves) != list(range(len(inputs))):
        raise Malformed(f"{where}: the inputs do not fit their template")
    fits = isinstance(template, tuple) and len(template) == 2
    fits = fits and isinstance(template[0], tuple) and len(template[0]) == positional and isinstance(template[1], dict)
    if not fits or list(template[1]) != arguments[positional:]:
        raise Malformed(f"{where}: the arguments do not fit their template")
    modes = record(found["output_templates"], where, ("eval",), ("train",))
    outputs = {mode: decode_template(value, where, []) for mode, value in modes.items()}
    return Signature(tuple(inputs), tuple(arguments), positional, template, outputs)


def _check_outputs(signature: Signature, graphs: dict[str, Any]) -> None:
    if signature.outputs.keys() != graphs.keys():
        raise Malformed("signature: each graph needs its template of outputs")
    for mode, graph in graphs.items():
        count = len(graph.output_node().args[0])
        try:
            pack(signature.outputs[mode], range(count))
        except IndexError:
            raise Malformed(f"signature: the {mode} graph has only {count} outputs") from None


def _add_modules(module: nn.Module, value: Any, kinds: dict[str, str]) -> None:
    paths = distinct([tensor_name(name, "modules") for name in texts(value, "modules")], "modules")
    owners = {name.rpartition(".")[0] for name in kinds}
    if not {*paths, ""} >= owners:
        raise Malformed("modules: a tensor belongs to a module that is not listed")
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        try:
            owner = get_module(module, parent)
        except KeyError:  # no such parent yet
            raise Malformed(f"modules: {path[:80]!r} has no place there") from None
        if _taken(owner, leaf):
            raise Malformed(f"modules: {path[:80]!r} has no place there")
        owner._modules[leaf] = nn.Module()


def _add_tensor(module: nn.Module, entry: Entry, value: torch.Tensor) -> None:
    made = nn.Parameter(value, entry.requires_grad) if entry.kind == "parameter" else value
    for name in entry.names:
        path, _, leaf = name.rpartition(".")
        if _taken(get_module(module, path), leaf):
            raise Malformed(f"tensors: {name[:80]!r} means something else there")
        put_tensor(module, name, made, persistent=name not in entry.transient)


def _taken(owner: nn.Module, leaf: str) -> bool:
    """Tell whether a module has something of that name, or none ever could have: what every module has itself."""
    return leaf in owner._parameters.keys() | owner._buffers.keys() | owner._modules.keys() or hasattr(_BARE, leaf)


def _tensors(archive: Archive, value: Any, where: str, used: set[str]) -> list[torch.Tensor]:
    return [read(archive, fields, f"{where}[{i}]", used) for i, fields in enumerate(items(value, where))]


def _axes(document: dict[str, Any], signature: Signature, examples: list[torch.Tensor]) -> dict[str, dict[int, str]]:
    ranks = {name: example.dim() for name, example in zip(signature.input_names, examples, strict=True)}
    axes: dict[str, dict[int, str]] = {}
    for name, pairs in table(document["axes"], "axes").items():
        if name not in ranks:
            raise Malformed(f"axes: there is no input {name[:40]!r}")
        axes[name] = {}
        for pair in items(pairs, "axes"):
            if not isinstance(pair, list) or len(pair) != 2:
                raise Malformed("axes: pairs of dim and name are expected")
            axis = text(pair[1], "axes")
            if not axis or not axis.isprintable() or len(axis) > 200:
                raise Malformed(f"axes: {axis[:40]!r} is not a name")
            axes[name][integer(pair[0], "axes", 0, ranks[name] - 1)] = axis
    return axes


def _extras(
    archive: Archive, document: dict[str, Any], signature: Signature, examples: list[torch.Tensor], used: set[str]
) -> dict[str, Any]:
    extras: dict[str, Any] = {}
    if document["calibration"] is not None:
        found = record(document["calibration"], "calibration", ("inputs", "targets"))
        inputs = _tensors(archive, found["inputs"], "calibration", used)
        targets = None if found["targets"] is None else read(archive, found["targets"], "calibration", used)
        together = [*inputs, *([] if targets is None else [targets])]
        if len(inputs) != len(examples) or len({len(value) if value.dim() else -1 for value in together}) != 1:
            raise Malformed("calibration: one tensor for each input is expected, with as many examples in each")
        extras["calibration"] = (tuple(inputs), targets)
    bounds: dict[str, tuple[int | None, int | None]] = {}
    for axis, value in table(document["axis_bounds"], "axis_bounds").items():
        pair = items(value, "axis_bounds")
        sizes = tuple(None if size is None else integer(size, "axis_bounds", 0, 2**62) for size in pair)
        if len(sizes) != 2:
            raise Malformed("axis_bounds: a least and a largest size are expected")
        if sizes != (None, None):
            bounds[axis] = sizes
    if bounds:
        extras["axis_bounds"] = bounds
    sections = table(document["sections"], "sections")
    if sections:
        extras["sections"] = sections
        check_states(sections.get("states", {}), dict(zip(signature.input_names, examples, strict=True)))
    return extras


def _check_rest(archive: Archive, used: set[str]) -> None:
    """Check the records that were not read; tensors among them would be hidden freight."""
    for name in archive.members:
        if name in used or name == layout.GRAPH:
            continue
        if name.startswith(("data/", layout.EXTRA)):
            raise Malformed(f"the record {name[:40]!r} belongs to no tensor")
        archive.check(name)
