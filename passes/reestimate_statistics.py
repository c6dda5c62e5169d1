"""Pass ``reestimate-statistics``: running statistics of batch norms, measured again after a change."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from kfe_fx.errors import UsageError
from kfe_fx.passes.base import Pass, PassResult
from kfe_fx.program import Program
from kfe_fx.training.batches import Batches

aten = torch.ops.aten

_NOT_CAPTURED = "training mode not captured"


@dataclass(frozen=True)
class ReestimateStatistics(Pass):
    """Average the statistics of each batch norm over batches (cumulative, as ``torch.optim.swa_utils.update_bn``).

    The evaluation graph runs with the statistics of the batch in each norm, as in training but without dropout; batch k
    enters with the momentum 1/(k + 1). Norms that the user froze (not in training in the training graph) are left alone
    and use their running statistics; ``num_batches_tracked`` is not touched.

    Attributes:
        data: examples, in any form; targets are not looked at.
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
        if not live:
            return PassResult(program, False, {"norms": 0, "batches": 0})
        twin = program.copy()
        runner = _Reestimate(twin, live)
        count = 0
        with torch.no_grad():
            for batch in Batches(twin, self.data, self.batch_size):
                if self.limit is not None and count >= self.limit:
                    break
                runner.run(*batch.inputs)
                count += 1
        if not count:
            raise UsageError("reestimate-statistics: the data yields no batches; give at least one example")
        twin.lineage = (*program.lineage, self.name)
        return PassResult(twin, True, {"norms": len(live), "batches": count})


def live_norms(program: Program) -> set[str]:
    """Return the names of the batch norms whose running statistics training would change."""
    norms = {node.name for node in _norms(program.graphs["eval"])}
    if "train" in program.graphs:
        return norms & {node.name for node in _norms(program.graphs["train"]) if node.args[5]}
    # without a training graph training is as evaluation (all norms are frozen), unless it could not be captured
    return norms if any(note.startswith(_NOT_CAPTURED) for note in program.notes) else set()


def _norms(graph: fx.Graph) -> list[fx.Node]:
    return [
        node for node in graph.nodes if node.target is aten.batch_norm.default and isinstance(node.args[4], fx.Node)
    ]


class _Reestimate(fx.Interpreter):
    def __init__(self, program: Program, live: set[str]) -> None:
        super().__init__(program.module(), graph=program.graphs["eval"])
        self.program = program
        self.live = live
        self.seen: Counter[str] = Counter()  # per running mean: two nodes may share a norm

    def run_node(self, n: fx.Node) -> Any:
        if n.name not in self.live:
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        inputs: Tensor = args[0]
        if inputs.numel() == inputs.shape[1]:
            return super().run_node(n)  # one value per channel has no variance
        buffer = self.program.names_of(str(n.args[3].target))[0]  # type: ignore[union-attr]
        self.seen[buffer] += 1
        return aten.batch_norm.default(*args[:5], True, 1 / self.seen[buffer], *args[7:])
