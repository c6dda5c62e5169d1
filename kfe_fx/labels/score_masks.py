"""Masks of attention: what is added to scores, or chooses among them, and is made of inputs and constants alone."""

from __future__ import annotations

import torch
from torch import fx, nn

from kfe_fx.labels.pointwise import is_pointwise
from kfe_fx.labels.registry import overloads
from kfe_fx.program import Program, argument

aten = torch.ops.aten

_SOFTMAX = {*overloads(aten, "softmax.int", "_softmax.default", "_safe_softmax.default")}
_MOVES = {
    *overloads(aten, "view.default", "reshape.default", "_unsafe_view.default", "expand.default", "unsqueeze.default"),
    *overloads(aten, "transpose.int", "permute.default", "contiguous.default", "clone.default", "slice.Tensor"),
    *overloads(aten, "squeeze.default", "squeeze.dim", "squeeze.dims", "flatten.using_ints", "unflatten.int"),
    *overloads(aten, "repeat.default", "repeat_interleave.self_int", "to.dtype", "_to_copy.default"),
}


def is_score_mask(program: Program, node: fx.Node) -> bool:
    """Tell whether a node is of no parameter and reaches the output only through the scores of attention."""
    return not _learned(program, node) and _only_scores(node)


def _learned(program: Program, node: fx.Node) -> bool:
    frontier, seen = [node], {node}
    while frontier:
        one = frontier.pop()
        if one.op == "get_attr" and isinstance(program.tensor(str(one.target)), nn.Parameter):
            return True
        new = [arg for arg in one.all_input_nodes if arg not in seen]
        seen |= set(new)
        frontier += new
    return False


def _only_scores(node: fx.Node) -> bool:
    """Follow what is made of a node up to the softmax on each way; sizes that are taken of it are no way."""
    frontier, seen, scores = [node], {node}, False
    while frontier:
        one = frontier.pop()
        for user in one.users:
            if user.target is aten.sym_size.int or user in seen:
                continue
            if _takes_scores(user, one):
                scores = True
            elif user.target in _MOVES or is_pointwise(user.target) or _adds(user, one):
                seen.add(user)
                frontier.append(user)
            else:
                return False
    return scores


def _takes_scores(user: fx.Node, node: fx.Node) -> bool:
    if user.target is aten.scaled_dot_product_attention.default:
        return argument(user, 3, "attn_mask") is node and node not in user.args[:3]
    return user.target in _SOFTMAX


def _adds(user: fx.Node, node: fx.Node) -> bool:
    return user.target is aten.baddbmm.default and user.args[0] is node and node not in user.args[1:]
