"""Measuring: sources, losses and reductions, data of any form, and what is refused or left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import kfe_fx
from kfe_fx.curvature import Store, find_blocks, fit
from kfe_fx.errors import BadData, UsageError
from kfe_fx.program import Program

from .dense import EXAMPLES, TIGHT, case, columns, fisher, gradients, store

close = torch.testing.assert_close
ALL = ("diagonal", "ekfac")


def assert_equal(found: Store, expected: Store, *, facts: bool = False) -> None:
    """Compare sums and counts, S* as an operator: bases are not unique."""
    if facts:
        assert found.facts == expected.facts
    for name, block in expected.blocks.items():
        other = found.blocks[name]
        assert other.counts == block.counts
        for key, value in block.sums.items():
            if key != "S":
                close(other.sums[key], value, **TIGHT)
        if block.S is not None:
            assert other.S is not None
            close(other.S.sum(), block.S.sum(), **TIGHT)


# batches --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear time-major", "conv2d", "conv1d transposed", "embedding padded"])
def test_batches_of_any_size_give_the_same(name: str) -> None:
    made = case(name)
    for size in (1, 3, EXAMPLES, 64):
        found = fit(made.program, made.data, "cross-entropy", statistics=ALL, source="exact", batch_size=size)
        assert_equal(found, store(name), facts=True)


def forms(x: Tensor, y: Tensor) -> dict[str, Any]:
    """Give the same examples in every form."""
    return {
        "a pair": (x, y),
        "arrays": (x.numpy(), y.numpy()),
        "a data set": TensorDataset(x, y),
        "a loader": DataLoader(TensorDataset(x, y), batch_size=2),
        "batches": [(x[:2], y[:2]), (x[2:], y[2:])],
        "an iterator": iter([(x[:4], y[:4]), (x[4:], y[4:])]),
        "a dict": {"x": x, "y": y},
    }


@pytest.mark.parametrize("form", forms(torch.zeros(5), torch.zeros(5)))
def test_data_of_any_form_is_taken(form: str) -> None:
    made = case("linear")
    found = fit(made.program, forms(*made.data)[form], statistics=ALL, source="empirical")
    assert_equal(found, store("linear", "empirical"), facts=True)


def test_progress_is_told() -> None:
    made, told = case("linear"), []
    fit(made.program, made.data, source="exact", batch_size=2, progress=lambda what, share: told.append((what, share)))
    assert {what for what, _ in told} == {"curvature"}
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_nothing_of_the_network_is_changed() -> None:
    made = case("conv2d grouped")
    module = made.program.module()
    module.train()
    before = {name: value.clone() for name, value in made.program.state_dict().items()}
    graphs = made.program.hash()
    fit(made.program, made.data, statistics=ALL, source="exact")
    assert module.training
    assert made.program.hash() == graphs
    assert all(torch.equal(value, before[name]) for name, value in made.program.state_dict().items())
    assert all(value.grad is None and value.requires_grad for value in module.parameters())
    module.eval()


def test_statistics_are_those_of_evaluation() -> None:
    """Dropout is off, norms take their running statistics, and those stay what they were."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    module[1].running_mean.fill_(0.3)
    x, y = torch.randn(6, 3).double(), torch.tensor([0, 1, 1, 0, 1, 0])
    program = kfe_fx.capture(module, (x,)).train()
    held = fit(program, (x, y), statistics="diagonal", source="empirical")
    rows = gradients(module.eval(), x, y)
    for block in find_blocks(program).blocks:
        close(held.blocks[block.name].D.reshape(-1), fisher(block, rows, 6).diagonal(), **TIGHT)  # type: ignore[union-attr]
    assert float(program.tensor("1.running_mean").mean()) == pytest.approx(0.3)
    assert held.facts["profile"] == "score"


# losses ---------------------------------------------------------------------------------------------------------------

Loss = Callable[[Tensor, Tensor], Tensor]
REDUCTIONS: dict[str, Loss] = {
    "mean": lambda out, y: F.cross_entropy(out, y),
    "sum": lambda out, y: F.cross_entropy(out, y, reduction="sum"),
    "none": lambda out, y: F.cross_entropy(out, y, reduction="none"),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("size", [2, EXAMPLES])
def test_every_reduction_gives_the_gradients_of_single_examples(reduction: str, size: int) -> None:
    made = case("linear 3-D")
    found = fit(made.program, made.data, REDUCTIONS[reduction], statistics=ALL, source="empirical", batch_size=size)
    assert_equal(found, store("linear 3-D", "empirical"))
    assert found.facts["reduction"] == reduction


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_modules_of_torch_are_losses(reduction: str) -> None:
    made = case("linear 3-D")
    found = fit(
        made.program, made.data, nn.CrossEntropyLoss(reduction=reduction), statistics="diagonal", source="empirical"
    )
    for name, block in store("linear 3-D", "empirical").blocks.items():
        close(found.blocks[name].D, block.D, **TIGHT)
    assert found.facts["reduction"] == reduction


def spread(out: Tensor, y: Tensor) -> Tensor:
    return (out - out.mean(0)).square().mean()


def ranked(out: Tensor, y: Tensor) -> Tensor:
    return -(out @ out.T).softmax(1).diagonal().log().sum()


def powered(out: Tensor, y: Tensor) -> Tensor:
    return out.square().sum() ** 2


def paired(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out[:1], y[:1])


@pytest.mark.parametrize("loss", [spread, ranked, powered, paired])
def test_a_loss_that_mixes_examples_is_refused(loss: Loss) -> None:
    made = case("linear")
    with pytest.raises(UsageError, match=r"mixes the examples|no meaning per example"):
        fit(made.program, made.data, loss, source="empirical")


def test_the_gaussian_family_is_that_of_the_mean_square() -> None:
    """The loss (1 / O) sum (f - t)² has the second derivative 2 / O."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(4, 3).double()
    program = kfe_fx.capture(module, (x,))
    held = fit(program, x, "mse", statistics="diagonal", source="exact")
    for block in find_blocks(program).blocks:
        total = torch.zeros(block.shape, dtype=torch.float64)
        for n in range(4):
            for out in module(x[n : n + 1])[0]:
                grads = torch.autograd.grad(out, list(module.parameters()), retain_graph=True)
                total += block.matrix(dict(zip(dict(module.named_parameters()), grads, strict=True))).square() / 4
        close(held.blocks[block.name].D, total, **TIGHT)


# sources --------------------------------------------------------------------------------------------------------------


def test_the_same_labels_are_drawn_in_every_pass_and_by_every_seed_others() -> None:
    made = case("linear 3-D")

    def drawn(seed: int, size: int = 2) -> Store:
        return fit(made.program, made.inputs, statistics=ALL, source="sampled", seed=seed, batch_size=size)

    first = drawn(1)
    assert_equal(drawn(1), first, facts=True)
    assert (drawn(2).blocks["layer.weight"].D - first.blocks["layer.weight"].D).norm() > 0  # type: ignore[operator]
    # S* and D are of the same labels: their traces agree to rounding
    for block in first.blocks.values():
        close(block.S.sum(), block.D.sum(), **TIGHT)  # type: ignore[union-attr]
    assert first.facts["seed"] == 1


def test_samples_are_averaged() -> None:
    made = case("linear")
    held = fit(made.program, made.inputs, statistics=ALL, source="sampled", samples=3000)
    for block in made.blocks.blocks:
        truth = fisher(block, columns(made.module, made.inputs), EXAMPLES)
        found = held.blocks[block.name]
        assert found.examples == EXAMPLES  # not samples
        close(found.D.sum(), truth.trace(), rtol=0.05, atol=0)  # type: ignore[union-attr]
        close(found.A, store("linear").blocks[block.name].A, **TIGHT)


class Wide(nn.Module):
    def __init__(self, high: int) -> None:
        super().__init__()
        self.layer = nn.Linear(2, high)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize(("high", "source"), [(2, "exact"), (20, "exact"), (21, "sampled")])
def test_the_source_is_exact_where_that_is_cheap(high: int, source: str) -> None:
    program = kfe_fx.capture(Wide(high), (torch.randn(2, 2),))
    held = fit(program, torch.randn(3, 2), statistics="diagonal")
    assert held.facts["source"] == source


def test_a_loss_without_a_distribution_takes_the_labels_of_the_data() -> None:
    made = case("linear")
    assert fit(made.program, made.data, REDUCTIONS["sum"], statistics="diagonal").facts["source"] == "empirical"
    with pytest.raises(BadData, match="no distribution of labels is known"):
        fit(made.program, made.data, REDUCTIONS["sum"], source="exact")


def test_the_empirical_source_needs_targets() -> None:
    made = case("linear")
    with pytest.raises(BadData, match="needs targets, and the data has none"):
        fit(made.program, made.inputs, source="empirical")


def test_too_many_columns_are_refused() -> None:
    program = kfe_fx.capture(Wide(1025), (torch.randn(2, 2),))
    with pytest.raises(UsageError, match="one backward pass per output"):
        fit(program, torch.randn(3, 2), source="exact")


# what is left out -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("source", ["exact", "empirical", "sampled"])
def test_gradients_that_are_not_finite_are_skipped_and_counted(value: float, source: str) -> None:
    made = case("linear 3-D")
    x = made.inputs.clone()
    x[1, 0, 0] = value
    held = fit(made.program, (x, made.targets), "cross-entropy", statistics=ALL, source=source, batch_size=1)
    times = 3 if source == "exact" else 1
    assert held.facts["nonfinite"] == {"layer.weight": times, "head.weight": times}
    assert all(block.examples == EXAMPLES - 1 for block in held.blocks.values())
    assert all(value.isfinite().all() for block in held.blocks.values() for value in block.sums.values())
    kept = [n for n in range(EXAMPLES) if n != 1]
    if source != "sampled":  # other labels are drawn for another place in the data
        whole = fit(
            made.program, (x[kept], made.targets[kept]), "cross-entropy", statistics=ALL, source=source, batch_size=1
        )
        assert_equal(held, whole)
    with pytest.raises(BadData, match="no gradient was finite"):
        fit(made.program, (x, made.targets), "cross-entropy", source=source)


class Half(nn.Module):
    """The second layer's gradient is as large as the last inputs are; the first's is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x[:, :2]) + self.second(x[:, 2:4]) * x[:, 4:]


def test_one_block_alone_can_be_left_out() -> None:
    torch.manual_seed(0)
    x, y = torch.rand(4, 6).double(), torch.zeros(4, 2).double()
    program = kfe_fx.capture(Half().double(), (x,))
    x[2, 4:] = float("inf")
    options: dict[str, Any] = {"statistics": "diagonal", "source": "empirical", "batch_size": 1}
    held = fit(program, (x, y), lambda out, _: out.sum(1), **options)
    assert held.facts["nonfinite"] == {"second.weight": 1}
    assert held.blocks["first.weight"].examples == 4
    assert held.blocks["second.weight"].examples == 3


class TwoHeads(nn.Module):
    """A second output that no loss is of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(2, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.second(x)


def test_a_layer_that_the_loss_does_not_reach_is_named() -> None:
    program = kfe_fx.capture(TwoHeads(), (torch.randn(2, 2),))
    x = torch.randn(4, 2)
    held = fit(program, (x, torch.tensor([0, 1, 2, 0])), statistics=ALL, source="exact")
    assert held.blocks["second.weight"].examples == 0
    operator = held.operator(program, "ekfac")
    assert [item.parameter for item in operator.missing] == ["second.weight", "second.bias"]


def test_of_several_outputs_the_inputs_are_counted_once() -> None:
    """Without labels or a loss both heads count: A of each is that of the inputs, G that of its own outputs."""
    torch.manual_seed(0)
    program, x = kfe_fx.capture(TwoHeads().double(), (torch.randn(2, 2).double(),)), torch.randn(4, 2).double()
    held = fit(program, x, statistics=ALL, source="exact").blocks
    rows = torch.cat([x, torch.ones(4, 1)], 1).double()
    for name in ("first.weight", "second.weight"):
        assert held[name].examples == 4
        torch.testing.assert_close(held[name].sums["A"][0], rows.T @ rows, rtol=1e-12, atol=1e-12)
    p = program(x)[0].softmax(1)
    G = torch.diag(p.sum(0)) - p.T @ p
    torch.testing.assert_close(held["first.weight"].sums["G"][0], G, rtol=1e-12, atol=1e-12)
    other = program(x)[1]
    G = torch.eye(4).double() / (4 * other.var(correction=0))
    torch.testing.assert_close(held["second.weight"].sums["G"][0], 4 * G, rtol=1e-12, atol=1e-12)


class Crossed(nn.Module):
    """Every example goes through the first layer twice, once in another place, so that it has to be taken alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3, 2), nn.Linear(2, 3)
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.first(torch.cat([x, x.flip(0)])).chunk(2)
        return self.head(torch.tanh(first * self.scale + second.flip(0).sin()))


def test_examples_that_a_layer_does_not_tell_apart_are_taken_alone() -> None:
    torch.manual_seed(0)
    module = Crossed().double()
    x, y = torch.randn(4, 3).double(), torch.tensor([0, 1, 2, 1])
    program = kfe_fx.capture(module, (x,))
    blocks = find_blocks(program)
    assert not all(block.batched["eval"] for block in blocks.blocks)
    for source in ("empirical", "exact"):
        rows = gradients(module, x, y) if source == "empirical" else columns(module, x)
        held = fit(program, (x, y), "cross-entropy", statistics=ALL, source=source, blocks=blocks)
        assert held.facts["examples"] == 4
        for block in blocks.blocks:
            found = held.blocks[block.name]
            close(found.D.reshape(-1), fisher(block, rows, 4).diagonal(), **TIGHT)  # type: ignore[union-attr]
            assert found.examples == 4


# what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"statistics": "hessian"}, "not hessian"),
        ({"statistics": ("kfac", "ggn")}, "not ggn"),
        ({"statistics": ()}, "there are the statistics"),
        ({"source": "true"}, "no source 'true'"),
        ({"sharing": "none"}, "no sharing 'none'"),
        ({"samples": 0}, "at least once"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], told: str) -> None:
    made = case("linear")
    with pytest.raises(UsageError, match=told):
        fit(made.program, made.data, **options)


def test_bases_are_for_second_moments_of_the_same_network() -> None:
    made = case("linear")
    with pytest.raises(UsageError, match="bases are what 'ekfac' is measured in"):
        fit(made.program, made.data, statistics=("kfac", "ekfac"), bases=store("linear"))
    with pytest.raises(UsageError, match="another network"):
        fit(made.program, made.data, statistics="ekfac", bases=store("linear 3-D"))


def nothing() -> Iterator[tuple[Tensor, Tensor]]:
    yield from ()


def test_no_data_is_refused() -> None:
    made = case("linear")
    for data in ((made.inputs[:0], made.targets[:0]), [], nothing()):
        with pytest.raises(BadData):
            fit(made.program, data, source="exact")


def test_a_network_without_parameters_is_refused() -> None:
    program: Program = kfe_fx.capture(nn.Tanh(), (torch.randn(2, 3),))
    with pytest.raises(BadData, match="no parameters that statistics exist for"):
        fit(program, torch.randn(4, 3))


def test_float32_comes_to_the_same() -> None:
    made = case("conv2d")
    program = kfe_fx.capture(made.module.float(), (made.inputs.float(),))
    made.module.double()
    found = fit(program, (made.inputs.float(), made.targets), "cross-entropy", statistics=ALL, source="exact")
    for name, block in store("conv2d").blocks.items():
        assert found.blocks[name].D.dtype is torch.float32  # type: ignore[union-attr]
        close(found.blocks[name].D.double(), block.D, rtol=1e-4, atol=1e-7)  # type: ignore[union-attr]
        close(found.blocks[name].S.sum().double(), block.S.sum(), rtol=1e-5, atol=0)  # type: ignore[union-attr]


def test_the_running_average_variant_is_the_square_of_each_batch_s_mean() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    inputs, targets = torch.randn(12, 4, dtype=torch.float64), torch.randint(0, 3, (12,))
    program = kfe_fx.capture(net, (inputs[:2],))
    store = kfe_fx.curvature.fit(
        program, (inputs, targets), source="empirical", statistics=("ekfac", "ekfac-ra"), batch_size=4
    )
    again = kfe_fx.curvature.fit(program, (inputs, targets), source="empirical", statistics="ekfac", batch_size=1)
    single = kfe_fx.curvature.fit(program, (inputs, targets), source="empirical", statistics="ekfac-ra", batch_size=1)
    for block in kfe_fx.curvature.find_blocks(program).blocks:
        found, basis = store.blocks[block.name], store.blocks[block.name].basis
        wanted = torch.zeros(block.shape, dtype=torch.float64)
        for start in (0, 4, 8):
            rows = slice(start, start + 4)
            loss = nn.functional.cross_entropy(program.module()(inputs[rows]), targets[rows])
            parameters = {name: program.tensor(name) for name in block.parameters}
            grads = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
            mean = basis["U_G"].transpose(1, 2) @ block.matrix(grads) @ basis["U_A"]
            wanted += 4 * mean.square() / 3
        assert found.S_ra is not None
        assert found.S is not None
        torch.testing.assert_close(found.S_ra, wanted, rtol=1e-9, atol=1e-15)
        # biased by the mean gradient, except for batches of one
        assert not torch.allclose(found.S_ra, found.S, rtol=1e-2)
        one, other = again.blocks[block.name].S, single.blocks[block.name].S_ra
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-15)
