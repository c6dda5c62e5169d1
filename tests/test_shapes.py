"""Concrete shapes of all nodes at chosen sizes, against the shapes of a real run."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, fx, nn

from kfe_fx.frontend.capture import capture
from kfe_fx.program import Program
from kfe_fx.shapes import propagate, propagate_all, sized_examples
from tests.random_nets import Case, nets


def test_fake_tensors_are_where_shapes_imports_them_from() -> None:
    """torch's fake tensors are private; kfe_fx/shapes.py alone imports them, and propagation stops when they move."""
    module = import_module("torch._subclasses.fake_tensor")
    mode = module.FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fake = mode.from_tensor(torch.ones(2, 3), static_shapes=True)
        assert isinstance(fake, module.FakeTensor)
        assert (fake @ fake.T).shape == (2, 2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(self.conv(x)).mean((2, 3))
        left, right = (y * scale).reshape(x.shape[0], 2, 2).unbind(1)
        return self.head(torch.cat([left, right], 1)), left


@pytest.fixture(scope="module")
def program() -> Program:
    return capture(Net(), (torch.randn(2, 3, 5, 5), torch.randn(2, 1)))


class Run(fx.Interpreter):
    def run_node(self, n: fx.Node) -> object:
        result = self.seen[n] = super().run_node(n)
        return result

    def __init__(self, program: Program, mode: str) -> None:
        super().__init__(program.copy().module(), garbage_collect_values=False, graph=program.graphs[mode])
        self.seen: dict[fx.Node, object] = {}


def assert_as_run(program: Program, mode: str, sizes: dict[str, int]) -> None:
    real = Run(program, mode)
    with torch.no_grad():
        real.run(*sized_examples(program, sizes))
    found = propagate(program, mode, sizes)
    assert found.keys() == real.seen.keys()
    for node, value in real.seen.items():
        for fake, wanted in zip(parts(found[node]), parts(value), strict=True):
            assert isinstance(fake, torch.Tensor) == isinstance(wanted, torch.Tensor), node
            if isinstance(fake, torch.Tensor) and isinstance(wanted, torch.Tensor):
                assert (fake.shape, fake.dtype) == (wanted.shape, wanted.dtype), node
            else:
                assert fake == wanted, node


def parts(value: object) -> list[object]:
    return [each for part in value for each in parts(part)] if isinstance(value, list | tuple) else [value]


@pytest.mark.parametrize("batch", [2, 7])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_every_node_has_the_shape_of_a_real_run(program: Program, mode: str, batch: int) -> None:
    assert_as_run(program, mode, {"batch": batch})


@given(case=nets(max_blocks=2))
@settings(max_examples=5)
def test_random_networks(case: Case) -> None:
    program = capture(case.module, case.inputs)
    assert_as_run(program, "eval", {"batch": 3})


def test_inputs_are_repeated_or_cut_along_the_named_axes(program: Program) -> None:
    x, scale = program.flat_examples()
    longer = sized_examples(program, {"batch": 3})
    assert torch.equal(longer[0], torch.cat([x, x[:1]]))
    assert torch.equal(longer[1], torch.cat([scale, scale[:1]]))
    shorter = sized_examples(program, {"batch": 1})
    assert torch.equal(shorter[0], x[:1])
    for sizes in (None, {}, {"time": 9}):
        assert all(a is b for a, b in zip(sized_examples(program, sizes), [x, scale], strict=True))


def test_several_graphs_at_once_give_what_each_gives(program: Program) -> None:
    both = propagate_all(program, ("eval", "train"), {"batch": 4})
    for mode, found in both.items():
        alone = propagate(program, mode, {"batch": 4})
        shapes = [{node: getattr(value, "shape", None) for node, value in each.items()} for each in (found, alone)]
        assert shapes[0] == shapes[1]


def test_statistics_of_the_training_graph_are_not_touched(program: Program) -> None:
    before = {name: value.clone() for name, value in program.state_dict().items()}
    wide = propagate(program, "train", {"batch": 1000})
    assert next(value for node, value in wide.items() if "conv2d" in node.name).shape == (1000, 4, 3, 3)
    for name, value in before.items():
        assert torch.equal(program.state_dict()[name], value), name
