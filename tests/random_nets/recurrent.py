"""Recurrent layers in their many calls, and cells that the network steps through by itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .core import Drawing, Options, Raw, Shape, Step, family

SEQ = ("seq",)
LAYERS = {"lstm": nn.LSTM, "gru": nn.GRU, "tanh": nn.RNN, "relu": nn.RNN}


def build(kind: str, inputs: int, hidden: int, **options: bool | int | float) -> nn.RNNBase:
    """Build a layer by its kind."""
    if kind in ("tanh", "relu"):
        return LAYERS[kind](inputs, hidden, nonlinearity=kind, **options)
    return LAYERS[kind](inputs, hidden, **options)


def hidden_of(states: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Return h_n of what a layer returns."""
    return states[0] if isinstance(states, tuple) else states


@family("recurrent", SEQ, frequency=4, keeps_zero=False)
class Recurrent(Step):
    """Run a stack, perhaps in both directions, with projections or packed, and read it in one of the usual ways."""

    def __init__(
        self, s: Shape, kind: str, hidden: int, layers: int, both: bool, first: bool, bias: bool, proj: int, style: str
    ) -> None:
        super().__init__(s)
        options: Options = {"num_layers": layers, "bidirectional": both, "batch_first": first, "bias": bias}
        options |= {"dropout": 0.1} if layers > 1 else {}
        options |= {"proj_size": proj} if proj else {}
        self.layer = build(kind, s.channels, hidden, **options)
        width = (proj or hidden) * (2 if both else 1)
        self.out = nn.Linear(width, s.channels)
        self.first, self.style, self.both = first, style, both
        if hidden > 1 and not proj and style != "state":
            self.certain = [("layer.weight_ih_l0", 0)]

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        kind = d.choice(("lstm", "gru", "tanh", "relu"))
        hidden = d.choice((4, 3, 6))
        options: Options = {"kind": kind, "hidden": hidden, "layers": d.choice((1, 2, 3)), "both": d.flag()}
        options |= {"first": d.flag(60), "bias": d.flag(80), "proj": d.choice((0, 0, 2)) if kind == "lstm" else 0}
        return options | {"style": d.choice(("steps", "packed", "state", "given"))}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        y = x if self.first else x.transpose(0, 1)
        if self.style == "packed":
            lengths = torch.full((x.shape[0],), x.shape[1])
            packed, _ = self.layer(pack_padded_sequence(y, lengths, self.first, enforce_sorted=False))
            steps, _ = pad_packed_sequence(packed, self.first)
        elif self.style == "given":
            layers = self.layer.num_layers * (2 if self.both else 1)
            h = y.new_zeros(layers, x.shape[0], self.layer.proj_size or self.layer.hidden_size)
            c = y.new_zeros(layers, x.shape[0], self.layer.hidden_size)
            steps, _ = self.layer(y, (h, c) if isinstance(self.layer, nn.LSTM) else h)
        else:
            steps, states = self.layer(y)
            if self.style == "state":
                last = hidden_of(states)
                end = torch.cat([last[-2], last[-1]], -1) if self.both else last[-1]
                return x + self.out(end).unsqueeze(1)
        return self.out(steps if self.first else steps.transpose(0, 1))


@family("recurrent-decoder", SEQ, keeps_zero=False)
class Decoder(Step):
    """Start one layer with the last states of another, and attend over the steps of the first."""

    def __init__(self, s: Shape, kind: str, hidden: int, attend: bool) -> None:
        super().__init__(s)
        self.encoder = build(kind, s.channels, hidden, batch_first=True)
        self.decoder = build(kind, s.channels, hidden, batch_first=True)
        self.out = nn.Linear(hidden, s.channels)
        self.attend = attend
        self.certain = [("encoder.weight_ih_l0", 0)]

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"kind": d.choice(("lstm", "gru", "tanh")), "hidden": d.choice((4, 3, 6)), "attend": d.flag()}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        steps, states = self.encoder(x)
        found, _ = self.decoder(x, states)
        if self.attend:
            found = torch.softmax(found @ steps.transpose(1, 2), -1) @ steps + found
        return self.out(found)


@family("recurrent-cells", SEQ, keeps_zero=False)
class Cells(Step):
    """Step through the sequence with a cell, as decoders and custom loops do."""

    def __init__(self, s: Shape, kind: str, hidden: int, bias: bool) -> None:
        super().__init__(s)
        if kind == "lstm":
            self.cell: nn.RNNCellBase = nn.LSTMCell(s.channels, hidden, bias=bias)
        elif kind == "gru":
            self.cell = nn.GRUCell(s.channels, hidden, bias=bias)
        else:
            self.cell = nn.RNNCell(s.channels, hidden, bias=bias, nonlinearity=kind)
        self.out = nn.Linear(hidden, s.channels)
        self.certain = [("cell.weight_ih", 0)]

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"kind": d.choice(("lstm", "gru", "tanh", "relu")), "hidden": d.choice((4, 3, 6)), "bias": d.flag(80)}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        h = x.new_zeros(x.shape[0], self.cell.hidden_size)
        c = h
        outputs = []
        for step in x.unbind(1):
            if isinstance(self.cell, nn.LSTMCell):
                h, c = self.cell(step, (h, c))
            else:
                h = self.cell(step, h)
            outputs.append(h)
        return self.out(torch.stack(outputs, 1))
