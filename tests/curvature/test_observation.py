"""What is seen of one pass comes in bounded pieces, and nothing of the size of all gradients is ever made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import kfe_fx
from kfe_fx.curvature import Blocks, find_blocks, fit, observation
from kfe_fx.curvature.collector import Collector
from kfe_fx.curvature.observation import Observation
from kfe_fx.program import Program
from tests.curvature.nets import CASES, N, Net, built, randn
from tests.curvature.oracle import LOSS, measured, targets_of


class Largest(TorchDispatchMode):
    """Note how many elements the largest tensor has that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in made if isinstance(made, list | tuple) else [made]:
            if isinstance(value, Tensor) and value.is_floating_point():  # not the bytes that are hashed
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return made


def largest(net: nn.Module, x: Tensor, statistics: Any = ("ekfac", "diagonal")) -> int:
    program = kfe_fx.capture(net.double().eval(), x)
    blocks = find_blocks(program)
    with Largest() as made:
        fit(program, [(x, targets_of(len(x)))], LOSS, source="empirical", statistics=statistics, blocks=blocks)
    return made.elements


def test_no_gradient_of_an_example_is_made_where_nothing_is_shared() -> None:
    net = nn.Sequential(nn.Linear(60, 50), nn.Tanh(), nn.Linear(50, 40))
    assert largest(net, randn(128, 60)) <= 128 * 61  # the rows, and not 128 * 50 * 61
    assert largest(Net(lambda m, x: x @ m.weight, weight=torch.randn(60, 50)), randn(128, 60)) <= 128 * 60


def test_an_embedding_is_never_written_out() -> None:
    net = nn.Sequential(nn.Embedding(5000, 4), nn.Flatten(), nn.Linear(24, 2))
    x = torch.randint(0, 5000, (64, 6))
    assert largest(net, x) < 64 * 5000


@pytest.mark.parametrize(
    "name", ["conv2d", "grouped", "tied autoencoder", "class token", "weight norm", "three operands"]
)
def test_pieces_of_any_size_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, inputs = built(CASES[name])
    program = kfe_fx.capture(net, inputs)
    whole = measured(program, inputs, targets_of(N))
    monkeypatch.setattr(observation, "CHUNK", 1)
    apart = measured(program, inputs, targets_of(N))
    for key, block in whole.blocks.items():
        torch.testing.assert_close(apart.blocks[key].D, block.D, rtol=1e-12, atol=1e-15)
        if block.A is not None:
            torch.testing.assert_close(apart.blocks[key].A, block.A, rtol=1e-12, atol=1e-15)
            torch.testing.assert_close(apart.blocks[key].G, block.G, rtol=1e-12, atol=1e-15)
            assert apart.blocks[key].S is not None
            torch.testing.assert_close(apart.blocks[key].S.sum(), block.S.sum(), rtol=1e-12, atol=0)


def test_rows_come_in_pieces_of_bounded_size() -> None:
    net = Net(lambda m, x: m.conv(x).mean((2, 3)) * m.scale, conv=nn.Conv2d(4, 8, 3, padding=1), scale=torch.randn(8))
    program = kfe_fx.capture(net.double(), randn(2, 4, 24, 24))
    sizes: list[int] = []
    observe(program, find_blocks(program), randn(200, 4, 24, 24), lambda seen: sizes.extend(_bytes(seen)))
    assert max(sizes) <= observation.CHUNK
    assert len(sizes) > 4


def _bytes(seen: Observation) -> list[int]:
    held = [pairs.dense() for pairs in seen.chunks()]
    return [left.numel() * left.element_size() + right.numel() * right.element_size() for left, right in held]


def observe(program: Program, blocks: Blocks, x: Tensor, sink: Any) -> None:
    """Run one pass forward and backward and hand what is seen to ``sink``."""
    collector = Collector(program, blocks, blocks.blocks, sink)
    with collector.watching():
        program(x).square().sum().backward()
        collector.flush()


def test_a_pass_is_seen_once_per_block_and_scaled() -> None:
    net = Net(
        lambda m, x: m.layer(torch.tanh(m.layer(x))) * m.scale, layer=nn.Linear(4, 4), scale=torch.randn(4)
    ).double()
    program = kfe_fx.capture(net, randn(N, 4))
    blocks = find_blocks(program)
    seen: dict[str, Tensor] = {}

    def sink(observation: Observation) -> None:
        assert observation.block.name not in seen
        assert observation.examples == N
        observation.scale = 3.0
        (pairs,) = observation.chunks()
        left, right = pairs.dense()
        seen[observation.block.name] = torch.einsum("knro,knri->koi", left, right)

    observe(program, blocks, randn(N, 4), sink)
    grads = {name: value.grad for name, value in program.module().named_parameters()}
    for block in blocks.blocks:
        torch.testing.assert_close(seen[block.name], 3 * block.matrix(grads), rtol=1e-10, atol=1e-12)


def test_gradients_that_are_not_finite_are_counted_and_kept_away() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    program = kfe_fx.capture(net, randn(N, 4))
    blocks = find_blocks(program)
    collector = Collector(program, blocks, blocks.blocks, lambda observation: pytest.fail("seen"))
    with collector.watching():
        (program(randn(N, 4)) * float("inf")).sum().backward()
        collector.flush()
    assert collector.nonfinite == {"0.weight": 1, "1.weight": 1}


def test_inputs_that_an_operation_hands_on_ask_for_no_gradient_afterwards() -> None:
    net = Net(lambda m, x: m.layer(x.type_as(m.scale)) + m.scale, layer=nn.Linear(4, 3), scale=torch.randn(3)).double()
    x = randn(N, 4)
    program = kfe_fx.capture(net, x)
    store = measured(program, (x,), targets_of(N))
    assert not x.requires_grad
    assert x.grad is None
    assert store.facts["examples"] == N


def test_statistics_of_a_norm_stay_when_its_gradients_are_taken_one_by_one() -> None:
    """A norm whose scale is also its shift has no rule; it is run again, and must not move its running statistics."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return F.batch_norm(m.layer(x), m.mean, m.var, m.gamma, m.gamma, m.training)

    net = Net(forward, layer=nn.Linear(4, 3), gamma=torch.rand(3) + 1)
    net.register_buffer("mean", torch.zeros(3))
    net.register_buffer("var", torch.ones(3))
    program = kfe_fx.capture(net.double().eval(), randn(N, 4)).train()
    blocks, module = find_blocks(program), program.module()
    module.run_flat([randn(N, 4)], "train")
    once = module.get_buffer("mean").clone()
    module.get_buffer("mean").zero_()
    observe(program, blocks, randn(N, 4), lambda observation: [*observation.chunks()])
    assert once.any()
    torch.testing.assert_close(module.get_buffer("mean"), once)


@pytest.mark.parametrize(
    "name", ["lstm cell", "several outputs", "transformer layer", "tied autoencoder", "class token"]
)
def test_nothing_changes_while_statistics_are_taken(name: str) -> None:
    net, inputs = built(CASES[name])
    program = kfe_fx.capture(net, inputs)
    module, blocks = program.module(), find_blocks(program)
    seen: list[str] = []
    collector = Collector(program, blocks, blocks.blocks, lambda observation: seen.append(observation.block.name))

    def run(mode: str) -> list[Tensor]:
        torch.manual_seed(0)
        given = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
        outs = module.run_flat(given, mode)
        total = torch.stack([out.square().sum() for out in outs]).sum()
        wanted = [x for x in given if x.requires_grad] + list(module.parameters())
        return [*outs, *torch.autograd.grad(total, wanted)]

    for mode in program.graphs:
        plain = run(mode)
        with collector.watching():
            watched = run(mode)
            collector.flush()
        assert all(torch.equal(one, other) for one, other in zip(plain, watched, strict=True))
        assert {*seen} == {block.name for block in blocks.blocks if mode in block.uses}
        seen.clear()
