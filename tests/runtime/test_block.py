from __future__ import annotations

import json

import numpy as np
import pytest

from kfe_fx.runtime.block import decide, probe_block


def staircase(block: int, noise: float = 0.02, odd: float = 1.3) -> dict[int, np.ndarray]:
    """Times of widths where kernels work in blocks and a width that is no multiple of four leaves the layout."""
    random = np.random.default_rng(block)
    times = {}
    for width in (64, 48, 40, 36, 35):
        padded = -(-width // block) * block
        cost = (padded / 64) ** 2 * (odd if width % 4 else 1.0)
        times[width] = cost * (1 + noise * np.abs(random.standard_cauchy(24)))
    return times


@pytest.mark.parametrize(("block", "step"), [(64, 32), (16, 16), (8, 8), (4, 4)])
def test_the_step_of_a_staircase_is_found(block, step):
    found, probed, _ = decide(staircase(block))
    assert (found, probed) == (step, True)


def test_no_staircase_at_all():
    assert decide(staircase(1, odd=1.0, noise=0.0005))[0] == 1


def test_noise_gives_the_default():
    random = np.random.default_rng(0)
    noisy = {width: random.pareto(0.5, 24) + 1 for width in (64, 48, 40, 36, 35)}
    step, probed, _ = decide(noisy)
    assert (step, probed) == (16, False)


def test_probe_runs_once_per_process():
    block = probe_block(1)
    assert block.step in (1, 4, 8, 16, 32)
    assert probe_block(1) is block
    json.dumps(block.to_json(), allow_nan=False)
