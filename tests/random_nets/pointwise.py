"""Pointwise ops: activations, gates, constants, learned scales, in-place arithmetic, masks, dropout."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .core import CHANNELS_FIRST, Drawing, Options, Raw, Shape, Step, activate, family, project


@family("activation")
class Activation(Step):
    """Apply an activation."""

    def __init__(self, s: Shape, name: str) -> None:
        super().__init__(s)
        self.name = name

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"name": d.activation()}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        return activate(self.name, x)


@family("prelu", ("image", "signal", "vec"))
class PReLU(Step):
    """Apply PReLU with one slope a channel, or one for all."""

    def __init__(self, s: Shape, shared: bool) -> None:
        super().__init__(s)
        self.act = nn.PReLU(1 if shared else s.channels)

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"shared": d.flag(25)}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        return self.act(x)


@family("inplace-activation")
class InplaceActivation(Step):
    """Contract, then activate in place; with alias, the value before is used again and has changed too."""

    def __init__(self, s: Shape, out: int, name: str, alias: bool) -> None:
        super().__init__(s)
        self.first = project(s, out)
        self.second = project(s.with_channels(out), out) if alias else None
        acts = {"relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "hardswish": nn.Hardswish}
        self.act = acts[name](inplace=True)

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        name = d.choice(("relu", "relu6", "silu", "hardswish"))
        return {"out": d.width(), "name": name, "alias": d.flag(40)}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        y = self.first(x)
        z = self.act(y)
        return z if self.second is None else self.second(z) + y


@family("inplace-arithmetic")
class InplaceArithmetic(Step):
    """Contract, then change the result in place: +=, mul_, sub_, add_ with alpha, relu_."""

    def __init__(self, s: Shape, style: str) -> None:
        super().__init__(s)
        self.linear = project(s, s.channels)
        self.style = style

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"style": d.choice(("iadd", "mul_", "sub_", "alpha", "add_relu"))}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        y = self.linear(x)
        if self.style == "mul_":
            return y.mul_(torch.sigmoid(x))
        if self.style == "sub_":
            return y.sub_(x)
        if self.style == "alpha":
            return y.add_(x, alpha=0.5).div_(1.5)
        y += x
        return F.relu_(y) if self.style == "add_relu" else y


@family("slice-assignment")
class SliceAssignment(Step):
    """Overwrite the first k channels: y = x.clone(); y[:, :k] = f(y[:, :k])."""

    def __init__(self, s: Shape, k: int, style: str) -> None:
        super().__init__(s)
        self.part = project(s.with_channels(k), k)
        self.k, self.axis, self.style = k, s.axis, style

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"k": d.integer(1, s.channels - 1), "style": d.choice(("contract", "scale", "last"))}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        y = x.clone()
        if self.style == "scale":
            y.narrow(self.axis, 0, self.k).mul_(0.5)
        elif self.axis == 1:
            part = slice(-self.k, None) if self.style == "last" else slice(None, self.k)
            y[:, part] = self.part(x[:, part])
        else:
            part = slice(-self.k, None) if self.style == "last" else slice(None, self.k)
            y[..., part] = torch.tanh(self.part(x[..., part]))
        return y


@family("gate")
class Gate(Step):
    """Multiply one contraction by an activation of another: a * sigmoid(b)."""

    def __init__(self, s: Shape, out: int, style: str) -> None:
        super().__init__(s)
        self.a, self.b = project(s, out), project(s, out)
        self.style = style

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"out": d.width(), "style": d.choice(("sigmoid", "tanh", "product", "addcmul"))}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        a, b = self.a(x), self.b(x)
        if self.style == "addcmul":
            return torch.addcmul(a, a, b.tanh(), value=0.5)
        gate = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "product": torch.nn.functional.hardtanh}[self.style]
        return a * gate(b)


@family("two-operands")
class TwoOperands(Step):
    """Join two contractions by maximum, minimum, lerp, a difference, or a guarded quotient."""

    def __init__(self, s: Shape, out: int, style: str) -> None:
        super().__init__(s)
        self.a, self.b = project(s, out), project(s, out)
        self.style = style

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"out": d.width(), "style": d.choice(("difference", "maximum", "minimum", "lerp", "quotient", "where"))}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        a, b = self.a(x), self.b(x)
        if self.style == "difference":
            return a - 0.5 * b
        if self.style == "lerp":
            return torch.lerp(a, b, 0.3)
        if self.style == "quotient":
            return a / (1 + b.abs())
        if self.style == "where":
            return torch.where(a > b, a, 0.5 * b)
        return torch.maximum(a, b) if self.style == "maximum" else torch.minimum(a, b)


@family("constant-scale")
class ConstantScale(Step):
    """Multiply by a constant buffer with one number a channel; it is saved or it is not."""

    def __init__(self, s: Shape, persistent: bool, divide: bool, plain: bool) -> None:
        super().__init__(s)
        shape = (s.channels,) if plain else s.broadcast()[1:]
        self.register_buffer("scale", torch.ones(shape), persistent=persistent)
        self.divide = divide
        self.view = s.broadcast()

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"persistent": d.flag(), "divide": d.flag(30), "plain": d.flag()}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        scale = self.get_buffer("scale").view(self.view)
        return x / scale if self.divide else x * scale


@family("constant-shift", keeps_zero=False)
class ConstantShift(Step):
    """Standardise with constants: (x - mean) / std, as a network does with its input."""

    def __init__(self, s: Shape, persistent: bool) -> None:
        super().__init__(s)
        self.register_buffer("shift", torch.zeros(s.broadcast()), persistent=persistent)
        self.register_buffer("scale", torch.ones(s.broadcast()), persistent=persistent)

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"persistent": d.flag()}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        return (x - self.get_buffer("shift")) / self.get_buffer("scale")


@family("layer-scale")
class LayerScale(Step):
    """Multiply by a learned number a channel, or by one learned number."""

    def __init__(self, s: Shape, scalar: bool, residual: bool) -> None:
        super().__init__(s)
        self.gamma = nn.Parameter(torch.ones(()) if scalar else torch.ones(s.broadcast()[1:]))
        self.residual = residual

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"scalar": d.flag(25), "residual": d.flag(30)}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        return x + self.gamma * x if self.residual else x * self.gamma


@family("position-parameter", ("seq", "image", "grid", "signal"), keeps_zero=False)
class PositionParameter(Step):
    """Add a learned number to each position and channel, or an embedding looked up by arange."""

    def __init__(self, s: Shape, lookup: bool) -> None:
        super().__init__(s)
        self.table = nn.Embedding(s.dims[0], s.dims[-1]) if lookup else None
        self.position = nn.Parameter(torch.zeros((1,) if lookup else (1, *s.dims)))
        self.register_buffer("index", torch.arange(s.dims[0]), persistent=False)

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"lookup": s.kind == "seq" and d.flag()}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        return x + self.position if self.table is None else x + self.table(self.get_buffer("index"))


@family("mask")
class Mask(Step):
    """Apply a constant mask over positions or over channels: masked_fill, where, or a product."""

    def __init__(self, s: Shape, style: str, over: str, value: float) -> None:
        super().__init__(s)
        if over == "channels":
            mask = (torch.arange(s.channels) % 3 == 1).view(s.broadcast())
        else:
            sizes = [1, *s.dims]
            sizes[s.axis] = 1
            mask = (torch.arange(torch.Size(sizes).numel()) % 3 == 1).view(sizes)
        self.register_buffer("mask", mask)
        self.style, self.value = style, value

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        style = d.choice(("masked_fill", "where", "product"))
        over = d.choice(("positions", "channels")) if s.positions else "channels"
        return {"style": style, "over": over, "value": 0.7 if d.free() else 0.0}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        mask = self.get_buffer("mask")
        if self.style == "masked_fill":
            return x.masked_fill(mask, self.value)
        if self.style == "where":
            return torch.where(mask, self.value, x)
        return x * (~mask).to(x.dtype)


@family("dropout")
class Dropout(Step):
    """Drop numbers, or whole channels of an image, while training."""

    def __init__(self, s: Shape, channels: bool, inplace: bool) -> None:
        super().__init__(s)
        self.first = project(s, s.channels)
        cls = nn.Dropout2d if channels and s.kind == "image" else nn.Dropout
        self.dropout = cls(0.3, inplace=inplace)

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"channels": d.flag(), "inplace": d.flag(30)}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        return self.dropout(self.first(x))


@family("stochastic-depth")
class StochasticDepth(Step):
    """Add a branch that is dropped for whole examples, only while training."""

    def __init__(self, s: Shape, hidden: int, activation: str) -> None:
        super().__init__(s)
        self.first, self.second = project(s, hidden), project(s.with_channels(hidden), s.channels)
        self.activation = activation
        self.certain = [("first.weight", 0)]

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"hidden": d.width(), "activation": d.activation()}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        y = self.second(activate(self.activation, self.first(x)))
        if self.training:
            keep = torch.rand((x.shape[0], *[1] * (x.dim() - 1)), dtype=x.dtype, device=x.device) < 0.8
            y = y * keep / 0.8
        return x + y


@family("noise", keeps_zero=False)
class ScalarArithmetic(Step):
    """Compute with literals: 2x - 0.1, clamp, abs, a power, exp of a bounded number; noise while training."""

    def __init__(self, s: Shape, style: str) -> None:
        super().__init__(s)
        self.style = style

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"style": d.choice(("affine", "clamp", "abs", "square", "exp", "rsub"))}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        if self.training:
            x = x + 0.01 * torch.randn_like(x)
        if self.style == "affine":
            return 1.5 * x - 0.1
        if self.style == "clamp":
            return x.clamp(-1.0, 1.5)
        if self.style == "abs":
            return x.abs() - 0.3
        if self.style == "square":
            return torch.tanh(x) ** 2 + 0.2 * x
        return 1.0 - x if self.style == "rsub" else torch.exp(torch.tanh(x))


@family("squeeze-excite", ("image", "signal", "grid", "seq"))
class SqueezeExcite(Step):
    """Gate the channels by a small network on their means (Hu 2018)."""

    def __init__(self, s: Shape, hidden: int, style: str) -> None:
        super().__init__(s)
        conv = style == "conv" and s.kind in CHANNELS_FIRST
        self.style = style if s.kind == "image" or not conv else "mean"
        inner = s if conv else Shape("vec", (s.channels,))
        self.reduce, self.expand = project(inner, hidden), project(inner.with_channels(hidden), s.channels)
        self.axes, self.conv = s.position_axes, conv
        self.view = (-1, *s.broadcast()[1:])
        self.certain = [("reduce.weight", 0)]

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"hidden": d.width(), "style": d.choice(("mean", "conv"))}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        if self.style == "conv" and self.conv:
            gate = self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1))))
            return x * F.hardsigmoid(gate)
        gate = x.mean(self.axes, keepdim=self.conv)
        gate = torch.sigmoid(self.expand(F.relu(self.reduce(gate))))
        return gate * x if self.conv else x * gate.view(self.view)
