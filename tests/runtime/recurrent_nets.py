"""Programs of single recurrent operations, and what these compute, written as a plain loop."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from kfe_fx.frontend.capture import capture
from kfe_fx.program import Program, put_tensor
from kfe_fx.recurrent.op import CELLS, RECURRENT, Arguments
from kfe_fx.runtime.inputs import to_feeds
from kfe_fx.runtime.onnx_file import onnx_bytes
from kfe_fx.runtime.session import make_session, run

TOLERANCE = 1e-5
# batch and length: one of each, longer and shorter than traced
SIZES = ((1, 1), (4, 9), (3, 2))


class Layer(nn.Module):
    """One layer with lengths or without, and with given first states where they are passed."""

    def __init__(self, layer: nn.Module, *, lengths: bool = False) -> None:
        super().__init__()
        self.layer = layer
        self.lengths = lengths

    def forward(self, x, lengths=None, state=None):
        first = isinstance(self.layer, nn.RNNBase) and self.layer.batch_first
        if self.lengths:
            x = nn.utils.rnn.pack_padded_sequence(x, lengths, first, enforce_sorted=False)
        output, ends = self.layer(x, state)
        if self.lengths:
            output, _ = nn.utils.rnn.pad_packed_sequence(output, first)
        return output, ends


def made(cell: str, inputs: int, hidden: int, **options: Any) -> nn.Module:
    """Make a layer of torch.nn by the name of its cell."""
    kind = {"lstm": nn.LSTM, "gru": nn.GRU}.get(cell)
    if kind is not None:
        return kind(inputs, hidden, **options)
    return nn.RNN(inputs, hidden, nonlinearity=cell.removeprefix("rnn_"), **options)


def normalised(program: Program, *, rows: int = 1, sides: str = "ih hh", cell_norm: str = "", seed: int = 0) -> Program:
    """Give every recurrent operation of a Program batch normalisation with random statistics, in place."""
    generator = torch.Generator().manual_seed(seed)
    graph = program.graphs["eval"]
    for number, node in enumerate(graph.find_nodes(op="call_function", target=RECURRENT)):
        call = Arguments.of(node)
        weight = program.tensor(str(call.weight_hh.target))
        gates, hidden = len(weight), len(weight) // CELLS[call.cell]
        shapes: dict[str, tuple[int, ...]] = {}
        for side in sides.split():
            shapes |= {f"gamma_{side}": (gates,), f"mean_{side}": (rows, gates), f"var_{side}": (rows, gates)}
        if cell_norm and call.cell == "lstm":
            size = 1 if cell_norm == "scalar" else hidden
            shapes |= {"gamma_c": (size,), "var_c": (rows, size)}
            if cell_norm == "channel":
                shapes |= {"beta_c": (hidden,), "mean_c": (rows, size)}
        given = {}
        for name, shape in shapes.items():
            value = torch.rand(shape, generator=generator, dtype=weight.dtype) + (0.5 if name[:2] != "me" else -0.5)
            put_tensor(program.module(), f"norm_{number}_{name}", value)
            with graph.inserting_before(node):
                given[name] = graph.get_attr(f"norm_{number}_{name}")
        node.args, node.kwargs = replace(call, **given).call()
    program.module().recompile()
    return program


def reference(call: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the operation sequence by sequence and step by step, in evaluation mode."""
    value = call.input if call.batch_first else call.input.transpose(0, 1)  # [N, T, I]
    hidden, width = len(call.weight_hh) // CELLS[call.cell], call.weight_hh.shape[1]
    outputs, last_h, last_c = value.new_zeros(*value.shape[:2], width), [], []
    for n, sequence in enumerate(value):
        length = len(sequence) if call.lengths is None else int(call.lengths[n])
        h = value.new_zeros(width) if call.h0 is None else call.h0[n]
        c = value.new_zeros(hidden) if call.c0 is None else call.c0[n]
        order = range(length - 1, -1, -1) if call.reverse else range(length)
        for step, t in enumerate(order):
            x = _normalised(call, "ih", call.weight_ih @ sequence[t], step) + _bias(call.bias_ih)
            a = _normalised(call, "hh", call.weight_hh @ h, step) + _bias(call.bias_hh)
            h, c = _step(call, x, a, h, c, step)
            outputs[n, t] = h
        last_h.append(h)
        last_c.append(c)
    output = outputs if call.batch_first else outputs.transpose(0, 1)
    c_n = torch.stack(last_c) if call.cell == "lstm" else value.new_empty(0)
    return output, torch.stack(last_h), c_n


def _bias(bias: Tensor | None) -> Tensor | float:
    return 0.0 if bias is None else bias


def _normalised(call: Arguments, side: str, value: Tensor, step: int) -> Tensor:
    gamma, mean, variance = (getattr(call, f"{name}_{side}") for name in ("gamma", "mean", "var"))
    if gamma is None:
        return value
    row = min(step, len(mean) - 1)
    return (value - mean[row]) / torch.sqrt(variance[row] + call.eps) * gamma


def _step(call: Arguments, x: Tensor, a: Tensor, h: Tensor, c: Tensor, step: int) -> tuple[Tensor, Tensor]:
    if call.cell == "gru":
        (xr, xz, xn), (ar, az, an) = x.chunk(3), a.chunk(3)
        z = torch.sigmoid(xz + az)
        return (1 - z) * torch.tanh(xn + torch.sigmoid(xr + ar) * an) + z * h, c
    if call.cell != "lstm":
        return (torch.tanh if call.cell == "rnn_tanh" else torch.relu)(x + a), c
    i, f, g, o = (x + a).chunk(4)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    shown = c
    if call.gamma_c is not None:
        row = min(step, len(call.var_c) - 1)
        deviation = torch.sqrt(call.var_c[row] + call.eps)
        if call.beta_c is None:
            shown = call.gamma_c * c / deviation
        else:
            shown = (c - call.mean_c[row]) / deviation * call.gamma_c + call.beta_c
    h = torch.sigmoid(o) * torch.tanh(shown)
    return (h if call.weight_hr is None else call.weight_hr @ h), c


class Interpreted(torch.fx.Interpreter):
    """Run the evaluation graph of a Program with ``reference`` for its recurrent operations."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module(), graph=program.graphs["eval"])

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is RECURRENT:
            return reference(Arguments(*args, **kwargs))
        return super().call_function(target, args, kwargs)


def captured(net: nn.Module, *inputs: Any) -> Program:
    """Capture a network in evaluation mode."""
    return capture(net.eval(), inputs)


def ops(payload: bytes) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load_from_string(payload).graph.node)


def checked(program: Program, opset: int | None = None) -> bytes:
    payload = onnx_bytes(program, opset=opset)
    onnx.checker.check_model(onnx.load_from_string(payload), full_check=True)
    return payload


def distance(program: Program, payload: bytes, *flat: torch.Tensor, slow: bool = False) -> float:
    """The largest difference of an output; ``slow``: to the loop in Python instead of to the Program."""
    with torch.no_grad():
        ours = Interpreted(program).run(*flat) if slow else program.module().run_flat(list(flat))
    theirs = run(make_session(payload), to_feeds(program, list(flat)))
    assert [tuple(one.shape) for one in ours] == [one.shape for one in theirs]
    return max(float((one - torch.from_numpy(other)).abs().max()) for one, other in zip(ours, theirs, strict=True))


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Many(nn.Module):
    """Layers side by side on one input, whichever way each wants it."""

    def __init__(self, layers: list[nn.Module], *, lengths: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(layer, lengths=lengths) for layer in layers)

    def forward(self, x, lengths=None):
        found = []
        for layer in self.layers:
            output, ends = layer(x if layer.layer.batch_first else x.transpose(0, 1), lengths)
            found.append((output, ends))
        return found


class Stack(nn.Module):
    """A classifier as one would write it, three layers deep."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(5, 6, 3, dropout=0.3, batch_first=True, bidirectional=True)
        self.head = nn.Linear(12, 2)

    def forward(self, x):
        output, (h, _) = self.rnn(x)
        return self.head(output), h
