"""K-FAC of weights that are shared over steps: formulas against sums over pairs of steps, statistics against rows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import kfe_fx
from kfe_fx.curvature import EWC, Store, find_blocks, fit
from kfe_fx.curvature.block_operator import MAX_DENSE
from kfe_fx.curvature.distributed import Group
from kfe_fx.curvature.kernels import symmetric
from kfe_fx.curvature.operators import BlockOperator, Curvature, block_operator
from kfe_fx.curvature.pairs import Pairs, joined
from kfe_fx.curvature.temporal import Lagged, TemporalOperator, pair_sum
from kfe_fx.errors import BadFile, UsageError
from kfe_fx.optim import EKFAC, KFAC
from kfe_fx.optim.moving import lagged
from kfe_fx.program import Program
from tests.curvature.oracle import LOSS, assert_equal, targets_of
from tests.curvature.test_recurrent import Case, N, classifier, plain, sequences

close = torch.testing.assert_close
options = pytest.mark.parametrize("option", ["rnn1", "rnn2"])


# the formulas ---------------------------------------------------------------------------------------------------------


def brute(length: int, x: float) -> float:
    """Sum x^|s - t| over all pairs of steps."""
    return sum(x ** abs(s - t) for s in range(length) for t in range(length))


@given(st.integers(0, 12), st.floats(-1, 1))
def test_one_length_is_the_double_sum(length: int, x: float) -> None:
    """T2.3."""
    lengths = torch.zeros(length + 1, dtype=torch.float64)
    lengths[length] = 1
    found = float(pair_sum(lengths, torch.tensor(x, dtype=torch.float64)))
    assert found == pytest.approx(brute(length, x), rel=1e-12, abs=1e-13)
    if length and abs(1 - x) > 0.05:
        closed = (length * (1 - x * x) - 2 * x * (1 - x**length)) / (1 - x) ** 2
        assert found == pytest.approx(closed, rel=1e-9, abs=1e-11)


def test_correlated_steps_count_as_pairs_and_uncorrelated_ones_once() -> None:
    """T2.3: gamma_T(1) = T², reached without a jump; gamma_T(0) = T."""
    lengths = torch.tensor([0.0, 0, 0, 0, 0, 0, 0, 1], dtype=torch.float64)
    near = torch.tensor([1.0, 1 - 1e-12, 1 - 1e-6, 0.0, -0.0], dtype=torch.float64)
    close(pair_sum(lengths, near), torch.tensor([49.0, 49.0, 49.0, 7.0, 7.0]).double(), rtol=1e-5, atol=0)
    assert float(pair_sum(lengths, near[:1])) == 49.0
    assert abs(float(pair_sum(lengths, near[1:2])) - 49.0) < 1e-9


@given(st.lists(st.integers(0, 3), min_size=2, max_size=9), st.floats(-1, 1))
def test_lengths_are_averaged_after_the_formula(counts: list[int], x: float) -> None:
    found = float(pair_sum(torch.tensor(counts).double(), torch.tensor(x, dtype=torch.float64)))
    assert found == pytest.approx(sum(n * brute(length, x) for length, n in enumerate(counts)), rel=1e-12, abs=1e-12)


def chain(groups: int, width: int, seed: int, steps: int = 40) -> tuple[Tensor, Tensor]:
    """Draw a stationary sequence and return C_0 and C_1, as if it went on with zeros."""
    generator = torch.Generator().manual_seed(seed)
    step = 0.4 * torch.randn(groups, width, width, generator=generator, dtype=torch.float64)
    noise = torch.randn(steps, groups, width, 1, generator=generator, dtype=torch.float64)
    rows = [noise[0]]
    for one in noise[1:]:
        rows.append(torch.tanh(step @ rows[-1]) + one)
    made = torch.cat(rows, 2)  # [K, d, T]
    return made @ made.mT / steps, made[..., 1:] @ made[..., :-1].mT / steps


def held(shape: tuple[int, int, int], lengths: list[float], seed: int = 0) -> Lagged:
    groups, high, wide = shape
    (A, A1), (G, G1) = chain(groups, wide, seed), chain(groups, high, seed + 1)
    return Lagged(A, G, A1, G1, torch.tensor(lengths, dtype=torch.float64))


def power(matrix: Tensor, times: int) -> Tensor:
    return torch.linalg.matrix_power(matrix, times)


def root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def double_sum(made: Lagged, option: str, group: int = 0) -> Tensor:
    """Sum Psihat^|s - t| over the pairs of steps, or over all lags, between the roots of C_0."""
    factors = [(made.G[group], made.G1[group]), (made.A[group], made.A1[group])]
    roots = [root(now) for now, _ in factors]
    psis = [torch.linalg.inv(r) @ lag @ torch.linalg.inv(r) for r, (_, lag) in zip(roots, factors, strict=True)]
    if option == "rnn1":
        psis = [(psi + psi.T) / 2 for psi in psis]
    psi, W = torch.kron(*psis), torch.kron(*roots)
    if option == "rnn1":
        total, steps = torch.zeros_like(psi), 0.0
        for length, count in enumerate(made.lengths.tolist()):
            steps += count * length
            for s in range(length):
                for t in range(length):
                    total += count * power(psi, abs(s - t))
        return W @ total @ W / steps
    lags = [power(psi, lag) for lag in range(1, 300)]
    return W @ (torch.eye(len(psi), dtype=psi.dtype) + sum(one + one.T for one in lags)) @ W  # type: ignore[operator]


@options
@settings(max_examples=15)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**20))
def test_operators_are_the_double_sum(option: str, high: int, wide: int, seed: int) -> None:
    """T2.6, with sequences of several lengths."""
    made = held((1, high, wide), [0.0, 2.0, 0.0, 1.0, 3.0], seed)
    found, truth = made.operator(option), double_sum(made, option)
    close(found.dense(), truth, rtol=1e-9, atol=1e-11)
    assert found.trace() == pytest.approx(float(truth.trace()), rel=1e-10)
    assert found.frobenius_norm() == pytest.approx(float(truth.norm()), rel=1e-10)
    assert found.spectral_norm() == pytest.approx(float(torch.linalg.eigvalsh(truth)[-1]), rel=1e-10)
    assert float(found.eigenvalues()[0]) > 0
    v = torch.randn(2, 1, high, wide, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    close(found.matvec(v).flatten(1), v.flatten(1) @ truth, rtol=1e-9, atol=1e-10)
    close(found.quadratic(v), torch.einsum("np,pq,nq->n", v.flatten(1), truth, v.flatten(1)), rtol=1e-9, atol=1e-10)
    for damping in (0.0, 1e-4, 0.3):
        damped = truth + damping * torch.eye(len(truth), dtype=truth.dtype)
        close(found.solve(v, damping).flatten(1), torch.linalg.solve(damped, v.flatten(1).T).T, rtol=1e-7, atol=1e-8)


@options
def test_factored_damping_adds_to_what_steps_are_and_not_to_what_they_have_in_common(option: str) -> None:
    made = held((1, 3, 2), [0.0, 0.0, 1.0, 2.0])
    damping = 0.2
    pi = ((made.A[0].trace() / 2) / (made.G[0].trace() / 3)).sqrt()
    eyes = torch.eye(2, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    A, G = made.A + pi * damping**0.5 * eyes[0], made.G + damping**0.5 / pi * eyes[1]
    truth = double_sum(Lagged(A, G, made.A1, made.G1, made.lengths), option)
    v = torch.randn(1, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = made.operator(option).solve(v, damping, "factored")
    close(found.flatten(), torch.linalg.solve(truth, v.flatten()), rtol=1e-9, atol=1e-11)


@options
def test_uncorrelated_steps_are_expand(option: str) -> None:
    """T2.6: psi = 0 gives T G_0 (x) A_0, which is G (x) A, as G is summed over the steps."""
    made = held((2, 3, 2), [0.0, 1.0, 4.0, 2.0])
    nothing = Lagged(made.A, made.G, torch.zeros_like(made.A1), torch.zeros_like(made.G1), made.lengths)
    expected = torch.block_diag(*(torch.kron(G, A) for G, A in zip(made.G, made.A, strict=True)))
    close(nothing.operator(option).dense(), expected, rtol=1e-12, atol=1e-12)
    single = Lagged(made.A, made.G, made.A1, made.G1, torch.tensor([0.0, 5.0]))
    if option == "rnn1":
        close(single.operator(option).dense(), expected, rtol=1e-12, atol=1e-12)  # sequences of one step have no pairs


@options
def test_directions_that_nothing_goes_along_stay_where_they_are(option: str) -> None:
    """A dead input and a dead group: the pseudo-inverse maps them to zero, a damped solve divides them."""
    made = held((2, 3, 4), [0.0, 0.0, 0.0, 1.0])
    for factor in (made.A, made.A1):
        factor[:, :, 1] = 0.0
        factor[:, 1] = 0.0
    for factor in (made.G, made.G1):
        factor[1] = 0.0
    found = made.operator(option)
    v = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solved = found.solve(v, 0.0)
    assert not solved[1].any()
    assert float(solved[0, :, 1].abs().max()) < 1e-9 * float(solved.abs().max())
    close(found.matvec(found.solve(found.matvec(v), 0.0)), found.matvec(v), rtol=1e-8, atol=1e-10)
    for form in ("tikhonov", "factored"):
        assert found.solve(v, 0.25, form).isfinite().all()
    tikhonov = found.solve(v, 0.25)
    close(tikhonov[1], v[1] / 0.25)
    close(tikhonov[0, :, 1], v[0, :, 1] / 0.25, rtol=1e-9, atol=1e-9)


def test_the_largest_eigenvalue_is_found_without_the_matrix() -> None:
    found = held((1, 12, 9), [0.0, 0.0, 1.0, 2.0]).operator("rnn1")
    assert found._lanczos() == pytest.approx(found.spectral_norm(), rel=1e-10)
    large = held((1, 70, 60), [0.0, 1.0, 1.0]).operator("rnn1")
    assert large.spectral_norm() > 0
    with pytest.raises(UsageError, match=f"at most {MAX_DENSE:,}"):
        large.dense()


def test_multiples_and_what_means_nothing() -> None:
    found = held((1, 3, 2), [0.0, 1.0, 2.0]).operator("rnn2")
    v = torch.randn(1, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    twice = found.scaled(2.0)
    close(twice.matvec(v), 2 * found.matvec(v))
    close(twice.solve(v, 0.3), found.solve(v, 0.15) / 2, rtol=1e-9, atol=1e-11)
    close(twice.solve(v, 0.0), found.solve(v, 0.0) / 2)
    assert twice.trace() == pytest.approx(2 * found.trace())
    assert not found.scaled(0.0).solve(v, 0.0).any()
    close(found.scaled(0.0).solve(v, 0.5), v / 0.5)
    with pytest.raises(UsageError, match="only K-FAC has factors"):
        twice.solve(v, 0.1, "factored")
    with pytest.raises(UsageError, match="not negative"):
        found.solve(v, -1.0)
    with pytest.raises(UsageError, match=r"\[\.\.\., 1, 3, 2\], not"):
        found.matvec(v.mT)
    assert found.matvec(v.float()).dtype is found.solve(v.float(), 0.1).dtype is torch.float32


# the statistics -------------------------------------------------------------------------------------------------------


def neighbours(rows: list[Tensor]) -> Tensor:
    return sum((one[1:].T @ one[:-1] for one in rows), torch.zeros(()))


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("lstm", {}),
        ("lstm", {"packed": True}),
        ("gru", {"packed": True, "bias": False}),
        ("projected", {"packed": True, "first": True}),
        ("gru", {"packed": True, "reverse": True, "bias": False}),
    ],
)
def test_neighbours_are_those_of_the_rows(kind: str, given: dict[str, Any]) -> None:
    case = plain(kind, **given)
    store = fitted(case, "rnn1")
    for side in ("ih", "hh", "hr"):
        if f"weight_{side}" not in case.names:
            continue
        found = store.blocks[case.block(side).name]
        inside, behind = case.inside[side], case.behind[side]
        A1, G1 = neighbours(inside), neighbours(behind)
        if given.get("reverse"):  # steps stand in the order of the input
            A1, G1 = A1.T, G1.T
        assert_equal(found.sums["A1"][0], A1, f"A1 of {side}")
        assert_equal(found.sums["G1"][0], G1, f"G1 of {side}")
        lengths = torch.bincount(torch.tensor([len(rows) for rows in inside])).double()
        assert_equal(found.sums["lengths"], lengths, f"lengths of {side}")
        assert found.counts["rows"] == sum(map(len, inside))


def fitted(case: Case, sharing: str, **options: Any) -> Store:
    given = {"statistics": "kfac", "loss": LOSS, "source": "empirical"} | options
    return fit(case.program, [(case.inputs, targets_of(N))], sharing=sharing, **given)


@options
def test_the_operator_of_a_store_is_what_the_model_says(option: str) -> None:
    """Blocks without steps are those of expand, and so is S*."""
    program = classifier()
    x, y = sequences(6)
    store, plainly = (fit(program, (x, y), statistics="ekfac", sharing=sharing) for sharing in (option, "expand"))
    curvature = Curvature(store, program, "kfac")
    kinds = {name: type(found) for name, found in curvature.blocks.items()}
    assert kinds == {
        "layer.weight_ih_l0": TemporalOperator,
        "layer.weight_hh_l0": TemporalOperator,
        "head.weight": BlockOperator,
    }
    block = store.blocks["layer.weight_hh_l0"]
    lag = block.lagged
    assert lag is not None
    close(curvature.blocks["layer.weight_hh_l0"].dense(), double_sum(lag, option), rtol=1e-7, atol=1e-10)
    for name, one in store.blocks.items():
        other = plainly.blocks[name]
        for key in ("A", "G", "S"):
            assert_equal(getattr(one, key), getattr(other, key), f"{key} of {name}")
    assert store.operator(program, "ekfac").trace() == pytest.approx(plainly.operator(program, "ekfac").trace())
    vector = {name: torch.ones_like(value) for name, value in program.module().named_parameters()}
    for form in ("tikhonov", "factored"):
        solved = curvature.solve(vector, 0.1, form)
        assert all(value.isfinite().all() for value in solved.values())
    again = curvature.solve(curvature.matvec(vector), 0.0)
    close(curvature.matvec(again)["head.weight"], curvature.matvec(vector)["head.weight"], rtol=1e-6, atol=1e-9)


def test_every_class_of_the_exact_source_adds_to_the_gradients_alone() -> None:
    program = classifier()
    x, y = sequences(4)
    sources = ("exact", "empirical")
    exact, drawn = (fit(program, (x, y), statistics="kfac", source=source, sharing="rnn1") for source in sources)
    for name in ("layer.weight_ih_l0", "layer.weight_hh_l0"):
        one, other = exact.blocks[name], drawn.blocks[name]
        assert torch.equal(one.sums["A1"], other.sums["A1"])
        assert torch.equal(one.sums["lengths"], other.sums["lengths"])
        assert not torch.allclose(one.sums["G1"], other.sums["G1"])
        assert one.lagged is not None
        psi = one.lagged.whitened()
        assert all(float(torch.linalg.matrix_norm(side.psi, 2)) <= 1 for side in psi)


def test_what_is_correlated_over_time_is_nearer_to_the_truth() -> None:
    """A recurrence whose loss is a sum over the last state alone: gradients of neighbouring steps go together."""
    torch.manual_seed(0)
    net = nn.RNN(3, 3, batch_first=True).double()
    with torch.no_grad():
        net.weight_hh_l0.copy_(0.9 * torch.eye(3))
        net.weight_ih_l0.mul_(0.05)

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)[0][:, -1]

    x = torch.randn(400, 8, 3, dtype=torch.float64).cumsum(1)
    program = kfe_fx.capture(Last(), (x[:2],))
    block = next(one for one in find_blocks(program).blocks if one.weight == "net.weight_ih_l0")
    rows = []
    parameters = [net.weight_ih_l0, net.bias_ih_l0]
    for n in range(len(x)):
        out = Last()(x[n : n + 1])[0]
        for value in out:
            grads = torch.autograd.grad(value, parameters, retain_graph=True)
            rows.append(torch.cat([grads[0], grads[1].unsqueeze(1)], 1).flatten())
    made = torch.stack(rows)
    truth = made.T @ made / len(x)
    errors = {}
    for sharing in ("expand", "rnn1", "rnn2"):
        store = fit(program, x, "mse", statistics="kfac", source="exact", sharing=sharing)
        found = store.operator(program, "kfac").blocks[block.name].dense()
        scale = float((found * truth).sum() / found.square().sum())  # the loss is a mean over outputs
        errors[sharing] = float((truth - scale * found).norm() / truth.norm())
    assert errors["rnn1"] < errors["expand"]
    assert errors["rnn2"] < errors["expand"]


# stores ---------------------------------------------------------------------------------------------------------------


def test_stores_keep_and_add_what_neighbours_have_in_common(tmp_path: Path) -> None:
    program = classifier()
    x, y = sequences(7)
    part = {"statistics": "kfac", "source": "empirical", "sharing": "rnn2"}
    whole = fit(program, (x, y), **part)
    first, second = fit(program, (x[:3], y[:3]), **part), fit(program, (x[3:, :4], y[3:]), **part)
    name = "layer.weight_hh_l0"
    merged = first.merge(second)
    assert merged.blocks[name].sums["lengths"].tolist() == [0, 0, 0, 0, 4, 3]
    assert torch.equal(merged.blocks[name].sums["A1"], first.blocks[name].sums["A1"] + second.blocks[name].sums["A1"])
    path = merged.save(tmp_path / "merged.safetensors")
    again = Store.load(path)
    assert again.facts["format"] == 2
    for key, value in merged.blocks[name].sums.items():
        assert torch.equal(again.blocks[name].sums[key], value)
    v = {key: torch.ones_like(value) for key, value in program.module().named_parameters()}
    one, other = (store.operator(program, "kfac").matvec(v) for store in (whole, Store.load(whole.save(path))))
    assert all(torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(UsageError, match="sharing differs"):
        whole.merge(fit(program, (x, y), statistics="kfac", source="empirical"))
    with pytest.raises(UsageError, match="no eigenbases"):
        block_operator(merged.blocks[name], "kfac")
    assert isinstance(block_operator(merged.blocks[name], "kfac", "rnn2"), TemporalOperator)


def test_a_damaged_count_of_lengths_is_refused(tmp_path: Path) -> None:
    program = classifier()
    store = fit(program, sequences(3), statistics="kfac", source="empirical", sharing="rnn1")
    held = store.blocks["layer.weight_ih_l0"].sums
    for bad in (torch.ones(2, 2, dtype=torch.float64), torch.ones(3), torch.tensor([1.0, -1.0], dtype=torch.float64)):
        held["lengths"] = bad
        with pytest.raises(BadFile, match="no count of lengths"):
            Store.load(store.save(tmp_path / "bad.safetensors"))


def test_files_of_the_first_version_are_read(tmp_path: Path) -> None:
    program = classifier()
    store = fit(program, sequences(3), statistics="ekfac", source="empirical")
    store.facts["format"] = 1
    again = Store.load(store.save(tmp_path / "old.safetensors"))
    assert again.blocks.keys() == store.blocks.keys()
    store.facts["format"] = 3
    with pytest.raises(BadFile, match="format 3"):
        Store.load(store.save(tmp_path / "new.safetensors"))


def test_ranks_that_saw_other_lengths_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    program = classifier()
    x, y = sequences(4)
    store = fit(program, (x[:, :3], y), statistics="kfac", source="empirical", sharing="rnn1")
    name = "layer.weight_hh_l0"
    told = {(name, key): (*value.shape,) for key, value in store.blocks[name].sums.items()} | {(name, "lengths"): (9,)}

    class Two(Group):
        def gather(self, value: Any) -> list[Any]:
            return [value, told]

    monkeypatch.setattr(Group, "current", classmethod(lambda cls: Two(0, 2)))
    store.complete(moments=False)
    assert store.blocks[name].sums["lengths"].tolist() == [0, 0, 0, 4, 0, 0, 0, 0, 0]
    empty = Store.of(program, find_blocks(program))
    empty.complete(moments=False)
    assert empty.blocks[name].sums["A1"].shape == store.blocks[name].sums["A1"].shape
    assert empty.blocks[name].sums["lengths"].tolist() == [0.0] * 9


def test_elastic_weights_take_either_option() -> None:
    program = classifier()
    store = fit(program, sequences(6), statistics="kfac", source="exact", sharing="rnn1")
    penalty = EWC(store, program, "kfac", strength=2.0)
    curvature = store.operator(program, "kfac")
    with torch.no_grad():
        moved = {name: torch.full_like(value, 0.1) for name, value in program.module().named_parameters()}
        for name, value in program.module().named_parameters():
            value.add_(moved[name])
    assert float(penalty().detach()) == pytest.approx(float(curvature.quadratic(moved)), rel=1e-9)
    grads = torch.autograd.grad(penalty(), program.tensor("layer.weight_hh_l0"))[0]
    close(grads, 2.0 * curvature.matvec(moved)["layer.weight_hh_l0"], rtol=1e-8, atol=1e-10)


# uses of one weight ---------------------------------------------------------------------------------------------------


def test_chains_of_several_uses_do_not_run_into_each_other() -> None:
    rows = torch.randn(1, 2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one = Pairs(rows, rows, ((5, "right"),), None, (3, 2))
    valid = torch.tensor([[True, True, False, True, False], [True] * 5])
    other = Pairs(rows, rows, ((5, "left"),)).masked(valid)
    both = joined([one, other])
    assert both.chains == (3, 2, 1, 1, 1, 1, 1)
    now, before = both.lagged("right", gradients=False)
    assert now.abs().sum((0, 1, 3)).bool().tolist() == [True, True, False, True, *[False] * 5]
    close(before, both.right[:, :, :-1])  # type: ignore[index]
    assert both.chain_lengths().tolist() == [2, 8, 2, 2]
    assert both.valid is not None
    assert both.valid[:, :5].all()
    gradients, _ = both.lagged("left", gradients=True)
    assert gradients.abs().sum((0, 1, 3)).bool().tolist() == [
        True,
        True,
        False,
        True,
        False,
        False,
        False,
        False,
        False,
    ]
    assert not both.lagged("right", gradients=True)[0].any()


# optimizers -----------------------------------------------------------------------------------------------------------


def loss_of(program: Program, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(program.module()(batch[0]), batch[1])


@options
def test_the_update_is_the_damped_solve(option: str) -> None:
    program = classifier().train()
    batch = sequences(12)
    optimizer = KFAC(
        program, lr=0.1, momentum=0.0, kl_clip=None, damping=0.01, refresh=100, damping_kind="factored", sharing=option
    )
    store = fit(program, batch, statistics="kfac", source="empirical", sharing=option)
    before = {name: p.detach().clone() for name, p in program.module().named_parameters()}
    loss_of(program, batch).backward()
    optimizer.step()
    grads = {name: p.grad for name, p in program.module().named_parameters() if p.grad is not None}
    for block in optimizer.blocks:
        found = block_operator(store.blocks[block.name], "kfac", option)
        assert found is not None
        wanted = found.solve(block.matrix(grads), optimizer._eps * 0.01, "factored")
        moved = block.matrix({name: before[name] - program.tensor(name).detach() for name in block.parameters}) / 0.1
        assert_equal(moved, wanted, block.name, least=1e-3)
    optimizer.close()


@options
def test_moving_averages_follow_factors_neighbours_and_lengths(option: str) -> None:
    program = classifier().train()
    optimizer = KFAC(program, lr=0.0, decay=0.5, refresh=1, factor_every=1, damping_kind="factored", sharing=option)
    stores = []
    for batch in (sequences(4), (sequences(6)[0][:, :3], sequences(6)[1])):
        stores.append(fit(program, batch, statistics="kfac", source="empirical", sharing=option))
        optimizer.zero_grad()
        loss_of(program, batch).backward()
        optimizer.step()
    block = next(one for one in optimizer.blocks if one.weight == "layer.weight_hh_l0")
    found = lagged(optimizer.block_state(block))
    held = [store.blocks[block.name].lagged for store in stores]
    for key in ("A", "G", "A1", "G1"):
        one, other = (getattr(each, key) for each in held)
        assert_equal(getattr(found, key), (one + 2 * other) / 3, key)
    close(found.lengths / found.lengths[3], torch.tensor([0, 0, 0, 1, 0, 0.5]).double())
    optimizer.close()


@options
def test_training_resumes_where_it_was(option: str) -> None:
    given: dict[str, Any] = {"lr": 0.1, "refresh": 3, "damping_kind": "factored", "sharing": option}
    batches = [tuple(part.roll(seed, 0)[:10] for part in sequences(20)) for seed in range(9)]

    def trained(program: Program, optimizer: KFAC, some: list[Any]) -> KFAC:
        for batch in some:
            optimizer.zero_grad()
            loss_of(program, batch).backward()
            optimizer.step()
        optimizer.close()
        return optimizer

    straight, parted = classifier().train(), classifier().train()
    trained(straight, KFAC(straight, **given), batches)
    state = copy.deepcopy(trained(parted, KFAC(parted, **given), batches[:4]).state_dict())
    again = parted.copy().train()
    after = KFAC(again, **given)
    after.load_state_dict(state)
    trained(again, after, batches[4:])
    for name, p in straight.module().named_parameters():
        assert torch.equal(p, again.tensor(name))
        assert not torch.equal(p, parted.tensor(name))


def test_sharings_that_there_are_not_are_refused() -> None:
    program = classifier()
    with pytest.raises(UsageError, match="no sharing 'rnn1' here; choose expand, reduce"):
        EKFAC(program, sharing="rnn1")
    with pytest.raises(UsageError, match="no sharing 'rnn3' here"):
        KFAC(program, sharing="rnn3")
    with pytest.raises(UsageError, match="damped by factors"):
        KFAC(program, sharing="rnn2")
    with pytest.raises(UsageError, match="no sharing 'rnn'; choose expand, reduce, rnn1, rnn2"):
        fit(program, sequences(3), sharing="rnn")


def test_a_diagonal_factor_has_no_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sides that are too wide for a matrix keep their diagonal, and K-FAC is that of expand."""
    monkeypatch.setattr("kfe_fx.curvature.statistics.MAX_DENSE", 5)
    program = classifier()
    store = fit(program, sequences(3), statistics="kfac", source="empirical", sharing="rnn1")
    assert not any("A1" in block.sums for block in store.blocks.values())
    found = store.operator(program, "kfac").blocks["layer.weight_hh_l0"]
    assert isinstance(found, BlockOperator)
    assert symmetric(store.blocks["head.weight"].sums["G"]).shape == (1, 3, 3)
