"""Capture: an nn.Module becomes a Program through torch.export, in evaluation and in training mode."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram

from kfe_fx.errors import UnsupportedModel, UsageError
from kfe_fx.frontend import source
from kfe_fx.frontend.align import align, same_graph
from kfe_fx.frontend.inputs import Call, read_axes, read_call, repeated
from kfe_fx.frontend.recurrent import (
    TRIMS,
    axes_of_sequences,
    candidates,
    has_recurrent_layers,
    loops_of_cells,
    opaque_layers,
)
from kfe_fx.frontend.translate import axis_names, input_shapes, translate
from kfe_fx.program import Program, ProgramModule, Signature, put_tensor
from kfe_fx.shapes import propagate
from kfe_fx.structure import Constant, pack, template_of


def capture(module: nn.Module, example_inputs: Any, dynamic_axes: Any = None) -> Program:
    """Capture ``module`` as a Program that owns copies of its tensors; ``module`` is left as it was.

    ``example_inputs``: a tensor, a tuple of arguments, a dict of keywords, or ``(args, kwargs)``.
    ``dynamic_axes``: ``{input: {dim: axis name}}``; None makes dim 0 of every tensor input dynamic ("batch"), and of a
    network with recurrent layers the dims that these count sequences ("batch") and steps ("time") by. A network that
    pins an axis falls back to the example's size there and says so in ``Program.notes``.

    Raises:
        UnsupportedModel: the network cannot be captured (data-dependent control flow, ...), with the source line.
        UsageError: inputs that the network does not take.
    """
    if isinstance(module, Program):
        return module
    if not isinstance(module, nn.Module):
        raise UsageError(f"capture takes an nn.Module, got {type(module).__name__}")
    call = read_call(module, example_inputs)
    requested = read_axes(call, dynamic_axes)
    counts = dynamic_axes is None and has_recurrent_layers(module)
    bold = _sequence_axes(module, call, requested) if counts else requested
    if bold != requested:
        program = _capture(module, call, bold, explicit=False)
        if program.axes and _runs_at_other_sizes(program):
            return program
    program = _capture(module, call, requested, explicit=dynamic_axes is not None)
    if program.axes and not _runs_at_other_sizes(program):
        if dynamic_axes is not None:
            raise UnsupportedModel(f"the network works at one size of {sorted(program.axes)} only; leave them static")
        program = _capture(module, call, {}, explicit=False)
        program.notes = (*program.notes, "the network pins its batch size: captured at the example's shapes")
    return program


def _capture(module: nn.Module, call: Call, requested: dict[str, dict[int, str | None]], *, explicit: bool) -> Program:
    notes: list[str] = []
    with _modes_restored(module), _quiet():
        training = _training_flags(module)
        with opaque_layers() as said:
            module.eval()
            exported, axes = _export_dynamic(module, call, requested, notes, explicit=explicit)
            _set_flags(module, training)
            trained = _export_training(module, call, axes, notes)
        module.eval()
        program = _build(module, call, exported, trained, axes, [*notes, *said])
        _check_same(module, program)
    return program


def _sequence_axes(
    module: nn.Module, call: Call, default: dict[str, dict[int, str | None]]
) -> dict[str, dict[int, str | None]]:
    """Find the dims that recurrent layers count sequences and steps by: trace with every dim dynamic and look."""
    with _modes_restored(module), _quiet(), opaque_layers():
        module.eval()
        for chosen in candidates([leaf.shape for leaf in call.leaves]):
            bold: dict[str, dict[int, str | None]] = {
                name: {dim: None for dim in range(leaf.dim()) if chosen(place, dim)}
                for place, (name, leaf) in enumerate(zip(call.names, call.leaves, strict=True))
            }
            try:
                exported = _export(module, call, bold)
            except UnsupportedModel:
                continue
            found = axes_of_sequences(exported, call.names, input_shapes(exported))
            # an input that no recurrent layer counts anything by keeps the usual dim 0
            return {name: dict(found.get(name) or dims) for name, dims in default.items()}
    return default


def _runs_at_other_sizes(program: Program) -> bool:
    """Tell whether the graph takes one more along each dynamic axis, or twice as much.

    Export can record an equation on an axis that has one solution and still call the axis dynamic.
    """
    sizes: dict[str, int] = {}
    for name, value in zip(program.signature.input_names, program.flat_examples(), strict=True):
        for dim, axis in program.axes.get(name, {}).items():
            sizes[axis] = max(sizes.get(axis, 2), value.shape[dim])
    for other in ({axis: size + 1 for axis, size in sizes.items()}, {axis: 2 * size for axis, size in sizes.items()}):
        try:
            with _quiet():
                propagate(program, sizes=other)
        except (RuntimeError, ValueError, IndexError, TypeError):
            continue
        return True
    return False


def _check_same(module: nn.Module, program: Program) -> None:
    """Run the source and the Program on the examples; a difference means that the trace missed something.

    Raises:
        UnsupportedModel: they differ.
    """
    args, kwargs = program.example_inputs
    with _buffers_restored(module), _buffers_restored(program.module()), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with torch.no_grad():
            expected = module(*args, **kwargs)
        torch.manual_seed(0)
        with torch.no_grad():
            found = program(*args, **kwargs)
    is_tensor = lambda item: isinstance(item, torch.Tensor)
    for theirs, ours in zip(template_of(expected, is_tensor)[1], template_of(found, is_tensor)[1], strict=False):
        if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=1e-3, atol=1e-5, equal_nan=True):
            usual = "its forward depends on state or randomness outside the graph"
            raise UnsupportedModel(
                f"{type(module).__name__}: the captured graph gives other outputs than the module on the example "
                f"inputs: {TRIMS if TRIMS in program.notes else usual}"
            )


def _build(
    module: nn.Module,
    call: Call,
    exported: ExportedProgram,
    trained: ExportedProgram | None,
    axes: dict[str, dict[int, str | None]],
    notes: list[str],
) -> Program:
    constants: dict[str, torch.Tensor] = {}
    outputs: dict[str, Any] = {}
    graphs = {"eval": translate(exported, call.names, constants, "eval")}
    outputs["eval"] = _output_template(exported)
    graph = _translate_training(trained, call, constants, notes)
    if graph is not None and trained is not None:
        graph, only_eval, only_train = align(graphs["eval"], graph)
        if not same_graph(graphs["eval"], graph):
            graphs["train"] = graph
            outputs["train"] = _output_template(trained)
        for where, names, region in (("training", only_train, graph), ("evaluation", only_eval, graphs["eval"])):
            told = [n for n in region.nodes if n.name in set(names) and not _only_counts(n)]
            lines = source.users({n.meta.get("source", "") for n in told})
            if lines and "train" in graphs:
                notes.append(f"runs only in {where}: {', '.join(lines[:8])}")
    notes += loops_of_cells(graphs["eval"])
    signature = Signature(call.names, call.arg_names, len(call.args), call.template, outputs)
    holder = ProgramModule(graphs, signature)
    _adopt_tensors(holder, module, constants)
    holder.eval()
    examples = pack(call.template, [leaf.detach().clone() for leaf in call.leaves])
    named = axis_names(exported, call.names, axes)
    return Program(holder, examples, named, (), tuple(notes))


def _only_counts(node: fx.Node) -> bool:
    # num_batches_tracked of every norm moves in training; nobody needs to be told
    writes = torch.ops.aten.copy_.default
    return node.target is writes or (bool(node.users) and all(user.target is writes for user in node.users))


def _translate_training(
    trained: ExportedProgram | None, call: Call, constants: dict[str, torch.Tensor], notes: list[str]
) -> fx.Graph | None:
    if trained is None:
        return None
    try:
        return translate(trained, call.names, constants, "train")
    except UnsupportedModel as refusal:
        notes.append(f"training mode not captured: {refusal}")
        return None


def _adopt_tensors(holder: ProgramModule, module: nn.Module, constants: dict[str, torch.Tensor]) -> None:
    copies: dict[int, torch.Tensor] = {}

    def twin(value: torch.Tensor) -> torch.Tensor:
        if id(value) not in copies:
            fresh = value.detach().clone()
            is_parameter = isinstance(value, nn.Parameter)
            copies[id(value)] = nn.Parameter(fresh, value.requires_grad) if is_parameter else fresh
        return copies[id(value)]

    for name, parameter in module.named_parameters(remove_duplicate=False):
        put_tensor(holder, name, twin(parameter))
    for name, buffer in module.named_buffers(remove_duplicate=False):
        path, _, leaf = name.rpartition(".")
        persistent = leaf not in module.get_submodule(path)._non_persistent_buffers_set
        put_tensor(holder, name, twin(buffer), persistent=persistent)
    for name, constant in constants.items():
        put_tensor(holder, name, twin(constant), persistent=False)


def _output_template(exported: ExportedProgram) -> Any:
    spec = exported.call_spec.out_spec
    count = spec.num_leaves  # type: ignore[union-attr]
    nested = torch.utils._pytree.tree_unflatten([_Slot(i) for i in range(count)], spec)  # type: ignore[arg-type]
    template, slots = template_of(nested, lambda item: isinstance(item, _Slot))
    return pack(template, [slot.index for slot in slots])


class _Slot:
    def __init__(self, index: int) -> None:
        self.index = index


def _export_dynamic(
    module: nn.Module, call: Call, requested: dict[str, dict[int, str | None]], notes: list[str], *, explicit: bool
) -> tuple[ExportedProgram, dict[str, dict[int, str | None]]]:
    try:
        exported = _export(module, call, requested)
    except UnsupportedModel as refusal:
        if explicit or not any(requested.values()):
            raise
        try:
            exported = _export(module, call, {})
        except UnsupportedModel:
            raise refusal from None
        notes.append("the network pins its batch size: captured at the example's shapes")
        return exported, {}
    shapes = dict(zip(call.names, input_shapes(exported), strict=True))
    pinned = {name: [dim for dim in dims if isinstance(shapes[name][dim], int)] for name, dims in requested.items()}
    if not any(pinned.values()):
        return exported, requested
    if explicit:
        name = next(name for name, dims in pinned.items() if dims)
        raise UnsupportedModel(
            f"dim {pinned[name][0]} of the input {name!r} cannot be dynamic: the network pins its size"
        )
    kept = {name: {d: axis for d, axis in dims.items() if d not in pinned[name]} for name, dims in requested.items()}
    for name, dims in pinned.items():
        for dim in dims:
            notes.append(f"the network pins dim {dim} of the input {name!r}: captured at the example's size")
    return _export(module, call, kept), kept


def _export(module: nn.Module, call: Call, axes: dict[str, dict[int, str | None]]) -> ExportedProgram:
    args, kwargs = pack(call.template, repeated(call, axes))
    try:
        exported = torch.export.export(module, args, kwargs, dynamic_shapes=_dynamic_shapes(call, axes), strict=False)
    except Exception as error:  # whatever the user's forward or the tracer raises: all of it means "cannot be captured"
        raise _refusal(module, error) from error
    return exported


def _dynamic_shapes(call: Call, axes: dict[str, dict[int, str | None]]) -> Any:
    # AUTO, not a named Dim: what the network pins becomes static instead of an error, and is reported as a note
    def spec(part: Any) -> Any:
        if isinstance(part, Constant):
            return None
        if isinstance(part, int):
            return dict.fromkeys(axes.get(call.names[part], {}), Dim.AUTO) or None
        if isinstance(part, dict):
            return {key: spec(inner) for key, inner in part.items()}
        return type(part)(spec(inner) for inner in part)

    positional, keywords = spec(call.template)
    names = list(call.arg_names[: len(positional)])
    if call.variadic is not None:  # torch wants what *args took as one entry
        start, name = call.variadic
        positional = (*positional[:start], positional[start:])
        names = [*names[:start], name]
    if not keywords:
        return positional
    return dict(zip(names, positional, strict=True)) | keywords


def _refusal(module: nn.Module, error: Exception) -> UnsupportedModel:
    where = source.of_error(error)
    text = str(error)
    kind = type(error).__name__
    data_dependent = "data-dependent" in text or "DataDependent" in kind or "GuardOnDataDependent" in kind
    if data_dependent or "dynamic control flow" in text or "boolean value of Tensor" in text:
        reason = "control flow depends on the values of a tensor; use torch.where, or fix the branch before capture"
    else:
        first = next((line.strip() for line in text.splitlines() if line.strip()), kind)
        reason = f"{kind}: {first[:240]}"
    return UnsupportedModel(f"{where or type(module).__name__}: this network cannot be captured: {reason}")


@contextmanager
def _buffers_restored(module: nn.Module) -> Iterator[None]:
    # a forward in evaluation may write buffers too (caches, counters), and looking must not change anything
    held = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in held:
            buffer.copy_(value)


def _training_flags(module: nn.Module) -> dict[str, bool]:
    if module.training:  # norms that the user froze (``norm.eval()``) stay frozen
        return {name: child.training for name, child in module.named_modules()}
    module.train()
    return {name: child.training for name, child in module.named_modules()}


def _set_flags(module: nn.Module, flags: dict[str, bool]) -> None:
    for name, child in module.named_modules():
        child.training = flags[name]


@contextmanager
def _modes_restored(module: nn.Module) -> Iterator[None]:
    flags = {name: child.training for name, child in module.named_modules()}
    try:
        yield
    finally:
        _set_flags(module, flags)


def _export_training(module: nn.Module, call: Call, axes: dict[str, Any], notes: list[str]) -> ExportedProgram | None:
    averaging = [
        name
        for name, child in module.named_modules()
        if child.training and getattr(child, "track_running_stats", False) and getattr(child, "momentum", 0.1) is None
    ]
    if averaging:
        notes.append(
            f"training mode not captured: {averaging[0]} has momentum=None (cumulative average); give it a momentum"
        )
        return None
    try:
        return _export(module, call, axes)
    except UnsupportedModel as refusal:
        notes.append(f"training mode not captured: {refusal}")
        return None


@contextmanager
def _quiet() -> Iterator[None]:
    # export reports guards and specialisations through logging and warnings; what matters reaches the user as notes
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        # a failed trace prints its partial graph to stderr; the one line that we raise says more
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
