"""Attention, recurrences, and operations that nothing is known of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.curvature.nets.core import CASES, D, N, Net, case, randn

# attention -----------------------------------------------------------------------------------------------------------


@case("self attention", randn(N, 5, 4))
def self_attention() -> nn.Module:
    return Net(lambda m, x: m.mha(x, x, x, need_weights=False)[0], mha=nn.MultiheadAttention(4, 2, batch_first=True))


@case("self attention, time first inside", randn(N, 5, 4))
def self_attention_inner() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = x.transpose(0, 1)
        return m.mha(y, y, y)[0].transpose(0, 1)

    return Net(forward, mha=nn.MultiheadAttention(4, 2))


@case("cross attention", randn(N, 5, 4), randn(N, 3, 4, seed=1))
def cross_attention() -> nn.Module:
    return Net(lambda m, x, y: m.mha(x, y, y)[0], mha=nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True))


@case(
    "attention with other widths and a bias of keys",
    randn(N, 5, 4),
    randn(N, 3, 2, seed=1),
    mha__bias_k=D,
    mha__bias_v=D,
)
def odd_attention() -> nn.Module:
    mha = nn.MultiheadAttention(4, 2, kdim=2, vdim=2, add_bias_kv=True, batch_first=True)
    return Net(lambda m, x, y: m.mha(x, y, y)[0], mha=mha)


@case("transformer layer", randn(N, 5, 4), **{f"norm{k}__{part}": D for k in (1, 2) for part in ("weight", "bias")})
def transformer_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True)


@case("relative positions by a network on constants", randn(N, 4, 4))
def relative_positions() -> nn.Module:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)
            self.mlp = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 2, bias=False))
            self.scale = nn.Parameter(torch.randn(2, 1, 1))
            self.register_buffer("table", torch.randn(7, 2))
            self.register_buffer("index", torch.arange(16) % 7)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4).unbind(0)
            scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.scale.clamp(max=1.5).exp()
            bias = self.mlp(self.table)[self.index].view(4, 4, 2).permute(2, 0, 1)
            scores = scores + 2 * torch.sigmoid(bias).unsqueeze(0)
            return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    return Attention()


CASES["relative positions by a network on constants"][2].update(
    dict.fromkeys(("mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "scale"), D)
)


# operations without a rule -------------------------------------------------------------------------------------------


@case("gated linear unit", randn(N, 4))
def gated() -> nn.Module:
    return Net(lambda m, x: m.second(F.glu(m.first(x))), first=nn.Linear(4, 6), second=nn.Linear(3, 2))


@case("sampled from a grid", randn(N, 2, 4, 5), randn(N, 3, 3, 2, seed=1))
def grid_sample() -> nn.Module:
    def forward(m: Any, x: Tensor, grid: Tensor) -> Tensor:
        return m.second(F.grid_sample(m.first(x), grid.tanh(), align_corners=False))

    return Net(forward, first=nn.Conv2d(2, 3, 1), second=nn.Conv2d(3, 2, 1))


@case("several outputs", randn(N, 6, 4), weight=D, bias=D)
def several_outputs() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        out, mean, rstd = torch.native_layer_norm(m.layer(x), [4], m.weight, m.bias, 1e-5)
        return out * rstd + mean

    return Net(forward, layer=nn.Linear(4, 4), weight=torch.randn(4), bias=torch.randn(4))


@case("broadcast together", randn(N, 4), weight=D)
def broadcast_together() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        one, two = torch.broadcast_tensors(x.unsqueeze(1), m.weight)
        return one * two

    return Net(forward, weight=torch.randn(3, 4))


@case("routed experts", randn(N, 4), **dict.fromkeys(("up", "down"), D))
def routed() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        best, chosen = torch.topk(torch.softmax(m.router(x), -1), 2)
        hidden = torch.tanh(torch.einsum("bkoi,bi->bko", m.up[chosen], x))
        return (best.unsqueeze(-1) * torch.einsum("bkoi,bki->bko", m.down[chosen], hidden)).sum(1)

    return Net(forward, router=nn.Linear(4, 3), up=torch.randn(3, 5, 4), down=torch.randn(3, 2, 5))


@case("a code book", randn(N, 6, 4), book__weight=D)
def code_book() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        distance = torch.cdist(x, m.book.weight)
        picked = m.book(distance.argmin(-1))
        return x + (picked - x).detach() + 0.1 * picked + distance.mean(-1, keepdim=True)

    return Net(forward, book=nn.Embedding(5, 4))


# recurrences ----------------------------------------------------------------------------------------------------------


@case("a loop over time", randn(N, 4, 4))
def loop() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        hidden, outs = x.new_zeros(x.shape[0], 3), []
        for t in range(4):
            hidden = torch.tanh(m.inward(x[:, t]) + m.onward(hidden))
            outs.append(hidden)
        return m.out(torch.stack(outs, 1))

    return Net(forward, inward=nn.Linear(4, 3), onward=nn.Linear(3, 3, bias=False), out=nn.Linear(3, 2))


def recurrent(layer: nn.Module, width: int) -> nn.Module:
    return Net(lambda m, x: m.head(m.layer(x)[0]), layer=layer, head=nn.Linear(width, 2))


CELL = {f"layer__{kind}_{side}": D for kind in ("weight", "bias") for side in ("ih", "hh")}


@case("lstm", randn(N, 5, 4))
def lstm() -> nn.Module:
    return recurrent(nn.LSTM(4, 3, batch_first=True, bidirectional=True), 6)


@case("gru", randn(N, 5, 4))
def gru() -> nn.Module:
    return recurrent(nn.GRU(4, 3, batch_first=True), 3)


@case("lstm cell", randn(N, 3, 4), **CELL)
def lstm_cell() -> nn.Module:
    """Its outputs are made of each other: the state is behind the output."""

    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = state = x.new_zeros(x.shape[0], 3)
        for t in range(3):
            hidden, state = m.layer(x[:, t], (hidden, state))
        return hidden

    return Net(forward, layer=nn.LSTMCell(4, 3))
