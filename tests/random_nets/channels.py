"""Data movement on channels: splits, slices, shuffles, packed gates, pads, rolls, repeats."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .core import CHANNELS_LAST, Drawing, Options, Raw, Shape, Step, activate, divisors, family, project


@family("split")
class Split(Step):
    """Cut the channels in pieces with torch.split, contract one, join them again in another order."""

    def __init__(self, s: Shape, sizes: tuple[int, ...], reverse: bool, which: int) -> None:
        super().__init__(s)
        self.part = project(s.with_channels(sizes[which]), sizes[which])
        self.sizes, self.reverse, self.which, self.axis = list(sizes), reverse, which, s.axis

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        first = d.integer(1, s.channels - 1)
        rest = s.channels - first
        sizes = (first, rest)
        if rest > 1 and d.flag():
            second = d.integer(1, rest - 1)
            sizes = (first, second, rest - second)
        return {"sizes": sizes, "reverse": d.flag(), "which": d.integer(0, len(sizes) - 1)}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        pieces = list(torch.split(x, self.sizes, dim=self.axis))
        pieces[self.which] = self.part(pieces[self.which])
        return torch.cat(pieces[::-1] if self.reverse else pieces, dim=self.axis)


@family("chunk")
class Chunk(Step):
    """Cut the channels in equal pieces and multiply, add or join them; the last piece may be smaller."""

    def __init__(self, s: Shape, pieces: int, style: str) -> None:
        super().__init__(s)
        self.pieces, self.style, self.axis = pieces, style, s.axis

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        equal = [k for k in divisors(s.channels) if s.channels // k >= 2 and k <= 4]
        if equal and d.flag(70):
            return {"pieces": d.choice(equal), "style": d.choice(("sum", "product", "join", "tensor_split"))}
        return {"pieces": d.choice((2, 3)), "style": "join"}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        if self.style == "tensor_split":
            pieces = torch.tensor_split(x, self.pieces, dim=self.axis)
        else:
            pieces = x.chunk(self.pieces, dim=self.axis)
        if self.style == "join":
            return torch.cat([torch.tanh(pieces[-1]), *pieces[:-1]], dim=self.axis)
        out = pieces[0]
        for piece in pieces[1:]:
            out = out * torch.tanh(piece) if self.style == "product" else out + piece
        return out


@family("slice")
class Slice(Step):
    """Take some of the channels: basic slices, steps, narrow, index_select, an index tensor."""

    def __init__(self, s: Shape, style: str, start: int, length: int) -> None:
        super().__init__(s)
        self.style, self.start, self.length, self.axis = style, start, length, s.axis
        index = torch.arange(s.channels).roll(start)[:length]
        self.register_buffer("index", index, persistent=start % 2 == 0)

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        if s.channels < 4:
            return None
        style = d.choice(("slice", "narrow", "step", "index_select", "index", "two"))
        start = d.integer(0, s.channels - 3)
        return {"style": style, "start": start, "length": d.integer(2, s.channels - start)}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        a, n = self.start, self.length
        if self.style == "narrow":
            return x.narrow(self.axis, a, n)
        if self.style == "index_select":
            return x.index_select(self.axis, self.get_buffer("index"))
        if self.style == "index":
            index = self.get_buffer("index")
            return x[:, index] if self.axis == 1 else x[..., index]
        if self.style == "step":
            return x[:, ::2] if self.axis == 1 else x[..., ::2]
        piece = x[:, a : a + n] if self.axis == 1 else x[..., a : a + n]
        if self.style == "two":  # a second use, of an overlapping slice
            return piece + (x[:, :n] if self.axis == 1 else x[..., :n])
        return piece


@family("select-stack")
class SelectStack(Step):
    """Take single channels by select and stack them; or unbind all and stack them in reverse."""

    def __init__(self, s: Shape, picks: tuple[int, ...], unbind: bool) -> None:
        super().__init__(s)
        self.picks, self.unbind, self.axis = picks, unbind, s.axis

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        picks = tuple(d.integer(0, s.channels - 1) for _ in range(d.integer(2, 5)))
        # one channel many times over is constant, and a normalisation after it gives nothing but zeros
        return {"picks": picks, "unbind": d.flag()} if len(set(picks)) > 1 else None

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        if self.unbind:
            return torch.stack(x.unbind(self.axis)[::-1], dim=self.axis)
        return torch.stack([x.select(self.axis, k) for k in self.picks], dim=self.axis)


@family("unbind-groups")
class UnbindGroups(Step):
    """View the channels as [g, C/g], take the groups apart by unbind, and combine them."""

    def __init__(self, s: Shape, groups: int, inner: bool, style: str) -> None:
        super().__init__(s)
        c = s.channels
        self.sizes = (c // groups, groups) if inner else (groups, c // groups)
        self.axis, self.inner, self.style = s.axis, inner, style

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        groups = [g for g in divisors(s.channels) if s.channels // g >= 2]
        if not groups:
            return None
        return {"groups": d.choice(groups), "inner": d.flag(), "style": d.choice(("unbind", "sum", "unflatten"))}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        over = self.axis + 1 if self.inner else self.axis
        y = x.unflatten(self.axis, self.sizes)
        if self.style == "sum":
            return y.sum(over)
        if self.style == "unflatten":
            return torch.tanh(y).flatten(self.axis, self.axis + 1)
        pieces = y.unbind(over)
        out = pieces[0]
        for piece in pieces[1:]:
            out = out - 0.5 * piece
        return out


@family("glu")
class GLU(Step):
    """Gate one half of the channels by the other: F.glu, or chunk and sigmoid."""

    def __init__(self, s: Shape, hidden: int, style: str) -> None:
        super().__init__(s)
        self.linear = project(s, 2 * hidden)
        self.axis, self.style, self.hidden = s.axis, style, hidden

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"hidden": d.integer(2, 8), "style": d.choice(("glu", "chunk", "split", "slices"))}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        y = self.linear(x)
        if self.style == "glu":
            return F.glu(y, self.axis)
        if self.style == "chunk":
            a, b = y.chunk(2, self.axis)
        elif self.style == "split":
            a, b = y.split(self.hidden, self.axis)
        elif self.axis == 1:
            a, b = y[:, : self.hidden], y[:, self.hidden :]
        else:
            a, b = y[..., : self.hidden], y[..., self.hidden :]
        return a * torch.sigmoid(b)


@family("swiglu", CHANNELS_LAST)
class SwiGLU(Step):
    """Gate with SiLU between contractions, both halves packed in one Linear or apart (Shazeer 2020)."""

    def __init__(self, s: Shape, hidden: int, packed: bool, bias: bool) -> None:
        super().__init__(s)
        self.packed = nn.Linear(s.channels, 2 * hidden, bias=bias) if packed else None
        self.gate = None if packed else nn.Linear(s.channels, hidden, bias=bias)
        self.up = None if packed else nn.Linear(s.channels, hidden, bias=bias)
        self.down = nn.Linear(hidden, s.channels, bias=bias)
        self.certain = [("packed.weight", 0)] if packed else [("gate.weight", 0), ("up.weight", 0)]

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"hidden": d.width(), "packed": d.flag(60), "bias": d.flag()}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        if self.packed is not None:
            a, b = self.packed(x).chunk(2, dim=-1)
            return self.down(F.silu(a) * b)
        assert self.gate is not None
        assert self.up is not None
        return self.down(F.silu(self.gate(x)) * self.up(x))


@family("channel-shuffle", frequency=2)
class ChannelShuffle(Step):
    """Shuffle channels between groups: view, transpose, reshape (ShuffleNet); or the op of that name."""

    def __init__(self, s: Shape, groups: int, builtin: bool) -> None:
        super().__init__(s)
        self.groups, self.axis, self.builtin, self.dims = groups, s.axis, builtin, s.dims
        self.channels = s.channels

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        groups = [g for g in divisors(s.channels) if g < s.channels]
        if not groups:
            return None
        return {"groups": d.choice(groups), "builtin": s.kind == "image" and d.flag(30)}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        if self.builtin:
            return F.channel_shuffle(x, self.groups)
        if self.axis == 1:
            b, rest = x.shape[0], x.shape[2:]
            y = x.view(b, self.groups, self.channels // self.groups, *rest)
            return y.transpose(1, 2).reshape(b, self.channels, *rest)
        y = x.reshape(*x.shape[:-1], self.groups, self.channels // self.groups)
        return y.transpose(-1, -2).flatten(-2)


@family("pixel-shuffle", ("image",), frequency=2)
class PixelShuffle(Step):
    """Move channels to space, or space to channels."""

    def __init__(self, s: Shape, up: bool, out: int) -> None:
        super().__init__(s)
        self.before = project(s, out * 4) if up else project(s, out)
        self.move = nn.PixelShuffle(2) if up else nn.PixelUnshuffle(2)

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        even = all(n % 2 == 0 for n in s.positions)
        if even and d.flag():
            return {"up": False, "out": d.integer(2, 5)}
        return {"up": True, "out": d.integer(2, 4)} if max(s.positions) <= 6 else None

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        return self.move(self.before(x))


@family("pad-channels")
class PadChannels(Step):
    """Append channels of zeros, before and after; of an image also stride over space (ResNet option A)."""

    def __init__(self, s: Shape, before: int, after: int, stride: bool) -> None:
        super().__init__(s)
        self.stride = stride
        nothing = [0, 0] * (len(s.dims) - s.axis)
        self.pad = [*nothing, before, after]

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        stride = s.kind == "image" and min(s.positions) > 3 and d.flag()
        return {"before": d.integer(0, 3), "after": d.integer(1, 4), "stride": stride}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        return F.pad(x[:, :, ::2, ::2] if self.stride else x, self.pad)


@family("option-a-residual", ("image",))
class OptionAResidual(Step):
    """Add a strided block to the strided input padded with channels of zeros (He 2016, option A)."""

    def __init__(self, s: Shape, grow: int, hidden: int) -> None:
        super().__init__(s)
        self.first = nn.Conv2d(s.channels, hidden, 3, stride=2, padding=1)
        self.second = nn.Conv2d(hidden, s.channels + 2 * grow, 3, padding=1)
        self.grow = grow
        self.certain = [("first.weight", 0)]

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"grow": d.integer(1, 3), "hidden": d.width()} if min(s.positions) > 2 else None

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        y = self.second(F.relu(self.first(x)))
        return F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.grow, self.grow)))


@family("roll-channels")
class RollChannels(Step):
    """Rotate or reverse the channels; joined with the original on demand."""

    def __init__(self, s: Shape, shift: int, flip: bool, add: bool) -> None:
        super().__init__(s)
        self.shift, self.flip, self.add, self.axis = shift, flip, add, s.axis

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"shift": d.integer(1, s.channels - 1), "flip": d.flag(40), "add": d.flag(40)}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        y = x.flip(self.axis) if self.flip else torch.roll(x, self.shift, self.axis)
        return 0.7 * x + y if self.add else y


@family("repeat-channels")
class RepeatChannels(Step):
    """Repeat the channels: repeat, repeat_interleave, tile, or expand and reshape."""

    def __init__(self, s: Shape, times: int, style: str) -> None:
        super().__init__(s)
        self.times, self.style, self.axis = times, style, s.axis

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        if s.channels > 8:
            return None
        return {"times": d.choice((2, 3)), "style": d.choice(("repeat", "interleave", "expand", "cat"))}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        if self.style == "interleave":
            return x.repeat_interleave(self.times, dim=self.axis)
        if self.style == "cat":
            return torch.cat([x] * self.times, dim=self.axis)
        if self.style == "repeat":
            sizes = [1] * x.dim()
            sizes[self.axis] = self.times
            return x.repeat(sizes)
        sizes = [-1] * (x.dim() + 1)
        sizes[self.axis + 1] = self.times
        return x.unsqueeze(self.axis + 1).expand(sizes).flatten(self.axis, self.axis + 1)


@family("broadcast-channel")
class BroadcastChannel(Step):
    """Contract to one number a position and broadcast it over the channels by expand or by multiplication."""

    def __init__(self, s: Shape, activation: str, expand: bool) -> None:
        super().__init__(s)
        self.score = project(s, 1)
        self.activation, self.expand = activation, expand

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"activation": d.activation(), "expand": d.flag()}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        gate = activate(self.activation, self.score(x))
        return x * gate.expand_as(x) if self.expand else x * gate


@family("channels-as-heads", CHANNELS_LAST)
class ChannelsAsHeads(Step):
    """Contract each of g groups of channels with its own matrix: einsum or a product with [g, d, e]."""

    def __init__(self, s: Shape, groups: int, out: int, einsum: bool) -> None:
        super().__init__(s)
        d = s.channels // groups
        self.weight = nn.Parameter(torch.zeros(groups, d, out))
        self.groups, self.einsum = groups, einsum

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        groups = [g for g in divisors(s.channels) if s.channels // g >= 2]
        return {"groups": d.choice(groups), "out": d.integer(2, 4), "einsum": d.flag()} if groups else None

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        y = x.unflatten(-1, (self.groups, -1))
        if self.einsum:
            return torch.einsum("...gd,gde->...ge", y, self.weight).flatten(-2)
        return torch.matmul(y.unsqueeze(-2), self.weight).squeeze(-2).flatten(-2)
