"""Give the nodes of the training graph the names of the evaluation nodes that they correspond to.

Passes that edit both graphs find their places by name; what has no counterpart is a train-only (or eval-only) region.
"""

from __future__ import annotations

import difflib
from typing import Any

from torch import fx

from kfe_fx.program import copy_graph, graph_text

TRAIN_ONLY = "train_only_"


def align(evaluation: fx.Graph, training: fx.Graph) -> tuple[fx.Graph, list[str], list[str]]:
    """Return ``training`` with the names of its counterparts, and what is only in evaluation and only in training."""
    first, second = list(evaluation.nodes), list(training.nodes)
    matcher = difflib.SequenceMatcher(None, [_key(n) for n in first], [_key(n) for n in second], autojunk=False)
    names = {node: f"{TRAIN_ONLY}{index}" for index, node in enumerate(second)}
    matched: set[fx.Node] = set()
    for block in matcher.get_matching_blocks():
        for offset in range(block.size):
            ours, theirs = first[block.a + offset], second[block.b + offset]
            names[theirs] = ours.name
            matched |= {ours, theirs}
    only_eval = [node.name for node in first if node not in matched]
    return copy_graph(training, names), only_eval, [names[node] for node in second if node not in matched]


def _key(node: fx.Node) -> tuple[Any, ...]:
    return (node.op, str(node.target), node.meta.get("module", ""), node.meta.get("source", ""))


def same_graph(first: fx.Graph, second: fx.Graph) -> bool:
    """Tell whether two graphs compute the same from the same attributes."""
    return graph_text(first) == graph_text(second)
