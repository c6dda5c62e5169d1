"""EKFAC against dense matrices, and against itself by other ways to the same step."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfe_fx
from kfe_fx.curvature.blocks import Blocks, LeftOut, find_blocks
from kfe_fx.curvature.distributed import Group
from kfe_fx.errors import UsageError
from kfe_fx.optim import EKFAC, preconditioned
from kfe_fx.program import Program
from tests.optim.nets import classifier, convolutional, data, gradients, train_step


def dense_curvature(optimizer: EKFAC, block: Any) -> Tensor:
    """Q diag(S) Q^T of a block, row-major."""
    state = optimizer.block_state(block)
    groups, high, wide = block.shape
    assert groups == 1
    U_A = state["U_A"][0] if "U_A" in state else torch.eye(wide, dtype=torch.float64)
    U_G = state["U_G"][0] if "U_G" in state else torch.eye(high, dtype=torch.float64)
    Q = torch.kron(U_G, U_A)
    return Q @ torch.diag(state["S"].reshape(-1)) @ Q.T


@pytest.mark.parametrize("make", [classifier, convolutional])
def test_the_update_is_the_dense_damped_solve(make: Any) -> None:
    program = make()
    optimizer = EKFAC(program, lr=0.1, momentum=0.0, kl_clip=None, damping=0.01, refresh=3)
    for number in range(5):
        before = {name: p.detach().clone() for name, p in program.module().named_parameters()}
        train_step(program, optimizer, data(program, number))
        grads = gradients(program)
        eps = optimizer._eps * 0.01
        if (number + 1) % 3 == 0:
            continue  # the basis that this step was taken in has been replaced
        for block in optimizer.blocks:
            wanted = torch.linalg.solve(
                dense_curvature(optimizer, block)
                + eps * torch.eye(block.shape[1] * block.shape[2], dtype=torch.float64),
                block.matrix(grads).reshape(-1),
            )
            moved = block.matrix({n: before[n] - program.tensor(n).detach() for n in block.parameters})
            torch.testing.assert_close(moved.reshape(-1) / 0.1, wanted, rtol=1e-7, atol=1e-9)


def test_what_the_taps_rotate_is_what_rotating_the_gradient_gives() -> None:
    one, other = classifier(), classifier()
    first = EKFAC(one, damping=0.01)
    second = EKFAC(other, damping=0.01)
    second._rotated = _Nothing()  # type: ignore[assignment]
    for number in range(6):
        train_step(one, first, data(one, number))
        train_step(other, second, data(other, number))
    for p, q in zip(one.module().parameters(), other.module().parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


class _Nothing(dict[str, Tensor]):
    def __setitem__(self, key: str, value: Tensor) -> None:
        return


@pytest.mark.parametrize("change", ["clip", "penalty"])
def test_a_gradient_that_was_changed_after_the_taps_is_the_one_that_counts(change: str) -> None:
    results = []
    for shortcut in (True, False):
        program = classifier()
        optimizer = EKFAC(program, damping=0.01, kl_clip=None)
        if not shortcut:
            optimizer._rotated = _Nothing()  # type: ignore[assignment]
        for number in range(4):
            inputs, targets = data(program, number)
            optimizer.zero_grad()
            loss = F.cross_entropy(program.module()(inputs), targets)
            if change == "penalty":
                loss = loss + 0.1 * sum(p.square().sum() for p in program.module().parameters())
            loss.backward()
            if change == "clip":
                nn.utils.clip_grad_norm_(program.module().parameters(), 0.01)
            optimizer.step()
        results.append([p.detach().clone() for p in program.module().parameters()])
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("make", [classifier, convolutional])
@pytest.mark.parametrize("rank", [None, 3])
def test_state_dict_continues_bit_for_bit(make: Any, rank: int | None) -> None:
    whole = make()
    optimizer = EKFAC(whole, rank=rank, refresh=2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for number in range(7):
        if number == 3:
            weights = copy.deepcopy(whole.state_dict())
            state, schedule = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(scheduler.state_dict())
        train_step(whole, optimizer, data(whole, number))
        scheduler.step()
    resumed = make()
    resumed.module().load_state_dict(weights)
    again = EKFAC(resumed, rank=rank, refresh=2)
    renewed = torch.optim.lr_scheduler.CosineAnnealingLR(again, 10)
    again.load_state_dict(state)
    renewed.load_state_dict(schedule)
    for number in range(3, 7):
        train_step(resumed, again, data(resumed, number))
        renewed.step()
    for p, q in zip(whole.module().parameters(), resumed.module().parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("make", [classifier, convolutional])
def test_accumulated_micro_batches_are_one_batch(make: Any) -> None:
    one, other = make(), make()
    first, second = EKFAC(one, damping=0.01), EKFAC(other, damping=0.01, accumulation=2)
    for number in range(4):
        inputs, targets = data(one, number)
        train_step(one, first, (inputs, targets))
        second.zero_grad()
        half = len(inputs) // 2
        for rows in (slice(0, half), slice(half, None)):
            (F.cross_entropy(other.module()(inputs[rows]), targets[rows]) / 2).backward()
        second.step()
    for p, q in zip(one.module().parameters(), other.module().parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


def test_a_sum_over_the_examples_is_their_mean() -> None:
    one, other = classifier(), classifier()
    first, second = EKFAC(one, kl_clip=None), EKFAC(other, kl_clip=None, reduction="sum", lr=0.1)
    for number in range(3):
        inputs, targets = data(one, number)
        train_step(one, first, (inputs, targets))
        second.zero_grad()
        F.cross_entropy(other.module()(inputs), targets, reduction="sum").backward()
        for p in other.module().parameters():
            assert p.grad is not None
        second.step()
        with torch.no_grad():  # a sum has N times the gradient and the same curvature: undo the longer step
            for p, q in zip(other.module().parameters(), one.module().parameters(), strict=True):
                p.copy_(q)
        for block, twin in zip(first.blocks, second.blocks, strict=True):
            torch.testing.assert_close(first.block_state(block)["S"], second.block_state(twin)["S"], rtol=1e-9, atol=0)


def test_decoupled_weight_decay_shrinks_by_lr_times_decay() -> None:
    program = classifier()
    optimizer = EKFAC(program, lr=0.5, weight_decay=0.1, kl_clip=1e-30)
    before = [p.detach().clone() for p in program.module().parameters()]
    train_step(program, optimizer, data(program, 0))
    for p, q in zip(program.module().parameters(), before, strict=True):
        torch.testing.assert_close(p, q * 0.95, rtol=0, atol=1e-12)


def test_parameter_groups_have_rates_of_their_own() -> None:
    program = classifier()
    named = dict(program.module().named_parameters())
    frozen = [p for name, p in named.items() if name.startswith("0.")]
    rest = [p for name, p in named.items() if not name.startswith("0.")]
    optimizer = EKFAC(program, [{"params": frozen, "lr": 0.0}, {"params": rest}], lr=0.1)
    before = {name: p.detach().clone() for name, p in named.items()}
    train_step(program, optimizer, data(program, 0))
    for name, p in named.items():
        assert torch.equal(p, before[name]) == name.startswith("0.")


def test_the_trust_region_bounds_the_length_of_the_step() -> None:
    program = classifier()
    optimizer = EKFAC(program, lr=1.0, momentum=0.0, kl_clip=1e-4, damping=0.01)
    before = {name: p.detach().clone() for name, p in program.module().named_parameters()}
    train_step(program, optimizer, data(program, 0))
    length = 0.0
    for block in optimizer.blocks:
        moved = block.matrix({n: before[n] - program.tensor(n).detach() for n in block.parameters}).reshape(-1)
        damped = dense_curvature(optimizer, block) + optimizer._eps * 0.01 * torch.eye(len(moved), dtype=torch.float64)
        length += float(moved @ damped @ moved)
    assert length == pytest.approx(1e-4, rel=1e-6)


def test_clip_norm_bounds_the_updates_together() -> None:
    program = classifier()
    optimizer = EKFAC(program, lr=1.0, momentum=0.0, kl_clip=None, clip_norm=0.01)
    before = [p.detach().clone() for p in program.module().parameters()]
    train_step(program, optimizer, data(program, 0))
    moved = [float((p - q).detach().norm()) for p, q in zip(program.module().parameters(), before, strict=True)]
    assert sum(one**2 for one in moved) ** 0.5 == pytest.approx(0.01, rel=1e-9)


def test_a_dead_layer_stays_where_it_is() -> None:
    program = classifier()
    with torch.no_grad():
        program.tensor("2.weight").zero_()  # nothing reaches the first layer
    optimizer = EKFAC(program, lr=0.1)
    before = program.tensor("0.weight").detach().clone()
    train_step(program, optimizer, data(program, 0))
    assert torch.equal(program.tensor("0.weight"), before)
    assert all(bool(torch.isfinite(p).all()) for p in program.module().parameters())


def test_gradients_that_are_not_finite_take_no_step_and_no_statistics() -> None:
    program = classifier()
    optimizer = EKFAC(program, lr=0.1)
    train_step(program, optimizer, data(program, 0))
    before = [p.detach().clone() for p in program.module().parameters()]
    kept = {block.name: optimizer.block_state(block)["S"].clone() for block in optimizer.blocks}
    inputs, targets = data(program, 1)
    inputs[0, 0] = float("nan")
    train_step(program, optimizer, (inputs, targets))
    assert optimizer.skipped == 1
    assert sum(optimizer.nonfinite.values()) == len(optimizer.blocks)
    for p, q in zip(program.module().parameters(), before, strict=True):
        assert torch.equal(p, q)
    for block in optimizer.blocks:
        assert torch.equal(optimizer.block_state(block)["S"], kept[block.name])
    train_step(program, optimizer, data(program, 2))
    assert optimizer.skipped == 1


def test_what_no_block_captures_takes_the_steps_of_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_the_first(program: Program) -> Blocks:
        found = find_blocks(program)
        out = tuple(LeftOut(name, "left out by the test") for name in ("0.weight", "0.bias"))
        return replace(found, blocks=found.blocks[1:], left_out=out)

    monkeypatch.setattr(preconditioned, "find_blocks", without_the_first)
    program = classifier()
    optimizer = EKFAC(program, lr=0.1, fallback_lr=1e-2)
    assert optimizer.left_out == dict.fromkeys(("0.weight", "0.bias"), "left out by the test")
    twin = program.copy()
    adamw = torch.optim.AdamW([twin.tensor(name) for name in optimizer.left_out], lr=1e-2, weight_decay=0.0)
    for number in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (number + 1)  # the fallback follows the schedule
        adamw.param_groups[0]["lr"] = 1e-2 / (number + 1)
        inputs, targets = data(program, number)
        optimizer.zero_grad()
        F.cross_entropy(program.module()(inputs), targets).backward()
        for name in optimizer.left_out:
            grad = program.tensor(name).grad
            assert grad is not None
            twin.tensor(name).grad = grad.clone()
        optimizer.step()
        adamw.step()
    for name in optimizer.left_out:
        torch.testing.assert_close(program.tensor(name), twin.tensor(name), rtol=1e-9, atol=1e-12)


def test_sampling_leaves_the_gradients_alone_and_sees_the_fisher_of_the_model() -> None:
    program = classifier()
    optimizer = EKFAC(program, source="sampled", refresh=1000, decay=0.99, lr=0.0, fallback_lr=0.0)
    inputs, targets = data(program, 0)
    for _ in range(400):
        optimizer.zero_grad()
        outputs = program.module()(inputs)
        optimizer.sample(outputs, "cross-entropy")
        assert all(p.grad is None for p in program.module().parameters())
        F.cross_entropy(outputs, targets).backward()
        optimizer.step()
    exact = kfe_fx.curvature.fit(program, (inputs, targets), "cross-entropy", source="exact", statistics="diagonal")
    for block in optimizer.blocks:
        trace = exact.blocks[block.name].D
        assert trace is not None
        # the mean of about 200 draws of 32 examples each
        assert float(optimizer.block_state(block)["S"].sum()) == pytest.approx(float(trace.sum()), rel=0.05)


def test_sampling_takes_the_classes_where_the_targets_have_them() -> None:
    found = []
    for targets in (torch.zeros(8, 3, dtype=torch.int64), None):
        torch.manual_seed(0)
        program = kfe_fx.capture(torch.nn.Linear(5, 1).double(), torch.randn(2, 3, 5, dtype=torch.float64))
        optimizer = EKFAC(program, source="sampled", fallback_lr=0.0)
        outputs = program.module()(torch.randn(8, 3, 5, dtype=torch.float64))
        optimizer.sample(outputs, "cross-entropy", targets)
        outputs.sum().backward()
        optimizer.step()
        found.append(float(optimizer.block_state(optimizer.blocks[0])["S"].abs().sum()))
    assert found[0] == 0.0  # one class alone is certain
    assert found[1] > 1e-6  # over the positions there is a choice


def test_sampling_needs_its_source() -> None:
    program = classifier()
    with pytest.raises(UsageError, match="source='sampled'"):
        EKFAC(program).sample(torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "median"}, "mean or a sum"),
        ({"source": "exact"}, "no source"),
        ({"refresh": 0}, "refresh"),
        ({"damping": 0.0}, "damping"),
        ({"momentum": 1.0}, "momentum"),
        ({"lr": -1.0}, "lr"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EKFAC(classifier(), **options)


def test_a_foreign_parameter_is_refused() -> None:
    with pytest.raises(UsageError, match="not the Program's"):
        EKFAC(classifier(), [nn.Parameter(torch.zeros(2))])


def test_closing_takes_the_taps_out() -> None:
    program = classifier()
    optimizer = EKFAC(program)
    optimizer.close()
    seen: list[Any] = []
    optimizer._collector.sink = seen.append
    inputs, targets = data(program, 0)
    F.cross_entropy(program.module()(inputs), targets).backward()
    assert not seen
    assert Group.current() == Group()


def test_it_trains(tmp_path: Any) -> None:
    program = convolutional()
    optimizer = EKFAC(program)
    losses = [train_step(program, optimizer, data(program, 0)) for _ in range(30)]
    assert losses[-1] < 0.2 * losses[0]
    assert isinstance(program, Program)


def test_a_loss_and_its_multiple_take_the_same_steps() -> None:
    one, other = classifier(), classifier()
    first, second = EKFAC(one, kl_clip=1e-3), EKFAC(other, loss_scale=50.0, kl_clip=1e-3 / 50)
    for number in range(4):
        train_step(one, first, data(one, number))
        inputs, targets = data(other, number)
        second.zero_grad()
        (F.cross_entropy(other.module()(inputs), targets) / 50).backward()
        second.step()
    for p, q in zip(one.module().parameters(), other.module().parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
