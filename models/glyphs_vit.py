"""A small vision transformer for 32 x 32 glyphs: patches of 4, pre-normalised blocks, a class token.

Dosovitskiy et al. 2021. Queries, keys and values come from one packed linear layer, as in timm; attention is
`scaled_dot_product_attention`. A stem of three convolutions cuts the patches (Xiao et al. 2021), which trains in
far fewer steps than one linear projection.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, DEPTH, HIDDEN = 128, 4, 4, 384


class Attention(nn.Module):
    """Attend among tokens: [N, T, D] -> [N, T, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [N, T, D] to tokens [N, T, D]."""
        batch, tokens, width = x.shape
        packed = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)  # [N, heads, T, D / heads] each
        y = F.scaled_dot_product_attention(q, k, v)
        return self.project(y.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    """Attention and a two-layer perceptron, each normalised first and added: [N, T, D] -> [N, T, D]."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [N, T, D] to tokens [N, T, D]."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GlyphsViT(nn.Module):
    """Classify glyphs: [N, 1, 32, 32] -> logits [N, classes]."""

    def __init__(
        self,
        classes: int = 36,
        width: int = WIDTH,
        heads: int = HEADS,
        depth: int = DEPTH,
        hidden: int = HIDDEN,
    ) -> None:
        super().__init__()
        self.patches = nn.Sequential(
            nn.Conv2d(1, width // 4, 3, 2, 1, bias=False),
            nn.BatchNorm2d(width // 4),
            nn.ReLU(inplace=True),
            nn.Conv2d(width // 4, width // 2, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width // 2),
            nn.ReLU(inplace=True),
            nn.Conv2d(width // 2, width, 3, 2, 1),
        )
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, 65, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, 1, 32, 32] to logits [N, classes]."""
        x = self.patches(x).flatten(2).transpose(1, 2)  # [N, 64, D]
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


def build() -> nn.Module:
    """Build the untrained network."""
    return GlyphsViT()


def factory() -> tuple[nn.Module, Tensor]:
    """Build the untrained network and an example input [1, 1, 32, 32]."""
    return build(), torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
