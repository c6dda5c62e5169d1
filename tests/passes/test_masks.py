"""Schedules (T6.3), masks that only grow (T6.4), and optimisers that hold them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kfe_fx.frontend.capture import capture
from kfe_fx.passes.masks import apply_masks, hold_masks, prune_lowest, sparsities
from kfe_fx.program import Program
from kfe_fx.training.optimizer_state import make_optimizer


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9, 0.98847])
@pytest.mark.parametrize("rounds", [1, 2, 14, 140])
def test_schedules_end_at_the_sparsity(sparsity: float, rounds: int):
    """T6.3: exactly, with a constant ratio of survivors or a constant number that goes."""
    for schedule in ("exponential", "equal"):
        shares = sparsities(sparsity, rounds, schedule)
        assert len(shares) == rounds
        assert shares[-1] == sparsity
        left = [1.0, *(1 - share for share in shares)]
        if schedule == "exponential":
            steps = [after / before for before, after in pairwise(left)]
            assert steps == pytest.approx([(1 - sparsity) ** (1 / rounds)] * rounds, rel=1e-9)
        else:
            steps = [before - after for before, after in pairwise(left)]
            assert steps == pytest.approx([sparsity / rounds] * rounds, rel=1e-9)


SHAPES = {"a": (3, 4), "b": (2, 2, 2), "c": (5, 1)}
TOTAL = 25


@settings(max_examples=60)
@given(seed=st.integers(0, 2**31), counts=st.lists(st.integers(0, TOTAL), min_size=1, max_size=5), levels=st.booleans())
def test_masks_only_grow_and_take_the_lowest(seed: int, counts: list[int], levels: bool):
    """T6.4, with scores that change from round to round, and many of them equal."""
    generator = torch.Generator().manual_seed(seed)
    masks = {name: torch.ones(shape, dtype=torch.bool) for name, shape in SHAPES.items()}
    for count in sorted(counts):
        scores = {name: torch.rand(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
        if levels:
            scores = {name: (score * 3).floor() for name, score in scores.items()}
        fresh = prune_lowest(scores, masks, count)
        assert sum(int((~mask).sum()) for mask in fresh.values()) == count
        assert all(bool((fresh[name] <= masks[name]).all()) for name in masks)
        assert {name: mask.shape for name, mask in fresh.items()} == {n: torch.Size(s) for n, s in SHAPES.items()}
        # the oracle: a stable sort of what is left, one entry after the other
        entries = [
            (float(score), place)
            for place, (score, mask) in enumerate(
                zip(
                    torch.cat([scores[name].flatten() for name in masks]),
                    torch.cat([mask.flatten() for mask in masks.values()]),
                    strict=True,
                )
            )
            if mask
        ]
        already = TOTAL - len(entries)
        expected = {place for _, place in sorted(entries)[: count - already]}
        flat = torch.cat([(masks[name] & ~fresh[name]).flatten() for name in masks])
        assert set(flat.nonzero().flatten().tolist()) == expected
        masks = fresh


def net() -> tuple[Program, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(6, 5).double()
    return capture(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double(), x), x


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_optimisers_hold_masks(name: str):
    """What is left moves as if what is out were no parameter: an optimiser that never saw it gives the same weights."""
    program, x = net()
    masks = {key: torch.rand_like(program.tensor(key)) < 0.5 for key in ("0.weight", "2.weight")}
    apply_masks(program, masks)
    start = program.tensor("0.weight").detach().clone()
    other = program.copy()
    live, plain = make_optimizer(program, name, 0.1), make_optimizer(other, name, 0.1)
    hold_masks(live, program, masks)
    for _ in range(5):
        for held, optimizer in ((program, live), (other, plain)):
            optimizer.zero_grad()
            held(x).square().mean().backward()
            if held is other:
                for key, mask in masks.items():
                    held.tensor(key).grad *= mask  # type: ignore[operator]
            optimizer.step()
            if held is other:
                apply_masks(other, masks)
    for key, mask in masks.items():
        value = program.tensor(key).detach()
        assert bool((value[~mask] == 0).all())
        assert torch.equal(value, other.tensor(key).detach())
        state = live.state[program.tensor(key)]
        for moment in (v for k, v in state.items() if k != "step" and isinstance(v, torch.Tensor)):
            assert bool((moment[~mask] == 0).all())
    assert not torch.equal(program.tensor("0.weight").detach(), start)


def test_a_step_without_gradients_keeps_the_masks():
    program, _ = net()
    masks = {"0.weight": torch.zeros(7, 5, dtype=torch.bool)}
    optimizer = make_optimizer(program, "adamw", 0.1)
    hold_masks(optimizer, program, masks)
    optimizer.step()
    assert not bool(program.tensor("0.weight").detach().any())


def test_what_an_optimiser_remembers_of_a_weight_does_not_bring_it_back():
    """Momentum of dense steps would move weights that are out, without any gradient."""
    program, x = net()
    weight = program.tensor("0.weight")
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    program(x).square().mean().backward()
    optimizer.step()
    masks = {"0.weight": torch.rand_like(weight) < 0.5}
    apply_masks(program, masks)
    hold_masks(optimizer, program, masks)
    before = weight.detach().clone()
    optimizer.step()
    assert bool((weight.detach()[~masks["0.weight"]] == 0).all())
    assert not torch.equal(weight.detach(), before)
