"""Parameters as they stand, in products, and behind computed weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tests.curvature.nets.core import CASES, D, K, N, Net, case, randn, simple

# parameters as they stand --------------------------------------------------------------------------------------------


@case("scale, shift and slope", randn(N, 6, 4), scale=D, shift=D, rest=D, act__weight=D)
def scales() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.act(x.transpose(1, 2)).transpose(1, 2)
        return (m.shift - y * m.scale) / 3 + torch.rsub(x, m.rest, alpha=2) * m.rest

    parts = {"scale": torch.randn(4), "shift": torch.randn(6, 1), "rest": torch.randn(1, 6, 4)}
    return Net(forward, act=nn.PReLU(4), **parts)


@case("one slope for all", randn(N, 4), weight=D)
def one_slope() -> nn.Module:
    return nn.PReLU()


@case("layer scale", randn(N, 6, 4), gamma=D)
def layer_scale() -> nn.Module:
    return Net(lambda m, x: x + m.gamma * m.layer(x), gamma=torch.randn(4), layer=nn.Linear(4, 4))


@case("a parameter in the denominator", randn(N, 4), low=D, power=D)
def denominator() -> nn.Module:
    return Net(lambda m, x: (x.abs() + 1) ** m.power / (1 + m.low**2), low=torch.randn(4), power=torch.rand(1) + 1)


@case("a temperature", randn(N, 4), temperature=D)
def temperature() -> nn.Module:
    return Net(
        lambda m, x: torch.softmax(m.layer(x) * m.temperature.exp(), -1),
        temperature=torch.randn(()),
        layer=nn.Linear(4, 3),
    )


@case("a parameter used in two ways", randn(N, 4), weight=D)
def two_ways() -> nn.Module:
    return Net(lambda m, x: F.linear(x, m.weight) * m.weight.sum(1), weight=torch.randn(5, 4))


@case("a parameter that is also read without a gradient", randn(N, 4))
def read_only() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.linear(x, m.weight) * m.weight.detach().sum(1) + torch.ones_like(m.weight)[:, 0]

    return Net(forward, weight=torch.randn(5, 4))


@case("a threshold that only decides", randn(N, 4))
def threshold() -> nn.Module:
    return Net(lambda m, x: m.layer(x) * (x[:, :1] > m.limit), limit=torch.zeros(1), layer=nn.Linear(4, 3))


@case("learned queries", randn(N, 5, 4), queries=D)
def learned_queries() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        queries = m.q(m.queries).expand(x.shape[0], -1, -1)
        return F.scaled_dot_product_attention(queries, m.k(x), m.v(x))

    parts = {"q": nn.Linear(4, 4), "k": nn.Linear(4, 4), "v": nn.Linear(4, 3)}
    return Net(forward, queries=torch.randn(2, 4), **parts)


CASES["learned queries"][2].update({"q.weight": D, "q.bias": D})


# products ------------------------------------------------------------------------------------------------------------


@case("parameter on the right", randn(N, 5, 4), randn(N, 4, seed=1))
def right_products() -> nn.Module:
    def forward(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(x @ m.a).sum(1) @ m.b + torch.mm(y, m.c)

    return Net(forward, a=torch.randn(4, 3), b=torch.randn(3, 2), c=torch.randn(4, 2))


@case("parameter on the left", randn(N, 5, 4), vector=D)
def left_products() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return (m.mix @ torch.tanh(x)).sum(2) + torch.matmul(m.vector, x.transpose(1, 2)).unsqueeze(1).sum((1, 2))[
            :, None
        ]

    return Net(forward, mix=torch.randn(3, 5), vector=torch.randn(4))


CASES["parameter on the left"][2].pop("vector")


@case("addmm", randn(N, 4), bias=K)
def addmm() -> nn.Module:
    return Net(lambda m, x: torch.addmm(m.bias, x, m.weight), bias=torch.randn(3), weight=torch.randn(4, 3))


@case("addmm with factors", randn(N, 4), bias=D)
def addmm_factors() -> nn.Module:
    return Net(
        lambda m, x: torch.addmm(m.bias, x, m.weight, beta=0.5, alpha=2), bias=torch.randn(3), weight=torch.randn(4, 3)
    )


@case("addmm over folded tokens", randn(N, 5, 4))
def addmm_folded() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.addmm(m.bias, x.view(-1, 4), m.weight).view(*x.shape[:-1], 3)

    return Net(forward, bias=torch.randn(3), weight=torch.randn(4, 3))


@case("einsum", randn(N, 5, 4))
def einsum() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.tanh(torch.einsum("btd,dhe->bhte", x, m.a))
        return torch.einsum("...hte,hef->...tf", y, m.b)

    return Net(forward, a=torch.randn(4, 2, 3), b=torch.randn(2, 3, 2))


@case("experts", randn(N, 5, 4), bias=D)
def experts() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.einsum("bti,eio->beto", x, m.up)
        return torch.baddbmm(m.bias, torch.tanh(y).flatten(2).transpose(0, 1), m.down).transpose(0, 1)

    return Net(forward, up=torch.randn(3, 4, 2), down=torch.randn(3, 10, 2), bias=torch.randn(3, 1, 2))


@case("a weight for each group", randn(N, 6))
def grouped_matrices() -> nn.Module:
    return Net(
        lambda m, x: torch.bmm(torch.tanh(x.view(-1, 2, 3)).transpose(0, 1), m.weight).transpose(0, 1),
        weight=torch.randn(2, 3, 4),
    )


@case("three operands", randn(N, 4), randn(N, 3, seed=1), weight=D, bilinear__weight=D, bilinear__bias=D)
def three_operands() -> nn.Module:
    return Net(
        lambda m, x, y: torch.einsum("bi,oij,bj->bo", x, m.weight, y) + m.bilinear(x, y),
        weight=torch.randn(2, 4, 3),
        bilinear=nn.Bilinear(4, 3, 2),
    )


@case("tied autoencoder", randn(N, 4), down__bias=K, up=D)
def tied_autoencoder() -> nn.Module:
    return Net(
        lambda m, x: F.linear(torch.tanh(m.down(x)), m.down.weight.t(), m.up), down=nn.Linear(4, 3), up=torch.randn(4)
    )


@case("part of a weight", randn(N, 4))
def part_of_a_weight() -> nn.Module:
    return Net(lambda m, x: F.linear(x, m.weight[1:4]), weight=torch.randn(6, 4))


@case("overlapping parts of a weight", randn(N, 4), weight=D)
def overlapping() -> nn.Module:
    return Net(lambda m, x: F.linear(x, m.weight[:4]) * F.linear(x, m.weight[2:]), weight=torch.randn(6, 4))


@case("a packed weight", randn(N, 4))
def packed() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        one, two = m.weight.chunk(2)
        first, second = m.bias.chunk(2)
        return F.linear(x, one, first) * torch.sigmoid(F.linear(x.flip(1), two, second))

    return Net(forward, weight=torch.randn(6, 4), bias=torch.randn(6))


# computed weights ----------------------------------------------------------------------------------------------------

COMPUTED = {"parametrizations__weight__original0": D, "parametrizations__weight__original1": D}
simple("weight norm", lambda: parametrizations.weight_norm(nn.Linear(4, 3)), randn(N, 4), **COMPUTED)
simple("weight norm of a conv", lambda: parametrizations.weight_norm(nn.Conv1d(2, 3, 3)), randn(N, 2, 6), **COMPUTED)
for _name in ("weight norm", "weight norm of a conv"):
    CASES[_name][2]["bias"] = D
simple(
    "spectral norm",
    lambda: parametrizations.spectral_norm(nn.Linear(4, 3)),
    randn(N, 4),
    parametrizations__weight__original=D,
    bias=D,
)
simple(
    "orthogonal",
    lambda: parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="cayley"),
    randn(N, 5, 4),
    parametrizations__weight__original=D,
    bias=D,
)


@case("low-rank weight", randn(N, 5, 4), a=D, b=D)
def low_rank() -> nn.Module:
    return Net(
        lambda m, x: F.linear(x, m.a @ m.b + m.base), a=torch.randn(3, 1), b=torch.randn(1, 4), base=torch.randn(3, 4)
    )


CASES["low-rank weight"][2]["base"] = D


@case("computed bias", randn(N, 4), bias=D, factor=D)
def computed_bias() -> nn.Module:
    return Net(
        lambda m, x: F.linear(x, m.weight, m.bias * m.factor),
        weight=torch.randn(3, 4),
        bias=torch.randn(3),
        factor=torch.randn(1),
    )


@case("standardised weight", randn(N, 2, 4, 4), conv__weight=D, conv__bias=D)
def standardised() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        weight = m.conv.weight
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, weight, m.conv.bias)

    return Net(forward, conv=nn.Conv2d(2, 3, 2))


@case("a weight for each example", randn(N, 2, 4, 4), randn(N, 3, seed=1), weight=D)
def modulated() -> nn.Module:
    def forward(m: Any, x: Tensor, style: Tensor) -> Tensor:
        weight = m.weight * m.style(style)[:, None, :, None, None]
        weight = weight * (weight.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
        made = F.conv2d(x.reshape(1, -1, 4, 4), weight.flatten(0, 1), padding=1, groups=x.shape[0])
        return made.view(-1, 3, 4, 4)

    return Net(forward, weight=torch.randn(1, 3, 2, 3, 3), style=nn.Linear(3, 2))


@case("a mixture of kernels", randn(N, 2, 4, 4))
def kernels() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        weight = torch.sigmoid(m.router(x.mean((2, 3)))) @ m.kernels.flatten(1)
        made = F.conv2d(x.reshape(1, -1, 4, 4), weight.view(-1, 2, 3, 3), padding=1, groups=x.shape[0])
        return made.view(-1, 3, 4, 4)

    return Net(forward, kernels=torch.randn(2, 3, 2, 3, 3), router=nn.Linear(2, 2))


@case("complex values", randn(N, 6, 4), filter=D, gain=D)
def spectral_filter() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        made = torch.fft.rfft(m.layer(x), dim=1) * torch.view_as_complex(m.filter) / (1 + m.gain)
        return torch.fft.irfft(made * m.gain, n=6, dim=1)

    return Net(forward, layer=nn.Linear(4, 3), filter=torch.randn(4, 3, 2), gain=torch.randn(3))
