"""Small networks in float64 for the optimizers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kfe_fx
from kfe_fx.program import Program

EXAMPLES = 32


def classifier() -> Program:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 4)).double()
    return kfe_fx.capture(net, (torch.randn(2, 8, dtype=torch.float64),)).train()


def convolutional() -> Program:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(8, 6, 3, groups=1, bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(6 * 4, 4),
    ).double()
    return kfe_fx.capture(net, (torch.randn(2, 1, 8, 7, dtype=torch.float64),)).train()


def data(program: Program, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = program.flat_examples()[0].shape[1:]
    inputs = torch.randn(EXAMPLES, *shape, dtype=torch.float64, generator=generator)
    return inputs, torch.randint(0, 4, (EXAMPLES,), generator=generator)


def train_step(program: Program, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> float:
    inputs, targets = batch
    optimizer.zero_grad()
    loss = F.cross_entropy(program.module()(inputs), targets)
    loss.backward()
    optimizer.step()
    return loss.item()


def gradients(program: Program) -> dict[str, Tensor]:
    return {name: p.grad for name, p in program.module().named_parameters() if p.grad is not None}
