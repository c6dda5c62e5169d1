"""Identities of the curvature against dense matrices: a loop over examples, autograd, float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import kfe_fx
from kfe_fx.curvature import Store, find_blocks, fit
from kfe_fx.curvature.collector import Collector
from kfe_fx.curvature.observation import Observation
from kfe_fx.curvature.operators import BlockOperator, block_operator
from kfe_fx.program import Program

from .dense import (
    EXAMPLES,
    FAMILIES,
    TIGHT,
    Around,
    basis,
    case,
    columns,
    factors,
    fisher,
    flat_rows,
    gradients,
    kron,
    sides,
    stacked,
    store,
)

close = torch.testing.assert_close
families = pytest.mark.parametrize("name", FAMILIES)
SHARED = [name for name in FAMILIES if name != "linear"]


def operator(held: Store, block: str, kind: str) -> BlockOperator:
    """Return the operator of one block."""
    found = block_operator(held.blocks[block], kind)
    assert found is not None
    return found


# where gradients come from --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(2, 3), (4, 1), (1, 5)])
@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_one_example_without_sharing_is_exact_in_row_major_order(sizes: tuple[int, int], kind: str) -> None:
    """T0.1, T1.5: kron(G, A) is the outer product of vec(dW), for o != i."""
    wide, high = sizes
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(wide, high), nn.Tanh(), nn.Linear(high, 3)).double()
    x, y = torch.randn(1, wide).double(), torch.tensor([1])
    program = kfe_fx.capture(module, (x,))
    held = fit(program, (x, y), statistics="ekfac", source="empirical")
    rows = gradients(module, x, y)
    for block in find_blocks(program).blocks:
        (dW,) = stacked(block, rows).flatten(1)
        close(kron(held.blocks[block.name].G, held.blocks[block.name].A), torch.outer(dW, dW), **TIGHT)  # type: ignore[arg-type]
        close(operator(held, block.name, kind).dense(), torch.outer(dW, dW), **TIGHT)


@families
def test_exact_source_is_the_generalised_gauss_newton_matrix(name: str) -> None:
    """T0.2: sum_c p_c (grad log p_c)(grad log p_c)^T = J^T (diag p - p p^T) J, whatever basis it is looked at in."""
    made, held = case(name), store(name)
    jacobian = flat_rows(made.module, lambda n: list(made.module(made.inputs[n : n + 1])[0]), EXAMPLES)
    chances = made.module(made.inputs).detach().softmax(1)
    rows = columns(made.module, made.inputs)
    for block in made.blocks.blocks:
        J = stacked(block, jacobian).flatten(1).unflatten(0, (EXAMPLES, -1))  # [N, C, P]
        metric = torch.diag_embed(chances) - chances.unsqueeze(2) * chances.unsqueeze(1)
        truth = (J.transpose(1, 2) @ metric @ J).mean(0)
        close(fisher(block, rows, EXAMPLES), truth, **TIGHT)
        found = held.blocks[block.name]
        close(found.D.reshape(-1), truth.diagonal(), **TIGHT)  # type: ignore[union-attr]
        if block.kind == "kronecker":
            Q = basis(found, block.shape)
            close(found.S.reshape(-1), (Q.T @ truth @ Q).diagonal(), **TIGHT)  # type: ignore[union-attr]


@families
def test_empirical_source_is_the_second_moment_of_the_gradients(name: str) -> None:
    made, held = case(name), store(name, "empirical")
    rows = gradients(made.module, *made.data)
    for block in made.blocks.blocks:
        truth, found = fisher(block, rows, EXAMPLES), held.blocks[block.name]
        close(found.D.reshape(-1), truth.diagonal(), **TIGHT)  # type: ignore[union-attr]
        if block.kind == "kronecker":
            Q = basis(found, block.shape)
            close(found.S.reshape(-1), (Q.T @ truth @ Q).diagonal(), **TIGHT)  # type: ignore[union-attr]


def test_sampled_source_converges_as_one_over_the_root_of_the_samples() -> None:
    """T0.3; with the labels that the network thinks least of, the empirical source stays where it is."""
    made = case("linear 3-D")
    truth = store("linear 3-D").blocks["layer.weight"].D
    assert truth is not None

    def error(held: Store) -> float:
        found = held.blocks["layer.weight"].D
        assert found is not None
        return float((found - truth).norm() / truth.norm())

    errors = {}
    for samples in (8, 128):
        squares = [
            error(fit(made.program, made.data, statistics="diagonal", source="sampled", samples=samples, seed=seed))
            ** 2
            for seed in range(8)
        ]
        errors[samples] = (sum(squares) / len(squares)) ** 0.5
    assert errors[128] < 0.1
    assert 2.8 < errors[8] / errors[128] < 5.7  # 4, give or take what 8 seeds leave open
    unlikely = made.module(made.inputs).argmin(1)
    assert error(fit(made.program, (made.inputs, unlikely), statistics="diagonal", source="empirical")) > 0.3


@families
def test_rows_add_up_to_the_gradient_of_a_mean_loss(name: str) -> None:
    """T0.4: sum_n g_n abar_n^T / N is param.grad."""
    made = case(name)
    total: dict[str, Tensor] = {}

    def sink(observation: Observation) -> None:
        observation.scale = float(EXAMPLES)  # gradients of a mean become those of each example's own loss
        for pairs in observation.chunks():
            left, right = pairs.dense()
            found = left.flatten(1, 2).transpose(1, 2) @ right.flatten(1, 2) / EXAMPLES
            total[observation.block.name] = total.get(observation.block.name, torch.zeros(())) + found

    module = made.program.module()
    collector = Collector(made.program, made.blocks, made.blocks.blocks, sink)
    with collector.watching():
        F.cross_entropy(module(made.inputs), made.targets).backward()
        collector.flush()
    grads = {key: value.grad for key, value in module.named_parameters()}
    module.zero_grad(set_to_none=True)
    for block in made.blocks.blocks:
        close(total[block.name], block.matrix(grads), **TIGHT)  # type: ignore[arg-type]


# factors and second moments -------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_factors_are_those_of_the_rows(name: str, sharing: str) -> None:
    """Patches by autograd, gradients by autograd, means and sums as Eschenhagen et al. 2023 define them."""
    made, held = case(name), store(name, sharing=sharing).blocks["layer.weight"]
    A, G = factors(made, sharing)
    assert held.A is not None
    assert held.G is not None
    close(held.A, A, **TIGHT)
    close(held.G, G if held.G.dim() == 3 else G.diagonal(dim1=1, dim2=2), **TIGHT)


@families
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_trace_is_the_mean_squared_gradient_in_every_basis(name: str, sharing: str) -> None:
    """T1.1."""
    made, held = case(name), store(name, sharing=sharing)
    rows = columns(made.module, made.inputs)
    for block in made.blocks.blocks:
        expected = float(stacked(block, rows).square().sum()) / EXAMPLES
        for kind in ("diagonal", "ekfac"):
            assert operator(held, block.name, kind).trace() == pytest.approx(expected, rel=1e-10)


@families
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_ekfac_is_no_farther_from_the_truth_than_kfac(name: str, sharing: str) -> None:
    """T1.2, and T1.3: with lam_G lam_A^T for S* they are the same."""
    made, held = case(name), store(name, sharing=sharing)
    truth = fisher(made.block, columns(made.module, made.inputs), EXAMPLES)
    ekfac, kfac = (operator(held, made.block.name, kind) for kind in ("ekfac", "kfac"))
    assert (truth - ekfac.dense()).norm() <= (truth - kfac.dense()).norm() * (1 + 1e-12)
    assert ekfac.U_A is kfac.U_A
    high, wide = kfac.factors  # type: ignore[misc]
    start = BlockOperator(high.unsqueeze(2) * wide.unsqueeze(1), ekfac.U_G, ekfac.U_A)
    close(start.dense(), kfac.dense(), rtol=0, atol=0)
    close(start.dense(), kron(held.blocks[made.block.name].G, held.blocks[made.block.name].A), **TIGHT)  # type: ignore[arg-type]


LAYERS: dict[str, Any] = {
    "linear": (lambda i, o: nn.Linear(i, o), lambda i, o: (i,), lambda i, o: o),
    "linear 3-D": (lambda i, o: nn.Linear(i, o), lambda i, o: (3, i), lambda i, o: 3 * o),
    "conv1d": (lambda i, o: nn.Conv1d(i, o, 2), lambda i, o: (i, 4), lambda i, o: 3 * o),
    "conv2d": (lambda i, o: nn.Conv2d(i, o, 2, padding=1), lambda i, o: (i, 2, 2), lambda i, o: 9 * o),
    "grouped": (lambda i, o: nn.Conv1d(2 * i, 2 * o, 2, groups=2), lambda i, o: (2 * i, 3), lambda i, o: 4 * o),
    "embedding": (lambda i, o: nn.Embedding(i, o), lambda i, o: (3,), lambda i, o: 3 * o),
}


@settings(max_examples=20)
@given(st.sampled_from(sorted(LAYERS)), st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**20))
def test_ekfac_is_no_farther_from_the_truth_than_kfac_on_random_layers(
    kind: str, wide: int, high: int, count: int, seed: int
) -> None:
    """T1.1, T1.2."""
    torch.manual_seed(seed)
    layer, shape, width = (part(wide, high) for part in LAYERS[kind])
    module = Around(layer, width).double()
    size = (count, *shape)
    x = torch.randint(0, wide, size) if kind == "embedding" else torch.randn(size).double()
    program = kfe_fx.capture(module, (x,))
    held = fit(program, x, statistics="ekfac", source="exact")
    block = next(block for block in find_blocks(program).blocks if block.weight == "layer.weight")
    truth = fisher(block, columns(module, x), count)
    ekfac, kfac = (operator(held, block.name, one) for one in ("ekfac", "kfac"))
    least = 1e-14 * truth.norm()
    assert (truth - ekfac.dense()).norm() <= (truth - kfac.dense()).norm() + least
    assert ekfac.trace() == pytest.approx(float(truth.trace()), rel=1e-10)


@families
@pytest.mark.parametrize("kind", ["diagonal", "kfac", "ekfac"])
def test_operator_is_its_dense_matrix(name: str, kind: str) -> None:
    """T1.4 and T2.4, for every block."""
    made, held = case(name), store(name)
    for block in made.blocks.blocks:
        found = operator(held, block.name, kind)
        dense, identity = found.dense(), torch.eye(found.spectrum.numel(), dtype=torch.float64)
        v = torch.randn(block.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        close(found.matvec(v).reshape(-1), dense @ v.reshape(-1), **TIGHT)
        close(found.solve(found.matvec(v) + 0.01 * v, 0.01), v, **TIGHT)
        close(found.solve(v, 0.01).reshape(-1), torch.linalg.solve(dense + 0.01 * identity, v.reshape(-1)), **TIGHT)
        close(found.quadratic(v), v.reshape(-1) @ dense @ v.reshape(-1), **TIGHT)
        assert found.trace() == pytest.approx(float(dense.trace()), rel=1e-12)
        assert found.frobenius_norm() == pytest.approx(float(dense.norm()), rel=1e-12)
        assert found.spectral_norm() == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-12)
        close(found.eigenvalues(), torch.linalg.eigvalsh(dense).clamp_min(0), **TIGHT)


# invariance -----------------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """Two matrices without biases and nothing between them, so that a change of basis between them changes nothing."""

    def __init__(self, first: Tensor, second: Tensor, head: Tensor) -> None:
        super().__init__()
        self.first, self.second, self.head = (
            nn.Linear(w.shape[1], w.shape[0], bias=False) for w in (first, second, head)
        )
        self.double().load_state_dict({"first.weight": first, "second.weight": second, "head.weight": head})

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(self.first(x))))


def _updates(map_between: Tensor, kind: str, damping: float) -> dict[str, Tensor]:
    """Return the preconditioned gradients with ``map_between`` put between the two matrices, and taken out of them."""
    torch.manual_seed(5)
    first, second, head = (torch.randn(s).double() / s[1] ** 0.5 for s in ((3, 4), (4, 3), (3, 4)))
    x, y = torch.randn(16, 4).double(), torch.randint(0, 3, (16,))
    inverse = torch.linalg.inv(map_between)
    module = Chain(map_between @ first, second @ inverse, head)
    program = kfe_fx.capture(module, (x,))
    held = fit(program, (x, y), statistics="ekfac", source="exact")
    F.cross_entropy(module(x), y).backward()
    found = held.operator(program, kind).solve({n: p.grad for n, p in module.named_parameters()}, damping)  # type: ignore[misc]
    return {"first": inverse @ found["first.weight"], "second": found["second.weight"] @ map_between}


def test_updates_are_invariant_to_changes_of_basis() -> None:
    """T1.6, T2.5: EKFAC to orthogonal ones at any damping; undamped K-FAC to invertible ones, EKFAC not to those."""
    torch.manual_seed(3)
    identity = torch.eye(3, dtype=torch.float64)
    invertible = identity + 0.4 * torch.randn(3, 3).double()
    orthogonal = torch.linalg.qr(invertible).Q
    loose = {"rtol": 1e-7, "atol": 1e-9}  # the factors are inverted
    for kind, damping in (("ekfac", 1e-3), ("ekfac", 0.0), ("kfac", 1e-3)):
        for key, value in _updates(identity, kind, damping).items():
            close(_updates(orthogonal, kind, damping)[key], value, **loose)
    plain, turned = _updates(identity, "kfac", 0.0), _updates(invertible, "kfac", 0.0)
    for key, value in plain.items():
        close(turned[key], value, **loose)
    plain, turned = _updates(identity, "ekfac", 0.0), _updates(invertible, "ekfac", 0.0)
    assert all((turned[key] - value).norm() > 1e-2 * value.norm() for key, value in plain.items())


# sharing --------------------------------------------------------------------------------------------------------------


class DeepLinear(nn.Module):
    """Two linear maps that share their weights over positions; ``pooled`` takes the mean over positions at the end."""

    def __init__(self, first: nn.Module, second: nn.Module, *, pooled: bool) -> None:
        super().__init__()
        self.first, self.second, self.pooled = first, second, pooled

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        if not self.pooled:
            return y
        return y.mean(1) if isinstance(self.second, nn.Linear) else y.flatten(2).mean(2)


DEEP: dict[str, Any] = {
    "linear": (lambda: (nn.Linear(3, 4), nn.Linear(4, 2)), (4, 3)),
    "conv1d": (lambda: (nn.Conv1d(2, 3, 2, padding=1), nn.Conv1d(3, 2, 1)), (2, 3)),
    "conv2d": (lambda: (nn.Conv2d(2, 3, 2), nn.Conv2d(3, 2, 1)), (2, 3, 3)),
}


def _distance(kind: str, sharing: str, *, pooled: bool) -> dict[str, float]:
    """Return ||F - K-FAC|| / ||F|| of each block for the Gaussian loss."""
    torch.manual_seed(2)
    layers, shape = DEEP[kind]
    module = DeepLinear(*layers(), pooled=pooled).double()
    x = torch.randn(4, *shape).double()
    program: Program = kfe_fx.capture(module, (x,))
    held = fit(program, x, "mse", statistics="kfac", source="exact", sharing=sharing)
    size = module(x)[0].numel()
    rows = flat_rows(module, lambda n: [(2 / size) ** 0.5 * out for out in module(x[n : n + 1]).flatten()], len(x))
    made = {}
    for block in find_blocks(program).blocks:
        truth = fisher(block, rows, len(x))
        made[block.name] = float((truth - operator(held, block.name, "kfac").dense()).norm() / truth.norm())
    return made


@pytest.mark.parametrize("kind", DEEP)
def test_expand_and_reduce_are_exact_where_they_should_be(kind: str) -> None:
    """T2.1 (Eschenhagen et al. 2023): expand where the loss sums over positions, reduce where outputs are pooled."""
    for sharing, pooled in (("expand", False), ("reduce", True)):
        assert max(_distance(kind, sharing, pooled=pooled).values()) < 1e-12
        other = _distance(kind, sharing, pooled=not pooled)
        assert min(other.values()) > 1e-2


@pytest.mark.parametrize("name", [name for name in SHARED if "transposed" not in name and "embedding" not in name])
def test_kfc_is_expand(name: str) -> None:
    """T2.2: Omega = E sum_r a a^T and Gamma = (1 / R) E sum_r g g^T give the same product (Grosse & Martens 2016)."""
    made = case(name)
    omega, gamma, positions = torch.zeros(()), torch.zeros(()), 1
    for n in range(EXAMPLES):
        for drawn in range(3):
            found = sides(made, n, drawn)
            positions = found.left.shape[1]
            gamma = gamma + found.left.transpose(1, 2) @ found.left / positions / EXAMPLES
            if drawn == 0:
                omega = omega + found.right.transpose(1, 2) @ found.right / EXAMPLES
    assert positions > 1
    close(operator(store(name), "layer.weight", "kfac").dense(), kron(gamma, omega), **TIGHT)


def test_undamped_kfac_solves_with_the_inverses_of_the_factors() -> None:
    """T2.4: G^{-1} D A^{-1} = (G (x) A)^{-1} vec D."""
    made = case("linear 3-D")
    held = store("linear 3-D").blocks["layer.weight"]
    assert held.G is not None
    assert held.A is not None
    D = torch.randn(made.block.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = operator(store("linear 3-D"), "layer.weight", "kfac").solve(D, 0.0)
    loose = {"rtol": 1e-7, "atol": 1e-9}
    close(found, torch.linalg.inv(held.G) @ D @ torch.linalg.inv(held.A), **loose)
    close(found.reshape(-1), torch.linalg.solve(kron(held.G, held.A), D.reshape(-1)), **loose)
