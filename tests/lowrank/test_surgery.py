"""Factors in the graph: what is kept whole computes the same in both modes, wherever it stands; and names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kfe_fx
from kfe_fx.curvature import fit
from kfe_fx.frontend.capture import capture
from kfe_fx.labels.analysis import analyze
from kfe_fx.lowrank.candidates import applied, apply
from kfe_fx.lowrank.finding import find_layers
from kfe_fx.lowrank.layers import Layer
from kfe_fx.lowrank.svd import Svd
from kfe_fx.passes.capture_curvature import CaptureCurvature
from tests.curvature.oracle import measured, targets_of
from tests.lowrank.nets import FAMILIES, case, fitted, store
from tests.random_nets import sample_net

EXACT = 1e-12  # float64


def whole(layer: Layer) -> tuple[int, int]:
    return layer.columns, layer.rows


def assert_equal(one: Any, other: Any) -> None:
    first, second = (torch.utils._pytree.tree_leaves(value) for value in (one, other))
    assert len(first) == len(second) > 0
    for found, expected in zip(first, second, strict=True):
        assert found.shape == expected.shape
        assert float((found - expected).detach().abs().max()) <= EXACT * max(1.0, float(expected.detach().abs().max()))


@pytest.mark.parametrize("statistics", ["product", "moments"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_layer_that_keeps_everything_computes_the_same(name: str, statistics: str) -> None:
    """T3.2, in evaluation and in training, against the module itself at other batch sizes."""
    made = case(name)
    held = store(name) if statistics == "product" else fitted(name)
    full = apply(made.program, held, {"layer": whole(made.layer)}, statistics=statistics, whole=True)
    (layer,) = [each for each in find_layers(full).layers if each.name == "layer"]
    assert len(layer.ops) == (2 if made.layer.pointwise else 3)
    made.module.eval()
    assert_equal(full(made.inputs), made.module(made.inputs))
    assert_equal(full(made.inputs[:1]), made.module(made.inputs[:1]))
    assert_equal(full.copy().train()(made.inputs), made.program.copy().train()(made.inputs))


@pytest.mark.parametrize("name", ["conv2d", "conv2d same", "conv1d"])
def test_one_side_alone_is_one_operation_more(name: str) -> None:
    """The side that keeps everything folds back: nothing but the cut changes the function."""
    made = case(name)
    columns, rows = whole(made.layer)
    for ranks, roles in (((columns - 1, rows), ["before", "core"]), ((columns, rows - 1), ["core", "after"])):
        small = apply(made.program, store(name), {"layer": ranks})
        (layer,) = [each for each in find_layers(small).layers if each.name == "layer"]
        assert [role for role, _, _ in layer.steps(*whole(layer))] == roles
        full = apply(made.program, store(name), {"layer": ranks}, whole=True)
        assert_equal(small(made.inputs), full(made.inputs))


def test_names_follow_the_layer_and_survive_a_file(tmp_path: Path) -> None:
    made = case("conv2d")
    before = list(made.program.state_dict())
    full = apply(made.program, store("conv2d"), {"layer": (2, 3)})
    names = [f"layer.{place}.weight" for place in range(3)]
    place = before.index("layer.weight")
    assert list(full.state_dict()) == [*before[:place], *names, "layer.2.bias", *before[place + 2 :]]
    assert [tuple(full.tensor(name).shape) for name in names] == [(2, 3, 1, 1), (3, 2, 3, 2), (4, 3, 1, 1)]
    assert all(isinstance(full.tensor(name), nn.Parameter) for name in names)
    kfe_fx.save(full, tmp_path / "small.pt")
    again = kfe_fx.load(tmp_path / "small.pt")
    assert again.hash() == full.hash()
    assert_equal(again(made.inputs), full(made.inputs))
    assert find_layers(again).layers == find_layers(full).layers
    assert list(torch.load(tmp_path / "small.pt", weights_only=True)) == list(full.state_dict())
    made.program.module()  # the given one is untouched
    assert list(made.program.state_dict()) == before


class Twice(nn.Module):
    """A convolution that is called twice, a bias that two layers share, a layer that is called as a factor will be."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Conv2d(4, 4, 3, padding=1)
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.bias = self.one.bias
        self.weight = nn.Parameter(torch.randn(5, 4))
        self.nest = nn.Module()
        self.nest.weight = nn.Parameter(torch.randn(3, 5))
        self.nest.add_module("0", nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.same(torch.tanh(self.same(x))).mean((2, 3))
        x = self.other(torch.tanh(self.one(x)))
        x = torch.tanh(torch.nn.functional.linear(x, self.weight, x.mean() * torch.ones(5).to(x)))
        return self.nest.get_submodule("0")(torch.tanh(torch.nn.functional.linear(x, self.nest.weight)))  # type: ignore[arg-type]


def test_tied_uses_shared_biases_computed_biases_and_taken_names() -> None:
    torch.manual_seed(0)
    module, x = Twice().double().eval(), torch.randn(5, 4, 6, 6).double()
    program = capture(module, x[:2])
    held = fit(program, x, statistics="kfac", source="sampled", batch_size=5)
    layers = find_layers(program).layers
    assert [layer.name for layer in layers] == ["same", "one", "other", "weight", "nest", "nest.0"]
    full = apply(program, held, {layer.name: whole(layer) for layer in layers}, whole=True)
    assert_equal(full(x), module(x))
    names = set(full.state_dict())
    assert {"same.0.weight", "same.1.weight", "same.2.weight", "same.2.bias"} <= names
    assert {"one.bias", "other.bias"} <= names  # shared: it stays where both find it
    assert {"weight.0.weight", "weight.1.weight"} <= names
    assert {"nest.factors.0.weight", "nest.factors.1.weight", "nest.0.1.bias"} <= names
    same = next(layer for layer in find_layers(full).layers if layer.name == "same")
    assert [len(op.nodes["eval"]) for op in same.ops] == [2, 2, 2]


def test_a_network_with_taps_is_decomposed_without() -> None:
    made = case("conv2d")
    tapped = CaptureCurvature().run(made.program).program
    assert find_layers(tapped).layers == find_layers(made.program).layers
    small = apply(tapped, store("conv2d"), {"layer": (2, 3)})
    assert small.hash() == apply(made.program, store("conv2d"), {"layer": (2, 3)}).hash()


SEEDS = [*range(14), *(pytest.param(seed, marks=pytest.mark.thorough) for seed in range(14, 400))]


@pytest.mark.parametrize("seed", SEEDS)
def test_random_networks_that_keep_everything_compute_the_same(seed: int) -> None:
    """All layers at once, in eigenbases and by singular directions, at another batch size, in both modes."""
    drawn = sample_net(70_000 + seed, max_blocks=2)
    program = capture(drawn.module, drawn.inputs, drawn.dynamic_axes())
    inputs = drawn.make_inputs(3)
    held = measured(program, inputs, targets_of(3))
    layers = {layer.name: layer for layer in find_layers(program).layers}
    assert layers  # every network ends in a head
    ranks = {name: whole(layer) for name, layer in layers.items()}
    axes = {name: Svd.of(program, layer) for name, layer in layers.items()}
    for full in (apply(program, held, ranks, whole=True), applied(program, axes, ranks, whole=True)):
        for mode in program.graphs:
            runs = []
            for each in (program, full):
                torch.manual_seed(0)  # for dropout
                with torch.no_grad():
                    runs.append(each.copy().module().run_flat(list(inputs), mode))
            found, expected = runs[1], runs[0]
            for one, other in zip(found, expected, strict=True):
                scale = max(1.0, float(other.abs().max()))
                assert one.shape == other.shape
                assert float((one - other).abs().max()) <= 1e-10 * scale  # through a dozen layers
        analyze(full)
