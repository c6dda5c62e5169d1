"""The masks of attention get no gate: 0 * -inf has no derivative, and their heads are gated in the values."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfe_fx.criteria import ScoreContext, score
from kfe_fx.frontend.capture import capture
from kfe_fx.gates import gated
from kfe_fx.labels.analysis import Analysis, analyze
from kfe_fx.labels.oracle import run_masked

TARGETS = torch.tensor([0, 2, 1, 1])


class Attention(nn.Module):
    """``nn.MultiheadAttention`` with a mask of keys, fused or written out."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.attend, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y, _ = self.attend(x, x, x, key_padding_mask=mask, need_weights=not self.fused)
        return self.head(y.mean(1))


class Chosen(nn.Module):
    """A mask spread over the heads chooses among the scores."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        keep = ~mask[:, None, None, :].expand(-1, 2, x.shape[1], -1)
        if self.how == "fused":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        else:
            scores = torch.where(keep, q @ k.transpose(2, 3), -1e9)
            y = scores.softmax(-1) @ v
        return self.head(y.transpose(1, 2).flatten(2).mean(1))


def example() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[0, 3:] = mask[2, 4:] = True
    return torch.randn(4, 5, 8), mask


def network(name: str) -> Analysis:
    torch.manual_seed(1)
    kind, how = name.split()
    module = Attention(how == "fused") if kind == "module" else Chosen(how)
    return analyze(capture(module.eval(), tuple(value[:2] for value in example())))


NETWORKS = ["module fused", "module written", "chosen fused", "chosen written"]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("criterion", ["fisher", "qm"])
def test_scores_are_finite(name: str, criterion: str) -> None:
    analysis = network(name)
    context = ScoreContext.of(analysis.program, analysis, (example(), TARGETS))
    assert (score(criterion, context) >= 0).any()
    assert all(site.dim == 2 or site.node.startswith("linear") for site in analysis.gate_sites)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_closed_gate_is_the_head_gone(name: str) -> None:
    analysis = network(name)
    view = gated(analysis.program, analysis)
    gates = view.ones(1, torch.float32)
    with torch.no_grad():
        for gate in gates:
            gate.zero_()
        found = view.run(list(example()), gates)
        wanted = analysis.program.tensor("head.bias").expand(4, 3)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_masked_network_is_the_one_with_the_gate_closed(name: str) -> None:
    analysis = network(name)
    group = next(group for group in analysis.groups if len(group.units) == 2)
    view = gated(analysis.program, analysis)
    gates = view.ones(1, torch.float32)
    with torch.no_grad():
        gates[group.id][0, 0] = 0.0
        found = view.run(list(example()), gates)
        (masked,) = run_masked(analysis, {group.units[0]}, list(example()))
    torch.testing.assert_close(found, masked)


class Spread(nn.Module):
    """An input spread over the channels that a filter each works on: nothing but its gate masks them."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.head = nn.Conv1d(4, 4, 3, groups=4, bias=False), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.each(x.unsqueeze(1).expand(-1, 4, -1)).relu().mean(2))


def test_an_input_that_is_no_mask_keeps_its_gate() -> None:
    analysis = analyze(capture(Spread(), torch.randn(2, 8)))
    assert len(analysis.units) == 4
    assert sorted({int(unit) for site in analysis.gate_sites for unit in site.units}) == [0, 1, 2, 3]
