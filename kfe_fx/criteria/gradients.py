"""Gradients and curvatures of each example's loss along each unit's gate: what Taylor, Fisher and loss models see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from kfe_fx.criteria import synthetic
from kfe_fx.curvature.distributed import Group
from kfe_fx.curvature.fit import EXACT_OUTPUTS
from kfe_fx.errors import BadData
from kfe_fx.gates import GatedModule, gated
from kfe_fx.labels.analysis import Analysis
from kfe_fx.program import Program
from kfe_fx.training.batches import Batch, Batches, pinned_batch
from kfe_fx.training.likelihood import Likelihood
from kfe_fx.training.losses import Loss, Settling, cut, settle

DATA_FREE_EXAMPLES = 256
Rows = TypeVar("Rows")


@dataclass
class Source:
    """Where gradients come from; see ``ScoreContext``."""

    program: Program
    analysis: Analysis
    batches: Batches | None
    loss: Loss | None
    seed: int
    facts: dict[str, Any]


def gate_gradients(source: Source) -> Iterator[Tensor]:
    """Yield d loss_n / d gate[n, u] as [N, units] batch by batch, in evaluation mode.

    Where an activation mixes examples in a way that no dim tells apart, examples run one at a time: as correct, slower.
    A network that pins its batch at N runs once, and N backward passes take its examples apart.

    Raises:
        BadData: a loss without targets to take it on, or gradients that are not finite.
        UsageError: a loss that mixes the examples of a batch.
    """
    pass_ = _Pass(source)
    yield from pass_.each(pass_.gradients)


def gate_curvatures(source: Source) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield d loss_n / d gate[n, u] and the curvature of loss_n along each gate, [N, units] both, batch by batch.

    The curvature is the diagonal of the generalised Gauss-Newton matrix of each example, at the gates:

        h[n, u] = sum_c (d outputs_n / d gate[n, u] . S_c)^2    with sum_c S_c S_c^T = d^2 loss_n / d outputs_n^2

    one backward pass per column c (``Likelihood.columns``), the members of a unit summed before the square. ``facts``
    says under "curvature" whether it is exact, sampled or empirical; see ``curvature_kind``.

    Raises:
        BadData: a loss without targets to take it on, or derivatives that are not finite.
        UsageError: a loss that mixes the examples of a batch.
    """
    pass_ = _Pass(source)
    yield from pass_.each(pass_.curvatures)


def curvature_kind(outputs: Any, batch: Batch, likelihood: Likelihood) -> str:
    """Say how the second derivative of the loss is taken, as ``kfe_fx.curvature.fit`` does for the source "auto".

    "exact" for up to 20 outputs of an example, "sampled" (one drawn label) for more; "empirical" (the labels of the
    data) for a loss of the user's own, of which no distribution of labels is known.

    Raises:
        BadData: such a loss, and no targets.
    """
    try:
        size = likelihood.size(outputs, batch)
    except BadData:
        if batch.targets is None:
            raise
        return "empirical"
    return "exact" if size <= EXACT_OUTPUTS else "sampled"


def curvature_columns(
    kind: str, outputs: Any, batch: Batch, loss: Loss | None, likelihood: Likelihood
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield (values, what to pass back from them): the squares of what comes back sum to each example's curvature."""
    if kind == "exact":
        yield from likelihood.columns(outputs, batch)
    elif kind == "sampled":
        yield likelihood.total(outputs, batch), None
    elif loss is not None:
        yield loss.total(outputs, batch.targets, batch.count), None


class _Pass:
    """One pass over the data with gates on."""

    def __init__(self, source: Source) -> None:
        self.source, self.facts, self.loss = source, source.facts, source.loss
        self.module = gated(source.program, source.analysis)
        self.likelihood = Likelihood(source.loss, source.seed)

    def each(self, work: Callable[[Batch], Rows]) -> Iterator[Rows]:
        """Yield what ``work`` makes of every batch, in order; in a process group each rank works on its share."""
        group, held = Group.current(), []
        for index, batch in enumerate(self.batches()):
            # labels are drawn per batch, whoever draws them
            self.likelihood.generator.manual_seed(self.source.seed * 1_000_003 + index)
            if index % group.size == group.rank:
                held.append(work(batch))
            if index % group.size == group.size - 1:
                yield from self._all(group, held)
        yield from self._all(group, held)

    @staticmethod
    def _all(group: Group, held: list[Rows]) -> Iterator[Rows]:
        found = group.gather(list(held))
        held.clear()
        for rows in found:
            yield from rows

    def batches(self) -> Iterator[Batch]:
        """Yield batches, or the examples one at a time where nothing tells them apart."""
        source = self.source
        batches: Any = source.batches
        if batches is None:
            batches = synthetic.draw(source.program, DATA_FREE_EXAMPLES, source.seed, self.facts)
        split = not self.module.per_example and pinned_batch(source.program) is None
        self.facts.update(
            inputs="drawn" if source.batches is None else "data", per_example="loop" if split else "batch"
        )
        examples, settling = 0, Settling(source.program, self.loss)
        for whole in batches:
            self.loss = settling.see(whole)
            if split:
                self.likelihood.hold(lambda batch=whole: self._forward(batch)[1], whole)
            pieces = [whole.rows(i, i + 1) for i in range(whole.count)] if split else [whole]
            for batch in pieces:
                empirical = batch.targets is not None
                if empirical and self.loss is None:
                    raise BadData("there are targets but no loss to take on them; name a --loss")
                examples += batch.count
                yield batch
                self.facts["labels"] = "data" if empirical else f"sampled ({self.likelihood.family})"
        self.facts["examples"] = examples
        if not examples:
            raise BadData("the data yields no batches to score with; give at least one example")

    def gradients(self, batch: Batch) -> Tensor:
        with torch.enable_grad():
            gates, outputs = self._forward(batch)
            rows, parts = [], self._apart(outputs, batch)
            for number, (part, piece) in enumerate(parts, 1):
                total = self._total(part, piece)
                rows.append(_finite(self._back(total, None, gates, last=number == len(parts)), total))
        return torch.cat(rows)

    def curvatures(self, batch: Batch) -> tuple[Tensor, Tensor]:
        first, second = [], []
        with torch.enable_grad():
            gates, outputs = self._forward(batch)
            for part, piece in self._apart(outputs, batch):
                total = self._total(part, piece)
                rows = self._back(total, None, gates)
                kind = curvature_kind(part, piece, self.likelihood)
                squares = torch.zeros_like(rows)
                for values, column in curvature_columns(kind, part, piece, self.loss, self.likelihood):
                    squares += self._back(values, column, gates).square()
                first.append(_finite(rows, total))
                second.append(_finite(squares, total))
                told = "labels of the data" if kind == "empirical" else self.likelihood.family
                self.facts["curvature"] = f"{kind} ({told})"
        return torch.cat(first), torch.cat(second)

    def _forward(self, batch: Batch) -> tuple[list[Tensor], Any]:
        rows = batch.count if self.module.per_example else 1
        first = next((v.dtype for v in batch.inputs if isinstance(v, Tensor) and v.is_floating_point()), None)
        gates = self.module.ones(rows, first or _parameter_type(self.module))
        return gates, self.module.run(batch.inputs, gates)

    def _apart(self, outputs: Any, batch: Batch) -> list[tuple[Any, Batch]]:
        """Take the examples of a pinned batch apart behind the network where its gates cannot: squares do not add."""
        count = batch.count
        if self.module.per_example or count == 1:
            return [(outputs, batch)]
        self.likelihood.hold(lambda: outputs, batch)
        return [(cut(outputs, count, i, i + 1), batch.rows(i, i + 1)) for i in range(count)]

    def _total(self, outputs: Any, batch: Batch) -> Tensor:
        if batch.targets is None or self.loss is None:
            return self.likelihood.total(outputs, batch)
        self.loss = settle(self.loss, outputs, batch.targets, batch.count)
        return self.loss.total(outputs, batch.targets, batch.count)

    def _back(self, values: Tensor, column: Tensor | None, gates: list[Tensor], *, last: bool = False) -> Tensor:
        """Return the gradient of the sum of ``values`` (times ``column``) by every gate, [rows, units]."""
        found: Any = (None,) * len(gates)
        if values.requires_grad and gates:
            found = torch.autograd.grad([values], gates, [column], retain_graph=not last, allow_unused=True)
        units = self.module.units
        result = torch.zeros(len(gates[0]) if gates else 1, sum(map(len, units)), dtype=torch.float64)
        for place, grad in zip(units, found, strict=True):
            if grad is not None:
                result[:, list(place)] = grad.double()
        return result


def _finite(rows: Tensor, total: Tensor) -> Tensor:
    if not bool(torch.isfinite(rows).all()):
        raise BadData(
            f"the loss of a batch is {float(total.detach()):g} and its gradients are not finite; check the data"
        )
    return rows


def _parameter_type(module: GatedModule) -> torch.dtype:
    floating = (p.dtype for p in module.module.parameters() if p.is_floating_point())
    return next(floating, torch.get_default_dtype())
