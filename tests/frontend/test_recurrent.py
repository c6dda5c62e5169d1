"""Recurrent layers are captured whole: dynamic batch and length, all options, packed sequences, cells as loops."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import rnn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from kfe_fx.errors import BadData, KfeError, UnsupportedModel, UsageError
from kfe_fx.format import load, save
from kfe_fx.frontend.capture import capture
from kfe_fx.program import Program
from kfe_fx.recurrent.op import RECURRENT

LAYERS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


class Wrapped(nn.Module):
    """A layer with a head on its outputs and last states."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear((layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1), 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        steps, states = self.layer(x)
        last = states[0] if isinstance(states, tuple) else states
        return self.head(steps), last[-1]


class Packed(nn.Module):
    """The usual way with sequences of several lengths."""

    def __init__(self, layer: nn.RNNBase, **options: Any) -> None:
        super().__init__()
        self.layer = layer
        self.options = options

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        first = self.layer.batch_first
        packed = pack_padded_sequence(x, lengths, batch_first=first, enforce_sorted=False)
        found, states = self.layer(packed)
        steps, _ = pad_packed_sequence(found, batch_first=first, **self.options)
        return steps, states[0] if isinstance(states, tuple) else states


def nodes_of(program: Program) -> list[Any]:
    return program.graphs["eval"].find_nodes(op="call_function", target=RECURRENT)


def close(found: Any, expected: Any, tolerance: float = 1e-12) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert float((ours - theirs).abs().max()) <= tolerance


def layer_of(kind: str, **options: Any) -> nn.RNNBase:
    torch.manual_seed(0)
    return LAYERS[kind](3, 5, **options).double().eval()


@given(
    kind=st.sampled_from(sorted(LAYERS)),
    layers=st.integers(1, 3),
    both=st.booleans(),
    first=st.booleans(),
    bias=st.booleans(),
    proj=st.sampled_from([0, 2]),
    relu=st.booleans(),
    example=st.tuples(st.integers(1, 3), st.integers(1, 5)),
    other=st.tuples(st.integers(1, 4), st.integers(1, 9)),
)
@settings(max_examples=25)
def test_every_option_at_every_batch_and_length(
    kind: str, layers: int, both: bool, first: bool, bias: bool, proj: int, relu: bool, example: Any, other: Any
) -> None:
    options: dict[str, Any] = {"num_layers": layers, "bidirectional": both, "batch_first": first, "bias": bias}
    options |= {"proj_size": proj} if kind == "lstm" and proj else {}
    options |= {"nonlinearity": "relu"} if kind == "rnn" and relu else {}
    net = Wrapped(layer_of(kind, **options)).double().eval()
    shape = lambda sizes: (*(sizes if first else sizes[::-1]), 3)
    program = capture(net, torch.randn(shape(example)).double())
    assert program.axes == {"x": {0: "batch", 1: "time"} if first else {0: "time", 1: "batch"}}
    assert program.batch_axes() == {"batch"}
    assert len(nodes_of(program)) == layers * (2 if both else 1)
    x = torch.randn(shape(other)).double()
    with torch.no_grad():
        close(program(x), net(x))


@pytest.mark.parametrize("kind", sorted(LAYERS))
@pytest.mark.parametrize("first", [True, False])
def test_packed_sequences_take_lengths_as_an_input(kind: str, first: bool) -> None:
    net = Packed(layer_of(kind, bidirectional=True, num_layers=2, batch_first=first))
    x = torch.randn(4, 6, 3).double()
    program = capture(net, (x if first else x.transpose(0, 1), torch.tensor([2, 6, 1, 3])))
    assert program.signature.input_names == ("x", "lengths")
    assert program.axes["lengths"] == {0: "batch"}
    x, lengths = torch.randn(3, 9, 3).double(), torch.tensor([4, 9, 1])
    given_x = x if first else x.transpose(0, 1)
    with torch.no_grad():
        found = program(given_x, lengths)
        close(found, net(given_x, lengths))
        for place, length in enumerate(lengths.tolist()):  # each sequence by itself, without padding
            alone, _ = net.layer(x[place, :length].unsqueeze(1 if not first else 0))
            steps = found[0][place, :length] if first else found[0][:length, place]
            assert float((steps - alone.reshape(steps.shape)).abs().max()) <= 1e-12


def test_padding_value_and_total_length() -> None:
    net = Packed(layer_of("gru", batch_first=True), padding_value=-1.0, total_length=8)
    program = capture(net, (torch.randn(2, 5, 3).double(), torch.tensor([5, 2])))
    x, lengths = torch.randn(3, 6, 3).double(), torch.tensor([3, 6, 4])
    with torch.no_grad():
        close(program(x, lengths), net(x, lengths))


@pytest.mark.parametrize(("lengths", "words"), [([0, 5], "is empty"), ([7, 5], "has 7 steps"), ([-1, 5], "is empty")])
def test_bad_lengths_are_refused(lengths: list[int], words: str) -> None:
    program = capture(Packed(layer_of("lstm", batch_first=True)), (torch.randn(2, 5, 3).double(), torch.tensor([5, 2])))
    with pytest.raises(BadData, match=words):
        program(torch.randn(2, 5, 3).double(), torch.tensor(lengths))


@pytest.mark.parametrize("mean", [False, True])
def test_a_source_that_trims_is_named(mean: bool) -> None:
    """The graph keeps the padded length, which shows where the example's longest sequence does not fill it."""

    class Mean(Packed):
        def forward(self, x: Tensor, lengths: Tensor) -> Any:
            steps = super().forward(x, lengths)[0]
            return steps.mean(1) if mean else steps

    net, x = Mean(layer_of("lstm", batch_first=True)), torch.randn(2, 5, 3).double()
    with pytest.raises(UnsupportedModel, match=r"trims to the longest sequence: feed batches .* total_length"):
        capture(net, (x, torch.tensor([3, 2])))
    assert [note for note in capture(net, (x, torch.tensor([5, 2]))).notes if "trims to the longest" in note]
    net.options = {"total_length": 5}
    assert not capture(net, (x, torch.tensor([5, 2]))).notes


def test_what_only_a_packed_sequence_has_is_refused() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(3, 4)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return self.layer(pack_padded_sequence(x, lengths))[0].data.sum()

    with pytest.raises(UnsupportedModel, match=r"data of a packed sequence is read.*pad_packed_sequence"):
        capture(Reads(), (torch.randn(5, 2, 3), torch.tensor([5, 2])))


def test_states_come_in_and_go_out() -> None:
    class Streaming(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(3, 4, num_layers=2, batch_first=True)

        def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            steps, (h, c) = self.layer(x, (h, c))
            return steps, h, c

    net = Streaming().double().eval()
    states = torch.randn(2, 3, 4).double(), torch.randn(2, 3, 4).double()
    program = capture(net, (torch.randn(3, 5, 3).double(), *states))
    assert program.axes == {"x": {0: "batch", 1: "time"}, "h": {1: "batch"}, "c": {1: "batch"}}
    x, h, c = torch.randn(2, 7, 3).double(), torch.randn(2, 2, 4).double(), torch.randn(2, 2, 4).double()
    with torch.no_grad():
        close(program(x, h, c), net(x, h, c))
    with pytest.raises(UsageError, match=r"hidden state of a recurrent layer is \[2, 4\], got \[2, 5\]"):
        program(x, torch.randn(2, 2, 5).double(), c)


def test_one_sequence_without_a_batch() -> None:
    net = Wrapped(layer_of("lstm", num_layers=2, bidirectional=True)).double().eval()
    program = capture(net, torch.randn(6, 3).double())
    assert program.axes == {"x": {0: "time"}}
    assert not program.batch_axes()
    x = torch.randn(9, 3).double()
    with torch.no_grad():
        close(program(x), net(x))


def test_rows_of_an_image_with_a_channel_of_one() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(8, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.squeeze(1))[0][:, -1]

    program = capture(Rows(), torch.randn(2, 1, 6, 8))
    assert program.axes == {"x": {0: "batch", 2: "time"}}
    assert program(torch.randn(3, 1, 11, 8)).shape == (3, 4)


def test_sequences_of_both_batch_and_steps_keep_their_batch() -> None:
    class Chunks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(3, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            n, chunks, steps, width = x.shape
            last = self.layer(x.reshape(n * chunks, steps, width))[1][-1]
            return last.view(n, chunks, -1).mean(1)

    net = Chunks().double()
    program = capture(net, torch.randn(2, 3, 5, 3).double())
    assert program.axes == {"x": {0: "batch", 1: "x_1", 2: "time"}}
    x = torch.randn(4, 2, 7, 3).double()
    with torch.no_grad():
        close([program(x)], [net(x)])


def test_training_is_that_of_the_source() -> None:
    torch.manual_seed(0)
    net = Wrapped(nn.LSTM(3, 5, num_layers=2, dropout=0.4, batch_first=True)).double()
    program = capture(net, torch.randn(2, 5, 3).double())
    assert set(program.graphs) == {"eval", "train"}
    twin = copy.deepcopy(net).train()
    ours = torch.optim.SGD(program.train().module().parameters(), 0.3, momentum=0.9)
    theirs = torch.optim.SGD(twin.parameters(), 0.3, momentum=0.9)
    for step in range(4):
        x = torch.randn(3, 4 + step, 3, generator=torch.Generator().manual_seed(step)).double()
        for network, optimizer in ((program, ours), (twin, theirs)):
            torch.manual_seed(step)
            steps, last = network(x)
            optimizer.zero_grad()
            (steps.square().mean() + last.square().sum()).backward()
            optimizer.step()
    for name, value in twin.state_dict().items():
        assert float((program.state_dict()[name] - value).abs().max()) <= 1e-12, name


def test_a_program_file_keeps_the_length_dynamic(tmp_path: Any) -> None:
    net = Wrapped(layer_of("gru", num_layers=2, bidirectional=True)).double().eval()
    program = capture(net, torch.randn(5, 2, 3).double())
    save(program, path=tmp_path / "net.pt")
    again = load(tmp_path / "net.pt")
    assert again.axes == program.axes
    x = torch.randn(11, 3, 3).double()
    with torch.no_grad():
        close(again(x), net(x), 0.0 + 1e-14)


def test_a_loop_over_a_cell_is_captured_at_its_length_and_said() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTMCell(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = c = x.new_zeros(x.shape[0], 4)
            for step in x.unbind(1):
                h, c = self.cell(step, (h, c))
            return h

    net = Loop().double()
    program = capture(net, torch.randn(2, 6, 3).double())
    note = next(note for note in program.notes if "LSTMCell" in note)
    assert "runs 6 steps" in note
    assert "one tied layer" in note
    x = torch.randn(5, 6, 3).double()
    with torch.no_grad():
        close([program(x)], [net(x)])


def test_the_network_and_torch_are_left_as_they_were() -> None:
    codes = rnn.pack_padded_sequence.__code__, rnn.pad_packed_sequence.__code__
    forwards = [layer.forward for layer in (nn.LSTM, nn.GRU, nn.RNN)]
    net = Wrapped(nn.LSTM(3, 5))
    capture(net, torch.randn(4, 2, 3))
    with pytest.raises(KfeError):
        capture(net, torch.randn(4, 2, 7))
    assert [layer.forward for layer in (nn.LSTM, nn.GRU, nn.RNN)] == forwards
    assert (rnn.pack_padded_sequence.__code__, rnn.pad_packed_sequence.__code__) == codes


def test_a_layer_that_calls_its_super_keeps_a_dynamic_length() -> None:
    class Doubled(nn.GRU):
        def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
            steps, last = super().forward(input, hx)
            return 2 * steps, last

    net = Doubled(3, 4, batch_first=True).double()
    program = capture(net, torch.randn(2, 5, 3).double())
    x = torch.randn(3, 8, 3).double()
    with torch.no_grad():
        close(program(x), net(x))


class Direct(nn.Module):
    """Call the kernel, as code from before nn.Module or an exported file does."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.layer = LAYERS[kind](3, 5, num_layers=2, dropout=0.3, **options)
        self.kernel = "rnn_tanh" if kind == "rnn" else kind

    def forward(self, x: Tensor) -> Tensor:
        held = self.layer
        batch = x.shape[0 if held.batch_first else 1]
        count = 4 if held.bidirectional else 2
        h = x.new_zeros(count, batch, held.proj_size or 5)
        states = (h, x.new_zeros(count, batch, 5)) if self.kernel == "lstm" else h
        weights = [getattr(held, name) for name in held._flat_weights_names]
        found = getattr(torch, self.kernel)(
            x, states, weights, held.bias, 2, 0.3, self.training, held.bidirectional, held.batch_first
        )
        return found[0] + found[1][-1].sum()


@pytest.mark.parametrize("kind", sorted(LAYERS))
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "bias": False}, {"batch_first": True, "proj_size": 2}])
def test_calls_of_kernels_become_layers(kind: str, options: dict[str, Any]) -> None:
    if kind != "lstm":
        options = {key: value for key, value in options.items() if key != "proj_size"}
    torch.manual_seed(0)
    net = Direct(kind, **options).double().eval()
    x = torch.randn(4, 4, 3).double()
    program = capture(net, x)
    assert len(nodes_of(program)) == 2 * (2 if options.get("bidirectional") else 1)
    with torch.no_grad():
        close([program(x)], [net(x)])
    torch.manual_seed(1)
    wanted = net.train()(x)
    torch.manual_seed(1)
    close([program.train()(x).detach()], [wanted.detach()])
