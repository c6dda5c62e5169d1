"""Loss models against dense truth: true changes of quadratics (T6.1), the limits (T6.2), dense J^T H J (T6.5)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfe_fx.criteria import Criterion, ScoreContext, resolve, score
from kfe_fx.criteria.loss_models import LossModel
from kfe_fx.errors import BadData, UsageError
from kfe_fx.frontend.capture import capture
from kfe_fx.gates import gated
from kfe_fx.labels.analysis import analyze
from kfe_fx.passes.prune import prune
from kfe_fx.program import Program
from kfe_fx.testing import CriterionConformance
from tests.criteria.nets import CLASSES, build, expected_gradients, program_of

TARGETS = torch.tensor([0, 2, 1])
MODELS = ("lm", "qm", "obd")


class TestLinearModel(CriterionConformance):
    criterion = "lm"


class TestQuadraticModel(CriterionConformance):
    criterion = "qm"


class TestOptimalBrainDamage(CriterionConformance):
    criterion = "obd"


class TestSecondOrderTaylor(CriterionConformance):
    criterion = "taylor-so"


def model_of(name: str) -> LossModel:
    found = resolve(name)
    assert isinstance(found, LossModel)
    return found


def context_of(program: Program, x: Tensor, targets: Tensor | None = TARGETS, loss: object = None) -> ScoreContext:
    return ScoreContext.of(program, analyze(program), (x, targets), loss, batch_size=2)


# units ----------------------------------------------------------------------------------------------------------------


def brute(program: Program, x: Tensor, loss: str) -> tuple[np.ndarray, np.ndarray]:
    """Gradients and Gauss-Newton diagonals of each example at the gates, [N, units], by autograd without gates."""
    analysis = analyze(program)
    wanted = F.one_hot(TARGETS, CLASSES).double()

    def gradient(outputs: tuple[Tensor, ...], n: int) -> Tensor:
        if loss == "mse":
            return (outputs[0] - wanted[n : n + 1]).square().mean()
        return F.cross_entropy(outputs[0], TARGETS[n : n + 1])

    def column(c: int) -> Callable[[tuple[Tensor, ...], int], Tensor]:
        if loss == "mse":
            return lambda outputs, n: outputs[0][0, c] * (2 / CLASSES) ** 0.5
        return lambda outputs, n: outputs[0].softmax(1)[0, c].detach().sqrt() * outputs[0].log_softmax(1)[0, c]

    rows = [expected_gradients(program, analysis, [x], column(c)) for c in range(CLASSES)]
    return expected_gradients(program, analysis, [x], gradient), np.square(rows).sum(0)


@pytest.mark.parametrize("loss", ["cross-entropy", "mse"])
@pytest.mark.parametrize("name", ["residual", "attention", "outer", "inner", "plain", "windows"])
def test_scores_of_units_are_those_of_brute_force(name: str, loss: str):
    program, x = program_of(name)
    g, h = brute(program, x, loss)
    context = context_of(program, x, F.one_hot(TARGETS, CLASSES).double() if loss == "mse" else TARGETS)
    close = lambda criterion, expected: np.testing.assert_allclose(
        score(criterion, context), expected, rtol=1e-9, atol=1e-15
    )
    close("lm", np.abs(g.mean(0)))
    close("obd", 0.5 * h.mean(0))
    assert context.facts["curvature"] == f"exact ({'Gaussian' if loss == 'mse' else 'categorical'})"
    close("qm", np.abs(-g.mean(0) + 0.5 * h.mean(0)))
    close("taylor-so", np.abs(-g + 0.5 * h).mean(0))


def test_a_pinned_batch_is_taken_apart_behind_the_network():
    """Squares of the summed rows of a batch would hold the products of its examples."""
    module, x = build("windows")
    program = capture(module, x, {})
    context = context_of(program, x)
    assert not program.batch_axes()
    assert not gated(program, context.analysis).per_example
    free, _ = program_of("windows")
    g, h = brute(free, x, "cross-entropy")
    np.testing.assert_allclose(score("qm", context), np.abs(-g.mean(0) + 0.5 * h.mean(0)), rtol=1e-9)
    np.testing.assert_allclose(score("taylor-so", context), np.abs(-g + 0.5 * h).mean(0), rtol=1e-9)


class Linear(nn.Module):
    """Two linear layers: gates, which sit where units are made, enter the outputs linearly."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def linear(outputs: int = 3, seed: int = 0) -> Program:
    torch.manual_seed(seed)
    return capture(Linear(outputs).double(), torch.randn(2, 4).double())


def test_the_quadratic_model_of_a_unit_is_the_true_change_of_a_mean_square():
    """T6.1 for units: mean square error is quadratic in a gate before a linear layer."""
    program = linear()
    x, y = torch.randn(7, 4).double(), torch.randn(7, 3).double()
    context = context_of(program, x, y)
    state = program.state_dict()
    hidden = F.linear(x, state["first.weight"], state["first.bias"])
    true = []
    for unit in range(5):
        masked = hidden.clone()
        masked[:, unit] = 0
        after, before = (F.linear(h, state["second.weight"], state["second.bias"]) for h in (masked, hidden))
        true.append(float(((after - y) ** 2).mean() - ((before - y) ** 2).mean()))
    np.testing.assert_allclose(score("qm", context), np.abs(true), rtol=1e-9)


MODELS_OF_UNITS = (*MODELS, "taylor-so")


@pytest.mark.parametrize("name", MODELS_OF_UNITS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_what_is_promised_of_a_unit_is_the_signed_model(name: str, sign: float):
    """T6.1 for units, through ``prune``; without its unit the loss falls in one case, and rises in the other."""
    program = linear(seed=1)
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(3)).double()
    with torch.no_grad():
        y = (sign * 3 * program(x)).float().double()  # targets are read as float32
    one = {"budget": 0.8, "metric": "widths", "criterion": name, "epochs": 0, "repair": "none"}
    result = prune(program, data=(x, y), val=(x[:5], y[:5]), **one)
    (gone,) = result.plan.units(analyze(program))
    state = program.state_dict()
    hidden = F.linear(x, state["first.weight"], state["first.bias"])[:, gone]
    error = F.linear(F.linear(x, state["first.weight"], state["first.bias"]), state["second.weight"]) - y
    error = error + state["second.bias"]
    effect = hidden[:, None] * state["second.weight"][:, gone]  # of the gate on the outputs
    g, h = float(2 * (error * effect).mean()), float(2 * effect.square().mean())
    expected = {"lm": -g, "obd": 0.5 * h}.get(name, -g + 0.5 * h)
    told = result.certificate.loss
    assert told["predicted_change"] == pytest.approx(expected, rel=1e-9)
    if name in ("qm", "taylor-so"):
        assert told["realised_change"] == pytest.approx(expected, rel=1e-9)
        assert (told["realised_change"] < 0) == (sign > 0)


def test_scores_rank_and_changes_are_signed():
    program = linear()
    x, y = torch.randn(7, 4).double(), torch.randn(7, 3).double()
    context = context_of(program, x, y)
    for name in ("lm", "qm"):
        scores = score(name, context)
        assert context.changes is not None
        assert (context.changes < 0).any()
        np.testing.assert_array_equal(np.abs(context.changes), scores)
    score("magnitude", context)  # of no loss
    assert context.changes is None
    np.testing.assert_array_equal(score("fisher", context), context.changes)


# single weights -------------------------------------------------------------------------------------------------------


def dense(program: Program, x: Tensor, targets: Tensor, name: str, loss: str) -> tuple[Tensor, Tensor]:
    """Mean gradient and the diagonal of mean J^T H J for one parameter, by whole Jacobians."""
    weight = program.tensor(name).detach()
    module = program.module()

    def outputs(value: Tensor, n: int) -> Tensor:
        found = torch.func.functional_call(_Called(module), {f"held.{name}": value}, (x[n : n + 1],))
        return found[0]

    g, h = torch.zeros_like(weight), torch.zeros_like(weight)
    for n in range(len(x)):
        jacobian = torch.autograd.functional.jacobian(lambda value, n=n: outputs(value, n), weight)
        y = outputs(weight, n).detach()
        if loss == "mse":
            slope, hessian = 2 * (y - targets[n]) / len(y), 2 * torch.eye(len(y)).double() / len(y)
        else:
            p = y.softmax(0)
            slope, hessian = p - F.one_hot(targets[n], len(p)), torch.diag(p) - torch.outer(p, p)
        flat = jacobian.reshape(len(y), -1)
        g += (flat.t() @ slope).view_as(weight) / len(x)
        h += torch.diagonal(flat.t() @ hessian @ flat).view_as(weight) / len(x)
    return g, h


class _Called(nn.Module):
    """A Program's module inside another, so that torch.func can swap its tensors under generated code."""

    def __init__(self, held: nn.Module) -> None:
        super().__init__()
        self.held = held

    def forward(self, x: Tensor) -> Tensor:
        return self.held(x)


@pytest.mark.parametrize("loss", ["cross-entropy", "mse"])
def test_changes_of_weights_are_those_of_dense_matrices(loss: str):
    """T6.5: plain, depthwise and grouped convolutions, norms in evaluation mode, a linear head."""
    program, x = program_of("residual")
    targets = F.one_hot(TARGETS, CLASSES).double() if loss == "mse" else TARGETS
    context = context_of(program, x, targets)
    found = {name: model_of(name).changes(context) for name in MODELS}
    assert context.facts["curvature"].startswith("exact")
    assert "curvature_by_autograd" not in context.facts
    assert found["qm"].keys() == context.weights().keys() == set(found["lm"])
    for name, weight in context.weights().items():
        g, h = dense(program, x, targets, name, loss)
        first, second = g * weight.detach(), 0.5 * h * weight.detach() ** 2
        for model, expected in (("lm", -first), ("qm", second - first), ("obd", second)):
            torch.testing.assert_close(found[model][name], expected, rtol=1e-9, atol=1e-14, msg=f"{model} {name}")
            score_of_model = model_of(model).weights(context)[name]
            torch.testing.assert_close(score_of_model, expected.abs(), rtol=1e-9, atol=1e-14)


class Separable(nn.Module):
    """A linear layer; with inputs of uncorrelated columns its mean square error separates over single weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def separable() -> tuple[Program, Tensor, Tensor]:
    torch.manual_seed(2)
    x = torch.linalg.qr(torch.randn(8, 4).double())[0] * torch.tensor([1.0, 2.0, 3.0, 0.5]).double()
    return capture(Separable().double(), x[:2]), x, torch.randn(8, 3).double()


def test_the_quadratic_model_of_weights_is_the_true_change_of_a_separable_quadratic():
    """T6.1: for each weight alone, and for any set of weights the sum."""
    program, x, y = separable()
    weight = program.tensor("layer.weight")
    changes = model_of("qm").changes(context_of(program, x, y))["layer.weight"]
    kept = weight.detach().clone()

    def change(out: Tensor) -> float:
        before = float(F.mse_loss(program(x), y).detach())
        with torch.no_grad():
            weight.masked_fill_(out, 0.0)
            after = float(F.mse_loss(program(x), y))
            weight.copy_(kept)
        return after - before

    for entry in range(weight.numel()):
        out = torch.zeros(12, dtype=torch.bool)
        out[entry] = True
        assert change(out.view(3, 4)) == pytest.approx(float(changes.view(-1)[entry]), rel=1e-9)
    out = torch.rand(3, 4) < 0.5
    assert change(out) == pytest.approx(float(changes[out].sum()), rel=1e-9)


def test_without_curvature_lm_is_qm_and_without_gradient_obd_is():
    """T6.2: LM == |QM| where H = 0; OBD == QM where g = 0, at the minimum of a quadratic."""
    first = torch.randn(50).double()
    lm, qm = (model_of(name).change(first, torch.zeros_like(first)) for name in ("lm", "qm"))
    assert torch.equal(lm.abs(), qm.abs())
    program, x, y = separable()
    with_ones = torch.cat([x, torch.ones(8, 1).double()], 1)
    best = torch.linalg.lstsq(with_ones, y).solution
    with torch.no_grad():
        program.tensor("layer.weight").copy_(best[:4].t())
        program.tensor("layer.bias").copy_(best[4])
    context = context_of(program, x, y)
    torch.testing.assert_close(model_of("lm").weights(context)["layer.weight"], torch.zeros(3, 4).double())
    torch.testing.assert_close(
        model_of("qm").weights(context)["layer.weight"], model_of("obd").weights(context)["layer.weight"]
    )


class Showing(nn.Module):
    """The embedding-like weight goes to an output too, which leaves it without statistics; a spare one goes nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 6), nn.Linear(6, CLASSES)
        self.spare = nn.Parameter(torch.randn(2, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(torch.tanh(self.first(x))), self.first.weight


@pytest.mark.parametrize("pinned", [False, True])
def test_weights_without_statistics_are_measured_by_autograd(pinned: bool):
    torch.manual_seed(0)
    x = torch.randn(3, 5).double()
    program = capture(Showing().double(), x, {} if pinned else None)
    context = context_of(program, x)
    changes = model_of("qm").changes(context)
    assert set(context.facts["curvature_by_autograd"]) == {"first.weight", "spare"}
    assert torch.equal(changes["spare"], torch.zeros(2, 3).double())
    g = torch.zeros(6, 5).double()
    h = torch.zeros(6, 5).double()
    weight = program.tensor("first.weight")
    for n in range(3):
        logs = (program(x)[0][n] if pinned else program(x[n : n + 1])[0][0]).log_softmax(0)
        g += torch.autograd.grad(-logs[TARGETS[n]], weight, retain_graph=True)[0] / 3
        for log in logs:
            h += log.detach().exp() * torch.autograd.grad(log, weight, retain_graph=True)[0] ** 2 / 3
    torch.testing.assert_close(changes["first.weight"], (-g * weight + 0.5 * h * weight**2).detach(), rtol=1e-9, atol=0)


def test_frozen_and_tied_weights_are_scored_too():
    program = linear(outputs=5)
    x, y = torch.randn(7, 4).double(), torch.randint(0, 5, (7,))
    expected = model_of("qm").changes(context_of(program, x, y))
    for parameter in program.module().parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        found = model_of("qm").changes(context_of(program, x, y))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(not p.requires_grad and p.grad is None for p in program.module().parameters())

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.tanh(self.one(x)))

    module = Tied().double()
    program, y = capture(module, x[:2]), torch.randint(0, 4, (7,))
    changes = model_of("lm").changes(context_of(program, x, y))
    (g,) = torch.autograd.grad(F.cross_entropy(module(x), y), module.one.weight)
    assert list(changes) == ["one.weight"]
    torch.testing.assert_close(changes["one.weight"], (-g * module.one.weight).detach(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", ["magnitude", "random"])
def test_baselines_score_single_weights(name: str):
    program, x = program_of("residual")
    context = context_of(program, x)
    found = resolve(name).weights(context)
    assert found.keys() == context.weights().keys()
    assert "norm.weight" not in found
    assert "stem.weight" in found
    for key, value in found.items():
        weight = program.tensor(key).detach()
        assert value.shape == weight.shape
        if name == "magnitude":
            assert torch.equal(value, weight**2)
    again = resolve(name).weights(context)
    assert all(torch.equal(found[key], again[key]) for key in found)
    context.seed = 1
    other = resolve(name).weights(context)
    assert all(torch.equal(found[key], other[key]) for key in found) == (name == "magnitude")


# where curvature comes from, and what is refused ----------------------------------------------------------------------


def test_more_than_twenty_outputs_are_sampled():
    """The mean square over drawn labels is the exact curvature; 20,000 draws are within a few percent of it."""
    program = linear(outputs=21)
    x = torch.randn(1, 4).double().expand(20_000, 4)
    context = ScoreContext.of(program, analyze(program), (x, None), batch_size=5000)
    found = score("obd", context)
    assert context.facts["curvature"] == "sampled (categorical)"
    state = program.state_dict()
    hidden, weight = F.linear(x[:1], state["first.weight"], state["first.bias"]), state["second.weight"]
    p = F.linear(hidden, weight, state["second.bias"]).softmax(1)[0]
    hessian = torch.diag(p) - torch.outer(p, p)
    expected = 0.5 * torch.diagonal(weight.t() @ hessian @ weight) * hidden[0] ** 2
    np.testing.assert_allclose(found, expected.numpy(), rtol=0.06)  # labels are drawn
    changes = model_of("obd").changes(context)["second.weight"]
    expected = 0.5 * torch.diagonal(hessian).unsqueeze(1) * hidden**2 * weight**2
    torch.testing.assert_close(changes.sum(0), expected.sum(0), rtol=0.06, atol=0)
    assert context.facts["curvature"] == "sampled (categorical)"


def halved(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * F.cross_entropy(outputs, targets)


def test_a_loss_of_ones_own_has_the_empirical_curvature():
    program, x = program_of("attention")
    context = context_of(program, x, loss=halved)
    g, _ = brute(program, x, "cross-entropy")
    np.testing.assert_allclose(score("obd", context), 0.5 * (0.25 * g**2).mean(0), rtol=1e-9)
    assert context.facts["curvature"] == "empirical (labels of the data)"
    np.testing.assert_allclose(score("taylor-so", context), np.abs(-0.5 * g + 0.125 * g**2).mean(0), rtol=1e-9)
    model_of("qm").changes(context)
    assert context.facts["curvature"].startswith("empirical")
    with pytest.raises(BadData, match="needs targets"):
        score("obd", context_of(program, x, None, halved))


@pytest.mark.parametrize("name", ["lm", "qm"])
def test_the_gradient_needs_targets(name: str):
    program, x = program_of("outer")
    with pytest.raises(UsageError, match=f"'{name}' needs targets"):
        score(name, context_of(program, x, None))
    with pytest.raises(BadData, match="needs a loss and targets"):
        model_of(name).changes(context_of(program, x, None))


def test_obd_needs_no_examples_at_all():
    program, x = program_of("residual")
    context = ScoreContext.of(program, analyze(program))
    units = score("obd", context)
    assert (units >= 0).all()
    assert units.max() > 0
    changes = model_of("obd").changes(context)
    assert context.facts["inputs"] == "drawn"
    assert context.facts["data_free"] is True
    assert all(bool((change >= 0).all()) for change in changes.values())
    assert float(changes["head.weight"].sum()) > 0
    without = model_of("obd").changes(context_of(program, x, None))  # targets do not enter an exact curvature
    with_them = model_of("obd").changes(context_of(program, x))
    assert all(torch.equal(without[name], with_them[name]) for name in without)


def test_changes_leave_the_program_alone():
    program, x = program_of("residual")
    program.train()
    before = {name: value.clone() for name, value in program.state_dict().items()}
    context = context_of(program, x)
    for name in MODELS:
        model_of(name).weights(context)
    assert program.module().training
    assert all(torch.equal(value, before[name]) for name, value in program.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in program.module().parameters())


@pytest.mark.parametrize("name", ["lm", "qm", "obd"])
def test_numbers_that_are_not_finite_are_refused(name: str):
    program, x = program_of("outer")
    with torch.no_grad():
        program.tensor("second.weight").fill_(float("nan"))
    context = context_of(program, x)
    for asked in (model_of(name).weights, lambda context: score(name, context)):
        with pytest.raises((BadData, UsageError), match=r"not finite|no gradient was finite"):
            asked(context)


def test_criteria_of_units_alone_say_so():
    program, x = program_of("outer")
    criterion: Criterion = resolve("group-fisher")
    with pytest.raises(UsageError, match="'group-fisher' scores units, not single weights; choose fisher, lamp, lm"):
        criterion.weights(context_of(program, x))
