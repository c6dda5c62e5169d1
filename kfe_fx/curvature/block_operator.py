"""The curvature of one block as a linear operator, and what every such operator can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kfe_fx.errors import UsageError

TIKHONOV, FACTORED = FORMS = ("tikhonov", "factored")
MAX_DENSE = 4096  # rows of the largest matrix that is written out


class Operator(ABC):
    """``F`` of one block, symmetric and positive semi-definite, on matrices [..., K, o, i]; see ``Block``."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """[K, o, i]."""

    @property
    @abstractmethod
    def like(self) -> Tensor:
        """A tensor of the operator's type and device."""

    @property
    @abstractmethod
    def has_factors(self) -> bool:
        """Whether there are factors to damp: see ``solve``."""

    @abstractmethod
    def matvec(self, v: Tensor) -> Tensor:
        """Return F v, [..., K, o, i] as ``v``."""

    @abstractmethod
    def solve(self, v: Tensor, damping: float, form: str = TIKHONOV) -> Tensor:
        """Return ``(F + damping I)^{-1} v`` exactly; at damping 0 the pseudo-inverse, which maps what F ignores to 0.

        Args:
            v: [..., K, o, i].
            damping: lambda, at least 0.
            form: "tikhonov", or "factored" for an approximation that adds to the Kronecker factors
                (``split_damping``). Only K-FAC has it.

        Raises:
            UsageError: the damping is negative or not a number, or there are no factors to damp.
        """

    @abstractmethod
    def quadratic(self, v: Tensor) -> Tensor:
        """Return v^T F v, [...]; it can be differentiated by ``v``."""

    @abstractmethod
    def trace(self) -> float:
        """Return tr F, for EKFAC and the diagonal the mean squared norm of an example's gradient."""

    @abstractmethod
    def frobenius_norm(self) -> float:
        """Return ||F||_F."""

    @abstractmethod
    def spectral_norm(self) -> float:
        """Return the largest eigenvalue."""

    @abstractmethod
    def eigenvalues(self) -> Tensor:
        """Return all eigenvalues, ascending, [K·o·i]."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Write F out, [K·o·i, K·o·i] over the row-major entries of [K, o, i].

        Raises:
            UsageError: it would have more than 4,096 rows.
        """

    @abstractmethod
    def to(self, device: torch.device) -> Operator:
        """Return the operator on a device."""

    @abstractmethod
    def scaled(self, factor: float) -> Operator:
        """Return ``factor`` F, without factors of its own."""

    def _fits(self, v: Tensor) -> None:
        if tuple(v.shape[-3:]) != tuple(self.shape):
            raise UsageError(f"a vector of this block is [..., {', '.join(map(str, self.shape))}], not {[*v.shape]}")


def check_damping(damping: float, form: str, *, has_factors: bool) -> None:
    """Refuse a damping that means nothing.

    Raises:
        UsageError: it is negative or not a number, of an unknown form, or there are no factors to damp.
    """
    if not damping >= 0:
        raise UsageError(f"the damping is {damping}; give a number that is not negative")
    if form not in FORMS:
        raise UsageError(f"there is no damping {form!r}; choose {' or '.join(FORMS)}")
    if form == FACTORED and not has_factors:
        raise UsageError("only K-FAC has factors to damp; take the damping 'tikhonov'")


def split_damping(high: Tensor, wide: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return what is added to G and to A, gamma / pi and pi gamma, [K, 1] each (Martens & Grosse 2015, section 6.3).

    gamma = sqrt(damping) and pi² = (tr A / i) / (tr G / o) per group, 1 where a trace is zero.

    Args:
        high: eigenvalues or diagonal of G, [K, o].
        wide: of A, [K, i].
        damping: lambda.
    """
    ratio = (wide.mean(1) / high.mean(1)).sqrt()
    pi = ratio.where(ratio.isfinite() & (ratio > 0), 1.0).unsqueeze(1)
    gamma = damping**0.5
    return gamma / pi, pi * gamma


def bound_dense(rows: int) -> None:
    """Refuse to write out a matrix that is too large.

    Raises:
        UsageError: it has more than 4,096 rows.
    """
    if rows > MAX_DENSE:
        raise UsageError(
            f"a dense matrix of {rows:,} rows is too large (at most {MAX_DENSE:,}); use products and solves"
        )


@dataclass(frozen=True)
class BlockOperator(Operator):
    """``F = Q diag(spectrum) Q^T`` of one block, on matrices [..., K, o, i]; see ``Block``.

    ``spectrum`` [K, o, i] holds the eigenvalues, ``U_G`` [K, o, o] and ``U_A`` [K, i, i] the basis (None: identity),
    ``factors`` lam_G [K, o] and lam_A [K, i] where the spectrum is their product.
    """

    spectrum: Tensor
    U_G: Tensor | None = None
    U_A: Tensor | None = None
    factors: tuple[Tensor, Tensor] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """[K, o, i]."""
        return tuple(self.spectrum.shape)

    @property
    def like(self) -> Tensor:
        """The eigenvalues."""
        return self.spectrum

    @property
    def has_factors(self) -> bool:
        """Whether the spectrum is a product."""
        return self.factors is not None

    def matvec(self, v: Tensor) -> Tensor:
        """Return F v, [..., K, o, i] as ``v``."""
        return self._through(v, self.spectrum)

    def solve(self, v: Tensor, damping: float, form: str = TIKHONOV) -> Tensor:
        """Return ``(F + damping I)^{-1} v`` exactly; see ``Operator``.

        The form "factored" is ``(G + gamma / pi I)^{-1} (x) (A + pi gamma I)^{-1}``.
        """
        check_damping(damping, form, has_factors=self.has_factors)
        if damping == 0:
            return self._through(v, self._pseudo_inverse())
        if form == FACTORED:
            return self._through(v, self._factored(damping).reciprocal())
        return self._through(v, (self.spectrum + damping).reciprocal())

    def _factored(self, damping: float) -> Tensor:
        assert self.factors is not None
        high, wide = self.factors
        more_high, more_wide = split_damping(high, wide, damping)
        return (high + more_high).unsqueeze(2) * (wide + more_wide).unsqueeze(1)

    def _pseudo_inverse(self) -> Tensor:
        # Rounding leaves eigenvalues of a singular factor at eps of the largest; of a second moment, a square, at eps².
        eps = torch.finfo(self.spectrum.dtype).eps
        if self.factors is not None:
            high, wide = (_inverse(side, eps * side.shape[1] * side.amax(1, keepdim=True)) for side in self.factors)
            return high.unsqueeze(2) * wide.unsqueeze(1)
        least = (eps * max(self.spectrum.shape[1:])) ** 2 if self.U_A is not None or self.U_G is not None else 0.0
        return _inverse(self.spectrum, least * self.spectrum.amax((1, 2), keepdim=True))

    def quadratic(self, v: Tensor) -> Tensor:
        """Return v^T F v, [...]; it can be differentiated by ``v``."""
        spectrum, left, right = self._like(v, self.spectrum)
        return (spectrum * _rotated(v.to(spectrum.dtype), left, right).square()).sum((-3, -2, -1))

    def trace(self) -> float:
        """Return tr F, for EKFAC and the diagonal the mean squared norm of an example's gradient."""
        return float(self.spectrum.sum(dtype=torch.float64))

    def frobenius_norm(self) -> float:
        """Return ||F||_F."""
        return float(torch.linalg.vector_norm(self.spectrum, dtype=torch.float64))

    def spectral_norm(self) -> float:
        """Return the largest eigenvalue."""
        return float(self.spectrum.max())

    def eigenvalues(self) -> Tensor:
        """Return all eigenvalues, ascending, [K·o·i]."""
        return self.spectrum.reshape(-1).sort().values

    def dense(self) -> Tensor:
        """Write F out, [K·o·i, K·o·i] over the row-major entries of [K, o, i].

        Raises:
            UsageError: it would have more than 4,096 rows.
        """
        bound_dense(self.spectrum.numel())
        made = []
        for group, spectrum in enumerate(self.spectrum):
            left, right = (
                torch.eye(size, dtype=spectrum.dtype, device=spectrum.device) if basis is None else basis[group]
                for basis, size in zip((self.U_G, self.U_A), spectrum.shape, strict=True)
            )
            basis = torch.kron(left.contiguous(), right.contiguous())
            made.append(basis * spectrum.reshape(-1) @ basis.T)
        return torch.block_diag(*made)

    def to(self, device: torch.device) -> BlockOperator:
        """Return the operator on a device."""
        left, right = (None if basis is None else basis.to(device) for basis in (self.U_G, self.U_A))
        factors = None if self.factors is None else (self.factors[0].to(device), self.factors[1].to(device))
        return BlockOperator(self.spectrum.to(device), left, right, factors)

    def scaled(self, factor: float) -> BlockOperator:
        """Return ``factor`` F, without factors of its own."""
        return replace(self, spectrum=self.spectrum * factor, factors=None)

    def _through(self, v: Tensor, spectrum: Tensor) -> Tensor:
        """Return Q diag(spectrum) Q^T v in the type of ``v``."""
        spectrum, left, right = self._like(v, spectrum)
        made = _rotated(v.to(spectrum.dtype), left, right) * spectrum
        return _rotated(made, _transposed(left), _transposed(right)).to(v.dtype)

    def _like(self, v: Tensor, spectrum: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return what is held in the wider of its own type and that of a vector, after looking at its shape."""
        self._fits(v)
        kind = torch.promote_types(v.dtype, spectrum.dtype)
        left, right = (None if basis is None else basis.to(kind) for basis in (self.U_G, self.U_A))
        return spectrum.to(kind), left, right


def _rotated(v: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Return left^T v right."""
    made = v if left is None else left.transpose(1, 2) @ v
    return made if right is None else made @ right


def _transposed(basis: Tensor | None) -> Tensor | None:
    return None if basis is None else basis.transpose(1, 2)


def _inverse(values: Tensor, floor: Tensor) -> Tensor:
    kept = values > floor
    return torch.where(kept, values, 1.0).reciprocal() * kept
