"""Networks of one layer between others, for every kind of layer that can be decomposed, with their data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

import kfe_fx
from kfe_fx.curvature import Store, fit
from kfe_fx.lowrank.finding import find_layers
from kfe_fx.lowrank.layers import Layer
from kfe_fx.lowrank.measure import measure
from kfe_fx.program import Program

CLASSES = 3
EXAMPLES = 6


class Around(nn.Module):
    """One layer behind a fixed nonlinearity, in front of a batch norm, another nonlinearity and a head."""

    def __init__(self, layer: nn.Module, width: int, norm: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm = layer, norm
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.layer(torch.sin(x)))).flatten(1))


@dataclass(frozen=True)
class Family:
    layer: Callable[[], nn.Module]
    shape: tuple[int, ...]


FAMILIES = {
    "linear": Family(lambda: nn.Linear(6, 5), (6,)),
    "linear of tokens": Family(lambda: nn.Linear(4, 6, bias=False), (3, 4)),
    "conv1d": Family(lambda: nn.Conv1d(3, 4, 3, padding=1, stride=2), (3, 7)),
    "conv2d": Family(lambda: nn.Conv2d(3, 4, (3, 2), padding=(2, 1), stride=(2, 1), dilation=(1, 2)), (3, 5, 4)),
    "conv2d without bias": Family(lambda: nn.Conv2d(4, 5, 3, padding=1, bias=False), (4, 3, 3)),
    "conv2d same": Family(lambda: nn.Conv2d(4, 3, 3, padding="same", dilation=2), (4, 4, 4)),
    "conv2d reflected": Family(lambda: nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), (3, 4, 4)),
    "conv2d 1x1": Family(lambda: nn.Conv2d(5, 6, 1, stride=2), (5, 4, 4)),
    "conv3d": Family(lambda: nn.Conv3d(2, 3, 2, padding=1), (2, 2, 3, 2)),
}


@dataclass(frozen=True)
class Case:
    module: Around
    program: Program
    inputs: Tensor
    targets: Tensor

    @property
    def layer(self) -> Layer:
        return next(layer for layer in find_layers(self.program).layers if layer.name == "layer")

    @property
    def data(self) -> tuple[Tensor, Tensor]:
        return self.inputs, self.targets


@lru_cache
def case(name: str) -> Case:
    family = FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(len(name))
        layer = family.layer()
        inputs = torch.randn(EXAMPLES, *family.shape).double()
        out = layer(inputs.float())
        plain = isinstance(layer, nn.Linear)
        norm = nn.Identity() if plain else (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[out.dim() - 3](out.shape[1])
        module = Around(layer, out[0].numel(), norm).double()
        for buffer in module.norm.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
        targets = torch.randint(0, CLASSES, (EXAMPLES,))
    return Case(module, kfe_fx.capture(module, (inputs[:2],)), inputs, targets)


@lru_cache
def store(name: str, statistics: str = "product") -> Store:
    """Measure the layer alone, in its channels' eigenbases."""
    made = case(name)
    return measure(
        made.program, made.data, [made.layer], statistics, loss="cross-entropy", source="exact", batch_size=4
    )


@lru_cache
def fitted(name: str) -> Store:
    """Fit EKFAC as it is: bases of whole patches."""
    made = case(name)
    return fit(made.program, made.data, "cross-entropy", statistics="ekfac", source="exact", batch_size=4)


def composed(program: Program, layer: Layer) -> Tensor:
    """Multiply the factors of a layer together, [C_out, C_in, T]."""
    weight = None
    for op in layer.ops:
        held = program.tensor(op.weight).detach()
        held = held.reshape(*held.shape[:2], -1)
        if weight is not None:  # at most one of the two has more than one element
            last = "u" if held.shape[2] > 1 else "t"
            held = torch.einsum(f"aot,bau->bo{last}", weight, held)
        weight = held
    assert weight is not None
    return weight
