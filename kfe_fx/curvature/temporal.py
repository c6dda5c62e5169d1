"""Kronecker factors of weights that are shared over the steps of a sequence (Martens, Ba, Johnson 2018).

The gradient of one sequence is dW = sum_t g_t a_t^T. With C_d the covariance of what is d steps apart, inputs and
gradients independent of each other and each a linear Gaussian chain, C_d = Psi^d C_0 with Psi = C_1 C_0^{-1}, so that

    F = sum_{s,t <= T} Psi^{|s - t|} C_0 (transposed below the diagonal),    C_d = G_d (x) A_d

    rnn1    Psihat = C_0^{-1/2} C_1 C_0^{-1/2} symmetric, = U diag(psi) U^T per factor: F has the eigenvalues
            gamma_T(psi_G psi_A) in the coordinates C_0^{1/2} U
    rnn2    T without end: F / T = (I - Psi)^{-1} (C_0 - Psi C_0 Psi^T) (I - Psi^T)^{-1}

Both are G (x) A with the factors of "expand" where steps are uncorrelated. C_1 is summed over the pairs of steps that
there are and divided by the number of steps, as if sequences went on with zeros: so |Psihat| <= 1 and F is
positive semi-definite whatever the data (section B.2 of the paper).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from kfe_fx.curvature.block_operator import (
    FACTORED,
    MAX_DENSE,
    TIKHONOV,
    Operator,
    bound_dense,
    check_damping,
    split_damping,
)
from kfe_fx.errors import UsageError

RNN1, RNN2 = OPTIONS = ("rnn1", "rnn2")
_LEAST = 1e-14  # of eigenvalues of K that are divided by
_MOST_DOUBLINGS = 60
_CONVERGED = 1e-12
_MOST_STEPS = 2000  # of conjugate gradients
_LANCZOS = 80


def pair_sum(lengths: Tensor, x: Tensor) -> Tensor:
    """Return ``sum_T n_T gamma_T(x)`` with n_T = ``lengths[T]`` sequences of T steps.

    gamma_T(x) = sum_{s,t <= T} x^|s-t| = [T (1 - x²) - 2 x (1 - x^T)] / (1 - x)², T² for x = 1. The sum is one
    polynomial with coefficients n_T T and 2 n_T (T - d), so nothing cancels, and no length is averaged.

    Args:
        lengths: [L + 1], counts or shares.
        x: any shape, -1 to 1.
    """
    counts = lengths.to(x)
    steps = torch.arange(len(counts), device=x.device, dtype=x.dtype)
    left = (steps.unsqueeze(0) - steps.unsqueeze(1)).clamp_min(0)  # [d, T]: T - d
    terms = left @ counts * 2
    terms[0] /= 2
    total = torch.zeros_like(x)
    for term in terms.flip(0):
        total = total * x + term
    return total


@dataclass(frozen=True)
class Lagged:
    """What a temporal operator is made of.

    ``A`` [K, i, i] and ``G`` [K, o, o] are the factors of "expand", ``A1`` and ``G1`` the same of each step and the one
    before; ``lengths`` [L + 1] counts sequences by their steps.
    """

    A: Tensor
    G: Tensor
    A1: Tensor
    G1: Tensor
    lengths: Tensor

    def damped(self, damping: float) -> Lagged:
        """Add ``pi gamma I`` to A and ``gamma / pi I`` to G; see ``split_damping``."""
        more_G, more_A = split_damping(_diagonal(self.G), _diagonal(self.A), damping)
        return replace(self, A=_shifted(self.A, more_A), G=_shifted(self.G, more_G))

    def operator(self, option: str) -> TemporalOperator:
        """Return F by the option "rnn1" or "rnn2"."""
        held = self.double()
        left, right = held.whitened()
        forward = _SymmetricProduct.of(left, right, held.lengths) if option == RNN1 else _StationaryProduct(left, right)
        return TemporalOperator(option, held, forward, _inverse(option, left, right, held.lengths))

    def inverse(self, option: str) -> Inverse:
        """Return the pseudo-inverse of F by an option, in the type of the factors."""
        held = self.double()
        return _inverse(option, *held.whitened(), held.lengths).to(self.A)

    def double(self) -> Lagged:
        """Return the same in float64."""
        return Lagged(*(each.double() for each in (self.A, self.G, self.A1, self.G1, self.lengths)))

    def whitened(self) -> tuple[_Whitened, _Whitened]:
        """Return both sides, the left one (of G) first."""
        return _Whitened.of(self.G, self.G1), _Whitened.of(self.A, self.A1)


def _diagonal(factor: Tensor) -> Tensor:
    return factor.diagonal(dim1=1, dim2=2)


def _shifted(factor: Tensor, amount: Tensor) -> Tensor:
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return factor + amount.view(-1, 1, 1) * eye


@dataclass(frozen=True)
class _Whitened:
    """One side: ``root`` C_0^{1/2}, its pseudo-inverse, and ``psi`` C_0^{-1/2} C_1 C_0^{-1/2}, [K, d, d] each."""

    root: Tensor
    inverse: Tensor
    psi: Tensor

    @classmethod
    def of(cls, now: Tensor, lag: Tensor) -> _Whitened:
        values, vectors = torch.linalg.eigh(now)
        values = values.clamp_min(0)
        kept = values > torch.finfo(values.dtype).eps * values.shape[1] * values[:, -1:]
        root = torch.where(kept, values, 0.0).sqrt().unsqueeze(1)
        unroot = torch.where(kept, values, 1.0).rsqrt().unsqueeze(1) * kept.unsqueeze(1)
        inverse = vectors * unroot @ vectors.mT
        return cls(vectors * root @ vectors.mT, inverse, inverse @ lag @ inverse)


@dataclass(frozen=True)
class Inverse:
    """``v -> T^T (weight * T v)`` with ``T v = B_1 v C_1^T - B_2 v C_2^T``, where ``terms`` are (B, C) once or twice.

    B is [K, o, o], C [K, i, i], ``weight`` [K, o, i]. Option 1 has one term: B = U_G^T G^{-1/2}, C = U_A^T A^{-1/2},
    weight 1 / gamma. Option 2 has two: with psi psi^T = E diag(mu) E^T they are E^T C_0^{-1/2} and E^T psi C_0^{-1/2}
    of either side, weight 1 / (1 - mu_G mu_A).
    """

    terms: tuple[tuple[Tensor, Tensor], ...]
    weight: Tensor

    def apply(self, v: Tensor) -> Tensor:
        """Return the solution for ``v`` [..., K, o, i]."""
        made = self._signed([left @ v @ right.mT for left, right in self.terms]) * self.weight
        return self._signed([left.mT @ made @ right for left, right in self.terms])

    def _signed(self, parts: list[Tensor]) -> Tensor:
        return parts[0] if len(parts) == 1 else parts[0] - parts[1]

    def to(self, like: Tensor | torch.device) -> Inverse:
        """Return the same in the type and on the device of a tensor, or on a device."""
        return Inverse(tuple((left.to(like), right.to(like)) for left, right in self.terms), self.weight.to(like))


def _inverse(option: str, left: _Whitened, right: _Whitened, lengths: Tensor) -> Inverse:
    if option == RNN1:
        U_G, U_A, spectrum = _eigen(left, right, lengths)
        return Inverse(((U_G.mT @ left.inverse, U_A.mT @ right.inverse),), 1 / spectrum)
    (mu_G, E_G), (mu_A, E_A) = (torch.linalg.eigh(side.psi @ side.psi.mT) for side in (left, right))
    mu = (mu_G.clamp_min(0).unsqueeze(2) * mu_A.clamp_min(0).unsqueeze(1)).clamp_max(1 - _LEAST)
    first = E_G.mT @ left.inverse, E_A.mT @ right.inverse
    second = E_G.mT @ left.psi @ left.inverse, E_A.mT @ right.psi @ right.inverse
    return Inverse((first, second), 1 / (1 - mu))


def _eigen(left: _Whitened, right: _Whitened, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U_G, U_A and the eigenvalues [K, o, i] of option 1 between them, G being summed over the steps already."""
    (psi_G, U_G), (psi_A, U_A) = (torch.linalg.eigh((side.psi + side.psi.mT) / 2) for side in (left, right))
    x = (psi_G.unsqueeze(2) * psi_A.unsqueeze(1)).clamp(-1, 1)
    steps = (lengths * torch.arange(len(lengths), dtype=lengths.dtype, device=lengths.device)).sum()
    # for psi = -1 and even lengths the sum over pairs is zero
    return U_G, U_A, (pair_sum(lengths, x) / steps.clamp_min(1e-30)).clamp_min(_LEAST)


class _Product(Protocol):
    """F as a product."""

    def apply(self, v: Tensor) -> Tensor: ...

    def trace(self) -> float | None: ...


@dataclass(frozen=True)
class _SymmetricProduct:
    """Option 1: ``L diag(spectrum) L^T`` with L = C_0^{1/2} U of either side."""

    left: Tensor
    right: Tensor
    spectrum: Tensor

    @classmethod
    def of(cls, left: _Whitened, right: _Whitened, lengths: Tensor) -> _SymmetricProduct:
        U_G, U_A, spectrum = _eigen(left, right, lengths)
        return cls(left.root @ U_G, right.root @ U_A, spectrum)

    def apply(self, v: Tensor) -> Tensor:
        return self.left @ (self.spectrum * (self.left.mT @ v @ self.right)) @ self.right.mT

    def trace(self) -> float | None:
        high, wide = (side.square().sum(1) for side in (self.left, self.right))  # [K, d]
        return float((self.spectrum * high.unsqueeze(2) * wide.unsqueeze(1)).sum())


class _StationaryProduct:
    """Option 2: ``C_0^{1/2} (Z + Z^T - I) C_0^{1/2}`` with Z = (I - Psihat)^{-1} = prod_k (I + Psihat^(2^k))."""

    def __init__(self, left: _Whitened, right: _Whitened) -> None:
        self.roots = left.root, right.root
        one, other = left.psi, right.psi
        self.powers = [(one, other)]
        for _ in range(_MOST_DOUBLINGS):
            one, other = one @ one, other @ other
            size = torch.linalg.matrix_norm(one) * torch.linalg.matrix_norm(other)
            if not bool((size > torch.finfo(size.dtype).eps).any()):
                break
            self.powers.append((one, other))

    def apply(self, v: Tensor) -> Tensor:
        left, right = self.roots
        v = left @ v @ right
        forward = backward = v
        for one, other in self.powers:
            forward = forward + one @ forward @ other.mT
            backward = backward + one.mT @ backward @ other
        return left @ (forward + backward - v) @ right

    def trace(self) -> float | None:
        return None


@dataclass(frozen=True)
class TemporalOperator(Operator):
    """``F = scale · W K W`` of one block with W = G^{1/2} (x) A^{1/2}, in float64; see the module.

    Products and solves are those of the model's F. The damping "factored" adds to C_0 and leaves C_1, as the authors
    do, so that what is damped away is also uncorrelated; "tikhonov" takes conjugate gradients, preconditioned by the
    former. Norms and eigenvalues but for the largest, and of option 2 the trace, need the dense
    matrix.
    """

    option: str
    held: Lagged
    product: _Product
    inverse: Inverse
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """[K, o, i]."""
        return tuple(self.inverse.weight.shape)

    @property
    def like(self) -> Tensor:
        """The weights of the inverse."""
        return self.inverse.weight

    @property
    def has_factors(self) -> bool:
        """Whether it is what its factors say, and no multiple."""
        return self.scale == 1.0

    def matvec(self, v: Tensor) -> Tensor:
        """Return F v, [..., K, o, i] as ``v``."""
        self._fits(v)
        return (self.product.apply(v.double()) * self.scale).to(v.dtype)

    def solve(self, v: Tensor, damping: float, form: str = TIKHONOV) -> Tensor:
        """Return ``(F + damping I)^{-1} v``; see ``Operator``.

        Raises:
            UsageError: see ``Operator``; or conjugate gradients do not converge.
        """
        check_damping(damping, form, has_factors=self.has_factors)
        self._fits(v)
        if damping == 0:
            made = self.inverse.apply(v.double()) / (self.scale or 1.0)
            return (made * bool(self.scale)).to(v.dtype)
        if form == FACTORED:
            return self.held.damped(damping).inverse(self.option).apply(v.double()).to(v.dtype)
        return self._conjugate_gradients(v.double(), damping).to(v.dtype)

    def _conjugate_gradients(self, v: Tensor, damping: float) -> Tensor:
        if self.scale == 0:
            return v / damping
        near = self.held.damped(damping / self.scale).inverse(self.option)
        found, residual = torch.zeros_like(v), v
        direction, before = torch.zeros_like(v), torch.ones_like(v[..., 0, 0])
        goal = _CONVERGED * v.flatten(-2).norm(dim=-1)
        for _ in range(_MOST_STEPS):
            if bool((residual.flatten(-2).norm(dim=-1) <= goal).all()):
                return found
            turned = near.apply(residual)
            now = (residual * turned).sum((-2, -1))
            direction = turned + direction * _share(now, before)
            product = self.matvec(direction) + damping * direction
            step = _share(now, (direction * product).sum((-2, -1)))
            found, residual, before = found + step * direction, residual - step * product, now
        raise UsageError(f"the damping {damping:g} is too small to solve with; take more, or the form 'factored'")

    def quadratic(self, v: Tensor) -> Tensor:
        """Return v^T F v, [...]; it can be differentiated by ``v``."""
        return (v.double() * self.matvec(v.double())).sum((-3, -2, -1))

    def trace(self) -> float:
        """Return tr F."""
        known = self.product.trace()
        return float(self.dense().trace()) if known is None else known * self.scale

    def frobenius_norm(self) -> float:
        """Return ||F||_F."""
        return float(torch.linalg.matrix_norm(self.dense()))

    def spectral_norm(self) -> float:
        """Return the largest eigenvalue: of the dense matrix, or by the Lanczos iteration where that is too large."""
        small = self.inverse.weight.numel() <= MAX_DENSE
        return float(self.eigenvalues()[-1]) if small else self._lanczos()

    def _lanczos(self) -> float:
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(self.shape, generator=generator, dtype=torch.float64).to(self.like.device)
        basis = [v / v.norm()]
        along, across = [], []
        for _ in range(_LANCZOS):
            made = self.matvec(basis[-1])
            along.append(float((made * basis[-1]).sum()))
            for _ in range(2):  # rounding would find the largest eigenvalue again and again
                for one in basis:
                    made = made - (made * one).sum() * one
            across.append(float(made.norm()))
            if across[-1] <= _CONVERGED * abs(along[0]):
                break
            basis.append(made / across[-1])
        band = torch.tensor(across[: len(along) - 1], dtype=torch.float64)
        ritz = torch.diag(torch.tensor(along, dtype=torch.float64)) + torch.diag(band, 1) + torch.diag(band, -1)
        return float(torch.linalg.eigvalsh(ritz)[-1])

    def eigenvalues(self) -> Tensor:
        """Return all eigenvalues, ascending, [K·o·i]."""
        return torch.linalg.eigvalsh(self.dense()).clamp_min(0)

    def dense(self) -> Tensor:
        """Write F out, [K·o·i, K·o·i] over the row-major entries of [K, o, i]."""
        groups, high, wide = self.shape
        bound_dense(groups * high * wide)
        eye = torch.eye(groups * high * wide, dtype=torch.float64, device=self.like.device)
        made = self.matvec(eye.view(-1, groups, high, wide)).flatten(1)
        return (made + made.T) / 2

    def to(self, device: torch.device) -> TemporalOperator:
        """Return the operator on a device."""
        held = self.held
        moved = Lagged(*(each.to(device) for each in (held.A, held.G, held.A1, held.G1, held.lengths)))
        return self if self.like.device == device else replace(moved.operator(self.option), scale=self.scale)

    def scaled(self, factor: float) -> TemporalOperator:
        """Return ``factor`` F, without factors of its own."""
        return replace(self, scale=self.scale * factor)


def _share(one: Tensor, other: Tensor) -> Tensor:
    """Return one / other [..., K, 1, 1], zero where both are."""
    return (one / other.where(other != 0, 1.0))[..., None, None]
