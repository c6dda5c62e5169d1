"""Small networks whose hidden widths are arguments: a shrunk one can be built as well as made by removal."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfe_fx.cost.count import CostModel
from kfe_fx.frontend.capture import capture
from kfe_fx.labels.analysis import Analysis, analyze
from kfe_fx.program import Program


class ConvNet(nn.Module):
    """Plain, residual, depthwise, grouped and transposed convolutions, a flatten and a tied parameter."""

    def __init__(self, stem: int = 32, hidden: int = 48, grouped: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(stem)
        self.expand = nn.Conv2d(stem, hidden, 1)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, 2, 1, groups=hidden)
        self.project = nn.Conv2d(hidden, grouped, 1)
        self.groups = nn.Conv2d(grouped, 16, 3, 1, 1, groups=2)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2, groups=1)
        self.down = nn.Conv2d(stem, stem, 3, 1, 1)
        self.head = nn.Linear(8 * 36, 5)
        self.again = nn.Linear(5, 5)
        self.again.bias = self.head.bias

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.down(x) + x)
        x = F.relu6(self.depthwise(F.hardswish(self.expand(x))))
        x = self.up(F.relu(self.groups(self.project(x))))
        return self.again(self.head(x.flatten(1)))


class Attention(nn.Module):
    """Heads by sdpa and by explicit products, an einsum, layer norms."""

    def __init__(self, model: int = 32, feed: int = 64, heads: int = 4, head: int = 16) -> None:
        super().__init__()
        self.heads, self.head = heads, head
        self.embed = nn.Linear(6, model)
        self.norm = nn.LayerNorm(model)
        self.q, self.k, self.v = (nn.Linear(model, heads * head) for _ in range(3))
        self.out = nn.Linear(heads * head, model)
        self.up, self.down = nn.Linear(model, feed), nn.Linear(feed, model)
        self.last = nn.Linear(model, 3)

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, self.head).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm(x)
        q, k, v = self.split(self.q(y)), self.split(self.k(y)), self.split(self.v(y))
        y = torch.softmax(q @ k.transpose(-1, -2), -1)
        y = torch.einsum("bhqk,bhkd->bqhd", y, v).flatten(2)
        x = x + self.out(y)
        return self.last((x + self.down(F.gelu(self.up(x)))).mean(1))


class Residual(nn.Module):
    """A small residual network with a bottleneck per block; every hidden width is a multiple of 16."""

    def __init__(self, stream: int = 32, hidden: tuple[int, ...] = (64, 64, 96), head: int = 64) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, stream, 3, 1, 1, bias=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(stream, h, 3, 1, 1, bias=False), nn.BatchNorm2d(h), nn.ReLU(), nn.Conv2d(h, stream, 3, 1, 1)
            )
            for h in hidden
        )
        self.wide = nn.Linear(stream, head)
        self.last = nn.Linear(head, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.last(F.relu(self.wide(x.mean((2, 3)))))


@dataclass(frozen=True)
class Case:
    module: nn.Module
    inputs: Tensor
    program: Program
    analysis: Analysis
    model: CostModel

    def units_of(self, parameter: str, count: int) -> list[int]:
        """The first units minted along dim 0 of a parameter."""
        units = [int(u) for layer in self.analysis.params[parameter][0] for u in layer if u >= 0]
        return list(dict.fromkeys(units))[:count]


def case(module: nn.Module, inputs: Tensor) -> Case:
    torch.manual_seed(0)
    program = capture(module.eval(), inputs)
    analysis = analyze(program)
    return Case(module, inputs, program, analysis, CostModel(program, analysis))


@cache
def conv_case() -> Case:
    return case(ConvNet(), torch.randn(2, 3, 6, 6))


@cache
def attention_case() -> Case:
    return case(Attention(), torch.randn(2, 7, 6))


@cache
def residual_case() -> Case:
    return case(Residual(), torch.randn(2, 3, 8, 8))
