"""Inputs without data: they match the first batch norm, and integers stay in their table."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from kfe_fx.criteria import ScoreContext, score
from kfe_fx.criteria.synthetic import draw
from kfe_fx.frontend.capture import capture
from kfe_fx.labels.analysis import analyze


class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def test_inputs_match_what_the_first_norm_remembers():
    torch.manual_seed(0)
    module = First().eval()
    scale, shift = torch.tensor([4.0, 0.2, 9.0]), torch.tensor([1.0, -3.0, 5.0])
    real = torch.randn(400, 3, 8, 8) * scale.reshape(1, 3, 1, 1) + shift.reshape(1, 3, 1, 1)
    seen = module.conv(real).detach().transpose(0, 1).flatten(1)
    module.norm.running_mean, module.norm.running_var = seen.mean(1), seen.var(1)
    program = capture(module, real[:2])
    facts: dict = {}
    drawn = torch.cat([batch.inputs[0] for batch in draw(program, 256, 0, facts)])
    assert facts == {"data_free": True, "matched": "norm"}
    assert drawn.shape == (256, 3, 8, 8)
    found = module.conv(drawn).detach().transpose(0, 1).flatten(1)
    off = (found.mean(1) - seen.mean(1)).abs() / seen.std(1)
    assert off.max() < 0.3  # a fit by a few steps, measured on other draws
    assert (found.std(1) / seen.std(1)).log().abs().max() < 0.2
    again = torch.cat([batch.inputs[0] for batch in draw(program, 256, 0)])
    assert torch.equal(drawn, again)


def test_scores_without_data_say_so():
    program = capture(First().eval(), torch.randn(2, 3, 8, 8))
    context = ScoreContext.of(program, analyze(program), seed=3)
    first = score("fisher", context)
    assert context.facts["data_free"] is True
    assert context.facts["inputs"] == "drawn"
    assert (first > 0).all()
    np.testing.assert_array_equal(first, score("fisher", ScoreContext.of(program, analyze(program), seed=3)))


class Tokens(nn.Module):
    def __init__(self, offset: int) -> None:
        super().__init__()
        self.offset = offset
        self.table, self.hidden, self.head = nn.Embedding(11, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, index, mask):
        y = torch.relu(self.hidden(self.table(index + self.offset if self.offset else index)))
        return self.head((y * mask[:, :, None]).mean(1))


def test_integers_stay_in_their_table_and_masks_repeat_the_example():
    index, mask = torch.tensor([[1, 2, 3]]), torch.tensor([[True, True, False]])
    program = capture(Tokens(0).eval(), (index, mask))
    batches = draw(program, 100, 0)
    tokens = torch.cat([batch.inputs[0] for batch in batches])
    assert tokens.min() == 0
    assert tokens.max() == 10
    assert all(bool((batch.inputs[1] == mask).all()) for batch in batches)
    shifted = capture(Tokens(1).eval(), (index, mask))
    assert draw(shifted, 10, 0)[0].inputs[0][0].tolist() == [1, 2, 3]
    assert np.isfinite(score("taylor", ScoreContext.of(shifted, analyze(shifted)))).all()
