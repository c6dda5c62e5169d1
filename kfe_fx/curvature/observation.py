"""One forward and backward pass as the taps see it: rows of each block, whole or in chunks of examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from kfe_fx.curvature.blocks import Block, Use
from kfe_fx.curvature.direct import Moment, Rows, per_example
from kfe_fx.curvature.layout import rows
from kfe_fx.curvature.operands import Operand
from kfe_fx.curvature.pairs import Pairs, joined
from kfe_fx.program import Program, run_node

CHUNK = 8 << 20  # bytes of rows at a time


@dataclass
class Seen:
    """What one tap saw: the tensors it keeps, and the gradient by its output."""

    use: Use
    inputs: list[Tensor]
    grad: Tensor


@dataclass(eq=False)
class Run:
    """One forward pass: how many examples, the flat inputs (for their sizes), and what has been seen of it."""

    examples: int
    mode: str
    inputs: dict[str, Any]
    pending: dict[str, list[Seen]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Prepared:
    """What one tap saw, examples first: data [N, ...], gradient [N, ...], lengths of sequences [N, ...] or None."""

    use: Use
    data: Tensor
    grad: Tensor
    lengths: Tensor | None


@dataclass
class Observation:
    """All that one backward pass says about one block.

    ``scale`` multiplies every gradient: N where the loss was a mean over the examples.
    """

    program: Program
    block: Block
    run: Run
    seen: list[Seen]
    scale: float = 1.0

    @property
    def examples(self) -> int:
        """The number of examples N."""
        return self.run.examples

    def finite(self) -> bool:
        """Tell whether every gradient is finite."""
        return all(bool(torch.isfinite(seen.grad.sum())) for seen in self.seen)

    def chunks(self) -> Iterator[Pairs]:
        """Yield the rows of all examples, a bounded number of bytes at a time."""
        if self.block.kind == "diagonal":
            yield from self._gradients()
            return
        prepared = [self._prepared(seen) for seen in self.seen]
        step = max(1, min(self.examples, CHUNK // max(1, sum(self._bytes(part) for part in prepared))))
        for start in range(0, self.examples, step):
            stop = start + step
            yield joined([self._pairs(part, start, stop) for part in prepared])

    def _prepared(self, seen: Seen) -> _Prepared:
        site, pairing = seen.use.site, seen.use.site.pairing
        assert pairing is not None
        layout = site.layouts[pairing.data.name]
        data = rows(layout, seen.inputs[site.inputs.index(pairing.data)], self.examples)
        lengths = None
        if pairing.counting is not None:
            lengths = self._value(pairing.counting, self._sized(seen))
            lengths = rows(None if layout is None else replace(layout, dim=0), lengths, self.examples)
        return _Prepared(seen.use, data, rows(site.layouts[site.name], seen.grad, self.examples), lengths)

    def _pairs(self, part: _Prepared, start: int, stop: int) -> Pairs:
        use, pairing = part.use, part.use.site.pairing
        assert pairing is not None
        data, grad = part.data[start:stop], part.grad[start:stop]
        if self.scale != 1.0:
            grad = grad * self.scale
        made = pairing.pairs(data, grad, use.column is True)
        made = pairing.bounded(made, data, None if part.lengths is None else part.lengths[start:stop])
        made = made.swapped() if use.transposed else made
        return made.padded() if use.column is False else made

    def _bytes(self, part: _Prepared) -> int:
        use, data, grad = part.use, part.data, part.grad
        assert use.site.pairing is not None
        groups, high, wide = self.block.shape
        if use.transposed:
            high, wide = wide, high
        positions = use.site.pairing.positions(data[0], grad[0], groups * high)
        if all(seen.use.site.pairing.sparse for seen in self.seen):  # type: ignore[union-attr]
            high = 0
        return positions * groups * (high + wide) * grad.element_size()

    def _gradients(self) -> Iterator[Pairs]:
        """Yield per-example gradients of a parameter without pairs of rows, as [1, n, 1, P] beside ones."""
        size = self.block.shape[2]
        parts = [self._gradient(seen) for seen in self.seen]
        step = max(1, min(self.examples, CHUNK // max(1, 2 * self.seen[0].grad.element_size() * size)))
        for start in range(0, self.examples, step):
            stop = min(self.examples, start + step)
            total = parts[0](start, stop)
            for part in parts[1:]:
                total = total + part(start, stop)
            right = total.reshape(1, stop - start, 1, size)
            if self.scale != 1.0:
                right = right * self.scale
            yield Pairs(right.new_ones(1, stop - start, 1, 1), right, ((1, "left"),))

    def _gradient(self, seen: Seen) -> Rows:
        """Return the gradients [n, P] of a range of examples by the block's parameter through one use."""
        site, operand = seen.use.site, seen.use.operand
        sized = self._sized(seen)
        pulled = self._pulled_back(operand, sized)
        if _has_pairs(seen.use):
            made = self._formed(seen, sized)
        else:
            place = None if site.operation is site.node else int(site.node.args[1])  # type: ignore[arg-type]
            moment = Moment(site.operation, self._values(seen, sized), seen.grad, place)
            made = per_example(moment, operand.node, site.layouts[site.name], self.examples)
        return lambda start, stop: pulled(made(start, stop))

    def _formed(self, seen: Seen, sized: dict[fx.Node, Any]) -> Rows:
        """Form the matrices of a few examples out of their pairs."""
        pairing, operand = seen.use.site.pairing, seen.use.operand
        assert pairing is not None
        part = self._prepared(seen)
        data, grad = part.data, part.grad
        shape = tuple(operand.value(self.program, {}, sized).shape)

        def of(start: int, stop: int) -> Tensor:
            left, right = pairing.pairs(data[start:stop], grad[start:stop], False).dense()
            made = torch.matmul(left.transpose(2, 3), right)  # [K, n, o, i]
            return torch.stack([pairing.tensor(made[:, n], shape) for n in range(made.shape[1])])

        return of

    def _pulled_back(self, operand: Operand, sized: dict[fx.Node, Any]) -> Callable[[Tensor], Tensor]:
        """Return what turns gradients by an operand [n, *shape] into gradients by the block's parameter [n, P]."""
        size = self.block.shape[2]
        if operand.plain:
            return lambda grads: grads.reshape(len(grads), -1)
        if operand.movement:
            index = operand.index(self.program, sized).reshape(-1)
            return lambda grads: grads.new_zeros(len(grads), size).index_add_(1, index, grads.reshape(len(grads), -1))
        leaf = self.program.tensor(self.block.weight).detach().requires_grad_()
        with torch.enable_grad():
            value = operand.value(self.program, {self.block.weight: leaf}, sized)

        def back(grads: Tensor) -> Tensor:
            if not value.requires_grad:
                return grads.new_zeros(len(grads), size)
            found = [
                torch.autograd.grad(value, leaf, grad, retain_graph=True, allow_unused=True, materialize_grads=True)[0]
                for grad in grads
            ]
            return torch.stack(found).reshape(len(grads), -1)

        return back

    def _sized(self, seen: Seen) -> dict[fx.Node, Any]:
        """Return the tensors that sizes are taken from."""
        known: dict[fx.Node, Any] = dict(zip(seen.use.site.inputs, seen.inputs, strict=True))
        for operand in seen.use.site.operands:
            for node in operand.sized:
                known.setdefault(node, self.run.inputs.get(str(node.target)) if node.op == "placeholder" else None)
        return known

    def _values(self, seen: Seen, sized: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
        """Compute the value of every argument of a site."""
        known = dict(sized)
        for node in seen.use.site.operation.all_input_nodes:
            self._value(node, known)
        return known

    def _value(self, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        if node not in known:
            if node.op == "get_attr":
                known[node] = self.program.tensor(str(node.target)).detach()
            elif node.op == "placeholder":
                known[node] = self.run.inputs[str(node.target)]
            else:
                known[node] = run_node(node, lambda arg: self._value(arg, known))
        return known[node]


def _has_pairs(use: Use) -> bool:
    """Tell whether a use has pairs of rows of its operand, which then is a computed weight."""
    return use.site.pairing is not None and use.operand.node is use.site.pairing.weight


def expected(block: Block, mode: str) -> int:
    """Count the taps that belong to a block in one mode."""
    return len(block.uses.get(mode, ()))


def uses_by_site(blocks: tuple[Block, ...], mode: str) -> dict[str, list[tuple[Block, Use]]]:
    """Map each site to the blocks that it feeds."""
    found: dict[str, list[tuple[Block, Use]]] = {}
    for block in blocks:
        for use in block.uses.get(mode, ()):
            found.setdefault(use.site.name, []).append((block, use))
    return found
