"""What the networks of this folder are made with, and the table of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

N = 3  # examples
K, D = "kronecker", "diagonal"


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Draw a float64 input."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(*shape: int, high: int = 7, seed: int = 0) -> Tensor:
    """Draw an input of whole numbers."""
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """A network written as a function of its parts."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part if isinstance(part, nn.Module) else nn.Parameter(part))

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


# name -> (network, inputs, kinds of the blocks by parameter; those not named are Kronecker)
Case = tuple[Callable[[], nn.Module], tuple[Tensor, ...], dict[str, str]]
CASES: dict[str, Case] = {}
# whose examples cannot be told apart in the middle, and are taken one at a time
MIXED = {"broadcast together"}


def case(name: str, *inputs: Tensor, **kinds: str) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Register a network under a name, with its inputs."""

    def register(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        CASES[name] = make, inputs, {key.replace("__", "."): value for key, value in kinds.items()}
        return make

    return register


def simple(name: str, make: Callable[[], nn.Module], *inputs: Tensor, **kinds: str) -> None:
    """Register a network that needs no function of its own."""
    case(name, *inputs, **kinds)(make)


def built(case: Case) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Build a network, with the same weights each time, none of them 0 or 1."""
    make, inputs, _ = case
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = make().double().eval()
        with torch.no_grad():
            for value in net.parameters():
                if value.is_floating_point():
                    value.add_(0.1 * torch.randn(value.shape, dtype=value.dtype))
    return net, inputs
