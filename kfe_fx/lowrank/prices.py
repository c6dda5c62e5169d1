"""What a layer costs with fewer columns and rows: predicted milliseconds, multiply-accumulates, weights."""

from __future__ import annotations

from dataclasses import replace

from kfe_fx.cost.count import CostModel, Term
from kfe_fx.cost.device import Device
from kfe_fx.cost.kernels import ConvKernel, GemmKernel
from kfe_fx.cost.predictors import ROOFLINE, Spec, predictor
from kfe_fx.cost.profile import Profile
from kfe_fx.cost.widths import Product
from kfe_fx.errors import UsageError
from kfe_fx.labels.analysis import analyze
from kfe_fx.lowrank.finding import bare
from kfe_fx.lowrank.layers import Layer
from kfe_fx.program import Program

METRICS = ("latency", "macs", "params", "none")


class Prices:
    """The predicted latency of a network and of its layers in other forms, by the kernels of a predictor.

    Operations of a form are kernels like the layer's own with other sizes: an activation that runs inside the layer
    then runs inside the last of them. What is predicted to lie in caches stays as it is for the whole network.
    """

    def __init__(self, model: CostModel, device: Device | Profile | None = None, cost_model: Spec = ROOFLINE) -> None:
        """Divide the network of ``model`` into kernels, timed by ``device`` (default: as built in).

        Raises:
            UsageError: the predictor tells no kernels apart.
        """
        latency = predictor(model, device, cost_model)
        self._sizes = list(model.widths.dense)
        self._terms: dict[str, ConvKernel | GemmKernel] = {}
        for term in latency.terms() or ():
            if isinstance(term, ConvKernel | GemmKernel):
                self._terms.setdefault(term.owner, term)
        self._name = latency.name
        if not self._terms:
            raise self._unpriced()
        self._images = {
            node.name: _positions(model.values[node.args[0]], len(model.values[node].shape))
            for node in model.graph.nodes
            if isinstance(self._terms.get(node.name), ConvKernel)
        }
        self.whole_ms = latency.predict(()) / 1e6
        self.step = device.step if isinstance(device, Device) else (device or Profile()).block

    @classmethod
    def of(cls, program: Program, device: Device | Profile | None = None) -> Prices:
        """Look at a Program."""
        program = bare(program)
        return cls(CostModel(program, analyze(program)), device)

    def ms(self, layer: Layer, c: int, r: int) -> float:
        """Return the predicted milliseconds of a layer of which ``c`` columns and ``r`` rows stay.

        With all of them it is the layer as it stands.

        Raises:
            UsageError: the predictor has no kernel of the layer.
        """
        steps = layer.steps(c, r)
        total = 0.0
        for node, last in zip(layer.core.nodes["eval"], layer.ops[-1].nodes["eval"], strict=True):
            if not {node, last} <= self._terms.keys():
                raise self._unpriced()
            core, end = self._terms[node], self._terms[last]
            for place, (role, inputs, outputs) in enumerate(steps):
                ends = place == len(steps) - 1
                total += self._kernel(core, end if ends else None, role, inputs, outputs, node).cost(self._sizes)
        return total / 1e6

    def _unpriced(self) -> UsageError:
        return UsageError(
            f"the cost model {self._name!r} has no kernels of layers, by which decompositions are priced; decompose "
            "with the roofline, or not at all"
        )

    def _kernel(
        self,
        core: ConvKernel | GemmKernel,
        end: ConvKernel | GemmKernel | None,
        role: str,
        inputs: int,
        outputs: int,
        node: str,
    ) -> Term:
        each, made = Product(inputs), Product(outputs)
        if isinstance(core, GemmKernel):
            return replace(core, inner=each, columns=made)
        activation = end.activation if isinstance(end, ConvKernel) else 0.0
        sized = replace(core, inputs=each, per_group=each, outputs=made, activation=activation)
        if role == "core":
            return sized
        positions = self._images[node] if role == "before" else core.positions
        return replace(sized, taps=1, positions=positions)


def _positions(value: object, rank: int) -> int:
    """Count the positions of an image of this rank, at batch 1."""
    shape = getattr(value, "shape", ())
    count = 1
    for size in shape[2 : max(rank, 2)]:
        count *= int(size)
    return count


def price(prices: Prices | None, metric: str, layer: Layer, c: int, r: int) -> float:
    """Return what a layer costs by a metric when ``c`` columns and ``r`` rows stay."""
    if metric == "latency":
        assert prices is not None
        return prices.ms(layer, c, r)
    return float(layer.macs(c, r) if metric == "macs" else layer.weights(c, r))
