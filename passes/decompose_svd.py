"""Pass ``decompose-svd``: layers become two factors by truncated singular value decompositions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from kfe_fx.cost.device import Device
from kfe_fx.curvature.store import Store
from kfe_fx.errors import UsageError
from kfe_fx.lowrank.axes import Axes
from kfe_fx.lowrank.decomposition import Request, chosen_layers, decompose
from kfe_fx.lowrank.measure import measure
from kfe_fx.lowrank.svd import OF, OUTPUTS, WEIGHTS, Svd
from kfe_fx.passes.base import Pass, PassResult
from kfe_fx.passes.decompose_kfe import examples, finish
from kfe_fx.program import Program
from kfe_fx.weights import check_weights


@dataclass(frozen=True)
class DecomposeSvd(Pass):
    """Replace layers by the best two factors of lower rank, ``W ~ U_k (U_k^T W)``: a baseline without curvature.

    A linear layer becomes two, a convolution (as a matrix of C_out rows and C_in kh kw columns) itself with k outputs
    and a 1x1 one (k -> C_out) with its bias. The directions that go are those with the least share of their layer's
    squared norm ("weights"), or of the mean square of its outputs on the data ("outputs"), below one threshold for all
    layers. The rest is as for ``decompose-kfe``, and so are names and attributes that are not told of here.

    Attributes:
        data: examples for "outputs"; None takes the calibration sample of a program file.
        store: curvature statistics with the factors A, instead of data.
        device: what times are predicted for; None for this machine.
        layers: glob of the layers that may be decomposed.
        ratio: the share of all directions that goes.
        importance: the share of the layers' sum of shares that goes.
        time: what remains of the network's predicted time, with the least sum of shares lost.
        of: "weights" or "outputs".
        cap: the share of a layer's directions that may go; None for 0.95, of layers in factors 0.5.
        metric: what a form must save: "latency", "macs", "params", "none".
        step: ranks are multiples of it; None for what the device likes where latency counts, else 1.
        last: also layers that make the outputs.
        batch_size: examples at a time.
        threads: of the times that are predicted.
    """

    name: ClassVar[str] = "decompose-svd"
    keeps: ClassVar[str] = "trained"
    data: Any = field(default=None, repr=False)
    store: Store | None = field(default=None, repr=False, compare=False)
    device: Device | None = field(default=None, repr=False)
    layers: str = "*"
    ratio: float | None = None
    importance: float | None = None
    time: float | None = None
    of: str = WEIGHTS
    cap: float | None = None
    metric: str = "latency"
    step: int | None = None
    last: bool = False
    batch_size: int = 64
    threads: int = 1

    def run(self, program: Program) -> PassResult:
        """Return the decomposed Program; facts are those of ``decompose-kfe``, ``loss`` being a sum of shares.

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
        if self.of not in OF:
            raise UsageError(f"{self.name}: of is {' or '.join(OF)}, got {self.of!r}")
        if self.store is not None:
            self.store.check(program, weights=True)
        layers, left = chosen_layers(program, self.layers, last=self.last)
        store = None
        if self.of == OUTPUTS and layers:
            store = self.store
            if store is None:
                data = examples(self.name, self.data, program)
                store = measure(program, data, layers, source="sampled", batch_size=self.batch_size)
        axes: dict[str, Axes] = {}
        for layer in layers:
            try:
                axes[layer.name] = Svd.of(program, layer, store)
            except UsageError as error:  # of one layer: the others go on
                left[layer.name] = str(error)
        small, facts = decompose(program, axes, left, request)
        return finish(self, program, small, facts)
