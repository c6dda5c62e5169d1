"""How long capturing and analysing a network takes: ResNet-50 and ViT-B at 224x224, random weights.

    python benchmarks/analysis.py

Prints CPU seconds of one thread (best of three for the analysis) and the peak memory of the process.
"""

from __future__ import annotations

import resource
import time

import torch
import torch.nn.functional as F
from torch import nn

import kfe_fx


class Bottleneck(nn.Module):
    """The residual block of ResNet-50 (He et al. 2016)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        """Build 1x1, 3x3, 1x1 and a projection where shapes change."""
        super().__init__()
        out = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.skip = None
        if stride != 1 or inputs != out:
            self.skip = nn.Sequential(nn.Conv2d(inputs, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the block to its input."""
        return F.relu(self.body(x) + (x if self.skip is None else self.skip(x)))


def resnet50() -> nn.Module:
    """Build ResNet-50."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)]
    layers += [nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for index in range(count):
            layers.append(Bottleneck(inputs, width, stride if index == 0 else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


class Block(nn.Module):
    """A pre-norm transformer block with a packed projection."""

    def __init__(self, width: int, heads: int) -> None:
        """Build attention and the feed-forward part."""
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.packed, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend, then feed forward."""
        batch, tokens, width = x.shape
        packed = self.packed(self.first(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.out(mixed)
        return x + self.mlp(self.second(x))


class ViT(nn.Module):
    """ViT-B/16 (Dosovitskiy et al. 2021)."""

    def __init__(self, width: int = 768, heads: int = 12, depth: int = 12) -> None:
        """Build patches, tokens, blocks and the head."""
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.token, self.place = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, 197, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Classify by the class token."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.place
        return self.head(self.norm(self.blocks(x))[:, 0])


def main() -> None:
    """Print a line per network."""
    torch.set_num_threads(1)
    for name, build in (("ResNet-50", resnet50), ("ViT-B/16", ViT)):
        began = time.process_time()
        program = kfe_fx.capture(build().eval(), torch.randn(1, 3, 224, 224))
        captured = time.process_time() - began
        best = min(_analysis_seconds(program) for _ in range(3))
        units = len(kfe_fx.analyze(program).units)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{name}: capture {captured:.1f} s, analysis {best:.2f} s CPU, {units:,} units, peak {peak:.2f} GiB")


def _analysis_seconds(program: kfe_fx.Program) -> float:
    began = time.process_time()
    kfe_fx.analyze(program)
    return time.process_time() - began


if __name__ == "__main__":
    main()
