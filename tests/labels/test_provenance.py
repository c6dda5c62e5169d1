"""Provenance of data movement: where each label goes when an operation is run on a tensor of indices."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from kfe_fx.frontend.capture import capture
from kfe_fx.labels.analysis import analyze
from kfe_fx.labels.provenance import spread, trace
from kfe_fx.labels.tracker import Dims, Tracker
from kfe_fx.labels.unionfind import UnionFind
from kfe_fx.program import Program, ProgramModule, Signature

UNLABELLED = ((), (), (), ())


def tracker() -> Tracker:
    graph = fx.Graph()
    graph.output(())
    module = ProgramModule({"eval": graph}, Signature((), (), 0, ((), {}), {"eval": ()}))
    return Tracker(Program(module, ((), {}), {}), UnionFind(), {})


def moved(at: Tracker, function: Callable[..., Tensor], *inputs: tuple[tuple[int, ...], Dims]) -> Dims:
    """Carry labels through ``function``; each input is its shape and its labels."""
    graph = fx.Graph()
    node = graph.placeholder("x")  # whom a reason would name
    shapes = [shape for shape, _ in inputs]
    (origin,) = trace(function, shapes)
    return spread(at, node, origin, [dims for _, dims in inputs], shapes)


def lines(at: Tracker, dims: Dims) -> list[list[list[int]]]:
    return [[at.classes.find(layer).tolist() for layer in layers] for layers in dims]


def test_origins_are_input_and_place_and_constants_have_none() -> None:
    (origin,) = trace(lambda a, b: torch.cat([nn.functional.pad(a, (1, 0)), b]), [(2,), (2,)])
    assert origin.owner.tolist() == [-1, 0, 0, 1, 1]
    assert origin.flat[1:].tolist() == [0, 1, 0, 1]


def test_several_outputs_have_an_origin_each() -> None:
    first, second = trace(lambda a: a.split([1, 2]), [(3,)])
    assert first.flat.tolist() == [0]
    assert second.flat.tolist() == [1, 2]


def test_permute() -> None:
    at = tracker()
    label = at.classes.fresh(3)  # 1, 2, 3
    found = moved(at, lambda x: x.permute(2, 0, 3, 1), ((2, 3, 2, 2), ((), (label,), (), ())))
    assert lines(at, found) == [[], [], [], [[1, 2, 3]]]


def test_a_split_dim_merges_along_one_of_the_new_dims() -> None:
    at = tracker()
    label = at.classes.fresh(6)
    found = moved(at, lambda x: x.reshape(2, 2, 3), ((2, 6), ((), (label,))))
    # 2 x 3: three positions leave more units than two groups; 1 goes with 4, 2 with 5, 3 with 6
    assert lines(at, found) == [[], [], [[1, 2, 3]]]
    assert at.classes.find(label).tolist() == [1, 2, 3, 1, 2, 3]


def test_what_is_merged_along_the_outer_dim_stays_there() -> None:
    at = tracker()
    label = at.classes.fresh(4)
    at.classes.union(label[[0, 2]], label[[1, 3]])  # the two groups are units already
    found = moved(at, lambda x: x.reshape(2, 2, 2), ((2, 4), ((), (label,))))
    assert lines(at, found) == [[], [[1, 3]], []]


def test_merging_dims_repeats_the_labels() -> None:
    at = tracker()
    label = at.classes.fresh(2)
    channels_first = moved(at, lambda x: x.flatten(1), ((2, 2, 3), ((), (label,), ())))
    assert lines(at, channels_first) == [[], [[1, 1, 1, 2, 2, 2]]]
    channels_last = moved(at, lambda x: x.flatten(1), ((2, 3, 2), ((), (), (label,))))
    assert lines(at, channels_last) == [[], [[1, 2, 1, 2, 1, 2]]]


def test_two_labelled_dims_flatten_to_two_layers() -> None:
    at = tracker()
    rows, columns = at.classes.fresh(2), at.classes.fresh(2)
    found = moved(at, lambda x: x.flatten(1), ((2, 2, 2), ((), (rows,), (columns,))))
    assert lines(at, found) == [[], [[1, 1, 2, 2], [3, 4, 3, 4]]]


def test_a_flatten_that_is_split_again_gives_the_labels_back() -> None:
    at = tracker()
    label = at.classes.fresh(2)
    found = moved(at, lambda x: x.flatten(1).reshape(2, 2, 3), ((2, 2, 3), ((), (label,), ())))
    assert lines(at, found) == [[], [[1, 2]], []]
    assert at.classes.distinct(label) == 2


def test_concatenation_with_a_raw_input_freezes_only_the_inputs_part() -> None:
    at = tracker()
    label = at.classes.fresh(2)
    found = moved(
        at,
        lambda a, b: torch.cat([a, b], 1),
        ((2, 3, 2, 2), UNLABELLED),
        ((2, 2, 2, 2), ((), (label,), (), ())),
    )
    assert lines(at, found) == [[], [[0, 0, 0, 1, 2]], [], []]


def test_stacking_with_a_raw_input_freezes_what_would_cut_it() -> None:
    at = tracker()
    label = at.classes.fresh(2)
    found = moved(at, lambda a, b: torch.stack([a, b], 1), ((2, 2), ((), (label,))), ((2, 2), ((), ())))
    assert lines(at, found) == [[], [], []]
    assert at.classes.find(label).tolist() == [0, 0]


def test_stacked_parts_join() -> None:
    at = tracker()
    one, other = at.classes.fresh(2), at.classes.fresh(2)
    found = moved(at, lambda a, b: torch.stack([a, b], 1), ((2, 2), ((), (one,))), ((2, 2), ((), (other,))))
    assert lines(at, found) == [[], [], [[1, 2]]]
    assert at.classes.find(other).tolist() == [1, 2]


def test_a_channel_shuffle_goes_by_positions_of_groups_and_comes_out_permuted() -> None:
    at = tracker()
    label = at.classes.fresh(6)

    def shuffle(x: Tensor) -> Tensor:
        return x.reshape(2, 2, 3, 1, 1).transpose(1, 2).reshape(2, 6, 1, 1)

    found = moved(at, shuffle, ((2, 6, 1, 1), ((), (label,), (), ())))
    # run as one operation no dim is split: channel 2 * position + group, and nothing needs to merge
    assert lines(at, found) == [[], [[1, 4, 2, 5, 3, 6]], [], []]
    assert at.classes.distinct(label) == 6


def test_pixel_shuffle_merges_the_channels_of_a_block() -> None:
    at = tracker()
    label = at.classes.fresh(8)
    found = moved(at, lambda x: nn.functional.pixel_shuffle(x, 2), ((2, 8, 2, 2), ((), (label,), (), ())))
    assert lines(at, found) == [[], [[1, 5]], [], []]
    assert at.classes.find(label).tolist() == [1, 1, 1, 1, 5, 5, 5, 5]


def test_pixel_unshuffle_repeats_them() -> None:
    at = tracker()
    label = at.classes.fresh(2)
    found = moved(at, lambda x: nn.functional.pixel_unshuffle(x, 2), ((2, 2, 4, 4), ((), (label,), (), ())))
    assert lines(at, found) == [[], [[1, 1, 1, 1, 2, 2, 2, 2]], [], []]


def test_padded_channels_are_constants_that_stay() -> None:
    at = tracker()
    label = at.classes.fresh(2)
    found = moved(at, lambda x: nn.functional.pad(x, (0, 0, 0, 0, 1, 2)), ((2, 2, 2, 2), ((), (label,), (), ())))
    assert lines(at, found) == [[], [[0, 1, 2, 0, 0]], [], []]


def test_padded_space_leaves_the_channels_alone() -> None:
    at = tracker()
    label = at.classes.fresh(2)
    found = moved(at, lambda x: nn.functional.pad(x, (1, 1, 1, 1)), ((2, 2, 2, 2), ((), (label,), (), ())))
    assert lines(at, found) == [[], [[1, 2]], [], []]


def test_expansion_keeps_labels_where_they_are() -> None:
    at = tracker()
    label = at.classes.fresh(3)
    found = moved(at, lambda x: x.expand(2, 4, 3), ((2, 1, 3), ((), (), (label,))))
    assert lines(at, found) == [[], [], [[1, 2, 3]]]


def test_a_reshape_that_no_dim_can_follow_leaves_one_unit_for_all() -> None:
    at = tracker()
    label = at.classes.fresh(3)
    # 3 x 2 read as 2 x 3: rows of the result start inside a channel
    moved(at, lambda x: x.reshape(2, 2, 3), ((2, 3, 2), ((), (label,), ())))
    assert at.classes.distinct(label) == 1


def test_channels_that_fill_rows_together_merge() -> None:
    at = tracker()
    label = at.classes.fresh(4)
    # 4 x 3 read as 6 x 2: pairs of channels fill three rows each
    found = moved(at, lambda x: x.reshape(2, 6, 2), ((2, 4, 3), ((), (label,), ())))
    assert at.classes.find(label).tolist() == [1, 1, 3, 3]
    assert lines(at, found) == [[], [[1, 1, 1, 3, 3, 3]], []]


class Widened(nn.Module):
    """A column per channel of a 1-wide dim meets a wide one."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide, self.head = nn.Linear(3, 1), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.narrow(x).expand(-1, 4) * self.wide(x))


def test_a_broadcast_takes_any_width() -> None:
    analysis = analyze(capture(Widened(), torch.randn(2, 3)))
    assert [unit.slices for unit in analysis.units] == [
        {"wide.weight": {0: (i,)}, "wide.bias": {0: (i,)}, "head.weight": {1: (i,)}} for i in range(4)
    ]


class Shuffled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        n, _, height, width = y.shape
        y = y.view(n, 2, 3, height, width).transpose(1, 2).reshape(n, 6, height, width)
        return self.head(y)


def test_a_shuffle_written_as_views_goes_by_positions() -> None:
    analysis = analyze(capture(Shuffled(), torch.randn(2, 3, 2, 2)))
    # position p of both groups: channels p and p + 3, which come out at 2p and 2p + 1
    assert [unit.slices for unit in analysis.units] == [
        {"stem.weight": {0: (p, p + 3)}, "stem.bias": {0: (p, p + 3)}, "head.weight": {1: (2 * p, 2 * p + 1)}}
        for p in range(3)
    ]


@pytest.mark.parametrize("size", [1, 5])
def test_a_dim_without_labels_gains_none(size: int) -> None:
    at = tracker()
    found = moved(at, lambda x: x.transpose(0, 1), ((size, 2), ((), ())))
    assert lines(at, found) == [[], []]
    assert np.array_equal(at.classes.find(np.arange(len(at.classes))), [0])
