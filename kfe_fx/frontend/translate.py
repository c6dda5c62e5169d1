"""An ExportedProgram's graph becomes ours: parameters by ``get_attr``, regions inlined, operations pure."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.fx.node import map_arg

from kfe_fx.errors import UnsupportedModel
from kfe_fx.frontend import source
from kfe_fx.frontend.inline import inline_regions
from kfe_fx.frontend.purify import purify
from kfe_fx.frontend.recurrent import simplify_states
from kfe_fx.frontend.recurrent_kernels import open_kernels
from kfe_fx.recurrent.op import from_opaque

aten = torch.ops.aten
_CHECKS = (
    "_assert_scalar",
    "_assert_tensor_metadata",
    "_assert_async",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
)


def translate(
    exported: ExportedProgram, names: Sequence[str], constants: dict[str, torch.Tensor], mode: str
) -> fx.Graph:
    """Return the graph of ``exported`` with flat inputs ``names`` and pure operations.

    Constants that the trace lifted are added to ``constants`` under a name that is theirs in both modes.
    """
    graph = _unlift(exported, names, constants, mode)
    for node in graph.nodes:
        node.meta = _described(node)
    inline_regions(graph, exported.graph_module)
    for node in graph.nodes:
        if "source" not in node.meta:
            node.meta = _described(node)
    _drop_checks(graph)
    _plain_copies(graph)
    purify(graph)
    from_opaque(graph)
    open_kernels(graph)
    simplify_states(graph)
    _drop_noise(graph, constants)
    graph.eliminate_dead_code()
    for node in graph.nodes:
        node.meta = {key: node.meta[key] for key in ("source", "module") if node.meta.get(key)}
    graph.lint()
    return graph


def _described(node: fx.Node) -> dict[str, Any]:
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    path = "" if path.startswith("_empty_nn_module") else path  # torch's word for "none"
    where = source.of_stack_trace(node.meta.get("stack_trace"))
    return {"val": node.meta.get("val"), "source": where, "module": path}


def _unlift(exported: ExportedProgram, names: Sequence[str], constants: dict[str, torch.Tensor], mode: str) -> fx.Graph:
    signature = exported.graph_signature
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted = signature.inputs_to_lifted_tensor_constants
    tensors = iter(names)
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    # inputs first: they take their names before a parameter of the same name does
    for node in exported.graph.find_nodes(op="placeholder"):
        known = node.name in held or node.name in lifted
        if not known and isinstance(node.meta.get("val"), torch.Tensor):  # else a Python constant, fixed in the graph
            values[node] = graph.placeholder(next(tensors))
            values[node].meta = dict(node.meta)
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            if node.name in held:
                values[node] = graph.get_attr(held[node.name])
            elif node.name in lifted:
                values[node] = graph.get_attr(_constant(exported, lifted[node.name], constants, mode))
            else:
                continue
            values[node].meta = dict(node.meta)
        elif node.op == "output":
            graph.output(map_arg(node.args[0], lambda old: values[old]))
        else:
            values[node] = graph.node_copy(node, lambda old: values[old])
    return graph


def _constant(exported: ExportedProgram, name: str, constants: dict[str, torch.Tensor], mode: str) -> str:
    value = exported.constants[name]
    if not isinstance(value, torch.Tensor):
        raise UnsupportedModel(f"the constant {name!r} is a {type(value).__name__}, not a tensor")
    known = constants.get(name)
    if known is not None and not (known.dtype == value.dtype and torch.equal(known, value)):
        name = f"{name}_{mode}"
    constants[name] = value
    return name


def _drop_checks(graph: fx.Graph) -> None:
    for node in reversed(graph.nodes):
        if (
            node.op == "call_function"
            and str(node.target).removeprefix("aten.").split(".")[0] in _CHECKS
            and not node.users
        ):
            graph.erase_node(node)


def _plain_copies(graph: fx.Graph) -> None:
    # a literal tensor is a fresh copy at each call, so that writing into it never writes into the constant
    for node in graph.nodes:
        if node.target is aten.lift_fresh_copy.default:
            node.target = aten.clone.default
            node.meta["val"] = node.meta["val"].clone()
        elif node.target is aten.detach_.default:
            node.target = aten.detach.default


def _drop_noise(graph: fx.Graph, constants: Container[str]) -> None:
    for node in list(graph.nodes):
        argument = node.args[0] if node.args else None
        if not isinstance(argument, fx.Node) or node.op != "call_function":
            continue
        of_constant = argument.op == "get_attr" and str(argument.target) in constants
        if node.target in (aten.clone.default, aten.detach.default) and of_constant:
            node.replace_all_uses_with(argument)
            graph.erase_node(node)


def input_shapes(exported: ExportedProgram) -> list[torch.Size]:
    """Return the (symbolic) shapes of the tensor inputs in flat order."""
    users = [
        n for n in exported.graph.nodes if n.op == "placeholder" and n.name in exported.graph_signature.user_inputs
    ]
    return [n.meta["val"].shape for n in users if isinstance(n.meta.get("val"), torch.Tensor)]


def axis_names(
    exported: ExportedProgram, names: Sequence[str], axes: dict[str, dict[int, str | None]]
) -> dict[str, dict[int, str]]:
    """Name the dynamic axes: as the user did, else "batch" for dim 0 and "input_dim"; one name per size symbol."""
    by_symbol: dict[str, str] = {}
    taken: set[str] = {axis for dims in axes.values() for axis in dims.values() if axis}
    result: dict[str, dict[int, str]] = {}
    for name, shape in zip(names, input_shapes(exported), strict=True):
        for dim, wanted in axes.get(name, {}).items():
            symbol = str(shape[dim])
            if symbol not in by_symbol:
                by_symbol[symbol] = wanted or _free("batch" if dim == 0 else f"{name}_{dim}", taken)
                taken.add(by_symbol[symbol])
            result.setdefault(name, {})[dim] = by_symbol[symbol]
    return result


def _free(name: str, taken: set[str]) -> str:
    candidate, count = name, 1
    while candidate in taken:
        candidate, count = f"{name}_{count}", count + 1
    return candidate
