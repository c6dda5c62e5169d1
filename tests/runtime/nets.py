"""Small networks that the tests of the runtime share."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class ConvNet(nn.Module):
    """Convolution, batch norm, dropout, residual; the norms hold statistics that matter."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.second = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(width, 5)
        for norm in (self.norm, self.second):
            nn.init.uniform_(norm.running_mean, -1, 1)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.uniform_(norm.bias, -1, 1)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.second(self.depthwise(x)) + x)
        return self.head(self.drop(x).mean((2, 3)))


class Attention(nn.Module):
    """Self-attention with a packed projection, whose output is viewed right after the sdpa call."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.project = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.heads = heads

    def forward(self, x, mask=None):
        batch, time, width = x.shape
        packed = self.project(x).view(batch, time, 3, self.heads, width // self.heads)
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).reshape(batch, time, width))


class Many(nn.Module):
    """Nested outputs: a constant, an integer output, the input itself, one value twice, and a parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.linear = nn.Linear(4, 3)

    def forward(self, x, scale):
        h = self.linear(x) * scale
        return {"logits": h, "aux": {"class": h.argmax(-1), "again": h}, "none": None, "x": [x, (self.linear.bias,)]}


class Tagger(nn.Module):
    """Embedding with a mask, both with named batch and length."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table = nn.Embedding(20, 8)
        self.attention = Attention(8, 2)
        self.out = nn.Linear(8, 6)

    def forward(self, ids, mask):
        return self.out(self.attention(self.table(ids)) * mask.unsqueeze(-1)), mask.sum(-1)
