"""ONNX files: a Program becomes one checked .onnx file with named dynamic axes."""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.fx

from kfe_fx.errors import BadFile, UnsupportedModel, UsageError
from kfe_fx.labels.states import metadata as state_metadata
from kfe_fx.program import Program, copy_graph
from kfe_fx.runtime.inputs import full_lengths
from kfe_fx.runtime.lower import APART, EXPORT_ERRORS, drop_buffer_writes, first_line, quiet, to_exported_program
from kfe_fx.runtime.modules import annotate, name_nodes, scopes_of
from kfe_fx.runtime.recurrent_onnx import translations
from kfe_fx.runtime.recurrent_scan import expand
from kfe_fx.runtime.shared_weights import share_transposes
from kfe_fx.structure import Constant

# Protobuf ends at 2 GiB; the graph itself, and a copy of a weight that folding makes, need room below that.
ONE_FILE_LIMIT = int(1.8 * 2**30)
# The oldest operator set whose numbers the exporter's own version converter is tested for here; the newest that
# the exporter writes itself.
OPSETS = range(17, 24)
# Under this key a file tells which inputs are lengths of sequences, and which axis is the longest that they can be.
LENGTHS_KEY = "kfe_fx.lengths"


@dataclass(frozen=True)
class TensorInfo:
    """One input or output of an ONNX file: ``shape`` holds sizes and names of dynamic axes."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True)
class ExportReport:
    """What was written: files, operator set, inputs, outputs, bytes of weights, seconds, and what to know."""

    path: str
    files: tuple[str, ...]
    opset: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    weight_bytes: int
    seconds: float
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self)


def export(
    program: Program,
    path: str | os.PathLike[str],
    *,
    opset: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> ExportReport:
    """Write the evaluation graph of ``program`` to ``path`` as ONNX; the public name is ``kfe_fx.export``.

    Inputs carry the names of ``program.signature.input_names``; outputs the keys of a returned dict, else
    ``output``, ``output_1``, ...; dynamic axes the names of ``program.axes``. Batch normalisation after a
    convolution is folded into it. One file up to 1.8 GiB of weights, above that ``path`` and ``path.data``. The file
    is checked, synced and renamed into place: a failed export leaves nothing behind. ``metadata`` is stored as
    the model's own key-value pairs, beside which inputs hold lengths of sequences. Equal programs give equal bytes.

    Raises:
        UnsupportedModel: the graph has no ONNX form; the text names the operation and the source line.
        UsageError: ``opset`` is not one that can be written, or ``program`` is not a Program.
        BadFile: the file cannot be written there.
    """
    started = time.perf_counter()
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir():
        problem = "is a folder" if target.is_dir() else "is in a folder that does not exist"
        raise BadFile(f"{target} {problem}; name a file such as model.onnx in an existing folder")
    onnx_program = translate(program, opset=opset, metadata=metadata)
    weights = weight_bytes(onnx_program)
    notes = list(program.notes)
    written = drop_buffer_writes(copy_graph(program.graphs["eval"]))
    if written:
        notes.append(f"the file keeps no state between calls: writes to {', '.join(sorted(set(written)))} are left out")
    if weights > ONE_FILE_LIMIT:
        notes.append(f"{weights / 2**30:.1f} GiB of weights stand in {target.name}.data beside the graph")
    files = _write(onnx_program, target, external=weights > ONE_FILE_LIMIT)
    model = onnx_program.model
    return ExportReport(
        path=str(target),
        files=tuple(str(file) for file in files),
        opset=model.opset_imports[""],
        inputs=tuple(_info(value) for value in model.graph.inputs),
        outputs=tuple(_info(value) for value in model.graph.outputs),
        weight_bytes=weights,
        seconds=time.perf_counter() - started,
        notes=tuple(notes),
    )


def onnx_bytes(program: Program, *, opset: int | None = None, share: bool = True) -> bytes:
    """Return what ``export`` would write, unchecked and without a file; for measuring.

    Without ``share`` each product holds its own matrix, also of tied weights: where single initializers are replaced or
    quantised.

    Raises:
        UnsupportedModel: the graph has no ONNX form, or the weights exceed what one file can hold.
    """
    onnx_program = translate(program, opset=opset, share=share)
    weights = weight_bytes(onnx_program)
    if weights > ONE_FILE_LIMIT:
        raise UnsupportedModel(
            f"{weights / 2**30:.1f} GiB of weights do not fit in memory as one model; export to a file"
        )
    return onnx_program.model_proto.SerializeToString(deterministic=True)


def translate(
    program: Program, *, opset: int | None = None, metadata: Mapping[str, str] | None = None, share: bool = True
) -> torch.onnx.ONNXProgram:
    """Translate a Program to torch's ONNXProgram, named and stripped of everything that varies from run to run.

    Tied weights are stored once with ``share``, see ``share_transposes``.

    Raises:
        UnsupportedModel: the graph has no ONNX form.
        UsageError: ``opset`` is not one that can be written, or ``program`` is not a Program.
    """
    if not isinstance(program, Program):
        raise UsageError(f"export takes a Program, got {type(program).__name__}; make one with kfe_fx.capture")
    if opset is not None and opset not in OPSETS:
        raise UsageError(f"opset {opset} cannot be written; choose one from {OPSETS[0]} to {OPSETS[-1]}")
    exported = to_exported_program(program)
    annotate(exported, program)
    names = list(program.signature.input_names)
    outputs = [name for _, name in named_outputs(program)]
    try:
        with quiet():
            onnx_program = torch.onnx.export(
                exported,
                input_names=names,
                output_names=outputs,
                opset_version=opset,
                dynamo=True,
                custom_translation_table=translations(),
                verbose=False,
                # Without it ONNX Runtime does not recognise the batch normalisations: 1.6 times slower.
                optimize=True,
            )
    except EXPORT_ERRORS as error:
        raise UnsupportedModel(_why(error, program)) from error
    if onnx_program is None:
        raise UnsupportedModel("the exporter returned nothing for this graph")
    found = [value.name for value in onnx_program.model.graph.inputs]
    if found != names:
        raise UnsupportedModel(f"the exporter changed the inputs from {names} to {found}")
    if opset is not None and onnx_program.model.opset_imports[""] != opset:
        got = onnx_program.model.opset_imports[""]
        raise UnsupportedModel(f"this network needs operator set {got}, {opset} was asked for; leave out the opset")
    scopes = scopes_of(onnx_program.model)
    for name, value in list(onnx_program.model.graph.initializers.items()):
        value.name = name.removeprefix(APART)
    expand(onnx_program.model)
    if share:
        share_transposes(onnx_program.model)
    name_nodes(onnx_program.model, scopes)
    _name_axes(onnx_program, program)
    lengths = full_lengths(program)
    own = {LENGTHS_KEY: json.dumps(lengths, sort_keys=True)} if lengths else {}
    _strip(onnx_program.model, own | {**state_metadata(program), **(metadata or {})})
    return onnx_program


def named_outputs(program: Program) -> list[tuple[int, str]]:
    """Return (flat index, ONNX name) of each output of the evaluation graph; constants such as None have none."""
    output = next(iter(reversed(program.graphs["eval"].nodes)))
    names = output_names(program.signature.outputs["eval"], taken=set(program.signature.input_names))
    return [(index, names[index]) for index, leaf in enumerate(output.args[0]) if isinstance(leaf, torch.fx.Node)]  # type: ignore[arg-type]


def output_names(template: Any, taken: set[str]) -> list[str]:
    """Name the leaves of an output template: keys of dicts joined by dots, else ``output``, ``output_1``, ...

    A name in ``taken`` (the inputs) or met before gets a number.
    """
    names: dict[int, str] = {}
    if isinstance(template, dict):
        for key, part in template.items():
            _dotted(part, names, str(key))
    else:
        leaves: dict[int, str] = {}
        _dotted(template, leaves, "output")
        names = {leaf: "output" if rank == 0 else f"output_{rank}" for rank, leaf in enumerate(sorted(leaves))}
    used = set(taken)
    result = []
    for leaf in sorted(names):
        name, count = names[leaf], 0
        while name in used:
            count += 1
            name = f"{names[leaf]}_{count}"
        used.add(name)
        result.append(name)
    return result


def _dotted(template: Any, names: dict[int, str], prefix: str) -> None:
    if isinstance(template, Constant):
        return
    if isinstance(template, int):
        names[template] = prefix
        return
    parts = template.items() if isinstance(template, dict) else enumerate(template)
    for key, part in parts:
        _dotted(part, names, f"{prefix}.{key}")


def weight_bytes(onnx_program: torch.onnx.ONNXProgram) -> int:
    """Return the bytes that the initializers of a model take."""
    graphs = onnx_program.model.graphs()
    values = (value.const_value for graph in graphs for value in graph.initializers.values())
    return sum(value.nbytes for value in values if value is not None)


def _name_axes(onnx_program: torch.onnx.ONNXProgram, program: Program) -> None:
    renames: dict[str, str] = {}
    for value in onnx_program.model.graph.inputs:
        for dim, axis in program.axes.get(str(value.name), {}).items():
            size = value.shape[dim] if value.shape is not None else None
            symbol = getattr(size, "value", None)
            if not isinstance(symbol, str):
                raise UnsupportedModel(
                    f"axis {axis!r} (dim {dim} of {value.name!r}) became {size} in the file; capture it as fixed"
                )
            if re.fullmatch(r"\w+", symbol):
                renames.setdefault(symbol, axis)
    onnx_program.rename_axes(renames)  # type: ignore[arg-type]


def _strip(model: Any, metadata: dict[str, str]) -> None:
    # The exporter notes stack traces with absolute paths and printed nodes on everything.
    for graph in model.graphs():
        graph.metadata_props.clear()
        graph.doc_string = None
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
    model.graph.name = "main"
    model.producer_name, model.producer_version = "kfe-fx", None
    model.doc_string = None
    model.metadata_props.clear()
    model.metadata_props.update(metadata)


def _write(onnx_program: torch.onnx.ONNXProgram, target: Path, *, external: bool) -> tuple[Path, ...]:
    import onnx

    try:
        # A folder of its own in the target's folder: one rename away, and gone whatever happens.
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            draft = Path(scratch) / target.name
            with quiet():
                onnx_program.save(draft, external_data=external)
            try:
                onnx.checker.check_model(str(draft), full_check=True)
            except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
                raise UnsupportedModel(
                    f"the exporter wrote a file that onnx.checker refuses: {first_line(error)}"
                ) from error
            # The weights first: a graph in place always finds them.
            made = sorted(Path(scratch).iterdir(), key=lambda file: file.name == target.name)
            for file in made:
                _sync(file)
            for file in made:
                os.replace(file, target.parent / file.name)
        _sync(target.parent)
    except OSError as error:
        raise BadFile(f"cannot write {target}: {error.strerror or error}; choose another place") from error
    return tuple(target.parent / file.name for file in reversed(made))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _info(value: Any) -> TensorInfo:
    shape = tuple(getattr(size, "value", size) for size in value.shape or ())
    return TensorInfo(str(value.name), value.dtype.name.lower() if value.dtype is not None else "unknown", shape)


def _why(error: BaseException, program: Program) -> str:
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for link in chain:
        missing = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", str(link))
        if missing:
            # the operation may be a part of the one in the graph: prims.bessel_j0 of aten.special_bessel_j0
            part = missing.group(1).rpartition(".")[2]
            node = next((node for node in program.graphs["eval"].nodes if part in str(node.target)), None)
            where = node.meta.get("source") if node is not None else None
            name = node.target if node is not None else missing.group(1)
            return f"{f'{where}: ' if where else ''}{name} has no ONNX form; replace it in the network"
    return f"the ONNX exporter failed: {first_line(chain[-1])}"
