"""Ops that mix their channels so that a pruner must freeze them and say so; drawn in few networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .core import Drawing, Options, Raw, Shape, Step, divisors, family


@family("softmax-channels", freezes=True, keeps_zero=False, frequency=6)
class SoftmaxChannels(Step):
    """Gate the channels by a softmax over them."""

    def __init__(self, s: Shape, log: bool) -> None:
        super().__init__(s)
        self.axis, self.channels, self.log = s.axis, s.channels, log

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"log": d.flag(30)}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        if self.log:
            return x + 0.3 * F.log_softmax(x, self.axis)
        return x * F.softmax(x, self.axis) * self.channels


@family("ordered-channels", freezes=True, keeps_zero=False, frequency=6)
class OrderedChannels(Step):
    """Sort, accumulate, take the largest, or compare with the largest channel."""

    def __init__(self, s: Shape, style: str) -> None:
        super().__init__(s)
        self.axis, self.style, self.channels = s.axis, style, s.channels

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"style": d.choice(("cumsum", "sort", "topk", "argmax", "amax", "logsumexp", "diff", "gather"))}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        a = self.axis
        if self.style == "cumsum":
            return torch.cumsum(x, a) * 0.3
        if self.style == "sort":
            return torch.sort(x, dim=a).values
        if self.style == "topk":
            return torch.topk(x, max(2, self.channels // 2), dim=a).values
        if self.style == "argmax":
            best = torch.argmax(x, dim=a, keepdim=True)
            return x + 0.1 * best.to(x.dtype)
        if self.style == "gather":
            return x - torch.gather(x, a, x.argmin(a, keepdim=True))
        if self.style == "diff":
            return torch.diff(x, dim=a) if self.channels > 2 else x
        reduced = x.amax(a, keepdim=True) if self.style == "amax" else torch.logsumexp(x, a, keepdim=True)
        return x - 0.5 * reduced


@family("maxout", freezes=True, keeps_zero=False, frequency=6)
class Maxout(Step):
    """Take the largest of each group of channels (Goodfellow 2013)."""

    def __init__(self, s: Shape, pieces: int) -> None:
        super().__init__(s)
        self.axis, self.pieces = s.axis, pieces

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        pieces = [k for k in divisors(s.channels) if s.channels // k >= 2]
        return {"pieces": d.choice(pieces)} if pieces else None

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        return x.unflatten(self.axis, (-1, self.pieces)).amax(self.axis + 1)


@family("local-response-norm", ("image", "signal"), freezes=True, keeps_zero=False, frequency=6)
class LocalResponseNorm(Step):
    """Divide by the energy of the neighbouring channels (AlexNet)."""

    def __init__(self, s: Shape) -> None:
        super().__init__(s)
        self.norm = nn.LocalResponseNorm(3, alpha=0.5)

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        return self.norm(x)


@family("bilinear", ("vec", "seq", "grid"), freezes=True, keeps_zero=False, frequency=6)
class Bilinear(Step):
    """Contract two activations with a tensor of three dims."""

    def __init__(self, s: Shape, out: int) -> None:
        super().__init__(s)
        self.bilinear = nn.Bilinear(s.channels, s.channels, out)

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"out": d.width()}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        return self.bilinear(torch.tanh(x), torch.tanh(x.flip(-1)))


@family("unfold", ("image",), freezes=True, keeps_zero=False, frequency=6)
class Unfold(Step):
    """Unfold patches into channels and contract them (im2col by hand)."""

    def __init__(self, s: Shape, out: int) -> None:
        super().__init__(s)
        self.kind = "seq"
        self.linear = nn.Linear(s.channels * 4, out)

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"out": d.width()} if min(s.positions) >= 2 else None

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        return self.linear(F.unfold(x, 2, stride=2).transpose(1, 2))


@family("conv-over-channels", ("seq", "vec"), freezes=True, keeps_zero=False, frequency=6)
class ConvOverChannels(Step):
    """Slide a small kernel over the channels (ECA), so that neighbours matter."""

    def __init__(self, s: Shape) -> None:
        super().__init__(s)
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)
        self.seq = s.kind == "seq"

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        pooled = x.mean(1, keepdim=True) if self.seq else x.unsqueeze(1)
        gate = torch.sigmoid(self.conv(pooled))
        return x * gate if self.seq else x * gate.squeeze(1)
