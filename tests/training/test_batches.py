"""One view of all data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kfe_fx.data.dataset import ArrayData
from kfe_fx.errors import BadData
from kfe_fx.frontend.capture import capture
from kfe_fx.program import Program
from kfe_fx.training import Batches, Loader
from kfe_fx.training.batches import call


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.layer(x) * scale


@pytest.fixture(scope="module")
def one() -> Program:
    return capture(nn.Linear(3, 2).double(), torch.randn(2, 3).double())


X, Y = torch.arange(21.0).reshape(7, 3), torch.arange(7)
FORMS: dict[str, Any] = {
    "arrays": (X, Y),
    "numpy": (X.numpy(), Y.numpy()),
    "named": {"input": X, "y": Y},
    "ArrayData": ArrayData((X,), Y),
    "Dataset": TensorDataset(X, Y),
    "DataLoader": DataLoader(TensorDataset(X, Y), 3),
    "batches": [(X[i : i + 3], Y[i : i + 3]) for i in (0, 3, 6)],
    "lists": [[X[i : i + 3], Y[i : i + 3]] for i in (0, 3, 6)],
    "iterator": lambda: iter([(X[i : i + 3], Y[i : i + 3]) for i in (0, 3, 6)]),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_batches_again_and_again(one: Program, form: str):
    data = FORMS[form]() if form == "iterator" else FORMS[form]
    batches = Batches(one, data, 3)
    for _ in range(2):
        found = list(batches)
        assert [batch.count for batch in found] == [3, 3, 1]
        inputs = torch.cat([batch.inputs[0] for batch in found])
        assert inputs.dtype == torch.float64  # that of the example
        assert torch.equal(inputs, X.double())
        assert torch.equal(torch.cat([batch.targets for batch in found if batch.targets is not None]), Y)
    assert len(batches) == 3
    assert batches.examples() == 7


def test_shuffled_epochs_repeat_by_seed_and_drop_the_rest(one: Program):
    for form in ("ArrayData", "Dataset"):
        batches = Batches(one, FORMS[form], 3)
        first, again, other = (
            torch.cat([b.targets for b in batches.epoch(seed, drop_last=True)])  # type: ignore[misc]
            for seed in (1, 1, 2)
        )
        assert len(first) == 6
        assert batches.steps() == 2
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_several_inputs_and_what_functions_of_the_users_get():
    program = capture(Pair(), (torch.randn(2, 3), torch.randn(2, 2)))
    scale = torch.rand(7, 2)
    for data in (((X, scale), Y), {"x": X, "scale": scale, "y": Y}):
        loader = Loader(Batches(program, data, 4))
        assert len(loader) == 2
        outputs = torch.cat([call(program.module(), inputs) for inputs, _ in loader])
        torch.testing.assert_close(outputs, program(X, scale))


def test_a_network_that_pins_its_batch_gets_no_other():
    program = capture(nn.Linear(3, 2), torch.randn(2, 3), {})
    found = list(Batches(program, (X, Y), 64))
    assert [batch.count for batch in found] == [2, 2, 2]


def test_rows_of_a_batch(one: Program):
    batch = next(iter(Batches(one, (X, Y), 5)))
    part = batch.rows(3, 9)
    assert part.count == 2
    assert torch.equal(part.inputs[0], X[3:5].double())
    assert part.targets is not None
    assert part.targets.tolist() == [3, 4]


@pytest.mark.parametrize("data", [3, "text", [3], [(X, Y, Y)]])
def test_other_things_are_no_data(one: Program, data: Any):
    with pytest.raises(BadData):
        list(Batches(one, data))


def test_no_batches(one: Program):
    with pytest.raises(BadData, match="no batches"):
        Batches(one, []).targets()
    assert np.isclose(len(Batches(one, (x for x in ()))), 0)


def test_examples_lie_where_the_network_has_them() -> None:
    class TimeMajor(nn.Module):
        def forward(self, x: Tensor, start: Tensor) -> Tensor:
            return x.sum(0) + start

    x, start, targets = torch.randn(7, 5, 3), torch.randn(5, 3), torch.arange(5)
    program = capture(TimeMajor(), (x, start), {"x": {0: "time", 1: "batch"}, "start": {0: "batch"}})
    first = ArrayData((x.movedim(1, 0), start), targets)
    for data in (((x, start), targets), first):
        batches = list(Batches(program, data, 2)) if data is first else list(Batches(program, [data], 2))
        assert sum(batch.count for batch in batches) == 5
        assert torch.equal(torch.cat([batch.inputs[0] for batch in batches], 1), x)
        (one, two) = batches[0].rows(0, 1).inputs
        assert one.shape == (7, 1, 3)
        assert two.shape == (1, 3)
        assert torch.equal(batches[0].rows(0, 1).targets, targets[:1])
