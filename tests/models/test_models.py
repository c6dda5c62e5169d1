from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from kfe_fx.errors import BadFile
from kfe_fx.models import train

ROOT = Path(__file__).resolve().parents[2]
PARAMETERS = {"resnet": 929_828, "mobilenet": 889_108, "vit": 767_620}


@pytest.mark.parametrize("name", PARAMETERS)
def test_factory(name: str):
    net, example = train.build(name)
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name]
    assert example.shape == (1, 1, 32, 32)
    assert torch.equal(example, train.build(name)[1])
    with torch.no_grad():
        assert net.eval()(example.expand(3, -1, -1, -1)).shape == (3, 36)


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_file_works_alone(name: str):
    # as `--arch models/glyphs_resnet.py:factory` loads it
    spec = importlib.util.spec_from_file_location(f"alone_{name}", ROOT / "models" / f"glyphs_{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    net, example = module.factory()
    assert isinstance(net, torch.nn.Module)
    assert example.shape == (1, 1, 32, 32)


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_parameter_learns(name: str):
    net, _ = train.build(name)
    net.train()
    images = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    net(images).square().mean().backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None, key
        assert bool(torch.isfinite(parameter.grad).all()), key


@pytest.mark.parametrize("name", PARAMETERS)
def test_widths_suit_vector_units(name: str):
    net, _ = train.build(name)
    for key, layer in net.named_modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear) and key != "head":
            assert layer.weight.shape[0] % 16 == 0, key


@pytest.mark.parametrize("name", PARAMETERS)
def test_checkpoint_is_small_and_matches_its_record(name: str):
    path = ROOT / "models" / f"glyphs_{name}.pt"
    if not path.is_file():
        pytest.skip("not trained in this checkout")
    assert path.stat().st_size < 6e6
    record = json.loads((ROOT / "models" / "accuracy.json").read_text())[name]
    assert record["bytes"] == path.stat().st_size
    assert record["parameters"] == PARAMETERS[name]
    assert 0.9 <= record["accuracy"] <= 0.98
    state = torch.load(path, weights_only=True)
    net = train.load(name, path)
    assert state.keys() == net.state_dict().keys()
    images, labels = (torch.from_numpy(a) for a in train.held_out(200))
    with torch.no_grad():
        right = (net(images).argmax(1) == labels).float().mean()
    # 200 images: three standard deviations around the recorded accuracy, and a little for the low end
    assert abs(float(right) - record["accuracy"]) < 0.06


def test_learning_rate_cycle():
    assert train._cycle(0.0) == 0.0
    assert train._cycle(0.2) == 1.0
    assert train._cycle(1.0) == pytest.approx(0.0, abs=1e-12)
    assert train._cycle(0.6) == pytest.approx(0.5)


def test_seeds_never_meet():
    seeds = {train.FIRST_SEED + epoch for recipe in train.RECIPES.values() for epoch in range(recipe.epochs)}
    assert 0 not in seeds
    assert train.CALIBRATION_SEED not in seeds


def test_training_learns_and_repeats(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(train, "IMAGES", 64)
    monkeypatch.setattr(train, "accuracy", lambda net, count: 0.0)
    lines: list[str] = []
    recipe = train.Recipe(epochs=1, rate=1e-3, batch=32)
    first, again = (train.train("vit", recipe, lines.append).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert lines[0].startswith("vit epoch 1/1 loss ")


def test_missing_state(tmp_path: Path):
    with pytest.raises(BadFile, match="no such state dict; train first"):
        train.load("vit", tmp_path / "vit.pt")
    outcome = CliRunner().invoke(train.main, ["vit", "--from-state"])
    assert outcome.exit_code == 2
    assert "--states DIR" in outcome.output
