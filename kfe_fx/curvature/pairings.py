"""How each operation with a weight makes that weight's gradient out of pairs of rows; one rule an operation.

A rule looks at a node and returns a ``Pairing``: which argument is the weight, which the data, how the weight reads as
a matrix [K, o, i] (K groups), and what the rows are. An operation without a rule still has exact second moments, by
``kfe_fx.curvature.direct``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from kfe_fx.curvature.pairs import OneHot, Pairs, with_ones
from kfe_fx.curvature.patches import patches

aten = torch.ops.aten


Reading = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]


def transposed(reading: Reading) -> Reading:
    """Return the reading of the transposed matrices."""
    groups, outputs, inputs, count = reading
    return groups, inputs, outputs, count


@dataclass(frozen=True)
class Pairing(ABC):
    """One use of a weight. ``weight``, ``bias`` and ``data`` are nodes; ``bias`` may be None.

    ``has_column`` tells whether the bias is a homogeneous coordinate of the right rows, ``sparse`` whether the left
    rows are one-hot, ``chained`` whether the positions are steps of a sequence. Unless said otherwise the weight reads
    as [K, o, i] in its own order, K and o along dim 0.
    """

    weight: fx.Node
    bias: fx.Node | None
    data: fx.Node

    groups: int = 1
    sparse = False
    chained = False

    @property
    def has_column(self) -> bool:
        """Whether the bias is a homogeneous coordinate of the right rows."""
        return True

    def matrix(self, weight: Tensor) -> Tensor:
        """View a tensor of the weight's shape as [K, o, i]."""
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)

    def tensor(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Undo ``matrix``."""
        return matrix.reshape(shape)

    def reading(self, shape: tuple[int, ...]) -> Reading:
        """Return which dims of the weight count K, o and i, and into how many groups dim 0 falls.

        Dims of size one are left out; equal readings give equal matrices.
        """
        rest = tuple(dim for dim in range(1, len(shape)) if shape[dim] > 1)
        return (), (0,) if shape[0] > 1 else (), rest, self.groups

    @abstractmethod
    def pairs(self, data: Tensor, grad: Tensor, ones: bool) -> Pairs:
        """Return the rows of n examples.

        Args:
            data: [n, ...], what went in, examples first.
            grad: [n, ...], gradient of each example's loss by what came out.
            ones: whether to append a coordinate of ones, for the bias, to the right rows.
        """

    def positions(self, data: Tensor, grad: Tensor, rows: int) -> int:
        """Count the positions R of one example; ``rows`` is K·o."""
        return grad.numel() // rows

    @property
    def counting(self) -> fx.Node | None:
        """The node that says how many steps of each sequence count, [N], or None."""
        return None

    def bounded(self, pairs: Pairs, data: Tensor, lengths: Tensor | None) -> Pairs:
        """Return the pairs of ``data`` without positions that do not count; ``lengths`` [n, ...]: see ``counting``."""
        return pairs


def _pairs(left: Tensor | OneHot, right: Tensor, given: str) -> Pairs:
    return Pairs(left, right, ((right.shape[2], given),))


@dataclass(frozen=True)
class Linear(Pairing):
    """``y[..., o] = sum_i W[o, i] x[..., i] + b[o]``."""

    def pairs(self, data: Tensor, grad: Tensor, ones: bool) -> Pairs:
        """Count all dims between the example and the feature as positions."""
        right, left = (side.reshape(1, len(side), -1, side.shape[-1]) for side in (data, grad))
        return _pairs(left, with_ones(right) if ones else right, "right")


@dataclass(frozen=True)
class Steps(Linear):
    """``Linear`` at each step of sequences [N, T, i] (or [T, N, i]): see ``recurrent_product``.

    ``whole``: the examples are not told apart, so that both dims are still there. A step that is padding, or whose
    input is zero because it is the first (``from_zero``), does not count.
    """

    lengths: fx.Node | None = None
    reverse: bool = False
    batch_first: bool = True
    from_zero: bool = False
    whole: bool = False

    chained = True

    @property
    def counting(self) -> fx.Node | None:
        """The node of the lengths."""
        return self.lengths

    def _ordered(self, value: Tensor) -> Tensor:
        """Bring [1, T, N, .] to [1, N, T, .]."""
        return value.transpose(1, 2) if self.whole and not self.batch_first else value

    def pairs(self, data: Tensor, grad: Tensor, ones: bool) -> Pairs:
        """Count sequences of an example, then their steps, as positions."""
        data = self._ordered(data)
        steps = data.shape[-2]
        made = super().pairs(data, self._ordered(grad), ones)
        return replace(made, chains=(steps,) * (data[0, ..., 0].numel() // steps))

    def bounded(self, pairs: Pairs, data: Tensor, lengths: Tensor | None) -> Pairs:
        """Zero the rows of steps that do not count."""
        if lengths is None and not self.from_zero:
            return pairs
        shape = self._ordered(data).shape[:-1]  # [n, ..., T]
        clock = torch.arange(shape[-1], device=data.device)
        ends = clock.new_tensor(shape[-1]) if lengths is None else lengths.to(data.device).unsqueeze(-1)
        valid = clock < ends
        if self.from_zero:
            valid = valid & (clock != (ends - 1 if self.reverse else 0))
        return pairs.masked(valid.expand(shape).reshape(shape[0], -1))


@dataclass(frozen=True)
class Embedding(Pairing):
    """``y[...] = W[index[...]]``: the left rows are one-hot, so G is the diagonal of the counts."""

    padding: int = -1
    size: int = 0

    sparse = True

    @property
    def has_column(self) -> bool:
        """Whether the bias is a coordinate: there is none."""
        return False

    def positions(self, data: Tensor, grad: Tensor, rows: int) -> int:
        """Count the indices."""
        return data.numel()

    def pairs(self, data: Tensor, grad: Tensor, ones: bool) -> Pairs:
        """Return one-hot rows and gradients; a padded position gives nothing, a negative number counts from the end."""
        n = len(data)
        index = data.reshape(n, -1).long()
        index = index.where(index >= 0, index + self.size)
        if self.padding >= 0:
            index = index.where(index != self.padding, -1)
        return _pairs(OneHot(index, self.size), grad.reshape(1, n, -1, grad.shape[-1]), "left")


@dataclass(frozen=True)
class Convolution(Pairing):
    """A convolution in any number of dims: W [O, C / K, *kernel]; the right rows are patches of the input.

    So i = (C / K)·prod(kernel), and R counts output positions.
    """

    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()

    def pairs(self, data: Tensor, grad: Tensor, ones: bool) -> Pairs:
        """Unfold the input; examples folded into the first dim become more positions."""
        n, rank = len(data), len(self.stride)
        image, out = data.reshape(-1, *data.shape[-rank - 1 :]), grad.reshape(-1, *grad.shape[-rank - 1 :])
        made = patches(
            image,
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            tuple(out.shape[2:]),
            self.groups,
            ones=ones,
        )  # [K, i, M, R]
        right = made.flatten(2).unflatten(2, (n, -1)).permute(0, 2, 3, 1)
        left = out.reshape(len(out), self.groups, -1, out[0, 0].numel()).permute(1, 2, 0, 3)  # [K, o, M, R]
        left = left.reshape(self.groups, left.shape[1], n, -1).permute(0, 2, 3, 1)
        return _pairs(left, right, "right")


@dataclass(frozen=True)
class TransposedConvolution(Pairing):
    """A transposed convolution: W [C, O / K, *kernel]; the left rows are the inputs, the right ones patches of g."""

    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()

    @property
    def has_column(self) -> bool:
        """Whether the bias is a coordinate: it belongs to the other side."""
        return False

    def positions(self, data: Tensor, grad: Tensor, rows: int) -> int:
        """Count the input positions."""
        return data.numel() // rows

    def pairs(self, data: Tensor, grad: Tensor, ones: bool) -> Pairs:
        """Unfold the gradient as the convolution that this one is the transpose of."""
        n, rank = len(data), len(self.stride)
        image, out = data.reshape(-1, *data.shape[-rank - 1 :]), grad.reshape(-1, *grad.shape[-rank - 1 :])
        made = patches(
            out, self.kernel, self.stride, self.padding, self.dilation, tuple(image.shape[2:]), self.groups
        )  # [K, i, M, R]
        right = made.flatten(2).unflatten(2, (n, -1)).permute(0, 2, 3, 1)
        left = image.reshape(len(image), self.groups, -1, image[0, 0].numel()).permute(1, 2, 0, 3)
        left = left.reshape(self.groups, left.shape[1], n, -1).permute(0, 2, 3, 1)
        return _pairs(left, right, "left")


@dataclass(frozen=True)
class Contraction(Pairing):
    """An einsum of data and one weight in letters, one per dim; "" is a dim of size one.

    Letters of the weight are groups K (also in data and output), inputs i (in the data, summed) and outputs o (in the
    output alone); letters that only data and output share are positions. ``data_letters`` and ``out_letters`` leave out
    the dim that counts the examples.
    """

    data_letters: tuple[str, ...] = ()
    weight_letters: tuple[str, ...] = ()
    out_letters: tuple[str, ...] = ()
    scale: float = 1.0
    column: bool = False

    @property
    def has_column(self) -> bool:
        """Whether what is added counts the outputs and nothing else."""
        return self.column

    def reading(self, shape: tuple[int, ...]) -> Reading:
        """Return the dims by what their letters are."""
        groups, outputs, inputs = (tuple(self.weight_letters.index(x) for x in kind) for kind in self._kinds())
        return groups, outputs, inputs, 1

    def _kinds(self) -> tuple[list[str], list[str], list[str]]:
        data, out = self.data_letters, self.out_letters
        letters = [letter for letter in self.weight_letters if letter]
        return (
            [letter for letter in letters if letter in data and letter in out],
            [letter for letter in letters if letter in out and letter not in data],
            [letter for letter in letters if letter in data and letter not in out],
        )

    def _order(self) -> list[int]:
        order = [self.weight_letters.index(letter) for kind in self._kinds() for letter in kind]
        return order + [place for place, letter in enumerate(self.weight_letters) if not letter]

    def matrix(self, weight: Tensor) -> Tensor:
        """Order the letters as groups, outputs, inputs."""
        size = dict(zip(self.weight_letters, weight.shape, strict=True))
        sizes = [math.prod(size[letter] for letter in kind) for kind in self._kinds()]
        return weight.permute(self._order()).reshape(sizes)

    def tensor(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Undo ``matrix``."""
        order = self._order()
        moved = matrix.reshape([shape[place] for place in order])
        return moved.permute([order.index(place) for place in range(len(order))])

    def pairs(self, data: Tensor, grad: Tensor, ones: bool) -> Pairs:
        """Bring both sides to [K, n, R, .]."""
        groups, outputs, inputs = self._kinds()
        known = {*groups, *outputs, *inputs, ""}
        positions = [x for x in self.data_letters if x in self.out_letters and x not in known]
        left = _arranged(grad, self.out_letters, groups, positions, outputs)
        right = _arranged(data, self.data_letters, groups, positions, inputs)
        right = right if self.scale == 1 else right * self.scale
        return _pairs(left, with_ones(right) if ones else right, "right")


def _arranged(value: Tensor, letters: tuple[str, ...], *kinds: list[str]) -> Tensor:
    names = ["N", *(["folded"] if value.dim() == len(letters) + 2 else []), *letters]
    groups, positions, last = kinds
    positions = ["folded", *positions] if "folded" in names else positions
    order = [names.index(letter) for letter in [*groups, "N", *positions, *last]]
    order += [place for place, letter in enumerate(names) if not letter]
    sizes = [
        math.prod(value.shape[names.index(letter)] for letter in kind) for kind in (groups, ["N"], positions, last)
    ]
    return value.permute(order).reshape(sizes)


Rule = Callable[[Any, fx.Node], "Pairing | None"]
PAIRINGS: dict[Any, Rule] = {}


def pairing(*targets: Any) -> Callable[[Rule], Rule]:
    """Register the rule of operations; it is called with the analysis (``fixed``, ``shape``) and the node."""

    def register(function: Rule) -> Rule:
        for target in targets:
            PAIRINGS[target] = function
        return function

    return register
