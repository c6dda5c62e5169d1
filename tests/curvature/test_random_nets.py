"""Any network: the statistics of every block are those of each example's gradient, in evaluation and in training."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

import kfe_fx
from kfe_fx.curvature import find_blocks
from tests.curvature.oracle import (
    assert_equal,
    check_claims,
    check_store,
    coupled,
    gradients,
    measured,
    summed,
    targets_of,
)
from tests.random_nets import FAMILIES, STEPS, Case, sample_net

N = 3


def check_case(case: Case) -> None:
    """Check one network: claims, second moments in both bases, and the sum over examples in each mode."""
    program = kfe_fx.capture(case.module, case.inputs)
    inputs, targets = case.make_inputs(N), targets_of(N)
    blocks = find_blocks(program)
    truth = gradients(program, inputs, targets)
    check_claims(program, blocks, truth)
    assert all(batched for block in blocks.blocks for batched in block.batched.values())
    store = measured(program, inputs, targets, blocks=blocks)
    if not coupled(program, inputs, N):
        check_store(store, blocks, truth)
    for mode in sorted(program.graphs):
        torch.manual_seed(0)
        found, whole = summed(program, blocks, list(inputs), mode)
        for name, expected in whole.items():
            if mode in next(block for block in blocks.blocks if block.name == name).uses:
                assert_equal(found[name], expected, f"the sum of {name} in mode {mode}", least=1e-2)


SEEDS = [*range(10), *(pytest.param(seed, marks=pytest.mark.thorough) for seed in range(10, 400))]


@pytest.mark.parametrize("seed", SEEDS)
def test_statistics_of_random_networks(seed: int) -> None:
    check_case(sample_net(40_000 + seed, max_blocks=2))


@pytest.mark.thorough
@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_of_every_family(family: str) -> None:
    wanted = {family, "activation"} if STEPS[family].nests else {family}
    cases = (sample_net(seed, max_blocks=1, families=wanted) for seed in range(300))
    for case in islice((case for case in cases if family in case.families), 6):
        check_case(case)
