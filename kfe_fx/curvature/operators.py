"""Curvature as linear operators: products, exact damped solves, traces and norms, of one block or of a whole network.

Vectorisation is row-major: vec(dW) = g (x) abar, so (G (x) A) vec(X) = vec(G X A^T). Every approximation of a block is
``F = Q diag(spectrum) Q^T`` with Q = U_G (x) U_A orthogonal (or the identity):

    diagonal    Q = I               spectrum = D                  second moments of the parameters' own gradients
    kfac        Q = U_G (x) U_A     spectrum = lam_G lam_A^T      Martens & Grosse 2015
    ekfac       Q = U_G (x) U_A     spectrum = S*                 George et al. 2018

The K-FAC of a recurrent layer may instead model how its steps are correlated (``kfe_fx.curvature.temporal``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kfe_fx.curvature.block_operator import FACTORED, MAX_DENSE, TIKHONOV, BlockOperator, Operator, bound_dense
from kfe_fx.curvature.blocks import Block, LeftOut, find_blocks
from kfe_fx.curvature.statistics import EXPAND
from kfe_fx.curvature.temporal import OPTIONS
from kfe_fx.errors import UsageError
from kfe_fx.program import Program

if TYPE_CHECKING:
    from kfe_fx.curvature.store import BlockStore, Store

__all__ = ["FACTORED", "MAX_DENSE", "TIKHONOV", "BlockOperator", "Curvature", "Operator", "Vector", "block_operator"]

DIAGONAL, KFAC, EKFAC = KINDS = ("diagonal", "kfac", "ekfac")


def block_operator(held: BlockStore, kind: str, sharing: str = EXPAND) -> Operator | None:
    """Make the operator of one block, or None where the store has no such statistics of it.

    A block without Kronecker structure has a diagonal under every kind: its S* is one, for its basis is the identity.
    With the ``sharing`` "rnn1" or "rnn2" a block whose weight is shared over the steps of sequences has the K-FAC of
    that option (``kfe_fx.curvature.temporal``), and no eigenbases are needed.

    Raises:
        UsageError: the store holds factors whose eigenbases were never computed.
    """
    if held.kind == "diagonal":
        spectrum = held.D if held.D is not None else held.S
        return None if spectrum is None else BlockOperator(spectrum)
    if kind == DIAGONAL:
        return None if held.D is None else BlockOperator(held.D)
    if kind == KFAC and sharing in OPTIONS and (lagged := held.lagged) is not None:
        return lagged.operator(sharing)
    high, wide = held.basis.get("lam_G"), held.basis.get("lam_A")
    if high is None or wide is None:
        if held.A is not None:
            raise UsageError("these factors have no eigenbases yet; call decompose() on the store")
        return None
    bases = held.basis.get("U_G"), held.basis.get("U_A")
    if kind == KFAC:
        return BlockOperator(high.unsqueeze(2) * wide.unsqueeze(1), *bases, (high, wide))
    return None if held.S is None else BlockOperator(held.S, *bases)


class Vector(dict[str, Tensor]):
    """Tensors by name of a parameter; ``missing`` names parameters that were given and that the result leaves out."""

    def __init__(self, values: Mapping[str, Tensor], missing: tuple[str, ...] = ()) -> None:
        """Hold copies of nothing: the tensors are those given."""
        super().__init__(values)
        self.missing = missing


class Curvature:
    """``F`` of a network, block by block, on vectors {name: tensor of the parameter's shape}.

    Names are those of ``program.module().named_parameters()``. ``parameters`` are those that F is of, ``missing`` the
    others with the reason why; what a vector says of those is left out of every result, and named there. Entries of a
    parameter that the network never uses have zero curvature.

    Example:
        store = fit(program, data, statistics="ekfac")
        curvature = store.operator(program, "ekfac")
        step = curvature.solve({name: p.grad for name, p in program.module().named_parameters()}, damping=1e-3)
    """

    def __init__(self, store: Store, program: Program, kind: str = EKFAC) -> None:
        """Bind statistics to a network.

        Args:
            store: the statistics, on the same graph and shapes.
            program: the network; parameters give names, shapes and devices.
            kind: "diagonal", "kfac" or "ekfac".

        Raises:
            UsageError: the statistics are of another network, or hold nothing of this kind.
        """
        if kind not in KINDS:
            raise UsageError(f"there is no curvature {kind!r}; choose {', '.join(KINDS)}")
        store.check(program)
        self.kind = kind
        self._shapes = {name: tuple(value.shape) for name, value in program.module().named_parameters()}
        found, sharing = find_blocks(program), store.facts.get("sharing", EXPAND)
        reasons = {item.parameter: item.reason for item in found.left_out}
        made: dict[str, tuple[Block, Operator]] = {}
        for block in found.blocks:
            held = store.blocks.get(block.name)
            if held is not None and held.shape != block.shape:
                raise UsageError(f"the statistics of {block.name} were measured in another form; fit them again")
            operator = None if held is None else block_operator(held, kind, sharing)
            if operator is None:
                for name in block.parameters:
                    reasons.setdefault(name, f"the store has no {kind} statistics of {block.name}")
            else:
                made[block.name] = (block, operator.to(program.tensor(block.weight).device))
        _drop(made, reasons)
        if not made:
            raise UsageError(f"these statistics hold nothing to make {kind!r} of; fit them with statistics={kind!r}")
        self.pairs = tuple(made.values())
        covered = {name for block, _ in self.pairs for name in block.parameters}
        self.parameters = tuple(name for name in self._shapes if name in covered)
        others = [name for name in self._shapes if name not in covered]
        self.missing = tuple(LeftOut(name, reasons.get(name, "is not floating-point")) for name in others)

    @property
    def blocks(self) -> dict[str, Operator]:
        """The operator of each block."""
        return {block.name: operator for block, operator in self.pairs}

    @property
    def size(self) -> int:
        """How many entries the parameters have."""
        return sum(torch.Size(self._shapes[name]).numel() for name in self.parameters)

    def matvec(self, v: Mapping[str, Tensor]) -> Vector:
        """Return F v.

        Raises:
            UsageError: ``v`` lacks a parameter, has a name too many or a tensor of another shape.
        """
        return self._each(v, lambda operator, matrix: operator.matvec(matrix), None)

    def solve(self, v: Mapping[str, Tensor], damping: float, form: str = TIKHONOV) -> Vector:
        """Return ``(F + damping I)^{-1} v``; see ``Operator.solve``.

        Under the form "factored" blocks with a diagonal, which have no factors, are damped as they are.

        Raises:
            UsageError: the damping is negative, factors are to be damped where there are none, or ``v`` does not fit.
        """
        if form == FACTORED and self.kind != KFAC:
            raise UsageError(f"{self.kind} has no factors to damp; take the damping 'tikhonov'")

        def solved(operator: Operator, matrix: Tensor) -> Tensor:
            return operator.solve(matrix, damping, form if operator.has_factors else TIKHONOV)

        return self._each(v, solved, damping)

    def quadratic(self, v: Mapping[str, Tensor]) -> Tensor:
        """Return v^T F v over ``parameters``; it can be differentiated by ``v``.

        Raises:
            UsageError: ``v`` does not fit.
        """
        self._check(v)
        parts = [operator.quadratic(block.matrix(dict(v))) for block, operator in self.pairs]
        return torch.stack([part.to(parts[0]) for part in parts]).sum()

    def trace(self) -> float:
        """Return tr F."""
        return sum(operator.trace() for _, operator in self.pairs)

    def frobenius_norm(self) -> float:
        """Return ||F||_F."""
        return sum(operator.frobenius_norm() ** 2 for _, operator in self.pairs) ** 0.5

    def spectral_norm(self) -> float:
        """Return the largest eigenvalue."""
        return max(operator.spectral_norm() for _, operator in self.pairs)

    def eigenvalues(self) -> Tensor:
        """Return all eigenvalues, ascending, one per entry of ``parameters``."""
        parts = [operator.eigenvalues().cpu() for _, operator in self.pairs]
        unused = self.size - sum(len(part) for part in parts)
        return torch.cat([*parts, parts[0].new_zeros(unused)]).sort().values

    def dense(self) -> Tensor:
        """Write F out over the row-major entries of ``parameters``, one parameter behind the other.

        Raises:
            UsageError: it would have more than 4,096 rows.
        """
        bound_dense(self.size)
        places: dict[str, Tensor] = {}
        start = 0
        for name in self.parameters:
            count = torch.Size(self._shapes[name]).numel()
            places[name] = torch.arange(start, start + count).view(self._shapes[name])
            start += count
        made = self.pairs[0][1].like.new_zeros(start, start, device="cpu")
        for block, operator in self.pairs:
            index = block.matrix(places).reshape(-1)
            made[index.unsqueeze(1), index] = operator.dense().to(made)
        return made

    def _check(self, v: Mapping[str, Tensor]) -> None:
        for name, value in v.items():
            if name not in self._shapes:
                raise UsageError(
                    f"there is no parameter {name!r}; vectors have the names of module().named_parameters()"
                )
            if tuple(value.shape) != self._shapes[name]:
                raise UsageError(f"{name} is {list(value.shape)} in this vector, the parameter {[*self._shapes[name]]}")
        absent = [name for name in self.parameters if name not in v]
        if absent:
            raise UsageError(f"this vector lacks {absent[0]!r}; give a tensor (of zeros) for each of `parameters`")

    @torch.no_grad()
    def _each(
        self, v: Mapping[str, Tensor], function: Callable[[Operator, Tensor], Tensor], damping: float | None
    ) -> Vector:
        """Apply a function per block; ``damping`` says what becomes of entries outside all blocks, where F is zero."""
        self._check(v)
        made = Vector({}, tuple(name for name in v if name not in self.parameters))
        for name in self.parameters:
            made[name] = torch.zeros(self._shapes[name], dtype=v[name].dtype, device=v[name].device)
            if damping:
                made[name] += v[name] / damping
        for block, operator in self.pairs:
            block.put(function(operator, block.matrix(dict(v))), made)
        return made


def _drop(made: dict[str, tuple[Block, Operator]], reasons: dict[str, str]) -> None:
    """Take out blocks that share a parameter with one that has no statistics: of half a parameter there is no F."""
    while True:
        halves = [block for block, _ in made.values() if any(name in reasons for name in block.parameters)]
        if not halves:
            return
        for block in halves:
            del made[block.name]
            for name in block.parameters:
                reasons.setdefault(name, f"shares the block {block.name} with a parameter that has no statistics")
