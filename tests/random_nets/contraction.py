"""Matrix products over channels: Linear, tied and functional weights, einsum, matmul, bmm, computed weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .core import CHANNELS_LAST, Drawing, Options, Raw, Shape, Step, activate, family, project


@family("linear", CHANNELS_LAST, frequency=3)
class LinearStep(Step):
    """Apply a Linear to the last dim, at any rank."""

    def __init__(self, s: Shape, out: int, bias: bool) -> None:
        super().__init__(s)
        self.linear = nn.Linear(s.channels, out, bias=bias)

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"out": d.width(), "bias": d.flag(70)}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        return self.linear(x)


@family("mlp")
class MLP(Step):
    """Contract, activate, contract: hidden units that nothing else touches."""

    def __init__(self, s: Shape, hidden: int, out: int, activation: str, dropout: bool) -> None:
        super().__init__(s)
        self.first = project(s, hidden)
        self.dropout = nn.Dropout(0.2 if dropout else 0.0)
        self.second = project(s.with_channels(hidden), out)
        self.activation = activation
        self.certain = [("first.weight", 0)]

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        out = d.choice((s.channels, d.width()))
        return {"hidden": d.width(), "out": out, "activation": d.activation(), "dropout": d.flag(30)}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        return self.second(self.dropout(activate(self.activation, self.first(x))))


@family("tied-twice")
class TiedTwice(Step):
    """Use the same contraction twice, so that its inputs and outputs are the same units."""

    def __init__(self, s: Shape, activation: str, residual: bool) -> None:
        super().__init__(s)
        self.shared = project(s, s.channels)
        self.again = self.shared  # two names, one parameter
        self.activation = activation
        self.residual = residual

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"activation": d.activation(), "residual": d.flag()}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        y = self.again(activate(self.activation, self.shared(x)))
        return x + y if self.residual else y


@family("tied-transpose", CHANNELS_LAST, keeps_zero=False)
class TiedTranspose(Step):
    """Encode with W and decode with its transpose, as a tied autoencoder does."""

    def __init__(self, s: Shape, hidden: int, activation: str, matmul: bool) -> None:
        super().__init__(s)
        self.encode = nn.Linear(s.channels, hidden)
        self.bias = nn.Parameter(torch.zeros(s.channels))
        self.activation = activation
        self.matmul = matmul
        self.certain = [("encode.weight", 0)]

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"hidden": d.width(), "activation": d.activation(), "matmul": d.flag()}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        h = activate(self.activation, self.encode(x))
        if self.matmul:
            return h @ self.encode.weight + self.bias
        return F.linear(h, self.encode.weight.t(), self.bias)


@family("tied-bases", CHANNELS_LAST)
class TiedBases(Step):
    """Use one Linear on two different inputs, and its weight once more by F.linear."""

    def __init__(self, s: Shape, out: int, bias: bool) -> None:
        super().__init__(s)
        self.left = nn.Linear(s.channels, out)
        self.right = nn.Linear(s.channels, s.channels, bias=bias)

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"out": d.width(), "bias": d.flag()}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        return self.left(x) + F.linear(F.relu(self.right(x)), self.left.weight)


@family("einsum", ("vec", "seq", "image", "grid"))
class Einsum(Step):
    """Contract with a parameter by einsum."""

    def __init__(self, s: Shape, out: int, transposed: bool) -> None:
        super().__init__(s)
        self.weight = nn.Parameter(torch.zeros(s.channels, out) if transposed else torch.zeros(out, s.channels))
        w = "cd" if transposed else "dc"
        equations = {
            "vec": f"bc,{w}->bd",
            "seq": f"btc,{w}->btd",
            "image": f"bchw,{w}->bdhw",
            "grid": f"...c,{w}->...d",
        }
        self.equation = equations[s.kind]

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"out": d.width(), "transposed": d.flag()}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        return torch.einsum(self.equation, x, self.weight)


@family("matmul-parameter", CHANNELS_LAST, frequency=2)
class MatmulParameter(Step):
    """Multiply by a bare parameter: x @ W + b, torch.matmul, or addmm."""

    def __init__(self, s: Shape, out: int, bias: bool, style: str) -> None:
        super().__init__(s)
        self.w = nn.Parameter(torch.zeros(s.channels, out))
        self.b = nn.Parameter(torch.zeros(out)) if bias else None
        self.style = style

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        bias = d.free()
        style = d.choice(("matmul", "addmm") if bias and s.kind == "vec" else ("matmul",))
        return {"out": d.width(), "bias": bias, "style": style}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        if self.b is None:
            return torch.matmul(x, self.w)
        if self.style == "addmm":
            return torch.addmm(self.b, x, self.w)
        return x @ self.w + self.b


@family("bmm", ("seq", "signal"))
class BatchedMatmul(Step):
    """Mix positions by a product of two activations: bmm(bmm(a, b^T) / T, v)."""

    def __init__(self, s: Shape, hidden: int, out: int, einsum: bool) -> None:
        super().__init__(s)
        self.a, self.b = (project(s, hidden) for _ in range(2))
        self.v = project(s, out)
        self.einsum = einsum
        self.last = s.kind == "seq"
        self.certain = [("a.weight", 0), ("b.weight", 0)]

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"hidden": d.width(), "out": d.width(), "einsum": d.flag(40)}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        a, b, v = self.a(x), self.b(x), self.v(x)
        if self.last and self.einsum:
            return torch.einsum("bts,bsd->btd", torch.einsum("btc,bsc->bts", a, b).tanh(), v)
        if self.last:
            return torch.bmm(torch.tanh(torch.bmm(a, b.transpose(1, 2))), v)
        return torch.bmm(v, torch.tanh(torch.bmm(a.transpose(1, 2), b)))


@family("computed-weight", CHANNELS_LAST, keeps_zero=False, frequency=2)
class ComputedWeight(Step):
    """Use a weight that the graph computes: a gain per row, or rows standardised."""

    def __init__(self, s: Shape, out: int, standardise: bool) -> None:
        super().__init__(s)
        self.weight = nn.Parameter(torch.zeros(out, s.channels))
        self.gain = nn.Parameter(torch.ones(out))
        self.standardise = standardise

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        standardise = d.frozen and s.channels > 2 and d.flag(30)  # its statistics run over the input units
        return {"out": d.width(), "standardise": standardise}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        w = self.weight
        if self.standardise:
            w = (w - w.mean(1, keepdim=True)) / (w.var(1, keepdim=True) + 1e-3).sqrt()
        return F.linear(x, w * self.gain[:, None])


@family("linear-on-image", ("image",), frequency=2)
class LinearOnImage(Step):
    """Permute to channels last, apply Linears there, permute back (ConvNeXt)."""

    def __init__(self, s: Shape, hidden: int, out: int, norm: bool) -> None:
        super().__init__(s)
        self.norm = nn.LayerNorm(s.channels) if norm else nn.Identity()
        self.first = nn.Linear(s.channels, hidden)
        self.second = nn.Linear(hidden, out)
        self.certain = [("first.weight", 0)]

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"hidden": d.width(), "out": d.width(), "norm": d.free(60)}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        x = self.norm(x.permute(0, 2, 3, 1))
        return self.second(F.gelu(self.first(x))).permute(0, 3, 1, 2)


@family("film")
class FiLM(Step):
    """Scale and shift the channels by a second input, or by the pooled activation itself."""

    def __init__(self, s: Shape, context: int | None, shift: bool) -> None:
        super().__init__(s)
        width = s.channels if context is None else context
        self.linear = nn.Linear(width, s.channels * (2 if shift else 1))
        self.context, self.shift = context, shift
        self.axes = s.position_axes
        self.view = (-1, *s.broadcast()[1:])

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        context = d.scope["context"].channels if "context" in d.scope else None
        return {"context": context, "shift": d.free()}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        if self.context is not None:
            pooled = raw["context"].mean(1)  # the context is a sequence [B, S, C]
        else:
            pooled = x.mean(self.axes) if self.axes else x
        out = self.linear(pooled)
        if not self.shift:
            return x * torch.tanh(out).view(self.view)
        scale, shift = out.chunk(2, dim=1)
        return x * (1 + torch.tanh(scale).view(self.view)) + shift.view(self.view)
