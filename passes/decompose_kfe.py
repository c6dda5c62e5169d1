"""Pass ``decompose-kfe``: layers become bottlenecks in their Kronecker-factored eigenbases (EigenDamage)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from kfe_fx import taps
from kfe_fx.cost.device import Device
from kfe_fx.curvature.store import Store
from kfe_fx.errors import UsageError
from kfe_fx.lowrank.decomposition import Request, chosen_layers, decompose
from kfe_fx.lowrank.kfe import PRODUCT, STATISTICS, Kfe
from kfe_fx.lowrank.layers import Layer
from kfe_fx.lowrank.losses import with_fisher_losses
from kfe_fx.lowrank.measure import measure
from kfe_fx.passes.base import Pass, PassResult
from kfe_fx.passes.capture_curvature import CaptureCurvature
from kfe_fx.program import Program
from kfe_fx.weights import check_weights

FISHER, IMPORTANCES = PREDICTIONS = ("fisher", "importances")


@dataclass(frozen=True)
class DecomposeKfe(Pass):
    """Replace layers by what is left of them in their eigenbases (Wang et al. 2019, "EigenDamage").

        W' = U_G^T W U_A        I = W'^2 * lam_G lam_A^T  (or * S*)        W ~ U_G[:, r] W'[r, c] U_A[:, c]^T

    A row goes by the sum of its importances, a column by that of its own, below one threshold for all layers. A
    convolution becomes a 1x1 one (C_in -> c), its core (c -> r) with its stride, padding and dilation, and a 1x1 one
    (r -> C_out) with its bias; a linear layer or a 1x1 convolution two factors. What was decomposed before keeps its
    operations: new rotations multiply into the outer ones. Convolutions with groups and transposed ones stay, and so
    does what would not be faster as predicted, or not smaller. New widths are units that ``prune`` may cut further.

    The weights of ``conv`` become ``conv.0.weight``, ``conv.1.weight``, ``conv.2.weight``, in the order in which they
    are applied. Behind it batch statistics should be estimated again, and the network fine-tuned.

    Attributes:
        data: examples to measure the curvature on, in any form; None takes the calibration sample of a program file.
        store: the curvature where it is known already.
        device: what times are predicted for; None for this machine.
        loss: see ``curvature.fit``.
        layers: glob of the layers that may be decomposed.
        ratio: the share of all columns and rows that goes.
        importance: the share of the total importance that goes.
        time: what remains of the network's predicted time, with the least importance lost. One of the three is given.
        statistics: "product" (lam_G lam_A^T) or "moments" (S*).
        predict: how the loss of a form is told: "importances" (half of those that go), or "fisher", measured with what
            they leave out (``lowrank.with_fisher_losses``); None for "fisher" where there are examples.
        cap: the share of a layer's columns or rows that may go; None for 0.95, of layers in factors 0.5.
        metric: what a form must save to be taken: "latency", "macs", "params", or "none", which takes every form.
        step: ranks are multiples of it; None for what the device likes where latency counts, else 1.
        last: also layers that make the outputs.
        source: see ``curvature.fit``.
        batch_size: examples at a time.
        threads: of the times that are predicted.
        seed: of labels that are drawn.
    """

    name: ClassVar[str] = "decompose-kfe"
    keeps: ClassVar[str] = "trained"
    data: Any = field(default=None, repr=False)
    store: Store | None = field(default=None, repr=False, compare=False)
    device: Device | None = field(default=None, repr=False)
    loss: Any = field(default=None, repr=False)
    layers: str = "*"
    ratio: float | None = None
    importance: float | None = None
    time: float | None = None
    statistics: str = PRODUCT
    predict: str | None = None
    cap: float | None = None
    metric: str = "latency"
    step: int | None = None
    last: bool = False
    source: str = "auto"
    batch_size: int = 64
    threads: int = 1
    seed: int = 0

    def run(self, program: Program) -> PassResult:
        """Return the decomposed Program.

        Facts: ``layers`` maps each decomposed one to its ranks ``[columns, rows]``, ``weights``, ``macs`` and
        ``predicted_ms`` before and after, ``left`` each other one to the reason, ``loss`` is the predicted increase
        of the loss in nats.

        Raises:
            UsageError: options that mean nothing, no such layer, nothing to measure on, or statistics of another
                network or of older weights.
            InfeasibleBudget: the time that was asked for is out of reach.
        """
        request = Request(
            self.ratio, self.importance, self.time, self.metric, self.step, self.cap, self.threads, self.device
        )
        request.check(self.name)
        check_weights(program)
        if self.statistics not in STATISTICS:
            raise UsageError(f"{self.name}: statistics is {' or '.join(STATISTICS)}, got {self.statistics!r}")
        if self.predict not in (None, *PREDICTIONS):
            raise UsageError(f"{self.name}: predict is {' or '.join(PREDICTIONS)}, got {self.predict!r}")
        if self.store is not None:
            self.store.check(program, weights=True)
        layers, left = chosen_layers(program, self.layers, last=self.last)
        axes: dict[str, Kfe] = {}
        if layers:
            store = self._curvature(program, layers)
            for layer in layers:
                try:
                    axes[layer.name] = Kfe.of(program, store, layer, self.statistics)
                except UsageError as error:  # of one layer: the others go on
                    left[layer.name] = str(error)
            axes = self._with_losses(program, axes)
        small, facts = decompose(program, axes, left, request)
        return finish(self, program, small, facts)

    def _with_losses(self, program: Program, axes: dict[str, Kfe]) -> dict[str, Kfe]:
        told = self.data is not None or "calibration" in program.extras
        if not axes or (self.predict or (FISHER if told else IMPORTANCES)) == IMPORTANCES:
            return axes
        return with_fisher_losses(
            program, examples(self.name, self.data, program), axes,
            loss=self.loss, source=self.source, batch_size=self.batch_size, seed=self.seed,
        )  # fmt: skip

    def _curvature(self, program: Program, layers: Sequence[Layer]) -> Store:
        if self.store is not None:
            return self.store
        return measure(
            program, examples(self.name, self.data, program), layers, self.statistics,
            loss=self.loss, source=self.source, batch_size=self.batch_size, seed=self.seed,
        )  # fmt: skip


def examples(name: str, data: Any, program: Program) -> Any:
    """Return what to measure on: the data, or the calibration sample of the program file.

    Raises:
        UsageError: there is neither.
    """
    found = program.extras.get("calibration") if data is None else data
    if found is None:
        raise UsageError(f"{name}: there are no examples to measure on; give data, or a store of curvature statistics")
    return found


def finish(step: Pass, before: Program, after: Program, facts: dict[str, Any]) -> PassResult:
    """Return the result of a decomposition; a network that had taps has them again, in the new places."""
    if after is before:
        return PassResult(before, False, facts)
    if any(taps.tapped(graph) for graph in before.graphs.values()):
        after = CaptureCurvature().run(after).program
    after.lineage = (*before.lineage, step.name)
    return PassResult(after, True, facts)
