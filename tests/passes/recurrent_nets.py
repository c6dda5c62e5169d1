"""Networks with recurrent layers, and data that tells whether a pass treats each of their steps as it should."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from kfe_fx.frontend.capture import capture
from kfe_fx.program import Program
from kfe_fx.recurrent.op import RECURRENT, Arguments

BATCH, STEPS, INPUTS, HIDDEN = 6, 7, 3, 5


class Net(nn.Module):
    """A linear layer, a recurrent one, dropout, a linear one on every step."""

    def __init__(self, make: Callable[..., Any] = nn.LSTM, dropout: float = 0.0, **options: Any) -> None:
        super().__init__()
        self.inputs = nn.Linear(INPUTS, 4)
        self.layer = make(4, HIDDEN, batch_first=True, **options)
        self.dropout = nn.Dropout(dropout)
        width = options.get("proj_size") or HIDDEN
        self.out = nn.Linear(width * (2 if options.get("bidirectional") else 1), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.dropout(self.layer(self.inputs(x))[0]))


class Packed(Net):
    """Reads padded batches through packed sequences."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.inputs(x), lengths, batch_first=True, enforce_sorted=False)
        return self.out(pad_packed_sequence(self.layer(packed)[0], batch_first=True, total_length=x.shape[1])[0])


class Twice(nn.Module):
    """Calls one layer twice, the second time from the state where the first one ended."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(INPUTS, INPUTS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        first, state = self.layer(x)
        return self.layer(first, state)[0]


class Started(nn.Module):
    """Begins with a learned state."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(INPUTS, HIDDEN, batch_first=True)
        self.first = nn.Parameter(torch.randn(1, 1, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, self.first.expand(1, x.shape[0], HIDDEN).contiguous())[0]


NETS: dict[str, Callable[[], nn.Module]] = {
    "lstm": Net,
    "stack": lambda: Net(num_layers=2, bidirectional=True, dropout=0.0),
    "gru": lambda: Net(nn.GRU),
    "tanh": lambda: Net(nn.RNN, bidirectional=True),
    "relu": lambda: Net(nn.RNN, nonlinearity="relu"),
    "no biases": lambda: Net(bias=False),
    "gru without biases": lambda: Net(nn.GRU, bias=False),
    "projection": lambda: Net(proj_size=2),
    "dropout": lambda: Net(dropout=0.5),
    "packed": lambda: Packed(bidirectional=True),
    "twice": Twice,
    "started": Started,
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def data(name: str, *, seed: int = 0, steps: int = STEPS, batch: int = BATCH) -> tuple[Tensor, ...]:
    """Return inputs that drift from step to step; with lengths, padding that is large."""
    x = draw(batch, steps, INPUTS, seed=seed) + torch.linspace(-1, 2, steps).double().unsqueeze(1)
    if name != "packed":
        return (x,)
    lengths = torch.arange(batch) % (steps - 1) + 2
    for row, length in enumerate(lengths.tolist()):
        x[row, length:] = 50.0
    return x, lengths


def batches(name: str, count: int, **options: int) -> list[Any]:
    return [(data(name, seed=seed, **options), None) for seed in range(count)]


def program(name: str, dtype: torch.dtype = torch.float64) -> Program:
    """Return a network of its own, with weights as large as those of a trained one."""
    return _captured(name, dtype).copy()


@functools.cache
def _captured(name: str, dtype: torch.dtype) -> Program:
    torch.manual_seed(0)
    module = NETS[name]()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)
    inputs = tuple(value.to(dtype) if value.is_floating_point() else value for value in data(name))
    return capture(module.to(dtype), inputs)


def moved(net: Program, name: str, count: int = 3) -> Program:
    """Return a copy whose running statistics have seen batches in training."""
    net = net.copy()
    net.train()
    with torch.no_grad():
        for seed in range(count):
            net(*data(name, seed=seed + 10))
    return net.eval()


def calls(net: Program, mode: str = "eval") -> list[Arguments]:
    """Return the arguments of the recurrent nodes of a graph."""
    return [Arguments.of(node) for node in net.graphs[mode].find_nodes(op="call_function", target=RECURRENT)]


def difference(one: Program, other: Program, inputs: tuple[Any, ...]) -> float:
    """Return the largest difference of the outputs."""
    with torch.no_grad():
        return float((one(*inputs) - other(*inputs)).abs().max())
