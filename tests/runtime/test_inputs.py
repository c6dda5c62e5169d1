from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from kfe_fx.errors import UsageError
from kfe_fx.frontend.capture import capture
from kfe_fx.runtime.inputs import draw_inputs, feeds, resolve_sizes


class Five(nn.Module):
    def forward(self, a, b, c, d, e):
        return a.sum() + b.sum() + c.sum() + d.sum() + torch.where(torch.isinf(e), 0.0, e).sum()


@pytest.fixture(scope="module")
def program():
    a = torch.rand(3, 40)  # in [0, 1]
    b = torch.tensor([[4, 7, 9]])
    c = torch.tensor([[True, False]])
    d = torch.tensor([[0.0, 1.0, 1.0, 0.0]])  # a mask
    e = torch.zeros(4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), -torch.inf)
    return capture(Five().eval(), (a, b, c, d, e), {"a": {0: "batch"}, "b": {0: "batch_1"}})


def test_kinds_of_inputs(program):
    a, b, c, d, e = draw_inputs(program, batch=50, seed=1)
    assert a.shape == (50, 40)
    assert 0 <= a.min() < 0.05
    assert 0.95 < a.max() <= 1
    assert b.shape == (50, 3)
    assert set(b.unique().tolist()) == {4, 7, 9}
    assert torch.equal(c, torch.tensor([[True, False]]))
    assert set(d.unique().tolist()) <= {0.0, 1.0}
    assert set(e.unique().tolist()) <= {0.0, -torch.inf}


def test_seeds(program):
    first, again, other = (draw_inputs(program, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_feeds_are_arrays_by_name(program):
    named = feeds(program, batch=2)
    assert {name: array.shape for name, array in named.items()} == {
        "a": (2, 40),
        "b": (2, 3),
        "c": (1, 2),
        "d": (1, 4),
        "e": (4, 4),
    }
    assert all(isinstance(array, np.ndarray) for array in named.values())


def test_sizes(program):
    assert program.batch_axes() == {"batch", "batch_1"}
    assert resolve_sizes(program, 4, {"batch_1": 6}) == {"batch": 4, "batch_1": 6}
    with pytest.raises(UsageError, match="no dynamic axis is called 'time'"):
        resolve_sizes(program, None, {"time": 3})
    with pytest.raises(UsageError, match="at least 1"):
        resolve_sizes(program, 0, None)
    fixed = capture(nn.Linear(3, 3).eval(), torch.randn(4, 3), {})
    assert resolve_sizes(fixed, 4, None) == {}
    with pytest.raises(UsageError, match="batch size is fixed"):
        resolve_sizes(fixed, 2, None)


def test_a_constant_example_is_varied():
    program = capture(nn.Identity().eval(), torch.ones(1, 8))
    (drawn,) = draw_inputs(program)
    assert drawn.unique().numel() > 1
    assert ((drawn >= 0.5) & (drawn <= 1.5)).all()
