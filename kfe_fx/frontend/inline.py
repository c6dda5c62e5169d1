"""Sub-graphs that export makes of ``torch.no_grad()`` and disabled autocast regions become part of the graph."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from kfe_fx.errors import UnsupportedModel


def inline_regions(graph: fx.Graph, owner: torch.nn.Module) -> None:
    """Inline each region node of ``graph`` (sub-graphs are attributes of ``owner``), innermost last.

    A region without gradients gets a ``detach`` on its outputs: no gradient flowed through it, none does now.

    Raises:
        UnsupportedModel: a sub-graph of another kind (``cond``, ``while_loop``, enabled autocast).
    """
    while regions := [node for node in graph.nodes if isinstance(node.target, torch._ops.HigherOrderOperator)]:
        _inline(graph, owner, regions[0])
    for node in [node for node in graph.nodes if node.op == "get_attr" and not node.users]:
        if isinstance(_attribute(owner, node.target), fx.GraphModule):
            graph.erase_node(node)


def _attribute(owner: torch.nn.Module, target: Any) -> Any:
    value: Any = owner
    for part in str(target).split("."):
        value = getattr(value, part, None)
    return value


def _inline(graph: fx.Graph, owner: torch.nn.Module, region: fx.Node) -> None:
    name = str(region.target)
    detach = False
    arguments: tuple[Any, ...]
    if name == "wrap_with_set_grad_enabled":
        detach, body_node, arguments = not region.args[0], region.args[1], region.args[2:]
    elif name == "wrap_with_autocast" and region.args[2] is False:
        body_node, arguments = region.args[4], region.args[5:]
    else:
        where = region.meta.get("source", "")
        raise UnsupportedModel(f"{where}: sub-graphs of {name} are not supported; write the region without it")
    body = _attribute(owner, body_node.target)  # type: ignore[union-attr]
    places = [node for node in body.graph.nodes if node.op == "placeholder"]
    values = dict(zip(places, arguments, strict=True))
    with graph.inserting_before(region):
        outputs = _copy_body(graph, body, values, detach)
    for user in list(region.users):
        if user.target is not operator.getitem:
            raise UnsupportedModel(f"{region.meta.get('source', '')}: the result of {name} is used whole")
        user.replace_all_uses_with(outputs[user.args[1]])  # type: ignore[index]
        graph.erase_node(user)
    graph.erase_node(region)


def _copy_body(graph: fx.Graph, body: fx.GraphModule, values: dict[Any, Any], detach: bool) -> list[Any]:
    for node in body.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            results = node.args[0] if isinstance(node.args[0], tuple | list) else (node.args[0],)
            return [_result(graph, values[item], detach) if isinstance(item, fx.Node) else item for item in results]
        values[node] = graph.node_copy(node, lambda old: values[old])
    return []


def _result(graph: fx.Graph, value: fx.Node, detach: bool) -> fx.Node:
    made = value.meta.get("val")
    if not detach or not isinstance(made, torch.Tensor) or not made.is_floating_point():
        return value
    result = graph.call_function(torch.ops.aten.detach.default, (value,))
    result.meta = dict(value.meta)
    return result
