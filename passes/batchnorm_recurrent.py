"""Pass ``batchnorm-recurrent``: batch normalisation inside recurrent layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from kfe_fx.errors import UsageError
from kfe_fx.passes.base import Pass, PassResult
from kfe_fx.program import GraphInterpreter, Program, copy_graph
from kfe_fx.recurrent.layers import Layer, find_layers, free_name, read_by_others, set_tensor
from kfe_fx.recurrent.op import CELLS, Arguments
from kfe_fx.recurrent.run import run
from kfe_fx.recurrent.statistics import Record
from kfe_fx.shapes import propagate
from kfe_fx.training.batches import Batches

_SIDES = {"input": ("ih",), "full": ("ih", "hh")}
_CELL_NORMS = ("none", "scalar", "channel")
_STATISTICS = ("step", "shared")


@dataclass(frozen=True)
class BatchnormRecurrent(Pass):
    """Normalise the products of recurrent layers, and of an LSTM the cell state on its way out.

        full:   gates_t = BN(W_ih x_t; gamma_ih, b_ih) + BN(W_hh h_{t-1}; gamma_hh, b_hh)     (Cooijmans et al. 2017)
        input:  gates_t = BN(W_ih x_t; gamma_ih, b_ih) + W_hh h_{t-1} + b_hh                   (Laurent et al. 2016)

    of a GRU either side likewise. The new tensors stand beside the weights: ``lstm.gamma_ih_l0``,
    ``lstm.running_mean_ih_l0`` [rows, g H], ...; biases are the shifts, a layer without gets them. In training the
    statistics are those of the batch, in evaluation the running ones.

    Of a trained network the function is kept in evaluation mode: every row gets the mean and variance of a product over
    all steps and sequences of the calibration, gamma = sqrt(var + eps) and b += mean. (Rows that differ from step to
    step could not keep it: gamma and b are the same at all steps.) The first step of training changes it. An untrained
    network gets gamma = ``gamma``, the biases 0, of the forget gate 1, and statistics 0 and 1.

    Attributes:
        data: examples to calibrate on, in any form; None takes the calibration sample of a program file.
        mode: "input" or "full".
        cell_norm: of c_t of an LSTM, in "full" mode: "none", "channel", or "scalar", one scale of all channels, which
            does not centre and fits an ONNX LSTM.
        statistics: "step", a row for each step; "shared", one row; None for "shared" in mode "input" (sequence-wise,
            which folds into the plain layer), else "step".
        t_max: rows for "step"; later steps use the last one. None: the longest sequence of the data, or the example.
        gamma: of an untrained network.
        trained: whether to keep the function; None: where there are examples to calibrate on.
        momentum: weight of the statistics of a batch in the running ones.
        eps: added to variances.
        batch_size: examples at a time.
    """

    name: ClassVar[str] = "batchnorm-recurrent"
    keeps: ClassVar[str] = "trained"  # where it calibrates the facts say "exact"
    data: Any = field(default=None, repr=False)
    mode: str = "input"
    cell_norm: str = "none"
    statistics: str | None = None
    t_max: int | None = None
    gamma: float = 0.1
    trained: bool | None = None
    momentum: float = 0.1
    eps: float = 1e-5
    batch_size: int = 64

    def run(self, program: Program) -> PassResult:
        """Return the normalised Program.

        Facts: ``layers`` maps each rewritten one to its rows, ``skipped`` each other one to the reason, ``keeps`` is
        "exact" where the function is kept in evaluation mode, ``constant_inputs`` maps layers to steps at which the
        inputs of all sequences are equal: these are normalised with running statistics.

        Raises:
            UsageError: options that mean nothing, or nothing to calibrate on.
        """
        self._check(program)
        if all(layer.call.normalised for layer in find_layers(program)):
            return PassResult(program, False, {"layers": {}, "skipped": {}, "constant_inputs": {}})
        data = program.extras.get("calibration") if self.data is None else self.data
        records = {} if data is None else self._measure(program, data)
        lengths = {} if records or self.statistics_of() == "shared" else _example_lengths(program)
        twin = program.copy()
        _give_training(twin)
        rows: dict[str, int] = {}
        skipped: dict[str, str] = {}
        constant: dict[str, list[int]] = {}
        for layer in find_layers(twin):
            reason = _refusal(twin, layer)
            if reason is not None:
                skipped[layer.name] = reason
                continue
            first = layer.nodes["eval"][0].name
            record = records.get(first)
            longest = record.longest if record is not None else lengths.get(first, 1)
            rows[layer.name] = 1 if self.statistics_of() == "shared" else self.t_max or longest
            self._rewrite(twin, layer, rows[layer.name], record if self._calibrates(program) else None)
            if record is not None and record.constant_steps:
                constant[layer.name] = record.constant_steps
        facts = {"layers": rows, "skipped": skipped, "constant_inputs": constant}
        if not rows:
            return PassResult(program, False, facts)
        twin.module().recompile()
        twin.lineage = (*program.lineage, self.name)
        return PassResult(twin, True, facts | {"keeps": "exact" if self._calibrates(program) else "trained"})

    def statistics_of(self) -> str:
        """Return what ``statistics`` comes to."""
        return self.statistics or ("shared" if self.mode == "input" else "step")

    def _calibrates(self, program: Program) -> bool:
        return self.trained if self.trained is not None else self.data is not None or "calibration" in program.extras

    def _check(self, program: Program) -> None:
        told = f"{self.name}:"
        for option, value, known in (
            ("mode", self.mode, tuple(_SIDES)),
            ("cell_norm", self.cell_norm, _CELL_NORMS),
            ("statistics", self.statistics_of(), _STATISTICS),
        ):
            if value not in known:
                raise UsageError(f"{told} {option} is one of {', '.join(known)}, got {value!r}")
        if self.cell_norm != "none" and self.mode != "full":
            raise UsageError(f"{told} cell_norm={self.cell_norm} needs mode=full")
        if self.t_max is not None and self.t_max < 1:
            raise UsageError(f"{told} t_max is a number of steps from 1, got {self.t_max}")
        if not (self.gamma > 0 and self.eps > 0 and 0 < self.momentum <= 1):
            raise UsageError(f"{told} gamma and eps are above 0 and momentum is in (0, 1]")
        if self.trained and self.data is None and "calibration" not in program.extras:
            raise UsageError(f"{told} a trained network needs examples to calibrate on: give data, or trained=False")

    def _measure(self, program: Program, data: Any) -> dict[str, Record]:
        """Run the data and keep by node what each plain layer does; the nodes of one layer keep it together."""
        records: dict[str, Record] = {}
        for layer in find_layers(program):
            if not layer.call.normalised:
                records |= dict.fromkeys((node.name for node in layer.nodes.get("eval", ())), Record())
        runner = _Calibrate(program, records)
        count = 0
        with torch.no_grad():
            for batch in Batches(program, data, self.batch_size):
                runner.run(*batch.inputs)
                count += 1
        if not count:
            raise UsageError(f"{self.name}: the data yields no batches; give at least one example")
        return records

    def _rewrite(self, twin: Program, layer: Layer, rows: int, record: Record | None) -> None:
        held = layer.tensors(twin)
        changes: dict[str, Any] = {
            "shared": self.statistics_of() == "shared",
            "momentum": self.momentum,
            "eps": self.eps,
        }
        like: Tensor = held.weight_ih

        def add(argument: str, part: str, value: Tensor, *, learned: bool) -> None:
            changes[argument] = free_name(twin, layer.name_of(part))
            set_tensor(twin, changes[argument], value, like, learned=learned)

        width, hidden = len(like), len(like) // CELLS[held.cell]
        sides = dict.fromkeys(_SIDES[self.mode], width)
        if held.cell == "lstm" and self.cell_norm != "none":
            sides["c"] = 1 if self.cell_norm == "scalar" else hidden
        for side, channels in sides.items():
            centred = side != "c" or self.cell_norm == "channel"
            mean, var = self._statistics(record, side, channels, centred=centred)
            mean, var = mean.to(like.dtype).double(), var.to(like.dtype).double()  # as they will be read
            scale = torch.full_like(var, self.gamma) if record is None else torch.sqrt(var + self.eps)
            add(f"gamma_{side}", f"gamma_{side}", scale, learned=True)
            if side == "c" and centred:
                add("beta_c", "beta_c", mean, learned=True)
            if centred:
                add(f"mean_{side}", f"running_mean_{side}", mean.expand(rows, -1), learned=False)
            add(f"var_{side}", f"running_var_{side}", var.expand(rows, -1), learned=False)
            if side != "c":
                bias = _bias(held, side, mean) if record is not None else _fresh_bias(held, side)
                name = layer.tensor_name(f"bias_{side}")
                if name is None or read_by_others(twin, layer, f"bias_{side}"):
                    add(f"bias_{side}", f"bias_{side}", bias, learned=True)
                else:
                    with torch.no_grad():
                        twin.tensor(name).copy_(bias)
        seen = torch.zeros(rows) if record is None else _counted(record, rows)
        add("seen", "seen", seen, learned=False)
        for mode in twin.graphs:
            layer.rewrite(twin, changes | {"training": mode == "train"}, mode)

    def _statistics(self, record: Record | None, side: str, channels: int, *, centred: bool) -> tuple[Tensor, Tensor]:
        """Return mean and variance over all steps, or those of fresh statistics, [C] in float64."""
        zeros = torch.zeros(channels, dtype=torch.float64)
        if record is None or not record.moments[side].count:
            return zeros, zeros + 1
        moments = record.moments[side]
        return (moments.mean, moments.var) if centred else (zeros, moments.second())


class _Calibrate(GraphInterpreter):
    """Run the evaluation graph and look into its plain recurrent layers."""

    def __init__(self, program: Program, records: Mapping[str, Record]) -> None:
        super().__init__(program.module(), graph=program.graphs["eval"])
        self.records = records

    def run_node(self, n: fx.Node) -> Any:
        record = self.records.get(n.name)
        if record is None:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return run(Arguments(*args, **kwargs), record.recorder)


def _example_lengths(program: Program) -> dict[str, int]:
    """Return by recurrent node how many steps it runs on the example inputs."""
    values = propagate(program)
    layers = find_layers(program)
    calls = {node: Arguments.of(node) for layer in layers for node in layer.nodes.get("eval", ())}
    return {node.name: int(values[call.input].shape[call.time_dim]) for node, call in calls.items()}


def _give_training(program: Program) -> None:
    """Give a Program a training graph where it has none: the evaluation graph under its own name."""
    if "train" in program.graphs:
        return
    module = program.module()
    module.graphs["train"] = copy_graph(module.graphs["eval"])
    outputs = module.signature.outputs
    module.signature = replace(module.signature, outputs={**outputs, "train": outputs["eval"]})


def _refusal(program: Program, layer: Layer) -> str | None:
    """Return why a layer stays as it is, or None."""
    if layer.call.normalised:
        return "it is normalised already"
    if "eval" not in layer.nodes:
        return "it runs in training only"
    for argument in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        if getattr(layer.call, argument) is not None and layer.tensor_name(argument) is None:
            return f"its {argument} is computed in the network"
    return None


def _bias(held: Arguments, side: str, mean: Tensor) -> Tensor:
    bias = getattr(held, f"bias_{side}")
    return mean if bias is None else bias.detach().double() + mean


def _fresh_bias(held: Arguments, side: str) -> Tensor:
    """Return 0, and 1 for the forget gate (on the input side; the sides add up)."""
    bias = torch.zeros(len(held.weight_ih), dtype=torch.float64)
    if held.cell == "lstm" and side == "ih":
        bias.view(4, -1)[1] = 1.0  # gates are i, f, g, o
    return bias


def _counted(record: Record, rows: int) -> Tensor:
    """Return how many batches each row stands for; the last one for all further steps."""
    seen = torch.tensor(record.seen, dtype=torch.float64)
    if len(seen) <= rows:
        return torch.cat([seen, seen.new_zeros(rows - len(seen))])
    return torch.cat([seen[: rows - 1], seen[rows - 1 :].sum(0, keepdim=True)])
