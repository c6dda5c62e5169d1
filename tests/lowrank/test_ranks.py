"""One threshold for all layers, caps, steps, and forms that are worth it, against counting by hand."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kfe_fx.lowrank.kfe import Kfe
from kfe_fx.lowrank.layers import Layer, Op
from kfe_fx.lowrank.prices import Prices
from kfe_fx.lowrank.ranks import Choice, best_form, by_importance, by_ratio, floors, stepped


def layer(name: str, rows: int, columns: int, kernel: tuple[int, ...] = (3, 3)) -> Layer:
    op = Op(f"{name}.weight", (rows, columns, *kernel), {"eval": (name,)})
    return Layer(name, op, None, None, {"before": 16, "core": 16, "after": 16})


def axes(name: str, importance: Tensor, kernel: tuple[int, ...] = (3, 3)) -> Kfe:
    rows = importance.sum(1).argsort(descending=True, stable=True)
    columns = importance.sum(0).argsort(descending=True, stable=True)
    importance = importance[rows][:, columns]
    o, i = importance.shape
    return Kfe(layer(name, o, i, kernel), torch.eye(i), torch.eye(o), importance.double())


def drawn(seed: int, *sizes: tuple[int, int]) -> dict[str, Kfe]:
    generator = torch.Generator().manual_seed(seed)
    made = (torch.rand(*size, generator=generator, dtype=torch.float64).pow(4) for size in sizes)
    return {f"l{place}": axes(f"l{place}", importance) for place, importance in enumerate(made)}


def test_the_loss_counts_what_goes_once() -> None:
    (one,) = drawn(0, (4, 3)).values()
    for r, c in product(range(5), range(4)):
        gone = one.importance.clone()
        gone[:r, :c] = 0
        assert one.loss(c, r) == pytest.approx(float(gone.sum()) / 2, rel=1e-12, abs=1e-15)


@given(seed=st.integers(0, 10_000), ratio=st.sampled_from([0.05, 0.3, 0.5, 0.9]))
@settings(max_examples=25)
def test_the_lowest_of_all_columns_and_rows_go(seed: int, ratio: float) -> None:
    known = drawn(seed, (6, 4), (3, 8))
    ranks = by_ratio(known, ratio, cap=0.999)
    scores = sorted(float(s) for one in known.values() for s in (*one.column_scores, *one.row_scores))
    limit = scores[int(ratio * len(scores) + 1e-9)]  # the first that stays
    for name, one in known.items():
        expected = [max(1, sum(float(s) >= limit for s in side)) for side in (one.column_scores, one.row_scores)]
        assert list(ranks[name]) == expected


@given(seed=st.integers(0, 10_000), share=st.sampled_from([0.01, 0.1, 0.5]))
@settings(max_examples=25)
def test_no_more_importance_goes_than_was_allowed_and_the_next_would_be_too_much(seed: int, share: float) -> None:
    known = drawn(seed, (6, 4), (3, 8))
    total = sum(one.total for one in known.values())

    def loss(ranks: dict[str, tuple[int, int]]) -> float:
        return sum(one.loss(*ranks[name]) for name, one in known.items())

    ranks = by_importance(known, share, cap=0.999)
    assert loss(ranks) <= share * total
    count = sum(len(one.column_scores) + len(one.row_scores) for one in known.values())
    tried = [by_ratio(known, m / count, cap=0.999) for m in range(count + 1)]
    allowed = [each for each in tried if loss(each) <= share * total]
    assert min(sum(map(sum, each.values())) for each in allowed) == sum(map(sum, ranks.values()))


def test_caps_hold_back_each_side() -> None:
    importance = torch.full((10, 20), 1e-9)
    known = {"weak": axes("weak", importance), "strong": axes("strong", torch.ones(10, 20))}
    assert by_ratio(known, 0.5, cap=0.75) == {"weak": (5, 3), "strong": (20, 10)}
    assert by_ratio(known, 0.5) == {"weak": (1, 1), "strong": (20, 10)}
    assert floors(layer("l", 40, 20), None) == (1, 2)
    again = Layer("l", layer("l", 40, 20).core, Op("b", (20, 30), {}), None, {})
    assert floors(again, None) == (10, 20)


def test_steps_round_up_and_never_beyond_all() -> None:
    assert [stepped(size, 40, 16) for size in (1, 16, 17, 33, 40)] == [16, 16, 32, 40, 40]


@dataclass
class Fixed:
    """Prices by a table; what it does not name costs 1 ms."""

    table: dict[tuple[int, int], float]

    def ms(self, layer: Layer, c: int, r: int) -> float:
        return self.table.get((c, r), 1.0)


def form(one: Kfe, ranks: tuple[int, int], table: dict[tuple[int, int], float], metric: str = "latency"):
    prices: Prices = Fixed(table)  # type: ignore[assignment]
    return best_form(one, ranks, step=4, metric=metric, prices=prices)


def test_the_cheapest_form_is_taken_and_what_is_not_worth_it_says_so_with_figures() -> None:
    (one,) = drawn(0, (32, 16)).values()
    chosen = form(one, (3, 7), {(4, 8): 0.5, (4, 32): 0.7, (16, 8): 0.6})
    assert chosen == Choice(4, 8, one.loss(4, 8), (1.0, 0.5))
    chosen = form(one, (3, 7), {(4, 8): 0.9, (4, 32): 0.7, (16, 8): 0.8})
    assert isinstance(chosen, Choice)
    assert (chosen.c, chosen.r) == (4, 32)
    assert form(one, (3, 7), {(4, 8): 1.2, (4, 32): 1.3, (16, 8): 1.4}) == (
        "it would not be faster with 4 of 16 columns and 8 of 32 rows: 1.2 ms predicted, now 1"
    )
    assert form(one, (16, 31), {(16, 32): 1.0}) == (
        "16 of its 16 columns and 32 of its 32 rows stay: in steps of 4 no form has less"
    )


def test_what_would_grow_stays() -> None:
    """The break-even of a 1x1 layer: k (C_in + C_out) against C_in C_out."""
    one = axes("l", torch.rand(256, 256, dtype=torch.float64), ())
    assert isinstance(form(one, (124, 256), {}, "params"), Choice)
    told = form(one, (128, 256), {(128, 256): 0.1})
    assert told == "it would not be smaller with 128 of 256 columns and 256 of 256 rows: 65,536 weights, now 65,536"


def test_a_matrix_keeps_its_free_side() -> None:
    one = axes("l", torch.rand(16, 12, dtype=torch.float64), ())
    chosen = form(one, (4, 8), {}, "params")
    assert isinstance(chosen, Choice)
    assert (chosen.c, chosen.r) == (4, 16)
    assert one.layer.steps(4, 16) == [("core", 12, 4), ("after", 4, 16)]
    # a rank that is all there is would lose something for nothing
    assert isinstance(form(one, (12, 13), {}, "none"), str)


def test_break_even_of_published_sizes() -> None:
    """3(iii)1: 256 -> 256 channels, 3x3: equal ranks up to 229 are smaller."""
    made = layer("l", 256, 256)
    assert made.weights(229, 229) < made.weights(256, 256) < made.weights(230, 230)
