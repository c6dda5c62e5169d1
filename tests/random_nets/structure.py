"""Blocks that hold other steps: residual, concat, dense, shared, gated by the input, pyramids."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .core import (
    CHANNELS_FIRST,
    Chain,
    Drawing,
    Options,
    Raw,
    Scope,
    Shape,
    Step,
    StepDescription,
    activate,
    family,
    project,
)

Body = list[StepDescription]


@family("residual", nests=True, frequency=3)
class Residual(Step):
    """Add the input to a body that ends in a contraction back to its width; sometimes an activation follows."""

    def __init__(self, s: Shape, scope: Scope, body: Body, activation: str, inplace: bool) -> None:
        super().__init__(s)
        self.body = Chain(body, s, scope)
        self.back = project(self.body.out, s.channels)
        self.activation, self.inplace = activation, inplace

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        body, _ = d.body(s, same=True)
        activation = d.activation() if d.flag(40) else ""
        return {"body": body, "activation": activation, "inplace": d.flag(30)}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        y = self.back(self.body(x, raw))
        if self.inplace:
            y += x
        else:
            y = x + y
        return activate(self.activation, y) if self.activation else y


@family("plain-residual", nests=True)
class PlainResidual(Step):
    """Add the input to a body that happens to keep the shape, e.g. x + shuffle(x)."""

    def __init__(self, s: Shape, scope: Scope, body: Body) -> None:
        super().__init__(s)
        self.body = Chain(body, s, scope)

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        body, after = d.body(s)
        return {"body": body} if body and after == s else None

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        return 0.5 * x + self.body(x, raw)


@family("residual-projection", nests=True, frequency=2)
class ResidualProjection(Step):
    """Add a body to a contraction of the input, so that the width may change."""

    def __init__(self, s: Shape, scope: Scope, body: Body, out: int, norm: bool) -> None:
        super().__init__(s)
        self.body = Chain(body, s, scope)
        self.back = project(self.body.out, out)
        self.shortcut = project(s, out, bias=not norm)
        self.norm = (nn.BatchNorm2d if s.kind == "image" else nn.BatchNorm1d)(out) if norm else nn.Identity()

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        body, _ = d.body(s, same=True)
        norm = s.kind in CHANNELS_FIRST and d.free()
        return {"body": body, "out": d.width(), "norm": norm}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        return F.relu(self.back(self.body(x, raw)) + self.norm(self.shortcut(x)))


@family("bottleneck")
class Bottleneck(Step):
    """Reduce, convolve, expand, normalise, add, activate in place: the block of ResNet-50."""

    def __init__(self, s: Shape, hidden: int, norm: bool) -> None:
        super().__init__(s)
        self.reduce = project(s, hidden)
        inner = s.with_channels(hidden)
        self.middle = project(inner, hidden, kernel=3)
        self.expand = project(inner, s.channels)
        image = {"image": nn.BatchNorm2d}.get(s.kind, nn.BatchNorm1d)
        self.norms = nn.ModuleList(image(c) if norm else nn.Identity() for c in (hidden, hidden, s.channels))
        self.certain = [("reduce.weight", 0), ("middle.weight", 0)]

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"hidden": d.width(), "norm": s.kind in ("image", "signal", "vec") and d.free(70)}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        y = F.relu(self.norms[0](self.reduce(x)), inplace=True)
        y = F.relu(self.norms[1](self.middle(y)), inplace=True)
        y = self.norms[2](self.expand(y))
        y += x
        return F.relu(y, inplace=True)


@family("concat", nests=True, frequency=3)
class Concat(Step):
    """Join two or three branches, and sometimes the input, over channels (Inception)."""

    def __init__(self, s: Shape, scope: Scope, bodies: list[Body], keep: bool) -> None:
        super().__init__(s)
        self.branches = nn.ModuleList(Chain(body, s, scope) for body in bodies)
        self.keep, self.axis = keep, s.axis

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        bodies = [d.body(s, same=True)[0] for _ in range(d.choice((2, 2, 3)))]
        return {"bodies": bodies, "keep": d.flag(30)}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        pieces = [branch(x, raw) for branch in self.branches]
        return torch.cat([x, *pieces] if self.keep else pieces, dim=self.axis)


def fits(d: Drawing, s: Shape) -> bool:
    """Say whether the raw input has the kind and the positions of this activation."""
    raw = d.scope.get("x")
    return raw is not None and raw.kind == s.kind and raw.positions == s.positions


@family("concat-raw", frequency=2)
class ConcatRaw(Step):
    """Join the raw input of the network with an activation, or with a contraction of it."""

    def __init__(self, s: Shape, out: int, raw_first: bool) -> None:
        super().__init__(s)
        self.linear = project(s, out) if out else nn.Identity()
        self.raw_first, self.axis = raw_first, s.axis

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"out": d.choice((0, d.width())), "raw_first": d.flag()} if fits(d, s) else None

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        y = self.linear(x)
        return torch.cat((raw["x"], y) if self.raw_first else (y, raw["x"]), self.axis)


@family("raw-by-mean")
class ConcatRawMean(Step):
    """Join the means of the raw input with every position, by expand (CoordConv-like conditioning)."""

    def __init__(self, s: Shape) -> None:
        super().__init__(s)
        self.axis = s.axis

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        raw = d.scope.get("x")
        return {} if raw is not None and raw.kind == s.kind and s.positions else None

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        axes = [a for a in range(1, x.dim()) if a != self.axis]
        pooled = raw["x"].mean(axes, keepdim=True)
        sizes = list(x.shape)
        sizes[self.axis] = -1
        return torch.cat([x, pooled.expand(sizes)], self.axis)


@family("add-raw")
class AddRaw(Step):
    """Contract to the width of the raw input and add it, or multiply by it."""

    def __init__(self, s: Shape, raw: int, product: bool) -> None:
        super().__init__(s)
        self.linear = project(s, raw)
        self.product = product

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"raw": d.scope["x"].channels, "product": d.flag(30)} if fits(d, s) else None

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        y = self.linear(x)
        return y * torch.tanh(raw["x"]) if self.product else y + raw["x"]


@family("broadcast-raw")
class BroadcastRaw(Step):
    """Multiply by one channel of the raw input at each position, e.g. a depth or a mask."""

    def __init__(self, s: Shape, channel: int) -> None:
        super().__init__(s)
        self.channel, self.axis = channel, s.axis

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"channel": d.integer(0, d.scope["x"].channels - 1)} if fits(d, s) and s.positions else None

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        return x * (1 + raw["x"].narrow(self.axis, self.channel, 1).tanh())


@family("dense")
class Dense(Step):
    """Append the output of each layer to its input (DenseNet)."""

    def __init__(self, s: Shape, growth: int, layers: int, activation: str, norm: bool) -> None:
        super().__init__(s)
        widths = [s.channels + k * growth for k in range(layers)]
        image = {"image": nn.BatchNorm2d}.get(s.kind, nn.BatchNorm1d)
        self.norms = nn.ModuleList(image(c) if norm else nn.Identity() for c in widths)
        self.layers = nn.ModuleList(project(s.with_channels(c), growth, kernel=3) for c in widths)
        self.activation, self.axis = activation, s.axis

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        options: Options = {"growth": d.integer(2, 4), "layers": d.integer(1, 3), "activation": d.activation()}
        return options | {"norm": s.kind in ("image", "signal", "vec") and d.free()}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        pieces = [x]
        for norm, layer in zip(self.norms, self.layers, strict=True):
            joined = torch.cat(pieces, self.axis)
            pieces.append(layer(activate(self.activation, norm(joined))))
        return torch.cat(pieces, self.axis)


@family("shared-body", nests=True)
class SharedBody(Step):
    """Run the same body two or three times, as a recurrent or weight-tied network does."""

    def __init__(self, s: Shape, scope: Scope, body: Body, times: int, residual: bool) -> None:
        super().__init__(s)
        self.body = Chain(body, s, scope)
        self.back = project(self.body.out, s.channels)
        self.times, self.residual = times, residual

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        body, _ = d.body(s, count=d.integer(1, 2), same=True)
        return {"body": body, "times": d.choice((2, 3)), "residual": d.flag()}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        for _ in range(self.times):
            y = torch.tanh(self.back(self.body(x, raw)))
            x = x + y if self.residual else y
        return x


@family("split-body", nests=True)
class SplitBody(Step):
    """Send one half of the channels through a body and join both (CSP, ShuffleNet V2)."""

    def __init__(self, s: Shape, scope: Scope, body: Body, shuffle: bool) -> None:
        super().__init__(s)
        half = s.channels // 2
        self.body = Chain(body, s.with_channels(half), scope)
        self.shuffle, self.axis, self.out = shuffle, s.axis, s.channels - half + self.body.out.channels

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        if s.channels < 4:
            return None
        half = s.channels // 2
        body, after = d.body(s.with_channels(half), same=True)
        even = (s.channels - half + after.channels) % 2 == 0
        return {"body": body, "shuffle": even and d.flag()} if body else None

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        a, b = x.tensor_split(2, dim=self.axis) if x.shape[self.axis] % 2 == 0 else self.uneven(x)
        y = torch.cat([b, self.body(a, raw)], self.axis)
        if self.shuffle:
            y = y.unflatten(self.axis, (2, self.out // 2)).transpose(self.axis, self.axis + 1)
            y = y.flatten(self.axis, self.axis + 1)
        return y

    def uneven(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Cut so that the first piece is the smaller one."""
        half = x.shape[self.axis] // 2
        return x.narrow(self.axis, 0, half), x.narrow(self.axis, half, x.shape[self.axis] - half)


@family("gated-body", nests=True)
class GatedBody(Step):
    """Multiply a body by a gate from its input (highway: t * body + (1 - t) * x)."""

    def __init__(self, s: Shape, scope: Scope, body: Body, highway: bool) -> None:
        super().__init__(s)
        self.body = Chain(body, s, scope)
        self.back = project(self.body.out, s.channels)
        self.gate = project(s, s.channels)
        self.highway = highway

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        body, _ = d.body(s, count=d.integer(1, 2), same=True)
        return {"body": body, "highway": d.flag()}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        t = torch.sigmoid(self.gate(x))
        y = self.back(self.body(x, raw))
        return t * y + (1 - t) * x if self.highway else t * y


@family("pyramid", ("image",), nests=True, frequency=2)
class Pyramid(Step):
    """Pool, run a body, enlarge, and join with or add to the input (U-Net, FPN)."""

    def __init__(self, s: Shape, scope: Scope, body: Body, join: bool, mode: str) -> None:
        super().__init__(s)
        small = Shape("image", (s.channels, s.dims[1] // 2, s.dims[2] // 2))
        self.body = Chain(body, small, scope)
        self.back = project(self.body.out, s.channels)
        self.join, self.mode, self.size = join, mode, s.positions

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        if min(s.positions) < 4:
            return None
        small = Shape("image", (s.channels, s.dims[1] // 2, s.dims[2] // 2))
        body, _ = d.body(small, same=True)
        return {"body": body, "join": d.flag(60), "mode": d.choice(("nearest", "bilinear"))}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        y = self.back(self.body(F.max_pool2d(x, 2), raw))
        y = F.interpolate(y, size=list(self.size), mode=self.mode)
        return torch.cat([x, y], 1) if self.join else x + y
