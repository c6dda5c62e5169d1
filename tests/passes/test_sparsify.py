"""``sparsify``: counts, masks that last, predicted against true changes, files, baselines, and what is refused."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfe_fx
from kfe_fx.cli.options import WEIGHT_CRITERIA
from kfe_fx.criteria import Criterion, ScoreContext, resolve
from kfe_fx.errors import BadData, BadFile, UnsupportedModel, UsageError, VerificationFailed
from kfe_fx.labels.analysis import analyze
from kfe_fx.passes.reestimate_statistics import ReestimateStatistics
from kfe_fx.passes.sparse_rounds import NO_TIME, mean_loss
from kfe_fx.passes.sparsify import SparsifyResult, sparsify
from kfe_fx.program import Program
from kfe_fx.training.batches import Batches
from kfe_fx.training.losses import resolve_loss

WEIGHTS = {"conv.weight": 54, "up.weight": 30, "one.weight": 36, "head.weight": 18}
TOTAL = sum(WEIGHTS.values())


class Net(nn.Module):
    """A convolution under a norm, a matrix that is used twice, a head; in double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.up = nn.Linear(5, 6)
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.two.weight = self.one.weight
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv(x))).mean((2, 3))
        y = torch.tanh(self.up(torch.cat([y, x.mean((2, 3))], 1)))
        return self.head(torch.tanh(self.two(torch.tanh(self.one(y)))))


def made(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    net = Net().to(dtype)
    with torch.no_grad():
        net.norm.running_mean.normal_()  # type: ignore[union-attr]
        net.norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return net


def examples(count: int = 48, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    y = torch.arange(count) % 3
    return (torch.randn(count, 2, 4, 4, generator=g) + (y - 1.0).reshape(-1, 1, 1, 1)).to(dtype), y


X, Y = examples()


def program(dtype: torch.dtype = torch.float64) -> Program:
    return kfe_fx.capture(made(dtype), X[:2].to(dtype))


def zeros(result: SparsifyResult) -> int:
    return sum(int((result.program.tensor(name) == 0).sum()) for name in result.masks)


# counts and masks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.004, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("criterion", WEIGHT_CRITERIA)
def test_the_count_is_exact_and_what_is_given_stays(criterion: str, sparsity: float):
    given = program()
    before = copy.deepcopy(given.state_dict())
    result = sparsify(given, sparsity=sparsity, criterion=criterion, data=(X, Y), rounds=3, epochs=0)
    assert all(torch.equal(value, before[name]) for name, value in given.state_dict().items())
    assert {name: mask.numel() for name, mask in result.masks.items()} == WEIGHTS
    assert sum(int((~mask).sum()) for mask in result.masks.values()) == zeros(result) == round(sparsity * TOTAL)
    for name, mask in result.masks.items():
        assert torch.equal(result.program.tensor(name).detach(), before[name] * mask)
    for name in before.keys() - result.masks.keys() - {"two.weight"}:
        assert torch.equal(result.program.tensor(name), before[name]) != ("running" in name), name
    told = result.certificate
    assert told.after["zeros"] == told.rounds[-1]["sparsity"] * TOTAL == round(sparsity * TOTAL)
    assert sum(entry["removed"] for entry in told.rounds) == round(sparsity * TOTAL)
    assert told.before == {"parameters": sum(p.numel() for p in made().parameters()), "weights": TOTAL, "zeros": 0}
    assert told.layers["up.weight"] == {"weights": 30, "zeros": int((~result.masks["up.weight"]).sum())}
    assert NO_TIME in told.notes
    module = result.module()
    assert torch.equal(module.two.weight, module.one.weight)  # type: ignore[union-attr]


def test_magnitude_is_one_global_ranking():
    result = sparsify(program(), sparsity=0.6, data=None)
    assert len(result.certificate.rounds) == 1
    sizes = torch.cat([made().state_dict()[name].abs().flatten() for name in result.masks])
    kept = torch.cat([mask.flatten() for mask in result.masks.values()])
    assert float(sizes[~kept].max()) < float(sizes[kept].min())


@pytest.mark.parametrize("criterion", sorted({*WEIGHT_CRITERIA} - {"magnitude"}))
def test_a_huge_penalty_ranks_by_magnitude(criterion: str):
    """T6.6."""
    expected = sparsify(program(), sparsity=0.7, data=(X, Y), epochs=0).masks
    free = sparsify(program(), sparsity=0.7, criterion=criterion, data=(X, Y), epochs=0, rounds=2).masks
    held = sparsify(program(), sparsity=0.7, criterion=criterion, data=(X, Y), epochs=0, rounds=2, penalty=1e9).masks
    assert all(torch.equal(held[name], expected[name]) for name in expected)
    assert not all(torch.equal(free[name], expected[name]) for name in expected)


def test_lamp_is_one_round_that_says_it_all():
    """What is left keeps its scores when the smaller ones of its layer go, so that more rounds change nothing."""
    one, many = (sparsify(program(), sparsity=0.7, criterion="lamp", rounds=rounds) for rounds in (None, 7))
    assert len(one.certificate.rounds) == 1
    assert all(torch.equal(one.masks[name], many.masks[name]) for name in WEIGHTS)
    assert all(bool(mask.any()) for mask in one.masks.values())


def test_fisher_predicts_what_it_scores():
    (entry,) = sparsify(
        program(), sparsity=0.5, criterion="fisher", data=(X, Y), val=(X, Y), rounds=1, epochs=0
    ).certificate.rounds
    given = program()
    scores = resolve("fisher").weights(ScoreContext.of(given, analyze(given), (X, Y)))
    lowest = torch.cat([value.flatten() for value in scores.values()]).sort().values[: round(0.5 * TOTAL)]
    assert entry["predicted"] == pytest.approx(float(lowest.sum()), rel=1e-12)


def test_a_criterion_of_ones_own_may_need_curvature():
    class Curved(Watching):
        name: ClassVar[str] = "curved"
        needs = frozenset({"curvature"})

        def weights(self, context: ScoreContext) -> dict[str, Tensor]:
            operator = context.curvature("diagonal").operator(context.program, "diagonal")
            return operator.matvec(
                {name: value.detach() for name, value in context.program.module().named_parameters()}
            )

    settings: dict[str, Any] = {"sparsity": 0.5, "criterion": Curved, "rounds": 1, "epochs": 0}
    assert zeros(sparsify(program(), data=(X, Y), **settings)) == round(0.5 * TOTAL)
    with pytest.raises(UsageError, match="'curved' needs curvature, which is not there; give --data"):
        sparsify(program(), **settings)


class Watching(Criterion):
    """Random scores that change each time, and a record of what was zero when they were asked for."""

    name: ClassVar[str] = "watching"

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def score(self, context: ScoreContext) -> np.ndarray:
        return np.zeros(len(context.analysis.units))

    def weights(self, context: ScoreContext) -> dict[str, Tensor]:
        self.seen.append({name: value.detach() == 0 for name, value in context.weights().items()})
        torch.manual_seed(len(self.seen))
        return {name: torch.rand_like(value) for name, value in context.weights().items()}


@pytest.mark.parametrize("schedule", ["exponential", "equal"])
def test_each_round_scores_the_network_that_the_last_one_left(schedule: str):
    """T6.4 with fresh scores: what is zero stays zero though later scores would bring it back."""
    watching = Watching()
    result = sparsify(program(), sparsity=0.8, criterion=watching, schedule=schedule)
    assert len(watching.seen) == 14
    rounds = [*watching.seen, {name: ~mask for name, mask in result.masks.items()}]
    counts = [sum(int(out.sum()) for out in seen.values()) for seen in rounds]
    share = (lambda k: 1 - 0.2 ** (k / 14)) if schedule == "exponential" else (lambda k: k * 0.8 / 14)
    assert counts == [round(share(k) * TOTAL) for k in range(14)] + [round(0.8 * TOTAL)]
    for before, after in pairwise(rounds):
        assert all(bool((before[name] <= after[name]).all()) for name in before)


def test_kept_layers_stay_dense_and_do_not_count():
    result = sparsify(program(), sparsity=0.5, keep=("head", "two.*"))
    assert set(result.masks) == {"conv.weight", "up.weight"}  # two.weight is one.weight
    assert zeros(result) == round(0.5 * 84)
    assert bool((result.program.tensor("head.weight") != 0).all())
    assert bool((result.program.tensor("one.weight") != 0).all())


def test_what_weight_norm_makes_weights_of_stays_dense():
    torch.manual_seed(0)
    norm = nn.utils.parametrizations.weight_norm
    net = nn.Sequential(norm(nn.Linear(4, 12)), nn.ReLU(), norm(nn.Linear(12, 12)), nn.ReLU(), nn.Linear(12, 3)).eval()
    x = torch.randn(24, 4)
    result = sparsify(net, x[:2], sparsity=0.9, data=(x, torch.arange(24) % 3), epochs=0)
    assert set(result.masks) == {"4.weight"}
    assert bool(torch.isfinite(result.module()(x)).all())
    assert any("0.parametrizations.weight.original1" in note for note in result.certificate.notes)
    with pytest.raises(UnsupportedModel, match="weight_norm"):
        sparsify(net[:1], x[:2], sparsity=0.5)


class ByItsNorm(nn.Module):
    """Divides a weight by the norm of its rows, which is zero once all of a row is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(12, 4)), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(x @ (self.weight / self.weight.norm(dim=1, keepdim=True)).t()))


@pytest.mark.parametrize("targets", [True, False])
def test_outputs_that_become_nan_are_refused(targets: bool):
    torch.manual_seed(0)
    x = torch.randn(24, 4)
    data = (x, torch.arange(24) % 3) if targets else None
    with pytest.raises(VerificationFailed, match="not finite any more"):
        sparsify(ByItsNorm(), x[:2], sparsity=0.95, data=data, epochs=0, keep=("head",))


def test_a_layer_without_weights_is_told():
    given = program()
    with torch.no_grad():
        given.tensor("up.weight").mul_(1e-3)
    told = sparsify(given, sparsity=0.5).certificate
    assert told.layers["up.weight"]["zeros"] == 30
    assert [note for note in told.notes if "up.weight" in note] == [
        "every weight of up.weight is zero: its layer gives a constant; --keep it, or ask for less"
    ]


def test_equal_seeds_give_equal_networks():
    runs = [sparsify(program(), sparsity=0.7, criterion="qm", data=(X, Y), epochs=2, seed=3) for _ in range(2)]
    states = [run.program.state_dict() for run in runs]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    told = [{k: v for k, v in run.certificate.to_json().items() if k != "measured"} for run in runs]
    assert told[0] == told[1]


# predicted and realised -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [1, 4])
def test_the_predicted_change_is_the_true_one_of_a_separable_quadratic(rounds: int):
    """T6.1 through the whole pipeline: uncorrelated inputs, mean square error, any set of weights."""
    torch.manual_seed(2)
    x = torch.linalg.qr(torch.randn(8, 4).double())[0] * torch.tensor([1.0, 2.0, 3.0, 0.5]).double()
    y, net = torch.randn(8, 3).double(), nn.Sequential(nn.Linear(4, 3)).double()
    settings: dict[str, Any] = {"sparsity": 0.75, "data": (x, y), "val": (x, y), "rounds": rounds, "epochs": 0}
    result = sparsify(net, x[:2], criterion="qm", **settings)
    assert len(result.certificate.rounds) == rounds
    loss = float(F.mse_loss(net(x), y).detach())
    for entry in result.certificate.rounds:
        assert entry["predicted"] == pytest.approx(entry["realised"], rel=1e-9)
        loss += entry["realised"]
        assert entry["loss"] == pytest.approx(loss, rel=1e-12)
    entry = sparsify(net, x[:2], criterion="lm", **settings).certificate.rounds[0]
    assert entry["predicted"] != pytest.approx(entry["realised"], rel=0.1)  # a line is no parabola


def test_the_realised_change_is_that_of_the_masked_network():
    given = program()
    result = sparsify(given, sparsity=0.6, criterion="qm", data=(X, Y), val=(X, Y), rounds=2, epochs=0)
    batches = Batches(given, (X, Y), 64)
    before = mean_loss(given, batches, resolve_loss(None, Y))
    assert before == pytest.approx(float(F.cross_entropy(given(X), Y).detach()), rel=1e-12)
    masked = given.copy()
    with torch.no_grad():
        for name, mask in result.masks.items():
            masked.tensor(name).mul_(mask)
    after = mean_loss(masked, batches, resolve_loss(None, Y))
    assert sum(entry["realised"] for entry in result.certificate.rounds) == pytest.approx(after - before, rel=1e-9)
    fresh = ReestimateStatistics((X, Y)).run(masked).program.state_dict()
    found = result.program.state_dict()
    torch.testing.assert_close({name: found[name] for name in fresh}, fresh, rtol=1e-12, atol=1e-12)  # one batch


def test_baselines_predict_nothing():
    (entry,) = sparsify(program(), sparsity=0.5, data=(X, Y), epochs=0).certificate.rounds
    assert entry["predicted"] is None
    assert entry["realised"] is not None
    (entry,) = sparsify(program(), sparsity=0.5).certificate.rounds
    assert (entry["realised"], entry["loss"]) == (None, None)


# fine-tuning and files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_masks_survive_fine_tuning(optimizer: str):
    settings: dict[str, Any] = {"sparsity": 0.5, "criterion": "qm", "data": (X, Y), "val": (X, Y), "rounds": 3}
    bare = sparsify(program(), epochs=0, **settings)
    result = sparsify(program(), epochs=8, lr=0.02, batch_size=16, optimizer=optimizer, **settings)
    assert all(torch.equal(result.masks[name], bare.masks[name]) for name in bare.masks)
    for name, mask in result.masks.items():
        value = result.program.tensor(name).detach()
        assert torch.equal(value != 0, mask)
        assert not torch.equal(value[mask], bare.program.tensor(name).detach()[mask])
    told = result.certificate
    assert told.data["finetune"]["epochs"] == 8
    assert told.data["finetune"]["last_loss"] < told.data["finetune"]["first_loss"]
    assert {"before", "right_after", "after"} <= told.quality.keys()
    assert told.quality["right_after"] == bare.certificate.quality["right_after"]
    assert "after" not in bare.certificate.quality


def test_files_hold_the_zeros_and_can_be_verified(tmp_path: Path):
    result = sparsify(program(torch.float32), sparsity=0.7, data=examples(dtype=torch.float32), epochs=1)
    paths = result.write(tmp_path, "net")
    assert [path.name for path in paths] == [f"net.sparse.pruned.{ending}" for ending in ("onnx", "pt", "json")]
    counts = {name: int((~mask).sum()) for name, mask in result.masks.items()}
    tensors = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(paths[0]).graph.initializer]
    found = sorted((array.size, int((array == 0).sum())) for array in tensors if array.ndim > 1)
    # the exporter folds the norm into the convolution, and may write the tied matrix once or twice
    assert sorted(set(found)) == sorted((WEIGHTS[name], count) for name, count in counts.items())
    loaded = kfe_fx.load(paths[1])
    assert all(torch.equal(loaded.tensor(name) != 0, mask) for name, mask in result.masks.items())
    assert loaded.lineage[-1] == "sparsify"
    document = json.loads(paths[2].read_text())
    assert document["certificate"]["layers"] == {
        name: {"weights": WEIGHTS[name], "zeros": count} for name, count in counts.items()
    }
    assert document["certificate"]["parity"]["ok"]
    assert document["certificate"]["sparsity"] == 0.7
    assert json.loads(result.to_json())["certificate"]["criterion"] == "magnitude"
    checks = {check: outcome for check, outcome, _ in kfe_fx.verify(paths[2]).checks}
    assert checks["ONNX = network"] == "equal"
    with pytest.raises(BadFile, match="exists"):
        result.write(tmp_path, "net")
    result.write(tmp_path, "net", force=True)
    rows = {what: after for what, _, after in result.certificate.table()}
    assert rows["... that are 0"] == str(sum(counts.values()))
    assert result.certificate.masked_error == 0.0
    assert len(result.certificate.rounds_table()) == 1


def test_the_calibration_sample_of_a_program_file_scores(tmp_path: Path):
    kfe_fx.save(program(), path=tmp_path / "net.pt", calibration=(X, Y))
    result = sparsify(kfe_fx.load(tmp_path / "net.pt"), sparsity=0.5, criterion="lm", rounds=2)
    assert result.certificate.rounds[0]["predicted"] is not None
    assert result.certificate.quality == {}


# what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        *(({"sparsity": value}, "sparsity is the share") for value in (0, 1, -0.1, 1.5, float("nan"), "0.5", True)),
        ({"rounds": 0}, "rounds is a whole number"),
        ({"rounds": 2.5}, "rounds is a whole number"),
        ({"epochs": -1}, "epochs is a whole number"),
        ({"batch_size": 0}, "batch_size is a whole number"),
        ({"lr": 0}, "lr is a number above 0"),
        ({"penalty": -1}, "penalty is a number of at least 0"),
        ({"penalty": float("inf")}, "penalty is a number of at least 0"),
        ({"schedule": "linear"}, "schedule is exponential or equal"),
        ({"optimizer": "ekfac"}, "optimizer is adamw or sgd"),
        ({"criterion": "luck"}, "no criterion 'luck'"),
        ({"criterion": "group-fisher"}, f"scores units, not single weights; choose {', '.join(WEIGHT_CRITERIA)}, or "),
        ({"keep": ("tail",)}, "--keep 'tail' matches no parameter"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any], told: str):
    with pytest.raises(UsageError, match=told):
        sparsify(program(), **{"sparsity": 0.5, **options})


@pytest.mark.parametrize("criterion", ["fisher", "taylor", "taylor-so", "lm", "qm"])
def test_a_loss_that_mixes_examples_scores_nothing(criterion: str):
    def mixed(outputs: Any, targets: Tensor) -> Tensor:
        return (outputs - outputs.mean(0)).square().mean() + 0 * targets.sum()

    with pytest.raises(UsageError, match="mixes the examples"):
        sparsify(program(), sparsity=0.5, criterion=criterion, data=(X, Y), loss=mixed, epochs=0)


@pytest.mark.parametrize("seed", [2**70, "one"])
def test_a_seed_that_nothing_can_be_drawn_from(seed: Any):
    with pytest.raises(UsageError, match="seed is a whole number"):
        sparsify(program(), sparsity=0.5, seed=seed)
    with pytest.raises(UsageError, match="seed is a whole number"):
        kfe_fx.train(program(), (X, Y), seed=seed)


def test_examples_that_are_needed_must_be_there():
    with pytest.raises(UsageError, match="'qm' needs targets, which is not there; give --data"):
        sparsify(program(), sparsity=0.5, criterion="qm")
    with pytest.raises(UsageError, match="'lm' needs targets"):
        sparsify(program(), sparsity=0.5, criterion="lm", data=(X, None))
    needy = type("Needy", (Watching,), {"name": "needy", "needs": frozenset({"data"})})
    with pytest.raises(UsageError, match="'needy' needs data"):
        sparsify(program(), sparsity=0.5, criterion=needy)
    result = sparsify(program(), sparsity=0.5, criterion="obd", rounds=2)
    assert result.certificate.data["data_free"] is True


def test_scores_that_are_none():
    short = type("Short", (Watching,), {"weights": lambda self, context: {"up.weight": torch.zeros(6, 5)}})
    with pytest.raises(UsageError, match=r"gives no score per entry of conv.weight \[3, 2, 3, 3\]"):
        sparsify(program(), sparsity=0.5, criterion=short)
    broken = program()
    scores = {name: torch.ones_like(broken.tensor(name)) for name in WEIGHTS}
    scores["up.weight"][0, 0] = float("nan")
    none = type("None", (Watching,), {"weights": lambda self, context: scores})
    with pytest.raises(UsageError, match=r"a score of nan to an entry of up.weight"):
        sparsify(broken, sparsity=0.5, criterion=none)
    with torch.no_grad():
        broken.tensor("up.weight")[0, 0] = float("nan")
    with pytest.raises(UsageError, match=r"damaged: 1 of 30 values of up.weight"):
        sparsify(broken, sparsity=0.5)


def test_data_that_does_not_fit():
    with pytest.raises(BadData):
        sparsify(program(), sparsity=0.5, data=(X[:, :1], Y))
    bad = X.clone()
    bad[3, 0, 0, 0] = float("nan")
    with pytest.raises(BadData):
        sparsify(program(), sparsity=0.5, criterion="lm", data=(bad, Y))


def test_modules():
    with pytest.raises(UsageError, match="example_inputs are needed"):
        sparsify(made(), sparsity=0.5)
    with pytest.raises(UsageError, match="sparsify the Program"):
        sparsify(program().module(), sparsity=0.5)
    with pytest.raises(UsageError, match=r"takes a Program or an nn\.Module, got str"):
        sparsify("net.pt", sparsity=0.5)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModel, match="has no weights that could be zeroed: --keep"):
        sparsify(program(), sparsity=0.5, keep=("*",))
    with pytest.raises(UnsupportedModel, match="no floating-point matrices"):
        sparsify(nn.BatchNorm2d(2).double().eval(), X[:2], sparsity=0.5)
    assert kfe_fx.sparsify is sparsify
