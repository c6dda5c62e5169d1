"""A recurrent network that guesses the next character of Python source from all that came before it.

Two LSTM layers (Hochreiter and Schmidhuber 1997) over embedded characters, dropout between them, and a linear layer
on every output. It starts from an empty state and returns none.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

CHARACTERS = 98  # of kfe_fx.data.source_text
WIDTH, HIDDEN, LAYERS, DROPOUT = 64, 256, 2, 0.1


class CharLSTM(nn.Module):
    """Guess the next character: indices [N, T] -> logits [N, T, characters]."""

    def __init__(
        self,
        characters: int = CHARACTERS,
        width: int = WIDTH,
        hidden: int = HIDDEN,
        layers: int = LAYERS,
        dropout: float = DROPOUT,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.lstm = nn.LSTM(width, hidden, layers, batch_first=True, dropout=dropout)
        self.head = nn.Linear(hidden, characters)

    def forward(self, x: Tensor) -> Tensor:
        """Map characters [N, T] to logits [N, T, characters] of the characters one further on."""
        states, _ = self.lstm(self.embedding(x))  # [N, T, hidden]
        return self.head(states)


def build() -> nn.Module:
    """Build the untrained network."""
    return CharLSTM()


def factory() -> tuple[nn.Module, Tensor]:
    """Build the untrained network and example characters [1, 100]."""
    return build(), torch.randint(CHARACTERS, (1, 100), generator=torch.Generator().manual_seed(0))
