"""The plain operation: PyTorch's layers, packed sequences, gates against a loop over sequences, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from kfe_fx.errors import BadData, UsageError
from kfe_fx.recurrent.op import RECURRENT, Arguments, recurrent
from tests.recurrent.oracle import slow

BATCH, STEPS, INPUTS, HIDDEN = 4, 6, 3, 5
LENGTHS = torch.tensor([3, 6, 1, 5])
KINDS: dict[str, Any] = {
    "lstm": lambda **options: nn.LSTM(INPUTS, HIDDEN, **options),
    "projected lstm": lambda **options: nn.LSTM(INPUTS, HIDDEN, proj_size=2, **options),
    "gru": lambda **options: nn.GRU(INPUTS, HIDDEN, **options),
    "rnn_tanh": lambda **options: nn.RNN(INPUTS, HIDDEN, **options),
    "rnn_relu": lambda **options: nn.RNN(INPUTS, HIDDEN, nonlinearity="relu", **options),
}
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def layer(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return KINDS[kind](**options).double()


def cell_of(kind: str) -> str:
    return kind.split()[-1]


def weights_of(module: nn.Module, suffix: str) -> list[Tensor | None]:
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    return [getattr(module, name + suffix, None) for name in names]


def inputs(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def states(module: Any, directions: int) -> tuple[Tensor, ...]:
    width = module.proj_size or HIDDEN
    found = (inputs(directions, BATCH, width), inputs(directions, BATCH, HIDDEN) * 0.7)
    return found if isinstance(module, nn.LSTM) else found[:1]


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("slowly", [False, True], ids=["kernel", "loop"])
@pytest.mark.parametrize(
    ("given", "lengths", "first", "bias"),
    [(False, False, True, True), (True, True, False, True), (True, False, True, False), (False, True, True, True)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_pytorch(kind: str, given: bool, lengths: bool, first: bool, bias: bool, slowly: bool):
    """Both directions, as two nodes, against a bidirectional layer; gates of one send it through the loop."""
    module = layer(kind, bidirectional=True, batch_first=first, bias=bias)
    x = inputs(BATCH, STEPS, INPUTS) if first else inputs(STEPS, BATCH, INPUTS)
    x.requires_grad_()
    held = states(module, 2) if given else None
    packed = pack_padded_sequence(x, LENGTHS, first, enforce_sorted=False) if lengths else x
    hx = None if held is None else held if isinstance(module, nn.LSTM) else held[0]
    expected, ends = module(packed, hx)
    if lengths:
        expected, _ = pad_packed_sequence(expected, first, total_length=STEPS)
    ends = ends if isinstance(ends, tuple) else (ends,)
    gates = (torch.ones(1, HIDDEN if module.proj_size == 0 else 2).double(),) if slowly else ()
    outputs = []
    for direction, suffix in enumerate(("_l0", "_l0_reverse")):
        first_states = [None, None] if held is None else [*(state[direction] for state in held), None][:2]
        weights = weights_of(module, suffix)
        options = {"cell": cell_of(kind), "reverse": direction == 1, "batch_first": first}
        output, *last = RECURRENT(x, *first_states, *weights, LENGTHS if lengths else None, *gates, **options)
        outputs.append(output)
        for end, state in zip(ends, last, strict=False):
            close(state, end[direction])
    found = torch.cat(outputs, -1)
    close(found, expected)
    parameters = [x, *module.parameters()]
    probe = inputs(*found.shape)
    ours = torch.autograd.grad((found * probe).sum(), parameters)
    theirs = torch.autograd.grad((expected * probe).sum(), parameters)
    for one, other in zip(ours, theirs, strict=True):
        close(one, other)


@pytest.mark.parametrize("rows", [1, BATCH])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gates_multiply_inside_the_recurrence(kind: str, reverse: bool, rows: int):
    module = layer(kind)
    weights = weights_of(module, "_l0")
    width = len(weights[-1]) if weights[-1] is not None else HIDDEN
    call = Arguments(
        inputs(BATCH, STEPS, INPUTS),
        inputs(BATCH, width),
        inputs(BATCH, HIDDEN) if "lstm" in kind else None,
        *weights,
        lengths=LENGTHS,
        gate=inputs(rows, width).requires_grad_(),
        cell_gate=inputs(rows, HIDDEN).requires_grad_(),
        cell=cell_of(kind),
        reverse=reverse,
    )
    args, options = call.call()
    output, h_n, c_n = recurrent(*args, **options)
    expected = slow(call)
    close(output, expected.output)
    close(h_n, expected.h_n)
    close(c_n, expected.c_n)
    probe, gates = inputs(*output.shape), [call.gate, call.cell_gate]
    ours = torch.autograd.grad((output * probe).sum(), gates, create_graph=True)
    theirs = torch.autograd.grad((expected.output * probe).sum(), gates, create_graph=True)
    for one, other in zip(ours, theirs, strict=True):
        close(one, other)
    again = [torch.autograd.grad(sum(g.square().sum() for g in grads), gates[0])[0] for grads in (ours, theirs)]  # type: ignore[union-attr, misc]
    close(*again)


def test_a_gate_of_zero_removes_a_unit_and_a_mask_on_the_output_does_not():
    module = layer("lstm")
    x, weights = inputs(BATCH, STEPS, INPUTS), weights_of(module, "_l0")
    gate = torch.ones(1, HIDDEN, dtype=torch.float64)
    gate[0, 2] = 0
    gated = RECURRENT(x, None, None, *weights, None, gate, cell="lstm")[0]
    kept = [unit for unit in range(HIDDEN) if unit != 2]
    rows = [block * HIDDEN + unit for block in range(4) for unit in kept]
    w_ih, w_hh, b_ih, b_hh, _ = weights
    assert w_ih is not None
    assert w_hh is not None
    assert b_ih is not None
    assert b_hh is not None
    small = RECURRENT(x, None, None, w_ih[rows], w_hh[rows][:, kept], b_ih[rows], b_hh[rows], cell="lstm")[0]
    close(gated[:, :, kept], small)
    masked = RECURRENT(x, None, None, *weights, cell="lstm")[0] * gate
    assert (masked[:, :, kept] - small).abs().max() > 1e-3


def test_padding_does_not_matter_and_comes_out_zero():
    module = layer("gru")
    x = inputs(BATCH, STEPS, INPUTS)
    dirty = x.clone()
    for row, length in enumerate(LENGTHS.tolist()):
        dirty[row, length:] = torch.nan
    for reverse in (False, True):
        call = Arguments(x, None, None, *weights_of(module, "_l0"), lengths=LENGTHS, cell="gru", reverse=reverse)
        for value in (x, dirty):
            args, options = replace(call, input=value).call()
            output, h_n, _ = recurrent(*args, **options)
            expected = slow(call)
            close(output, expected.output)
            close(h_n, expected.h_n)
            assert not output[0, LENGTHS[0] :].any()


def test_padding_longer_than_all_sequences():
    module = layer("lstm")
    x, lengths = inputs(BATCH, STEPS, INPUTS), torch.tensor([2, 1, 2, 1])
    for gates in ((), (torch.ones(1, HIDDEN).double(),)):
        output, h_n, c_n = RECURRENT(x, None, None, *weights_of(module, "_l0"), lengths, *gates, cell="lstm")
        assert output.shape == (BATCH, STEPS, HIDDEN)
        assert not output[:, 2:].any()
        close(h_n, torch.stack([output[row, length - 1] for row, length in enumerate(lengths.tolist())]))
        assert c_n.shape == (BATCH, HIDDEN)


@pytest.mark.parametrize("gates", [0, 1], ids=["kernel", "loop"])
def test_memory_is_linear_in_the_length(gates: int):
    """Bytes that stay for the backward pass; sums over steps made with indexing keep a whole sequence for each."""
    module = layer("lstm")
    extra = [torch.ones(1, HIDDEN).double()] * gates

    def peak(steps: int) -> int:
        x = inputs(2, steps, INPUTS).requires_grad_()
        lengths = torch.tensor([steps, steps // 2])
        with torch.profiler.profile(profile_memory=True) as found:
            output = RECURRENT(x, None, None, *weights_of(module, "_l0"), lengths, *extra, cell="lstm")[0]
            output.sum().backward()
        results: Any = found.profiler
        sizes = [event.nbytes() for event in results.kineto_results.events() if event.name() == "[memory]"]
        return sum(size for size in sizes if size > 0)

    assert peak(256) < 3 * peak(128)


def test_what_does_not_fit_is_refused_in_one_line():
    weights = weights_of(layer("lstm"), "_l0")
    x = inputs(BATCH, STEPS, INPUTS)
    with pytest.raises(UsageError, match="3 inputs"):
        RECURRENT(inputs(BATCH, STEPS, 2), None, None, *weights, cell="lstm")
    with pytest.raises(UsageError, match="length 0"):
        RECURRENT(x[:, :0], None, None, *weights, cell="lstm")
    with pytest.raises(UsageError, match=r"hidden state .* is \[4, 5\]"):
        RECURRENT(x, inputs(BATCH, 4), None, *weights, cell="lstm")
    with pytest.raises(UsageError, match="lengths"):
        RECURRENT(x, None, None, *weights, LENGTHS[:2], cell="lstm")
    with pytest.raises(BadData, match="sequence 1 of the batch has 7 steps"):
        RECURRENT(x, None, None, *weights, torch.tensor([1, 7, 2, 3]), cell="lstm")
    with pytest.raises(BadData, match="sequence 0 of the batch is empty"):
        RECURRENT(x, None, None, *weights, torch.tensor([0, 6, 2, 3]), cell="lstm")
    with pytest.raises(BadData, match="whole numbers"):
        RECURRENT(x, None, None, *weights, LENGTHS.double(), cell="lstm")


@pytest.mark.parametrize("given", [False, True])
def test_a_projection_onto_as_many_units_is_one(given: bool):
    """What a removal may leave; PyTorch's kernel would take the layer for one without projection."""
    x, square = inputs(BATCH, STEPS, INPUTS), inputs(HIDDEN, HIDDEN)
    weights = inputs(4 * HIDDEN, INPUTS), inputs(4 * HIDDEN, HIDDEN) / 2, inputs(4 * HIDDEN), inputs(4 * HIDDEN)
    held = (inputs(BATCH, HIDDEN), inputs(BATCH, HIDDEN)) if given else (None, None)
    call = Arguments(x, *held, *weights, square, cell="lstm")
    expected = slow(call)
    output, h_n, c_n = recurrent(x, *held, *weights, square, cell="lstm")
    close(output, expected.output)
    close(h_n, expected.h_n)
    close(c_n, expected.c_n)
