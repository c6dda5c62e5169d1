"""Pass ``reestimate-statistics``: running statistics of batch norms, measured again after a change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from kfe_fx.errors import UsageError
from kfe_fx.passes.base import Pass, PassResult
from kfe_fx.program import GraphInterpreter, Program
from kfe_fx.recurrent.layers import Layer, find_layers
from kfe_fx.recurrent.norms import BatchNorms, Pooled, count_rows, fill_unseen
from kfe_fx.recurrent.op import Arguments
from kfe_fx.recurrent.run import run
from kfe_fx.training.batches import Batches

aten = torch.ops.aten

# neighbours in a folder are of one class: what classes differ by is no variance within such batches
ORDER = 0
_NOT_CAPTURED = "training mode not captured"


@dataclass(frozen=True)
class ReestimateStatistics(Pass):
    """Average the statistics of each batch norm over batches (cumulative, as ``torch.optim.swa_utils.update_bn``).

    The evaluation graph runs with the statistics of the batch in each norm, as in training but without dropout; batch k
    enters with the momentum 1/(k + 1). Norms that the user froze (not in training in the training graph) are left alone
    and use their running statistics; ``num_batches_tracked`` is not touched.

    So do recurrent layers that are normalised, where each row becomes the average over batches, by their valid rows, of
    mean and biased variance (the second phase of Cooijmans et al. 2017).

    Attributes:
        data: examples, in any form, taken in random order (seed 0) unless they come as batches; targets are not looked
            at.
        batch_size: examples at a time.
        limit: stop after this many batches; None takes all.
    """

    name: ClassVar[str] = "reestimate-statistics"
    keeps: ClassVar[str] = "trained"
    data: Any = field(repr=False)
    batch_size: int = 64
    limit: int | None = None

    def run(self, program: Program) -> PassResult:
        """Return the Program with fresh statistics.

        Raises:
            UsageError: there are no examples.
        """
        live = live_norms(program)
        recurrent = [layer.name for layer in find_layers(program) if layer.trains]
        if not live and not recurrent:
            return PassResult(program, False, {"norms": 0, "batches": 0})
        twin = program.copy()
        layers = [layer for layer in find_layers(twin) if layer.name in recurrent]
        count = reestimate(twin, live, layers, Batches(twin, self.data, self.batch_size), self.limit)
        if not count:
            raise UsageError("reestimate-statistics: the data yields no batches; give at least one example")
        twin.lineage = (*program.lineage, self.name)
        return PassResult(twin, True, {"norms": len(live) + len(layers), "batches": count})


def reestimate(
    program: Program, norms: Collection[str], layers: Collection[Layer], batches: Batches, limit: int | None = None
) -> int:
    """Measure statistics again, in place, and return over how many batches.

    Args:
        program: whose running statistics change.
        norms: names of the ``batch_norm`` nodes.
        layers: normalised recurrent layers.
        batches: the examples.
        limit: at most so many batches.
    """
    runner = _Reestimate(program, norms, layers)
    count = 0
    with torch.no_grad():
        for batch in batches.epoch(ORDER):
            if limit is not None and count >= limit:
                break
            runner.run(*batch.inputs)
            count += 1
        for layer, average in runner.averages:
            average.write(layer.tensors(program), from_zero=layer.from_zero)
    return count


def live_norms(program: Program) -> set[str]:
    """Return the names of the batch norms whose running statistics training would change."""
    norms = {node.name for node in _norms(program.graphs["eval"])}
    if any(note.startswith(_NOT_CAPTURED) for note in program.notes):
        return norms
    if "train" not in program.graphs:
        return set()  # training is as evaluation: all norms are frozen
    return norms & {node.name for node in _norms(program.graphs["train"]) if node.args[5]}


def _norms(graph: fx.Graph) -> list[fx.Node]:
    return [
        node for node in graph.nodes if node.target is aten.batch_norm.default and isinstance(node.args[4], fx.Node)
    ]


class _Average:
    """The statistics of one recurrent layer, added up over batches: [rows, C] of each side."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.seen: list[list[int]] = []

    def add(self, found: dict[str, Pooled], counts: list[int], held: Arguments) -> None:
        """Add those of a batch, weighted by its valid rows."""
        self.seen.append(counts)
        for side, batch in found.items():
            for part in ("mean", "var"):
                self._add(held, f"{part}_{side}", getattr(batch, part), batch.weight)

    def _add(self, held: Arguments, name: str, value: Tensor | None, weight: Tensor) -> None:
        if value is None:
            return
        for key, term in ((name, value * weight), (f"weight of {name}", weight.expand_as(value))):
            total = self.sums.setdefault(key, torch.zeros_like(getattr(held, name), dtype=torch.float64))
            total[: len(term)] += term

    def write(self, held: Arguments, *, from_zero: bool) -> None:
        """Write the averages into the running statistics; rows that no batch reached get the last one."""
        for name, total in self.sums.items():
            if name.startswith("weight of "):
                continue
            weight, running = self.sums[f"weight of {name}"], getattr(held, name)
            running.copy_(torch.where(weight > 0, total / weight.clamp(min=1), running.double()))
        if held.seen is None or not self.seen:
            return
        held.seen.zero_()
        for counts in self.seen:
            count_rows(held.seen, counts)
        reached = int((held.seen > 0).sum())
        if reached:
            fill_unseen(held, held.seen, reached - 1, from_zero=from_zero)


class _Reestimate(GraphInterpreter):
    def __init__(self, program: Program, live: Collection[str], layers: Collection[Layer]) -> None:
        super().__init__(program.module(), graph=program.graphs["eval"])
        self.program = program
        self.live = live
        self.seen: Counter[str] = Counter()  # per running mean: two nodes may share a norm
        self.averages = [(layer, _Average()) for layer in layers]
        self.recurrent = {
            node.name: average for layer, average in self.averages for node in layer.nodes.get("eval", ())
        }

    def run_node(self, n: fx.Node) -> Any:
        if n.name in self.recurrent:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return self._run_layer(Arguments(*args, **kwargs), self.recurrent[n.name])
        if n.name not in self.live:
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        inputs: Tensor = args[0]
        if inputs.numel() == inputs.shape[1]:
            return super().run_node(n)  # one value per channel has no variance
        buffer = self.program.names_of(str(n.args[3].target))[0]  # type: ignore[union-attr]
        self.seen[buffer] += 1
        return aten.batch_norm.default(*args[:5], True, 1 / self.seen[buffer], *args[7:])

    def _run_layer(self, call: Arguments, average: _Average) -> tuple[Tensor, Tensor, Tensor]:
        if call.input.shape[1 - call.time_dim] < 2:
            return run(call)  # one sequence has no variance
        kept: list[BatchNorms] = []

        def make(inner: Arguments, counts: list[int]) -> BatchNorms:
            kept.append(BatchNorms(inner, counts))
            return kept[0]

        found = run(replace(call, training=True), make)
        average.add(kept[0].pooled(), kept[0].counts, call)
        return found
