"""Training in two processes is training in one, to rounding: shares, averaged gradients, best state, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfe_fx
from kfe_fx.curvature.distributed import Group
from kfe_fx.errors import UsageError
from kfe_fx.frontend.capture import capture
from kfe_fx.program import Program
from kfe_fx.training.batches import Batch, Batches
from kfe_fx.training.parallel import average_gradients, check_shared, share_of
from tests.processes import in_two_processes

pytestmark = pytest.mark.xdist_group("processes")  # one worker: the processes run once, and not four at a time

EXAMPLES = 75  # batches of 16 and, with what is held out, an odd last one


class Net(nn.Module):
    """Shared positions, an unused parameter, no batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 4, 3), nn.LayerNorm(4)
        self.last = nn.Linear(4, 3)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(torch.relu(self.conv(x)).mean(2)))


class Normed(nn.Module):
    """A batch norm and dropout: processes differ in what they drop."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(10, 6), nn.BatchNorm1d(6), nn.Dropout(dropout)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(torch.relu(self.norm(self.first(x.flatten(1))))))


class Spread(nn.Module):
    """Batch norms: over positions, without weights, of a rank's only example; no dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4, momentum=0.3)
        self.plain, self.last = nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.plain(torch.relu(self.norm(self.conv(x)))).mean(2))


def program(kind: type[nn.Module] = Net) -> Program:
    torch.manual_seed(0)
    return capture(kind().double(), torch.randn(2, 2, 5).double())


def data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(EXAMPLES, 2, 5, generator=g).double()
    return x, (x[:, 0].sum(1) > 0).long() + (x[:, 1, 0] > 0).long()


OPTIMIZERS = ("adamw", "sgd", "ekfac", "kfac")


def trained(**options: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    made = program(options.pop("kind", Net))
    settings = {"epochs": 3, "batch_size": 17, "seed": 2, "threads": 1} | options
    facts = kfe_fx.train(made, data(), **settings)
    return facts, dict(made.state_dict())


class Entropy(nn.CrossEntropyLoss):
    """Torch's own, a mean over the labels that count, of scores with their classes last."""

    def forward(self, input: Any, target: Tensor) -> Tensor:
        return super().forward(input[0].movedim(-1, 1), target)


class Tagger(nn.Module):
    """A class at each position, and what all positions add up to."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head, self.side = nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.tanh(self.up(x))
        return self.head(y), self.side(y.sum(1))


TAGGED: dict[str, dict[str, Any]] = {
    "by name": {},
    "torch's": {"loss": Entropy()},
    "one by one": {"loss": Entropy(), "batch_size": 3, "epochs": 1},  # a rank may have no label that counts
    "taught": {"distil": 0.5},
}


def tagged(loss: Any = None, **options: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Train on positions of which most do not count, some examples having none that does."""
    g = torch.Generator().manual_seed(1)
    x, labels = torch.randn(EXAMPLES, 7, 5, generator=g).double(), torch.randint(3, (EXAMPLES, 7), generator=g)
    labels = labels.masked_fill(torch.arange(7) >= torch.randint(0, 8, (EXAMPLES, 1), generator=g), -100)
    labels[1::3, 0] = 1  # no batch has none
    made, teacher = (seeded(Tagger, x[:2], seed) for seed in (0, 1))
    settings = {"epochs": 3, "batch_size": 17, "seed": 2, "threads": 1, "optimizer": "sgd", "lr": 0.05} | options
    if "distil" in options:
        settings["teacher"] = teacher
    facts = kfe_fx.train(made, (x, labels), loss=loss, **settings)
    return facts, dict(made.state_dict())


def seeded(kind: type[nn.Module], x: Tensor, seed: int) -> Program:
    torch.manual_seed(seed)
    return capture(kind().double(), x)


class Interrupted(Exception):
    pass


def interrupted(place: Path) -> None:
    """Stop a run in its third epoch."""

    def watch(stage: str, done: float | None) -> None:
        if done is not None and done > 0.7:
            raise Interrupted

    try:
        trained(kind=Normed, optimizer="sgd", checkpoint=place, progress=watch)
    except Interrupted:
        return
    raise AssertionError("the run was not interrupted")


def work(folder: Path) -> dict[str, Any]:
    """What each of two processes does."""
    found: dict[str, Any] = {name: trained(optimizer=name) for name in OPTIMIZERS}
    for name in ("sgd", "ekfac"):  # rank 1 has nothing to do
        found[f"{name} one by one"] = trained(optimizer=name, batch_size=1, epochs=1)
    for name in ("sgd", "adamw", "ekfac"):
        found[f"spread {name}"] = trained(kind=Spread, optimizer=name)
    found["spread odd"] = trained(kind=Spread, optimizer="sgd", batch_size=3, epochs=1)  # shares of 2 and 1
    found["spread one by one"] = trained(kind=Spread, optimizer="sgd", batch_size=1, epochs=1)
    found["normed"] = trained(kind=Normed, optimizer="sgd")
    found["gates"] = trained(optimizer="adamw", l0=1.0)
    found |= {f"tagged {name}": tagged(**options) for name, options in TAGGED.items()}
    place = folder / "run.checkpoint"
    interrupted(place)
    found["resumed"] = trained(kind=Normed, optimizer="sgd", checkpoint=place, resume=True)
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two processes found."""
    return in_two_processes(work, tmp_path_factory.mktemp("processes"))


def close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_processes_train_as_one(both: list[dict[str, Any]], name: str):
    facts, state = trained(optimizer=name)
    before = program().state_dict()
    assert any(not torch.equal(value, state[key]) for key, value in before.items())
    for shared_facts, shared in (found[name] for found in both):
        close(shared, state, 1e-9)
        assert shared_facts["epoch_losses"] == pytest.approx(facts["epoch_losses"], rel=1e-9)
        assert shared_facts["judged"] == facts["judged"]
        assert shared_facts["processes"] == 2
        assert shared_facts["best_epoch"] == facts["best_epoch"]


def test_gates_are_drawn_as_in_one_process(both: list[dict[str, Any]]):
    facts, state = trained(optimizer="adamw", l0=1.0)
    for shared_facts, shared in (found["gates"] for found in both):
        close(shared, state, 1e-9)
        assert shared_facts["epoch_losses"] == pytest.approx(facts["epoch_losses"], rel=1e-9)


@pytest.mark.parametrize("name", TAGGED)
def test_shares_weigh_by_their_labels_that_count(both: list[dict[str, Any]], name: str):
    facts, state = tagged(**TAGGED[name])
    for shared_facts, shared in (found[f"tagged {name}"] for found in both):
        close(shared, state, 1e-9)
        assert shared_facts["epoch_losses"] == pytest.approx(facts["epoch_losses"], rel=1e-9)


@pytest.mark.parametrize("name", ["sgd", "ekfac"])
def test_a_process_may_have_nothing_to_do(both: list[dict[str, Any]], name: str):
    _, state = trained(optimizer=name, batch_size=1, epochs=1)
    for found in both:
        close(found[f"{name} one by one"][1], state, 1e-8)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("spread sgd", {"optimizer": "sgd"}),
        ("spread adamw", {"optimizer": "adamw"}),
        ("spread odd", {"optimizer": "sgd", "batch_size": 3, "epochs": 1}),
        ("spread one by one", {"optimizer": "sgd", "batch_size": 1, "epochs": 1}),
    ],
)
def test_batch_norms_see_the_whole_batch(both: list[dict[str, Any]], name: str, options: dict[str, Any]):
    facts, state = trained(kind=Spread, **options)
    for found in both:
        shared_facts, shared = found[name]
        close(shared, state, 1e-8)
        assert shared_facts["epoch_losses"] == pytest.approx(facts["epoch_losses"], rel=1e-8)
        assert not any("normalised" in note for note in shared_facts["notes"])


def test_curvature_of_coupled_examples_is_that_of_the_shares_and_that_is_said(both: list[dict[str, Any]]):
    facts, state = both[0]["spread ekfac"]
    assert any(note.endswith("not by examples, of each process's share") for note in facts["notes"])
    assert any(note.endswith("not by examples") for note in trained(kind=Spread, optimizer="ekfac")[0]["notes"])
    close(both[1]["spread ekfac"][1], state, 0.0)


def test_every_rank_ends_with_the_same_weights_and_statistics(both: list[dict[str, Any]]):
    facts, state = both[0]["normed"]
    assert both[1]["normed"][0] == facts
    for name, value in both[1]["normed"][1].items():
        assert torch.equal(value, state[name]), name


def test_resumed_in_two_processes_to_the_bit(both: list[dict[str, Any]]):
    for found in both:
        facts, state = found["resumed"]
        assert facts["resumed"] == 2
        for name, value in found["normed"][1].items():
            assert torch.equal(value, state[name]), name


def test_shares_are_a_partition():
    for count in range(8):
        x = torch.arange(count).float()
        parts = [share_of(Batch([x], x, count), Group(rank, 3)) for rank in range(3)]
        assert sum(part.count for part in parts) == count
        assert torch.equal(torch.cat([part.inputs[0] for part in parts]), x)
        assert parts[0].count == -(-count // 3)
    batch = Batch([torch.ones(3)], None, 3)
    assert share_of(batch, Group()) is batch


def test_what_cannot_be_shared():
    made = program()
    check_shared(Batches(made, [data()], 4), Group())
    with pytest.raises(UsageError, match="in one order"):
        check_shared(Batches(made, [data()], 4), Group(0, 2))
    check_shared(Batches(made, data(), 4), Group(0, 2))
    pinned = capture(nn.Linear(3, 2), torch.randn(4, 3), {})
    with pytest.raises(UsageError, match="pins its batch at 4"):
        check_shared(Batches(pinned, (torch.randn(8, 3), torch.zeros(8).long())), Group(0, 2))


def test_one_process_averages_nothing():
    parameter = nn.Parameter(torch.ones(2))
    average_gradients([parameter], 0.5, Group())
    assert parameter.grad is None
