"""Templates of nested inputs and outputs."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kfe_fx.errors import UsageError
from kfe_fx.structure import Constant, flatten_like, leaf_names, pack, template_of


class Leaf:
    """What stands for a tensor; equal to itself alone."""


def is_leaf(item: Any) -> bool:
    return isinstance(item, Leaf)


nested = st.recursive(
    st.builds(Leaf) | st.none() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(value=nested)
@settings(max_examples=60)
def test_packing_undoes_splitting(value: Any) -> None:
    template, leaves = template_of(value, is_leaf)
    assert all(is_leaf(each) for each in leaves)
    assert pack(template, leaves) == value
    assert flatten_like(template, value, "it") == leaves


def test_leaves_are_numbered_in_order_and_the_rest_stays() -> None:
    a, b, c = Leaf(), Leaf(), Leaf()
    template, leaves = template_of(((a, [b]), {"k": c, "n": None}, 0.5), is_leaf)
    assert template == ((0, [1]), {"k": 2, "n": Constant(None)}, Constant(0.5))
    assert leaves == [a, b, c]
    assert pack(template, "xyz") == (("x", ["y"]), {"k": "z", "n": None}, 0.5)


Pair = namedtuple("Pair", "first second")


def test_mappings_become_dicts_and_named_tuples_tuples() -> None:
    a, b = Leaf(), Leaf()
    for mapping in (OrderedDict(x=a, y=b), UserDict(x=a, y=b)):
        assert template_of(mapping, is_leaf) == ({"x": 0, "y": 1}, [a, b])
    template, leaves = template_of(Pair(a, b), is_leaf)
    assert type(template) is tuple
    assert (template, leaves) == ((0, 1), [a, b])


def test_values_are_read_in_the_order_of_the_template_not_of_the_mapping() -> None:
    assert flatten_like({"x": 0, "y": 1}, {"y": "second", "x": "first"}, "it") == ["first", "second"]
    assert flatten_like([1, 0], ["second", "first"], "it") == ["first", "second"]


@pytest.mark.parametrize(
    ("template", "value", "says"),
    [
        ((0, 1), ("a",), "it must be a sequence of 2, got tuple"),
        ((0, 1), "ab", "it must be a sequence of 2, got str"),
        ({"x": 0}, {"y": "a"}, "it must be a mapping with the keys ['x']"),
        ({"x": 0}, {"x": "a", "y": "b"}, "it must be a mapping with the keys ['x']"),
        ({"x": 0}, ["a"], "it must be a mapping"),
        ((0, {"k": (1, 2)}), ("a", {"k": ("b",)}), "it[1]['k'] must be a sequence of 2"),
        ((0, Constant(3)), ("a", 4), "it[1] was 3 at capture and is fixed in the graph, got 4"),
        ((0, Constant(1)), ("a", True), "it[1] was 1 at capture and is fixed in the graph, got True"),
        ((0, Constant(None)), ("a", 0), "it[1] was None"),
    ],
)
def test_another_structure_is_refused_with_its_place(template: Any, value: Any, says: str) -> None:
    with pytest.raises(UsageError) as raised:
        flatten_like(template, value, "it")
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_leaves_are_named_by_their_path() -> None:
    names: dict[int, str] = {}
    leaf_names({"mask": 1, "parts": [0, Constant(2), 2]}, names, "batch")
    assert names == {1: "batch_mask", 0: "batch_parts_0", 2: "batch_parts_2"}
