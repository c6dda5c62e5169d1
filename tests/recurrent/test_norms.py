"""Batch normalisation in recurrences against a loop over steps and sequences with the statistics written out.

T4.x and T5.x are the properties that the papers imply: Cooijmans et al. 2017 and Laurent et al. 2016.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kfe_fx.errors import BadData, UsageError
from kfe_fx.recurrent import fused
from kfe_fx.recurrent.loop import BLOCK
from kfe_fx.recurrent.norms import folded, pool
from kfe_fx.recurrent.op import CELLS, Arguments, recurrent
from tests.recurrent.oracle import running_after, slow

INPUTS, HIDDEN = 3, 5
LEARNED = (
    *("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"),
    *("gamma_ih", "gamma_hh", "gamma_c", "beta_c", "input", "h0", "c0", "gate"),
)
RUNNING = ("mean_ih", "var_ih", "mean_hh", "var_hh", "mean_c", "var_c")


def made(
    cell: str = "lstm",
    *,
    sides: tuple[str, ...] = ("ih", "hh"),
    cell_norm: str = "none",
    rows: int = 4,
    batch: int = 4,
    steps: int = 6,
    fresh: bool = False,
    width: int | None = None,
    gamma: float | None = None,
    seed: int = 0,
    **options: Any,
) -> Arguments:
    """Return arguments with random weights and statistics; learned tensors ask for gradients."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 0.5) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    def above(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64) + 0.3

    gates, out = CELLS[cell] * HIDDEN, width or HIDDEN
    values: dict[str, Any] = {
        "input": draw(batch, steps, INPUTS, scale=1.0),
        "h0": None,
        "c0": None,
        "weight_ih": draw(gates, INPUTS),
        "weight_hh": draw(gates, out),
        "bias_ih": draw(gates),
        "bias_hh": draw(gates),
        "weight_hr": draw(out, HIDDEN) if width else None,
        "seen": torch.zeros(rows, dtype=torch.float64),
    }
    wide = {"ih": gates, "hh": gates, "c": 1 if cell_norm == "scalar" else HIDDEN}
    for side in (*sides, *(() if cell_norm == "none" else ("c",))):
        size = wide[side]
        values[f"gamma_{side}"] = above(size) if gamma is None else torch.full((size,), gamma, dtype=torch.float64)
        zeros, ones = torch.zeros(rows, size).double(), torch.ones(rows, size).double()
        values[f"mean_{side}"] = zeros if fresh else draw(rows, size)
        values[f"var_{side}"] = ones if fresh else above(rows, size)
    if cell_norm == "channel":
        values["beta_c"] = draw(HIDDEN)
    if cell_norm == "scalar":
        values["mean_c"] = None
    values |= {name: draw(*value) if isinstance(value, tuple) else value for name, value in options.items()}
    for name in LEARNED:
        if values.get(name) is not None:
            values[name].requires_grad_()
    return Arguments(**values, cell=cell)


def run(call: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    args, options = call.call()
    return recurrent(*args, **options)


def copied(call: Arguments) -> Arguments:
    """Return the same with running statistics of its own."""
    apart = {name: value.clone() for name in (*RUNNING, "seen") if (value := getattr(call, name)) is not None}
    return replace(call, **apart)


def learned(call: Arguments) -> list[Tensor]:
    return [value for name in LEARNED if (value := getattr(call, name)) is not None]


def close(found: Any, expected: Any, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def check(call: Arguments) -> None:
    """Compare values, all gradients and, in training, the running statistics with the slow loop."""
    expected, mine = slow(copied(call)), copied(call)
    after = running_after(copied(call), expected.met)
    output, h_n, c_n = run(mine)
    close((output, h_n, c_n), (expected.output, expected.h_n, expected.c_n))
    for name in RUNNING:
        if (value := getattr(mine, name)) is not None:
            close(value, after.get(name, getattr(call, name)))
    generator = torch.Generator().manual_seed(9)
    probes = [torch.randn(each.shape, generator=generator, dtype=torch.float64) for each in (output, h_n, c_n)]
    totals = [
        sum((p * each).sum() for p, each in zip(probes, found, strict=True))
        for found in ((output, h_n, c_n), (expected.output, expected.h_n, expected.c_n))
    ]
    ours, theirs = (torch.autograd.grad(total, learned(call), allow_unused=True) for total in totals)  # type: ignore[arg-type]
    for one, other in zip(ours, theirs, strict=True):
        assert one is None or torch.isfinite(one).all()
        close(torch.zeros(()) if one is None else one, torch.zeros(()) if other is None else other, 1e-9)


LENGTHS = torch.tensor([3, 6, 1, 5])
CASES: dict[str, Arguments] = {
    "full": made(),
    "input": made(sides=("ih",)),
    "hidden only": made(sides=("hh",)),
    "channel": made(cell_norm="channel"),
    "scalar": made(cell_norm="scalar"),
    "cell only": made(sides=(), cell_norm="channel"),
    "gru": made("gru"),
    "gru input": made("gru", sides=("ih",)),
    "tanh": made("rnn_tanh"),
    "relu": made("rnn_relu", sides=("ih",)),
    "no biases": made(bias_ih=None, bias_hh=None, cell_norm="channel"),
    "gru without biases": made("gru", bias_ih=None, bias_hh=None),
    "projection": made(width=2, cell_norm="scalar"),
    "states": made(h0=(4, HIDDEN), c0=(4, HIDDEN)),
    "gated": made(gate=(4, HIDDEN), cell_norm="channel"),
    "one row": made(rows=1, cell_norm="channel"),
    "more rows than steps": made(rows=9, cell_norm="scalar"),
    "fresh": made(fresh=True, cell_norm="channel", gamma=0.1),
    "many sequences": made(batch=7, steps=3),
}


@pytest.mark.parametrize(("reverse", "lengths"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", CASES)
def test_equal_to_the_slow_loop(name: str, training: bool, reverse: bool, lengths: bool):
    call = CASES[name]
    steps = call.input.shape[1]
    given = LENGTHS if len(call.input) == 4 else torch.arange(len(call.input)) % steps + 1
    check(replace(call, training=training, reverse=reverse, lengths=given if lengths else None))


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "padded"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("cell", "sides"), [("lstm", ("ih",)), ("lstm", ("ih", "hh")), ("gru", ("ih", "hh"))])
def test_shared_statistics_equal_to_the_slow_loop(cell, sides, batch_first, lengths):
    call = made(cell, sides=sides, rows=1, cell_norm="channel" if "hh" in sides and cell == "lstm" else "none")
    call = replace(call, training=True, shared=True, lengths=lengths, batch_first=batch_first)
    check(call if batch_first else replace(call, input=call.input.detach().transpose(0, 1).requires_grad_()))


@settings(max_examples=25)
@given(st.data())
def test_random_layers_equal_to_the_slow_loop(data: st.DataObject):
    draw = data.draw
    cell = draw(st.sampled_from(sorted(CELLS)))
    sides = draw(st.sampled_from([("ih",), ("hh",), ("ih", "hh")]))
    batch, steps = draw(st.integers(2, 5)), draw(st.integers(1, 5))
    shared = draw(st.booleans())
    options: dict[str, Any] = {"h0": (batch, HIDDEN)} if draw(st.booleans()) else {}
    norm = draw(st.sampled_from(["none", "scalar", "channel"])) if cell == "lstm" and "hh" in sides else "none"
    rows = 1 if shared else draw(st.integers(1, 6))
    call = made(
        cell, sides=sides, cell_norm=norm, rows=rows, batch=batch, steps=steps, seed=draw(st.integers(0, 9)), **options
    )
    lengths = torch.tensor(draw(st.lists(st.integers(1, steps), min_size=batch, max_size=batch)))
    check(
        replace(
            call,
            lengths=lengths if draw(st.booleans()) else None,
            training=draw(st.booleans()),
            shared=shared,
            reverse=draw(st.booleans()),
        )
    )


@pytest.mark.parametrize("name", ["lstm", "gru", "padded", "shared", "scalar", "h0"])
def test_gradients_of_training_by_differences(name: str):
    cell = "gru" if name == "gru" else "lstm"
    options: dict[str, Any] = {"h0": (3, HIDDEN)} if name == "h0" else {}
    call = made(
        cell,
        batch=3,
        steps=3,
        rows=1 if name == "shared" else 2,
        cell_norm="scalar" if name == "scalar" else "none",
        **options,
    )
    call = replace(call, training=True, shared=name == "shared")
    if name == "padded":
        call = replace(call, lengths=torch.tensor([3, 1, 2]))
    names = [one for one in LEARNED if getattr(call, one) is not None]

    def value(*tensors: Tensor) -> Tensor:
        output, h_n, _ = run(replace(copied(call), **dict(zip(names, tensors, strict=True))))
        return output.sum() + h_n.square().sum()

    assert torch.autograd.gradcheck(value, tuple(learned(call)), fast_mode=True)


@pytest.mark.parametrize("lengths", [None, torch.tensor([2 * BLOCK + 6, BLOCK + 1, BLOCK])], ids=["whole", "padded"])
@pytest.mark.parametrize(("cell", "sides"), [("lstm", ("ih", "hh")), ("lstm", ("ih",)), ("gru", ("ih",))])
def test_more_steps_than_are_made_together(cell: str, sides: tuple[str, ...], lengths: Tensor | None):
    call = made(cell, sides=sides, rows=BLOCK + 3, batch=3, steps=2 * BLOCK + 6)
    for training in (False, True):
        check(replace(call, training=training, lengths=lengths))


def test_a_graph_can_be_walked_again_from_other_outputs():
    call = replace(made(), training=True)
    output = run(copied(call))[0]
    first = torch.autograd.grad(output[:, 5].sum(), learned(call), retain_graph=True)
    torch.autograd.grad(output.sum(), [call.input], retain_graph=True)
    early = torch.autograd.grad(output[:, 1].sum(), learned(call), retain_graph=True)
    for found, step in ((first, 5), (early, 1)):
        alone = torch.autograd.grad(run(copied(call))[0][:, step].sum(), learned(call))
        for one, other in zip(found, alone, strict=True):
            close(one, other)


# evaluation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_one_row_runs_in_pytorchs_kernel(cell: str, monkeypatch: pytest.MonkeyPatch):
    """T5.3: of shared statistics normalisation is one affine map of the weights, and no loop runs."""
    calls = []
    monkeypatch.setattr("kfe_fx.recurrent.run.run_fused", lambda *a, **k: calls.append(1) or fused.run_fused(*a, **k))
    for sides in (("ih",), ("ih", "hh")):
        check(made(cell, rows=1, sides=sides))
    assert len(calls) == 2
    assert not folded(made(cell, rows=1)).normalised
    left = folded(made(rows=1, cell_norm="scalar"))
    assert left.gamma_ih is None
    assert left.gamma_c is not None


def test_t4_1_statistics_of_one_batch_give_its_outputs():
    call = replace(made(cell_norm="channel", rows=6, fresh=True, h0=(4, HIDDEN)), training=True, momentum=1.0)
    mine = copied(call)
    trained = run(mine)
    close(run(replace(mine, training=False)), trained, 1e-12)


def test_t4_2_steps_fold_one_by_one():
    """Of each step's row: W_h and W_x scaled, the bias shifted, an affine map on c, in a plain loop of cells."""
    call = made(cell_norm="channel", rows=6)
    h = c = torch.zeros(4, HIDDEN).double()
    outputs = []
    for t in range(6):
        s_x, s_h = (
            getattr(call, f"gamma_{k}") / (getattr(call, f"var_{k}")[t] + call.eps).sqrt() for k in ("ih", "hh")
        )
        bias = call.bias_ih + call.bias_hh - s_x * call.mean_ih[t] - s_h * call.mean_hh[t]
        gates = call.input[:, t] @ (s_x[:, None] * call.weight_ih).t() + h @ (s_h[:, None] * call.weight_hh).t() + bias
        i, f, g, o = gates.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        s_c = call.gamma_c / (call.var_c[t] + call.eps).sqrt()
        h = o.sigmoid() * torch.tanh(s_c * c + call.beta_c - s_c * call.mean_c[t])
        outputs.append(h)
    close(run(call)[0], torch.stack(outputs, 1), 1e-14)


def test_t4_3_beyond_the_rows_the_last_one_counts():
    call = made(rows=3, steps=8)
    more = {name: value[[0, 1, *[2] * 6]] for name in RUNNING if (value := getattr(call, name)) is not None}
    close(run(call), run(replace(call, **more)), 1e-14)


def test_t4_4_a_sequence_alone_is_the_same_as_in_a_batch():
    for lengths in (None, LENGTHS):
        call = replace(made(cell_norm="channel"), lengths=lengths)
        output, h_n, c_n = run(call)
        for row in range(4):
            steps = 6 if lengths is None else int(lengths[row])
            alone = run(replace(call, input=call.input[row : row + 1, :steps], lengths=None))
            close((output[row, :steps], h_n[row], c_n[row]), (alone[0][0], alone[1][0], alone[2][0]), 1e-13)


def test_t4_5_gamma_sets_the_deviation_of_the_gates():
    """Each side has the deviation gamma; of two that do not correlate the sum has gamma times the root of two."""
    call = made(
        "rnn_relu", batch=10_000, steps=1, fresh=True, gamma=0.1, bias_ih=None, bias_hh=None, h0=(10_000, HIDDEN)
    )
    call = replace(call, training=True)

    def gates(call: Arguments) -> Tensor:
        up, down = (
            run(copied(each))[0][:, 0]
            for each in (call, replace(call, gamma_ih=-call.gamma_ih, gamma_hh=-call.gamma_hh))
        )
        return up - down  # relu(a) - relu(-a) = a

    one = gates(replace(call, gamma_hh=torch.zeros_like(call.gamma_hh)))
    close(one.std(0, correction=0), torch.full((HIDDEN,), 0.1).double(), 1e-4)  # but for eps
    # states and inputs are drawn apart: over 10,000 rows they correlate by some 0.01, half of which is in the deviation
    assert gates(call).std(0).tolist() == pytest.approx([0.1414] * HIDDEN, rel=0.02)


def test_t4_6_rows_of_the_weights_have_no_scale_in_training():
    call = replace(made(eps=1e-30), training=True)
    scale = torch.rand(4 * HIDDEN, 1).double() + 0.5
    scaled = replace(call, weight_ih=call.weight_ih * scale, weight_hh=call.weight_hh * scale)
    close(run(copied(scaled)), run(copied(call)), 1e-9)
    probe = torch.randn(4, 6, HIDDEN, generator=torch.Generator().manual_seed(0)).double()
    grads = torch.autograd.grad((run(copied(call))[0] * probe).sum(), [call.weight_ih, call.weight_hh])
    for weight, grad in zip((call.weight_ih, call.weight_hh), grads, strict=True):
        assert (weight * grad).sum(1).abs().max() < 1e-9


# sequence-wise statistics ---------------------------------------------------------------------------------------------


def test_t5_1_padded_statistics_are_those_of_the_frames():
    call = replace(made(sides=("ih",), rows=1), training=True, shared=True, momentum=1.0, lengths=LENGTHS)
    run(call)
    frames = torch.cat([call.input[row, :length] for row, length in enumerate(LENGTHS.tolist())])
    products = frames @ call.weight_ih.t()
    close(call.mean_ih, products.mean(0, keepdim=True), 1e-13)
    close(call.var_ih, products.var(0, correction=0, keepdim=True), 1e-13)


@pytest.mark.parametrize("shared", [True, False])
def test_t5_2_appended_padding_changes_nothing(shared: bool):
    call = made(rows=1 if shared else 4, sides=("ih",) if shared else ("ih", "hh"))
    call = replace(call, training=True, shared=shared, lengths=LENGTHS)
    longer = replace(copied(call), input=torch.cat([call.input, torch.full((4, 3, INPUTS), 7.0).double()], 1))
    mine = copied(call)
    one, other = run(mine), run(longer)
    close((other[0][:, :6], *other[1:]), one, 1e-13)
    assert not other[0][:, 6:].any()
    for name in (*RUNNING, "seen"):
        close(getattr(longer, name), getattr(mine, name), 1e-13)


def test_t5_4_of_one_step_both_kinds_are_the_same():
    call = replace(made(sides=("ih",), rows=1, steps=1), training=True)
    first, second = copied(call), replace(copied(call), shared=True)
    close(run(first), run(second), 1e-13)
    close(first.mean_ih, second.mean_ih, 1e-13)
    close(first.var_ih, second.var_ih, 1e-13)


# what does not vary ---------------------------------------------------------------------------------------------------


def test_the_first_hidden_product_is_constant_and_training_leaves_its_row():
    call = replace(made(), training=True)
    mine = copied(call)
    run(mine)
    assert torch.equal(mine.mean_hh[0], call.mean_hh[0])
    assert torch.equal(mine.var_hh[0], call.var_hh[0])
    assert not torch.equal(mine.mean_hh[1], call.mean_hh[1])
    zeros = replace(copied(call), h0=torch.zeros(4, HIDDEN).double())  # given, but zero: the same
    close(run(zeros), run(copied(call)), 1e-14)
    assert torch.equal(zeros.mean_hh[0], call.mean_hh[0])
    fresh = replace(made(fresh=True), training=True)
    none = replace(copied(fresh), bias_hh=None)
    first = recurrent(
        *replace(none, gamma_hh=None, mean_hh=None, var_hh=None, seen=None).call()[0], cell="lstm", training=True
    )
    close(run(none)[0][:, 0], first[0][:, 0], 1e-14)  # the hidden side adds nothing at first


@pytest.mark.parametrize("training", [True, False])
def test_a_learned_first_state_gets_finite_gradients(training: bool):
    call = replace(made(fresh=True), training=training)
    h0, c0 = (torch.full((1, HIDDEN), 0.3).double().requires_grad_() for _ in range(2))
    learnt = replace(call, h0=h0.expand(4, -1), c0=c0.expand(4, -1))
    mine = copied(learnt)
    grads = torch.autograd.grad(run(mine)[0].square().sum(), [h0, c0])
    for grad in grads:
        assert torch.isfinite(grad).all()
        assert 0 < grad.abs().max() < 100
    assert torch.equal(mine.mean_hh[0], call.mean_hh[0])
    check(replace(learnt, training=training))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shared", [False, True])
def test_inputs_that_do_not_vary_are_normalised_with_running_statistics(shared: bool, dtype: torch.dtype):
    call = replace(made(cell_norm="channel", rows=1 if shared else 4, batch=5), training=True, shared=shared)
    still = call.input.detach().clone()
    if shared:
        still[:] = still[0, 0]
    else:
        still[:, 1] = still[0, 1]
        still[:, 5] = 0.0
    tensors = {
        k: v.detach().to(dtype).requires_grad_(v.requires_grad) for k, v in vars(call).items() if isinstance(v, Tensor)
    }
    call = replace(replace(call, **tensors), input=still.to(dtype).requires_grad_())
    if dtype is torch.float64:
        check(call)
    mine = copied(call)
    output = run(mine)[0]
    grads = torch.autograd.grad(output.square().sum(), learned(call), allow_unused=True)
    assert all(torch.isfinite(grad).all() and grad.abs().max() < 1e3 for grad in grads if grad is not None)
    assert torch.equal(mine.mean_ih[0 if shared else 1], call.mean_ih[0 if shared else 1])


def test_channels_that_do_not_vary_leave_the_others_alone():
    call = replace(made(sides=("ih",)), training=True)
    with torch.no_grad():
        call.weight_ih[3] = 0
    check(call)
    mine = copied(call)
    run(mine)
    assert torch.equal(mine.mean_ih[:, 3], call.mean_ih[:, 3])
    assert not torch.equal(mine.mean_ih[:, 2], call.mean_ih[:, 2])


# running statistics ---------------------------------------------------------------------------------------------------


def test_seen_counts_and_unseen_rows_copy_the_last():
    call = replace(made(rows=6, steps=3, fresh=True), training=True)
    mine = copied(call)
    run(mine)
    close(mine.seen, torch.tensor([1.0, 1, 1, 0, 0, 0]).double())
    for row in (3, 4, 5):
        assert torch.equal(mine.mean_ih[row], mine.mean_ih[2])
        assert torch.equal(mine.var_hh[row], mine.var_hh[2])
    longer = replace(mine, input=made(steps=5, seed=3).input)
    before = mine.mean_ih.clone()
    run(longer)
    close(mine.seen, torch.tensor([2.0, 2, 2, 1, 1, 0]).double())
    assert not torch.equal(mine.mean_ih[4], before[4])
    assert torch.equal(mine.mean_ih[5], mine.mean_ih[4])
    shorter = replace(mine, input=made(steps=2, seed=4).input)
    before = mine.mean_ih.clone()
    run(shorter)
    assert torch.equal(mine.mean_ih[2:5], before[2:5])  # known rows stay
    single = replace(copied(call), input=made(steps=1).input)
    run(single)
    assert torch.equal(single.mean_hh, call.mean_hh)  # nothing was seen on the hidden side
    assert torch.equal(single.mean_ih[5], single.mean_ih[0])


def test_steps_of_one_sequence_use_and_leave_the_running_statistics():
    call = replace(made(rows=6), training=True, lengths=torch.tensor([6, 3, 3, 1]))
    mine = copied(call)
    run(mine)
    close(mine.seen, torch.tensor([1, 0.75, 0.75, 0, 0, 0]).double())
    for name in ("mean_ih", "var_ih", "mean_hh", "var_hh"):
        found = getattr(mine, name)
        assert torch.equal(found[3], found[2])  # unseen rows copy the last one
        assert not torch.equal(found[2], getattr(call, name)[2])


def test_pooling_is_the_total_variance():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, 2, generator=generator).double() * (k + 1) + k for k, n in enumerate((5, 2, 7, 3))]
    mean = torch.stack([part.mean(0) for part in parts])
    var = torch.stack([part.var(0, correction=0) for part in parts])
    weight = torch.tensor([[len(part)] for part in parts]).double()
    found = pool(mean, var, weight, 2)
    rest = torch.cat(parts[1:])
    close(found.mean, torch.stack([parts[0].mean(0), rest.mean(0)]), 1e-13)
    close(found.var, torch.stack([parts[0].var(0, correction=0), rest.var(0, correction=0)]), 1e-13)
    close(found.weight, torch.tensor([[5.0], [12.0]]).double())


def test_a_forward_pass_without_gradients_updates_and_evaluation_does_not():
    call = made()
    mine = copied(call)
    run(mine)
    assert torch.equal(mine.mean_ih, call.mean_ih)
    with torch.no_grad():
        run(replace(mine, training=True))
    assert not torch.equal(mine.mean_ih, call.mean_ih)


# refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sides", "shared"), [(("ih",), False), (("ih", "hh"), True), (("ih", "hh"), False)])
def test_one_sequence_cannot_be_trained_on(sides: tuple[str, ...], shared: bool):
    call = replace(made(batch=1, sides=sides, rows=1), training=True, shared=shared)
    with pytest.raises(
        BadData, match=r"needs 2 sequences, the batch has 1: take larger ones, .* finalise-recurrent first"
    ):
        run(call)
    run(replace(call, training=False))


def test_one_sequence_is_enough_for_shared_statistics_of_the_input():
    check(replace(made(batch=1, sides=("ih",), rows=1), training=True, shared=True))


def test_statistics_that_do_not_fit_are_refused():
    call = made(cell_norm="channel")
    with pytest.raises(UsageError, match="comes with var_hh, which is missing"):
        run(replace(call, var_hh=None))
    with pytest.raises(UsageError, match=r"mean_ih .* is \[rows, 20\]"):
        run(replace(call, mean_ih=torch.zeros(4, 3).double()))
    with pytest.raises(UsageError, match=r"gamma_c .* is \[5\]"):
        run(replace(call, gamma_c=torch.ones(1).double()))
    with pytest.raises(UsageError, match="gru cannot be normalised"):
        run(replace(made("gru"), gamma_c=call.gamma_c, beta_c=call.beta_c, mean_c=call.mean_c, var_c=call.var_c))
    with pytest.raises(UsageError, match="have one row"):
        run(replace(call, shared=True))
