"""The store: what its sums mean, adding shards, and refusing what does not belong."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import kfe_fx
from kfe_fx import taps
from kfe_fx.curvature import Store, find_blocks, fit
from kfe_fx.curvature.distributed import Group
from kfe_fx.curvature.store import graph_hash, weights_hash
from kfe_fx.errors import UsageError
from kfe_fx.program import Program

from .dense import EXAMPLES, FAMILIES, TIGHT, Case, case, store

close = torch.testing.assert_close
families = pytest.mark.parametrize("name", ["linear 3-D", "conv2d grouped", "conv2d transposed", "embedding padded"])


def shards(made: Case, cuts: list[int], **options: Any) -> list[Store]:
    """Fit on parts of the data."""
    edges = [0, *sorted({cut for cut in cuts if 0 < cut < EXAMPLES}), EXAMPLES]
    return [
        fit(made.program, (made.inputs[a:b], made.targets[a:b]), "cross-entropy", source="exact", **options)
        for a, b in itertools.pairwise(edges)
    ]


def merged(parts: list[Store]) -> Store:
    """Add stores."""
    total = parts[0]
    for part in parts[1:]:
        total = total.merge(part)
    return total


def assert_equal(found: Store, expected: Store) -> None:
    """Compare sums, counts and facts."""
    assert found.facts == expected.facts
    for name, block in expected.blocks.items():
        other = found.blocks[name]
        assert other.counts == block.counts
        assert other.sums.keys() == block.sums.keys()
        for key, value in block.sums.items():
            close(other.sums[key], value, **TIGHT)


# what is kept ---------------------------------------------------------------------------------------------------------


@families
def test_means_are_sums_over_counts(name: str) -> None:
    made, held = case(name), store(name)
    for block in made.blocks.blocks:
        found = held.blocks[block.name]
        assert (found.kind, found.shape, found.parameters) == (block.kind, block.shape, block.parameters)
        assert found.examples == EXAMPLES
        close(found.D * EXAMPLES, found.sums["D"], **TIGHT)  # type: ignore[operator]
        close(found.S * EXAMPLES, found.sums["S"], **TIGHT)  # type: ignore[operator]
        if block.kind == "diagonal":
            assert found.A is found.G is None
            assert not found.basis
            close(found.D, found.S, **TIGHT)
            continue
        assert found.A is not None
        assert torch.equal(found.A, found.A.transpose(1, 2))
        close(
            found.A.diagonal(dim1=1, dim2=2).sum() * found.counts["rows"],
            found.sums["A"].diagonal(dim1=1, dim2=2).sum(),
        )
        turned = found.basis["U_A"] * found.basis["lam_A"].unsqueeze(1) @ found.basis["U_A"].transpose(1, 2)
        close(turned, found.A, rtol=1e-9, atol=1e-12)


def test_facts_say_what_was_measured() -> None:
    facts = store("linear 3-D").facts
    assert {key: facts[key] for key in ("source", "sharing", "loss", "family", "profile", "examples", "nonfinite")} == {
        "source": "exact",
        "sharing": "expand",
        "loss": "cross-entropy",
        "family": "categorical",
        "profile": "score",
        "examples": EXAMPLES,
        "nonfinite": {},
    }
    assert store("linear 3-D", "empirical").facts["reduction"] == "mean"


def test_nothing_measured_is_none() -> None:
    made = case("linear")
    found = Store.of(made.program, made.blocks).blocks["layer.weight"]
    assert found.A is found.G is found.S is found.D is None
    assert found.examples == 0


# adding ---------------------------------------------------------------------------------------------------------------


@families
def test_shards_add_to_one_fit(name: str) -> None:
    """Factors add; their sum is decomposed; S* adds in the bases of the sum."""
    made = case(name)
    statistics = ("kfac", "diagonal")
    whole = fit(made.program, made.data, "cross-entropy", source="exact", statistics=statistics)
    total = merged(shards(made, [2, 3], statistics=statistics))
    assert_equal(total, whole)
    total.decompose()
    for block, other in zip(total.blocks.values(), whole.blocks.values(), strict=True):
        for key in ("lam_A", "lam_G"):
            if key in other.basis:
                close(block.basis[key], other.basis[key], rtol=1e-9, atol=1e-12)
    total = total.merge(merged(shards(made, [1, 4], statistics="ekfac", bases=total)))
    assert total.facts["examples"] == EXAMPLES
    at_once = fit(made.program, made.data, "cross-entropy", source="exact", statistics="ekfac", bases=total)
    for block_name, block in total.blocks.items():
        close(block.S, at_once.blocks[block_name].S, **TIGHT)
        assert block.counts["S_examples"] == EXAMPLES
    one, other = total.operator(made.program, "ekfac"), store(name).operator(made.program, "ekfac")
    assert one.trace() == pytest.approx(other.trace(), rel=1e-10)
    close(one.dense(), other.dense(), rtol=1e-6, atol=1e-9)


@settings(max_examples=15)
@given(st.sampled_from(sorted(FAMILIES)), st.lists(st.integers(1, EXAMPLES - 1), max_size=3))
def test_any_split_adds_to_one_fit(name: str, cuts: list[int]) -> None:
    made = case(name)
    whole = fit(made.program, made.data, "cross-entropy", source="exact", statistics=("kfac", "diagonal"))
    parts = shards(made, cuts, statistics=("kfac", "diagonal"))
    assert_equal(merged(parts), whole)
    assert_equal(merged(parts[::-1]), whole)


def test_merging_changes_neither_part() -> None:
    made = case("linear 3-D")
    parts = shards(made, [2], statistics=("kfac", "diagonal"))
    before = copy.deepcopy(parts)
    merged(parts)
    for part, other in zip(parts, before, strict=True):
        assert_equal(part, other)
        assert all(block.basis.keys() == other.blocks[name].basis.keys() for name, block in part.blocks.items())


def test_gradients_that_were_not_finite_add_up() -> None:
    made = case("linear")
    x = made.inputs.clone()
    x[[0, 4]] = float("nan")
    bad = Case(made.module, made.program, x, made.targets, made.blocks)
    parts = shards(bad, [2], statistics="diagonal", batch_size=1)
    total = merged(parts)
    assert total.facts["nonfinite"] == dict.fromkeys(total.blocks, 6)  # 2 examples of 3 classes
    assert total.blocks["layer.weight"].counts["D_examples"] == 3


def test_what_does_not_add_is_refused() -> None:
    made = case("linear 3-D")
    held = store("linear 3-D")
    for other, told in (
        (store("linear"), "their graph differs"),
        (store("linear 3-D", "empirical"), "their source differs"),
        (store("linear 3-D", sharing="reduce"), "their sharing differs"),
    ):
        with pytest.raises(UsageError, match=told):
            held.merge(other)
    mse = fit(made.program, made.inputs, "mse", source="exact", statistics="diagonal")
    with pytest.raises(UsageError, match="their loss differs"):
        mse.merge(held)
    moved = made.program.copy()
    with torch.no_grad():
        moved.tensor("head.bias").add_(1.0)
    with pytest.raises(UsageError, match="their weights differs"):
        held.merge(fit(moved, made.inputs, "cross-entropy", source="exact", statistics="ekfac"))
    first, second = shards(made, [2], statistics="ekfac")
    with pytest.raises(UsageError, match="different eigenbases"):
        first.merge(second)
    fewer = copy.deepcopy(held)
    del fewer.blocks["head.weight"]
    with pytest.raises(UsageError, match="their blocks differ"):
        held.merge(fewer)


def test_new_bases_forget_the_moments_of_old_ones() -> None:
    made, held = case("linear 3-D"), copy.deepcopy(store("linear 3-D"))
    held.decompose()
    assert held.blocks["layer.weight"].S is None
    assert "S_examples" not in held.blocks["layer.weight"].counts
    with pytest.raises(UsageError, match="hold nothing to make 'ekfac' of"):
        held.operator(made.program, "ekfac")
    held = held.merge(fit(made.program, made.data, "cross-entropy", source="exact", statistics="ekfac", bases=held))
    expected = store("linear 3-D").operator(made.program, "ekfac").dense()
    close(held.operator(made.program, "ekfac").dense(), expected, **TIGHT)


def test_bases_are_taken_from_a_store_that_has_them() -> None:
    made = case("linear 3-D")
    diagonal = fit(made.program, made.data, source="exact", statistics="diagonal")
    with pytest.raises(UsageError, match="no eigenbases"):
        fit(made.program, made.data, source="exact", statistics="ekfac", bases=diagonal)
    with pytest.raises(UsageError, match="no eigenbases"):
        diagonal.share_bases(diagonal)


# whose statistics -----------------------------------------------------------------------------------------------------


def linear(wide: int, high: int) -> Program:
    return kfe_fx.capture(nn.Sequential(nn.Linear(wide, high), nn.Tanh(), nn.Linear(high, 2)), (torch.randn(2, wide),))


def test_a_foreign_network_is_refused_by_its_hash() -> None:
    program = linear(3, 4)
    held = fit(program, torch.randn(4, 3), statistics="diagonal", source="exact")
    held.check(program, weights=True)
    held.check(program.copy(), weights=True)
    for other in (linear(3, 5), linear(2, 4), kfe_fx.capture(nn.Linear(3, 2), (torch.randn(2, 3),))):
        with pytest.raises(UsageError, match="of another network"):
            held.check(other)
    with torch.no_grad():
        program.tensor("0.bias").add_(1e-3)
    held.check(program)
    with pytest.raises(UsageError, match="older than the weights"):
        held.check(program, weights=True)


def test_taps_do_not_make_another_network() -> None:
    program = linear(3, 4)
    before = graph_hash(program), weights_hash(program)
    blocks = find_blocks(program)
    for mode, graph in program.graphs.items():
        assert taps.insert(graph, blocks.taps(mode))
    assert program.hash() != before[0]
    assert (graph_hash(program), weights_hash(program)) == before
    assert all(taps.tapped(graph) for graph in program.graphs.values())  # they are still there


# dead layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dead", ["input", "gradient"])
def test_a_dead_layer_gives_zeros_and_no_nan(dead: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False)).double()
    with torch.no_grad():
        if dead == "input":
            module[0].weight.zero_()  # nothing reaches the second
        else:
            module[2].weight.zero_()  # no gradient reaches the first
    x = torch.randn(5, 3).double()
    program = kfe_fx.capture(module, (x,))
    held = fit(program, x, "mse", statistics=("diagonal", "ekfac"), source="exact")
    name = "2.weight" if dead == "input" else "0.weight"
    v = {key: torch.ones_like(value) for key, value in module.named_parameters()}
    for kind in ("diagonal", "kfac", "ekfac"):
        operator = held.operator(program, kind)
        assert operator.blocks[name].trace() == 0.0
        assert not operator.solve(v, 0.0)[name].any()
        close(operator.solve(v, 0.5)[name], 2.0 * v[name])
        assert all(value.isfinite().all() for value in operator.solve(v, 0.0).values())
    assert held.operator(program, "kfac").solve(v, 0.25, "factored")[name].isfinite().all()


# several processes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A group of two of which the other has told ``theirs``."""

    theirs: Any
    size: int = 2
    rank: int = 0

    def gather(self, mine: Any) -> list[Any]:
        return [mine, self.theirs]

    def sum_number(self, value: float) -> float:
        return value + self.theirs

    def sum(self, tensors: list[torch.Tensor]) -> None:
        """Add nothing."""


@pytest.mark.parametrize("name", ["conv2d grouped", "embedding"])
def test_a_process_that_saw_nothing_adds_zeros_of_the_right_sizes(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    made, full = case(name), store(name)
    empty = Store.of(made.program, made.blocks)
    for moments, keys in ((False, "AGD"), (True, "S")):
        told = {
            (block, key): tuple(value.shape)
            for block, held in full.blocks.items()
            for key, value in held.sums.items()
            if key in keys
        }
        monkeypatch.setattr(Group, "current", classmethod(lambda cls, told=told: Pair(told)))
        empty.complete(moments=moments)
    for block, held in full.blocks.items():
        found = empty.blocks[block].sums
        assert {key: (value.shape, value.dtype) for key, value in found.items()} == {
            key: (value.shape, value.dtype) for key, value in held.sums.items()
        }
        assert not any(value.any() for value in found.values())


def test_counts_are_those_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    made = case("linear")
    held = Store.of(made.program, made.blocks)
    monkeypatch.setattr(Group, "current", classmethod(lambda cls: Pair(3.0)))
    held.describe({"examples": 4, "nonfinite": {"layer.weight": 2}})
    assert held.facts["examples"] == 7
    assert held.facts["nonfinite"] == {"layer.weight": 5, "head.weight": 3}
