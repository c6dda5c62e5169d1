"""Normalisations, from modules and written by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .core import CHANNELS_FIRST, CHANNELS_LAST, Drawing, Options, Raw, Shape, Step, divisors, family


@family("batch-norm", keeps_zero=False, frequency=3)
class BatchNorm(Step):
    """Normalise each channel over the batch; with or without affine and running statistics."""

    def __init__(self, s: Shape, affine: bool, running: bool) -> None:
        super().__init__(s)
        cls = nn.BatchNorm2d if s.kind in ("image", "grid") else nn.BatchNorm1d
        self.norm = cls(s.channels, affine=affine, track_running_stats=running)
        self.move = s.kind in ("seq", "grid")

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"affine": d.flag(80), "running": s.kind == "vec" or d.flag(85)}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        return self.norm(x.movedim(-1, 1)).movedim(1, -1) if self.move else self.norm(x)


@family("flat-batch-norm", ("seq",), keeps_zero=False)
class FlatBatchNorm(Step):
    """Fold time into the batch, normalise, unfold."""

    def __init__(self, s: Shape) -> None:
        super().__init__(s)
        self.norm = nn.BatchNorm1d(s.channels)

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        b, t, c = x.shape
        return self.norm(x.reshape(b * t, c)).view(b, t, c)


@family("layer-norm", CHANNELS_LAST, keeps_zero=False, frequency=2)
class LayerNorm(Step):
    """Normalise over the channels in the last dim."""

    def __init__(self, s: Shape, affine: bool, bias: bool) -> None:
        super().__init__(s)
        self.norm = nn.LayerNorm(s.channels, elementwise_affine=affine, bias=bias)

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"affine": d.flag(80), "bias": d.flag(80)}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        return self.norm(x)


@family("layer-norm-2d", ("image",), keeps_zero=False, frequency=2)
class LayerNorm2d(Step):
    """Normalise an image over its channels, permuted there and back; or over all of [C, H, W]."""

    def __init__(self, s: Shape, whole: bool) -> None:
        super().__init__(s)
        self.whole = whole
        self.norm = nn.LayerNorm(list(s.dims) if whole else s.channels)

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"whole": d.flag(40)}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        if self.whole:
            return self.norm(x)
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@family("group-norm", ("image", "signal", "vec"), keeps_zero=False)
class GroupNorm(Step):
    """Normalise over groups of channels."""

    def __init__(self, s: Shape, groups: int, affine: bool) -> None:
        super().__init__(s)
        self.norm = nn.GroupNorm(groups, s.channels, affine=affine)

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        # one channel a group and no positions is degenerate: every number becomes zero
        top = s.channels if s.positions and min(s.positions) > 1 else s.channels - 1
        return {"groups": d.choice([1, *(g for g in divisors(s.channels) if g <= top)]), "affine": d.flag(70)}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        return self.norm(x)


@family("instance-norm", CHANNELS_FIRST)
class InstanceNorm(Step):
    """Normalise each channel of each example over its positions."""

    def __init__(self, s: Shape, affine: bool, running: bool) -> None:
        super().__init__(s)
        cls = nn.InstanceNorm2d if s.kind == "image" else nn.InstanceNorm1d
        self.norm = cls(s.channels, affine=affine, track_running_stats=running, eps=1e-3)

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        if min(s.positions) < 2:
            return None
        return {"affine": d.free(), "running": d.free(25)}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        return self.norm(x)


@family("rms-norm", CHANNELS_LAST, keeps_zero=False)
class RMSNorm(Step):
    """Divide by the root mean square over channels: the module, or pow-mean-rsqrt by hand."""

    def __init__(self, s: Shape, manual: bool) -> None:
        super().__init__(s)
        self.norm = nn.RMSNorm(s.channels, eps=1e-3)
        self.manual = manual

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"manual": d.flag()}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        if not self.manual:
            return self.norm(x)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3) * self.norm.weight


@family("layer-norm-by-hand", keeps_zero=False, frequency=1)
class LayerNormByHand(Step):
    """Subtract the mean over channels and divide by the deviation, in small ops."""

    def __init__(self, s: Shape, style: str) -> None:
        super().__init__(s)
        self.weight = nn.Parameter(torch.ones(s.broadcast()))
        self.axis, self.style = s.axis, style

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"style": d.choice(("var", "pow", "var_mean"))}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        if self.style == "var_mean":
            var, mean = torch.var_mean(x, self.axis, keepdim=True, correction=0)
            return (x - mean) / torch.sqrt(var + 1e-3) * self.weight
        mean = x.mean(self.axis, keepdim=True)
        if self.style == "var":
            var = x.var(self.axis, keepdim=True, unbiased=False)
        else:
            var = (x - mean).pow(2).mean(self.axis, keepdim=True)
        return self.weight * (x - mean) * (var + 1e-3).rsqrt()


@family("center", keeps_zero=False)
class Center(Step):
    """Subtract the mean over channels."""

    def __init__(self, s: Shape) -> None:
        super().__init__(s)
        self.axis = s.axis

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        return x - x.mean(self.axis, keepdim=True)


@family("normalize")
class Normalize(Step):
    """Divide by the Euclidean norm over channels, as F.normalize or by hand."""

    def __init__(self, s: Shape, manual: bool) -> None:
        super().__init__(s)
        self.axis, self.manual = s.axis, manual
        self.scale = s.channels**0.5

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"manual": d.flag()}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        if self.manual:
            return x / (x.norm(dim=self.axis, keepdim=True) + 0.05) * self.scale
        return F.normalize(x, dim=self.axis, eps=0.05) * self.scale
