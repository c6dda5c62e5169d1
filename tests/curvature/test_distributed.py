"""Statistics measured in two processes are those of one, to rounding, on every rank."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfe_fx.curvature import Store, fit
from kfe_fx.curvature.distributed import Group, known_facts, launched
from kfe_fx.curvature.fisher_rao import fisher_rao_norm
from kfe_fx.errors import BadData
from kfe_fx.frontend.capture import capture
from kfe_fx.program import Program
from tests.processes import in_two_processes

pytestmark = pytest.mark.xdist_group("processes")  # one worker: the processes run once, and not four at a time


class Net(nn.Module):
    """One-hot rows, shared positions, a diagonal, and a parameter that is never reached."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(5, 4), nn.LayerNorm(4)
        self.mix, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(torch.tanh(self.mix(self.norm(self.embed(ids)))).mean(1))


def program() -> Program:
    torch.manual_seed(0)
    return capture(Net().double(), torch.zeros(2, 4, dtype=torch.long))


def data(count: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randint(5, (count, 4), generator=g), torch.randint(3, (count,), generator=g)


def broken(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss whose gradient is not finite for the examples of class 2."""
    made = outputs[:, 0].clone()
    made[targets == 2] = (outputs[targets == 2, 0] * 0).sqrt()
    return made


LEFT = """
import os, sys, weakref
import torch.distributed as dist
from kfe_fx.curvature.distributed import joined
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
with joined(init_method="file://" + sys.argv[1], rank=0, world_size=1):
    group = weakref.ref(dist.group.WORLD)
    from torch._subclasses import FakeTensorMode
    FakeTensorMode()  # as torch.export does
print("held" if group() is not None else "gone")
"""

CASES: dict[str, dict[str, Any]] = {
    "empirical": {"source": "empirical", "statistics": ("diagonal", "kfac", "ekfac")},
    "exact": {"source": "exact"},
    "sampled": {"source": "sampled", "samples": 2},
    "reduce": {"source": "auto", "sharing": "reduce"},
    "one batch": {"source": "auto", "statistics": ("diagonal", "ekfac"), "batch_size": 100},  # none for rank 1
    "not finite": {"source": "empirical", "loss": broken, "batch_size": 2, "statistics": "diagonal"},
}


def fitted(name: str) -> Store:
    options = {"batch_size": 7} | CASES[name]
    return fit(program(), data(24), options.pop("loss", None), **options)


def work(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {name: fitted(name) for name in CASES}
    found["norm"] = fisher_rao_norm(program(), data(24), source="exact", batch_size=7)
    try:
        fit(program(), [])
    except BadData as error:
        found["empty"] = str(error)
    rank = Group.current().rank
    found["facts"] = known_facts({"mine": rank} | ({"source": "exact"} if rank == 0 else {}))
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two processes found."""
    return in_two_processes(work, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_measure_as_one(both: list[dict[str, Any]], name: str):
    alone = fitted(name)
    for shared in (found[name] for found in both):
        assert shared.blocks.keys() == alone.blocks.keys()
        assert (shared.graph, shared.weights) == (alone.graph, alone.weights)
        assert shared.facts == alone.facts
        for key, block in alone.blocks.items():
            theirs = shared.blocks[key]
            assert theirs.counts == block.counts
            assert theirs.sums.keys() == block.sums.keys()
            assert theirs.basis.keys() == block.basis.keys()
            for sums, value in block.sums.items():
                if sums != "S":  # in a basis that may differ in signs and degenerate directions
                    torch.testing.assert_close(theirs.sums[sums], value, rtol=1e-11, atol=1e-11)
            for side in block.basis:
                if side.startswith("lam"):
                    torch.testing.assert_close(theirs.basis[side], block.basis[side], rtol=1e-9, atol=1e-9)
            if block.S is not None and theirs.S is not None:
                torch.testing.assert_close(theirs.S.sum(), block.S.sum(), rtol=1e-11, atol=0)


def test_both_ranks_hold_the_same(both: list[dict[str, Any]]):
    for name in CASES:
        one, other = (found[name] for found in both)
        for key, block in one.blocks.items():
            for held, theirs in ((block.sums, other.blocks[key].sums), (block.basis, other.blocks[key].basis)):
                assert held.keys() == theirs.keys()
                assert all(torch.equal(value, theirs[part]) for part, value in held.items())


def test_the_operators_are_the_same(both: list[dict[str, Any]]):
    alone = fitted("exact")
    for key, block in alone.blocks.items():
        for shared in (found["exact"].blocks[key] for found in both):
            if block.kind == "kronecker":
                torch.testing.assert_close(whole(shared), whole(block), rtol=1e-9, atol=1e-9)


def whole(block: Any) -> Tensor:
    """Q diag(S) Q^T of the first group, dense."""
    identity = torch.eye
    left = block.basis["U_G"][0] if "U_G" in block.basis else identity(block.shape[1], dtype=torch.float64)
    right = block.basis["U_A"][0] if "U_A" in block.basis else identity(block.shape[2], dtype=torch.float64)
    Q = torch.kron(left, right)
    return Q @ torch.diag(block.S[0].reshape(-1)) @ Q.T


def test_the_fisher_rao_norm_is_the_same(both: list[dict[str, Any]]):
    alone = fisher_rao_norm(program(), data(24), source="exact", batch_size=7)
    for shared in (found["norm"] for found in both):
        assert shared.squared == pytest.approx(alone.squared, rel=1e-12)
        assert shared.examples == 24


def test_every_rank_says_what_is_wrong(both: list[dict[str, Any]]):
    assert all("no batches" in found["empty"] for found in both)


def test_facts_that_one_rank_alone_knows(both: list[dict[str, Any]]):
    assert [found["facts"] for found in both] == [{"mine": rank, "source": "exact"} for rank in (0, 1)]


def test_one_process_is_a_group_of_its_own():
    group = Group.current()
    value = torch.ones(2)
    group.sum([value])
    group.share(value, 0)
    assert (group.rank, group.size, group.sum_number(3.0), group.gather("x")) == (0, 1, 3.0, ["x"])
    assert torch.equal(value, torch.ones(2))
    with launched() as joined:
        assert joined == group


def test_no_group_outlives_its_block(tmp_path: Path):
    """Its threads would run while the interpreter ends, and abort the process."""
    command = [sys.executable, "-c", LEFT, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "gone"
