"""Small networks that between them use everything a program file can hold, and a way to forge such files."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfe_fx.format.archive import seal


class Convolutional(nn.Module):
    """Convolutions, norms with statistics, dropout; a dict of outputs with a constant and a nested tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.frozen = nn.Conv2d(8, 8, 3, groups=4).requires_grad_(False)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(8, 5)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 8).reshape(8, 1, 1), persistent=False)

    def forward(self, input: Tensor) -> dict[str, Any]:
        y = F.relu(self.norm(self.stem(input)))
        y = self.frozen(y) * self.scale
        pooled = self.drop(y.mean((2, 3)))
        return {"scores": self.head(pooled), "steps": 3, "features": (pooled, None)}


class Attention(nn.Module):
    """Attention with dropout, an embedding tied to the head, a literal tensor, keyword inputs, an infinite mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.attend = nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, *, options: dict[str, Tensor], shift: float = 0.0) -> tuple[Tensor, list[Tensor]]:
        y = self.norm(self.embed(ids) + torch.tensor([0.0, 1.0] * 4))
        mask = torch.triu(torch.full((ids.shape[1], ids.shape[1]), float("-inf")), 1)
        y = y + self.attend(y, y, y, attn_mask=mask, need_weights=False)[0] * options["gain"]
        y = y.view(ids.shape[0] * ids.shape[1], 8)
        return self.head(y), [y, y + shift]


class Streaming(nn.Module):
    """A recurrent layer whose state comes in and goes out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(3, 6, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        steps, h = self.layer(x, h)
        return self.head(steps), h


class Wide(nn.Module):
    """Parameters and buffers of other types and memory orders; one memory format argument, one dtype argument."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3).to(torch.float64, memory_format=torch.channels_last)
        self.register_buffer("index", torch.tensor([2, 0, 1], dtype=torch.int32))
        self.register_buffer("flags", torch.tensor([True, False, True, True]))
        self.register_buffer("weights", torch.tensor([1.0, -2.0, 0.5, 4.0], dtype=torch.bfloat16))
        self.register_buffer("nothing", torch.empty(0, 3))
        self.register_buffer("scalar", torch.tensor(2.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.to(torch.float64)).contiguous(memory_format=torch.channels_last)
        y = y[:, self.index.long()] * self.weights.to(torch.float64)[self.index.long()].reshape(3, 1, 1)
        return y.to(torch.float32) * self.scalar + self.flags.sum() + self.nothing.sum()


def examples(net: nn.Module) -> Any:
    """Example inputs of each of the networks above."""
    generator = torch.Generator().manual_seed(3)
    if isinstance(net, Convolutional):
        return torch.randn(1, 3, 6, 6, generator=generator)
    if isinstance(net, Attention):
        ids = torch.randint(11, (2, 5), generator=generator)
        return (ids,), {"options": {"gain": torch.ones(8)}, "shift": 0.5}
    if isinstance(net, Streaming):
        return torch.randn(2, 5, 3, generator=generator), torch.randn(1, 2, 6, generator=generator)
    return torch.randn(2, 2, 5, 5, generator=generator)


def records(path: Path) -> tuple[str, dict[str, bytes]]:
    """The top folder of a torch zip and its records, without that folder."""
    with zipfile.ZipFile(path) as opened:
        root = opened.namelist()[0].split("/")[0]
        return root, {name.removeprefix(f"{root}/"): opened.read(name) for name in opened.namelist()}


def forge(path: Path, root: str, content: list[tuple[str, bytes]]) -> Path:
    """Write a zip with valid checksums and a valid seal, whatever is in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as opened:
        for name, data in content:
            opened.writestr(zipfile.ZipInfo(f"{root}/{name}"), data)
    seal(buffer)
    path.write_bytes(buffer.getvalue())
    return path


def forge_graph(path: Path, source: Path, graph: Any) -> Path:
    """Write ``source`` again with another graph.json: bytes, or what json can dump."""
    root, held = records(source)
    data = graph if isinstance(graph, bytes) else json.dumps(graph).encode()
    return forge(path, root, list((held | {"kfe/graph.json": data}).items()))


def graph_of(path: Path) -> Any:
    """The parsed graph.json of a program file."""
    return json.loads(records(path)[1]["kfe/graph.json"])
