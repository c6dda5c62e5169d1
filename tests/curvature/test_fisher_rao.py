"""The Fisher-Rao norm: exact against gradients of one example at a time, and from a store."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfe_fx
from kfe_fx.curvature import find_blocks, fit
from kfe_fx.curvature.fisher_rao import fisher_rao_norm, fisher_rao_of
from kfe_fx.errors import BadData, UsageError
from kfe_fx.program import Program

from .dense import EXAMPLES, FAMILIES, Rows, case, columns, gradients, store


def dense(program: Program, rows: Rows, count: int) -> float:
    """Return E_n <theta, rows_n>^2."""
    theta = dict(program.module().named_parameters())
    inner = sum((rows[name] * theta[name].detach()).flatten(1).sum(1) for name in rows)
    assert isinstance(inner, Tensor)
    return float(inner.square().sum()) / count


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_exact_for_every_layer(name: str) -> None:
    made = case(name)
    for source, rows in (
        ("exact", columns(made.module, made.inputs)),
        ("empirical", gradients(made.module, *made.data)),
    ):
        found = fisher_rao_norm(made.program, made.data, "cross-entropy", source=source, batch_size=2)
        assert found.squared == pytest.approx(dense(made.program, rows, EXAMPLES), rel=1e-10)
        assert found.norm == pytest.approx(found.squared**0.5)
        assert (found.examples, found.source, found.skipped, found.missing) == (EXAMPLES, source, 0, ())


def chain(*widths: int) -> nn.Sequential:
    """Make matrices without biases and ReLUs between."""
    layers: list[nn.Module] = []
    for wide, high in pairwise(widths):
        layers += [nn.Linear(wide, high, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


@pytest.mark.parametrize("widths", [(4, 3), (4, 5, 3), (4, 6, 5, 3), (4, 5, 5, 5, 3)])
@pytest.mark.parametrize("source", ["exact", "empirical"])
def test_homogeneous_networks_need_no_backward_pass(widths: tuple[int, ...], source: str) -> None:
    """T9.1: (L + 1)² E <dl/df, f>², L + 1 matrices."""
    torch.manual_seed(1)
    module, x, y = chain(*widths), torch.randn(7, 4).double(), torch.randint(0, 3, (7,))
    program = kfe_fx.capture(module, (x,))
    scores = module(x).detach()
    chances = scores.softmax(1)
    inner = (chances * scores).sum(1, keepdim=True) - scores  # <dl_c/df, f> for each label c
    squares = inner.square()
    mean = (chances * squares).sum(1).mean() if source == "exact" else squares.gather(1, y.unsqueeze(1)).mean()
    found = fisher_rao_norm(program, (x, y), "cross-entropy", source=source)
    assert found.squared == pytest.approx((len(widths) - 1) ** 2 * float(mean), rel=1e-10)


def norms(module: nn.Module, x: Tensor) -> tuple[float, float]:
    """Return the exact norm and the sum over the diagonal, squared both."""
    program = kfe_fx.capture(module, (x,))
    held = fit(program, x, statistics="diagonal", source="exact")
    return fisher_rao_norm(program, x, source="exact").squared, fisher_rao_of(held, program, "diagonal").squared


def test_rescaling_a_node_changes_nothing() -> None:
    """T9.2: c W1, W2 / c."""
    torch.manual_seed(2)
    module, x = chain(4, 6, 3), torch.randn(7, 4).double()
    before = norms(module, x)
    scale = torch.linspace(0.2, 5.0, 6).double()
    with torch.no_grad():
        module[0].weight.mul_(scale.unsqueeze(1))
        module[2].weight.div_(scale)
    assert norms(module, x) == pytest.approx(before, rel=1e-10)  # the diagonal is weighed with the same squares


def test_a_change_of_basis_between_matrices_changes_the_diagonal_alone() -> None:
    torch.manual_seed(3)
    module, x = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 3, bias=False)).double(), torch.randn(7, 4)
    full, diagonal = norms(module, x.double())
    between = torch.linalg.qr(torch.randn(5, 5).double()).Q
    with torch.no_grad():
        module[0].weight.copy_(between @ module[0].weight)
        module[1].weight.copy_(module[1].weight @ between.T)
    turned = norms(module, x.double())
    assert turned[0] == pytest.approx(full, rel=1e-10)
    assert abs(turned[1] - diagonal) > 0.01 * diagonal


@pytest.mark.parametrize("name", ["linear", "conv2d grouped", "conv2d transposed", "embedding padded"])
@pytest.mark.parametrize("kind", ["diagonal", "kfac", "ekfac"])
def test_a_store_gives_theta_f_theta(name: str, kind: str) -> None:
    made, held = case(name), store(name)
    operator = held.operator(made.program, kind)
    theta = torch.cat([dict(made.module.named_parameters())[n].detach().reshape(-1) for n in operator.parameters])
    found = fisher_rao_of(held, made.program, kind)
    assert found.squared == pytest.approx(float(theta @ operator.dense() @ theta), rel=1e-10)
    assert (found.examples, found.source, found.missing) == (EXAMPLES, "exact", ())


def test_the_diagonal_is_another_number() -> None:
    """T9.5: sum_k F_kk theta_k² is not the norm where entries are correlated."""
    x = torch.ones(3, 2).double()
    module = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 1.0], [0.5, 0.5]]))
    program = kfe_fx.capture(module, (x,))
    held = fit(program, x, statistics=("diagonal", "ekfac"), source="exact")
    full = fisher_rao_norm(program, x, source="exact").squared
    rows = columns(module, x)["weight"].flatten(1)
    theta = module.weight.detach().reshape(-1)
    assert full == pytest.approx(float((rows @ theta).square().sum()) / 3, rel=1e-10)
    diagonal = fisher_rao_of(held, program, "diagonal").squared
    assert diagonal == pytest.approx(float((rows.square() @ theta.square()).sum()) / 3, rel=1e-10)
    assert diagonal > 1.5 * full
    assert fisher_rao_of(held, program, "ekfac").squared == pytest.approx(full, rel=1e-10)  # equal inputs: F is G (x) A


def test_sampled_labels_come_to_the_exact_norm() -> None:
    made = case("linear")
    exact = fisher_rao_norm(made.program, made.inputs, source="exact").squared
    found = fisher_rao_norm(made.program, made.inputs, source="sampled", samples=4000, seed=1)
    assert found.squared == pytest.approx(exact, rel=0.05)  # 20,000 draws
    assert found.source == "sampled"
    few = [fisher_rao_norm(made.program, made.inputs, source="sampled", seed=seed).squared for seed in (1, 1, 2)]
    assert few[0] == few[1] != few[2]


class Scaled(nn.Module):
    """A scale without a matrix, and a parameter that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.5, 0.5]))
        self.idle = nn.Parameter(torch.ones(2))
        self.first, self.head = nn.Linear(3, 2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x) * self.scale))


class Crossed(Scaled):
    """Every example goes through the first layer twice, once in another place, so that it has to be taken alone."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.first(torch.cat([x, x.flip(0)])).chunk(2)
        return self.head(torch.tanh(first * self.scale + second.flip(0).sin()))


@pytest.mark.parametrize("kind", [Scaled, Crossed])
@pytest.mark.parametrize("source", ["exact", "empirical"])
def test_blocks_of_all_kinds_count(kind: type[Scaled], source: str) -> None:
    torch.manual_seed(0)
    module = kind().double()
    x, y = torch.randn(4, 3).double(), torch.tensor([0, 1, 2, 1])
    program = kfe_fx.capture(module, (x,))
    blocks = find_blocks(program).blocks
    assert {block.kind for block in blocks} == {"kronecker", "diagonal"}
    assert all(block.batched["eval"] for block in blocks) == (kind is Scaled)
    found = fisher_rao_norm(program, (x, y), "cross-entropy", source=source)
    rows = columns(module, x) if source == "exact" else gradients(module, x, y)
    assert found.squared == pytest.approx(dense(program, rows, 4), rel=1e-10)
    assert found.examples == 4
    assert [item.parameter for item in found.missing] == ["idle"]


def test_examples_that_are_not_finite_are_left_out_and_counted() -> None:
    made = case("linear")
    x = made.inputs.clone()
    x[1] = float("nan")
    found = fisher_rao_norm(made.program, (x, made.targets), source="empirical", batch_size=1)
    kept = [n for n in range(EXAMPLES) if n != 1]
    rows = gradients(made.module, made.inputs[kept], made.targets[kept])
    assert found.squared == pytest.approx(dense(made.program, rows, 4), rel=1e-10)
    assert (found.examples, found.skipped) == (4, 1)
    with pytest.raises(BadData, match="no gradient was finite"):
        fisher_rao_norm(made.program, (x, made.targets), source="empirical", batch_size=EXAMPLES)


def test_what_means_nothing_is_refused() -> None:
    made = case("linear")
    with pytest.raises(UsageError, match="no source 'true'"):
        fisher_rao_norm(made.program, made.data, source="true")
    with pytest.raises(UsageError, match="at least once"):
        fisher_rao_norm(made.program, made.data, source="sampled", samples=0)
    with pytest.raises(BadData, match="needs targets"):
        fisher_rao_norm(made.program, made.inputs, source="empirical")
    moved = made.program.copy()
    with torch.no_grad():
        moved.tensor("head.bias").add_(1.0)
    with pytest.raises(UsageError, match="older than the weights"):
        fisher_rao_of(store("linear"), moved)


def test_nothing_of_the_network_is_changed() -> None:
    made = case("conv2d")
    before = {name: value.clone() for name, value in made.program.state_dict().items()}
    fisher_rao_norm(made.program, made.data, source="exact")
    assert all(torch.equal(value, before[name]) for name, value in made.program.state_dict().items())
    assert all(value.grad is None for value in made.program.module().parameters())
    assert F.cross_entropy(made.program(made.inputs), made.targets).requires_grad


def test_a_network_that_pins_its_batch_is_taken_whole() -> None:
    """One example cannot be run alone there; the loss of each is taken out of the batch."""
    torch.manual_seed(0)
    module = Crossed().double()
    x, y = torch.randn(4, 3).double(), torch.tensor([0, 1, 2, 1])
    program = kfe_fx.capture(module, (x,), {"x": {}})
    assert not program.axes.get("x")
    for source, rows in (("exact", columns(module, x)), ("empirical", gradients(module, x, y))):
        found = fisher_rao_norm(program, (x, y), "cross-entropy", source=source)
        assert found.squared == pytest.approx(dense(program, rows, 4), rel=1e-10)
        assert found.examples == 4
