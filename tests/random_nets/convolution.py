"""Convolutions: plain, grouped, depthwise, transposed, separable, patchify."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .core import CHANNELS_FIRST, Drawing, Options, Raw, Shape, Step, activate, divisors, family


def conv_class(s: Shape) -> type[nn.Conv1d] | type[nn.Conv2d]:
    """Pick the convolution of the kind."""
    return nn.Conv2d if s.kind == "image" else nn.Conv1d


@family("conv", CHANNELS_FIRST, frequency=5)
class Conv(Step):
    """Convolve, with every spelling of padding."""

    def __init__(self, s: Shape, out: int, kernel: int, **options: Any) -> None:
        super().__init__(s)
        self.conv = conv_class(s)(s.channels, out, kernel, **options)

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        kernel = d.choice((1, 3))
        options: Options = {"out": d.width(), "kernel": kernel, "bias": d.flag(60)}
        if kernel == 1:
            return options if min(s.positions) < 3 else options | {"stride": d.choice((1, 1, 2))}
        style = d.choice(("one", "same", "stride", "dilated", "valid", "circular"))
        if style == "one" or min(s.positions) < 4:
            return options | {"padding": 1}
        if style == "same":
            return options | {"padding": "same", "dilation": d.choice((1, 2))}
        if style == "stride":
            return options | {"padding": 1, "stride": 2}
        if style == "dilated":
            return options | {"padding": 2, "dilation": 2}
        if style == "valid":
            return options | {"padding": "valid"}
        return options | {"padding": 1, "padding_mode": d.choice(("circular", "reflect", "replicate"))}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        return self.conv(x)


@family("grouped-conv", CHANNELS_FIRST, frequency=3)
class GroupedConv(Step):
    """Convolve in groups."""

    def __init__(self, s: Shape, out: int, groups: int, kernel: int, bias: bool) -> None:
        super().__init__(s)
        self.conv = conv_class(s)(s.channels, out, kernel, padding=kernel // 2, groups=groups, bias=bias)

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        groups = [g for g in divisors(s.channels) if g < s.channels and g <= 4]
        if not groups:
            return None
        g = d.choice(groups)
        return {"out": g * d.integer(1, 3), "groups": g, "kernel": d.choice((1, 3)), "bias": d.flag()}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        return self.conv(x)


@family("depthwise-conv", CHANNELS_FIRST, frequency=3)
class DepthwiseConv(Step):
    """Convolve each channel on its own, with 1 or 2 outputs for each."""

    def __init__(self, s: Shape, multiplier: int, kernel: int, bias: bool) -> None:
        super().__init__(s)
        c = s.channels
        self.conv = conv_class(s)(c, c * multiplier, kernel, padding=kernel // 2, groups=c, bias=bias)

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"multiplier": d.choice((1, 2)), "kernel": d.choice((3, 1)), "bias": d.free()}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        return self.conv(x)


@family("transposed-conv", CHANNELS_FIRST, frequency=3)
class TransposedConv(Step):
    """Convolve transposed, sometimes in groups."""

    def __init__(self, s: Shape, out: int, groups: int, stride: int, bias: bool) -> None:
        super().__init__(s)
        cls = nn.ConvTranspose2d if s.kind == "image" else nn.ConvTranspose1d
        extra = stride - 1
        self.conv = cls(s.channels, out, 3, padding=1, stride=stride, output_padding=extra, groups=groups, bias=bias)

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        groups = d.choice([1, *(g for g in divisors(s.channels) if g <= 4)])
        stride = 2 if max(s.positions) <= 5 and d.flag() else 1
        return {"out": groups * d.integer(2, 4), "groups": groups, "stride": stride, "bias": d.flag()}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        return self.conv(x)


@family("separable-conv", CHANNELS_FIRST, frequency=2)
class SeparableConv(Step):
    """Expand, convolve depthwise, project: the inverted residual of MobileNetV2 without its shortcut."""

    def __init__(self, s: Shape, hidden: int, out: int, norm: bool, activation: str, bias: bool) -> None:
        super().__init__(s)
        conv = conv_class(s)
        self.expand = conv(s.channels, hidden, 1, bias=False)
        norm_class = nn.BatchNorm2d if s.kind == "image" else nn.BatchNorm1d
        self.norm = norm_class(hidden) if norm else nn.Identity()
        self.depthwise = conv(hidden, hidden, 3, padding=1, groups=hidden, bias=bias)
        self.project = conv(hidden, out, 1)
        self.activation = activation
        self.certain = [("expand.weight", 0)]

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        out = d.choice((s.channels, d.width()))
        options: Options = {"hidden": d.width(), "out": out, "norm": d.free(70)}
        return options | {"activation": d.activation(), "bias": d.free()}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        x = activate(self.activation, self.norm(self.expand(x)))
        return self.project(activate(self.activation, self.depthwise(x)))


@family("patchify", ("image",))
class Patchify(Step):
    """Turn an image into a sequence of patches: convolution with kernel = stride, flatten(2), transpose."""

    def __init__(self, s: Shape, out: int, size: int) -> None:
        super().__init__(s)
        self.kind = "seq"
        self.conv = nn.Conv2d(s.channels, out, size, stride=size)

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        if min(s.positions) < 2:
            return None
        return {"out": d.width(), "size": 2}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        return self.conv(x).flatten(2).transpose(1, 2)


@family("conv-bn-act", CHANNELS_FIRST, frequency=5)
class ConvNormActivation(Step):
    """Convolve without bias, normalise, activate in place: the commonest block there is."""

    def __init__(self, s: Shape, out: int, kernel: int, inplace: bool) -> None:
        super().__init__(s)
        self.conv = conv_class(s)(s.channels, out, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(out) if s.kind == "image" else nn.BatchNorm1d(out)
        self.act = nn.ReLU(inplace=inplace)

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return None if d.zero else {"out": d.width(), "kernel": d.choice((3, 1)), "inplace": d.flag(70)}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        return self.act(self.norm(self.conv(x)))
