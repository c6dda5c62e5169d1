"""Who sees which examples."""

from __future__ import annotations

import pytest
import torch

from kfe_fx.data.dataset import ArrayData
from kfe_fx.errors import UsageError
from kfe_fx.training import arrange


def numbered(count: int, start: int = 0) -> ArrayData:
    x = torch.arange(start, start + count)
    return ArrayData((x.float()[:, None],), x % 3, name="numbers")


def ids(data: ArrayData | None) -> set[int]:
    assert data is not None
    return set(data.inputs[0][:, 0].int().tolist())  # type: ignore[index]


def test_held_out_examples_are_seen_by_nobody_else():
    found = arrange(numbered(5000), seed=4)
    assert ids(found.held_out).isdisjoint(ids(found.training))
    assert len(ids(found.held_out)) == 1000
    assert ids(found.calibration) < ids(found.training)
    assert len(ids(found.calibration)) == 1024
    assert "seed 4" in found.note
    assert ids(arrange(numbered(5000), seed=4).held_out) == ids(found.held_out) != ids(arrange(numbered(5000)).held_out)


def test_validation_data_is_held_out_and_all_else_trains():
    found = arrange(numbered(100), numbered(20, start=1000))
    assert ids(found.training) == ids(found.calibration) == set(range(100))
    assert ids(found.held_out) == set(range(1000, 1020))


def test_the_first_calibration_examples_are_a_sample_of_all():
    ordered = numbered(4000)
    ordered = ordered.take(ordered.targets.sort().indices)  # type: ignore[union-attr]  # class after class, as in a folder
    sample = tuple(ordered.inputs), ordered.targets
    for found in (arrange(ordered), arrange(ordered, numbered(20)), arrange(sample=sample)):
        assert found.calibration is not None
        counts = found.calibration.first(300).targets.bincount(minlength=3)  # type: ignore[union-attr]
        assert counts.min() > 70
    first = arrange(ordered, seed=1).calibration, arrange(ordered, seed=1).calibration
    assert torch.equal(*(found.inputs[0] for found in first))  # type: ignore[union-attr, index]


def test_a_calibration_sample_is_never_held_out():
    x, y = torch.randn(8, 1), torch.zeros(8, dtype=torch.int64)
    found = arrange(sample=((x,), y))
    assert found.calibration is not None
    assert len(found.calibration) == 8
    assert found.training is None
    assert found.held_out is None
    held = arrange(val=numbered(5), sample=((x,), None))
    assert ids(held.held_out) == set(range(5))


def test_data_without_targets_only_scores():
    found = arrange((torch.randn(9, 1), None))
    assert found.training is None
    assert found.held_out is None
    assert found.calibration is not None


def test_no_data_at_all():
    assert arrange().calibration is None
    with pytest.raises(UsageError, match="give --data"):
        arrange(val=numbered(3))
