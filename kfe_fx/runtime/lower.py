"""Lowering: a Program becomes a torch.export.ExportedProgram. No other code re-exports a Program."""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from kfe_fx import taps
from kfe_fx.errors import UnsupportedModel
from kfe_fx.frontend.source import of_error
from kfe_fx.hard_concrete import HARD_CONCRETE
from kfe_fx.program import Program, copy_graph, get_module, get_tensor
from kfe_fx.recurrent.op import RECURRENT
from kfe_fx.runtime.recurrent import lower_recurrent
from kfe_fx.shapes import sized_examples

aten = torch.ops.aten

APART = "_names_of_graph_modules."
_GRAPH_MODULE = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph()))) - frozenset(dir(nn.Module()))

# What tracing and translating an arbitrary graph can raise: torch's own errors are RuntimeErrors; decompositions
# fail an internal assertion or look-up where they meet an odd call.
EXPORT_ERRORS = (RuntimeError, TypeError, ValueError, AssertionError, AttributeError, LookupError)


def to_exported_program(program: Program) -> torch.export.ExportedProgram:
    """Lower the evaluation graph of a Program to an ExportedProgram with flat inputs and flat outputs.

    Inputs are the tensors named by ``program.signature.input_names``, in that order; outputs are the leaves of the
    output structure that are no constants, as a tuple. Every axis of ``program.axes`` stays dynamic. Parameters keep
    their names and are shared, not copied; neither the Program nor its training flag is touched. Taps and writes to
    buffers are left out. Recurrent layers become operations that ``torch.onnx.export`` translates with the table of
    ``kfe_fx.runtime.recurrent_onnx`` and that nothing else computes.

    Raises:
        UnsupportedModel: gates are still in the graph, an axis cannot stay dynamic, or an operation cannot be traced
            again.
    """
    graph = copy_graph(program.graphs["eval"])
    taps.strip(graph)
    refuse_instruments(graph)
    drop_buffer_writes(graph)
    constants = lower_recurrent(graph, program)
    _own_outputs(graph)
    _contiguous_attention(graph)
    _stable_log_sigmoid(graph)
    graph.lint()
    held = _held(graph, program, constants.tensors)
    module = fx.GraphModule(_apart(graph, held), graph)
    _own_leaves(module)
    module.eval()
    inputs = tuple(_tracing_inputs(program))
    dims = tuple(
        dict.fromkeys(program.axes.get(name, {}), torch.export.Dim.DYNAMIC) for name in program.signature.input_names
    )
    try:
        with quiet():
            return torch.export.export(module, inputs, dynamic_shapes=dims, strict=False)
    except EXPORT_ERRORS as error:
        raise UnsupportedModel(_why(error, program)) from error


def refuse_instruments(graph: fx.Graph) -> None:
    """Refuse a graph that still holds gates or another operation of ours.

    Raises:
        UnsupportedModel: a node of namespace ``kfe_fx`` other than a recurrent layer is present; the text names it.
    """
    for node in graph.nodes:
        if node.target is RECURRENT:  # lowered, or refused, where its arguments are read
            continue
        if node.op == "call_function" and getattr(node.target, "namespace", None) == "kfe_fx":
            where = node.meta.get("source") or node.name
            cure = "finalise-gates folds" if node.target is HARD_CONCRETE else "strip"
            raise UnsupportedModel(f"{where}: {node.target} is still in the graph; {cure} the gates before lowering")


def drop_buffer_writes(graph: fx.Graph) -> list[str]:
    """Remove what an evaluation graph writes to its own buffers and return the buffers' names.

    A file for inference has no state between calls; what the call itself computes is read before it is written.
    """
    written = []
    for node in reversed(graph.nodes):
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not schema.is_mutable or node.users:
            continue
        target = node.args[0]
        if isinstance(target, fx.Node) and target.op == "get_attr":
            written.append(str(target.target))
            graph.erase_node(node)
    if written:
        graph.eliminate_dead_code()
    return written[::-1]


def _held(graph: fx.Graph, program: Program, constants: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return what the graph reads by name: tensors and leaf modules of the Program, and constants of its own."""
    held: dict[str, Any] = {}
    for node in graph.nodes:
        name = str(node.target)
        if node.op == "get_attr":
            held[name] = constants[name] if name in constants else get_tensor(program.module(), name)
        elif node.op == "call_module":
            held[name] = get_module(program.module(), name)
    return held


def _apart(graph: fx.Graph, held: dict[str, Any]) -> dict[str, Any]:
    """Hold apart what is called as something that every GraphModule has: "graph", "code", "meta"."""
    taken = {name for name in held if name.partition(".")[0] in _GRAPH_MODULE}
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module") and str(node.target) in taken:
            node.target = f"{APART}{node.target}"
    return {f"{APART}{name}" if name in taken else name: value for name, value in held.items()}


def _own_outputs(graph: fx.Graph) -> None:
    # ONNX has one name per value: an output that is also an input, a weight or another output needs a copy of itself.
    output = next(iter(reversed(graph.nodes)))
    seen: set[fx.Node] = set()

    def own(node: fx.Node) -> fx.Node:
        if node.op not in ("placeholder", "get_attr") and node not in seen:
            seen.add(node)
            return node
        with graph.inserting_before(output):
            return graph.call_function(aten.clone.default, (node,))

    leaves = [own(leaf) for leaf in output.args[0] if isinstance(leaf, fx.Node)]  # type: ignore[union-attr]
    output.args = (tuple(leaves),)


def _contiguous_attention(graph: fx.Graph) -> None:
    # The kernel behind the traced call and the exporter's decomposition give different strides; a view recorded
    # after the first then fails on the second ("Cannot view a tensor with shape ...").
    for node in list(graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)):
        with graph.inserting_after(node):
            made = graph.call_function(aten.clone.default, (node,), {"memory_format": torch.contiguous_format})
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made, delete_user_cb=lambda user, made=made: user is not made)


def _stable_log_sigmoid(graph: fx.Graph) -> None:
    # The exporter writes log(sigmoid(x)), which is -inf below -104 in float32; -softplus(-x) is not.
    for node in list(graph.find_nodes(op="call_function", target=aten.log_sigmoid.default)):
        with graph.inserting_before(node):
            flipped = graph.call_function(aten.neg.default, (node.args[0],))
            soft = graph.call_function(aten.softplus.default, (flipped,))
            made = graph.call_function(aten.neg.default, (soft,))
        node.replace_all_uses_with(made)
        graph.erase_node(node)


def _own_leaves(module: fx.GraphModule) -> None:
    # A leaf module is shared with the Program: give the lowered graph a shallow twin, so that eval() stays here.
    for node in module.graph.find_nodes(op="call_module"):
        path, _, name = str(node.target).rpartition(".")
        owner = module.get_submodule(path)
        owner._modules[name] = _twin(owner.get_submodule(name))


def _twin(module: nn.Module) -> nn.Module:
    twin = copy.copy(module)
    twin._modules = {name: _twin(child) if child is not None else None for name, child in module._modules.items()}
    return twin


def _tracing_inputs(program: Program) -> list[Any]:
    """Return the flat examples with dynamic axes of size 0 or 1 repeated to 2: tracing makes 0 and 1 constants."""
    sizes: dict[str, int] = {}
    for name, value in zip(program.signature.input_names, program.flat_examples(), strict=True):
        for dim, axis in program.axes.get(name, {}).items():
            sizes[axis] = max(2, sizes.get(axis, 0), value.shape[dim])
    return sized_examples(program, sizes)


def _why(error: BaseException, program: Program) -> str:
    text = first_line(error)
    if "Constraints violated" in text or "marked" in text:
        axes = sorted({axis for dims in program.axes.values() for axis in dims.values()})
        return f"an axis of {axes} cannot stay dynamic: {text}; capture with dynamic_axes that leaves it out"
    where = of_error(error)
    return f"{where + ': ' if where else ''}the graph cannot be lowered: {text}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text that says something, shortened to 300 characters."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines()]
    text = next((line for line in lines if line), type(error).__name__)
    return text if len(text) <= 300 else text[:297] + "..."


class _Mute(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.CRITICAL


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings and log lines of torch.export and torch.onnx; errors still raise."""
    mute = _Mute()
    # A filter on a logger does not see the records of its children, one on a handler does.
    loggers = (logging.getLogger(name) for name in ("torch", "torch.onnx", None))
    handlers = [handler for logger in loggers for handler in logger.handlers]
    if logging.lastResort is not None:
        handlers.append(logging.lastResort)
    for handler in handlers:
        handler.addFilter(mute)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(mute)
