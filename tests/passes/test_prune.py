"""The contract of ``prune``: what other tools rely on, on networks of a few hundred parameters."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfe_fx
from kfe_fx.criteria import Criterion, ScoreContext, resolve
from kfe_fx.errors import BadData, UnsupportedModel, UsageError, VerificationFailed
from kfe_fx.frontend.capture import capture
from kfe_fx.labels import registry
from kfe_fx.labels.analysis import analyze
from kfe_fx.passes import proof
from kfe_fx.passes.prune import PruneResult, prune
from kfe_fx.program import Program
from kfe_fx.runtime.onnx_file import onnx_bytes

CONV, HIDDEN, TIED = 5, 7, 6


class Net(nn.Module):
    """Three groups of independent units: 5 channels under a norm, 7 hidden units, 6 along a matrix used twice."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, CONV, 3, padding=1), nn.BatchNorm2d(CONV)
        self.up, self.stem = nn.Linear(CONV, HIDDEN), nn.Linear(HIDDEN, TIED)
        self.one, self.two = nn.Linear(TIED, TIED), nn.Linear(TIED, TIED, bias=False)
        self.two.weight = self.one.weight
        self.head = nn.Linear(TIED, 3)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, TIED))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.up(F.relu(self.norm(self.conv(x))).mean((2, 3))))
        return self.head(self.two(F.relu(self.one(F.relu(self.stem(y))))) * self.scale)


def made() -> Net:
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        for value in (net.norm.weight, net.norm.running_var):
            value.copy_(torch.rand_like(value) + 0.5)
    return net


def examples(count: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    y = torch.arange(count) % 3
    return torch.randn(count, 2, 4, 4, generator=g) + (y - 1.0).reshape(-1, 1, 1, 1), y


X = examples(2)[0]


def state(module: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(module.state_dict())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def half() -> PruneResult:
    return prune(made(), X, budget=0.5, metric="widths", criterion="magnitude")


def widths(kept: dict[str, list[tuple[int, list[int]]]]) -> dict[str, dict[int, int]]:
    return {name: {dim: len(indices) for dim, indices in changes} for name, changes in kept.items()}


def test_widths_keep_the_rounded_up_share_of_each_group(half: PruneResult) -> None:
    conv, hidden, tied = (math.ceil(0.5 * n) for n in (CONV, HIDDEN, TIED))
    assert widths(half.plan.kept) == {
        **{f"{name}": {0: conv} for name in ("conv.weight", "conv.bias")},
        **{f"norm.{name}": {0: conv} for name in ("weight", "bias", "running_mean", "running_var")},
        "up.weight": {0: hidden, 1: conv},
        "up.bias": {0: hidden},
        "stem.weight": {0: tied, 1: hidden},
        "stem.bias": {0: tied},
        "one.weight": {0: tied, 1: tied},
        "two.weight": {0: tied, 1: tied},
        "one.bias": {0: tied},
        "scale": {0: tied},
        "head.weight": {1: tied},
    }


@pytest.mark.parametrize("budget", [0.01, 0.3, 0.75])
def test_widths_at_other_budgets(budget: float) -> None:
    small = prune(capture(made(), X), budget=budget, metric="widths", criterion="magnitude").module().state_dict()
    for name, n in (("conv.weight", CONV), ("up.weight", HIDDEN), ("stem.weight", TIED), ("one.weight", TIED)):
        assert small[name].shape[0] == max(1, math.ceil(budget * n)), name


def test_the_plan_says_which_slices_of_the_original_are_left(half: PruneResult) -> None:
    original, small = made().state_dict(), half.module().state_dict()
    assert small.keys() == original.keys()
    for name, value in original.items():
        cut = value
        for dim, indices in half.plan.kept.get(name, []):
            cut = cut.index_select(dim, torch.tensor(indices))
        if name.endswith(("weight", "scale")):  # biases take what removed channels sent
            assert torch.equal(small[name], cut), name
        else:
            assert small[name].shape == cut.shape, name
    module = half.module()
    assert module.two.weight is module.one.weight


def test_magnitude_keeps_the_largest(half: PruneResult) -> None:
    """The hidden units that stay are those of the largest norm among their own slices."""
    net = made()
    norms = (net.up.weight**2).sum(1) + net.up.bias**2 + (net.stem.weight**2).sum(0)
    (dim, kept), *_ = [change for change in half.plan.kept["up.weight"] if change[0] == 0]
    assert dim == 0
    strongest = norms.argsort(descending=True)[: len(kept)].tolist()
    assert len({*strongest} & {*kept}) >= len(kept) - 1  # normalisations differ in the last place


class Shifted(Criterion):
    """Ranks as magnitude does, but below zero."""

    name = "shifted"
    by = 1e6

    def score(self, context: ScoreContext) -> Any:
        return resolve("magnitude").score(context) - self.by


class NotShifted(Shifted):
    name, by = "not-shifted", 0.0


def test_units_that_go_past_the_budget_for_negative_scores_are_noted() -> None:
    past, asked = (prune(made(), X, budget=0.5, metric="macs", criterion=one) for one in (Shifted, NotShifted))
    assert past.certificate.reached < 0.2 < asked.certificate.reached
    count = past.certificate.rounds[0]["negative"]
    assert count == past.certificate.rounds[0]["removed"]
    (note,) = [note for note in past.certificate.notes if "negative" in note]
    assert note.startswith(f"{count} of the units removed have negative scores: to the criterion 'shifted' the loss")
    assert not [note for note in asked.certificate.notes if "negative" in note]
    assert "negative" not in asked.certificate.rounds[0]


def test_the_certificate_holds_the_proof(half: PruneResult) -> None:
    certificate = half.certificate
    assert 0 <= certificate.masked_error < 1e-5
    assert certificate.feasible
    assert [entry["removed"] for entry in certificate.rounds] == [2 + 3 + 3]
    assert certificate.before["parameters"] == sum(value.numel() for value in made().parameters())
    assert certificate.after["parameters"] == sum(value.numel() for value in half.module().parameters())
    assert certificate.after["macs"] < certificate.before["macs"]
    text = json.dumps(certificate.to_json(), allow_nan=False)
    assert json.loads(text)["rounds"] == certificate.rounds
    assert json.loads(half.to_json())["plan"]["kept"].keys() == half.plan.kept.keys()
    rows = certificate.table()
    assert all(len(row) == 3 and all(isinstance(cell, str) for cell in row) for row in rows)
    assert rows[0] == ("parameters", str(certificate.before["parameters"]), str(certificate.after["parameters"]))


def test_a_budget_of_one_changes_nothing() -> None:
    net = made().eval()
    result = prune(net, X, budget=1.0, metric="widths")
    assert result.plan.kept == {}
    assert result.plan.actions == ()
    assert torch.equal(result.module()(X), net(X))
    assert same(result.module().state_dict(), net.state_dict())
    assert result.certificate.rounds == []


def test_what_is_given_is_never_touched() -> None:
    net = made().train()
    program = capture(net, X).train()
    before, text = state(net), program.hash()
    x, y = examples(24)
    given = x.clone(), y.clone()
    result = prune(program, budget=0.5, metric="widths", data=(x, y), epochs=1, batch_size=8, rounds=1)
    assert same(program.state_dict(), before)
    assert (program.hash(), program.lineage) == (text, ())
    assert program.module().training
    assert result.program is not program
    prune(net, X, budget=0.5, metric="widths", criterion="random")
    assert same(net.state_dict(), before)
    assert net.training
    assert all(value.grad is None for value in [*net.parameters(), *program.module().parameters()])
    assert torch.equal(x, given[0])
    assert torch.equal(y, given[1])


def test_fine_tuning_trains_and_equal_seeds_give_equal_networks() -> None:
    def run(seed: int) -> PruneResult:
        return prune(
            made(), X, budget=0.5, metric="widths", criterion="taylor", data=examples(64), epochs=10, lr=3e-2,
            batch_size=16, seed=seed,
        )  # fmt: skip

    first, second, other = run(0), run(0), run(1)
    assert first.plan == second.plan
    assert same(first.module().state_dict(), second.module().state_dict())
    reports = [
        {name: value for name, value in each.certificate.to_json().items() if name != "measured"}
        for each in (first, second)
    ]
    assert reports[0] == reports[1]
    assert not same(first.module().state_dict(), other.module().state_dict())

    x, y = examples(64)
    tuned, cut = first.module(), prune(made(), X, budget=0.5, metric="widths", criterion="taylor", data=x).module()
    with torch.no_grad():
        assert F.cross_entropy(tuned(x), y) < F.cross_entropy(cut(x), y) - 0.1
    quality = first.certificate.quality
    assert {"metric", "before", "right_after", "after"} <= quality.keys()


@pytest.mark.parametrize("metric", ["macs", "params"])
def test_counted_budgets_are_met(metric: str) -> None:
    result = prune(made(), X, budget=0.5, metric=metric, criterion="magnitude")
    name = {"macs": "macs", "params": "parameters"}[metric]
    ratio = result.certificate.after[name] / result.certificate.before[name]
    assert 0.3 < ratio <= 0.5
    assert result.certificate.reached == pytest.approx(ratio)
    assert result.certificate.feasible
    if metric == "params":
        sizes = [sum(v.numel() for v in module.parameters()) for module in (result.module(), made())]
        assert ratio == pytest.approx(sizes[0] / sizes[1])


def test_named_parameters_keep_their_units() -> None:
    result = prune(made(), X, budget=0.6, metric="params", criterion="magnitude", keep=("conv.*",))
    assert "conv.weight" not in result.plan.kept
    assert result.plan.kept


def test_a_module_needs_example_inputs() -> None:
    with pytest.raises(UsageError, match="example_inputs"):
        prune(made(), budget=0.5)
    with pytest.raises(UsageError, match="got str"):
        prune("net.pt", budget=0.5)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="belongs to a Program"):
        prune(capture(made(), X).module(), X, budget=0.5)


@pytest.mark.parametrize(
    "options",
    [
        *({"budget": budget} for budget in (0, 1.5, -1, math.nan, math.inf, True, "abc", "0", None, [])),
        {"budget": 0.5, "metric": "flops"},
        {"budget": 0.5, "heads": "all"},
        {"budget": 0.5, "optimizer": "ekfac"},
        {"budget": 0.5, "threads": 0},
        {"budget": 0.5, "rounds": 0},
        {"budget": 0.5, "epochs": -1},
        {"budget": 0.5, "batch_size": 2.5},
        {"budget": 0.5, "metric": "macs", "provider": "NoSuch"},
        {"budget": 0.5, "metric": "macs", "precision": "int8"},
        {"budget": 0.5, "metric": "params", "threads": 3},
        {"budget": 0.5, "metric": "macs", "epochs": 5},
        {"budget": 0.5, "metric": "macs", "lr": 1.0},
        {"budget": 0.5, "metric": "widths", "rounds": 4},
        {"budget": 0.5, "metric": "widths", "schedule": "netadapt"},
        {"budget": 0.5, "rounds": 1, "schedule": "netadapt"},
        *({"budget": 0.5, "seed": seed} for seed in (2**70, -1, "one", 1.5, None)),
    ],
)
def test_options_that_mean_nothing_are_refused_first(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as raised:
        prune(made(), X, **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "net", [nn.Linear(2, 3), nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 2)), nn.ReLU()], ids=["one", "narrow", "none"]
)
def test_a_network_with_nothing_to_remove_is_refused(net: nn.Module) -> None:
    with pytest.raises(UnsupportedModel, match="nothing can be removed"):
        prune(net, torch.randn(2, 2), budget=0.5, metric="widths")


def test_control_flow_on_data_is_refused_with_its_line() -> None:
    class Branching(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y if y.sum() > 0 else -y

    with pytest.raises(UnsupportedModel, match=r"test_prune\.py:") as raised:
        prune(Branching(), X, budget=0.5)
    assert "\n" not in str(raised.value)


def test_a_wrong_relocation_is_caught_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.up(x)).mean(-1)

    torch.manual_seed(0)
    net = Mean()
    good = prune(net, torch.randn(2, 2), budget=0.5, metric="widths", criterion="magnitude")
    assert good.certificate.masked_error < 1e-5
    monkeypatch.setitem(registry.RELOCATORS, torch.ops.aten.mean.dim, lambda moved, node: None)
    before = state(net)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VerificationFailed, match="differs from the masked original") as raised:
        prune(net, torch.randn(2, 2), budget=0.5, metric="widths", criterion="magnitude").write(tmp_path, "net")
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []
    assert same(net.state_dict(), before)


def test_the_three_files_are_written_and_verify(half: PruneResult, tmp_path: Path) -> None:
    paths = half.write(tmp_path, "net")
    assert [path.name for path in paths] == ["net.pruned.onnx", "net.pruned.pt", "net.pruned.json"]
    assert all(path.is_file() for path in paths)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)
    assert kfe_fx.verify(paths[2]).to_json()["ok"]
    proof = json.loads(paths[2].read_text())["certificate"]["parity"]
    assert proof["ok"]
    assert 0 <= proof["error"] < 1e-4
    assert proof["batches"]
    assert any(row[0].startswith("ONNX = network") for row in half.certificate.table())
    again = kfe_fx.load(paths[1])
    assert isinstance(again, Program)
    assert torch.equal(again(X), half.module()(X))


def test_an_onnx_model_that_computes_something_else_is_not_written(
    half: PruneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = half.program.copy()
    with torch.no_grad():
        other.tensor("head.bias").add_(1)
    monkeypatch.setattr(proof, "onnx_bytes", lambda program: onnx_bytes(other))
    with pytest.raises(VerificationFailed, match="ONNX Runtime differs from the network"):
        half.write(tmp_path / "out", "net")
    assert list(tmp_path.iterdir()) == []


def test_a_plan_that_was_written_can_be_applied_to_the_module(half: PruneResult) -> None:
    plan = kfe_fx.Plan.from_json(json.loads(half.to_json())["plan"])
    small = kfe_fx.apply(plan, made().eval(), X)
    assert {name: value.shape for name, value in small.state_dict().items()} == {
        name: value.shape for name, value in half.module().state_dict().items()
    }


def test_pruning_twice_prunes_further(half: PruneResult) -> None:
    again = prune(half.program, budget=0.5, metric="widths", criterion="magnitude")
    assert len(analyze(again.program).units) < len(analyze(half.program).units)
    assert again.module().state_dict()["up.weight"].shape[0] == 2


def test_a_parameter_that_nothing_reads():
    class Spare(Net):
        def __init__(self) -> None:
            super().__init__()
            self.never_read = nn.Parameter(torch.ones(2))

    result = prune(Spare(), X, budget=0.5, metric="widths", criterion="magnitude")
    assert torch.equal(result.module().state_dict()["never_read"], torch.ones(2))


class TwoHeads(nn.Module):
    """Two outputs alike, each with hidden units of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(8, 24)
        self.first, self.second = (nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4)) for _ in range(2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.relu(self.trunk(x))
        return {"cls": self.first(h), "box": self.second(h)}


def test_every_output_counts_unless_a_loss_says_otherwise() -> None:
    torch.manual_seed(0)
    net, x = TwoHeads().eval(), torch.randn(64, 8)
    labels = torch.randint(0, 4, (64,))
    program = capture(net, x[:2])

    def error(result: PruneResult, name: str) -> float:
        ours, theirs = result.program(x)[name], net(x)[name]
        return float((ours - theirs).detach().square().mean() / theirs.detach().var())

    blind = prune(program, budget=0.6, metric="params")
    assert error(blind, "box") < 0.2  # 0.21 and 0.45 where nothing of it is looked at
    assert not any("looks at" in note for note in blind.certificate.notes)
    labelled = prune(program, budget=0.6, metric="params", data=(x, labels), epochs=0)
    told = "the loss looks at the output cls alone: what only box needs counts as worth nothing; name a --loss"
    assert any(note.startswith(told) for note in labelled.certificate.notes)

    def both(outputs: Any, targets: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(outputs["cls"], targets) + outputs["box"].square().mean()

    whole = prune(program, budget=0.6, metric="params", data=(x, labels), loss=both, epochs=0)
    assert not any("looks at" in note for note in whole.certificate.notes)
    plain = prune(program, budget=0.6, metric="params", data=(x, labels), criterion="magnitude", epochs=0)
    assert not any("looks at" in note for note in plain.certificate.notes)


def test_examples_that_are_not_finite_are_refused() -> None:
    program = capture(TwoHeads().eval(), torch.zeros(2, 8))
    x, labels = torch.randn(40, 8), torch.arange(40) % 4
    broken = x.clone()
    broken[7, 3] = torch.nan
    for given in ({"data": (broken, labels)}, {"data": (x, labels), "val": (broken, labels)}):
        with pytest.raises(BadData, match="1 NaN or infinite value in 1 of 40 examples"):
            prune(program, budget=0.5, metric="macs", criterion="magnitude", epochs=0, **given)
