"""Pass ``reconstruct``: what is left of each layer is fitted to what the whole network computed there."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from kfe_fx.errors import PlanError, UsageError
from kfe_fx.labels.analysis import Analysis, analyze
from kfe_fx.labels.states import narrow_input
from kfe_fx.passes.base import Pass, PassResult
from kfe_fx.plan import Plan
from kfe_fx.program import Program
from kfe_fx.repair.fit import KEPT, Layer, Pieces, choose
from kfe_fx.repair.lines import Line, Lines, live_bytes
from kfe_fx.repair.rows import Reader, reader_of, uses_of
from kfe_fx.training.batches import Batch, Batches, pinned_batch

BYTES = 2 << 30  # of activations at one time, of both networks
PIECES = 8  # batches at the least, of which a quarter judges
HELD_OUT = 0.25
ROWS_PER_INPUT = 16
ROWS = (4096, 65_536)  # at least, and at most


@dataclass(frozen=True)
class Reconstruct(Pass):
    """Fit each layer of a network that lost units to the outputs that it had before, layer by layer.

    For a layer with weights W, the inputs x' that reach it now and the outputs y = W x + b of the network before:

        min over W', b' of  mean |y_kept - W' x' - b'|^2 + rho |W' - W_kept|^2

    (channel pruning's reconstruction, He et al. 2017, section 3.1, equation 5, with the inputs that the layers mended
    before it give, so that errors do not add up; rho keeps W' where the inputs say nothing). Both networks run side by
    side, node by node, over all examples at once. Each fit is judged on examples that it has not seen beside the
    weights as they are (what ``fold-means`` left) and the ``alternatives``; the one with the least error is taken.

    A layer without a bias in front of a batch norm has the constant moved into the running mean. Layers whose weight
    has several users or is computed, transposed convolutions and recurrent layers stay as they are, as does a layer
    whose other dims (positions, or examples with channels folded in) lost units that the plan does not place.

    Attributes:
        before: the network before the removal.
        plan: what was removed from ``before``.
        data: examples; targets are not looked at.
        alternatives: weights to choose from as well, in the shapes of the small network: method -> parameter -> tensor.
        batch_size: examples at a time.
        limit: at most so many examples.
        seed: of the positions that are sampled.
    """

    name: ClassVar[str] = "reconstruct"
    keeps: ClassVar[str] = "trained"
    before: Program = field(repr=False)
    plan: Plan
    data: Any = field(repr=False)
    alternatives: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)
    batch_size: int = 64
    limit: int = 1024
    seed: int = 0

    def run(self, program: Program) -> PassResult:
        """Return ``program`` (the small one) with fitted weights.

        The facts tell for each layer, by its module, the method that was taken and the errors of all, relative to the
        variance of y, on the examples that judge.

        Raises:
            UsageError: there are fewer than two examples (or batches, where the network pins its batch).
        """
        twin = program.copy()
        batches = self._batches()
        held = max(1, round(HELD_OUT * len(batches)))
        names = program.signature.input_names
        before = Lines(self.before, batches)
        after = Lines(  # batches come as the network before takes them, which other rounds may have cut
            twin,
            [
                [narrow_input(twin, name, value, self.before) for name, value in zip(names, each, strict=True)]
                for each in batches
            ],
        )
        uses, layers = uses_of(twin), {}
        with torch.no_grad():
            while (node := after.upcoming()) is not None:
                reader = reader_of(node, twin, uses)
                wanted = None if reader is None else before.reach(node.name)
                if reader is not None and wanted is not None:
                    layers[node.meta.get("module") or node.name] = self._fit(twin, reader, after, wanted, held)
                after.step()
        changed = any(facts["method"] != KEPT for facts in layers.values())
        if changed:
            twin.lineage = (*program.lineage, self.name)
        return PassResult(twin if changed else program, changed, {"layers": layers})

    def _batches(self) -> list[list[Any]]:
        """Return inputs of as many examples as there is room for, in equal batches."""
        whole = Batches(self.before, self.data, self.batch_size)
        count = min(whole.examples() or self.limit, self.limit)
        size = pinned_batch(self.before) or max(1, min(self.batch_size, math.ceil(count / PIECES)))
        found: list[Batch] = []
        for batch in Batches(self.before, whole.data, size):
            if not found:
                room = BYTES // max(1, 2 * live_bytes(self.before, batch.inputs))
                count = min(count, max(2, room) * batch.count)
            found.append(batch)
            if len(found) * size >= count:
                break
        if len(found) == 1 and pinned_batch(self.before) is None:
            step = max(1, found[0].count // PIECES)
            found = [found[0].rows(start, start + step) for start in range(0, found[0].count, step)]
        if len(found) < 2:
            raise UsageError("reconstruct: fits are judged on examples of their own, and there is only one; give more")
        return [batch.inputs for batch in found]

    def _fit(self, twin: Program, reader: Reader, after: Lines, wanted: Line, held: int) -> dict[str, Any]:
        weight, place = twin.tensor(reader.weight), reader.bias or reader.mean
        matrix = reader.pairing.matrix(weight.detach()).double()
        groups, outputs, inputs = matrix.shape
        constant = torch.zeros(groups, outputs, dtype=torch.float64)
        if reader.bias is not None:
            constant = twin.tensor(reader.bias).detach().double().reshape(groups, outputs)
        elif reader.mean is not None:  # what was folded into the running mean is a constant as well
            mean = self._kept(self.before.tensor(reader.mean), reader.mean)
            if mean.shape == twin.tensor(reader.mean).shape:
                constant = (mean - twin.tensor(reader.mean)).double().reshape(groups, outputs)
        now = Layer(KEPT, matrix, constant)
        others = {
            method: reader.pairing.matrix(found[reader.weight].detach()).double()
            for method, found in self.alternatives.items()
            if reader.weight in found
        }
        read = after.line(reader.source)
        given = self._left(reader, read, wanted, groups * outputs)
        if given is None:
            return {"method": KEPT, "errors": {}}
        pieces = self._pieces(reader, read, given, inputs)
        choice = choose(now, others, pieces, held, constant=place is not None)
        if choice.taken.method != KEPT:
            weight.copy_(reader.pairing.tensor(choice.taken.weight.to(weight.dtype), tuple(weight.shape)))
            if place is not None:
                sign, target = (1.0 if reader.bias else -1.0), twin.tensor(place)
                target += (sign * (choice.taken.constant - constant)).reshape(target.shape).to(target.dtype)
        return {"method": choice.taken.method, "errors": choice.errors}

    @cached_property
    def _removal(self) -> tuple[Analysis, frozenset[int]] | None:
        """The units of the network before, and those that went; None where the plan cuts across them."""
        analysis = analyze(self.before, heads=self.plan.heads)
        try:
            return analysis, self.plan.units(analysis)
        except PlanError:
            return None

    def _left(self, reader: Reader, read: Line, wanted: Line, outputs: int) -> Line | None:
        """Take of outputs of the network before what stays; None where nothing says what that is."""

        def fit(found: Line) -> bool:
            return all(reader.fits(data, output, outputs) for data, output in zip(read, found, strict=True))

        own = reader.own(wanted[0].dim())
        wanted = _narrowed(wanted, own, dict(self.plan.kept.get(reader.weight, [])).get(0))
        if fit(wanted):
            return wanted
        for dim, stay in self._rows_left(reader.node, wanted).items():
            if dim != own:
                wanted = _narrowed(wanted, dim, stay)
        return wanted if fit(wanted) else None

    def _rows_left(self, node: fx.Node, wanted: Line) -> dict[int, Any]:
        """Return what stays by dim: a layer over tokens has channels among its rows, of which its weight knows nothing.

        The analysis runs at sizes of its own: where channels lie among the examples, it does not tell of all of them.
        """
        if self._removal is None:
            return {}
        analysis, removed = self._removal
        layout, kept = analysis.layout(node.name), analysis.kept_of(node, removed)
        return {
            dim: stay
            for dim, stay in enumerate(kept)
            if stay is not None and all(len(layout[dim][0]) == output.shape[dim] for output in wanted)
        }

    def _pieces(self, reader: Reader, read: Line, wanted: Line, inputs: int) -> Pieces:
        rows = min(max(ROWS[0], ROWS_PER_INPUT * inputs), ROWS[1])
        generator = torch.Generator().manual_seed(self.seed)
        each = -(-rows // len(read))
        return [reader.rows(data, output, each, generator) for data, output in zip(read, wanted, strict=True)]

    def _kept(self, tensor: Tensor, name: str) -> Tensor:
        kept = dict(self.plan.kept.get(name, [])).get(0)
        return tensor if kept is None else tensor[torch.tensor(kept, dtype=torch.int64)]


def _narrowed(line: Line, dim: int, kept: Any) -> Line:
    if kept is None:
        return line
    index = torch.as_tensor(kept, dtype=torch.int64)
    return [value.index_select(dim, index) for value in line]
