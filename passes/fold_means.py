"""Pass ``fold-means``: what removed channels sent on the average goes into their consumers' biases."""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, fx

from kfe_fx.errors import UsageError
from kfe_fx.labels.analysis import Analysis
from kfe_fx.passes.base import Pass, PassResult
from kfe_fx.plan import Plan
from kfe_fx.program import GraphInterpreter, Program
from kfe_fx.recurrent.op import RECURRENT, Arguments
from kfe_fx.taps import untapped, users_of
from kfe_fx.training.batches import Batches

aten = torch.ops.aten

_CONVS = {
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding,
    aten.conv3d.padding, aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input,
}  # fmt: skip
_PRODUCTS = {aten.matmul.default, aten.mm.default}
_OTHERS = {aten.linear.default, aten.addmm.default, aten.einsum.default, aten.bilinear.default, aten.bmm.default}

Means = dict[str, Tensor]


@dataclass(frozen=True)
class _Consumer:
    """A contraction of an activation with a weight: where its input, its weight and its bias are."""

    node: fx.Node
    source: fx.Node
    weight: str
    bias: str | None
    channel: int  # dim of the input that is contracted
    out: int  # dim of the output that is made
    delayed: int | None = None  # the dim of the steps, where a recurrent weight reads the step before

    @property
    def key(self) -> str:
        """The name of what it reads: a recurrent layer reads its input and its own steps."""
        return self.node.name if self.delayed is None else f"{self.node.name}/steps"


@dataclass(frozen=True)
class FoldMeans(Pass):
    """Add the mean output of removed channels to the bias of each consumer.

    For removed inputs j, with the mean m over the data taken in the *whole* network:

        bias[o] += mean over positions of sum_j (w[o, j] * m_j)

    where * is the consumer's own operation (grouped, transposed, strided, padded alike). Without padding this is
    m_j · sum of the kernel; with zero padding the borders get less, and the mean over positions is the constant that is
    nearest to what is missing, not exact at each position. A consumer without a bias in front of a batch norm has its
    running mean lowered by the same; a consumer with neither, or whose weight is computed, is skipped and counted. A
    bias that several contractions share takes the mean over them. A recurrent layer consumes its input (``bias_ih``
    takes what is missing) and its own last step (``bias_hh`` does; with the mean over the steps, the first of which
    reads no step before).

    Attributes:
        analysis: of the Program before the removal (which it holds).
        plan: what was removed.
        means: from ``measure_means`` on that Program.
    """

    name: ClassVar[str] = "fold-means"
    keeps: ClassVar[str] = "trained"
    analysis: Analysis = field(repr=False)
    plan: Plan
    means: Means = field(repr=False)

    def run(self, program: Program) -> PassResult:
        """Return ``program`` (the small one) with corrected biases.

        Raises:
            UsageError: the small network does not have the shapes that the plan says.
        """
        twin = program.copy()
        removed = self.plan.units(self.analysis)
        found = consumers(self.analysis)
        shifts: dict[tuple[str, float], list[Tensor]] = defaultdict(list)
        skipped = [_where(node) for node in _other_consumers(self.analysis, found, removed)]
        for consumer in found:
            if consumer.key not in self.means or not self._loses(consumer, removed):
                continue
            target = _target(consumer)
            if target is None:
                skipped.append(_where(consumer.node))
                continue
            shifts[target].append(self._shift(consumer, removed))
        with torch.no_grad():
            for (name, sign), values in shifts.items():
                held = twin.tensor(name)
                shift = torch.stack(values).mean(0)
                if shift.shape != held.shape:
                    wrong = f"{name!r} has {list(held.shape)} values, the plan says {list(shift.shape)}"
                    raise UsageError(f"fold-means: {wrong}; give the plan this network was made with")
                held += (sign * shift).to(held.dtype)
        if shifts:
            twin.lineage = (*program.lineage, self.name)
        facts = {"folded": sum(map(len, shifts.values())), "skipped": len(skipped), "skipped_at": skipped}
        return PassResult(twin if shifts else program, bool(shifts), facts)

    def _loses(self, consumer: _Consumer, removed: frozenset[int]) -> bool:
        return self.analysis.kept_of(consumer.source, removed)[consumer.channel] is not None

    def _shift(self, consumer: _Consumer, removed: frozenset[int]) -> Tensor:
        mean = self.means[consumer.key]  # [C, positions of a convolution...]
        kept = self.analysis.kept_of(consumer.source, removed)[consumer.channel]
        lost = mean.clone()
        lost[torch.from_numpy(np.asarray(kept))] = 0
        weight = self.analysis.program.tensor(consumer.weight).detach().double()
        sent = _apply(consumer, lost, weight)
        whole = consumer.node.target is RECURRENT  # what it shifts is as long as the rows of its weight
        rows = self.analysis.kept(consumer.weight, removed) if whole else self.analysis.kept_of(consumer.node, removed)
        out = rows[0 if whole else consumer.out]
        return sent if out is None else sent[torch.from_numpy(out)]


def consumers(analysis: Analysis) -> list[_Consumer]:
    """List the contractions of activations with weights in the evaluation graph."""
    tracker = analysis.trackers["eval"]
    found = []
    for node in analysis.program.graphs["eval"].nodes:
        if node.op != "call_function" or node in tracker.static:
            continue
        if node.target is RECURRENT:
            found += [each for each in _of_layer(node) if each.source not in tracker.static]
            continue
        consumer = _consumer(node, lambda arg: len(tracker.shape(arg)))
        if consumer is not None and consumer.source not in tracker.static:
            found.append(consumer)
    return found


def _other_consumers(analysis: Analysis, known: list[_Consumer], removed: frozenset[int]) -> list[fx.Node]:
    """List contractions that lose inputs and are none of the known kinds (einsum, a weight that is computed)."""
    tracker = analysis.trackers["eval"]
    seen = {consumer.node for consumer in known}
    found = []
    for node in analysis.program.graphs["eval"].nodes:
        contracts = node.target in _CONVS | _PRODUCTS | _OTHERS and node not in seen and node not in tracker.static
        tensors = tracker.tensors(node) if contracts else []
        moving = [arg for arg in tensors if arg not in tracker.static]
        if len(moving) == len(tensors):
            continue  # of activations alone: no weight, no bias
        if any(kept is not None for arg in moving for kept in analysis.kept_of(arg, removed)):
            found.append(node)
    return found


def _where(node: fx.Node) -> str:
    return node.meta.get("module") or node.name


def _consumer(node: fx.Node, rank: Any) -> _Consumer | None:
    if node.target is aten.addmm.default:
        bias, source, weight = node.args[:3]
        plain = len(node.args) == 3 and not node.kwargs
    elif node.target in _CONVS or node.target is aten.linear.default or node.target in _PRODUCTS:
        source, weight = node.args[:2]
        bias = None if node.target in _PRODUCTS else node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        plain = True
    else:
        return None
    if not plain or not _reads(weight) or not isinstance(source, fx.Node) or (bias is not None and not _reads(bias)):
        return None
    if node.target in _CONVS:
        channel = rank(source) - (rank(weight) - 1)
        out = channel
    else:
        if rank(weight) != 2:
            return None
        channel = out = rank(source) - 1
        bias = bias if bias is not None else _added(node) if node.target in _PRODUCTS else None
    name = str(bias.target) if isinstance(bias, fx.Node) and rank(bias) == 1 else None
    return _Consumer(node, source, str(weight.target), name, channel, out)  # type: ignore[union-attr]


def _of_layer(node: fx.Node) -> list[_Consumer]:
    """Return how a plain recurrent layer consumes its input and its own steps."""
    call = Arguments.of(node)
    if call.normalised or call.lengths is not None:
        return []  # a norm's running mean is estimated again; what is padding does not count
    steps = next((user for user in node.users if user.target is operator.getitem and user.args[1] == 0), None)
    sides: list[tuple[Any, Any, Any, int | None]] = [(call.input, call.weight_ih, call.bias_ih, None)]
    if steps is not None:
        sides.append((steps, call.weight_hh, call.bias_hh, call.time_dim))
    found = []
    for source, weight, bias, delayed in sides:
        if _reads(weight) and (bias is None or _reads(bias)):
            name = None if bias is None else str(bias.target)
            found.append(_Consumer(node, source, str(weight.target), name, 2, 2, delayed))
    return found


def _reads(arg: Any) -> bool:
    return isinstance(arg, fx.Node) and arg.op == "get_attr"


def _added(node: fx.Node) -> fx.Node | None:
    """Return the parameter that is added right behind a product, ``x @ w + b``."""
    users = users_of(node)
    user = users[0] if len(users) == 1 else None
    if user is None or user.target is not aten.add.Tensor or user.kwargs:
        return None
    return next((arg for arg in user.args if isinstance(arg, fx.Node) and arg is not node and _reads(arg)), None)


def _target(consumer: _Consumer) -> tuple[str, float] | None:
    """Return the vector that takes the shift and its sign: the bias, or minus the running mean of the norm behind."""
    if consumer.bias is not None:
        return consumer.bias, 1.0
    node = consumer.node
    users = users_of(node)
    norm = users[0] if len(users) == 1 else None
    if norm is None or norm.target is not aten.batch_norm.default or norm.args[5]:
        return None
    if untapped(norm.args[0]) is not node:  # type: ignore[arg-type]
        return None
    return (str(norm.args[3].target), -1.0) if _reads(norm.args[3]) else None  # type: ignore[union-attr]


def _apply(consumer: _Consumer, lost: Tensor, weight: Tensor) -> Tensor:
    """Return the mean over positions of the consumer's operation, without bias, on the lost inputs, [out]."""
    node = consumer.node
    if node.target in _CONVS:
        rest = node.args[3:]
        options = {key: value for key, value in node.kwargs.items() if key != "bias"}
        sent = node.target(lost.unsqueeze(0), weight, None, *rest, **options)  # type: ignore[operator]
        return sent[0].flatten(1).mean(1)
    return lost @ (weight.t() if node.target in (aten.linear.default, RECURRENT) else weight)


class _Measure(GraphInterpreter):
    """Sum what goes into each consumer over examples (and over positions too where the operation is the same there)."""

    def __init__(self, program: Program, found: list[_Consumer]) -> None:
        super().__init__(program.module(), graph=program.graphs["eval"])
        self.found: dict[str, list[_Consumer]] = defaultdict(list)
        for consumer in found:
            trigger = consumer.node if consumer.delayed is None else consumer.source
            self.found[trigger.name].append(consumer)
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        for consumer in self.found.get(n.name, ()):
            self._see(consumer.key, consumer, result if consumer.source is n else self.env[consumer.source])
        return result

    def _see(self, name: str, consumer: _Consumer, value: Tensor) -> None:
        value = value.detach().double()
        if consumer.delayed is not None:  # nobody reads the last step, and the first one reads zero
            last = 0 if Arguments.of(consumer.node).reverse else value.shape[consumer.delayed] - 1
            value = value.index_fill(consumer.delayed, torch.tensor([last]), 0.0)
        if consumer.node.target in _CONVS:
            value = value.flatten(0, consumer.channel - 1) if consumer.channel > 1 else value
            value = value if consumer.channel else value.unsqueeze(0)  # [examples, C, positions...]
        else:
            value = value.flatten(0, -2)  # [examples * positions, C]
        known = self.sums.get(name)
        if known is not None and known.shape != value.shape[1:]:  # another size of image: means are kept per channel
            value = (
                value.flatten(2).mean(2).reshape(*value.shape[:2], *[1] * (known.dim() - 1)).expand(-1, *known.shape)
            )
            flat = known.flatten(1).mean(1).reshape(-1, *[1] * (known.dim() - 1))
            self.sums[name] = flat.expand_as(known).clone()
        total = value.sum(0)
        self.sums[name] = self.sums[name] + total if known is not None else total
        self.counts[name] = self.counts.get(name, 0) + len(value)


def measure_means(analysis: Analysis, data: Any, *, batch_size: int = 64) -> Means:
    """Measure, in evaluation mode, the mean input of every contraction that may lose input channels.

    Args:
        analysis: of the whole network (before the removal).
        data: examples, in any form; targets are not looked at.
        batch_size: examples at a time.

    Returns:
        Node name -> mean over the data, float64: [C] or, for convolutions, [C, positions...].

    Raises:
        UsageError: there are no examples.
    """
    found = [c for c in consumers(analysis) if len(analysis.layout(c.source.name)[c.channel])]
    runner = _Measure(analysis.program, found)
    with torch.no_grad():
        for batch in Batches(analysis.program, data, batch_size):
            runner.run(*batch.inputs)
    if found and not runner.counts:
        raise UsageError("fold-means: the data yields no batches; give at least one example")
    return {name: total / runner.counts[name] for name, total in runner.sums.items()}
