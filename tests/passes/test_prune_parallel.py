"""Pruning in two processes gives the plan that one process gives, and the same weights to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfe_fx.curvature.distributed import Group
from kfe_fx.errors import UsageError
from kfe_fx.frontend.capture import capture
from kfe_fx.passes.prune import prune
from tests.processes import in_two_processes

pytestmark = pytest.mark.xdist_group("processes")

RUNS: dict[str, dict[str, Any]] = {
    "fisher": {"budget": 0.5, "metric": "macs", "epochs": 2, "rounds": 2},
    "unlabelled": {"budget": 0.5, "metric": "params", "criterion": "taylor", "epochs": 0, "unlabelled": True},
    "curvature": {"budget": 0.6, "metric": "macs", "criterion": "kron-obd", "epochs": 1, "rounds": 1, "distil": 0.5},
    "theis": {"budget": 0.4, "metric": "macs", "schedule": "theis", "epochs": 4, "rounds": 2, "repair": "none"},
    "netadapt": {"budget": 0.6, "metric": "macs", "schedule": "netadapt", "epochs": 1, "rounds": 3},
    "batch norm": {"budget": 0.35, "metric": "macs", "epochs": 4, "rounds": 3},
    "labels that count": {"budget": 0.3, "metric": "macs", "epochs": 6, "rounds": 6, "lr": 1e-2},
    "taught": {
        "budget": 0.5,
        "metric": "macs",
        "epochs": 2,
        "rounds": 2,
        "distil": 0.5,
        "features": ["up"],
        "ewc": 1.0,
    },
    "latency": {"budget": 0.7, "epochs": 0, "multiple_of": 1},
}


class Net(nn.Module):
    """A convolution and three layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv1d(2, 8, 3, padding=1), nn.Linear(8, 16)
        self.mid, self.head = nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x)).mean(2)
        return self.head(F.relu(self.mid(F.relu(self.up(y)))))


class Normed(nn.Module):
    """Batch norms over images and over rows, whose statistics are those of all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 16, 3, padding=1), nn.BatchNorm1d(16)
        self.up, self.flat, self.head = nn.Linear(16, 24), nn.BatchNorm1d(24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv(x))).mean(2)
        return self.head(F.relu(self.flat(self.up(y))))


class Tagger(nn.Module):
    """A class at each of seven positions, of which most do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mid, self.head = nn.Linear(5, 24), nn.Linear(24, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.mid(F.relu(self.up(x)))))


def tagged(count: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 7, 5, generator=g).double()
    labels = (x[..., 0] > 0).long() + 2 * (x[..., 1] > 0).long()
    length = torch.randint(1, 8, (count, 1), generator=g)
    return x, labels.masked_fill(torch.arange(7) >= length, -100)


def examples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 2, 6, generator=torch.Generator().manual_seed(seed)).double()
    return x, (x[:, 0].sum(1) > 0).long() + (x[:, 1, 0] > 0).long()


def one(name: str) -> Any:
    options = dict(RUNS[name])
    torch.manual_seed(0)
    kind = {"batch norm": Normed, "labels that count": Tagger}.get(name, Net)
    net = kind() if name == "latency" else kind().double()
    made = tagged if kind is Tagger else examples
    data, val = made(150, 1), made(60, 2)
    if name == "latency":
        data, val = (data[0].float(), data[1]), (val[0].float(), val[1])
    given: Any = data[0] if options.pop("unlabelled", False) else data
    result = prune(capture(net.eval(), data[0][:2]), data=given, val=val, batch_size=16, **options)
    return result.plan.kept, result.program.state_dict(), result.certificate.measured.get("latency")


def work(folder: Path) -> dict[str, Any]:
    found = {name: one(name) for name in RUNS}
    group = Group.current()
    found["lead"] = group.lead(lambda: group.rank + 40)
    try:
        group.lead(_refused)
    except UsageError as error:
        found["raised"] = str(error)
    return found


def _refused() -> None:
    raise UsageError("rank 0 cannot")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_two_processes(work, tmp_path_factory.mktemp("prune"))


@pytest.mark.parametrize("name", [name for name in RUNS if name != "latency"])
def test_two_processes_give_the_plan_and_the_weights_of_one(ranks: list[dict[str, Any]], name: str):
    kept, state, _ = one(name)
    assert kept
    for rank in ranks:
        assert rank[name][0] == kept
        for key, value in rank[name][1].items():
            torch.testing.assert_close(value, state[key], rtol=1e-9, atol=1e-9)


def test_rank_0_measures_for_all(ranks: list[dict[str, Any]]):
    first, second = (rank["latency"] for rank in ranks)
    assert first[0] == second[0]
    assert first[2] == second[2]
    assert all(torch.equal(value, second[1][key]) for key, value in first[1].items())


def test_what_rank_0_does_is_known_everywhere(ranks: list[dict[str, Any]]):
    assert [rank["lead"] for rank in ranks] == [40, 40]
    assert [rank["raised"] for rank in ranks] == ["rank 0 cannot"] * 2
