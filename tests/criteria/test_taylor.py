"""Taylor and Fisher: numbers, losses, ties (T7.7), the true loss change (T7.3), costs (T7.5), drawn labels, no data."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kfe_fx.cost.count import CostModel
from kfe_fx.cost.state import Sizes, SumState
from kfe_fx.cost.steps import Track
from kfe_fx.criteria import ScoreContext, score
from kfe_fx.errors import BadData, UsageError
from kfe_fx.frontend.capture import capture
from kfe_fx.labels.analysis import analyze
from kfe_fx.passes.shrink import Shrink
from kfe_fx.plan import Plan
from kfe_fx.program import Program
from tests.criteria.nets import expected_gradients, program_of

TARGETS = torch.tensor([0, 2, 1])


def context_of(name: str, loss=None, targets: torch.Tensor | None = TARGETS) -> ScoreContext:
    program, x = program_of(name)
    return ScoreContext.of(program, analyze(program), (x, targets), loss, batch_size=2)


@pytest.mark.parametrize("name", ["residual", "attention", "windows"])
def test_taylor_and_fisher_are_means_over_examples(name: str):
    context = context_of(name)
    _, x = program_of(name)
    loss = lambda outputs, n: F.cross_entropy(outputs[0], TARGETS[n : n + 1])
    rows = expected_gradients(context.program, context.analysis, [x], loss)
    np.testing.assert_allclose(score("taylor", context), np.abs(rows).mean(0), rtol=1e-10)
    np.testing.assert_allclose(score("fisher", context), 0.5 * (rows**2).mean(0), rtol=1e-10)
    assert context.facts["labels"] == "data"
    assert context.facts["examples"] == 3
    assert context.facts["per_example"] == ("loop" if name == "windows" else "batch")


def unlike_any(outputs, targets):
    return F.cross_entropy(outputs, targets) ** 2 * len(targets)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_reduction_of_a_loss_does_not_matter(reduction: str):
    expected = score("fisher", context_of("outer"))
    plain = lambda outputs, targets: F.cross_entropy(outputs, targets, reduction=reduction)
    for loss in (plain, nn.CrossEntropyLoss(reduction=reduction)):
        np.testing.assert_allclose(score("fisher", context_of("outer", loss)), expected, rtol=1e-10)


def test_a_loss_without_a_meaning_per_example_is_refused():
    with pytest.raises(UsageError, match="no meaning per example"):
        score(
            "fisher",
            context_of("outer", lambda outputs, targets: F.cross_entropy(outputs, targets) * len(targets) ** 2),
        )


@pytest.mark.parametrize("criterion", ["fisher", "taylor", "qm", "kfe"])
def test_a_loss_that_mixes_examples_is_refused(criterion: str):
    def mixed(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return ((outputs - outputs.mean(0)) ** 2).mean()  # the same on a batch twice over, as a mean is

    with pytest.raises(UsageError, match="mixes the examples"):
        score(criterion, context_of("outer", mixed))


def test_targets_that_do_not_fit_are_refused():
    with pytest.raises(BadData, match="do not fit the output"):
        score("fisher", context_of("outer", targets=torch.zeros(3, 7, dtype=torch.int64)))


class Twice(nn.Module):
    """One producer, or the same channel made by two producers, or read twice."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        width = 12 if how == "read" else 6
        self.a = nn.Linear(5, 6).double()
        weight = torch.randn(4, 6).double()
        self.head = nn.Linear(width, 4).double()
        with torch.no_grad():
            if how == "made":
                self.b = nn.Linear(5, 6).double()
                self.b.weight.copy_(0.25 * self.a.weight)
                self.b.bias.copy_(0.25 * self.a.bias)
                self.a.weight.mul_(0.75)
                self.a.bias.mul_(0.75)
            self.head.weight.copy_(torch.cat([0.3 * weight, 0.7 * weight], 1) if how == "read" else weight)
            self.head.bias.zero_()

    def forward(self, x):
        y = self.a(x)
        if self.how == "made":
            y = y + self.b(x)
        y = torch.tanh(y)
        return self.head(torch.cat([y, y], 1) if self.how == "read" else y)


@pytest.mark.parametrize("criterion", ["taylor", "fisher"])
@pytest.mark.parametrize("how", ["made", "read"])
def test_coupled_masks_score_as_the_tied_mask(criterion: str, how: str):
    """T7.7: members are summed before the absolute value or the square."""
    x, targets = torch.randn(9, 5).double(), torch.randint(0, 4, (9,))
    found = []
    for kind in ("once", how):
        program = capture(Twice(kind).eval(), x[:2])
        analysis = analyze(program)
        assert len(analysis.units) == 6
        found.append(score(criterion, ScoreContext.of(program, analysis, (x, targets))))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-12)


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 1)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def half_square(outputs, targets):
    return 0.5 * (outputs - targets).square().mean()


def test_fisher_is_the_true_loss_change_of_a_linear_last_layer():
    """T7.3: the loss rises by 1/2 mean_n (a_k v_k)^2 where each input has labels one standard deviation up and down.

    These have the mean and variance of Gaussian labels around the output, all that a second-order change knows of them.
    """
    torch.manual_seed(1)
    module = Scalar().double().eval()
    x = torch.randn(60, 4).double()
    with torch.no_grad():
        y = module(x)
    data = torch.cat([x, x]), torch.cat([y + 1, y - 1])
    program = capture(module, x[:2])
    found = score("fisher", ScoreContext.of(program, analyze(program), data, half_square, batch_size=50))
    sent = torch.relu(module.first(x)) * module.second.weight[0]
    expected = 0.5 * sent.square().mean(0).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    for unit in range(5):  # and so it is of the network without the unit
        cut = copy.deepcopy(module)
        with torch.no_grad():
            cut.second.weight[:, unit] = 0
            change = half_square(cut(data[0]), data[1]) - half_square(module(data[0]), data[1])
        np.testing.assert_allclose(found[unit], float(change), rtol=1e-10, atol=1e-15)


def multiplications_of(program: Program, x: torch.Tensor) -> int:
    """Count by running, as PyTorch counts, with attention as two products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        program(x[:1])
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", ["residual", "attention"])
def test_changes_of_the_cost_add_up_to_that_of_the_network(name: str):
    """T7.5: units go one by one by loss per cost saved; each saving is the difference of two networks that run."""
    program, x = program_of(name)
    analysis = analyze(program)
    losses = score("fisher", ScoreContext.of(program, analysis, (x, TARGETS)))
    model = CostModel(program, analysis)
    terms = model.mac_cost.terms()  # which also finds the widths
    tracks = []
    for group in analysis.groups:
        order = sorted(group.units, key=lambda unit: losses[unit])[:-1]
        tracks.append(Track(group.id, tuple((unit,) for unit in order), tuple(np.cumsum(losses[order]))))
    state = SumState(Sizes(model.widths, tracks, [], 1), terms)
    before = dense = multiplications_of(program, x)
    assert before == state.cost
    total, seen = 0.0, set()
    while open_ := [t for t, track in enumerate(tracks) if state.stops[t] < len(track)]:
        saved = {t: state.after(t, state.stops[t] + 1) - state.cost for t in open_}  # type: ignore[operator]
        seen.add(tuple(saved.values()))
        least = {t: losses[tracks[t].portions[state.stops[t]][0]] for t in open_}
        best = min(open_, key=lambda t: least[t] / max(-saved[t], 1e-9))  # beta_k = -Delta_k / dC_k
        state.move(best, state.stops[best] + 1)
        removed = {unit for t, track in enumerate(tracks) for unit in track.gone(state.stops[t])}
        small = Shrink(Plan.of_units(analysis, removed)).run(program).program
        after = multiplications_of(small, x)
        assert saved[best] == after - before
        total, before = total + saved[best], after
    assert total == before - dense < -0.5 * dense
    assert len(seen) > 5  # what a unit saves changes with every neighbour that goes


def test_labels_are_sampled_where_there_are_none():
    context = context_of("residual", targets=None)
    first = score("fisher", context)
    assert context.facts["labels"] == "sampled (categorical)"
    np.testing.assert_array_equal(first, score("fisher", context_of("residual", targets=None)))
    context = context_of("residual", "mse", targets=None)
    assert not np.allclose(first, score("fisher", context))
    assert context.facts["labels"] == "sampled (Gaussian)"


def test_a_loss_of_ones_own_needs_targets():
    with pytest.raises(BadData, match="'unlike_any' needs targets"):
        score("fisher", context_of("outer", unlike_any, targets=None))


def test_sampled_labels_follow_the_model():
    """The mean square of d(-log p)/d logit is p (1 - p) when labels come from the model."""
    from kfe_fx.training import Batch
    from kfe_fx.training.likelihood import Likelihood

    logits = torch.tensor([[0.0, 1.0, -1.0]], dtype=torch.float64).expand(40_000, 3).clone().requires_grad_()
    for values in (logits, logits.softmax(1)):  # scores, and probabilities
        total = Likelihood(None, 0).total(values, Batch([torch.zeros(40_000, 2)], None, 40_000))
        (grad,) = torch.autograd.grad(total, logits, retain_graph=True)
        p = torch.tensor([0.0, 1.0, -1.0]).softmax(0).double()
        torch.testing.assert_close(grad.square().mean(0), p * (1 - p), rtol=0.03, atol=0)  # drawn labels


def test_token_scores_have_their_classes_last():
    from kfe_fx.training import Batch
    from kfe_fx.training.likelihood import Likelihood

    logits = torch.zeros(2, 3, 7, dtype=torch.float64, requires_grad=True)
    tokens = Batch([torch.zeros(2, 3, dtype=torch.int64)], None, 2)
    total = Likelihood(None, 0).total(logits, tokens)
    assert float(total.detach()) == pytest.approx(2 * np.log(7))
    assert float(Likelihood(None, 0).total(logits, Batch([torch.zeros(2, 5)], None, 2)).detach()) == pytest.approx(
        2 * np.log(3)
    )


@pytest.mark.parametrize("criterion", ["fisher", "lm", "taylor-so", "kron-obd"])
def test_a_loss_that_mixes_examples_is_seen_behind_a_batch_of_one(criterion: str):
    def mixed(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return ((outputs - outputs.mean(0)) ** 2).mean() + 0 * targets.sum()

    program, x = program_of("outer")
    batches = [(x[:1], TARGETS[:1]), (x, TARGETS)]
    with pytest.raises(UsageError, match="mixes the examples"):
        score(criterion, ScoreContext.of(program, analyze(program), batches, mixed))


class Folded(nn.Module):
    """Scores of all positions of all examples, one below the other."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(5, 8), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.up(x))).reshape(-1, 6)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("criterion", ["fisher", "lm", "taylor", "kron-obd"])
def test_examples_are_found_where_positions_are_folded_into_them(criterion: str, reduction: str):
    def folded(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        each = F.cross_entropy(outputs, targets.reshape(-1), reduction="none").reshape(len(targets), -1).mean(1)
        return each if reduction == "none" else each.mean()

    torch.manual_seed(0)
    x, targets, module = torch.randn(12, 7, 5).double(), torch.randint(6, (12, 7)), Folded().double().eval()
    found = []
    for program in (capture(module, x[:4], {}), capture(module, x[:4])):
        context = ScoreContext.of(program, analyze(program), (x, targets), folded, batch_size=4)
        found.append(score(criterion, context))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-9, atol=1e-15)


class Beside(nn.Module):
    """A main output and two beside it, of other sizes and units."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.one, self.many = nn.Linear(8, 1), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = torch.tanh(self.up(x))
        return self.head(h), 30 * self.one(h), 0.1 * self.many(h)


def test_outputs_of_a_fixed_batch_vary_as_those_of_a_free_one():
    """What their errors are divided by is of the batch, and not of each example that is taken out of it."""
    torch.manual_seed(0)
    module, x = Beside().double().eval(), torch.randn(6, 5).double()
    pinned, free = (
        score("obd", ScoreContext.of(program, analyze(program), (x, None), batch_size=6))
        for program in (capture(module, x, {}), capture(module, x))
    )
    np.testing.assert_allclose(pinned, free, rtol=1e-9)


@pytest.mark.parametrize("criterion", ["fisher", "taylor", "taylor-so", "qm"])
@pytest.mark.parametrize("name", ["outer", "windows"])
def test_a_network_of_fixed_batches_has_the_scores_of_a_free_one(name: str, criterion: str):
    free, x = program_of(name)
    pinned = capture(free.module(), x, {})
    found = [
        score(criterion, ScoreContext.of(program, analyze(program), (x, TARGETS), batch_size=3))
        for program in (free, pinned)
    ]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-9, atol=1e-15)


class Tagger(nn.Module):
    """Scores of four classes at each of seven positions of floats, with the classes last or in dim 1."""

    def __init__(self, last: bool):
        super().__init__()
        self.last, self.a, self.b = last, nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.b(torch.relu(self.a(x)))
        return y if self.last else y.transpose(1, 2)


@pytest.mark.parametrize("criterion", ["qm", "kfe", "kron-obd"])
def test_targets_say_where_the_classes_are(criterion: str):
    x, targets = torch.randn(16, 7, 5), torch.randint(4, (16, 7))
    found = []
    for last in (True, False):
        torch.manual_seed(1)
        program = capture(Tagger(last), x[:2])
        found.append(score(criterion, ScoreContext.of(program, analyze(program), (x, targets))))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3, atol=1e-7)


def test_batches_without_targets_go_by_those_that_had_some():
    from kfe_fx.training import Batch
    from kfe_fx.training.likelihood import Likelihood

    logits, x = torch.zeros(2, 3, 7, dtype=torch.float64), torch.zeros(2, 3, 5)
    likelihood = Likelihood(None, 0)
    for targets in (torch.zeros(2, 3, dtype=torch.int64), None):
        assert float(likelihood.total(logits, Batch([x], targets, 2))) == pytest.approx(2 * np.log(7))
