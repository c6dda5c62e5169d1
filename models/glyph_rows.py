"""A recurrent network that reads a 28 x 28 glyph row by row, from the top, and names it after the last row.

One LSTM layer (Hochreiter and Schmidhuber 1997) over rows of 28 pixels, a linear layer on its last output. The
width of an image is fixed, the number of rows is not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SIDE, HIDDEN = 28, 512


class GlyphRows(nn.Module):
    """Classify glyphs: [N, 1, T, 28] -> logits [N, classes]."""

    def __init__(self, classes: int = 36, side: int = SIDE, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.lstm = nn.LSTM(side, hidden, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, 1, T, 28] to logits [N, classes]."""
        states, _ = self.lstm(x.squeeze(1))  # [N, T, hidden]
        return self.head(states[:, -1])


def build() -> nn.Module:
    """Build the untrained network."""
    return GlyphRows()


def factory() -> tuple[nn.Module, Tensor]:
    """Build the untrained network and an example input [1, 1, 28, 28]."""
    return build(), torch.randn(1, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
