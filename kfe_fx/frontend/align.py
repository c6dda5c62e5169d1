"""Give the nodes of the training graph the names of the evaluation nodes that they correspond to.

Passes that edit both graphs find their places by name; what has no counterpart is a train-only (or eval-only) region.
"""

from __future__ import annotations

import difflib
from typing import Any

from torch import fx

TRAIN_ONLY = "train_only_"


def align(evaluation: fx.Graph, training: fx.Graph) -> tuple[list[str], list[str]]:
    """Rename the nodes of ``training`` after their counterparts; return the names only in eval and only in training."""
    first, second = list(evaluation.nodes), list(training.nodes)
    matcher = difflib.SequenceMatcher(None, [_key(n) for n in first], [_key(n) for n in second], autojunk=False)
    for index, node in enumerate(second):
        node._rename(f"{TRAIN_ONLY}{index}")
    # a namespace never forgets a name; without this a counterpart would come out as "relu_1" beside "relu"
    training._graph_namespace._used_names.intersection_update({node.name for node in second})
    training._graph_namespace._base_count.clear()
    matched: set[fx.Node] = set()
    for block in matcher.get_matching_blocks():
        for offset in range(block.size):
            ours, theirs = first[block.a + offset], second[block.b + offset]
            theirs._rename(ours.name)
            matched |= {ours, theirs}
    return [n.name for n in first if n not in matched], [n.name for n in second if n not in matched]


def _key(node: fx.Node) -> tuple[Any, ...]:
    return (node.op, str(node.target), node.meta.get("module", ""), node.meta.get("source", ""))


def same_graph(first: fx.Graph, second: fx.Graph) -> bool:
    """Tell whether two graphs compute the same from the same attributes."""
    from kfe_fx.program import graph_text

    return graph_text(first) == graph_text(second)
