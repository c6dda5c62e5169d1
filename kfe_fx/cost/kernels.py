"""Time of one fused kernel as a function of sizes: a roofline on the shapes that ONNX Runtime really computes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kfe_fx.cost.profile import Profile
from kfe_fx.cost.widths import Product

UNHIDDEN = 0.25  # of reading weights that no cache holds, behind the multiplications that take longer, and of these


def padded(size: int, block: int) -> int:
    """Round ``size`` up to a multiple of ``block``."""
    return -(-size // block) * block


def _widths(*products: Product) -> tuple[int, ...]:
    return tuple(sorted({width for product in products for width in product.widths}))


@dataclass(frozen=True)
class ConvKernel:
    """A convolution with what is fused into it: norm, bias and sum are free, an activation costs ``activation``.

    ``positions``: output positions at batch 1; ``taps``: kernel elements. ``inputs`` and ``outputs`` are
    channels, ``per_group`` the input channels of one group. Blocked convolutions compute channels padded to the block;
    with input channels that are no multiple of the granule, or groups that split a block, columns are gathered instead.
    ``missed``: the part of the network's weights that no cache holds from one run to the next; ``activation``:
    nanoseconds per output element.
    """

    owner: str
    profile: Profile
    positions: int
    taps: int
    inputs: Product
    per_group: Product
    outputs: Product
    blocked: bool = True
    missed: float = 0.0
    activation: float = 0.0

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths it depends on."""
        return _widths(self.inputs, self.per_group, self.outputs)

    def cost(self, sizes: Sequence[int]) -> float:
        """Return nanoseconds, MACs x time per MAC on padded channels, plus weights and overheads."""
        p = self.profile
        inputs, per_group, outputs = self.inputs.at(sizes), self.per_group.at(sizes), self.outputs.at(sizes)
        if not (self.positions and inputs and per_group and outputs):
            return 0.0
        groups = max(1, inputs // per_group)
        weights = 4 * self.taps * per_group * outputs
        compute = self._blocked(inputs, per_group, outputs, groups)
        if compute is None:
            compute = self._plain(inputs, per_group, outputs, groups)
        fused = self.positions * outputs * (self.activation + p.requantise)
        if self.taps > 1 and inputs >= p.block:  # a part of ``narrow_mac`` where channels are few
            fused += self.positions * self.taps * p.tap
        return p.conv_kernel + max(compute, weights * p.near_byte) + weights * self.missed * p.miss_byte + fused

    def _blocked(self, inputs: int, per_group: int, outputs: int, groups: int) -> float | None:
        """Return the time to compute in blocks of channels, None where that is not done."""
        p = self.profile
        if not self.blocked or (groups > 1 and outputs % p.granule):
            return None
        work = self.positions * self.taps
        wide = padded(outputs, p.block)
        if groups > 1 and per_group == 1:
            return work * wide * p.depthwise_mac
        if groups > 1:
            split = per_group % p.block or (outputs // groups) % p.block
            return None if split else work * per_group * outputs * p.conv_mac
        if inputs < p.block:
            return work * inputs * wide * p.narrow_mac
        if inputs % p.granule:
            return None
        blocks = wide // p.block
        slow = (blocks // 4 * 4 + blocks % 4 * p.tail[blocks % 4]) / blocks
        mac = p.conv_mac if self.taps > 1 else p.pointwise_mac
        return work * padded(inputs, p.block) * wide * mac * slow

    def _plain(self, inputs: int, per_group: int, outputs: int, groups: int) -> float:
        """Return the time to gather columns and multiply, group by group."""
        p = self.profile
        work = self.positions * self.taps
        if groups > 1 and per_group == 1:
            return work * outputs * p.plain_depthwise_mac + groups * p.group
        columns = work * inputs * p.column if self.taps > 1 else 0.0
        return work * per_group * outputs * p.plain_mac + columns + (groups * p.group if groups > 1 else 0.0)


@dataclass(frozen=True)
class GemmKernel:
    """``repeats`` products [rows, inner] x [inner, columns].

    ``weight_byte``: nanoseconds per byte to stream the second factor where it is weights, else 0; ``missed``: the part
    of the network's weights that no cache holds from one run to the next.
    """

    owner: str
    profile: Profile
    repeats: Product
    rows: Product
    inner: Product
    columns: Product
    weight_byte: float = 0.0
    missed: float = 0.0

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths it depends on."""
        return _widths(self.repeats, self.rows, self.inner, self.columns)

    def cost(self, sizes: Sequence[int]) -> float:
        """Return nanoseconds, the larger of computing (columns padded to the block) and of streaming the weights.

        Weights that come from afar are not quite hidden behind the computing, nor it behind them.
        """
        p = self.profile
        repeats, rows = self.repeats.at(sizes), self.rows.at(sizes)
        inner, columns = self.inner.at(sizes), self.columns.at(sizes)
        if not (repeats and rows and inner and columns):
            return 0.0
        compute = repeats * rows * padded(columns, p.block) * (inner * p.gemm_mac + p.gemm_output)
        weights = 4 * inner * columns
        missed = weights * self.missed * p.miss_byte
        longer = max(compute, weights * self.weight_byte + missed)
        return p.kernel * (1 + 0.2 * math.log2(max(1, repeats))) + longer + UNHIDDEN * min(compute, missed)


@dataclass(frozen=True)
class ElementKernel:
    """Work proportional to a number of elements, and of ``rows``: activations, norms, poolings, copies, layouts.

    Where ``aligned`` is given and is no multiple of the block, the kernel leaves the blocked layout and returns to it:
    ``reordered`` elements are moved on top.
    """

    owner: str
    profile: Profile
    elements: Product
    each: float
    rows: Product | None = None
    aligned: Product | None = None
    reordered: tuple[Product, ...] = ()

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths it depends on."""
        return _widths(self.elements, *self.reordered, *(one for one in (self.aligned, self.rows) if one is not None))

    def cost(self, sizes: Sequence[int]) -> float:
        """Return nanoseconds."""
        p = self.profile
        elements = self.elements.at(sizes)
        if not elements:
            return 0.0
        time = p.kernel + elements * self.each + (0.0 if self.rows is None else self.rows.at(sizes) * p.row)
        if self.aligned is not None and self.aligned.at(sizes) % p.block:
            time += sum(p.kernel + moved.at(sizes) * p.reorder for moved in self.reordered if moved.at(sizes))
        return time


@dataclass(frozen=True)
class RecurrentKernel:
    """The steps of one direction of a recurrent layer; the input's product of all steps is a GemmKernel before it.

    ``steps`` of ``rows`` sequences; each multiplies [rows, width] x [width, gates], and [rows, hidden] x
    [hidden, width] where there is a ``projection``, and does ``each`` nanoseconds of work per hidden unit after
    ``overhead`` nanoseconds. All steps read the same weights, of which up to ``inner`` bytes cost no more than
    computing.
    """

    owner: str
    profile: Profile
    steps: Product
    rows: Product
    gates: Product
    width: Product
    hidden: Product
    projection: Product | None
    each: float
    overhead: float
    inner: float = 0.0

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths it depends on."""
        matrices = [self.gates, self.width, *([] if self.projection is None else [self.projection])]
        return _widths(self.steps, self.rows, self.hidden, *matrices)

    def cost(self, sizes: Sequence[int]) -> float:
        """Return nanoseconds: steps x (the larger of computing and of reading the weights again, plus the cell)."""
        p = self.profile
        rows, hidden = self.rows.at(sizes), self.hidden.at(sizes)
        if not all(product.at(sizes) for product in (self.steps, self.rows, self.gates, self.width, self.hidden)):
            return 0.0
        weights = self.gates.at(sizes) * self.width.at(sizes)
        if self.projection is not None:
            weights += self.projection.at(sizes)
        slow = min(1.0, max(0.0, 4 * weights / self.inner - 1)) if self.inner else 1.0
        # weights that are read in a circle and do not fit into the cache soon fall out of it altogether
        missed = min(1.0, max(0.0, 4 * weights / p.cache - 1))
        read = slow * 4 * weights * ((1 - missed) * min(p.core_byte, p.weight_byte) + missed * p.weight_byte)
        step = max(rows * weights * p.gemm_mac, read) + rows * hidden * self.each + self.overhead
        return p.recurrent_kernel + self.steps.at(sizes) * step


@dataclass(frozen=True)
class CallKernel:
    """What a run costs before its first kernel and after its last one."""

    owner: str
    profile: Profile
    widths: tuple[int, ...] = ()

    def cost(self, sizes: Sequence[int]) -> float:
        """Return nanoseconds."""
        return self.profile.call
