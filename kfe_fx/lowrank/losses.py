"""What decompositions lose under the Fisher of each layer itself, with everything that importances leave out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kfe_fx.curvature.blocks import Block, find_blocks
from kfe_fx.curvature.distributed import Group
from kfe_fx.curvature.fit import Fitter
from kfe_fx.curvature.kernels import BUFFER
from kfe_fx.curvature.pairs import Pairs
from kfe_fx.curvature.statistics import Statistic
from kfe_fx.errors import BadData
from kfe_fx.lowrank.axes import weight_of
from kfe_fx.lowrank.kfe import Kfe, rotated
from kfe_fx.program import Program
from kfe_fx.training.batches import Batches


def with_fisher_losses(
    program: Program,
    data: Any,
    axes: Mapping[str, Kfe],
    *,
    loss: Any = None,
    source: str = "auto",
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, Kfe]:
    """Return the axes with losses under the Fisher of each layer, for every pair of ranks at once.

        loss(c, r) = 1/2 E_n[ <dW_n, D>^2 ]        D: what W loses with c columns and r rows left
                   = 1/2 E_n[ (sum over what goes of W'_jkt (U_G^T dW_n,t U_A)_jk)^2 ]

    The sum stands before the square: importances count each entry by itself, and leave out that kernel elements,
    positions and entries of one example act together, which is most of the loss of a trained network. It is what
    Fisher pruning measures of a channel, so that the two can be compared. One pass over the data; the arguments are
    those of ``curvature.fit``.

    Raises:
        BadData: there is nothing to measure on.
    """
    owners = {name: one for one in axes.values() for name in program.names_of(one.layer.measured.weight)}
    found = find_blocks(program)
    blocks = tuple(block for block in found.blocks if block.name in owners and block.kind == "kronecker")
    chosen = replace(found, blocks=blocks)
    fitter = Fitter(program, chosen, Batches(program, data, batch_size), loss, source, 1, seed, None)
    sums = _Losses({block.name: _Rotation.of(program, owners[block.name]) for block in blocks})
    fitter.run([sums], 0, 1)
    made = {}
    for block in blocks:
        name, one = next((name, one) for name, one in axes.items() if one is owners[block.name])
        rotation = sums.rotations[block.name]
        Group.current().sum([rotation.total])
        count = Group.current().sum_number(rotation.examples)
        if not count:
            raise BadData(f"no gradient of {block.name} was finite, so nothing was measured; check the data")
        made[name] = replace(one, lost=rotation.total / (2 * count))
    return {**axes, **made}


@dataclass
class _Rotation:
    """A layer's bases and weight W' [o, i, T], and the sum of squares of what goes, [o + 1, i + 1]."""

    U_A: Tensor
    U_G: Tensor
    weight: Tensor
    total: Tensor
    examples: float = 0.0

    @classmethod
    def of(cls, program: Program, axes: Kfe) -> _Rotation:
        like = program.tensor(axes.layer.measured.weight).detach()
        weight = rotated(weight_of(program, axes.layer.measured), axes.U_G, axes.U_A)
        rows, columns = weight.shape[:2]
        total = torch.zeros(rows + 1, columns + 1, dtype=torch.float64, device=like.device)
        return cls(axes.U_A.to(like), axes.U_G.to(like), weight.to(like), total)


@dataclass
class _Losses(Statistic):
    rotations: dict[str, _Rotation] = field(default_factory=dict)

    def add(self, block: Block, pairs: Pairs, first: bool) -> None:
        """Add the squares of a few examples."""
        held = self.rotations[block.name]
        left, right = pairs.dense()
        examples = left.shape[1]
        held.examples += examples if first else 0
        rows, columns, taps = held.weight.shape
        step = max(1, BUFFER // (8 * rows * columns * taps))
        for start in range(0, examples, step):
            part = slice(start, start + step)
            g = left[0, part] @ held.U_G  # [n, R, o]
            a = right[0, part, :, : columns * taps].unflatten(-1, (columns, taps))  # without the bias's coordinate
            a = torch.einsum("nrct,ck->nrkt", a, held.U_A).flatten(2)
            gradient = torch.bmm(g.transpose(1, 2), a).unflatten(-1, (columns, taps))  # [n, o, i, T]
            each = (gradient * held.weight).sum(-1).double()
            kept = each.new_zeros(len(each), rows + 1, columns + 1)
            kept[:, 1:, 1:] = each.cumsum(1).cumsum(2)
            held.total += (kept[:, -1:, -1:] - kept).square_().sum(0)
