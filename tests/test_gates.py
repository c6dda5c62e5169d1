"""The gate operation itself."""

from __future__ import annotations

import pytest
import torch

from kfe_fx.errors import UsageError
from kfe_fx.gates import GATE, gate


def test_one_row_or_one_vector_gates_all_examples_alike():
    value, gates = torch.randn(2, 3, 4), torch.tensor([2.0, 3.0, 0.0])
    expected = value * gates[None, :, None]
    assert torch.equal(GATE(value, gates, 1), expected)
    assert torch.equal(GATE(value, gates[None], 1), expected)
    assert GATE(value, None, 1) is value or torch.equal(GATE(value, None, 1), value)


def test_columns_may_repeat_and_skip():
    value, gates = torch.randn(2, 5), torch.tensor([[2.0, 3.0]])
    found = GATE(value, gates, 1, [0, -1, 1, 0, 1])
    assert torch.equal(found, value * torch.tensor([2.0, 1.0, 3.0, 2.0, 3.0]))


@pytest.mark.parametrize(("dim", "example_dim"), [(1, 0), (0, 1)])
def test_a_row_for_each_example(dim: int, example_dim: int):
    gates = torch.randn(2, 3)
    value = torch.randn(*((2, 3) if dim else (3, 2)), 4)
    table = gates if dim else gates.t()
    assert torch.equal(GATE(value, gates, dim, None, example_dim), value * table[:, :, None])


@pytest.mark.parametrize("layout", ["outer", "inner"])
def test_examples_folded_into_a_dim(layout: str):
    gates, value = torch.tensor([[2.0], [3.0]]), torch.ones(6, 1)
    found = GATE(value, gates, 1, None, 0, layout)[:, 0].tolist()
    assert found == ([2, 2, 2, 3, 3, 3] if layout == "outer" else [2, 3, 2, 3, 2, 3])


def test_rows_need_a_dim_of_examples():
    with pytest.raises(UsageError, match="one at a time"):
        gate(torch.ones(6, 2), torch.ones(3, 2), 1)


def test_gradients_of_gradients():
    value = torch.randn(3, 2, dtype=torch.float64)
    gates = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda g: GATE(value, g, 1, None, 0).pow(3), gates)
