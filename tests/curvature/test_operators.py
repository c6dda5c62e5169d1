"""Linear operators of blocks and of whole networks, against their dense matrices."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import kfe_fx
from kfe_fx.curvature import BlockStore, Store, find_blocks, fit
from kfe_fx.curvature.eigen import eigenbasis
from kfe_fx.curvature.operators import MAX_DENSE, BlockOperator, Curvature, block_operator
from kfe_fx.errors import UsageError
from kfe_fx.program import Program

from .dense import TIGHT, kron

close = torch.testing.assert_close
KINDS = ("diagonal", "kfac", "ekfac")


def factor(groups: int, size: int, rank: int, seed: int) -> Tensor:
    """Make a symmetric positive semi-definite [K, d, d]."""
    made = torch.randn(groups, size, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return made @ made.transpose(1, 2)


def kfac(G: Tensor, A: Tensor) -> BlockOperator:
    """Make the operator G (x) A."""
    high, wide = eigenbasis(G), eigenbasis(A)
    spectrum = high.values.unsqueeze(2) * wide.values.unsqueeze(1)
    return BlockOperator(spectrum, high.vectors, wide.vectors, (high.values, wide.values))


def random(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Make a vector."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


sizes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))


# one block ------------------------------------------------------------------------------------------------------------


@given(sizes, st.integers(0, 2**20), st.sampled_from(KINDS), st.booleans())
def test_everything_is_that_of_the_dense_matrix(
    shape: tuple[int, int, int], seed: int, kind: str, one_sided: bool
) -> None:
    groups, high, wide = shape
    found = kfac(factor(groups, high, high, seed), factor(groups, wide, wide, seed + 1))
    if kind != "kfac":
        bases = (None, None) if kind == "diagonal" else (None if one_sided else found.U_G, found.U_A)
        found = BlockOperator(random(shape, seed + 2).square(), *bases)
    dense, v = found.dense(), random(shape, seed + 3)
    flat, identity = v.reshape(-1), torch.eye(v.numel(), dtype=torch.float64)
    close(dense, dense.T)
    close(found.matvec(v).reshape(-1), dense @ flat, **TIGHT)
    close(found.solve(v, 0.1).reshape(-1), torch.linalg.solve(dense + 0.1 * identity, flat), **TIGHT)
    close(found.quadratic(v), flat @ dense @ flat, **TIGHT)
    assert found.trace() == pytest.approx(float(dense.trace()), rel=1e-12)
    assert found.frobenius_norm() == pytest.approx(float(dense.norm()), rel=1e-12)
    spectrum = torch.linalg.eigvalsh(dense)
    assert found.spectral_norm() == pytest.approx(float(spectrum[-1]), rel=1e-10)
    close(found.eigenvalues(), spectrum, rtol=1e-9, atol=1e-12 * float(spectrum[-1]))
    several = torch.stack([v, 2 * v])
    close(found.matvec(several)[1], 2 * found.matvec(v), **TIGHT)
    close(found.quadratic(several)[1], 4 * found.quadratic(v), **TIGHT)


@given(sizes, st.integers(0, 2**20))
def test_kfac_is_the_row_major_kronecker_product(shape: tuple[int, int, int], seed: int) -> None:
    """(G (x) A) vec(X) = vec(G X A^T)."""
    groups, high, wide = shape
    G, A, X = factor(groups, high, high, seed), factor(groups, wide, wide, seed + 1), random(shape, seed)
    close(kfac(G, A).matvec(X), G @ X @ A.transpose(1, 2), rtol=1e-9, atol=1e-9)
    close(kfac(G, A).dense(), kron(G, A), rtol=1e-9, atol=1e-9)


@given(sizes, st.integers(0, 2**20), st.integers(1, 4), st.booleans())
def test_without_damping_the_pseudo_inverse_solves(
    shape: tuple[int, int, int], seed: int, rank: int, factored: bool
) -> None:
    """F F⁺ F = F also for singular factors; what F ignores is mapped to zero."""
    groups, high, wide = shape
    G, A = factor(groups, high, rank, seed), factor(groups, wide, rank, seed + 1)
    found = kfac(G, A)
    assert found.factors is not None
    if not factored:  # second moments, measured: exact zeros where a factor has none
        kept = [values > 1e-9 * values.amax(1, keepdim=True) for values in found.factors]
        mask = kept[0].unsqueeze(2) & kept[1].unsqueeze(1)
        found = BlockOperator((random(shape, seed + 2).square() + 0.1) * mask, found.U_G, found.U_A)
    v = random(shape, seed + 3)
    scale = found.spectral_norm()
    solved = found.solve(v, 0.0)
    assert solved.isfinite().all()
    close(found.matvec(found.solve(found.matvec(v), 0.0)), found.matvec(v), rtol=1e-6, atol=1e-8 * scale)
    dense = found.dense()
    inverse = torch.linalg.pinv(dense, rtol=1e-12, hermitian=True)
    close(solved.reshape(-1), inverse @ v.reshape(-1), rtol=1e-5, atol=1e-6 * float(solved.abs().max()))


@given(sizes, st.integers(0, 2**20), st.floats(1e-4, 10.0))
def test_factored_damping_is_that_of_the_paper(shape: tuple[int, int, int], seed: int, damping: float) -> None:
    """(G + gamma / pi I) (x) (A + pi gamma I), which is not Tikhonov's unless a side is a multiple of the identity."""
    groups, high, wide = shape
    G, A, v = factor(groups, high, high, seed), factor(groups, wide, wide, seed + 1), random(shape, seed)
    traces = (torch.stack([m.trace() for m in factor_]) / factor_.shape[1] for factor_ in (A, G))
    over, under = traces
    pi, gamma = (over / under).sqrt().view(-1, 1, 1), damping**0.5
    eyes = torch.eye(high, dtype=torch.float64), torch.eye(wide, dtype=torch.float64)
    G_pi, A_pi = G + gamma / pi * eyes[0], A + pi * gamma * eyes[1]
    expected = torch.linalg.solve(kron(G_pi, A_pi), v.reshape(-1))
    close(kfac(G, A).solve(v, damping, "factored").reshape(-1), expected, rtol=1e-7, atol=1e-9)
    product = kron(G_pi, A_pi) - kron(G, A) - damping * torch.eye(v.numel(), dtype=torch.float64)
    cross = kron(gamma / pi * eyes[0], A) + kron(G, pi * gamma * eyes[1])
    close(product, cross, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dead", ["A", "G", "both"])
def test_a_dead_layer_solves_to_zero_and_never_to_nan(dead: str) -> None:
    G, A = factor(2, 3, 3, 0), factor(2, 4, 4, 1)
    (G if dead != "A" else A)[0] = 0.0  # one group alone
    if dead == "both":
        A[0] = 0.0
    v, found = random((2, 3, 4)), kfac(G, A)
    assert not found.solve(v, 0.0)[0].any()
    assert found.solve(v, 0.0)[1].any()
    assert not found.matvec(v)[0].any()
    close(found.solve(v, 0.25)[0], v[0] / 0.25, **TIGHT)
    # pi = 1 where a trace is zero
    expected = torch.linalg.solve(
        kron(G[:1] + 0.5 * torch.eye(3).double(), A[:1] + 0.5 * torch.eye(4).double()), v[0].reshape(-1)
    )
    close(found.solve(v, 0.25, "factored")[0].reshape(-1), expected, **TIGHT)
    assert BlockOperator(torch.zeros(1, 2, 2)).solve(torch.ones(1, 2, 2), 0.0).sum() == 0.0


def test_what_means_nothing_is_refused() -> None:
    found = kfac(factor(1, 2, 2, 0), factor(1, 3, 3, 1))
    v = random((1, 2, 3))
    for damping in (-1e-9, float("nan")):
        with pytest.raises(UsageError, match="not negative"):
            found.solve(v, damping)
    with pytest.raises(UsageError, match="no damping 'pi'"):
        found.solve(v, 1.0, "pi")
    with pytest.raises(UsageError, match="only K-FAC"):
        BlockOperator(found.spectrum).solve(v, 1.0, "factored")
    with pytest.raises(UsageError, match=r"\[\.\.\., 1, 2, 3\], not \[1, 3, 2\]"):
        found.matvec(v.transpose(1, 2))
    with pytest.raises(UsageError, match="too large"):
        BlockOperator(torch.ones(1, 1, MAX_DENSE + 1)).dense()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_results_have_the_type_of_the_vector(kind: torch.dtype) -> None:
    exact = kfac(factor(1, 3, 3, 0), factor(1, 4, 4, 1))
    single = BlockOperator(exact.spectrum.float(), exact.U_G.float(), exact.U_A.float())  # type: ignore[union-attr]
    v = random((1, 3, 4)).to(kind)
    for found in (single, exact):
        assert found.matvec(v).dtype is found.solve(v, 0.1).dtype is kind
    tolerance = 4 * torch.finfo(kind).eps + 1e-5
    expected = exact.matvec(v.double())
    close(single.matvec(v).double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_quadratic_is_differentiable() -> None:
    found = kfac(factor(2, 2, 2, 0), factor(2, 3, 3, 1))
    v = random((2, 2, 3)).requires_grad_()
    (grad,) = torch.autograd.grad(found.quadratic(v), v)
    close(grad, 2 * found.matvec(v.detach()), **TIGHT)


# which statistics a kind is made of -----------------------------------------------------------------------------------


def test_a_kind_takes_its_own_statistics() -> None:
    S, D = torch.ones(1, 2, 3), torch.full((1, 2, 3), 2.0)
    basis = {"lam_A": torch.ones(1, 3), "U_A": torch.eye(3).unsqueeze(0), "lam_G": torch.full((1, 2), 3.0)}
    held = BlockStore("kronecker", (1, 2, 3), ("w",), {"S": S, "D": D}, {}, basis)
    found = {kind: block_operator(held, kind) for kind in KINDS}
    assert [float(one.spectrum[0, 0, 0]) for one in found.values() if one is not None] == [2.0, 3.0, 1.0]
    assert found["kfac"].U_G is None  # type: ignore[union-attr]
    assert found["diagonal"].U_A is None  # type: ignore[union-attr]
    plain = BlockStore("diagonal", (1, 1, 3), ("b",), {"S": torch.ones(1, 1, 3)})
    assert all(block_operator(plain, kind) is not None for kind in KINDS)  # its basis is the identity
    assert block_operator(BlockStore("kronecker", (1, 2, 3), ("w",), {"S": S}), "diagonal") is None
    assert block_operator(BlockStore("kronecker", (1, 2, 3), ("w",), {"D": D}), "ekfac") is None
    factors = BlockStore("kronecker", (1, 2, 3), ("w",), {"A": torch.eye(3)[None], "G": torch.eye(2)[None]})
    with pytest.raises(UsageError, match="call decompose"):
        block_operator(factors, "kfac")


# a network ------------------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Blocks of all sorts: packed rows of which some are never used, a tied weight, norms, a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 2, groups=2)
        self.norm = nn.GroupNorm(2, 4)
        self.packed = nn.Parameter(torch.randn(6, 4))
        self.tied = nn.Linear(4, 4, bias=False)
        self.unused = nn.Parameter(torch.randn(2))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.norm(self.conv(x))).transpose(1, 2)
        y = torch.cat([y @ self.packed[:2].T, y @ self.packed[3:5].T], -1)
        return self.head(self.tied(torch.tanh(self.tied(y))).mean(1))


INPUTS = torch.randn(4, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def mixed() -> tuple[Program, Store]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Mixed().double()
    x = INPUTS
    program = kfe_fx.capture(module, (x,))
    return program, fit(program, x, statistics=("diagonal", "ekfac"), source="exact")


def parameters(program: Program) -> dict[str, Tensor]:
    """Return the parameters, as a user has them."""
    return dict(program.module().named_parameters())


def flat(curvature: Curvature, values: dict[str, Tensor]) -> Tensor:
    """Put the parameters behind each other."""
    return torch.cat([values[name].detach().reshape(-1) for name in curvature.parameters])


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_is_the_dense_matrix_of_its_blocks(mixed: tuple[Program, Store], kind: str) -> None:
    program, store = mixed
    found, v = store.operator(program, kind), parameters(program)
    dense = found.dense()
    assert dense.shape == (found.size, found.size)
    identity, w = torch.eye(found.size, dtype=torch.float64), flat(found, v)
    close(flat(found, found.matvec(v)), dense @ w, **TIGHT)
    close(flat(found, found.solve(v, 0.3)), torch.linalg.solve(dense + 0.3 * identity, w), **TIGHT)
    close(found.quadratic(v).detach(), w @ dense @ w, **TIGHT)
    assert found.trace() == pytest.approx(float(dense.trace()), rel=1e-12)
    assert found.frobenius_norm() == pytest.approx(float(dense.norm()), rel=1e-12)
    spectrum = torch.linalg.eigvalsh(dense)
    assert found.spectral_norm() == pytest.approx(float(spectrum[-1]), rel=1e-9)
    close(found.eigenvalues(), spectrum, rtol=1e-7, atol=1e-12 * float(spectrum[-1]))
    # rows of the packed weight that nothing uses have no curvature
    assert not found.matvec(v)["packed"][[2, 5]].any()
    assert not found.solve(v, 0.0)["packed"][[2, 5]].any()
    close(found.solve(v, 0.5)["packed"][[2, 5]], v["packed"].detach()[[2, 5]] / 0.5, **TIGHT)


def test_the_diagonal_of_a_network_is_that_of_its_gradients(mixed: tuple[Program, Store]) -> None:
    program, store = mixed
    found = store.operator(program, "diagonal")
    module, x = program.module(), INPUTS
    total = {name: torch.zeros_like(value) for name, value in parameters(program).items()}
    for n in range(len(x)):
        logs = module(x[n : n + 1]).log_softmax(1)[0]
        for log in logs:
            grads = torch.autograd.grad(log, list(module.parameters()), retain_graph=True, materialize_grads=True)
            for (_name, value), grad in zip(total.items(), grads, strict=True):
                value += log.detach().exp() * grad.square() / len(x)
    ones = {name: torch.ones_like(value) for name, value in total.items()}
    for name, value in found.matvec(ones).items():
        close(value, total[name], **TIGHT)


def test_what_is_left_out_is_named(mixed: tuple[Program, Store]) -> None:
    program, store = mixed
    found = store.operator(program)
    assert {item.parameter: item.reason for item in found.missing} == {"unused": "never reaches an output"}
    result = found.matvec(parameters(program))
    assert result.missing == ("unused",)
    assert set(result) == set(found.parameters) == set(parameters(program)) - {"unused"}
    # a store of factors alone knows nothing of what has no factors
    held = fit(program, INPUTS, statistics="kfac", source="exact").operator(program, "kfac")
    assert {item.parameter for item in held.missing} == {"unused", "norm.weight", "norm.bias"}
    assert "no kfac statistics of norm.weight" in str([item.reason for item in held.missing])


def test_a_parameter_of_which_a_part_has_no_statistics_is_left_out(mixed: tuple[Program, Store]) -> None:
    program, store = mixed
    part, other = (name for name in store.blocks if name.startswith("packed"))
    held = copy.deepcopy(store)
    del held.blocks[other].sums["S"]
    found = held.operator(program, "ekfac")
    assert {item.parameter for item in found.missing} == {"unused", "packed"}
    assert part not in found.blocks
    assert "packed" not in found.solve(parameters(program), 1.0)


def test_vectors_that_do_not_fit_are_refused(mixed: tuple[Program, Store]) -> None:
    program, store = mixed
    found, v = store.operator(program), parameters(program)
    with pytest.raises(UsageError, match="no parameter 'heads'"):
        found.matvec(v | {"heads": torch.zeros(1)})
    with pytest.raises(UsageError, match=r"head.bias is \[2\] in this vector, the parameter \[3\]"):
        found.solve(v | {"head.bias": torch.zeros(2)}, 1.0)
    with pytest.raises(UsageError, match=r"lacks 'head.bias'"):
        found.quadratic({name: value for name, value in v.items() if name != "head.bias"})
    with pytest.raises(UsageError, match="no curvature 'hessian'"):
        store.operator(program, "hessian")
    with pytest.raises(UsageError, match="no factors to damp"):
        found.solve(v, 1.0, "factored")
    with pytest.raises(UsageError, match="not negative"):
        found.solve(v, -1.0)


def test_factored_damping_of_a_network_damps_diagonals_as_they_are(mixed: tuple[Program, Store]) -> None:
    program, store = mixed
    found, v = store.operator(program, "kfac"), parameters(program)
    factored, exact = found.solve(v, 0.1, "factored"), found.solve(v, 0.1)
    close(factored["norm.weight"], exact["norm.weight"], rtol=0, atol=0)
    block = next(block for block in find_blocks(program).blocks if block.weight == "tied.weight")
    alone = found.blocks[block.name].solve(block.matrix(v).detach(), 0.1, "factored")
    close(block.matrix(factored), alone, **TIGHT)
    assert (factored["tied.weight"] - exact["tied.weight"]).abs().max() > 1e-3


def test_statistics_of_another_network_are_refused(mixed: tuple[Program, Store]) -> None:
    program, store = mixed
    other: Any = kfe_fx.capture(nn.Linear(3, 4).double(), (torch.randn(2, 3).double(),))
    with pytest.raises(UsageError, match="another network"):
        store.operator(other)
    assert store.operator(program.copy()).parameters == store.operator(program).parameters
    held = copy.deepcopy(store)
    held.blocks["tied.weight"].shape = (1, 2, 8)  # as another version may have seen it
    with pytest.raises(UsageError, match=r"tied.weight were measured in another form"):
        held.operator(program)


def test_statistics_of_no_such_kind_are_refused() -> None:
    program = kfe_fx.capture(nn.Linear(3, 4), (torch.randn(2, 3),))
    store = fit(program, torch.randn(5, 3), statistics="diagonal", source="exact")
    for kind in ("kfac", "ekfac"):
        with pytest.raises(UsageError, match=f"statistics='{kind}'"):
            store.operator(program, kind)


def test_a_tied_weight_is_one_parameter() -> None:
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False)).double()
    module[2].weight = module[0].weight
    x = torch.randn(4, 3).double()
    program = kfe_fx.capture(module, (x,))
    found = fit(program, x, source="exact").operator(program)
    assert found.parameters == ("0.weight",)
    assert found.missing == ()
    twice = dict(program.module().named_parameters(remove_duplicate=False))
    with pytest.raises(UsageError, match=r"no parameter '2.weight'"):
        found.matvec(twice)


def test_results_are_plain_where_the_vector_is_not() -> None:
    module = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 2)).double()
    x = torch.randn(3, 2, 3, 3).double()
    program = kfe_fx.capture(module, (x,))
    found = fit(program, x, statistics="ekfac", source="exact").operator(program)
    v = {name: value.detach().clone() for name, value in parameters(program).items()}
    expected = found.solve(v, 0.1)
    v["0.weight"] = v["0.weight"].to(memory_format=torch.channels_last)
    v["2.weight"] = v["2.weight"].T.contiguous().T
    for name, value in found.solve(v, 0.1).items():
        close(value, expected[name], **TIGHT)
        assert not value.requires_grad
