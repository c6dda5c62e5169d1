"""Every way to use a parameter: the statistics are those of each example's gradient."""

from __future__ import annotations

import pytest

from tests.curvature.nets import CASES, MIXED, K, N, built
from tests.curvature.oracle import check


@pytest.mark.parametrize("name", CASES)
def test_statistics_are_those_of_each_examples_gradient(name: str) -> None:
    net, inputs = built(CASES[name])
    _, blocks, _ = check(net, inputs, N)
    kinds = {parameter: block.kind for block in blocks.blocks for parameter in block.parameters}
    left = {item.parameter for item in blocks.left_out}
    given = CASES[name][2]
    assert kinds == {parameter: given.get(parameter, K) for parameter in kinds}
    assert kinds.keys() | left == dict(net.named_parameters()).keys()
    assert all(batched for block in blocks.blocks for batched in block.batched.values()) == (name not in MIXED)
