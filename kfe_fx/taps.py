"""Taps: nodes that see what goes into an operation with weights, and the gradient of what comes out.

A tap is the identity: ``tap(value, inputs, site)`` returns ``value``. It stands in the graph, in both modes and in the
program file. Code is generated without it unless an observer is attached to the module; with one, the observer is
called in its place, so that forward, gradients and ``requires_grad`` are those of the network without taps, bit for
bit, and nothing is paid where nothing is observed.

Who collects statistics of recurrent layers opens them for taps (``kfe_fx.recurrent.opened``) in copies of the graphs;
where taps are taken out they are closed. What runs unobserved is the layer's own kernel; opened, it has the same values
and gradients up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from kfe_fx.recurrent.opened import close_layers, is_opened

# called as observer(value, inputs, site); returns the value that the rest of the network sees
Observer = Callable[[Tensor, list[Tensor], str], Tensor]

_LIBRARY = torch.library.Library("kfe_fx", "FRAGMENT")
_LIBRARY.define("tap(Tensor(a) value, Tensor[] inputs, str site) -> Tensor(a)")


def tap(value: Tensor, inputs: list[Tensor], site: str) -> Tensor:
    """Return ``value``: what a tap is to anyone who looks at the network without observing it."""
    return value


_LIBRARY.impl("tap", tap, "CompositeImplicitAutograd")
TAP = torch.ops.kfe_fx.tap.default


def insert(graph: fx.Graph, sites: Iterable[tuple[str, list[str]]]) -> int:
    """Tap the outputs of named nodes, in place; return how many taps were set.

    Args:
        graph: one graph of a Program.
        sites: names of a node and of the nodes whose values its tap keeps; the first is also the name of the site.
    """
    nodes = {node.name: node for node in graph.nodes}
    count = 0
    for site, inputs in sites:
        node = nodes[site]
        with graph.inserting_after(node):
            made = graph.call_function(TAP, (node, [nodes[name] for name in inputs], site), name=f"tap_{site}")
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made, delete_user_cb=lambda user, made=made: user is not made)
        count += 1
    graph.lint()
    return count


def strip(graph: fx.Graph) -> int:
    """Take every tap out of a graph and close its recurrent layers, in place; return how many taps there were.

    The nodes that stay are as before.
    """
    found = list(graph.find_nodes(op="call_function", target=TAP))
    for node in found:
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        graph.erase_node(node)
    close_layers(graph)
    return len(found)


def tapped(graph: fx.Graph) -> bool:
    """Tell whether a graph has taps, or recurrent layers that were opened for them."""
    return bool(graph.find_nodes(op="call_function", target=TAP)) or is_opened(graph)


def untapped(node: fx.Node) -> fx.Node:
    """Return the node whose value a tap passes on, or the node itself."""
    while node.target is TAP:
        node = node.args[0]  # type: ignore[assignment]
    return node


def users_of(node: fx.Node) -> list[fx.Node]:
    """List what reads the value of a node, as if there were no taps."""
    found: dict[fx.Node, None] = {}
    for user in node.users:
        if user.target is not TAP:
            found[user] = None
        elif user.args[0] is node:  # the other taps only keep it
            found |= dict.fromkeys(users_of(user))
    return list(found)


def observe(graph: fx.Graph, observer: Observer) -> None:
    """Let every tap of a graph call ``observer``, in place: only for a graph that code is generated from."""

    def observed(value: Tensor, inputs: list[Any], site: str) -> Tensor:
        return observer(value, inputs, site)

    for node in graph.find_nodes(op="call_function", target=TAP):
        node.target = observed
