"""A MobileNetV2-like network for 32 x 32 glyphs: inverted residuals, squeeze-excite and one concatenation.

Sandler et al. 2018 (inverted residuals with linear bottlenecks), Hu et al. 2018 (squeeze-excite) in the last
stage. The head reads the last two stages side by side, so that a pruned channel must move through a concatenation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate read from all of them: [N, C, H, W] -> [N, C, H, W]."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Gate the channels of [N, C, H, W]."""
        gate = x.mean((2, 3), keepdim=True)  # [N, C, 1, 1]
        gate = torch.sigmoid(self.expand(torch.relu(self.reduce(gate))))
        return x * gate


class InvertedResidual(nn.Module):
    """Expand, filter per channel, project: [N, inputs, H, W] -> [N, outputs, H / stride, W / stride]."""

    def __init__(self, inputs: int, outputs: int, hidden: int, stride: int, squeeze: bool) -> None:
        super().__init__()
        self.expand = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)
        )
        self.depthwise = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
        )
        self.squeeze: nn.Module = SqueezeExcite(hidden, hidden // 8) if squeeze else nn.Identity()
        self.project = nn.Sequential(nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""
        y = self.project(self.squeeze(self.depthwise(self.expand(x))))
        return x + y if self.residual else y


class GlyphsMobileNet(nn.Module):
    """Classify glyphs: [N, 1, 32, 32] -> logits [N, classes]."""

    def __init__(self, classes: int = 36) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 32, 3, 2, 1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU6(inplace=True),
        )
        self.stage1 = nn.Sequential(
            InvertedResidual(32, 48, 128, 1, squeeze=False),
            InvertedResidual(48, 48, 192, 1, squeeze=False),
            InvertedResidual(48, 48, 192, 1, squeeze=False),
        )
        self.stage2 = nn.Sequential(
            InvertedResidual(48, 96, 256, 2, squeeze=False),
            InvertedResidual(96, 96, 384, 1, squeeze=False),
            InvertedResidual(96, 96, 384, 1, squeeze=False),
            InvertedResidual(96, 96, 384, 1, squeeze=False),
            InvertedResidual(96, 96, 384, 1, squeeze=False),
            InvertedResidual(96, 96, 384, 1, squeeze=False),
        )
        self.stage3 = nn.Sequential(
            InvertedResidual(96, 128, 384, 2, squeeze=True),
            InvertedResidual(128, 128, 512, 1, squeeze=True),
        )
        self.pool = nn.AvgPool2d(2)
        self.tail = nn.Sequential(nn.Conv2d(96 + 128, 256, 1, bias=False), nn.BatchNorm2d(256), nn.ReLU6(inplace=True))
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(256, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, 1, 32, 32] to logits [N, classes]."""
        x = self.stage2(self.stage1(self.stem(x)))  # [N, 96, 8, 8]
        both = torch.cat([self.pool(x), self.stage3(x)], 1)  # [N, 224, 4, 4]
        return self.head(self.dropout(self.tail(both).mean((2, 3))))


def build() -> nn.Module:
    """Build the untrained network."""
    return GlyphsMobileNet()


def factory() -> tuple[nn.Module, Tensor]:
    """Build the untrained network and an example input [1, 1, 32, 32]."""
    return build(), torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
