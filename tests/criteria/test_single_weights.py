"""Scores of single weights against loops over examples and entries, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kfe_fx.criteria import ScoreContext, names, resolve
from kfe_fx.errors import BadData, UsageError
from kfe_fx.frontend.capture import capture
from kfe_fx.labels.analysis import analyze
from kfe_fx.program import Program
from kfe_fx.training.batches import Batch
from kfe_fx.training.likelihood import Likelihood
from tests.criteria.nets import program_of

TARGETS = torch.tensor([0, 2, 1])


def context_of(program: Program, x: Tensor, targets: Tensor | None = TARGETS) -> ScoreContext:
    return ScoreContext.of(program, analyze(program), (x, targets), batch_size=2)


def loop(program: Program, x: Tensor, targets: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients and Gauss-Newton diagonals of each example by each weight, [N, ...], by plain autograd."""
    weights = {name: p for name, p in program.module().named_parameters() if p.dim() > 1}

    def back(value: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(value, list(weights.values()), retain_graph=True, allow_unused=True)
        return [torch.zeros_like(w) if g is None else g for w, g in zip(weights.values(), found, strict=True)]

    first, second = [], []
    for n, target in enumerate(targets):
        output = program(x[n : n + 1])
        logs = (output if isinstance(output, Tensor) else output[0])[0].log_softmax(0)
        first.append(back(-logs[target]))
        columns = [[log.exp().detach() * g**2 for g in back(log)] for log in logs]
        second.append([torch.stack(parts).sum(0) for parts in zip(*columns, strict=True)])
    return tuple(
        {name: torch.stack(rows) for name, rows in zip(weights, zip(*found, strict=True), strict=True)}
        for found in (first, second)
    )  # type: ignore[return-value]


class Showing(nn.Module):
    """The first weight goes to an output too, which leaves it without statistics; another is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.twice(torch.tanh(self.twice(torch.tanh(self.first(x)))))
        return self.head(y), self.first.weight


def network(name: str) -> tuple[Program, Tensor]:
    if name != "showing":
        return program_of(name)
    torch.manual_seed(0)
    x = torch.randn(3, 5).double()
    return capture(Showing().double(), x[:2]), x


@pytest.mark.parametrize("name", ["residual", "attention", "windows", "showing"])
def test_scores_are_means_over_examples(name: str):
    program, x = network(name)
    g, h = loop(program, x, TARGETS)
    for criterion, term in (
        ("fisher", lambda w, g, h: 0.5 * g**2 * w**2),
        ("taylor", lambda w, g, h: (g * w).abs()),
        ("taylor-so", lambda w, g, h: (0.5 * h * w**2 - g * w).abs()),
    ):
        context = context_of(program, x)
        found = resolve(criterion).weights(context)
        assert found.keys() == context.weights().keys() == g.keys()
        for key, weight in context.weights().items():
            expected = term(weight.detach(), g[key], h[key]).mean(0)
            torch.testing.assert_close(found[key], expected, rtol=1e-9, atol=1e-15, msg=f"{criterion} {key}")
        assert context.facts["labels"] == "data"
        assert context.facts["examples"] == 3
    assert all(p.grad is None for p in program.module().parameters())


def test_labels_are_drawn_where_there_are_none():
    program, x = program_of("attention")
    context = context_of(program, x, None)
    found = resolve("taylor").weights(context)
    assert context.facts["labels"] == "sampled (categorical)"
    likelihood, weights = Likelihood(None, 0), context.weights()
    expected = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for n in range(3):  # the same draws, an example at a time
        total = likelihood.total(program(x[n : n + 1]), Batch([x[n : n + 1]], None, 1))
        for (name, weight), grad in zip(
            weights.items(), torch.autograd.grad(total, list(weights.values())), strict=True
        ):
            expected[name] += (grad * weight).detach().abs() / 3
    for name in weights:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-15)
    fisher, again = (resolve("fisher").weights(context_of(program, x, None)) for _ in range(2))
    empirical = resolve("fisher").weights(context_of(program, x))
    assert all(torch.equal(fisher[name], again[name]) for name in weights)
    assert not all(torch.allclose(fisher[name], empirical[name]) for name in weights)
    drawn = ScoreContext.of(program, analyze(program))
    assert resolve("fisher").weights(drawn).keys() == weights.keys()
    assert (drawn.facts["inputs"], drawn.facts["labels"]) == ("drawn", "sampled (categorical)")


def test_a_drawn_label_is_right_in_the_mean():
    """With one linear layer and a Gaussian, E g^2 = x_i^2; a label of two classes has p (1 - p) x_i^2."""
    torch.manual_seed(0)
    x = torch.randn(1, 3).double()
    program = capture(nn.Sequential(nn.Linear(3, 2)).double(), x)
    many = x.expand(40_000, 3)
    context = ScoreContext.of(program, analyze(program), (many, None), batch_size=20_000)
    found = resolve("fisher").weights(context)["0.weight"]
    weight, p = program.tensor("0.weight").detach(), program(x).detach().softmax(1)[0]
    expected = 0.5 * weight**2 * (p * (1 - p)).unsqueeze(1) * x**2
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0)  # drawn labels


def test_derivatives_that_are_not_finite():
    program, x = program_of("attention")
    with torch.no_grad():
        program.tensor("head.weight")[0, 0] = float("inf")
    for criterion in ("fisher", "taylor", "taylor-so"):
        with pytest.raises((BadData, UsageError), match="finite"):
            resolve(criterion).weights(context_of(program, x))


def test_lamp_is_the_share_of_what_is_not_smaller():
    """Lee et al. 2021, equation 3, entry by entry, equal entries one after another; a layer of zeros has none."""
    program, _ = program_of("residual")
    with torch.no_grad():
        program.tensor("inner.weight").flatten()[:3] = torch.tensor([0.5, -0.5, 0.5]).double()  # the largest of it
        program.tensor("grouped.weight").zero_()
    found = resolve("lamp").weights(ScoreContext(program, analyze(program)))
    for name, value in program.module().named_parameters():
        if value.dim() < 2:
            assert name not in found
            continue
        w = value.detach().flatten().tolist()
        behind = [
            sum(v**2 for i, v in enumerate(w) if (abs(v), i) >= (abs(u), k)) for k, u in enumerate(w)
        ]  # by size, then by place
        expected = [u**2 / total if total else 0.0 for u, total in zip(w, behind, strict=True)]
        np.testing.assert_allclose(found[name].flatten().numpy(), expected, rtol=1e-12)
        assert found[name].max() == (0 if name == "grouped.weight" else 1)


def test_the_norm_scales_of_units_are_not_in_those_of_weights():
    program, _ = program_of("residual")
    before = {c: resolve(c).weights(ScoreContext(program, analyze(program))) for c in ("magnitude", "lamp")}
    with torch.no_grad():
        program.tensor("norm.weight").mul_(7)
    for criterion, expected in before.items():
        found = resolve(criterion).weights(ScoreContext(program, analyze(program)))
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_criteria_of_units_name_those_of_weights():
    program, _ = program_of("residual")
    known = ", ".join(names(weights=True))
    with pytest.raises(UsageError, match=f"'fpgm' scores units, not single weights; choose {known}"):
        resolve("fpgm").weights(ScoreContext(program, analyze(program)))
