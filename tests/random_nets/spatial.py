"""Ops over positions and between kinds: pools, pads, rolls, windows, flattens, mixers, tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .core import CHANNELS_FIRST, Drawing, Options, Raw, Shape, Step, activate, divisors, family, project

POSITIONED = ("image", "signal", "seq", "grid")


@family("pool", CHANNELS_FIRST, frequency=2)
class Pool(Step):
    """Pool by maximum or mean, with or without stride and padding; or adaptively to a given size."""

    def __init__(self, s: Shape, style: str, kernel: int) -> None:
        super().__init__(s)
        two = s.kind == "image"
        options: Options = {"kernel_size": kernel, "stride": 1 if kernel == 3 else 2, "padding": kernel // 3}
        if style == "max":
            self.pool = (nn.MaxPool2d if two else nn.MaxPool1d)(**options)
        elif style == "avg":
            self.pool = (nn.AvgPool2d if two else nn.AvgPool1d)(**options)
        else:
            adaptive = {"adaptive": (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)}
            classes = adaptive.get(style, (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d))
            self.pool = classes[two](kernel)

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        if min(s.positions) < 4:
            return None
        return {"style": d.choice(("max", "avg", "adaptive", "adaptive-max")), "kernel": d.choice((2, 3))}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        return self.pool(x)


@family("global-pool", POSITIONED)
class GlobalPool(Step):
    """Reduce the positions to one vector: mean, sum, maximum, adaptive pool and flatten, the last token."""

    def __init__(self, s: Shape, style: str) -> None:
        super().__init__(s)
        self.axes, self.style, self.first = s.position_axes, style, s.axis == 1
        self.scale = float(torch.Size(s.positions).numel()) ** 0.5
        self.kind, self.source = "vec", s.kind

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        styles = ["mean", "sum", "max", "std"] if not d.zero else ["mean", "sum", "max"]
        return {"style": d.choice([*styles, "adaptive" if s.kind == "image" else "mean", "last"])}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        if self.style == "mean":
            return x.mean(self.axes)
        if self.style == "sum":
            return x.sum(self.axes) / self.scale
        if self.style == "max":
            return x.amax(self.axes)
        if self.style == "std":
            return (x.var(self.axes, correction=0) + 1e-2).sqrt()
        if self.style == "adaptive":
            return torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1)
        return x.flatten(2)[:, :, -1] if self.first else x.flatten(1, -2)[:, 0]


@family("attention-pool", POSITIONED)
class AttentionPool(Step):
    """Average the positions with weights softmax(score(x))."""

    def __init__(self, s: Shape) -> None:
        super().__init__(s)
        self.score = project(s, 1)
        self.first = s.axis == 1
        self.kind = "vec"

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        weight = self.score(x)
        if self.first:
            weight = weight.flatten(2).softmax(-1)
            return (x.flatten(2) * weight).sum(-1)
        weight = weight.flatten(1, -2).softmax(1)
        return torch.matmul(weight.transpose(1, 2), x.flatten(1, -2)).squeeze(1)


@family("flatten-linear", POSITIONED, frequency=2)
class FlattenLinear(Step):
    """Flatten, channels first or last, and contract: each channel owns a block or a comb of columns."""

    def __init__(self, s: Shape, out: int, style: str) -> None:
        super().__init__(s)
        self.linear = nn.Linear(torch.Size(s.dims).numel(), out)
        self.style, self.kind, self.size = style, "vec", self.linear.in_features
        self.source = s.kind

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"out": d.width(), "style": d.choice(("flatten", "permuted", "view", "reshape", "spatial"))}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        if self.style == "permuted":
            order = {"image": (0, 2, 3, 1), "grid": (0, 3, 1, 2)}.get(self.source, (0, 2, 1))
            return self.linear(x.permute(order).flatten(1))
        if self.style == "view":
            return self.linear(x.contiguous().view(-1, self.size))
        if self.style == "reshape":
            return self.linear(x.reshape(x.size(0), -1))
        if self.style == "spatial":  # another order of the positions
            return self.linear(torch.flatten(x.transpose(1, x.dim() - 1), 1))
        return self.linear(torch.flatten(x, 1))


@family("unflatten", ("vec",), frequency=2)
class Unflatten(Step):
    """Contract a vector to a small image or sequence (the first layer of a generator)."""

    def __init__(self, s: Shape, kind: str, sizes: tuple[int, ...]) -> None:
        super().__init__(s)
        self.linear = nn.Linear(s.channels, torch.Size(sizes).numel())
        self.sizes, self.kind = sizes, kind

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        kind = d.choice(("image", "seq", "signal"))
        c = d.choice((4, 6, 3))
        return {"kind": kind, "sizes": {"image": (c, 3, 3), "seq": (4, c), "signal": (c, 4)}[kind]}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        return self.linear(x).view(-1, *self.sizes)


@family("space-movement", POSITIONED)
class SpaceMovement(Step):
    """Move positions: roll, flip, strided slices, cut, pad, swap of height and width."""

    def __init__(self, s: Shape, style: str, constant: float) -> None:
        super().__init__(s)
        self.style, self.axes, self.first = style, s.position_axes, s.axis == 1
        self.constant = constant

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        if min(s.positions) < 3:
            return None
        styles = ["roll", "flip", "cut", "pad", "flip-add", "index"]
        if s.kind == "image":
            styles += ["stride", "reflect", "transpose"]
        return {"style": d.choice(styles), "constant": 0.5 if d.free(30) else 0.0}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        if self.style == "roll":
            return torch.roll(x, [1] * len(self.axes), self.axes)
        if self.style == "flip":
            return x.flip(self.axes)
        if self.style == "flip-add":
            return 0.5 * (x + x.flip(self.axes[-1]))
        if self.style == "cut":
            return x[:, :, 1:] if self.first else x[:, :-1]
        if self.style == "index":
            axis = self.axes[0]
            return x.index_select(axis, torch.tensor([1, 0, 2, 1], device=x.device))
        if self.style == "stride":
            return x[..., ::2, ::2]
        if self.style == "reflect":
            return F.pad(x, (1, 1, 1, 1), mode="reflect")
        if self.style == "transpose":
            return x.transpose(2, 3)
        pad = (1, 0) if self.first else (0, 0, 1, 1)
        return F.pad(x, pad, value=self.constant)


@family("upsample", CHANNELS_FIRST, frequency=2)
class Upsample(Step):
    """Enlarge by interpolation."""

    def __init__(self, s: Shape, mode: str) -> None:
        super().__init__(s)
        linear = "bilinear" if s.kind == "image" else "linear"
        self.mode = linear if mode == "linear" else "nearest"

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"mode": d.choice(("nearest", "linear"))} if max(s.positions) <= 5 else None

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode=self.mode)


@family("change-kind", POSITIONED)
class ChangeKind(Step):
    """Go to another layout of the same numbers: [B,C,H,W], [B,H,W,C], [B,T,C], [B,C,L]."""

    def __init__(self, s: Shape, to: str) -> None:
        super().__init__(s)
        self.source, self.kind, self.dims = s.kind, to, s.dims

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        targets = {"image": ("grid", "seq", "signal"), "grid": ("image", "seq"), "seq": ("signal",), "signal": ("seq",)}
        return {"to": d.choice(targets[s.kind])}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        if self.source == "image":
            if self.kind == "signal":
                return x.flatten(2)
            y = x.permute(0, 2, 3, 1)
            return y if self.kind == "grid" else y.reshape(x.shape[0], -1, self.dims[0])
        if self.source == "grid":
            return x.permute(0, 3, 1, 2) if self.kind == "image" else x.flatten(1, 2)
        return x.transpose(1, 2)


@family("windows", ("grid", "image"), frequency=3)
class Windows(Step):
    """Cut in windows, contract in each, merge again; the windows are rolled before and after (Swin)."""

    def __init__(self, s: Shape, window: tuple[int, int], shift: bool, activation: str) -> None:
        super().__init__(s)
        c = s.channels
        self.linear = nn.Linear(c, c)
        self.mix = nn.Linear(window[0] * window[1], window[0] * window[1], bias=False)
        self.window, self.shift, self.grid = window, shift, s.kind == "grid"
        self.sizes, self.channels, self.activation = s.positions, c, activation

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        if max(s.positions) < 4:
            return None
        window = tuple(d.choice([k for k in divisors(n, 1) if k <= 4]) for n in s.positions)
        return {"window": window, "shift": d.flag(), "activation": d.activation()}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        x = x if self.grid else x.permute(0, 2, 3, 1)
        (h, w), (p, q), c = self.sizes, self.window, self.channels
        if self.shift:
            x = torch.roll(x, (-1, -1), (1, 2))
        y = x.reshape(-1, h // p, p, w // q, q, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, p * q, c)
        y = activate(self.activation, self.linear(y))
        y = y + self.mix(y.transpose(1, 2)).transpose(1, 2)
        y = y.view(-1, h // p, w // q, p, q, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, h, w, c)
        if self.shift:
            y = torch.roll(y, (1, 1), (1, 2))
        return y if self.grid else y.permute(0, 3, 1, 2)


@family("space-to-channels", ("grid", "seq"), frequency=3)
class SpaceToChannels(Step):
    """Join neighbouring positions over channels and contract (patch merging)."""

    def __init__(self, s: Shape, out: int, style: str) -> None:
        super().__init__(s)
        self.times = 4 if s.kind == "grid" else 2
        self.linear = nn.Linear(self.times * s.channels, out)
        self.style, self.width = style, s.channels * 2

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        if any(n % 2 for n in s.positions):
            return None
        return {"out": d.width(), "style": d.choice(("slices", "reshape") if s.kind == "seq" else ("slices",))}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        if self.times == 4:
            pieces = [x[:, i::2, j::2] for j in range(2) for i in range(2)]
        elif self.style == "reshape":
            return self.linear(x.reshape(x.shape[0], -1, self.width))
        else:
            pieces = [x[:, 0::2], x[:, 1::2]]
        return self.linear(torch.cat(pieces, -1))


@family("mixer", ("seq", "signal", "image"))
class Mixer(Step):
    """Contract over positions with the channels as rows: Linear on the transposed activation (MLP-Mixer)."""

    def __init__(self, s: Shape, hidden: int, activation: str, bias: bool, residual: bool) -> None:
        super().__init__(s)
        n = torch.Size(s.positions).numel()
        self.first, self.second = nn.Linear(n, hidden, bias=bias), nn.Linear(hidden, n, bias=bias)
        self.activation, self.seq, self.residual = activation, s.kind == "seq", residual
        self.certain = [("first.weight", 0)]

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        if torch.Size(s.positions).numel() > 40:
            return None
        options: Options = {"hidden": d.width(), "activation": d.activation()}
        return options | {"bias": d.free(70), "residual": d.flag(60)}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        y = x.transpose(1, 2) if self.seq else x.flatten(2)
        y = self.second(activate(self.activation, self.first(y)))
        y = y.transpose(1, 2) if self.seq else y.view(x.shape)
        return x + y if self.residual else y


@family("class-token", ("seq",), keeps_zero=False, frequency=2)
class ClassToken(Step):
    """Put learned tokens before the sequence, or take the first one as a vector after contracting."""

    def __init__(self, s: Shape, tokens: int, position: bool, last: bool) -> None:
        super().__init__(s)
        self.token = nn.Parameter(torch.zeros(1, tokens, s.channels))
        self.position = nn.Parameter(torch.zeros(1, s.dims[0] + tokens, s.channels)) if position else None
        self.last = last

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"tokens": d.choice((1, 2)), "position": d.flag(), "last": d.flag(30)}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        token = self.token.expand(x.shape[0], -1, -1)
        x = torch.cat([x, token] if self.last else [token, x], dim=1)
        return x if self.position is None else x + self.position


@family("causal-mean", ("seq", "signal"))
class CausalMean(Step):
    """Average over the past: a product with a constant lower-triangular matrix, or a running sum over time."""

    def __init__(self, s: Shape, running: bool) -> None:
        super().__init__(s)
        self.seq, self.running = s.kind == "seq", running
        n = s.positions[0]
        matrix = torch.tril(torch.ones(n, n)) / torch.arange(1, n + 1)[:, None]
        self.register_buffer("average", matrix)

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"running": d.flag()}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        if self.running:
            return torch.cumsum(x, 1 if self.seq else 2) * 0.4
        average = self.get_buffer("average")
        return torch.matmul(average, x) if self.seq else torch.matmul(x, average.t())
