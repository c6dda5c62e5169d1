"""A recurrent network that tells for each character of Python source what kind of token it belongs to.

A bidirectional GRU (Cho et al. 2014) over embedded characters and a linear layer on both directions' outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

CHARACTERS, TAGS = 98, 8  # of kfe_fx.data.source_text
WIDTH, HIDDEN = 64, 96


class SourceTagger(nn.Module):
    """Tag characters: indices [N, T] -> logits [N, T, tags]."""

    def __init__(
        self, characters: int = CHARACTERS, tags: int = TAGS, width: int = WIDTH, hidden: int = HIDDEN
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.gru = nn.GRU(width, hidden, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden, tags)

    def forward(self, x: Tensor) -> Tensor:
        """Map characters [N, T] to logits [N, T, tags]."""
        states, _ = self.gru(self.embedding(x))  # [N, T, 2 hidden], forward and backward in time
        return self.head(states)


def build() -> nn.Module:
    """Build the untrained network."""
    return SourceTagger()


def factory() -> tuple[nn.Module, Tensor]:
    """Build the untrained network and example characters [1, 100]."""
    return build(), torch.randint(CHARACTERS, (1, 100), generator=torch.Generator().manual_seed(0))
