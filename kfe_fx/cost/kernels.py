"""Time of one fused kernel as a function of sizes: a roofline on the shapes that ONNX Runtime really computes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kfe_fx.cost.profile import Profile
from kfe_fx.cost.widths import Product


def padded(size: int, block: int) -> int:
    """Round ``size`` up to a multiple of ``block``."""
    return -(-size // block) * block


def _widths(*products: Product) -> tuple[int, ...]:
    return tuple(sorted({width for product in products for width in product.widths}))


@dataclass(frozen=True)
class ConvKernel:
    """A convolution with what is fused into it (norm, bias, sum, activation: free).

    ``positions``: output positions at batch 1, in ``rows``; ``taps``: kernel elements. ``inputs`` and ``outputs`` are
    channels, ``per_group`` the input channels of one group. Blocked convolutions compute channels padded to the block;
    with channels that are no multiple of the granule, or groups that split a block, columns are gathered instead.
    """

    owner: str
    profile: Profile
    positions: int
    taps: int
    inputs: Product
    per_group: Product
    outputs: Product
    rows: int = 1
    blocked: bool = True

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths it depends on."""
        return _widths(self.inputs, self.per_group, self.outputs)

    def cost(self, sizes: Sequence[int]) -> float:
        """Return nanoseconds, MACs x time per MAC on padded channels, plus the kernel's own overhead."""
        p = self.profile
        inputs, per_group, outputs = self.inputs.at(sizes), self.per_group.at(sizes), self.outputs.at(sizes)
        work = self.positions * self.taps
        groups = max(1, inputs // max(1, per_group))
        fits = self.blocked and outputs % p.granule == 0
        if groups > 1 and per_group == 1:
            if fits:
                return p.kernel + work * padded(outputs, p.block) * p.depthwise_mac
            return p.kernel + work * outputs * p.plain_depthwise_mac
        if groups > 1:
            split = per_group % p.block or (outputs // groups) % p.block
            if fits and not split:
                return p.kernel + work * per_group * outputs * p.conv_mac
            macs = work * per_group * padded(outputs // groups, p.block) * groups
            return p.kernel * (1 + groups / 4) + macs * p.plain_mac + work * inputs * p.column
        if fits and inputs < p.block:
            return p.kernel + work * inputs * padded(outputs, p.block) * p.narrow_mac
        if fits and inputs % p.granule == 0:
            wide = padded(outputs, p.block)
            remainder = p.tail[wide // p.block % 4]
            blocks = wide // p.block
            slow = (blocks // 4 * 4 + blocks % 4 * remainder) / blocks if blocks else 1.0
            weights = 4 * self.taps * padded(inputs, p.block) * wide
            # each output row reads all weights: from the cache, or over again once they are too many for it
            reads = self.rows if self.taps > 1 and weights > p.cache else 1
            compute = work * padded(inputs, p.block) * wide * p.conv_mac * slow
            return p.kernel + compute + weights * reads * p.weight_byte
        columns = work * inputs * p.column if self.taps > 1 else 0.0
        return p.kernel + work * inputs * padded(outputs, p.block) * p.plain_mac + columns


@dataclass(frozen=True)
class GemmKernel:
    """``repeats`` products [rows, inner] x [inner, columns]; ``weights``: the second factor is streamed from memory."""

    owner: str
    profile: Profile
    repeats: Product
    rows: Product
    inner: Product
    columns: Product
    weights: bool

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths it depends on."""
        return _widths(self.repeats, self.rows, self.inner, self.columns)

    def cost(self, sizes: Sequence[int]) -> float:
        """Return nanoseconds, the larger of computing (columns padded to the block) and of streaming the weights."""
        p = self.profile
        repeats, rows = self.repeats.at(sizes), self.rows.at(sizes)
        inner, columns = self.inner.at(sizes), self.columns.at(sizes)
        compute = repeats * rows * inner * padded(columns, p.block) * p.gemm_mac
        stream = 4 * inner * columns * p.weight_byte if self.weights else 0.0
        return p.kernel * (1 + 0.2 * math.log2(max(1, repeats))) + max(compute, stream)


@dataclass(frozen=True)
class ElementKernel:
    """Work proportional to a number of elements: activations, norms, poolings, copies, changes of layout.

    Where ``aligned`` is given and is no multiple of the block, the kernel leaves the blocked layout and returns to it:
    ``reordered`` elements are moved on top.
    """

    owner: str
    profile: Profile
    elements: Product
    each: float
    aligned: Product | None = None
    reordered: tuple[Product, ...] = ()

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths it depends on."""
        return _widths(self.elements, *self.reordered, *([self.aligned] if self.aligned else []))

    def cost(self, sizes: Sequence[int]) -> float:
        """Return nanoseconds."""
        p = self.profile
        time = p.kernel + self.elements.at(sizes) * self.each
        if self.aligned is not None and self.aligned.at(sizes) % p.block:
            time += sum(p.kernel + moved.at(sizes) * p.reorder for moved in self.reordered)
        return time


@dataclass(frozen=True)
class RecurrentKernel:
    """The steps of one direction of a recurrent layer; the input's product of all steps is a GemmKernel before it.

    ``steps`` of ``rows`` sequences; each multiplies [rows, width] x [width, gates], and [rows, hidden] x
    [hidden, width] where there is a ``projection``, and does ``each`` nanoseconds of work per hidden unit after
    ``overhead`` nanoseconds. All steps read the same weights.
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

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths it depends on."""
        matrices = [self.gates, self.width, *([] if self.projection is None else [self.projection])]
        return _widths(self.steps, self.rows, self.hidden, *matrices)

    def cost(self, sizes: Sequence[int]) -> float:
        """Return nanoseconds: steps x (the larger of computing and of reading the weights again, plus the cell)."""
        p = self.profile
        rows, hidden = self.rows.at(sizes), self.hidden.at(sizes)
        weights = self.gates.at(sizes) * self.width.at(sizes)
        if self.projection is not None:
            weights += self.projection.at(sizes)
        # weights that are read in a circle and do not fit into the cache soon fall out of it altogether
        missed = min(1.0, max(0.0, 4 * weights / p.cache - 1))
        read = 4 * weights * ((1 - missed) * min(p.core_byte, p.weight_byte) + missed * p.weight_byte)
        step = max(rows * weights * p.gemm_mac, read) + rows * hidden * self.each + self.overhead
        return p.kernel + self.steps.at(sizes) * step
