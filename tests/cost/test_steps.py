"""Portions: widths stay multiples, floors and caps hold, globs freeze."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from kfe_fx.cost.solver import select_budget
from kfe_fx.cost.steps import Stepper, frozen_groups, kernel_widths, protected_units
from kfe_fx.errors import UsageError
from tests.cost.nets import attention_case, conv_case, residual_case


@dataclass
class Labels:
    """What the protection of floors reads of an analysis."""

    floors: list[frozenset[int]]
    units: list[Any] = field(default_factory=list)


def tracks_of(made: Any, block: int, cap: float = 0.9, scores: np.ndarray | None = None) -> dict[str, Any]:
    ranked = np.arange(len(made.analysis.units), dtype=float) if scores is None else scores
    stepper, protected = Stepper(made.model, block), protected_units(made.analysis, ranked)
    return {group.name: stepper.track(group, ranked, protected, cap) for group in made.analysis.groups}


def size_at(made: Any, track: Any, stop: int, name: str, dim: int) -> int:
    return made.model.size(name, dim, track.gone(stop))


def find(tracks: dict[str, Any], part: str) -> Any:
    return next(track for name, track in tracks.items() if part in name)


def test_widths_go_down_by_blocks():
    made = residual_case()
    track = find(tracks_of(made, 16), "blocks.2.0")
    assert [size_at(made, track, stop, "blocks.2.0.weight", 0) for stop in range(len(track) + 1)] == [
        96,
        80,
        64,
        48,
        32,
        16,
    ]
    track = find(tracks_of(made, 32), "blocks.2.0")
    assert [size_at(made, track, stop, "blocks.2.0.weight", 0) for stop in range(len(track) + 1)] == [96, 64, 32]


def test_a_width_that_is_no_multiple_is_brought_to_one():
    made = conv_case()  # expand: 48 channels, 32 is no divisor
    track = find(tracks_of(made, 32), "expand")
    assert [size_at(made, track, stop, "expand.weight", 0) for stop in range(len(track) + 1)] == [48, 32]


def test_groups_no_wider_than_the_block_are_left_alone():
    made = conv_case()
    assert len(find(tracks_of(made, 64), "stem")) == 0
    assert len(find(tracks_of(made, 32), "stem")) == 0
    assert len(find(tracks_of(made, 16), "stem")) == 1


def test_whole_heads_take_fewer_units():
    made = attention_case()  # a head is 16 slices
    heads = min(tracks_of(made, 16, cap=1.0).values(), key=lambda track: len(track.portions) or math.inf)
    assert [len(portion) for portion in find(tracks_of(made, 16), "q").portions] == [1, 1, 1]
    assert [len(portion) for portion in find(tracks_of(made, 32), "q").portions] == [2]
    assert len(heads) > 0


def test_units_go_one_by_one_without_a_block():
    made = residual_case()
    track = find(tracks_of(made, 1), "wide")
    assert all(len(portion) == 1 for portion in track.portions)
    assert len(track) == 57  # 64 units, at most nine in ten


def test_the_least_important_go_first():
    made = residual_case()
    scores = np.random.default_rng(0).normal(size=len(made.analysis.units)) ** 2
    for track in tracks_of(made, 16, scores=scores).values():
        lost = [scores[unit] for unit in track.gone(len(track))]
        assert lost == sorted(lost)
        assert np.diff(track.loss) == pytest.approx([sum(scores[list(p)]) for p in track.portions])


def test_an_infinite_score_keeps_a_unit():
    made = residual_case()
    scores = np.ones(len(made.analysis.units))
    scores[::2] = math.inf
    for track in tracks_of(made, 1, cap=1.0, scores=scores).values():
        assert all(unit % 2 for unit in track.gone(len(track)))


def test_each_floor_keeps_its_best():
    floors = [frozenset({0, 1, 2}), frozenset({2, 3}), frozenset({4}), frozenset({0, 1, 2, 3, 4})]
    scores = np.array([5.0, 1.0, 2.0, 1.0, 0.0])
    kept = protected_units(Labels(floors), scores)  # type: ignore[arg-type]
    assert kept == {2, 4}  # 2 serves the first two floors


def test_units_of_different_sizes_fill_a_block_exactly():
    made = residual_case()
    stepper = Stepper(made.model, 4)
    owned = np.array([[3, 1, 2, 2, 1, 1, 4, 2]])
    portions = stepper._packed(list(range(8)), 8, owned, np.array([16]))
    sizes = [sum(owned[0][list(portion)]) for portion in portions]
    assert all(size % 4 == 0 for size in sizes)
    assert portions[0] == (0, 1)
    assert len({unit for portion in portions for unit in portion}) == sum(map(len, portions))


def test_globs_freeze_by_parameter_or_module():
    made = residual_case()
    names = {group.id: group.name for group in made.analysis.groups}
    assert {names[g] for g in frozen_groups(made.analysis, ["blocks.1.0.*"])} == {
        names[g] for g in frozen_groups(made.analysis, ["blocks.1.0"])
    }
    assert not frozen_groups(made.analysis, ["last.*"])
    with pytest.raises(UsageError, match="matches no parameter"):
        frozen_groups(made.analysis, ["hed.*"])


def test_kernel_widths_are_those_of_weights():
    made = attention_case()
    dense = [made.model.widths.dense[width] for width in kernel_widths(made.model)]
    assert 4 not in dense  # the number of heads is a dim of activations alone
    assert {32, 64} <= set(dense)


@pytest.mark.parametrize("block", [0, -16])
def test_a_block_below_one_is_refused(block: int):
    made = residual_case()
    with pytest.raises(UsageError, match="at least 1"):
        select_budget(made.model, np.ones(len(made.analysis.units)), made.model.mac_cost, 0.5, multiple_of=block)
