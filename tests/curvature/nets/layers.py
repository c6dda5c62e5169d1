"""Linear layers, convolutions, embeddings and norms."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.curvature.nets.core import D, N, Net, case, randn, simple, tokens

# linear layers -------------------------------------------------------------------------------------------------------

simple("linear on vectors", lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), randn(N, 4))
simple("linear on sequences", lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), randn(N, 6, 4))
simple(
    "linear without bias", lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 1)), randn(N, 4)
)
simple("linear on a grid", lambda: nn.Linear(4, 5), randn(N, 2, 3, 4))


@case("called twice", randn(N, 4))
def called_twice() -> nn.Module:
    return Net(
        lambda m, x: m.head(torch.tanh(m.layer(torch.tanh(m.layer(x))))), layer=nn.Linear(4, 4), head=nn.Linear(4, 2)
    )


@case("called on two shapes", randn(N, 4), randn(N, 5, 4, seed=1))
def called_on_two_shapes() -> nn.Module:
    return Net(lambda m, x, y: m.layer(x) + m.layer(y).sum(1), layer=nn.Linear(4, 3))


@case("functional weight", randn(N, 4))
def functional_weight() -> nn.Module:
    return Net(
        lambda m, x: F.linear(torch.tanh(m.layer(x)), m.other.weight), layer=nn.Linear(4, 5), other=nn.Linear(5, 2)
    )


@case("functional weight beside the module", randn(N, 4), layer__bias=D)
def functional_beside() -> nn.Module:
    return Net(lambda m, x: F.linear(m.layer(x), m.layer.weight) + m.layer.bias, layer=nn.Linear(4, 4))


@case("bias in one use of two", randn(N, 4))
def bias_in_one_use() -> nn.Module:
    return Net(lambda m, x: F.linear(torch.tanh(m.layer(x)), m.layer.weight), layer=nn.Linear(4, 4))


@case("bias scaled in one use of two", randn(N, 4), layer__bias=D)
def bias_scaled() -> nn.Module:
    return Net(lambda m, x: F.linear(torch.tanh(m.layer(x)), m.layer.weight, 2 * m.layer.bias), layer=nn.Linear(4, 4))


@case("two biases for one weight", randn(N, 4), second=D)
def two_biases() -> nn.Module:
    return Net(
        lambda m, x: F.linear(torch.tanh(m.layer(x)), m.layer.weight, m.second),
        layer=nn.Linear(4, 4),
        second=torch.randn(4),
    )


@case("one bias for two layers", randn(N, 4), bias=D)
def shared_bias() -> nn.Module:
    return Net(
        lambda m, x: F.linear(torch.tanh(F.linear(x, m.a, m.bias)), m.b, m.bias),
        a=torch.randn(4, 4),
        b=torch.randn(4, 4),
        bias=torch.randn(4),
    )


@case("time folded into the batch", randn(N, 5, 4))
def folded() -> nn.Module:
    return Net(lambda m, x: m.layer(x.reshape(-1, 4)).reshape(x.shape[0], -1, 3), layer=nn.Linear(4, 3))


@case("time folded before the batch", randn(N, 5, 4))
def folded_inner() -> nn.Module:
    return Net(
        lambda m, x: m.layer(x.transpose(0, 1).reshape(-1, 4)).view(5, -1, 3).transpose(0, 1), layer=nn.Linear(4, 3)
    )


@case("windows folded into the batch", randn(N, 4, 6, 3))
def windows() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = x.view(-1, 2, 2, 3, 2, 3).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 3)
        y = m.second(torch.tanh(m.first(y)))
        return y.view(-1, 2, 3, 2, 2, 5).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 6, 5)

    return Net(forward, first=nn.Linear(3, 4), second=nn.Linear(4, 5))


@case("transposed inside", randn(N, 5, 4))
def transposed_inside() -> nn.Module:
    return Net(
        lambda m, x: m.second(torch.tanh(m.first(x.transpose(0, 1)))).transpose(0, 1),
        first=nn.Linear(4, 3),
        second=nn.Linear(3, 2),
    )


@case("examples along the last dim but one", randn(N, 5, 4))
def examples_inside() -> nn.Module:
    return Net(lambda m, x: m.layer(x.permute(1, 2, 0).transpose(1, 2)).movedim(1, 0), layer=nn.Linear(4, 3))


@case("a batch twice over", randn(N, 4))
def twice_over() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        both = m.second(torch.tanh(m.first(torch.cat([x, x.flip(1)]))))
        return both[: x.shape[0]] * both[x.shape[0] :]

    return Net(forward, first=nn.Linear(4, 5), second=nn.Linear(5, 3))


# convolutions --------------------------------------------------------------------------------------------------------

simple("conv1d", lambda: nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv1d(3, 2, 2)), randn(N, 2, 7))
simple("conv2d", lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 2)), randn(N, 2, 5, 6))
simple("conv3d", lambda: nn.Conv3d(2, 3, 2, padding=(1, 0, 1)), randn(N, 2, 3, 4, 3))
simple("stride and dilation", lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 3), dilation=(1, 2)), randn(N, 2, 8, 9))
simple("grouped", lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), randn(N, 4, 4, 5))
simple("depthwise", lambda: nn.Conv2d(4, 4, 3, groups=4, stride=2), randn(N, 4, 5, 6))
simple("depthwise, two outputs each", lambda: nn.Conv1d(3, 6, 3, groups=3, bias=False), randn(N, 3, 6))
simple("padded to the same", lambda: nn.Conv2d(2, 3, (2, 4), padding="same", dilation=(2, 1)), randn(N, 2, 5, 6))
simple("padding valid", lambda: nn.Conv1d(2, 3, 3, padding="valid"), randn(N, 2, 6))
simple("padded by reflection", lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), randn(N, 2, 4, 5))
simple("transposed conv1d", lambda: nn.ConvTranspose1d(2, 3, 3, stride=2), randn(N, 2, 5), bias=D)
simple(
    "transposed conv2d",
    lambda: nn.ConvTranspose2d(
        4, 6, (3, 2), stride=(2, 1), padding=1, output_padding=(1, 0), groups=2, dilation=(1, 2)
    ),
    randn(N, 4, 3, 4),
    bias=D,
)
simple("transposed conv3d", lambda: nn.ConvTranspose3d(2, 3, 2, stride=2, bias=False), randn(N, 2, 2, 3, 2))
simple("one pixel", lambda: nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(4, 2)), randn(N, 3, 2, 2))


@case("conv on frames folded into the batch", randn(N, 4, 2, 5, 5))
def frames() -> nn.Module:
    return Net(lambda m, x: m.conv(x.flatten(0, 1)).unflatten(0, (-1, 4)), conv=nn.Conv2d(2, 3, 3))


@case("conv over features", randn(N, 5))
def conv_over_features() -> nn.Module:
    return Net(lambda m, x: m.conv(x.unsqueeze(1)), conv=nn.Conv1d(1, 1, 3))


@case("tied conv and transposed conv", randn(N, 2, 6), deep=D)
def tied_convs() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = torch.tanh(F.conv1d(x, m.weight, m.shallow, stride=2))
        return F.conv_transpose1d(hidden, m.weight, m.deep, stride=2)

    return Net(forward, weight=torch.randn(3, 2, 2), shallow=torch.randn(3), deep=torch.randn(2))


# embeddings ----------------------------------------------------------------------------------------------------------

simple("embedding", lambda: nn.Sequential(nn.Embedding(7, 4), nn.Tanh(), nn.Linear(4, 2)), tokens(N, 5))
simple(
    "embedding with padding", lambda: nn.Sequential(nn.Embedding(7, 4, padding_idx=2), nn.Tanh()), tokens(N, 6, seed=3)
)
simple("embedding of one token each", lambda: nn.Sequential(nn.Embedding(7, 4), nn.Tanh()), tokens(N))


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=bias)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embedding(x))))


simple("tied embedding and head", Tied, tokens(N, 5))
simple("tied embedding and head with a bias", lambda: Tied(True), tokens(N, 5))


@case("embedding tied to a product", tokens(N, 5))
def embedding_product() -> nn.Module:
    return Net(lambda m, x: torch.tanh(m.table(x)) @ m.table.weight.T, table=nn.Embedding(7, 4))


@case("rows of a table by number", tokens(N, 5), tokens(N, 2, seed=1))
def rows_of_a_table() -> nn.Module:
    return Net(
        lambda m, x, y: torch.tanh(m.one[x - 3]).sum(1) + m.two.index_select(0, y.flatten()).view(-1, 2, 4).sum(1),
        one=torch.randn(7, 4),
        two=torch.randn(7, 4),
    )


@case("bags of tokens", tokens(N, 5), bag__weight=D)
def bags() -> nn.Module:
    return nn.Sequential(OrderedDict(bag=nn.EmbeddingBag(7, 4, padding_idx=2), act=nn.Tanh(), head=nn.Linear(4, 2)))


@case("positions by arange", tokens(N, 5), place__weight=D)
def positions() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.tanh(m.token(x) + m.place(torch.arange(x.shape[1])))

    return Net(forward, token=nn.Embedding(7, 4), place=nn.Embedding(9, 4))


@case("positions by arange with a padding row", tokens(N, 5), place__weight=D)
def padded_positions() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.tanh(m.token(x) + m.place(torch.arange(x.shape[1])))

    return Net(forward, token=nn.Embedding(7, 4), place=nn.Embedding(9, 4, padding_idx=1))


@case("learned positions cut to length", randn(N, 5, 4), place=D)
def cut_positions() -> nn.Module:
    return Net(lambda m, x: m.layer(x + m.place[:, : x.shape[1]]), place=torch.randn(1, 8, 4), layer=nn.Linear(4, 2))


@case("class token", randn(N, 5, 4), token=D)
def class_token() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1)
        return m.layer(torch.tanh(y))[:, 0] + m.layer(y).sum(1)

    return Net(forward, token=torch.randn(1, 1, 4), layer=nn.Linear(4, 3))


@case("class token by repeat", randn(N, 5, 4), token=D)
def repeated_token() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.layer(torch.cat([m.token.repeat(x.shape[0], 1, 1), x], 1))

    return Net(forward, token=torch.randn(1, 1, 4), layer=nn.Linear(4, 3))


@case("the last token of each example", randn(N, 5, 4), tokens(N, high=5))
def last_token() -> nn.Module:
    def forward(m: Any, x: Tensor, at: Tensor) -> Tensor:
        y = torch.tanh(m.first(x))
        return m.second(y[torch.arange(y.shape[0]), at])

    return Net(forward, first=nn.Linear(4, 3), second=nn.Linear(3, 2))


# normalisations ------------------------------------------------------------------------------------------------------

AFFINE = {"1__weight": D, "1__bias": D}


def normed(norm: Callable[[], nn.Module], first: nn.Module) -> nn.Module:
    """Put a norm behind a layer."""
    net = nn.Sequential(first, norm(), nn.Tanh())
    for module in net:
        if isinstance(getattr(module, "running_mean", None), Tensor):
            module.running_mean.normal_()  # type: ignore[union-attr, operator]
            module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr, operator]
    return net


simple("batch norm", lambda: normed(lambda: nn.BatchNorm1d(5), nn.Linear(4, 5)), randn(N, 4), **AFFINE)
simple("batch norm 2d", lambda: normed(lambda: nn.BatchNorm2d(3), nn.Conv2d(2, 3, 2)), randn(N, 2, 4, 3), **AFFINE)
simple("layer norm", lambda: normed(lambda: nn.LayerNorm(5), nn.Linear(4, 5)), randn(N, 6, 4), **AFFINE)
simple(
    "layer norm over two dims", lambda: normed(lambda: nn.LayerNorm((6, 5)), nn.Linear(4, 5)), randn(N, 6, 4), **AFFINE
)
simple("group norm", lambda: normed(lambda: nn.GroupNorm(2, 6), nn.Conv2d(2, 6, 2)), randn(N, 2, 4, 3), **AFFINE)
simple(
    "instance norm",
    lambda: normed(lambda: nn.InstanceNorm2d(3, affine=True), nn.Conv2d(2, 3, 2)),
    randn(N, 2, 4, 3),
    **AFFINE,
)
simple(
    "instance norm with statistics",
    lambda: normed(lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True), nn.Conv1d(2, 3, 2)),
    randn(N, 2, 6),
    **AFFINE,
)
simple("rms norm", lambda: normed(lambda: nn.RMSNorm(5), nn.Linear(4, 5)), randn(N, 6, 4), **{"1__weight": D})
