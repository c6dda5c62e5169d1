"""Repair out of captured factors: what each side can make good, chosen by the loss."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from kfe_fx.passes import cutting
from kfe_fx.passes.prune import PruneResult, prune

X = torch.randn(256, 4, generator=torch.Generator().manual_seed(0)).double()
X -= X.mean(0)  # a mean would be folded into the bias behind, and come with the rows once more


def net() -> nn.Sequential:
    """y = h0 + h1 with independent h: no unit can be read from the other, but row 0 can say what both said."""
    made = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 1)).double()
    with torch.no_grad():
        made[0].weight.copy_(torch.tensor([[1.0, 0, 0.5, 0], [0, 0.8, 0, -0.5]]))
        made[0].bias.copy_(torch.tensor([0.3, 0.0]))
        made[1].weight.fill_(1.0)
        made[1].bias.zero_()
    return made


def halved(criterion: str, **options: Any) -> PruneResult:
    made = net()
    with torch.no_grad():
        data = X, made(X)
    settings: dict[str, Any] = {"budget": 0.5, "metric": "widths", "data": data, "val": data, "epochs": 0, "rounds": 1}
    return prune(made, X[:2], criterion=criterion, **settings, **options)


def test_rows_that_stay_say_what_went() -> None:
    result = halved("kron-obs")
    (entry,) = result.certificate.rounds
    assert entry["rows_moved"] == 1.0
    whole = net()
    expected = (whole[1].weight @ whole[0].weight).detach()  # of the only unit that is left, on its consumer of 1
    small = result.module()
    found = (small.get_parameter("1.weight") @ small.get_parameter("0.weight")).detach()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)  # a damping of 1e-3 is between
    assert entry["loss"]["repaired"] < 1e-4 < 0.1 < entry["loss"]["removed"]
    (plain,) = halved("fisher").certificate.rounds  # has no factors
    assert plain["loss"]["repaired"] > 0.1
    (bare,) = halved("kron-obs", repair="mean").certificate.rounds
    assert "rows_moved" not in plain | bare


def test_rows_stay_where_the_loss_does_not_fall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "SHARES", (-1.0,))
    result = halved("kron-obs")
    (entry,) = result.certificate.rounds
    assert "rows_moved" not in entry
    weight = result.module().get_parameter("0.weight").detach()
    assert any(torch.equal(weight[0], row) for row in copy.deepcopy(net()[0].weight).detach())
