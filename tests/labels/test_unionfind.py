"""Union-find over arrays of labels, against one that merges python sets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kfe_fx.labels.unionfind import Reason, UnionFind

LABELS = 12  # 0 is the frozen one


class Naive:
    """Classes as sets; a class is told by its least member."""

    def __init__(self, count: int) -> None:
        self.sets = [{label} for label in range(count)]

    def merge(self, one: int, other: int) -> None:
        first, second = self.of(one), self.of(other)
        if first is not second:
            self.sets = [each for each in self.sets if each is not first and each is not second] + [first | second]

    def of(self, label: int) -> set[int]:
        return next(each for each in self.sets if label in each)


label = st.integers(0, LABELS - 1)
unions = st.lists(st.lists(st.tuples(label, label), min_size=1, max_size=6), max_size=6)


def made(batches: list[list[tuple[int, int]]]) -> tuple[UnionFind, Naive]:
    classes, naive = UnionFind(), Naive(LABELS)
    assert classes.fresh(LABELS - 1).tolist() == list(range(1, LABELS))
    for pairs in batches:
        one, other = zip(*pairs, strict=True)
        classes.union(np.array(one), np.array(other), Reason("joins"))
        for pair in pairs:
            naive.merge(*pair)
    return classes, naive


@given(batches=unions)
@settings(max_examples=200)
def test_classes_are_those_of_a_naive_union_find(batches: list[list[tuple[int, int]]]) -> None:
    classes, naive = made(batches)
    everything = np.arange(LABELS)
    # the least label of a class represents it, so 0 stands for every frozen one
    assert classes.find(everything).tolist() == [min(naive.of(each)) for each in range(LABELS)]
    assert classes.distinct(everything) == len(naive.sets) - 1


@given(batches=unions)
@settings(max_examples=100)
def test_exactly_the_frozen_labels_have_a_cause(batches: list[list[tuple[int, int]]]) -> None:
    classes, naive = made(batches)
    assert set(classes.causes()) == naive.of(0) - {0}


@given(batches=unions, free=st.sets(st.integers(1, LABELS - 1)))
@settings(max_examples=100)
def test_a_class_is_free_when_all_of_it_is(batches: list[list[tuple[int, int]]], free: set[int]) -> None:
    classes, naive = UnionFind(), Naive(LABELS)
    for each in range(1, LABELS):
        classes.fresh(1, free=each in free)
    for pairs in batches:
        one, other = zip(*pairs, strict=True)
        classes.union(np.array(one), np.array(other))
        for pair in pairs:
            naive.merge(*pair)
    for each in range(LABELS):
        assert classes.is_free(np.array([each])) == (naive.of(each) <= free)


def test_frozen_wins_from_either_side() -> None:
    classes = UnionFind()
    one, other = classes.fresh(3), classes.fresh(3)
    classes.union(other, one)
    classes.freeze(other[:1])
    classes.union(np.zeros(1, dtype=np.int64), one[1:2])
    assert classes.find(one).tolist() == [0, 0, one[2]]
    assert classes.find(other).tolist() == [0, 0, one[2]]
    assert classes.distinct(np.concatenate([one, other])) == 1


def test_one_label_freezes_all_of_a_line_by_broadcast() -> None:
    classes = UnionFind()
    table = classes.fresh(6).reshape(2, 3)
    classes.union(table, table[:, :1])
    assert classes.find(table).tolist() == [[1, 1, 1], [4, 4, 4]]
    classes.freeze(table[1])
    assert classes.find(table).tolist() == [[1, 1, 1], [0, 0, 0]]


def test_growth_keeps_what_was_merged() -> None:
    classes = UnionFind()
    first = classes.fresh(3)
    classes.union(first[:1], first[2:])
    later = classes.fresh(1000)
    assert len(classes) == 1004
    assert classes.find(first).tolist() == [1, 2, 1]
    assert classes.find(later).tolist() == later.tolist()


FREEZES, JOINS, LATER = Reason("freezes", "softmax", "net.py:3"), Reason("joins", "add"), Reason("is an output")


@pytest.mark.parametrize("frozen_first", [True, False])
def test_the_cause_is_what_froze_the_class_not_what_joined_it(frozen_first: bool) -> None:
    classes = UnionFind()
    one, other, third = (classes.fresh(1) for _ in range(3))
    if frozen_first:
        classes.freeze(one, FREEZES)
    classes.union(other, one, JOINS)
    classes.union(third, other, JOINS)
    if not frozen_first:
        classes.freeze(one, FREEZES)
    assert classes.causes() == {1: FREEZES, 2: FREEZES, 3: FREEZES}


def test_the_first_event_is_the_cause() -> None:
    classes = UnionFind()
    one = classes.fresh(2)
    classes.freeze(one[:1], FREEZES)
    classes.freeze(one, LATER)
    assert classes.causes() == {1: FREEZES, 2: LATER}


def test_what_goes_without_saying_has_a_cause_without_words() -> None:
    classes = UnionFind()
    classes.freeze(classes.fresh(2))
    assert classes.causes() == {1: None, 2: None}
