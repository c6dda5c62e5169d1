"""Pass ``finalise-recurrent``: the statistics of normalised recurrent layers become one row, and stay."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from kfe_fx.errors import UsageError
from kfe_fx.passes.base import Pass, PassResult
from kfe_fx.passes.reestimate_statistics import reestimate
from kfe_fx.program import Program, graph_text
from kfe_fx.recurrent.layers import Layer, drop_unread, find_layers, rows_of, set_tensor
from kfe_fx.recurrent.norms import SIDES, pool
from kfe_fx.training.batches import Batches


@dataclass(frozen=True)
class FinaliseRecurrent(Pass):
    """Pool the rows of running statistics by total variance, and use them in training too.

        mean = sum_t w_t mean_t / sum_t w_t        var = sum_t w_t (var_t + (mean_t - mean)^2) / sum_t w_t

    with w_t the batches that reached the row. Row 0 of the hidden side is left out where a layer starts from the state
    zero: it is no statistic. What comes out is to be fine-tuned, and folds (``fold-recurrent-batchnorm``).

    Attributes:
        data: examples to measure the statistics over again before they are pooled (the second phase of Cooijmans et al.
            2017), in any form; None takes the running ones.
        batch_size: examples at a time; more give better statistics.
    """

    name: ClassVar[str] = "finalise-recurrent"
    keeps: ClassVar[str] = "trained"
    data: Any = field(default=None, repr=False)
    batch_size: int = 64

    def run(self, program: Program) -> PassResult:
        """Return the Program with frozen statistics; facts map each layer to the rows that it had.

        Raises:
            UsageError: there is data, without any batch.
        """
        layers = [layer for layer in find_layers(program) if layer.call.normalised]
        final = all(not layer.trains and rows_of(layer.call, program) == 1 for layer in layers)
        if final and (self.data is None or not layers):
            return PassResult(program, False, {"layers": {}})
        twin = program.copy()
        layers = [layer for layer in find_layers(twin) if layer.call.normalised]
        if self.data is not None and not reestimate(twin, (), layers, Batches(twin, self.data, self.batch_size)):
            raise UsageError(f"{self.name}: the data yields no batches; give at least one example")
        rows = {layer.name: rows_of(layer.call, twin) for layer in layers}
        for layer in layers:
            _freeze(twin, layer)
        module = twin.module()
        if "train" in twin.graphs and graph_text(twin.graphs["train"]) == graph_text(twin.graphs["eval"]):
            del module.graphs["train"]  # as where capture finds that training is the same
            outputs = {mode: module.signature.outputs[mode] for mode in module.graphs}
            module.signature = replace(module.signature, outputs=outputs)
        module.recompile()
        twin.lineage = (*program.lineage, self.name)
        return PassResult(twin, True, {"layers": rows})


def _freeze(twin: Program, layer: Layer) -> None:
    held = layer.tensors(twin)
    for side in SIDES:
        mean, var = getattr(held, f"mean_{side}"), getattr(held, f"var_{side}")
        if var is None or len(var) == 1:
            continue
        weight = _weights(held.seen, var, first=side == "hh" and layer.from_zero)
        pooled = pool(None if mean is None else mean.double(), var.double(), weight, 1)
        for part, value in (("mean", pooled.mean), ("var", pooled.var)):
            name = layer.tensor_name(f"{part}_{side}")
            if value is not None and name is not None:
                set_tensor(twin, name, value, var, learned=False)
    seen = layer.tensor_name("seen")
    layer.rewrite(twin, {"training": False, "shared": False, "seen": None})
    drop_unread(twin, [seen] if seen is not None else [])


def _weights(seen: Tensor | None, var: Tensor, *, first: bool) -> Tensor:
    """Return what each row counts, [rows, 1]: the batches that reached it, all the same where that is not known."""
    weight = torch.ones(len(var), dtype=torch.float64, device=var.device) if seen is None else seen.double().clone()
    if first:
        weight[0] = 0
    if not weight.any():
        weight[1 if first else 0 :] = 1
    return weight.unsqueeze(1)
