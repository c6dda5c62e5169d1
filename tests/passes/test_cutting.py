"""Repair out of captured factors: what each side can make good, chosen by the loss."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import kfe_fx
from kfe_fx.errors import UsageError
from kfe_fx.passes import cutting
from kfe_fx.passes.base import PassResult
from kfe_fx.passes.prune import PruneResult, prune
from kfe_fx.passes.reconstruct import Reconstruct
from kfe_fx.program import Program

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


def test_a_store_is_used_or_refused() -> None:
    """A store that is given repairs under any criterion, and one that nobody looks at, or a stale one, is refused."""
    made = net()
    program = kfe_fx.capture(made, X[:2])
    data = X, made(X).detach()
    store = kfe_fx.curvature.fit(program, data, statistics="kfac")
    assert halved("kron-obs", store=store).certificate.rounds[0]["rows_moved"] == 1.0
    certificate = halved("fisher", store=store).certificate
    assert certificate.rounds[0]["rows_moved"] == 1.0
    assert sum("for the repair alone" in note for note in certificate.notes) == 1
    assert not [note for note in halved("kron-obs", store=store).certificate.notes if "repair alone" in note]
    with pytest.raises(UsageError, match="and no repair does; drop store, or choose c-obd, "):
        halved("fisher", store=store, repair="mean")
    diagonal = kfe_fx.curvature.fit(program, data, statistics="diagonal")
    with pytest.raises(UsageError, match="'fisher' does not look at curvature"):
        halved("fisher", store=diagonal)
    with pytest.raises(UsageError, match="nothing is scored; drop store, or plan"):
        halved("fisher", store=store, plan=halved("fisher").plan)
    with pytest.raises(UsageError, match=r"store is a str; give a kfe_fx\.curvature\.Store"):
        halved("kron-obs", store="curvature.safetensors")
    several: dict[str, Any] = {"budget": 0.6, "metric": "macs", "criterion": "kron-obd", "schedule": "netadapt"}
    for rounds in (None, 3):  # each scores anew
        with pytest.raises(UsageError, match=r"of the network before any round.* or --rounds 1"):
            prune(program, store=store, rounds=rounds, **several)
    with torch.no_grad():
        program.tensor("0.bias").add_(1)
    for criterion in ("fisher", "kron-obs"):
        stale = kfe_fx.curvature.fit(program, data, statistics="kfac")
        with pytest.raises(UsageError, match="older than the weights; fit them again"):
            halved(criterion, store=stale)
    other = kfe_fx.capture(nn.Linear(4, 2).double(), X[:2])
    with pytest.raises(UsageError, match="of another network"):
        halved("fisher", store=kfe_fx.curvature.fit(other, (X, X[:, :2]), statistics="kfac"))


def test_a_store_scores_the_network_before_it_is_decomposed() -> None:
    """Decompositions are tried as networks of their own, which the statistics are not of."""
    data = X, net()(X).detach()
    settings: dict[str, Any] = {"budget": 0.6, "metric": "macs", "data": data, "val": data, "epochs": 0, "rounds": 1}
    wide = nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 1)).double()
    program = kfe_fx.capture(wide, X[:2])
    store = kfe_fx.curvature.fit(program, data, statistics="kfac")
    result = prune(program, criterion="kron-obs", store=store, decompose=True, **settings)
    assert result.certificate.feasible


def test_rows_stay_where_the_loss_does_not_fall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "SHARES", (-1.0,))
    result = halved("kron-obs")
    (entry,) = result.certificate.rounds
    assert "rows_moved" not in entry
    weight = result.module().get_parameter("0.weight").detach()
    assert any(torch.equal(weight[0], row) for row in copy.deepcopy(net()[0].weight).detach())


def test_fits_that_are_no_repair_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers' own errors choose the fits; the loss of the whole network has the last word."""
    folded = halved("fisher", repair="mean")
    good = halved("fisher").certificate.rounds[0]
    assert "fits_left" not in good

    def wreck(_: Reconstruct, program: Program) -> PassResult:
        twin = program.copy()
        with torch.no_grad():
            twin.tensor("1.weight").mul_(-3)
        return PassResult(twin, True, {"layers": {"0": {"method": "kept"}, "1": {"method": "least-squares"}}})

    monkeypatch.setattr(Reconstruct, "run", wreck)
    result = halved("fisher")
    (entry,) = result.certificate.rounds
    assert entry["repaired"] == {"kept": 2}
    assert entry["fits_left"]["fitted"] > 1.05 * entry["fits_left"]["folded"]
    assert entry["loss"]["repaired"] == pytest.approx(entry["fits_left"]["folded"])
    torch.testing.assert_close(result.program(X), folded.program(X))
