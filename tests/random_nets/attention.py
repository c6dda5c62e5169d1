"""Attention in its many spellings; every width inside is heads x head_dim."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .core import Drawing, Options, Raw, Shape, Step, family, project

SEQ = ("seq",)


def heads(d: Drawing) -> Options:
    """Draw a number of heads and their width."""
    return {"heads": d.choice((2, 3, 1, 4)), "width": d.choice((2, 4, 3))}


def merge(x: Tensor) -> Tensor:
    """Join the heads: [B, h, T, d] to [B, T, h*d]."""
    return x.transpose(1, 2).flatten(2)


@family("attention-packed", SEQ, frequency=3)
class PackedAttention(Step):
    """Attend with q, k, v packed in one Linear, taken apart in one of the usual ways (ViT)."""

    def __init__(self, s: Shape, heads: int, width: int, style: str, causal: bool, dropout: bool) -> None:
        super().__init__(s)
        self.qkv = nn.Linear(s.channels, 3 * heads * width)
        self.proj = nn.Linear(heads * width, s.channels)
        self.heads, self.width, self.style, self.causal = heads, width, style, causal
        self.p = 0.1 if dropout else 0.0
        if heads > 1 or width > 1:
            self.certain = [("qkv.weight", 0)]

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        style = d.choice(("permute", "chunk", "unbind", "per-head", "split"))
        return heads(d) | {"style": style, "causal": d.flag(25), "dropout": d.flag(40)}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        b, t, _ = x.shape
        h, w = self.heads, self.width
        y = self.qkv(x)
        if self.style == "permute":
            q, k, v = y.reshape(b, t, 3, h, w).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.style == "unbind":
            q, k, v = (z.transpose(1, 2) for z in y.view(b, t, 3, h, w).unbind(2))
        elif self.style == "per-head":  # [heads, 3, width]: the three are neighbours in each head (GPT-NeoX)
            q, k, v = y.view(b, t, h, 3 * w).transpose(1, 2).chunk(3, dim=-1)
        else:
            pieces = y.chunk(3, -1) if self.style == "chunk" else y.split(h * w, -1)
            q, k, v = (z.view(b, t, h, w).transpose(1, 2) for z in pieces)
        p = self.p if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=self.causal)
        return self.proj(out.transpose(1, 2).reshape(b, t, h * w))


@family("attention-separate", SEQ, frequency=3)
class SeparateAttention(Step):
    """Attend with three Linears; by sdpa, by hand, or by einsum; v may have another width."""

    def __init__(self, s: Shape, heads: int, width: int, value: int, style: str, mask: bool, norm: bool) -> None:
        super().__init__(s)
        c = s.channels
        self.q, self.k = nn.Linear(c, heads * width), nn.Linear(c, heads * width, bias=False)
        self.v = nn.Linear(c, heads * value)
        self.out = nn.Linear(heads * value, c)
        self.q_norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.dropout = nn.Dropout(0.1)
        self.heads, self.style, self.scale = heads, style, width**-0.5
        visible = torch.ones(s.dims[0], s.dims[0]).tril().bool()
        self.visible: Tensor | None
        self.register_buffer("visible", visible if mask else None, persistent=False)
        self.certain = [("v.weight", 0)]

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        options = heads(d) | {"value": d.choice((2, 4, 3)), "style": d.choice(("sdpa", "hand", "einsum", "baddbmm"))}
        return options | {"mask": d.flag(40), "norm": d.free(20)}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        b, t, _ = x.shape
        h = self.heads
        q = self.q_norm(self.q(x).view(b, t, h, -1).transpose(1, 2))
        k, v = (layer(x).unflatten(-1, (h, -1)).transpose(1, 2) for layer in (self.k, self.v))
        if self.style == "sdpa":
            return self.out(merge(F.scaled_dot_product_attention(q, k, v, attn_mask=self.visible)))
        if self.style == "einsum":
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * self.scale
        elif self.style == "baddbmm":  # heads folded into the batch
            scores = torch.bmm(q.flatten(0, 1) * self.scale, k.flatten(0, 1).transpose(1, 2)).unflatten(0, (b, h))
        else:
            scores = (q @ k.transpose(-2, -1)) * self.scale
        if self.visible is not None:
            scores = scores.masked_fill(~self.visible, float("-inf"))
        weights = self.dropout(torch.softmax(scores, dim=-1))
        if self.style == "einsum":
            return self.out(torch.einsum("bhqk,bhkd->bqhd", weights, v).reshape(b, t, -1))
        return self.out(merge(weights @ v))


@family("multihead-attention", SEQ)
class MultiheadAttention(Step):
    """Attend with nn.MultiheadAttention, batch first or second, to itself or to a second input."""

    def __init__(self, s: Shape, heads: int, batch_first: bool, weights: bool, context: int, bias: bool) -> None:
        super().__init__(s)
        options: Options = {"kdim": context, "vdim": context} if context else {}
        self.attention = nn.MultiheadAttention(
            s.channels, heads, dropout=0.1, bias=bias, batch_first=batch_first, **options
        )
        self.batch_first, self.weights, self.context = batch_first, weights, bool(context)

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        count = d.choice([h for h in (2, 3, 1, 4) if s.channels % h == 0])
        context = d.scope["context"].channels if "context" in d.scope and d.flag(40) else 0
        options: Options = {"heads": count, "batch_first": d.flag(60), "weights": d.flag(30)}
        return options | {"context": context, "bias": d.flag(80)}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        other = raw["context"] if self.context else x
        if self.batch_first:
            return self.attention(x, other, other, need_weights=self.weights)[0]
        x, other = x.transpose(0, 1), other.transpose(0, 1)
        return self.attention(x, other, other, need_weights=self.weights)[0].transpose(0, 1)


@family("encoder-layer", SEQ, keeps_zero=False)
class EncoderLayer(Step):
    """Run nn.TransformerEncoderLayer."""

    def __init__(self, s: Shape, heads: int, hidden: int, norm_first: bool) -> None:
        super().__init__(s)
        self.layer = nn.TransformerEncoderLayer(
            s.channels, heads, hidden, dropout=0.1, batch_first=True, norm_first=norm_first, activation="gelu"
        )
        self.certain = [("layer.linear1.weight", 0)]

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        count = d.choice([h for h in (2, 3, 1) if s.channels % h == 0])
        return {"heads": count, "hidden": d.width(), "norm_first": d.flag()}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        return self.layer(x)


@family("attention-grouped", SEQ, frequency=2)
class GroupedQueryAttention(Step):
    """Share each key and value head between several query heads (Ainslie 2023)."""

    def __init__(self, s: Shape, kv_heads: int, times: int, width: int, style: str, packed: bool) -> None:
        super().__init__(s)
        c, self.kv, self.times, self.width, self.style = s.channels, kv_heads, times, width, style
        self.sizes = [kv_heads * times * width, kv_heads * width, kv_heads * width]
        self.packed = nn.Linear(c, sum(self.sizes)) if packed else None
        if not packed:
            self.q, self.k, self.v = (nn.Linear(c, n) for n in self.sizes)
        self.out = nn.Linear(kv_heads * times * width, c)

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        style = d.choice(("expand", "interleave", "enable_gqa", "repeat"))
        options: Options = {"kv_heads": d.choice((2, 1)), "times": d.choice((2, 3)), "width": d.choice((2, 3))}
        return options | {"style": style, "packed": d.flag(40)}

    def share(self, x: Tensor) -> Tensor:
        """Give every query head its key or value head, [B, kv, T, d] to [B, kv * times, T, d]."""
        if self.style == "interleave":
            return x.repeat_interleave(self.times, dim=1)
        if self.style == "repeat":  # the other order: heads 0, 1, 0, 1 ...
            return x.repeat(1, self.times, 1, 1)
        b, h, t, d = x.shape
        return x[:, :, None].expand(b, h, self.times, t, d).reshape(b, h * self.times, t, d)

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        if self.packed is not None:
            q, k, v = self.packed(x).split(self.sizes, dim=-1)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        q, k, v = (z.unflatten(-1, (-1, self.width)).transpose(1, 2) for z in (q, k, v))
        if self.style == "enable_gqa":
            return self.out(merge(F.scaled_dot_product_attention(q, k, v, enable_gqa=True)))
        return self.out(merge(F.scaled_dot_product_attention(q, self.share(k), self.share(v))))


@family("attention-bias", SEQ, frequency=2)
class BiasedAttention(Step):
    """Add a learned bias per head and relative position, looked up by a constant index (Swin, T5)."""

    def __init__(self, s: Shape, heads: int, width: int, style: str) -> None:
        super().__init__(s)
        t = s.dims[0]
        self.qkv = nn.Linear(s.channels, 3 * heads * width, bias=False)
        self.proj = nn.Linear(heads * width, s.channels)
        self.style, self.heads, self.width, self.t = style, heads, width, t
        if style == "embedding":
            self.table = nn.Embedding(2 * t - 1, heads)
        else:
            self.table = nn.Parameter(torch.zeros(2 * t - 1, heads))
        steps = torch.arange(t)
        self.register_buffer("index", steps[:, None] - steps[None, :] + t - 1)

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return heads(d) | {"style": d.choice(("view", "embedding", "mask", "alibi"))}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, self.width).permute(2, 0, 3, 1, 4)
        index = self.get_buffer("index")
        if isinstance(self.table, nn.Embedding):
            bias = self.table(index).permute(2, 0, 1).unsqueeze(0)
        elif self.style == "alibi":  # one slope per head times the distance
            bias = (self.table[0].view(-1, 1, 1) * (index - self.t + 1)).unsqueeze(0)
        else:
            bias = self.table[index.view(-1)].view(self.t, self.t, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        if self.style == "mask":
            return self.proj(merge(F.scaled_dot_product_attention(q, k, v, attn_mask=bias)))
        scores = (q * self.width**-0.5) @ k.transpose(-2, -1) + bias
        return self.proj(merge(scores.softmax(-1) @ v))


@family("attention-cross")
class CrossAttention(Step):
    """Attend from the activation to the second input, or from learned queries to the activation."""

    def __init__(self, s: Shape, heads: int, width: int, context: int, queries: int) -> None:
        super().__init__(s)
        self.query = nn.Parameter(torch.zeros(1, queries, 5)) if queries else None
        self.q = nn.Linear(5 if queries else s.channels, heads * width)
        self.kv = nn.Linear(s.channels if queries else context, 2 * heads * width)
        self.out = nn.Linear(heads * width, s.channels)
        self.heads, self.width, self.dims = heads, width, s.dims
        self.first, self.positions = s.axis == 1 and bool(s.positions), s.positions
        if queries:
            self.kind = "seq"
        self.certain = [("q.weight", 0), ("kv.weight", 0)]

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        if s.kind == "grid" or s.kind == "vec":
            return None
        context = d.scope["context"].channels if "context" in d.scope else 0
        queries = 0 if context and d.flag(70) else d.choice((2, 3))
        return heads(d) | {"context": 0 if queries else context, "queries": queries}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2) if self.first else x
        b, h, w = x.shape[0], self.heads, self.width
        if self.query is not None:
            q, source = self.query.expand(b, -1, -1), tokens
        else:
            q, source = tokens, raw["context"]
        q = self.q(q).view(b, -1, h, w).transpose(1, 2)
        k, v = self.kv(source).view(b, -1, 2, h, w).permute(2, 0, 3, 1, 4)
        y = self.out(merge(F.scaled_dot_product_attention(q, k, v)))
        if self.query is not None or not self.first:
            return y
        return y.transpose(1, 2).unflatten(2, self.positions)


@family("attention-rope", SEQ, frequency=2)
class RotaryAttention(Step):
    """Rotate pairs of query and key positions in each head by constant angles (Su 2021)."""

    def __init__(self, s: Shape, heads: int, width: int, interleaved: bool, persistent: bool) -> None:
        super().__init__(s)
        self.q, self.k, self.v = (nn.Linear(s.channels, heads * width) for _ in range(3))
        self.out = nn.Linear(heads * width, s.channels)
        self.heads, self.width, self.interleaved = heads, width, interleaved
        angles = torch.arange(s.dims[0])[:, None] / 10.0 ** (torch.arange(width // 2) / width)
        angles = angles.repeat_interleave(2, 1) if interleaved else torch.cat([angles, angles], -1)
        self.register_buffer("cos", angles.cos(), persistent=persistent)
        self.register_buffer("sin", angles.sin(), persistent=persistent)
        self.certain = [("v.weight", 0)]

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        options: Options = {"heads": d.choice((2, 3, 1)), "width": d.choice((4, 2))}
        return options | {"interleaved": d.flag(40), "persistent": d.flag(30)}

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate [B, h, T, d] by the angle of each time and pair."""
        half = self.width // 2
        if self.interleaved:
            turned = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
        else:
            turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
        return x * self.get_buffer("cos") + turned * self.get_buffer("sin")

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, self.heads, self.width).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.out(merge(F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v)))


@family("attention-linear", SEQ, keeps_zero=False)
class LinearAttention(Step):
    """Attend without softmax: phi(q) (phi(k)^T v) with phi = elu + 1 (Katharopoulos 2020)."""

    def __init__(self, s: Shape, heads: int, width: int, value: int) -> None:
        super().__init__(s)
        self.q, self.k = nn.Linear(s.channels, heads * width), nn.Linear(s.channels, heads * width)
        self.v, self.out = nn.Linear(s.channels, heads * value), nn.Linear(heads * value, s.channels)
        self.heads = heads
        self.certain = [("v.weight", 0)]

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return heads(d) | {"value": d.choice((2, 3))}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = k.transpose(-2, -1) @ v
        normaliser = (q * k.sum(2, keepdim=True)).sum(-1, keepdim=True)
        return self.out(merge(q @ state / (normaliser + 0.1)))


@family("attention-channels", ("image", "signal", "seq"), keeps_zero=False)
class ChannelAttention(Step):
    """Attend over channels instead of positions: softmax(q^T k) v (XCiT); its widths are frozen or repaired."""

    def __init__(self, s: Shape, width: int) -> None:
        super().__init__(s)
        self.q, self.k, self.v = (project(s, width) for _ in range(3))
        self.out = project(s.with_channels(width), s.channels)
        self.first, self.positions = s.axis == 1, s.positions
        self.scale = torch.Size(s.positions).numel() ** -0.5

    @classmethod
    def draw(cls, d: Drawing, s: Shape) -> Options | None:
        return {"width": d.width()}

    def forward(self, x: Tensor, raw: Raw) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if not self.first:
            weights = torch.softmax(q.transpose(1, 2) @ k * self.scale, -1)
            return self.out(v @ weights.transpose(1, 2))
        q, k, v = q.flatten(2), k.flatten(2), v.flatten(2)
        weights = torch.softmax(q @ k.transpose(1, 2) * self.scale, -1)
        return self.out((weights @ v).unflatten(2, self.positions))
