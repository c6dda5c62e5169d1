"""What recurrent networks are probed, filled and benched with: other lengths, valid lengths of sequences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from kfe_fx.frontend.capture import capture
from kfe_fx.program import Program
from kfe_fx.runtime.bench import bench, declared_feeds
from kfe_fx.runtime.inputs import draw_inputs, full_lengths, lengths_inputs, time_axes
from kfe_fx.runtime.onnx_file import export
from kfe_fx.runtime.parity import parity
from kfe_fx.runtime.session import make_session
from kfe_fx.runtime.template import Template
from tests.runtime.recurrent_nets import captured, draw, made, normalised


class Tagger(nn.Module):
    """A tagger of padded batches, whose second input counts the steps that are there."""

    def __init__(self, hidden: int = 6, *, both: bool = True, layer: str = "lstm", dtype: torch.dtype = torch.int64):
        super().__init__()
        torch.manual_seed(hidden)
        self.rnn = made(layer, 5, hidden, num_layers=2, batch_first=True, bidirectional=both)
        self.head = nn.Linear(hidden * (1 + both), 3)
        self.dtype = dtype

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths.to(self.dtype), True, enforce_sorted=False)
        output, ends = self.rnn(packed)
        output, _ = pad_packed_sequence(output, True)
        return self.head(output), ends[0]


def tagger(hidden: int = 6, **options) -> Program:
    return captured(Tagger(hidden, **options), draw(0, 2, 7, 5), torch.tensor([7, 4], dtype=torch.int32))


def test_lengths_are_found_and_drawn():
    program = tagger()
    assert list(lengths_inputs(program)) == ["lengths"]
    assert time_axes(program) == {"time"}
    assert full_lengths(program) == {"lengths": "time"}
    for seed, (batch, length) in enumerate([(1, 1), (1, 9), (6, 4), (50, 20)]):
        x, lengths = draw_inputs(program, batch, seed, {"time": length})
        assert x.shape == (batch, length, 5)
        assert lengths.shape == (batch,)
        assert lengths.dtype == torch.int32
        assert lengths.max() == length
        assert lengths.min() >= 1
    assert len(lengths.unique()) > 10


def test_what_only_depends_on_an_input_is_no_input_of_lengths():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(5, 4, batch_first=True)

        def forward(self, x, mask):
            packed = pack_padded_sequence(x, mask.sum(1), True, enforce_sorted=False)
            return pad_packed_sequence(self.rnn(packed)[0], True)

    mask = torch.arange(7) < torch.tensor([[7], [4]])
    program = captured(Masked(), draw(0, 2, 7, 5), mask)
    assert not lengths_inputs(program)
    assert not full_lengths(program)


def test_a_fixed_length_bounds_the_lengths():
    axes = {"x": {0: "batch"}, "lengths": {0: "batch"}}
    program = capture(Tagger().eval(), (draw(0, 2, 7, 5), torch.tensor([7, 4], dtype=torch.int32)), axes)
    assert full_lengths(program) == {"lengths": 7}
    assert draw_inputs(program, 30)[1].max() == 7


def test_parity_goes_to_other_batches_and_lengths(tmp_path):
    program = tagger()
    report = export(program, tmp_path / "m.onnx")
    shapes = {value.name: value.shape for value in (*report.inputs, *report.outputs)}
    assert shapes == {
        "x": ("batch", "time", 5),
        "lengths": ("batch",),
        "output": ("batch", "time", 3),
        "output_1": (4, "batch", 6),
    }
    found = parity(program, tmp_path / "m.onnx", tolerance=1e-5)
    assert found.ok
    assert [size["batch"] for size in found.sizes] == [1, 2, 5]
    assert [size["time"] for size in found.sizes] == [10, 1, 3]
    assert not found.untested
    assert not found.notes


def test_bench_gives_whole_sequences(tmp_path):
    export(tagger(), tmp_path / "m.onnx")
    feeds = declared_feeds(make_session(tmp_path / "m.onnx"), batch=3, axes={"time": 11})
    assert np.array_equal(feeds["lengths"], [11, 11, 11])
    (row,) = bench([tmp_path / "m.onnx"], seconds=0.05, axes={"time": 4})
    assert row["inputs"] == {"x": [1, 4, 5], "lengths": [1]}


def test_parity_at_lengths_that_the_network_does_not_take(tmp_path):
    class Windowed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(5, 6, 4)
            self.rnn = nn.LSTM(6, 4, batch_first=True)

        def forward(self, x):
            return self.rnn(self.conv(x.transpose(1, 2)).transpose(1, 2))[0]

    program = captured(Windowed(), draw(0, 2, 9, 5))
    export(program, tmp_path / "m.onnx")
    found = parity(program, tmp_path / "m.onnx", tolerance=1e-5)
    assert found.ok
    assert [size["time"] for size in found.sizes] == [12, 8, 4]
    assert len(found.notes) == 1
    assert "not tried" in found.notes[0]


def cases() -> list[dict]:
    plain, several = {}, {"rows": 3, "cell_norm": "channel"}
    return [plain, {"rows": 1, "cell_norm": "scalar"}, several]


@pytest.mark.parametrize("options", cases(), ids=["plain", "folded", "scan"])
def test_narrower_layers_are_filled_into_the_file(options):
    def network(hidden: int) -> Program:
        program = tagger(hidden)
        return normalised(program, seed=hidden, **options) if options else program

    template = Template(network(6))
    narrow = network(4)
    model = template.fill(narrow)
    assert model is not None
    assert parity(narrow, model).ok


def test_another_kind_of_layer_is_not_filled_in():
    template = Template(tagger(6, both=False))
    assert template.fill(normalised(tagger(6, both=False), rows=3)) is None
    assert template.fill(tagger(6, both=False, layer="gru")) is None
