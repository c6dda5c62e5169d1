"""Group lasso over removable units: training that drives whole units to zero, so that they can be removed.

    penalty = lambda * sum over units k of  sqrt( sum over w in unit k of w^2 + 1e-8 )

(Wen et al. 2018, "Learning intrinsic sparse structures within long short-term memory"; here of any network, a unit
being what the label analysis found to go together.) An entry that lies in several slices of a unit counts once in it,
an entry of two units counts in both: groups overlap.

Weights that a batch norm follows have no say in the size of what it returns, so their norm means nothing, and only the
norm's own parameters and the unit's consumers are penalised; ``exclusion`` adds rules for operations that normalise
inside. The element-wise threshold of the paper (|w| < 1e-4 becomes 0 at each step) is not here: units are removed whole
and told by their norm, and single entries of units that stay would be lost for nothing.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from kfe_fx import taps
from kfe_fx.curvature.operands import MOVEMENTS
from kfe_fx.errors import UsageError
from kfe_fx.labels.analysis import Analysis, analyze
from kfe_fx.labels.convolution import WHOLE
from kfe_fx.labels.registry import overloads
from kfe_fx.program import Program, tied_names
from kfe_fx.recurrent.op import RECURRENT, Arguments

aten = torch.ops.aten

EPS = 1e-8  # under the root: the gradient of a zero group is zero
NEAR_ZERO = 1e-3  # of the largest norm in a group of units

Excluded = dict[tuple[str, int], str]
Exclusion = Callable[[Analysis], Excluded]
_EXCLUSIONS: list[Exclusion] = []


def exclusion(rule: Exclusion) -> Exclusion:
    """Register a rule that says which dims of parameters have no meaningful norm: ``{(parameter, dim): why}``."""
    _EXCLUSIONS.append(rule)
    return rule


def excluded(analysis: Analysis) -> Excluded:
    """Return the (parameter, dim) whose slices are no part of a unit's norm, and why; parameters by canonical name."""
    found: Excluded = {}
    for rule in _EXCLUSIONS:
        for place, why in rule(analysis).items():
            found.setdefault(place, why)
    return found


# operation -> (argument, dim of that parameter that is the channel of the output)
_OUT: dict[Any, tuple[tuple[int, int], ...]] = {
    **dict.fromkeys(
        overloads(aten, *(f"conv{n}d.{kind}" for n in (1, 2, 3) for kind in ("default", "padding")), "linear.default"),
        ((1, 0), (2, 0)),
    ),
    **dict.fromkeys(
        overloads(aten, "conv_transpose1d.default", "conv_transpose2d.input", "conv_transpose3d.input"),
        ((1, 1), (2, 0)),
    ),
    **dict.fromkeys((aten.matmul.default, aten.mm.default), ((1, -1),)),
    aten.addmm.default: ((2, -1), (0, -1)),
}
_NORMS = (aten.batch_norm.default, aten.instance_norm.default)  # one statistic for each channel
_USES_BATCH = 5  # the argument of both that asks for the statistic of the batch


@exclusion
def before_batch_norm(analysis: Analysis) -> Excluded:
    """Find what directly feeds batch norms: ``L(c w_k) = L(w_k)``, for weights w_k of a channel, in training.

    These are the output channels, and the bias, of contractions whose every use is a batch or instance norm with
    statistics of the batch, past data movement that leaves each unit to channels of its own. A parameter with another
    use is not excluded: there its size counts.
    """
    mode = "train" if "train" in analysis.program.graphs else "eval"
    canonical = {name: names[0] for name, names in tied_names(analysis.program.module()).items()}
    uses: dict[str, list[tuple[int, fx.Node] | None]] = defaultdict(list)
    for node in analysis.program.graphs[mode].find_nodes(op="get_attr"):
        name = canonical.get(str(node.target), str(node.target))
        uses[name] += [_fed(analysis, mode, name, node, user) for user in taps.users_of(node)]
    found: Excluded = {}
    for name, fed in uses.items():
        dims = {None if one is None else one[0] for one in fed}
        if len(dims) == 1 and fed[0] is not None:
            dim, norm = fed[0]
            found[name, dim] = f"feeds {norm.target} at {norm.meta.get('module') or norm.name}: its scale has no effect"
    return found


@exclusion
def inside_recurrent_layers(analysis: Analysis) -> Excluded:
    """Find the gate rows whose products a recurrent layer normalises by the batch; its biases shift what comes out."""
    mode = "train" if "train" in analysis.program.graphs else "eval"
    canonical = {name: names[0] for name, names in tied_names(analysis.program.module()).items()}
    found: Excluded = {}
    for node in analysis.program.graphs[mode].find_nodes(op="call_function", target=RECURRENT):
        call = Arguments.of(node)
        for weight, gamma in ((call.weight_ih, call.gamma_ih), (call.weight_hh, call.gamma_hh)):
            if gamma is not None and call.training and weight.op == "get_attr" and len(weight.users) == 1:
                name = canonical.get(str(weight.target), str(weight.target))
                found[name, 0] = f"is normalised inside {node.meta.get('module') or node.name}: its scale has no effect"
    return found


def _fed(analysis: Analysis, mode: str, name: str, node: fx.Node, user: fx.Node) -> tuple[int, fx.Node] | None:
    """Return the dim of a parameter that one use of it sends into norms, and the first of these."""
    norms = _norms_behind(user) if user.target in _OUT else []
    for place, dim in _OUT[user.target] if norms else ():
        given = user.args[place] if place < len(user.args) else user.kwargs.get("bias")
        if given is not node:
            continue
        whole = analysis.trackers[mode].decisions.get(user.name) == WHOLE  # then dim 0 runs over inputs and outputs
        layout = analysis.params.get(name, [])
        dim = 0 if whole else dim % max(len(layout), 1)
        units = _units(layout[dim]) if layout else set()
        if units and all(_has_channels(analysis.layout(norm.name, mode), units) for norm in norms):
            return dim, norms[0]
    return None


def _norms_behind(node: fx.Node) -> list[fx.Node]:
    """Return the norms that a value goes into, moved about at most; none where anything else reads it."""
    found: list[fx.Node] = []
    for user in taps.users_of(node):
        if user.target is aten.sym_size.int:
            continue
        first = user.args[0] if user.args else None
        if not isinstance(first, fx.Node) or taps.untapped(first) is not node:
            return []
        live = user.target in _NORMS and user.args[_USES_BATCH]
        behind = [user] if live else _norms_behind(user) if user.target in MOVEMENTS else []
        if not behind:
            return []
        found += behind
    return found


def _has_channels(layout: list[tuple[np.ndarray, ...]], units: set[int]) -> bool:
    """Tell whether units lie along the channels of a norm, and nowhere else: no statistic then runs over two."""
    return units <= _units(layout[1]) and not any(units & _units(layers) for layers in [layout[0], *layout[2:]])


def _units(layers: tuple[np.ndarray, ...]) -> set[int]:
    return {int(unit) for layer in layers for unit in np.unique(layer) if unit >= 0}


@dataclass(frozen=True)
class _Corner:
    """Entries of a parameter in several slices of one unit: by inclusion and exclusion they count with ``sign``.

    ``order`` puts the dims that are indexed first, ``index`` has one tensor for each of them; no tuple stands twice.
    """

    order: tuple[int, ...]
    index: tuple[Tensor, ...]
    sign: float


@dataclass(frozen=True)
class _Slices:
    """What units own of one parameter: whole slices along ``dims``, and the corners where these cross."""

    weight: nn.Parameter
    dims: tuple[int, ...]
    corners: tuple[_Corner, ...]

    def squares(self, dtype: torch.dtype) -> list[Tensor]:
        """Return the sums of squares of all slices along each dim, then those of each corner with its sign."""
        table = _square(self.weight, dtype)
        rest = [dim for dim in range(table.dim()) if dim not in self.dims]
        if rest and len(self.dims) > 1:
            table = table.sum(rest)  # rank len(dims)
        found = []
        for place, dim in enumerate(self.dims):
            own = dim if len(self.dims) == 1 else place
            others = [other for other in range(table.dim()) if other != own]
            found.append(table.sum(others) if others else table)
        for corner in self.corners:
            entries = _square(self.weight.permute(corner.order)[corner.index], dtype)  # [P, ...]
            found.append(corner.sign * (entries.flatten(1).sum(1) if entries.dim() > 1 else entries))
        return found

    def add(self, factors: list[Tensor]) -> None:
        """Add ``w * factor`` to the gradient, a factor for each slice that ``squares`` returns."""
        weight = self.weight
        grad = weight.grad
        if grad is None:
            grad = weight.grad = torch.zeros_like(weight)
        elif grad.is_sparse:
            grad = weight.grad = grad.to_dense()
        taken = iter(factor.to(weight.device, weight.dtype) for factor in factors)
        whole: Any = 0
        for dim in self.dims:
            shape = [-1 if other == dim else 1 for other in range(weight.dim())]
            whole = whole + next(taken).view(shape)
        grad.addcmul_(weight, whole)
        for corner in self.corners:
            view = grad.permute(corner.order)
            entries = weight.permute(corner.order)[corner.index]  # [P, ...]
            factor = corner.sign * next(taken).view(-1, *[1] * (entries.dim() - 1))
            view[corner.index] += factor * entries


class GroupLasso:
    """The penalty on the units of a Program's live module.

        penalty = lambda sum_k n_k,  n_k = sqrt( sum over w in unit k of w^2 + 1e-8 )
        d penalty / dw = lambda w * sum over units k with w in them of 1 / n_k

    Parameters that are not trained, and buffers, count in no unit; a tied parameter counts once. A unit that owns
    nothing that counts has no term. ``excluded`` says which dims of parameters are no part of it, and why.

    Example:
        lasso = GroupLasso(program, 1e-3)
        (F.cross_entropy(program.train()(inputs), targets) + lasso()).backward()
    """

    def __init__(self, program: Program, strength: float, analysis: Analysis | None = None) -> None:
        """Find which entries of which parameters belong to which unit.

        Args:
            program: the network; its live module is what is penalised, for as long as it keeps its parameters.
            strength: lambda, 0 or more. It goes with a loss that is a mean over examples.
            analysis: of the Program, if there is one already.

        Raises:
            UsageError: the strength is negative or not finite, or the network has no unit that can be penalised.
        """
        if not 0 <= strength < math.inf:
            raise UsageError(f"the strength of group lasso is {strength}; give a finite number, 0 or more")
        self.strength = float(strength)
        self.analysis = analyze(program) if analysis is None else analysis
        self.excluded = excluded(self.analysis)
        trained = {name: value for name, value in program.module().named_parameters() if value.requires_grad}
        owned = self._owned(trained)
        # the ids of the units that have a term, in its order
        self.units = sorted({unit for dims in owned.values() for held in dims.values() for unit in held})
        if not self.units:
            raise UsageError(
                "this network has no removable units with weights to penalise; leave out group lasso (kfe-fx inspect "
                "says what cannot be removed, and why)"
            )
        self._build(trained, owned)

    def _owned(self, trained: dict[str, nn.Parameter]) -> dict[str, dict[int, dict[int, np.ndarray]]]:
        """Return by parameter, dim and unit the indices that count."""
        owned: dict[str, dict[int, dict[int, np.ndarray]]] = {}
        for unit in self.analysis.units:
            for name, dims in unit.slices.items():
                for dim, indices in dims.items():
                    if name in trained and (name, dim) not in self.excluded:
                        owned.setdefault(name, {}).setdefault(dim, {})[unit.id] = np.asarray(indices)
        return owned

    def _build(self, trained: dict[str, nn.Parameter], owned: dict[str, dict[int, dict[int, np.ndarray]]]) -> None:
        """Give numbers to all slices and corners, and say which belong to which unit."""
        place = {unit: number for number, unit in enumerate(self.units)}
        slots, units = [], []
        self._weights: list[_Slices] = []
        self._sizes: list[int] = []
        self._device = trained[next(iter(owned))].device
        self._dtype = torch.float32
        for name, dims in owned.items():
            weight, corners = trained[name], []
            real = weight.real.dtype if weight.is_complex() else weight.dtype
            self._dtype = torch.promote_types(self._dtype, real)
            for dim, held in sorted(dims.items()):
                start = sum(self._sizes)
                for unit, indices in held.items():
                    slots.append(start + indices)
                    units.append(np.full(len(indices), place[unit]))
                self._sizes.append(weight.shape[dim])
            for count in range(2, len(dims) + 1):
                for chosen in itertools.combinations(sorted(dims), count):
                    tuples, numbers, owners = _crossings([dims[dim] for dim in chosen])
                    if not len(tuples):
                        continue
                    rest = (dim for dim in range(weight.dim()) if dim not in chosen)
                    index = tuple(torch.from_numpy(column).to(weight.device) for column in tuples.T.copy())
                    corners.append(_Corner((*chosen, *rest), index, -1.0 if count % 2 == 0 else 1.0))
                    slots.append(sum(self._sizes) + numbers)
                    units.append(np.array([place[unit] for unit in owners.tolist()], dtype=np.int64))
                    self._sizes.append(len(tuples))
            self._weights.append(_Slices(weight, tuple(sorted(dims)), tuple(corners)))
        self._slots = torch.from_numpy(np.concatenate(slots)).to(self._device)  # [pairs]
        self._units = torch.from_numpy(np.concatenate(units)).to(self._device)  # [pairs]

    def norms(self, eps: float = 0.0) -> Tensor:
        """Return ``sqrt(sum of squares + eps)`` of each unit in ``units``, [units]; differentiable where eps > 0."""
        found = [one.to(self._device) for weight in self._weights for one in weight.squares(self._dtype)]
        squares = torch.cat(found).index_select(0, self._slots)
        sums = torch.zeros(len(self.units), dtype=self._dtype, device=self._device)
        return (sums.index_add(0, self._units, squares) + eps).sqrt()

    def __call__(self) -> Tensor:
        """Return the penalty, a scalar that can be differentiated."""
        return self.strength * self.norms(EPS).sum()

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Add the penalty's gradient to ``p.grad`` of every parameter in it, as its backward pass would."""
        factors = self.strength / self.norms(EPS)
        slots = torch.zeros(sum(self._sizes), dtype=self._dtype, device=self._device)
        taken = iter(slots.index_add_(0, self._slots, factors.index_select(0, self._units)).split(self._sizes))
        for weight in self._weights:
            weight.add([next(taken) for _ in range(len(weight.dims) + len(weight.corners))])

    @torch.no_grad()
    def near_zero(self) -> list[int]:
        """Return the ids of units with next to no weight: below 1e-3 of the largest norm in their group, or below 1e-4.

        1e-4 is the root of the 1e-8 in the penalty: below it nothing pulls a unit further down. The largest norm and
        not the median, which is next to nothing itself once most units of a group are gone.
        """
        norms = self.norms().tolist()
        groups = [self.analysis.units[unit].group for unit in self.units]
        largest: dict[int, float] = defaultdict(float)
        for group, norm in zip(groups, norms, strict=True):
            largest[group] = max(largest[group], norm)
        return [
            unit
            for unit, group, norm in zip(self.units, groups, norms, strict=True)
            if norm <= max(NEAR_ZERO * largest[group], math.sqrt(EPS))
        ]

    @torch.no_grad()
    def facts(self) -> dict[str, Any]:
        """Return for the report: lambda, the penalty, how many units there are and are near zero, in all and by group.

        ``excluded`` lists what is no part of the penalty.
        """
        near = self.near_zero()
        groups: dict[int, list[int]] = defaultdict(lambda: [0, 0])
        for column, found in enumerate((self.units, near)):
            for unit in found:
                groups[self.analysis.units[unit].group][column] += 1
        return {
            "lambda": self.strength,
            "penalty": float(self()),
            "units": len(self.units),
            "near_zero": len(near),
            "groups": [
                {"name": self.analysis.groups[group].name, "units": units, "near_zero": few}
                for group, (units, few) in sorted(groups.items())
            ],
            "excluded": [{"parameter": name, "dim": dim, "why": why} for (name, dim), why in self.excluded.items()],
        }


def _square(value: Tensor, dtype: torch.dtype) -> Tensor:
    if value.is_complex():
        return (value.real.square() + value.imag.square()).to(dtype)
    return value.to(dtype).square()


def _crossings(held: list[dict[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return where slices of one unit along several dims cross.

    Returns:
        The index tuples without repetition [P, dims], and for each (tuple, unit) the tuple's number and the unit.
    """
    both = [unit for unit in held[0] if all(unit in other for other in held[1:])]
    if not both:
        empty = np.zeros(0, dtype=np.int64)
        return empty.reshape(0, len(held)), empty, empty
    grids = [np.stack(np.meshgrid(*(one[unit] for one in held), indexing="ij"), -1) for unit in both]
    tuples = [grid.reshape(-1, len(held)) for grid in grids]
    owners = np.repeat(both, [len(one) for one in tuples])
    unique, numbers = np.unique(np.concatenate(tuples), axis=0, return_inverse=True)
    return unique, numbers.reshape(-1), owners
