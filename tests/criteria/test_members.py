"""Rows and columns of blocks by unit, against the slices of each unit marked entry by entry."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn

import kfe_fx
from kfe_fx.criteria.members import COLUMNS, ROWS, Members, find_members, gathered
from kfe_fx.curvature import find_blocks
from kfe_fx.labels.analysis import Analysis, analyze
from kfe_fx.program import Program
from tests.criteria.nets import NAMES, program_of
from tests.random_nets import Case, nets, sample_net


def owned(members: Members, units: int) -> np.ndarray:
    """Mark the entries that members say each unit owns, [units, K, o, i] without the column of the bias."""
    groups, high, wide = members.block.shape
    marks = np.zeros((units, groups, high, wide), dtype=bool)
    for side in (ROWS, COLUMNS):
        for sets in members.sets(side):
            for group, lines, unit in zip(sets.groups, sets.lines, sets.units, strict=True):
                if side == ROWS:
                    marks[unit, group, lines] = True
                else:
                    marks[unit, group][:, lines] = True
    for ids in members.carried:
        for group, unit in enumerate(ids):
            if unit >= 0:
                marks[unit, group] = True
    return marks[..., : wide - (members.block.bias is not None)]


def check(program: Program) -> tuple[Analysis, list[Members]]:
    """Compare every block with the slices of all units; return what was compared."""
    analysis = analyze(program)
    found = find_members(program, analysis)
    assert len(found) == sum(b.kind == "kronecker" and "eval" in b.uses for b in find_blocks(program).blocks)
    for members in found:
        name = program.names_of(members.block.weight)[0]
        marks = owned(members, len(analysis.units))
        for unit in analysis.units:
            mask = torch.zeros(program.tensor(name).shape, dtype=torch.int64)
            for dim, indices in unit.slices.get(name, {}).items():
                mask.index_fill_(dim, torch.tensor(indices), 1)
            expected = gathered(members.block, mask).numpy().astype(bool)
            np.testing.assert_array_equal(marks[unit.id], expected, err_msg=f"{members.block.name}, unit {unit.id}")
    check_made(analysis, found)
    return analysis, found


def made_by(found: list[Members]) -> dict[int, set[str]]:
    """Return by unit the weights that make it."""
    made: dict[int, set[str]] = {}
    for members in found:
        for side in members.outputs:
            for sets in members.sets(side):
                for unit in sets.units.tolist():
                    made.setdefault(unit, set()).add(members.block.weight)
    return made


def check_made(analysis: Analysis, found: list[Members]) -> None:
    """Compare which weights make a unit with where the analysis says that it enters the activations."""
    made, known = made_by(found), {members.block.weight for members in found}
    for site in analysis.sites:
        weight = None if site.parameter is None else analysis.program.names_of(site.parameter[0])[0]
        if weight in known:
            for unit in np.unique(site.units[site.units >= 0]).tolist():
                assert weight in made[unit], (weight, unit)


@pytest.mark.parametrize("name", NAMES)
def test_networks_of_every_layout(name: str) -> None:
    analysis, found = check(program_of(name)[0])
    assert set(made_by(found)) == {unit.id for unit in analysis.units}


@pytest.mark.parametrize("seed", range(12))
def test_random_networks(seed: int) -> None:
    case = sample_net(70_000 + seed, max_blocks=2)
    check(kfe_fx.capture(case.module, case.inputs))


@settings(max_examples=5)
@given(
    case=nets(
        max_blocks=1, families=["grouped-conv", "transposed-conv", "recurrent", "attention-packed", "tied-transpose"]
    )
)
def test_drawn_networks(case: Case) -> None:
    check(kfe_fx.capture(case.module, case.inputs))


def of(module: nn.Module, *inputs: Any) -> dict[str, Members]:
    program = kfe_fx.capture(module.double().eval(), inputs)
    return {members.block.name: members for members in check(program)[1]}


def units_of(members: Members, side: str) -> dict[int, int]:
    """Return how many lines of a side each unit owns."""
    found: dict[int, int] = {}
    for sets in members.sets(side):
        for unit in sets.units.tolist():
            found[unit] = found.get(unit, 0) + sets.lines.shape[1]
    return found


def test_a_depthwise_convolution_carries_units_and_makes_none() -> None:
    for width in (1, 2):  # outputs of each group
        module = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6 * width, 3, groups=6), nn.Conv2d(6 * width, 2, 1))
        found = of(module, torch.randn(2, 3, 5, 5).double())
        assert not units_of(found["1.weight"], ROWS)
        assert not units_of(found["1.weight"], COLUMNS)
        (ids,) = found["1.weight"].carried
        assert sorted(ids) == list(range(6))
        assert set(units_of(found["0.weight"], ROWS)) == set(range(6))
        assert units_of(found["2.weight"], COLUMNS) == dict.fromkeys(range(6), width)


def test_embeddings_and_transposed_convolutions_make_their_columns() -> None:
    found = of(nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3)), torch.randint(0, 7, (2, 5)))
    assert found["0.weight"].outputs == {COLUMNS}
    assert units_of(found["0.weight"], COLUMNS) == dict.fromkeys(range(4), 1)
    module = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.ReLU(), nn.ConvTranspose2d(4, 2, 3))
    found = of(module, torch.randn(2, 3, 4, 4).double())
    assert units_of(found["0.weight"], COLUMNS) == dict.fromkeys(range(4), 4)  # kernel positions
    assert units_of(found["2.weight"], ROWS) == dict.fromkeys(range(4), 1)
    assert found["2.weight"].inputs == {ROWS}


class Tied(nn.Module):
    """An autoencoder whose decoder is its encoder transposed, and a layer of the same width in between."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.inner = nn.Linear(5, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.encoder(x))
        return F.linear(y + self.inner(y), self.encoder.weight.t())


def test_a_tied_weight_makes_and_reads_along_both_sides() -> None:
    found = of(Tied(), torch.randn(2, 5).double())
    assert found["encoder.weight"].outputs == found["encoder.weight"].inputs == {ROWS, COLUMNS}
    inner = found["inner.weight"]
    assert units_of(inner, ROWS) == units_of(inner, COLUMNS) == dict.fromkeys(range(4), 1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def test_recurrent_units_have_a_row_of_every_gate_and_a_recurrent_column() -> None:
    found = of(Recurrent(), torch.randn(2, 5, 3).double())
    gates = dict.fromkeys(range(4), 4)
    assert units_of(found["lstm.weight_ih_l0"], ROWS) == units_of(found["lstm.weight_hh_l0"], ROWS) == gates
    assert units_of(found["lstm.weight_hh_l0"], COLUMNS) == dict.fromkeys(range(4), 1)
    assert not units_of(found["lstm.weight_ih_l0"], COLUMNS)


def test_heads_own_rows_of_queries_keys_and_values() -> None:
    program, _ = program_of("attention")
    found = {members.block.weight: members for members in check(program)[1]}
    assert sorted(units_of(found["qkv.weight"], ROWS).values()) == [12, 12]  # 3 times a head of 4
    assert sorted(units_of(found["out.weight"], COLUMNS).values()) == [4, 4]
