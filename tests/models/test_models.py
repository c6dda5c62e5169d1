from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import kfe_fx
from kfe_fx.data.glyphs import glyphs
from kfe_fx.errors import BadFile
from kfe_fx.models import tasks, train

ROOT = Path(__file__).resolve().parents[2]
PARAMETERS = {
    "resnet": 929_828,
    "mobilenet": 889_108,
    "vit": 767_620,
    "rows": 1_128_484,
    "tagger": 101_128,
    "chars": 887_522,
}
SHAPES = {  # an example input, and the logits of three
    "resnet": ((1, 1, 32, 32), (3, 36)),
    "mobilenet": ((1, 1, 32, 32), (3, 36)),
    "vit": ((1, 1, 32, 32), (3, 36)),
    "rows": ((1, 1, 28, 28), (3, 36)),
    "tagger": ((1, 100), (3, 100, 8)),
    "chars": ((1, 100), (3, 100, 98)),
}


def trained(name: str) -> Path:
    return ROOT / "models" / f"{train.FILES[name]}.pt"


def test_names():
    assert train.RECIPES.keys() == train.FILES.keys() == PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_factory(name: str):
    net, example = train.build(name)
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name]
    assert (example.shape, torch.Size(SHAPES[name][1])) == SHAPES[name]
    assert torch.equal(example, train.build(name)[1])
    with torch.no_grad():
        assert net.eval()(torch.cat([example] * 3)).shape == SHAPES[name][1]
    drawn, targets = train.RECIPES[name].task.draw(3, 0)
    assert (drawn.shape, drawn.dtype) == ((3, *example.shape[1:]), example.dtype)
    assert (targets.shape, targets.dtype) == (SHAPES[name][1][:-1], torch.int64)


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_file_works_alone(name: str):
    # as `--arch models/glyphs_resnet.py:factory` loads it
    spec = importlib.util.spec_from_file_location(f"alone_{name}", ROOT / "models" / f"{train.FILES[name]}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    net, example = module.factory()
    assert isinstance(net, torch.nn.Module)
    assert example.shape == SHAPES[name][0]


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_parameter_learns(name: str):
    net, example = train.build(name)
    net.train()
    net(torch.cat([example] * 4)).square().mean().backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None, key
        assert bool(torch.isfinite(parameter.grad).all()), key


@pytest.mark.parametrize("name", PARAMETERS)
def test_widths_suit_vector_units(name: str):
    net, _ = train.build(name)
    for key, layer in net.named_modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear) and key != "head":
            assert layer.weight.shape[0] % 16 == 0, key


@pytest.mark.parametrize(
    ("name", "lengths"), [("rows", (28, 9, 40)), ("tagger", (100, 1, 133)), ("chars", (100, 1, 133))]
)
def test_length_and_batch_are_free(name: str, lengths: tuple[int, ...]):
    net = train.build(name)[0].double().eval()
    generator = torch.Generator().manual_seed(0)
    for length in lengths:
        if name == "rows":
            x = torch.randn(5, 1, length, 28, dtype=torch.float64, generator=generator)
        else:
            x = torch.randint(98, (5, length), generator=generator)
        with torch.no_grad():
            whole, one = net(x), net(x[2:3])
        torch.testing.assert_close(one, whole[2:3], rtol=1e-12, atol=1e-12)
        assert whole.shape == (5, *((36,) if name == "rows" else (length, 8 if name == "tagger" else 98)))


def test_what_sees_which_characters():
    x = torch.randint(98, (1, 20), generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[0, 11] = (x[0, 11] + 1) % 98
    for name, first in (("chars", 11), ("tagger", 0)):
        net = train.build(name)[0].double().eval()
        with torch.no_grad():
            moved = (net(changed) - net(x)).abs().amax((0, 2)) > 0
        # the next character is guessed from the past alone, kinds from both sides
        assert moved.tolist() == [position >= first for position in range(20)]


@pytest.mark.parametrize("name", PARAMETERS)
def test_checkpoint_is_small_and_matches_its_record(name: str):
    path, task = trained(name), train.RECIPES[name].task
    assert path.stat().st_size < 6e6
    record = json.loads((ROOT / "models" / "accuracy.json").read_text())[name]
    assert record["bytes"] == path.stat().st_size
    assert record["parameters"] == PARAMETERS[name]
    assert record["held_out"] == task.measured
    low, high = {"tagger": (0.97, 0.999), "chars": (0.6, 0.8)}.get(name, (0.9, 0.98))
    assert low <= record["accuracy"] <= high
    state = torch.load(path, weights_only=True)
    net = train.load(name, path)
    assert state.keys() == net.state_dict().keys()
    found = train.measure(net, task, 200)
    # 200 examples: three standard deviations around the recorded accuracy, and a little for the low end
    assert abs(found["accuracy"] - record["accuracy"]) < 0.06
    assert found.keys() == record.keys() & {"accuracy", "bits"}
    if "bits" in record:
        assert abs(found["bits"] - record["bits"]) < 0.25


@pytest.mark.parametrize(("name", "lengths"), [("rows", (28, 9)), ("tagger", (100, 133)), ("chars", (100, 133))])
def test_program_computes_what_the_network_does(name: str, lengths: tuple[int, ...]):
    path = trained(name)
    net, program = train.load(name, path).double(), kfe_fx.load(path)
    program.module().double()
    for length in lengths:
        drawn = train.RECIPES[name].task.draw(3, 0)[0]
        x = drawn[:, :, :length].double() if name == "rows" else torch.cat([drawn, drawn], 1)[:, :length]
        with torch.no_grad():
            torch.testing.assert_close(program(x), net(x), rtol=1e-12, atol=1e-12)


def test_measured(monkeypatch: pytest.MonkeyPatch):
    class Fixed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(x, 4) * math.log(5)  # 5/8 for x itself, 1/8 each for the others

    def drawn(count: int):
        x = torch.tensor([[0, 1, 2], [3, 3, 3]]).repeat(count // 2, 1)
        return x.numpy(), torch.tensor([[0, 1, 1], [3, 3, 3]]).repeat(count // 2, 1).numpy()

    task = tasks.Task(lambda count, seed: drawn(count), drawn, measured=1200, bits=True)
    found = train.measure(Fixed(), task)
    assert found["accuracy"] == 5 / 6
    assert found["bits"] == pytest.approx(-(5 * math.log2(5 / 8) + math.log2(1 / 8)) / 6, rel=1e-6)
    assert train.measure(Fixed(), dataclasses.replace(task, bits=False), 2) == {"accuracy": 5 / 6}


def test_learning_rate_cycle():
    assert train._cycle(0.0) == 0.0
    assert train._cycle(0.2) == 1.0
    assert train._cycle(1.0) == pytest.approx(0.0, abs=1e-12)
    assert train._cycle(0.6) == pytest.approx(0.5)


def test_seeds_never_meet():
    seeds = {train.FIRST_SEED + epoch for recipe in train.RECIPES.values() for epoch in range(recipe.epochs)}
    assert 0 not in seeds
    assert train.CALIBRATION_SEED not in seeds


@pytest.mark.parametrize("name", ["vit", "rows", "chars"])
def test_training_learns_and_repeats(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(train, "EXAMPLES", 64)
    monkeypatch.setattr(train, "measure", lambda net, task, count: {"accuracy": 0.0})
    lines: list[str] = []
    recipe = dataclasses.replace(train.RECIPES[name], epochs=1, rate=1e-3, batch=32)
    first, again = (train.train(name, recipe, lines.append).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    torch.manual_seed(0)
    assert any(not torch.equal(first[key], value) for key, value in train.build(name)[0].state_dict().items())
    assert lines[0].startswith(f"{name} epoch 1/1 loss ")


@pytest.mark.parametrize("capability", ["AVX512", "AVX2", "DEFAULT"])
def test_half_precision_only_where_the_processor_has_it(capability: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(train, "EXAMPLES", 8)
    monkeypatch.setattr(train, "measure", lambda net, task, count: {"accuracy": 0.0})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    asked: list[bool] = []
    autocast = torch.autocast

    def watched(*args: object, enabled: bool) -> object:
        asked.append(enabled)
        return autocast(*args, enabled=False)

    monkeypatch.setattr(torch, "autocast", watched)
    train.train("rows", dataclasses.replace(train.RECIPES["rows"], epochs=1, batch=8), lambda line: None)
    assert set(asked) == {capability == "AVX512"}


def test_tasks_draw_what_the_specs_of_load_data_do():
    assert torch.equal(train.RECIPES["resnet"].task.draw(5, 3)[0], torch.from_numpy(glyphs(5, 3)[0]))
    for name, spec, example in (
        ("resnet", "glyphs", None),
        ("rows", "glyphs", torch.zeros(1, 1, 28, 28)),
        ("tagger", "tags", None),
        ("chars", "chars", None),
    ):
        held = kfe_fx.data.load_data(f"{spec}:held-out:5", example)
        inputs, targets = train.RECIPES[name].task.held_out(5)
        assert torch.equal(dict(held.named_inputs())["inputs"], inputs)
        assert held.targets is not None
        assert torch.equal(held.targets, targets)


def test_missing_state(tmp_path: Path):
    with pytest.raises(BadFile, match="no such state dict; train first"):
        train.load("vit", tmp_path / "vit.pt")
    outcome = CliRunner().invoke(train.main, ["vit", "--from-state"])
    assert outcome.exit_code == 2
    assert "--states DIR" in outcome.output
