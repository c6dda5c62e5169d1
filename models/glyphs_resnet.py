"""A ResNet-20 for 32 x 32 glyphs: three stages of three basic blocks, with projection shortcuts.

He et al. 2016, section 4.2, option B: where the shape changes the shortcut is a 1 x 1 convolution with a
batch normalisation. The stem has stride 2, so that these widths stay cheap enough to train on one core.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTHS = (64, 64, 96)
BLOCKS = 3


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut: [N, inputs, H, W] -> [N, outputs, H / stride, W / stride]."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class GlyphsResNet(nn.Module):
    """Classify glyphs: [N, 1, 32, 32] -> logits [N, classes]."""

    def __init__(self, classes: int = 36, widths: tuple[int, ...] = WIDTHS, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)
        )
        stages: list[nn.Module] = []
        inputs = widths[0]
        for index, width in enumerate(widths):
            layers: list[nn.Module] = []
            for block in range(blocks):
                layers.append(BasicBlock(inputs, width, 2 if index and not block else 1))
                inputs = width
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, 1, 32, 32] to logits [N, classes]."""
        x = self.stages(self.stem(x))
        return self.head(x.mean((2, 3)))


def build() -> nn.Module:
    """Build the untrained network."""
    return GlyphsResNet()


def factory() -> tuple[nn.Module, Tensor]:
    """Build the untrained network and an example input [1, 1, 32, 32]."""
    return build(), torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
