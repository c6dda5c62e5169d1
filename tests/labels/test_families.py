"""One small network per family of operations, with the units that it must have written down by hand."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfe_fx.frontend.capture import capture
from kfe_fx.labels.analysis import Analysis, analyze
from kfe_fx.passes.shrink import Shrink
from kfe_fx.plan import Plan

Slices = dict[str, dict[int, tuple[int, ...]]]
IMAGE = (2, 3, 4, 4)


def analysed(module: nn.Module, *shape: int, heads: str = "auto") -> Analysis:
    return analyze(capture(module.eval(), torch.randn(*shape)), heads=heads)


def units(analysis: Analysis) -> list[Slices]:
    return [unit.slices for unit in analysis.units]


def assert_units(found: Analysis | list[Slices], *expected: Slices) -> None:
    left = list(found if isinstance(found, list) else units(found))
    for each in expected:
        assert each in left, f"missing {each} among {left}"
        left.remove(each)
    assert not left, f"not expected: {left}"


def why_frozen(analysis: Analysis, param: str, dim: int) -> list[tuple[int, str]]:
    return [(each.count, each.reason) for each in analysis.frozen if (each.param, each.dim) == (param, dim)]


def line_of(cls: type, text: str) -> int:
    """Find the line of this file where ``text`` stands in the source of ``cls``."""
    lines, first = inspect.getsourcelines(cls)
    return first + next(number for number, line in enumerate(lines) if text in line)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down, self.head = nn.Linear(3, 2), nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.down(F.relu(self.up(x))))


def test_residual() -> None:
    analysis = analysed(Residual(), 2, 3)
    stream: list[Slices] = [
        {
            "stem.weight": {0: (i,)}, "stem.bias": {0: (i,)}, "up.weight": {1: (i,)},
            "down.weight": {0: (i,)}, "down.bias": {0: (i,)}, "head.weight": {1: (i,)},
        }
        for i in (0, 1)
    ]  # fmt: skip
    inner: list[Slices] = [{"up.weight": {0: (i,)}, "up.bias": {0: (i,)}, "down.weight": {1: (i,)}} for i in (0, 1, 2)]
    assert_units(analysis, *stream, *inner)
    # the stream is one group, named after the first producer, minted in both
    assert [(group.name, group.dims, len(group.units)) for group in analysis.groups] == [
        ("stem", (("stem.weight", 0), ("down.weight", 0)), 2),
        ("up", (("up.weight", 0),), 3),
    ]
    assert sorted(analysis.floors, key=len) == [frozenset(group.units) for group in analysis.groups]


class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.grow, self.head = nn.Conv2d(3, 2, 1), nn.Conv2d(5, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([x, self.grow(x)], 1))


def test_concatenation_with_the_input() -> None:
    analysis = analysed(Concat(), *IMAGE)
    assert_units(
        analysis,
        {"grow.weight": {0: (0,)}, "grow.bias": {0: (0,)}, "head.weight": {1: (3,)}},
        {"grow.weight": {0: (1,)}, "grow.bias": {0: (1,)}, "head.weight": {1: (4,)}},
    )
    assert why_frozen(analysis, "head.weight", 1) == [(3, "meets an index that cannot be removed (conv2d_1)")]


def chain(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


def test_depthwise_with_multiplier() -> None:
    net = chain(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 4, 3, groups=2), nn.Conv2d(4, 1, 1))
    assert_units(
        analysed(net, *IMAGE),
        {
            "0.weight": {0: (0,)}, "0.bias": {0: (0,)}, "1.weight": {0: (0, 1)}, "1.bias": {0: (0, 1)},
            "2.weight": {1: (0, 1)},
        },
        {
            "0.weight": {0: (1,)}, "0.bias": {0: (1,)}, "1.weight": {0: (2, 3)}, "1.bias": {0: (2, 3)},
            "2.weight": {1: (2, 3)},
        },
    )  # fmt: skip


def test_grouped_convolution_by_positions_where_they_are_more() -> None:
    net = chain(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 1, 1))
    incoming: list[Slices] = [{"0.weight": {0: both}, "0.bias": {0: both}, "1.weight": {1: (i,)}}
                for i, both in ((0, (0, 2)), (1, (1, 3)))]  # fmt: skip
    outgoing: list[Slices] = [{"1.weight": {0: both}, "1.bias": {0: both}, "2.weight": {1: both}}
                for both in ((0, 2), (1, 3))]  # fmt: skip
    assert_units(analysed(net, *IMAGE), *incoming, *outgoing)


def test_grouped_convolution_by_whole_groups_where_they_are_more() -> None:
    net = chain(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 3, 1, groups=3), nn.Conv2d(3, 1, 1))
    assert_units(
        analysed(net, *IMAGE),
        *[
            {
                "0.weight": {0: pair}, "0.bias": {0: pair}, "1.weight": {0: (i,)}, "1.bias": {0: (i,)},
                "2.weight": {1: (i,)},
            }
            for i, pair in ((0, (0, 1)), (1, (2, 3)), (2, (4, 5)))
        ],
    )  # fmt: skip


def test_grouped_convolution_of_the_input_loses_positions_of_its_outputs() -> None:
    net = chain(nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 1, 1))
    assert_units(
        analysed(net, 2, 4, 3, 3),
        {"0.weight": {0: (0, 2)}, "0.bias": {0: (0, 2)}, "1.weight": {1: (0, 2)}},
        {"0.weight": {0: (1, 3)}, "0.bias": {0: (1, 3)}, "1.weight": {1: (1, 3)}},
    )


def test_transposed_convolution() -> None:
    net = chain(nn.Conv2d(3, 2, 1), nn.ConvTranspose2d(2, 3, 2, stride=2), nn.Conv2d(3, 1, 1))
    incoming: list[Slices] = [{"0.weight": {0: (i,)}, "0.bias": {0: (i,)}, "1.weight": {0: (i,)}} for i in (0, 1)]
    outgoing: list[Slices] = [{"1.weight": {1: (i,)}, "1.bias": {0: (i,)}, "2.weight": {1: (i,)}} for i in (0, 1, 2)]
    assert_units(analysed(net, *IMAGE), *incoming, *outgoing)


class Packed(nn.Module):
    """Two heads of two positions, q, k and v in one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(3, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, 4))


@pytest.mark.parametrize("heads", ["auto", "heads"])
def test_packed_attention_loses_whole_heads(heads: str) -> None:
    first, second = (0, 1, 4, 5, 8, 9), (2, 3, 6, 7, 10, 11)
    assert_units(
        analysed(Packed(), 2, 5, 3, heads=heads),
        {"qkv.weight": {0: first}, "qkv.bias": {0: first}, "out.weight": {1: (0, 1)}},
        {"qkv.weight": {0: second}, "qkv.bias": {0: second}, "out.weight": {1: (2, 3)}},
    )


def test_packed_attention_loses_positions_when_asked_to() -> None:
    even, odd = (0, 2, 4, 6, 8, 10), (1, 3, 5, 7, 9, 11)
    assert_units(
        analysed(Packed(), 2, 5, 3, heads="positions"),
        {"qkv.weight": {0: even}, "qkv.bias": {0: even}, "out.weight": {1: (0, 2)}},
        {"qkv.weight": {0: odd}, "qkv.bias": {0: odd}, "out.weight": {1: (1, 3)}},
    )


class GroupedQuery(nn.Module):
    """Four query heads of two positions share two key-value heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(3, 8), nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q = self.q(x).view(n, t, 4, 2).transpose(1, 2)
        k, v = (each(x).view(n, t, 2, 2).transpose(1, 2) for each in (self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(n, t, 8))


def test_grouped_query_attention_loses_a_shared_head_with_its_queries() -> None:
    expected: list[Slices] = [
        {
            "q.weight": {0: queries}, "q.bias": {0: queries}, "k.weight": {0: shared}, "k.bias": {0: shared},
            "v.weight": {0: shared}, "v.bias": {0: shared}, "out.weight": {1: queries},
        }
        for queries, shared in (((0, 1, 2, 3), (0, 1)), ((4, 5, 6, 7), (2, 3)))
    ]  # fmt: skip
    assert_units(analysed(GroupedQuery(), 2, 5, 3), *expected)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 6), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.down(value * torch.sigmoid(gate))


def test_gated_linear_unit_pairs_value_and_gate() -> None:
    expected: list[Slices] = [
        {"up.weight": {0: (i, i + 3)}, "up.bias": {0: (i, i + 3)}, "down.weight": {1: (i,)}} for i in (0, 1, 2)
    ]
    assert_units(analysed(Gated(), 2, 3), *expected)


class Squeezed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.squeeze, self.excite = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.head(x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True))))))


def test_squeeze_and_excitation() -> None:
    channels: list[Slices] = [
        {
            "conv.weight": {0: (i,)}, "conv.bias": {0: (i,)}, "squeeze.weight": {1: (i,)},
            "excite.weight": {0: (i,)}, "excite.bias": {0: (i,)}, "head.weight": {1: (i,)},
        }
        for i in (0, 1, 2, 3)
    ]  # fmt: skip
    inner: list[Slices] = [
        {"squeeze.weight": {0: (i,)}, "squeeze.bias": {0: (i,)}, "excite.weight": {1: (i,)}} for i in (0, 1)
    ]
    assert_units(analysed(Squeezed(), *IMAGE), *channels, *inner)


def test_batch_norm_joins_the_unit_and_changes_no_statistic() -> None:
    analysis = analysed(chain(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1)), *IMAGE)
    assert_units(
        analysis,
        *[
            {
                "0.weight": {0: (i,)}, "0.bias": {0: (i,)}, "1.weight": {0: (i,)}, "1.bias": {0: (i,)},
                "1.running_mean": {0: (i,)}, "1.running_var": {0: (i,)}, "2.weight": {1: (i,)},
            }
            for i in (0, 1)
        ],
    )  # fmt: skip
    assert analysis.statistics == []


@pytest.mark.parametrize(("norm", "affine"), [(nn.LayerNorm(3), ("weight", "bias")), (nn.RMSNorm(3), ("weight",))])
def test_a_statistic_over_units_is_named(norm: nn.Module, affine: tuple[str, ...]) -> None:
    analysis = analysed(chain(nn.Linear(2, 3), norm, nn.Linear(3, 1)), 2, 2)
    assert_units(
        analysis,
        *[
            {"0.weight": {0: (i,)}, "0.bias": {0: (i,)}, "2.weight": {1: (i,)}}
            | {f"1.{name}": {0: (i,)} for name in affine}
            for i in (0, 1, 2)
        ],
    )
    (note,) = analysis.statistics
    assert note.startswith("aten.layer_norm" if len(affine) == 2 else "aten.rms_norm")
    assert note.endswith(" at 1")


def test_a_norm_of_the_input_names_no_statistic() -> None:
    assert analysed(chain(nn.LayerNorm(3), nn.Linear(3, 4), nn.Linear(4, 1)), 2, 3).statistics == []


def group_normed(groups: int) -> Analysis:
    return analysed(chain(nn.Conv2d(3, 4, 1), nn.GroupNorm(groups, 4), nn.Conv2d(4, 1, 1)), *IMAGE)


def norm_unit(indices: tuple[int, ...]) -> Slices:
    names = ("0.weight", "0.bias", "1.weight", "1.bias")
    return {name: {0: indices} for name in names} | {"2.weight": {1: indices}}


def test_group_norm_loses_whole_groups_exactly() -> None:
    analysis = group_normed(2)
    assert_units(analysis, norm_unit((0, 1)), norm_unit((2, 3)))
    assert analysis.statistics == []


def test_group_norm_of_one_group_changes_its_statistic() -> None:
    analysis = group_normed(1)
    assert_units(analysis, *[norm_unit((i,)) for i in (0, 1, 2, 3)])
    assert analysis.statistics == ["aten.group_norm at 1"]


def test_group_norm_of_single_channels_is_exact() -> None:
    analysis = group_normed(4)
    assert_units(analysis, *[norm_unit((i,)) for i in (0, 1, 2, 3)])
    assert analysis.statistics == []


def test_flatten_of_channels_first() -> None:
    net = chain(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(8, 1))
    assert_units(
        analysed(net, 2, 3, 2, 2),
        {"0.weight": {0: (0,)}, "0.bias": {0: (0,)}, "2.weight": {1: (0, 1, 2, 3)}},
        {"0.weight": {0: (1,)}, "0.bias": {0: (1,)}, "2.weight": {1: (4, 5, 6, 7)}},
    )


def test_flatten_of_channels_last() -> None:
    net = chain(nn.Linear(3, 2), nn.Flatten(), nn.Linear(8, 1))
    assert_units(
        analysed(net, 2, 2, 2, 3),
        {"0.weight": {0: (0,)}, "0.bias": {0: (0,)}, "2.weight": {1: (0, 2, 4, 6)}},
        {"0.weight": {0: (1,)}, "0.bias": {0: (1,)}, "2.weight": {1: (1, 3, 5, 7)}},
    )


class TiedTwice(nn.Module):
    """One matrix under two names, at two places of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two, self.head = nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.two(F.relu(self.one(self.stem(x))))))


def test_a_tied_weight_ties_its_inputs_and_its_outputs() -> None:
    # outputs of the first use are inputs of the second, so rows and columns go together, under both names
    assert_units(
        analysed(TiedTwice(), 2, 3),
        *[
            {
                "stem.weight": {0: (i,)}, "stem.bias": {0: (i,)}, "one.weight": {0: (i,), 1: (i,)},
                "two.weight": {0: (i,), 1: (i,)}, "one.bias": {0: (i,)}, "two.bias": {0: (i,)},
                "head.weight": {1: (i,)},
            }
            for i in (0, 1)
        ],
    )  # fmt: skip


class TiedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(7, 2), nn.Linear(2, 2), nn.Linear(2, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.body(self.table(x))))


def test_a_vocabulary_is_frozen_and_its_columns_go_with_the_tied_head() -> None:
    analysis = analyze(capture(TiedHead(), torch.randint(0, 7, (2, 5))))
    assert_units(
        analysis,
        *[
            {
                "table.weight": {1: (i,)}, "head.weight": {1: (i,)},
                "body.weight": {0: (i,), 1: (i,)}, "body.bias": {0: (i,)},
            }
            for i in (0, 1)
        ],
    )  # fmt: skip
    assert why_frozen(analysis, "table.weight", 0) == [(7, "is indexed by the input (a vocabulary) (embedding)")]


class Constants(nn.Module):
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 2), nn.Linear(2, 1)
        self.register_buffer("scale", torch.tensor([1.5, -0.5]))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) * self.scale)


def test_constant_buffers_are_cut_with_the_channels() -> None:
    assert_units(
        analysed(Constants(), 2, 3),
        *[
            {"up.weight": {0: (i,)}, "up.bias": {0: (i,)}, "scale": {0: (i,)}, "down.weight": {1: (i,)}}
            for i in (0, 1)
        ],
    )  # fmt: skip


class RelativeBias(nn.Module):
    """Attention over three tokens whose scores have a learnt shift per head and distance."""

    index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.table = nn.Linear(3, 12), nn.Linear(4, 1), nn.Parameter(torch.randn(5, 2))
        self.register_buffer("index", torch.arange(3)[:, None] - torch.arange(3)[None] + 2)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
        shift = self.table[self.index.view(-1)].view(3, 3, 2).permute(2, 0, 1).unsqueeze(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=shift)
        return self.out(y.transpose(1, 2).reshape(n, t, 4))


def test_a_table_of_relative_positions_loses_the_column_of_a_head() -> None:
    first, second = (0, 1, 4, 5, 8, 9), (2, 3, 6, 7, 10, 11)
    assert_units(
        analysed(RelativeBias(), 2, 3, 3),
        {"qkv.weight": {0: first}, "qkv.bias": {0: first}, "out.weight": {1: (0, 1)}, "table": {1: (0,)}},
        {"qkv.weight": {0: second}, "qkv.bias": {0: second}, "out.weight": {1: (2, 3)}, "table": {1: (1,)}},
    )


class Rotary(nn.Module):
    """Two heads of four positions; positions i and i + 2 turn together."""

    cos: Tensor
    sin: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(8, 1)
        angle = torch.arange(5.0)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def turn(self, x: Tensor) -> Tensor:
        half = torch.cat([-x[..., 2:], x[..., :2]], dim=-1)
        return x * self.cos + half * self.sin

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (each(x).view(n, t, 2, 4).transpose(1, 2) for each in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.turn(q), self.turn(k), v)
        return self.out(y.transpose(1, 2).reshape(n, t, 8))


def test_rotary_attention_loses_whole_heads() -> None:
    expected: list[Slices] = [
        {f"{name}.{kind}": {0: head} for name in ("q", "k", "v") for kind in ("weight", "bias")}
        | {"out.weight": {1: head}}
        for head in ((0, 1, 2, 3), (4, 5, 6, 7))
    ]
    assert_units(analysed(Rotary(), 2, 5, 3), *expected)


def test_rotary_attention_loses_pairs_of_positions_when_asked_to() -> None:
    analysis = analysed(Rotary(), 2, 5, 3, heads="positions")
    pairs: list[Slices] = [
        {f"{name}.{kind}": {0: rows} for name in ("q", "k") for kind in ("weight", "bias")}
        | {"cos": {1: pair}, "sin": {1: pair}}
        for pair, rows in (((0, 2), (0, 2, 4, 6)), ((1, 3), (1, 3, 5, 7)))
    ]
    values: list[Slices] = [
        {"v.weight": {0: rows}, "v.bias": {0: rows}, "out.weight": {1: rows}}
        for rows in ((0, 4), (1, 5), (2, 6), (3, 7))
    ]
    assert_units(analysis, *pairs, *values)


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.mid, self.down = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.fft.fft(self.up(x)).real
        return self.down(self.mid(y))


def test_what_an_unknown_operation_sees_is_frozen_with_its_source_line() -> None:
    analysis = analysed(Unknown(), 2, 3)
    assert_units(
        analysis,
        *[{"mid.weight": {0: (i,)}, "mid.bias": {0: (i,)}, "down.weight": {1: (i,)}} for i in (0, 1, 2, 3, 4)],
    )
    (frozen,) = [each for each in analysis.frozen if (each.param, each.dim) == ("up.weight", 0)]
    assert frozen.count == 4
    assert "goes into aten.fft_fft" in frozen.reason
    assert "which has no rule" in frozen.reason
    file, _, line = frozen.source.rpartition(":")
    assert file.endswith("tests/labels/test_families.py")
    assert int(line) == line_of(Unknown, "torch.fft.fft")


class UnknownThenSum(Unknown):
    """The channels that the unknown operation freezes meet others later."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return self.down(self.mid(torch.fft.fft(y).real * 0 + y + self.other(x)))


def test_what_joins_frozen_channels_later_names_the_operation_that_froze_them() -> None:
    analysis = analysed(UnknownThenSum(), 2, 3)
    assert "fft" in why_frozen(analysis, "up.weight", 0)[0][1]
    assert [count for count, _ in why_frozen(analysis, "other.weight", 0)] == [4]


def test_softmax_over_channels_freezes_them() -> None:
    net = chain(nn.Linear(3, 4), nn.Softmax(-1), nn.Linear(4, 5), nn.Linear(5, 1))
    analysis = analysed(net, 2, 3)
    assert_units(
        analysis,
        *[{"2.weight": {0: (i,)}, "2.bias": {0: (i,)}, "3.weight": {1: (i,)}} for i in (0, 1, 2, 3, 4)],
    )
    assert why_frozen(analysis, "0.weight", 0) == [(4, "is normalised or ordered over (softmax)")]


def test_softmax_over_other_dims_freezes_nothing() -> None:
    net = chain(nn.Linear(3, 2), nn.Softmax(1), nn.Linear(2, 1))
    assert_units(
        analysed(net, 2, 5, 3),
        *[{"0.weight": {0: (i,)}, "0.bias": {0: (i,)}, "2.weight": {1: (i,)}} for i in (0, 1)],
    )


class MeanOverChannels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.up(x)).mean(-1)


def test_a_mean_over_channels_still_divides_by_their_old_number() -> None:
    net = MeanOverChannels().double()
    x = torch.randn(5, 3, dtype=torch.float64)
    program = capture(net, x)
    analysis = analyze(program)
    assert_units(analysis, *[{"up.weight": {0: (i,)}, "up.bias": {0: (i,)}} for i in (0, 1, 2, 3)])
    small = Shrink(Plan.of_units(analysis, {1, 2, 3})).run(program).program
    left = F.relu(x @ net.up.weight[0] + net.up.bias[0])
    torch.testing.assert_close(small(x), left / 4, rtol=0, atol=1e-12)


class Broadcast(nn.Module):
    """Fills and broadcasts beside channels: their own widths follow."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide, self.head = nn.Linear(3, 1), nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.narrow(x).expand(-1, 5) * self.wide(x) + torch.full((5,), 0.5, dtype=x.dtype)
        return self.head(y)


def test_broadcasts_and_fills_take_any_width() -> None:
    net = Broadcast().double()
    x = torch.randn(4, 3, dtype=torch.float64)
    program = capture(net, x)
    analysis = analyze(program)
    assert_units(
        analysis,
        *[{"wide.weight": {0: (i,)}, "wide.bias": {0: (i,)}, "head.weight": {1: (i,)}} for i in (0, 1, 2, 3, 4)],
    )
    small = Shrink(Plan.of_units(analysis, {0, 3})).run(program).program
    kept = [1, 2, 4]
    inner = net.narrow(x) * (x @ net.wide.weight[kept].T + net.wide.bias[kept]) + 0.5
    torch.testing.assert_close(small(x), inner @ net.head.weight[:, kept].T + net.head.bias, rtol=0, atol=1e-12)


class Upsampled(nn.Module):
    """Sub-pixel convolution: as many channels come out as there are phases along a side."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.pixel_shuffle(self.up(x), 2))


def test_a_pixel_shuffle_loses_channels_not_columns_of_the_image() -> None:
    assert_units(
        analysed(Upsampled(), *IMAGE),
        {"up.weight": {0: (0, 1, 2, 3)}, "up.bias": {0: (0, 1, 2, 3)}, "head.weight": {1: (0,)}},
        {"up.weight": {0: (4, 5, 6, 7)}, "up.bias": {0: (4, 5, 6, 7)}, "head.weight": {1: (1,)}},
    )


def test_outputs_and_inputs_are_frozen_and_say_so() -> None:
    analysis = analysed(nn.Linear(3, 2), 2, 3)
    assert units(analysis) == []
    assert why_frozen(analysis, "weight", 0) == [(2, "is an output of the network (output)")]
    assert why_frozen(analysis, "weight", 1) == [(3, "meets a dim that cannot shrink (linear)")]


def test_a_single_hidden_unit_stays() -> None:
    analysis = analysed(chain(nn.Linear(3, 1), nn.Linear(1, 2)), 2, 3)
    assert units(analysis) == []


class ConvolutionPerExample(nn.Module):
    """Each example has kernels of its own, so the number of groups depends on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.kernels = nn.Linear(3, 2), nn.Parameter(torch.randn(2, 4, 3, 1, 1))
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        weight = (self.mix(x.mean((2, 3))) @ self.kernels.flatten(1)).view(n * 4, 3, 1, 1)
        y = F.conv2d(x.reshape(1, n * 3, 4, 4), weight, groups=n)
        return self.head(y.view(n, 4, 4, 4))


def test_a_convolution_with_kernels_per_example_is_frozen_and_says_so() -> None:
    analysis = analysed(ConvolutionPerExample(), *IMAGE)
    assert_units(analysis, *[{"mix.weight": {0: (i,)}, "mix.bias": {0: (i,)}, "kernels": {0: (i,)}} for i in (0, 1)])
    assert "goes into aten.conv2d" in why_frozen(analysis, "kernels", 1)[0][1]


def test_a_group_norm_of_tied_groups_loses_positions_and_changes_its_statistic() -> None:
    # the grouped convolution ties position p of both groups, so the norm cannot lose whole groups
    net = chain(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, groups=2), nn.GroupNorm(2, 4), nn.Conv2d(4, 1, 1))
    analysis = analysed(net, *IMAGE)
    incoming: list[Slices] = [
        {"0.weight": {0: both}, "0.bias": {0: both}, "1.weight": {1: (i,)}} for i, both in ((0, (0, 2)), (1, (1, 3)))
    ]
    outgoing: list[Slices] = [
        {f"{layer}.{kind}": {0: both} for layer in (1, 2) for kind in ("weight", "bias")} | {"3.weight": {1: both}}
        for both in ((0, 2), (1, 3))
    ]
    assert_units(analysis, *incoming, *outgoing)
    assert analysis.statistics == ["aten.group_norm at 2"]


class Ellipsis(nn.Module):
    """An einsum that does not spell the dims it leaves alone."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,io", torch.einsum("...i,io->...o", x, self.up).relu(), self.down)


def test_einsum_with_an_ellipsis() -> None:
    assert_units(analysed(Ellipsis(), 2, 5, 3), *({"up": {1: (k,)}, "down": {0: (k,)}} for k in range(4)))
