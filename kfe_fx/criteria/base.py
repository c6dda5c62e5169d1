"""What a criterion is, what it is given, and where it is found by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch

from kfe_fx.criteria.gradients import Source, gate_gradients
from kfe_fx.curvature.fit import fit
from kfe_fx.curvature.store import Store, graph_hash, weights_hash
from kfe_fx.errors import BadData, UsageError
from kfe_fx.labels.analysis import Analysis
from kfe_fx.program import Program
from kfe_fx.training.batches import Batches
from kfe_fx.training.losses import Loss, counted, resolve_loss
from kfe_fx.user_code import inside, load


@dataclass
class ScoreContext:
    """What there is to score with.

    Attributes:
        program: the network, in evaluation mode.
        analysis: its units.
        batches: examples, or None (data-free).
        loss: of outputs and targets, or None: the log-likelihood of the network's own output distribution.
        seed: of everything that is drawn.
        store: what other passes measured, by name (curvature factors, ...); criteria say what they need of it.
        facts: filled by ``score``: where labels and inputs came from, how many examples, and so on.
        changes: filled by ``score``: what the mean loss changes by with each unit alone, signed, float64 [units], where
            the criterion predicts it; NaN for a unit that its model says nothing of. Scores rank: they may be absolute.
    """

    program: Program
    analysis: Analysis
    batches: Batches | None = None
    loss: Loss | None = None
    seed: int = 0
    store: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    changes: np.ndarray | None = field(default=None, init=False)
    _measured: Store | None = field(default=None, init=False, repr=False)

    @classmethod
    def of(
        cls,
        program: Program,
        analysis: Analysis,
        data: Any = None,
        loss: Any = None,
        *,
        batch_size: int = 64,
        seed: int = 0,
    ) -> ScoreContext:
        """Make a context of any data and any spelling of a loss."""
        batches = None if data is None else Batches(program, data, batch_size)
        found = resolve_loss(loss, None if batches is None else batches.targets())
        return cls(program, analysis, batches, found if batches is None else counted(found, batches.labels()), seed)

    def weights(self) -> dict[str, torch.Tensor]:
        """Return what single weights are removed from: every floating-point parameter of at least two dims, by name.

        What a weight normalisation makes the weights of is left out: with the last entry of a row zero it is 0 / 0.
        """
        named, normalised = self.program.module().named_parameters(), normalised_parameters(self.program)
        wanted = {name: value for name, value in named if value.is_floating_point() and value.dim() > 1}
        return {name: value for name, value in wanted.items() if name not in normalised}

    def gradients(self) -> Iterator[torch.Tensor]:
        """Yield the gradient of each example's loss by each unit's gate, [N, units], batch by batch (a fresh pass).

        With targets the gradients are those of the loss on them (empirical); without, labels are sampled from the
        network; without data, inputs are drawn too. ``facts`` says which.
        """
        return gate_gradients(Source(self.program, self.analysis, self.batches, self.loss, self.seed, self.facts))

    def curvature(self, *statistics: str) -> Store:
        """Return second moments of the gradients: those in ``store["curvature"]``, or what the examples give.

        What is measured here (``kfe_fx.curvature.fit``: exact over the labels up to 20 outputs, sampled above) is kept
        in ``store["curvature"]``, so that several criteria and the repair share it; statistics that it lacks are added.
        ``facts`` says the source, the sharing rule and the number of examples.

        Args:
            *statistics: of "kfac", "ekfac" and "diagonal"; see ``fit``.

        Raises:
            UsageError: the store given is of another network, older than the weights, or lacks a statistic; or there
                is none, and no data.
            BadData: gradients are not finite.
        """
        held = self.store.get("curvature")
        if held is not None and held is not self._measured:
            if not isinstance(held, Store):
                raise UsageError(f"what is given as curvature is a {type(held).__name__}; give a curvature Store")
            held.check(self.program, weights=True)
            if missing := _missing(held, statistics):
                raise UsageError(f"the curvature statistics given lack {missing[0]!r}; fit them with it")
        else:
            held = self.store["curvature"] = self._measured = self._extended(held, statistics)
        family = held.facts.get("family", "labels of the data")
        self.facts["curvature"] = f"{held.facts.get('source')} ({family})"
        self.facts["sharing"] = held.facts.get("sharing")
        self.facts["examples"] = held.facts.get("examples")
        return held

    def _extended(self, held: Store | None, statistics: tuple[str, ...]) -> Store:
        """Return what was measured here before, with what it lacks of ``statistics``."""
        if held is not None and (held.graph, held.weights) != (graph_hash(self.program), weights_hash(self.program)):
            held = None  # trained since
        missing = statistics if held is None else _missing(held, statistics)
        if held is not None and not missing:
            return held
        if self.batches is None:
            raise UsageError("statistics of the curvature need data, which is not there; give --data")
        bases = held if held is not None and "ekfac" in missing and not _missing(held, ("kfac",)) else None
        source = "auto" if held is None else str(held.facts["source"])
        found = fit(
            self.program, self.batches, self.loss, statistics=missing, source=source, seed=self.seed,
            batch_size=self.batches.batch_size, bases=bases,
        )  # fmt: skip
        if found.facts["nonfinite"]:
            block = next(iter(found.facts["nonfinite"]))
            raise BadData(f"the derivatives of the loss by {block} are not finite; check the data and the weights")
        if held is None:
            return found
        for one, other in ((held, found), (found, held)):
            if _has_bases(other) and not _has_bases(one):
                one.share_bases(other)  # of the same factors: stores with and without them would not add
        return held.merge(found)


class Criterion(ABC):
    """A way to score units: the larger the score, the more is lost with the unit.

    Zero means that nothing is lost with a unit, and a negative score that the loss falls without it: such units go
    even where the budget does not ask for it, which the certificate notes. A measure that only ranks (a logarithm, a
    centred one) is to be shifted to be nowhere negative.

    ``needs`` names what the context must have: "data", "targets", "curvature" (data will do, see
    ``ScoreContext.curvature``), or entries of ``store``. A criterion never changes the Program, gives the same scores
    for the same context, and finite ones.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    # the scores are changes of the loss, in its unit, unless ``score`` puts others into ``context.changes``
    predicts: ClassVar[bool] = False
    reference: str = ""  # the "file.py:Class" it was made by, whose errors are told as the user's

    @abstractmethod
    def score(self, context: ScoreContext) -> np.ndarray:
        """Return one score per unit of ``context.analysis``, float64 [units]."""

    def weights(self, context: ScoreContext) -> dict[str, torch.Tensor]:
        """Return one score per entry of every weight of ``context.weights()``, for unstructured pruning.

        Raises:
            UsageError: the criterion means nothing for single weights.
        """
        known = ", ".join(names(weights=True))
        raise UsageError(f"the criterion {self.name!r} scores units, not single weights; choose {known}")

    @classmethod
    def scores_weights(cls) -> bool:
        """Say whether it has ``weights``."""
        return cls.weights is not Criterion.weights


C = TypeVar("C", bound=Criterion)
_REGISTRY: dict[str, Callable[[], Criterion]] = {}


def register(criterion: type[C]) -> type[C]:
    """Make a criterion (a class that takes no arguments) known under its ``name``; use it as a decorator.

    Raises:
        UsageError: the name is taken by another class.
    """
    known = _REGISTRY.get(criterion.name)
    if known is not None and known is not criterion:
        raise UsageError(f"there is a criterion {criterion.name!r} already; choose another name")
    _REGISTRY[criterion.name] = criterion
    return criterion


def names(*, weights: bool = False) -> tuple[str, ...]:
    """List the names of the criteria, or of those that score single weights too."""
    return tuple(sorted(name for name, made in _REGISTRY.items() if not weights or made().scores_weights()))


def resolve(spec: str | Criterion | type[Criterion]) -> Criterion:
    """Return the criterion of that name, the one of the class that "file.py:Class" names, or the given one.

    Raises:
        UsageError: there is none.
    """
    if isinstance(spec, str) and ":" in spec:
        found = load(spec)
        with inside(spec):
            made = found() if isinstance(found, type) and issubclass(found, Criterion) else found
        if not isinstance(made, Criterion):
            raise UsageError(f"{spec}: no kfe_fx.criteria.Criterion; name a subclass of it, or an instance")
        made.reference = spec
        return _complete(made)
    if isinstance(spec, Criterion):
        return _complete(spec)
    if isinstance(spec, type) and issubclass(spec, Criterion):
        return _complete(spec())
    if not isinstance(spec, str):
        told = getattr(spec, "__name__", type(spec).__name__)
        raise UsageError(f"the criterion is {told}: give a name, a kfe_fx.criteria.Criterion or a subclass of it")
    if spec not in _REGISTRY:
        raise UsageError(f"there is no criterion {spec!r}; choose one of {', '.join(names())}, or give file.py:Class")
    return _REGISTRY[spec]()


def _complete(criterion: Criterion) -> Criterion:
    """Check what a class of a third party says of itself."""
    name, needs = getattr(criterion, "name", None), criterion.needs
    if not isinstance(name, str) or not name:
        raise UsageError(f"the criterion {type(criterion).__name__} has no name; give its class a name = '...'")
    if isinstance(needs, str) or not all(isinstance(need, str) for need in needs):
        raise UsageError(f"the criterion {name!r} needs {needs!r}; give a set of names, as in frozenset({{'data'}})")
    return criterion


@contextmanager
def asking(criterion: Criterion, program: Program) -> Iterator[None]:
    """Ask a criterion for scores: in evaluation mode; what a third party's raises, or changes, is told as its own.

    Raises:
        UsageError: the code of ``file.py:Class`` raised, or weights were changed.
    """
    foreign, training = criterion.name not in _REGISTRY, program.module().training
    before = weights_hash(program) if foreign else ""
    program.eval()
    try:
        with inside(criterion.reference) if criterion.reference else nullcontext():
            yield
    finally:
        program.train(training)
    if foreign and weights_hash(program) != before:
        raise UsageError(f"the criterion {criterion.name!r} changed the network's weights; let it score a copy")


def score(spec: str | Criterion | type[Criterion], context: ScoreContext) -> np.ndarray:
    """Score every unit and check what comes back.

    Args:
        spec: name of a criterion, or one.
        context: what there is to score with; its ``facts`` are filled.

    Returns:
        float64 [units], the larger the more is lost. ``context.changes`` holds what is promised of the loss.

    Raises:
        UsageError: something that the criterion needs is not there, or it returned something that is no score.
    """
    criterion = resolve(spec)
    batches = context.batches
    check_needs(criterion, batches is not None, batches is not None and batches.targets() is not None, context.store)
    context.facts["criterion"] = criterion.name
    context.changes = None
    with asking(criterion, context.program):
        returned = criterion.score(context)
    scores = _numbers(criterion.name, returned)
    if scores.shape != (len(context.analysis.units),):
        wanted = len(context.analysis.units)
        raise UsageError(f"the criterion {criterion.name!r} returned {list(scores.shape)} scores for {wanted} units")
    if not np.isfinite(scores).all():
        unit = context.analysis.units[int(np.flatnonzero(~np.isfinite(scores))[0])]
        where = context.analysis.groups[unit.group].name
        raise UsageError(f"the criterion {criterion.name!r} gives a score of {scores[unit.id]} to a unit of {where}")
    if not criterion.predicts:
        context.changes = None  # those of another criterion that it may have asked
    elif context.changes is None:
        context.changes = scores
    return scores


def _numbers(name: str, returned: Any) -> np.ndarray:
    """Return what a criterion returned as float64.

    Raises:
        UsageError: it is no array of real numbers.
    """
    if isinstance(returned, torch.Tensor):
        returned = returned.detach().cpu()
        returned = returned.double() if returned.is_floating_point() else returned  # numpy has no bfloat16
    try:
        array = np.asarray(returned)
        found = array.astype(np.float64) if array.dtype.kind in "biufO" else None
    except (TypeError, ValueError):
        found = None
    if found is None:
        raise UsageError(
            f"the criterion {name!r} returned a {type(returned).__name__} that is no array of real numbers"
        )
    return found


def check_needs(criterion: Criterion, examples: bool, targets: bool, held: Collection[str] = ()) -> None:
    """Check that what a criterion needs is there: examples, their targets, or entries of a context's store.

    Raises:
        UsageError: something is not there.
    """
    there = {"data": examples, "targets": targets, "curvature": examples}  # curvature is measured on examples
    for need in sorted(criterion.needs - set(held)):
        if there.get(need, False):
            continue
        advice = {"targets": "give --data with targets" if examples else "give --data"}.get(need, "give --data")
        if need not in there:
            advice = "a pass must have measured it: put it into the context's store"
        raise UsageError(f"the criterion {criterion.name!r} needs {need}, which is not there; {advice}")


def normalised_parameters(program: Program) -> frozenset[str]:
    """Name the parameters that ``weight_norm`` computes other weights from: directions and norms."""
    nodes = program.graphs["eval"].find_nodes(op="call_function", target=torch.ops.aten._weight_norm.default)
    found = {str(arg.target) for node in nodes for arg in node.all_input_nodes if arg.op == "get_attr"}
    return frozenset(alias for name in found for alias in program.names_of(name))


SUMS = {"kfac": ("A", "G"), "ekfac": ("S",), "diagonal": ("D",)}  # of a block, by statistic


def _missing(held: Store, statistics: tuple[str, ...]) -> tuple[str, ...]:
    """Return which of the statistics no block of a store has, though some could."""
    lacking = []
    for statistic in dict.fromkeys(statistics):
        could = [block for block in held.blocks.values() if statistic != "kfac" or block.kind == "kronecker"]
        if could and not any(key in block.sums for block in could for key in SUMS[statistic]):
            lacking.append(statistic)
    return tuple(lacking)


def _has_bases(held: Store) -> bool:
    return any(block.basis for block in held.blocks.values() if block.kind == "kronecker")
