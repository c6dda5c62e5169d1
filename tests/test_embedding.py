"""Between a shrunk network and the original: tensors, indices and scores, against element-by-element loops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kfe_fx.embedding import embed, lift_scores, relative
from kfe_fx.frontend.capture import capture
from kfe_fx.labels.analysis import Analysis, analyze
from kfe_fx.passes.shrink import Shrink
from kfe_fx.plan import Plan
from kfe_fx.program import Program, named_tensors


class Net(nn.Module):
    """A residual stream of 4 channels under one norm, a hidden layer of 5, a matrix used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.up, self.down = nn.Conv2d(4, 5, 1), nn.Conv2d(5, 4, 1)
        self.again = nn.Conv2d(4, 5, 1)
        self.again.weight = self.up.weight
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        x = x + self.down(torch.relu(self.up(x)))
        return self.head(x + self.down(torch.relu(self.again(x))))


@pytest.fixture(scope="module")
def original() -> Program:
    torch.manual_seed(0)
    return capture(Net().double().eval(), torch.randn(2, 3, 2, 2, dtype=torch.float64))


@pytest.fixture(scope="module")
def analysis(original: Program) -> Analysis:
    return analyze(original)


def at(analysis: Analysis, name: str, *indices: int) -> set[int]:
    return {unit.id for unit in analysis.units for i in indices if i in unit.slices.get(name, {}).get(0, ())}


def kept_index(kept: dict[str, list[tuple[int, list[int]]]], name: str, dim: int, size: int) -> list[int]:
    return next((indices for at_dim, indices in kept.get(name, []) if at_dim == dim), list(range(size)))


def test_embedding_puts_every_kept_element_back(original: Program, analysis: Analysis) -> None:
    plan = Plan.of_units(analysis, at(analysis, "stem.weight", 1) | at(analysis, "up.weight", 0, 3))
    small = Shrink(plan).run(original).program
    with torch.no_grad():
        for value in {id(v): v for v in named_tensors(small.module()).values()}.values():
            value.add_(1)
    before = {name: value.clone() for name, value in named_tensors(original.module()).items()}
    full = named_tensors(embed(original, small, plan.kept).module())
    for name, old in before.items():
        shape, inside = old.shape, named_tensors(small.module())[name]
        lines = [kept_index(plan.kept, name, dim, size) for dim, size in enumerate(shape)]
        for place in itertools.product(*(range(size) for size in shape)):
            stays = all(index in line for index, line in zip(place, lines, strict=True))
            wanted = old[place]
            if stays:
                wanted = inside[tuple(line.index(index) for index, line in zip(place, lines, strict=True))]
            assert full[name][place] == wanted, (name, place)
    for name, value in named_tensors(original.module()).items():
        assert torch.equal(value, before[name]), f"{name} of the original was touched"


def test_embedding_keeps_ties_and_graphs(original: Program, analysis: Analysis) -> None:
    plan = Plan.of_units(analysis, at(analysis, "up.weight", 2))
    full = embed(original, Shrink(plan).run(original).program, plan.kept)
    assert full.tensor("again.weight") is full.tensor("up.weight")
    assert full.tensor("up.weight") is not original.tensor("up.weight")
    assert full.hash() == original.hash()


def test_embedding_back_and_cutting_again_is_the_same_network(original: Program, analysis: Analysis) -> None:
    plan = Plan.of_units(analysis, at(analysis, "stem.weight", 0, 2) | at(analysis, "up.weight", 4))
    small = Shrink(plan).run(original).program
    with torch.no_grad():
        small.tensor("up.weight").mul_(3)
    again = Shrink(plan).run(embed(original, small, plan.kept)).program
    assert again.hash() == small.hash()
    for name, value in small.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_relative_indices_lead_from_the_first_removal_to_the_second(original: Program, analysis: Analysis) -> None:
    first = at(analysis, "stem.weight", 1) | at(analysis, "up.weight", 0)
    second = first | at(analysis, "stem.weight", 3) | at(analysis, "up.weight", 3)
    before, after = (Plan.of_units(analysis, removed) for removed in (first, second))
    step = Plan(relative(before.kept, after.kept))
    assert dict(step.kept)["stem.weight"] == [(0, [0, 1])]  # 0 and 2 of [0, 2, 3]
    assert dict(step.kept)["up.weight"] == [(0, [0, 1, 3]), (1, [0, 1])]  # 1, 2, 4 of [1, 2, 3, 4]
    halfway = Shrink(before).run(original).program
    in_two, at_once = Shrink(step).run(halfway).program, Shrink(after).run(original).program
    assert in_two.state_dict().keys() == at_once.state_dict().keys()
    for name, value in at_once.state_dict().items():
        assert torch.equal(in_two.state_dict()[name], value), name


def test_relative_indices_leave_out_what_did_not_change_again() -> None:
    before = {"a": [(0, [0, 2])], "b": [(1, [1])]}
    after = {"a": [(0, [2]), (1, [0])], "b": [(1, [1])], "c": [(0, [3, 4])]}
    assert relative(before, after) == {"a": [(0, [1]), (1, [0])], "c": [(0, [3, 4])]}
    assert relative({}, after) == after
    assert relative(after, after) == {}


def test_scores_return_to_the_units_they_came_from(original: Program, analysis: Analysis) -> None:
    plan = Plan.of_units(analysis, at(analysis, "stem.weight", 1) | at(analysis, "up.weight", 0, 3))
    small = analyze(Shrink(plan).run(original).program)
    scores = np.zeros(len(small.units))
    wanted = {"stem.weight": [10.0, 0.0, 12.0, 13.0], "up.weight": [0.0, 1.0, 2.0, 0.0, 4.0]}
    for name, line in wanted.items():
        left = [value for value in line if value]
        for place, value in enumerate(left):
            (unit,) = at(small, name, place)
            scores[unit] = value
    lifted = lift_scores(analysis, small, scores, plan.kept)
    for name, line in wanted.items():
        assert [lifted[next(iter(at(analysis, name, place)))] for place in range(len(line))] == line


class Heads(nn.Module):
    """One linear layer whose outputs the original takes as single units, or as two pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


class Pairs(Heads):
    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).reshape(-1, 2, 2)
        return self.down((y * y.sum(2, keepdim=True)).reshape(-1, 4))


def test_a_score_is_shared_by_the_units_that_it_joins_and_summed_over_the_parts() -> None:
    x = torch.randn(2, 3)
    single, pairs = analyze(capture(Heads(), x)), analyze(capture(Pairs(), x))
    assert [unit.slices["up.weight"][0] for unit in single.units] == [(0,), (1,), (2,), (3,)]
    assert [unit.slices["up.weight"][0] for unit in pairs.units] == [(0, 2), (1, 3)]
    # coarse scores on fine units: each half
    assert lift_scores(single, pairs, np.array([8.0, 2.0]), {}).tolist() == [4.0, 1.0, 4.0, 1.0]
    # fine scores on coarse units: the sum of the parts
    assert lift_scores(pairs, single, np.array([1.0, 2.0, 4.0, 8.0]), {}).tolist() == [5.0, 10.0]
