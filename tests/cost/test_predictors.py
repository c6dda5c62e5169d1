"""Cost models of third parties: how they are named, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kfe_fx
from kfe_fx.cost import predictors
from kfe_fx.cost.count import CostModel
from kfe_fx.cost.kernels import GemmKernel
from kfe_fx.cost.latency import RooflineLatency
from kfe_fx.cost.predictors import names, predictor, register, resolve
from kfe_fx.cost.profile import Profile
from kfe_fx.errors import UsageError
from kfe_fx.labels.analysis import analyze
from kfe_fx.lowrank.finding import find_layers
from kfe_fx.lowrank.prices import Prices
from kfe_fx.program import Program
from kfe_fx.training.l0 import parameters_of_units, time_of_units


class ByParameters:
    name = "by-parameters"

    def __init__(self, model: CostModel, device: Any = None) -> None:
        self.model = model

    def predict(self, removed: Any) -> float:
        return float(self.model.parameters(removed))

    def terms(self) -> None:
        return None


@pytest.fixture
def program() -> Program:
    torch.manual_seed(0)
    return kfe_fx.capture(nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 4)).eval(), torch.randn(2, 8))


def test_by_name_by_class_and_by_file(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = CostModel(program, analyze(program))
    assert names() == ("roofline",)
    assert isinstance(predictor(model), RooflineLatency)
    assert predictor(model, Profile(call=1e6)).predict(()) > 1e6  # the device is handed on
    assert isinstance(predictor(model, spec=ByParameters), ByParameters)
    assert predictor(model, spec=lambda model, device: ByParameters(model)).name == "by-parameters"
    (tmp_path / "mine.py").write_text("from kfe_fx.cost.latency import RooflineLatency as Mine\n")
    assert isinstance(predictor(model, spec=f"{tmp_path}/mine.py:Mine"), RooflineLatency)
    monkeypatch.setattr(predictors, "_REGISTRY", dict(predictors._REGISTRY))
    assert register(ByParameters) is ByParameters
    assert resolve("by-parameters") is ByParameters
    register(ByParameters)  # a module that is read twice


def test_what_predicts_nothing(program: Program, monkeypatch: pytest.MonkeyPatch):
    model = CostModel(program, analyze(program))
    for spec, says in [("oracle", "choose one of roofline"), (3, "choose one of"), ("gone.py:Mine", "no such file")]:
        with pytest.raises(UsageError, match=says):
            predictor(model, spec=spec)  # type: ignore[arg-type]  # that is what is tried
    with pytest.raises(UsageError, match="without name"):
        predictor(model, spec=lambda model, device: object())  # type: ignore[arg-type, return-value]
    monkeypatch.setattr(predictors, "_REGISTRY", dict(predictors._REGISTRY))
    with pytest.raises(UsageError, match="'roofline' already"):
        register(type("Other", (ByParameters,), {"name": "roofline"}))
    with pytest.raises(UsageError, match="under its name"):
        register(lambda model, device: ByParameters(model))


def test_l0_weighs_by_any_cost_model(program: Program):
    analysis = analyze(program)
    found = time_of_units(analysis, ByParameters)
    (group,) = analysis.groups
    left = set(group.units) - {min(group.units)}
    whole = ByParameters(CostModel(program, analysis))
    assert found.sum() == pytest.approx(whole.predict(()) - whole.predict(left))
    shares = parameters_of_units(analysis)
    assert found / found.sum() == pytest.approx(shares / shares.sum())


def test_decompositions_are_priced_by_kernels(program: Program):
    analysis = analyze(program)
    model = CostModel(program, analysis)

    class Twice(RooflineLatency):
        def predict(self, removed: Any) -> float:
            return 2 * super().predict(removed)

    assert Prices(model, None, Twice).whole_ms == pytest.approx(2 * Prices(model).whole_ms)
    with pytest.raises(UsageError, match="'by-parameters' has no kernels"):
        Prices(model, None, ByParameters)

    class First(RooflineLatency):  # knows one layer of the two
        def terms(self) -> Any:
            return [term for term in super().terms() if isinstance(term, GemmKernel)][:1]

    prices = Prices(model, None, First)
    known, unknown = find_layers(program).layers
    assert prices.ms(known, known.columns, known.rows) > 0
    with pytest.raises(UsageError, match="has no kernels"):
        prices.ms(unknown, unknown.columns, unknown.rows)
