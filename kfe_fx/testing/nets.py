"""Small networks in float64, one for each way that units and examples lie."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfe_fx.frontend.capture import capture
from kfe_fx.program import Program

CLASSES = 4


class Residual(nn.Module):
    """Two members of a residual stream, a depthwise and a grouped convolution, a concatenation with the input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 6, 3, padding=1)
        self.branch = nn.Conv2d(6, 8, 3, padding=1, bias=False)
        self.branch_norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4, padding=1)
        self.head = nn.Linear(12 + 3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the classes."""
        y = F.relu(self.norm(self.stem(x)))
        y = F.relu(y + self.branch_norm(self.branch(F.relu(self.inner(y)))))
        y = F.relu(self.grouped(F.relu(self.depthwise(y))))
        return self.head(torch.cat([y, x], 1).mean((2, 3)))


class Attention(nn.Module):
    """A pre-norm block with heads out of one packed projection."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(5, width)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the classes."""
        x = self.embed(x)
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d))
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x.mean(1))


class Folded(nn.Module):
    """Tokens folded into the batch: "outer", "inner", "plain" (time-major) or "windows" (no dim tells examples)."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the classes."""
        n, t, d = x.shape
        body = lambda rows: self.second(F.relu(self.first(rows)))
        if self.layout == "outer":
            return body(x.reshape(n * t, d)).reshape(n, t, -1).mean(1)
        if self.layout == "inner":
            return body(x.transpose(0, 1).reshape(t * n, d)).reshape(t, n, -1).mean(0)
        if self.layout == "plain":
            return body(x.transpose(0, 1)).mean(0)
        windows = x.reshape(n, 2, t // 2, d).transpose(0, 1).reshape(n * t, d)
        return body(windows).reshape(2, n, t // 2, -1).mean((0, 2))


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give norms statistics and affines that are far from the identity; double precision, evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    module.double().eval()
    with torch.no_grad():
        for child in module.modules():
            if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.running_mean is not None:
                child.running_mean.normal_(generator=generator)
                child.running_var.uniform_(0.5, 2, generator=generator)  # type: ignore[union-attr]
                child.weight.normal_(generator=generator)
                child.bias.normal_(generator=generator)
    return module


def build(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """Build a network with inputs of three examples."""
    torch.manual_seed(seed)
    module: nn.Module
    if name == "residual":
        module, x = Residual(), torch.randn(3, 3, 6, 6)
    elif name == "attention":
        module, x = Attention(), torch.randn(3, 4, 5)
    else:
        module, x = Folded(name), torch.randn(3, 4, 5)
    return randomise(module, seed), x.double()


NAMES = ("residual", "attention", "outer", "inner", "plain", "windows")


def program_of(name: str, seed: int = 0) -> tuple[Program, Tensor]:
    """Capture a network; a fresh copy each time, captured once."""
    program, x = _captured(name, seed)
    return program.copy(), x


@lru_cache
def _captured(name: str, seed: int) -> tuple[Program, Tensor]:
    module, x = build(name, seed)
    return capture(module, x[:1]), x
