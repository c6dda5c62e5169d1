"""Contractions: linear, matmul, einsum, attention, embedding. A contracted dim merges on both sides and vanishes.

Everything is written as an einsum over letters, so that one rule serves every spelling.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from kfe_fx.labels.registry import overloads, relocator, rule
from kfe_fx.labels.relocate import Relocation
from kfe_fx.labels.tracker import Dims, Layers, Tracker
from kfe_fx.program import argument

aten = torch.ops.aten


def contract(tracker: Tracker, node: fx.Node, operands: list[tuple[Any, str]], out: str) -> Dims:
    """Carry labels through ``einsum(operands -> out)``; letters of size 1 broadcast.

    A letter that is summed away merges its labels over the operands: a removed unit is zero there, so its terms are
    missing from the sum. Between two parameters nothing is zero, so what they contract is frozen.
    """
    letters: dict[str, Layers] = {}
    carriers: dict[str, bool] = {}
    for operand, names in operands:
        dims, shape = tracker.dims(operand), tracker.shape(operand)
        for letter, layers, size in zip(names, dims, shape, strict=True):
            if size == 1:
                continue
            letters[letter] = tracker.unify(letters[letter], layers, node) if letter in letters else layers
            carriers[letter] = carriers.get(letter, False) or operand not in tracker.static
    for letter, layers in letters.items():
        if letter not in out and not carriers[letter]:
            tracker.freeze(layers, node, "is summed between two parameters")
    # what only parameters bring to the output is minted here, even where an input carries the same units elsewhere
    tracker.minted[node] = {place for place, letter in enumerate(out) if letter in carriers and not carriers[letter]}
    return tuple(letters.get(letter, ()) for letter in out)


def _leading(rank: int, offset: int = 0) -> str:
    return "".join(chr(ord("A") + index + offset) for index in range(rank))


@rule(aten.linear.default)
def linear(tracker: Tracker, node: fx.Node) -> Dims:
    """Trace ``y[..., o] = sum_i x[..., i] w[o, i] + b[o]``."""
    inputs, weight = node.args[:2]
    batch = _leading(len(tracker.shape(inputs)) - 1)
    if len(tracker.shape(weight)) == 1:
        return contract(tracker, node, [(inputs, batch + "i"), (weight, "i")], batch)
    dims = contract(tracker, node, [(inputs, batch + "i"), (weight, "oi")], batch + "o")
    return _with_bias(tracker, node, dims, argument(node, 2, "bias"))


def _with_bias(tracker: Tracker, node: fx.Node, dims: Dims, bias: Any) -> Dims:
    if bias is None:
        return dims
    return (
        *dims[:-1],
        tracker.unify(dims[-1], tracker.dims(bias)[-1], node) if tracker.shape(bias)[-1] > 1 else dims[-1],
    )


@rule(aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default)
def matmul(tracker: Tracker, node: fx.Node) -> Dims:
    """Trace a matrix product with broadcast batch dims."""
    return _product(tracker, node, node.args[0], node.args[1])


def _product(tracker: Tracker, node: fx.Node, first: Any, second: Any) -> Dims:
    ranks = len(tracker.shape(first)), len(tracker.shape(second))
    batch = _leading(max(*ranks, 2) - 2)
    one = batch[len(batch) - max(ranks[0] - 2, 0) :] + ("ik" if ranks[0] > 1 else "k")
    other = batch[len(batch) - max(ranks[1] - 2, 0) :] + ("kj" if ranks[1] > 1 else "k")
    out = batch + ("i" if ranks[0] > 1 else "") + ("j" if ranks[1] > 1 else "")
    return contract(tracker, node, [(first, one), (second, other)], out)


@rule(aten.addmm.default, aten.baddbmm.default)
def addmm(tracker: Tracker, node: fx.Node) -> Dims:
    """Trace ``beta * b + alpha * x @ w``; the added matrix broadcasts."""
    dims = _product(tracker, node, node.args[1], node.args[2])
    added, shape = tracker.dims(node.args[0]), tracker.shape(node.args[0])
    shift = len(dims) - len(added)
    joined = list(dims)
    for index, (layers, size) in enumerate(zip(added, shape, strict=True)):
        if size > 1:
            joined[index + shift] = tracker.unify(joined[index + shift], layers, node)
    return tuple(joined)


@rule(aten.einsum.default)
def einsum(tracker: Tracker, node: fx.Node) -> Dims | None:
    """Trace an einsum; repeated letters inside one operand are not known."""
    operands = list(node.args[1])  # type: ignore[arg-type]
    spelled = einsum_terms(str(node.args[0]), [len(tracker.shape(operand)) for operand in operands])
    if spelled is None:
        return None
    terms, out = spelled
    return contract(tracker, node, list(zip(operands, terms, strict=True)), out)


def einsum_terms(equation: str, ranks: list[int]) -> tuple[list[str], str] | None:
    """Spell an einsum's operands and output with one letter a dim; None where an operand repeats a letter."""
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    letters = [term.replace("...", "") for term in terms]
    if any(len(set(term)) != len(term) for term in letters):
        return None
    if not arrow:
        counts = "".join(letters)
        out = "..." * ("..." in inputs) + "".join(sorted(x for x in set(counts) if counts.count(x) == 1))
    extra = [rank - len(term) for rank, term in zip(ranks, letters, strict=True)]
    most = max((count for count, term in zip(extra, terms, strict=True) if "..." in term), default=0)
    dots = "".join(chr(0x3B1 + index) for index in range(most))  # Greek: never a letter of the user's
    spelled = [term.replace("...", dots[most - count :]) for term, count in zip(terms, extra, strict=True)]
    return spelled, out.replace("...", dots)


@rule(aten.bilinear.default)
def bilinear(tracker: Tracker, node: fx.Node) -> Dims:
    """Trace ``y[..., o] = x1[..., i] w[o, i, j] x2[..., j] + b[o]``."""
    first, second, weight = node.args[:3]
    batch = _leading(len(tracker.shape(first)) - 1)
    dims = contract(tracker, node, [(first, batch + "i"), (weight, "oij"), (second, batch + "j")], batch + "o")
    return _with_bias(tracker, node, dims, argument(node, 3, "bias"))


@rule(aten.embedding.default)
def embedding(tracker: Tracker, node: fx.Node) -> Dims:
    """Trace a table look-up: rows are picked by value and stay, columns are units."""
    weight, index = node.args[:2]
    rows, columns = tracker.dims(weight)
    tracker.freeze(rows, node, "is indexed by the input (a vocabulary)")
    return (*tracker.dims(index), columns)


@rule(aten.scaled_dot_product_attention.default)
def attention(tracker: Tracker, node: fx.Node) -> Dims:
    """Trace softmax(q k^T * scale + mask) v: heads merge over q, k, v; q and k share their positions; keys stay."""
    query, key, value = node.args[:3]
    shapes = [tracker.shape(arg) for arg in (query, key, value)]
    rank = len(shapes[0])
    batch = _leading(rank - 2)
    heads = [shape[-3] if len(shape) > 2 else 1 for shape in shapes]
    if argument(node, 7, "enable_gqa", False) and heads[0] != heads[1]:
        return _grouped_attention(tracker, node)
    tracker.freeze(tracker.dims(key)[-2], node, "is normalised by softmax over the keys")
    scores = contract(tracker, node, [(query, batch + "le"), (key, batch + "se")], batch + "ls")
    tracker.freeze(tracker.dims(value)[-2], node, "is normalised by softmax over the keys")
    dims = contract(tracker, node, [(query, batch + "le"), (value, batch + "sv")], batch + "lv" + "s")[:-1]
    joined = [*dims]
    _join_mask(tracker, node, [*joined[:-1], scores[-1]], rank)
    return tuple(joined)


def _join_mask(tracker: Tracker, node: fx.Node, score_dims: list[Layers], rank: int) -> None:
    mask = argument(node, 3, "attn_mask")
    if mask is None:
        return
    dims, shape = tracker.dims(mask), tracker.shape(mask)
    for index, (layers, size) in enumerate(zip(dims, shape, strict=True)):
        if size > 1:
            tracker.unify(score_dims[index + rank - len(dims)], layers, node)


def _grouped_attention(tracker: Tracker, node: fx.Node) -> Dims:
    query, key, value = node.args[:3]
    heads, shared = tracker.shape(query)[-3], tracker.shape(key)[-3]
    q, k, v = (tracker.dims(arg) for arg in (query, key, value))
    pairs = tracker.unify(k[-3], v[-3], node)
    repeated = tuple(layer.repeat(heads // shared) for layer in pairs)
    tracker.unify(q[-3], repeated if shared > 1 else (), node)
    tracker.unify(q[-1], k[-1], node)
    for arg in (key, value):
        tracker.freeze(tracker.dims(arg)[-2], node, "is normalised by softmax over the keys")
    score_dims = [*q[:-1], ()]
    _join_mask(tracker, node, score_dims, len(q))
    return (*q[:-1], v[-1])


@relocator(aten.scaled_dot_product_attention.default)
def keep_scale(moved: Relocation, node: fx.Node) -> None:
    """Keep the scale 1/sqrt(E) of the width that the network was trained with."""
    query = node.args[0]
    if argument(node, 6, "scale") is None and moved.changed(query, -1):
        node.kwargs = {**node.kwargs, "scale": moved.size_before(query, -1) ** -0.5}


@rule(*overloads(aten, "cosine_similarity.default", "cdist.default", "pairwise_distance.default"))
def distances(tracker: Tracker, node: fx.Node) -> None:
    """Freeze: a removed unit is zero in both operands, but these depend on it through norms with constants."""
    tracker.freeze_all(node, "compares whole vectors")
