"""`kfe-fx pareto`, and `prune` with several budgets, a plan and a target, as they are typed."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from torch import nn

import kfe_fx
from kfe_fx.cli.main import cli, run
from kfe_fx.cost.device import this_device, write_device
from kfe_fx.cost.probes import fingerprint
from kfe_fx.passes.pareto import pareto
from tests.processes import torchrun


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)),
    )
    kfe_fx.save(net.eval(), torch.randn(2, 1, 6, 6), path=folder / "model.pt")
    wide = nn.Sequential(nn.Conv2d(1, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 3, 3))
    kfe_fx.save(wide.eval(), torch.randn(2, 1, 20, 20), path=folder / "wide.pt")
    rng = np.random.default_rng(0)
    np.savez(folder / "data.npz", x=rng.standard_normal((40, 1, 6, 6), np.float32), y=rng.integers(0, 3, 40))
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def answer(capsys: pytest.CaptureFixture[str], *args: object, code: int = 0) -> Any:
    assert run([*map(str, args), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *args: object, code: int = 2) -> str:
    assert run([*map(str, args)]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("kfe-fx: error: ")
    assert err.count("\n") == 1
    return err


def test_points_then_the_one_that_is_picked(made: Path, capsys: pytest.CaptureFixture[str]):
    data = ("--data", made / "data.npz")
    told = answer(capsys, "pareto", made / "model.pt", "--budgets", "0.7,0.4", "--metric", "macs", *data)
    assert [point["asked"] for point in told["points"]] == ["macs=0.7", "macs=0.4"]
    assert sorted(path.name for path in Path().iterdir()) == ["model.pareto.json", "model.pareto.svg"]
    plan = ("--plan", "model.pareto.json")
    built = answer(capsys, "prune", made / "model.pt", *plan, "--budget", "0.4", "--metric", "macs", *data)
    assert built["after"]["macs"] == told["points"][1]["after"]["macs"]
    assert "no point with the budget macs=0.5" in refused(
        capsys, "prune", made / "model.pt", *plan, "--budget", "macs=0.5", "--force"
    )
    assert "--force" in refused(capsys, "pareto", made / "model.pt", "--metric", "macs")


def test_penalty_and_store_are_those_of_python(made: Path, capsys: pytest.CaptureFixture[str]):
    model, data = made / "model.pt", ("--data", made / "data.npz")
    assert run(["curvature", str(model), *map(str, data), "-o", "model.curvature.safetensors", "-q"]) == 0
    store = ("--store", "model.curvature.safetensors")
    asked = ("pareto", model, "--budgets", "0.6", "--metric", "macs", *data, "-f")
    answer(capsys, *asked, "--criterion", "kron-obd", "--penalty", "100", *store)
    (point,) = json.loads(Path("model.pareto.json").read_text())["points"]
    x, y = (torch.from_numpy(array) for array in np.load(made / "data.npz").values())
    found = kfe_fx.curvature.Store.load("model.curvature.safetensors")
    settings: dict[str, Any] = {"metric": "macs", "criterion": "kron-obd", "data": (x, y), "store": found}
    front = pareto(kfe_fx.load(model), budgets=(0.6,), penalty=100.0, **settings)
    plain = pareto(kfe_fx.load(model), budgets=(0.6,), **settings)
    assert point["plan"] == front.points[0].plan.to_json() != plain.points[0].plan.to_json()
    random = ("--criterion", "random", "--repair", "none")
    assert "does not look at curvature" in refused(capsys, *asked, *random, *store)
    assert "of another network" in refused(capsys, asked[0], made / "wide.pt", *asked[2:6], *store, "-f")
    for wrong in (("--penalty", "-1"), ("--store", "gone.safetensors")):
        assert wrong[1] in refused(capsys, *asked, *wrong)


def test_all_options_of_prune_but_those_of_training_are_here():
    found = cli.get_command(click.Context(cli), "pareto")
    assert found is not None
    given = found.make_context("pareto", ["model.pt"]).params
    known = inspect.signature(kfe_fx.prune).parameters
    training = {"epochs", "lr", "optimizer", "rounds", "schedule", "distil", "temperature", "features", "ewc", "plan"}
    elsewhere = {"program_or_module", "example_inputs", "progress", "budget", "stop_at_loss", "stop_at_accuracy"}
    for name in known.keys() - training - elsewhere:
        assert given[name] == known[name].default, name


def test_the_table_of_points(made: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["pareto", str(made / "model.pt"), "--budgets", "macs=0.5", "-o", "out"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for text in ("budget", "reached", "multiply-accumulates", "wrote out/model.pareto.json"):
        assert text in out


@pytest.mark.parametrize("budgets", ["", "0.5,abc", "0.5,2M", "1.5"])
def test_lists_that_mean_nothing(budgets: str, made: Path, capsys: pytest.CaptureFixture[str]):
    refused(capsys, "pareto", made / "model.pt", "--budgets", budgets)
    assert list(Path().iterdir()) == []


def test_several_budgets_on_the_command_line(made: Path, capsys: pytest.CaptureFixture[str]):
    told = answer(capsys, "prune", made / "model.pt", "--budget", "macs=0.6", "--budget", "1k", "--floor", "3=4")
    assert [limit["metric"] for limit in told["limits"]] == ["macs", "params"]
    assert told["after"]["parameters"] <= 1000
    assert all(limit["met"] for limit in told["limits"])


TABLE = """
class Table:
    name = "table"
    def __init__(self, model, device):
        self.model = model
    def predict(self, removed):
        return float(self.model.parameters(removed))
    def terms(self):
        return None
"""


def test_a_cost_model_of_a_third_party(made: Path, capsys: pytest.CaptureFixture[str]):
    Path("mine.py").write_text(TABLE)
    measured = replace(this_device(), fingerprint=replace(fingerprint(), cpu="another one"), step=1)
    write_device(measured, "there.json")
    command = ["prune", made / "wide.pt", "--budget", "0.7", "--target", "there.json"]
    told = answer(capsys, *command, "--cost-model", "mine.py:Table")
    assert told["predicted"]["predictor"] == {"name": "table"}
    assert told["predicted"]["pruned_ms"] * 1e6 == told["after"]["parameters"]
    assert "does not name a function: write roofline or" in refused(capsys, *command, "--cost-model", "oracle", "-f")


def test_a_target_is_predicted(made: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["calibrate", "-q", "-o", "here.json"]) == 0
    device = json.loads(Path("here.json").read_text())
    device["fingerprint"]["cpu"] = "another one"
    Path("there.json").write_text(json.dumps(device))
    told = answer(capsys, "prune", made / "wide.pt", "--budget", "0.7", "--target", "there.json", "--multiple-of", 8)
    assert told["predicted"]["device"]["cpu"] == "another one"
    assert "latency" not in told["measured"]
    assert run(["prune", str(made / "wide.pt"), "--budget=0.7", "--target=there.json", "--multiple-of=8", "-f"]) == 0
    assert "predicted, not measured" in capsys.readouterr().out
    Path("there.json").write_text("{")
    assert "there.json" in refused(capsys, "prune", made / "wide.pt", "--budget=0.7", "--target=there.json", "-f")


@pytest.mark.xdist_group("processes")
def test_two_processes(made: Path, capsys: pytest.CaptureFixture[str]):
    args = ("pareto", made / "model.pt", "--budgets", "0.7,0.4", "--metric", "macs", "--data", made / "data.npz")
    alone = answer(capsys, *args, "-o", "alone")
    told = json.loads(torchrun(*args, "-o", "both", "--json"))  # one object: rank 1 prints and writes nothing
    assert [point["reached"] for point in told["points"]] == [point["reached"] for point in alone["points"]]
    one, both = (json.loads(Path(place, "model.pareto.json").read_text()) for place in ("alone", "both"))
    assert [point["plan"] for point in both["points"]] == [point["plan"] for point in one["points"]]
