"""Which module of the source each node of an ONNX file comes from, told by the names of the nodes.

A node is called ``layer1.0.conv1/Conv``: the dotted path of its module, a slash, its operator, and a number where
there are several. Names outlive what tools do to a file (optimisers, quantisers, splitters); key-value pairs of nodes
and of models mostly do not, and need bytes of their own. Nodes of the network itself are called ``/Add``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from kfe_fx.program import Program

if TYPE_CHECKING:
    from onnxscript import ir

# Between the path of a module and the name of an operation; no name of a module or of a tensor holds one.
SEPARATOR = "/"
# What torch.onnx notes on a node: its modules and its fx node, outermost first, and which rules rewrote it.
_SCOPES_KEY = "pkg.torch.onnx.name_scopes"
_RULES_KEY = "pkg.onnxscript.rewriter.rule_name"
_UNKNOWN = "_empty_nn_module_stack"


def annotate(exported: torch.export.ExportedProgram, program: Program) -> None:
    """Tell each node of a lowered program its module, where ``torch.onnx.export`` looks for it.

    Lowering traces the graph of ``program`` anew and so forgets the modules; it remembers the nodes. An operation
    that lowering added belongs to the module whose tensors it reads, else to that of the first node that reads it.
    """
    paths = {node.name: str(node.meta.get("module") or "") for node in program.graphs["eval"].nodes}
    signature = exported.graph_signature
    tensors = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    found: dict[torch.fx.Node, str | None] = {}
    for node in reversed(exported.graph.nodes):
        if node.op in ("placeholder", "output"):
            continue
        origin = node.meta.get("from_node") or ()
        path = paths.get(origin[-1].name) if origin else None
        if not path:
            read = [owner(tensors[one.name]) for one in node.all_input_nodes if one.name in tensors]
            users = [found[user] for user in node.users if found.get(user) is not None]
            path = next((one for one in read if one), path)
            if path is None and users:
                path = users[0]
        found[node] = path
        node.meta["nn_module_stack"] = {path or "": (path or "", "")}


def scopes_of(model: ir.Model) -> dict[str, str]:
    """Return the module of each node by the node's name, from what the exporter noted."""
    scopes = {}
    for node in model.graph:
        path = noted_module(node.metadata_props, _weight_owner(node))
        if path is not None and node.name:
            scopes[node.name] = path
    return scopes


def noted_module(notes: Mapping[str, str], weight: str | None) -> str | None:
    """Return the module of a node from what torch.onnx noted on it and the module that owns its weight.

    A node into which another module was folded is where its weight is: a convolution that took in the
    normalisation behind it stays the convolution, though the note then is the normalisation's.
    """
    path = noted_scope(notes.get(_SCOPES_KEY, ""))
    return weight or path if path is None or "Fuse" in notes.get(_RULES_KEY, "") else path


def noted_scope(text: str) -> str | None:
    """Read the module from what torch.onnx notes on a node, as in ``['', 'layer1', 'layer1.0', 'conv2d']``."""
    try:
        scopes = ast.literal_eval(text) if text else []
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    if not isinstance(scopes, list) or len(scopes) < 2 or not isinstance(scopes[-2], str):
        return None
    return None if scopes[-2].startswith(_UNKNOWN) else scopes[-2]


def name_nodes(model: ir.Model, scopes: dict[str, str]) -> None:
    """Name every node after its module and operator.

    ``scopes`` tell the modules by the names of nodes; what was written out of one of them since then begins with its
    name. Values and the nodes of bodies keep their names.
    """
    parents = sorted(scopes, key=len, reverse=True)
    used: dict[str, int] = {}
    for node in model.graph:
        name = str(node.name)
        path = scopes.get(name)
        if path is None:
            path = next((scopes[parent] for parent in parents if name.startswith(f"{parent}_")), _weight_owner(node))
        base = f"{path or ''}{SEPARATOR}{node.op_type}"
        count = used[base] = used.get(base, 0) + 1
        node.name = base if count == 1 else f"{base}_{count}"


def owner(tensor: str) -> str:
    """Return the module that holds a tensor: ``layer1.0`` for ``layer1.0.weight``."""
    return tensor.rpartition(".")[0]


def common(names: Iterable[str]) -> str | None:
    """Return the first of the modules that hold tensors of these names, or None where no name has a path."""
    return next((path for path in map(owner, names) if path), None)


def _weight_owner(node: ir.Node) -> str | None:
    return common(str(value.name) for value in node.inputs if value is not None and value.is_initializer())
