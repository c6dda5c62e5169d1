"""The completeness table: each parameter once, with what its statistics are like, or the reason why there are none."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfe_fx
from kfe_fx.curvature import fit
from kfe_fx.curvature.coverage import cover
from kfe_fx.frontend.capture import capture
from kfe_fx.passes.capture_curvature import CaptureCurvature
from tests.criteria.nets import NAMES, program_of


class Everything(nn.Module):
    """One parameter of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.grouped = nn.Conv1d(8, 4, 3, groups=2, padding=1)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.packed = nn.Parameter(torch.randn(6, 4))
        self.unused = nn.Parameter(torch.ones(3))
        self.counter = nn.Parameter(torch.arange(2), requires_grad=False)
        self.back = nn.Linear(3, 8)

    def forward(self, ids: Tensor) -> Tensor:
        y = self.norm(self.embed(ids))
        y = self.grouped(y.transpose(1, 2)).transpose(1, 2)
        first, second = self.packed[:3], self.packed[3:]
        return self.head(self.back(torch.tanh(y @ first.t()) + y @ second.t()))


@pytest.fixture(scope="module")
def program() -> Any:
    torch.manual_seed(0)
    return capture(Everything(), torch.zeros(2, 5, dtype=torch.long))


def test_every_parameter_stands_there_once(program: Any):
    coverage = cover(program)
    rows = {row.name: row for row in coverage.parameters}
    assert list(rows) == [name for name, _ in program.module().named_parameters(remove_duplicate=False)]
    assert rows["embed.weight"].told == "Kronecker [1, 11, 8], 2 uses"
    assert rows["head.weight"].told == "by block embed.weight (tied to embed.weight)"
    assert rows["norm.weight"].told == "diagonal"
    assert rows["grouped.weight"].told == "Kronecker [2, 2, 13]"
    assert rows["grouped.bias"].told == "by block grouped.weight (bias of)"
    assert rows["packed"].told == "2 Kronecker [1, 3, 4]"
    assert rows["packed"].blocks == ("packed[0:3]", "packed[3:6]")
    assert rows["unused"].told == "left out: never reaches an output"
    assert rows["counter"].status == "left out"
    assert coverage.entries == {"kronecker": 88 + 52 + 24 + 32, "diagonal": 16, "left out": 3 + 2}
    assert coverage.share == pytest.approx(1 - 5 / 217)
    owned = [block for row in coverage.parameters if row.owner for block in row.blocks]
    assert sorted(owned) == sorted(coverage.blocks)


def test_what_the_blocks_are_like(program: Any):
    blocks = cover(program).blocks
    assert blocks["embed.weight"].positions == 10  # five tokens looked up and five scored
    assert blocks["embed.weight"].factors() == "A 8x8, G 11x11"
    assert blocks["grouped.weight"].factors() == "2 x (A 13x13, G 2x2)"
    assert blocks["grouped.weight"].positions == 5
    assert blocks["norm.weight"].factors() == "-"
    assert {block.pace() for block in blocks.values()} == {"batched"}


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_those_that_a_fit_finds(name: str):
    program, x = program_of(name)
    coverage = cover(program)
    store = fit(program, (x, torch.tensor([0, 2, 1])), source="empirical", statistics="kfac")
    for key, block in store.blocks.items():
        told = coverage.blocks[key]
        assert (told.kind, told.shape) == (block.kind, block.shape)
        if block.kind == "kronecker":
            assert block.sums["A"].shape == told.A
            assert block.sums["G"].shape == told.G
            assert block.counts["rows"] == told.positions * block.counts["examples"]


def test_examples_that_are_mixed_are_taken_one_at_a_time():
    coverage = cover(program_of("windows")[0])
    assert {block.pace() for block in coverage.blocks.values()} == {"one at a time"}


class Half(nn.Module):
    """Batch norm over what is folded: told apart in evaluation alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


def test_taps_do_not_change_the_table():
    torch.manual_seed(0)
    program = kfe_fx.capture(Half(), torch.randn(2, 4))
    result = CaptureCurvature().run(program)
    assert cover(result.program).to_json() == cover(program).to_json()
    assert {key: result.facts[key] for key in ("entries", "covered", "parameters", "blocks")} == cover(
        program
    ).to_json()


def test_json(program: Any):
    told = json.loads(json.dumps(cover(program).to_json(), allow_nan=False))
    assert told["covered"] == pytest.approx(212 / 217)
    assert {block["block"] for block in told["blocks"]} == set(cover(program).blocks)
