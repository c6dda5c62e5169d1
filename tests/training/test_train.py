"""Training: the loss falls, the best weights are kept, a resumed run ends at the same bits, errors in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfe_fx
from kfe_fx.data.dataset import ArrayData
from kfe_fx.errors import BadData, BadFile, UsageError
from kfe_fx.frontend.capture import capture
from kfe_fx.program import Program
from kfe_fx.training.metrics import ACCURACY, evaluate

OPTIMIZERS = ("ekfac", "kfac", "adamw", "sgd")


class Net(nn.Module):
    """A batch norm, dropout, a buffer that no state dict holds, and a parameter that nothing reads."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.2)
        self.last = nn.Linear(16, 3)
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("scale", torch.ones(16), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.scale * self.drop(torch.relu(self.norm(self.first(x)))))


@pytest.fixture(scope="module")
def captured() -> Program:
    torch.manual_seed(0)
    return capture(Net(), torch.randn(2, 6))


@pytest.fixture
def program(captured: Program) -> Program:
    return captured.copy()


def examples(count: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


SETTINGS: dict[str, Any] = {"epochs": 4, "batch_size": 32, "seed": 5, "threads": 1}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_accuracy_rises_and_the_best_epoch_is_kept(program: Program, optimizer: str):
    held = ArrayData(*[(part,) if part.dim() > 1 else part for part in examples(400, seed=9)])  # type: ignore[arg-type]
    before = evaluate(program, held, ACCURACY)
    seen: list[float | None] = []
    rate = 0.1 if optimizer == "sgd" else 0.03
    facts = kfe_fx.train(
        program, examples(), optimizer=optimizer, epochs=12, lr=rate, val=held, threads=1,
        progress=lambda stage, done: seen.append(done),
    )  # fmt: skip
    assert not program.module().training
    assert program.module()._observer is None  # whoever watched has left
    assert max(facts["judged"]) > max(before, 0.7)
    assert facts["judged"][facts["best_epoch"] - 1] == max(facts["judged"])
    assert evaluate(program, held, ACCURACY) == pytest.approx(max(facts["judged"]))
    assert facts["last_loss"] < facts["first_loss"]
    assert len(facts["epoch_losses"]) == facts["epochs"] == 12
    assert (facts["optimizer"], facts["loss"], facts["processes"], facts["resumed"]) == (
        optimizer,
        "cross-entropy",
        1,
        None,
    )
    assert seen[-1] == 1.0


def test_a_seeded_fifth_is_held_out_of_arrays(program: Program):
    facts = kfe_fx.train(program, examples(), optimizer="sgd", **SETTINGS)
    assert facts["data"] == "data: 160 to train on, 40 held out (seed 5)"
    assert facts["steps"] == 4 * 5
    assert facts["metric"] == "accuracy"
    other = kfe_fx.train(program, examples(), optimizer="sgd", val=False, **SETTINGS)
    assert "nothing held out" in other["data"]
    assert other["best_epoch"] is None
    assert other["steps"] == 4 * 6
    batches = [(part, target) for part, target in zip(*(one.split(20) for one in examples()), strict=True)]
    assert "nothing held out" in kfe_fx.train(program, batches, optimizer="sgd", **SETTINGS)["data"]


class Interrupted(Exception):
    pass


def interrupt_at(share: float) -> Any:
    def watch(stage: str, done: float | None) -> None:
        if done is not None and done > share:
            raise Interrupted

    return watch


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_ends_at_the_same_bits(captured: Program, tmp_path: Path, optimizer: str):
    whole, place = captured.copy(), tmp_path / "run.checkpoint"
    facts = kfe_fx.train(whole, examples(), optimizer=optimizer, **SETTINGS)
    for resume, share in ((False, 0.3), (True, 0.6)):  # killed in the second epoch, then in the third
        with pytest.raises(Interrupted):
            kfe_fx.train(
                captured.copy(), examples(), optimizer=optimizer, checkpoint=place, resume=resume,
                progress=interrupt_at(share), **SETTINGS,
            )  # fmt: skip
    again = captured.copy()
    noise = torch.get_rng_state()
    options = SETTINGS | {"threads": None}  # taken from the checkpoint
    resumed = kfe_fx.train(again, examples(), optimizer=optimizer, checkpoint=place, resume=True, **options)
    assert torch.equal(noise, torch.get_rng_state())
    assert resumed["resumed"] == 2
    assert resumed | {"resumed": None} == facts
    assert same(dict(again.state_dict()), dict(whole.state_dict()))


def test_a_checkpoint_is_of_one_run(captured: Program, tmp_path: Path):
    place = tmp_path / "run.checkpoint"
    kfe_fx.train(captured.copy(), examples(), optimizer="sgd", checkpoint=place, **SETTINGS)
    trained = captured.copy()
    with torch.no_grad():
        trained.tensor("last.bias")[0] += 1
    torch.manual_seed(0)
    other = capture(nn.Sequential(nn.Linear(6, 3), nn.ReLU()), torch.randn(2, 6))
    for program, data, options, told in (
        (trained, examples(), {}, "started from another network"),
        (other, examples(), {}, "started from another network"),
        (captured, examples(seed=1), {}, "trained on other data"),
        (captured, examples(), {"lr": 0.5}, "has lr 0.01, not 0.5"),
        (captured, examples(), {"epochs": 5}, "has steps 20, not 25"),
        (captured, examples(), {"optimizer": "adamw"}, "has optimizer sgd, not adamw"),
        (captured, examples(), {"schedule": "constant"}, "has schedule cosine, not constant"),
    ):
        copied = program.copy()
        with pytest.raises(UsageError, match=told) as caught:
            kfe_fx.train(copied, data, checkpoint=place, resume=True, **{"optimizer": "sgd"} | SETTINGS | options)
        assert "\n" not in str(caught.value)
        assert same(dict(copied.state_dict()), dict(program.state_dict()))
    # a finished one is at its end
    facts = kfe_fx.train(captured.copy(), examples(), optimizer="sgd", checkpoint=place, resume=True, **SETTINGS)
    assert facts["resumed"] == facts["epochs"] == 4


def test_no_checkpoint(program: Program, tmp_path: Path):
    with pytest.raises(BadFile, match="no checkpoint to go on from"):
        kfe_fx.train(program, examples(), checkpoint=tmp_path / "gone", resume=True)
    with pytest.raises(UsageError, match="say which file"):
        kfe_fx.train(program, examples(), resume=True)


def test_a_loss_that_is_not_finite(program: Program):
    with pytest.raises(UsageError, match=r"at step \d+ of 40; lower --lr \(now 1e\+25\)$") as caught:
        kfe_fx.train(program, examples(), lambda o, t: (o**2).mean(), optimizer="sgd", lr=1e25, steps=40)
    assert "\n" not in str(caught.value)
    assert not program.module().training
    x, y = examples()
    with pytest.raises(BadData, match="is nan on a batch"):
        kfe_fx.train(program, (x, y), lambda o, t: (o * float("nan")).mean(), optimizer="sgd")
    with pytest.raises(BadData, match="200 of 200 examples"):
        kfe_fx.train(program, (torch.full_like(x, float("nan")), y), optimizer="sgd")


def test_curvature_that_blows_up_names_the_damping(program: Program):
    calls = iter(range(100))

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs**2).mean() * (float("nan") if next(calls) > 9 else 1.0)

    told = r"at step \d+ of 40; lower --lr \(now 0.1\), or raise --damping \(now 0.2\)"
    with pytest.raises(UsageError, match=told):
        kfe_fx.train(program, examples(), loss, optimizer="ekfac", lr=0.1, damping=0.2, steps=40)
    assert program.module()._observer is None


def test_options_that_mean_nothing(program: Program):
    for options, told in (
        ({"epochs": 1, "steps": 1}, "not both"),
        ({"schedule": "linear"}, "no schedule"),
        ({"optimizer": "lion"}, "no optimizer"),
        ({"optimizer": "sgd", "damping": 0.1}, "sgd takes no damping"),
    ):
        with pytest.raises(UsageError, match=told):
            kfe_fx.train(program, examples(), **options)
    with pytest.raises(BadData, match="needs targets"):
        kfe_fx.train(program, (torch.randn(4, 6), None))
    with pytest.raises(BadData, match="no targets to know the best epoch by"):
        kfe_fx.train(program, examples(), val=(torch.randn(4, 6), None))
    with pytest.raises(BadData, match="the network reads"):
        kfe_fx.train(program, (torch.randn(4, 5), torch.zeros(4).long()))
    with pytest.raises(BadData, match="label 3"):
        kfe_fx.train(program, (torch.randn(4, 6), torch.full((4,), 3)))


def test_what_curvature_leaves_out_is_said(program: Program):
    notes = kfe_fx.train(program, examples(), optimizer="ekfac", steps=2)["notes"]
    assert any("unused" in note and "AdamW" in note for note in notes)
    assert any("batch norm couples the examples" in note for note in notes)
    assert kfe_fx.train(program, examples(), optimizer="adamw", steps=2)["notes"] == []


def test_a_mean_square_error_is_brought_to_the_scale_of_a_likelihood():
    torch.manual_seed(0)
    program = capture(nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 40)), torch.randn(2, 6))
    x = torch.randn(256, 6, generator=torch.Generator().manual_seed(1))
    y = torch.tanh(x @ torch.randn(6, 40, generator=torch.Generator().manual_seed(2)))
    facts = kfe_fx.train(program, (x, y), optimizer="ekfac", epochs=20, batch_size=64, threads=1)
    assert facts["loss"] == "mse"
    assert facts["last_loss"] < 0.2 * facts["first_loss"]


def test_a_resumed_run_knows_which_labels_count(tmp_path: Path):
    """A batch in which no label counts has no mean of its own: the share of labels that count goes with the run."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 7, 5, generator=g), torch.randint(4, (12, 7), generator=g)
    y[3] = -100
    settings: dict[str, Any] = {
        "val": False, "optimizer": "sgd", "epochs": 3, "batch_size": 1, "seed": 1, "threads": 1,
    }  # fmt: skip

    def made() -> Program:
        torch.manual_seed(0)
        return capture(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), x[:2])

    whole, again, place = made(), made(), tmp_path / "run.checkpoint"
    kfe_fx.train(whole, (x, y), **settings)
    with pytest.raises(Interrupted):
        kfe_fx.train(made(), (x, y), checkpoint=place, progress=interrupt_at(0.6), **settings)
    assert kfe_fx.train(again, (x, y), checkpoint=place, resume=True, **settings)["resumed"] is not None
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
