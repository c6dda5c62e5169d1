"""Networks that use their parameters in every way there is, each with the kind of block that each parameter has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

N = 3  # examples
K, D = "kronecker", "diagonal"


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Draw a float64 input."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(*shape: int, high: int = 7, seed: int = 0) -> Tensor:
    """Draw an input of whole numbers."""
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """A network written as a function of its parts."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part if isinstance(part, nn.Module) else nn.Parameter(part))

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


# name -> (network, inputs, kinds of the blocks by parameter; those not named are Kronecker)
Case = tuple[Callable[[], nn.Module], tuple[Tensor, ...], dict[str, str]]
CASES: dict[str, Case] = {}
# whose examples cannot be told apart in the middle, and are taken one at a time
MIXED = {"broadcast together"}


def case(name: str, *inputs: Tensor, **kinds: str) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Register a network under a name, with its inputs."""

    def register(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        CASES[name] = make, inputs, {key.replace("__", "."): value for key, value in kinds.items()}
        return make

    return register


def simple(name: str, make: Callable[[], nn.Module], *inputs: Tensor, **kinds: str) -> None:
    """Register a network that needs no function of its own."""
    case(name, *inputs, **kinds)(make)


def built(case: Case) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Build a network, with the same weights each time, none of them 0 or 1."""
    make, inputs, _ = case
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = make().double().eval()
        with torch.no_grad():
            for value in net.parameters():
                if value.is_floating_point():
                    value.add_(0.1 * torch.randn(value.shape, dtype=value.dtype))
    return net, inputs


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
