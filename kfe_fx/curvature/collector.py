"""The observer behind the taps: gathers what each block's taps see and hands it to the statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from kfe_fx import taps
from kfe_fx.curvature.blocks import Block, Blocks, opened
from kfe_fx.curvature.examples import pinned_examples
from kfe_fx.curvature.observation import Observation, Run, Seen, expected, uses_by_site
from kfe_fx.program import Program

Sink = Callable[[Observation], None]


class Collector:
    """Watch forward and backward passes of a Program's live module.

    As soon as the last tap of a block has its gradient, ``sink`` is called with all that the pass says about the block,
    and the rows are let go: memory stays that of plain training.
    """

    def __init__(self, program: Program, blocks: Blocks, chosen: Iterable[Block], sink: Sink) -> None:
        """Prepare to watch ``chosen`` blocks."""
        self.program = program
        self.chosen = tuple(chosen)
        self.sink = sink
        self.enabled = True  # whether backward passes are seen
        self.forced = False  # whether taps ask for gradients that the parameters do not
        self.alone = False  # whether each backward pass is of one example's loss, whatever the batch
        self.nonfinite: dict[str, int] = {}
        self._blocks = blocks
        self._run: Run | None = None
        self._open: list[Run] = []
        self._uses = {mode: uses_by_site(self.chosen, mode) for mode in program.graphs}
        self._batch = _batch_dims(program)

    # called by the module --------------------------------------------------------------------------------------------

    def begin(self, flat: list[Any], mode: str) -> None:
        """Start a forward pass; what an earlier one has not finished can still come."""
        names = self.program.signature.input_names
        self._run = Run(self._count(flat), mode, dict(zip(names, flat, strict=False)))

    def __call__(self, value: Tensor, inputs: list[Tensor], site: str) -> Tensor:
        """See one value go by."""
        run = self._run
        uses = self._uses[run.mode].get(site) if run is not None and torch.is_grad_enabled() else None
        if run is None or not uses:
            return value
        if not value.requires_grad:
            if not self.forced:
                return value
            value = value.detach().requires_grad_()  # its own: the operation may hand on an input of the user's
            value.register_post_accumulate_grad_hook(_forget)
        elif uses[0][1].site.several:
            value = value.view_as(value)  # one output may be made of another: what that takes is not seen twice
        kept = [item.detach() for item in inputs]
        value.register_hook(partial(self._seen, run, site, kept))
        return value

    def _seen(self, run: Run, site: str, inputs: list[Tensor], grad: Tensor) -> None:
        if not self.enabled:
            return
        if run not in self._open:
            self._open.append(run)
        for block, use in self._uses[run.mode][site]:
            pending = run.pending.setdefault(block.name, [])
            pending.append(Seen(use, inputs, grad.detach()))
            if len(pending) == expected(block, run.mode):
                self._finish(run, block)

    def _finish(self, run: Run, block: Block) -> None:
        seen = run.pending.pop(block.name)
        observation = Observation(self.program, block, run, seen)
        with torch.no_grad():
            if observation.finite():
                self.sink(observation)
            else:
                self.nonfinite[block.name] = self.nonfinite.get(block.name, 0) + 1

    def _count(self, flat: list[Any]) -> int:
        if self._batch is None or self.alone:
            return 1
        position, dim = self._batch
        return int(flat[position].shape[dim])

    def latest(self) -> Run | None:
        """Return the last forward pass that was begun."""
        return self._run

    # called by who collects ------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """End a backward pass: hand over blocks of which not every tap had a gradient."""
        for run in self._open:
            for name in list(run.pending):
                self._finish(run, next(block for block in self.chosen if block.name == name))
        self._open.clear()

    def tapped(self) -> dict[str, fx.Graph]:
        """Return copies of the graphs with the taps of the chosen blocks alone."""
        made = {}
        for mode, graph in self.program.graphs.items():
            wanted = self._uses[mode]
            twin = made[mode] = opened(graph, wanted)
            taps.insert(twin, [(site, inputs) for site, inputs in self._blocks.taps(mode) if site in wanted])
        return made

    def attach(self) -> None:
        """Let the module's taps call this."""
        self.program.module().observe(self, self.tapped())

    def detach(self) -> None:
        """Take the taps out of the code that runs."""
        self.program.module().observe(None)

    @contextmanager
    def watching(self) -> Iterator[Collector]:
        """Watch for the time of a block."""
        self.attach()
        try:
            yield self
        finally:
            self.detach()


def _forget(leaf: Tensor) -> None:
    leaf.grad = None


def _batch_dims(program: Program) -> tuple[int, int] | None:
    """Return which flat input holds examples along which dim, as (position, dim)."""
    dims = program.example_dims() | dict.fromkeys(pinned_examples(program), 0)
    return next(((place, dims[name]) for place, name in enumerate(program.signature.input_names) if name in dims), None)
