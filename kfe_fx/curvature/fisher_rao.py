"""The Fisher-Rao norm of a network's parameters (Liang, Poggio, Rakhlin, Stokes 2017): capacity as the loss sees it.

    ||theta||_fr^2 = theta^T F theta = E_n <theta, grad l_n>^2

Exactly it is taken per example without a gradient being formed: <dW_n, W> = sum_r left_r^T W right_r, summed over all
blocks of an example before the square. A store gives it block by block: without what the blocks have in common.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfe_fx.curvature.blocks import Blocks, LeftOut, find_blocks
from kfe_fx.curvature.collector import Collector
from kfe_fx.curvature.distributed import Group
from kfe_fx.curvature.fit import SOURCES, Fitter
from kfe_fx.curvature.observation import Observation
from kfe_fx.curvature.operators import EKFAC
from kfe_fx.curvature.pairs import OneHot, Pairs
from kfe_fx.curvature.store import Store
from kfe_fx.errors import BadData, UsageError
from kfe_fx.program import Program
from kfe_fx.training.batches import Batch, Batches
from kfe_fx.training.likelihood import Likelihood


@dataclass(frozen=True)
class FisherRao:
    """A Fisher-Rao norm: ``squared`` is ||theta||_fr^2 over ``examples`` with gradients from ``source``.

    ``missing`` names the parameters that it leaves out, and why; ``skipped`` counts examples whose gradients were not
    finite.
    """

    squared: float
    examples: int
    source: str
    missing: tuple[LeftOut, ...] = ()
    skipped: int = 0

    @property
    def norm(self) -> float:
        """The norm ||theta||_fr itself."""
        return self.squared**0.5


def fisher_rao_norm(
    program: Program,
    data: Any,
    loss: Any = None,
    *,
    source: str = "auto",
    samples: int = 1,
    batch_size: int = 64,
    seed: int = 0,
    blocks: Blocks | None = None,
) -> FisherRao:
    """Measure ``||theta||_fr^2 = E_n <theta, grad l_n>^2`` exactly, in evaluation mode.

    For a bias-free net of L + 1 matrices and ReLUs this is (L + 1)² E <dl/df, f>².

    Args:
        program: the network; nothing of it is changed.
        data: examples in any form that ``Batches`` takes; with targets for the source "empirical".
        loss: see ``resolve_loss``; what is differentiated is each example's own loss.
        source: "empirical", "sampled", "exact" or "auto", as for ``fit``.
        samples: how many times "sampled" draws.
        batch_size: examples at a time.
        seed: of what is drawn.
        blocks: those of ``find_blocks`` where they are known already.

    Returns:
        The norm.

    Raises:
        UsageError: an argument has a value that means nothing, or the loss mixes the examples of a batch.
        BadData: there is nothing to measure on, or no gradient was finite.

    Example:
        found = fisher_rao_norm(program, (inputs, targets), source="exact")
        found.norm, found.missing
    """
    if source not in (*SOURCES, "auto"):
        raise UsageError(f"there is no source {source!r}; choose {', '.join(SOURCES)} or auto")
    if samples < 1:
        raise UsageError("the source 'sampled' draws at least once")
    found = find_blocks(program) if blocks is None else blocks
    if not found.blocks:
        raise BadData("this network has no parameters that statistics exist for")
    batches = Batches(program, data, batch_size)
    return _Products(program, found, batches, loss, source, samples, seed, None).measure(program)


def fisher_rao_of(store: Store, program: Program, kind: str = EKFAC) -> FisherRao:
    """Take ``theta^T F theta`` with the F of a store, block by block.

    With "diagonal" this is sum_k F_kk theta_k², twice the sum of the Fisher-pruning scores, and not ||theta||_fr².

    Args:
        store: statistics of the network at its present weights.
        program: the network.
        kind: "diagonal", "kfac" or "ekfac".

    Returns:
        The norm.

    Raises:
        UsageError: the statistics are of another network, older than the weights, or hold nothing of this kind.

    Example:
        store = fit(program, data, statistics=("diagonal", "ekfac"))
        fisher_rao_of(store, program, "ekfac").norm
    """
    store.check(program, weights=True)
    curvature = store.operator(program, kind)
    with torch.no_grad():
        squared = float(curvature.quadratic(dict(program.module().named_parameters())))
    return FisherRao(
        squared, int(store.facts.get("examples", 0)), str(store.facts.get("source", "")), curvature.missing
    )


class _Products(Fitter):
    """Passes over the data that sum <theta, grad l_n> over all blocks of each example."""

    def measure(self, program: Program) -> FisherRao:
        """Go through the data once."""
        held = {name: value.detach() for name, value in program.module().named_parameters()}
        self.theta = {block.name: block.matrix(held) for block in self.blocks.blocks}
        batched = all(block.batched.get("eval", True) for block in self.blocks.blocks)
        collector = Collector(self.view, self.blocks, self.blocks.blocks, self._add)
        self.sums = [0.0, 0.0, 0.0]  # of squares, examples, examples left out
        group = Group.current()
        for _ in self.watched(collector, split=not batched):
            pass
        squares, examples, skipped = (group.sum_number(value) for value in self.sums)
        if not examples:
            raise BadData("no gradient was finite, so nothing was measured; check the data and the loss")
        told = next(filter(None, group.gather(self.facts.get("source"))), self.source)
        return FisherRao(squares / examples, int(examples), told, self.blocks.left_out, int(skipped))

    def _examples(self, outputs: Any, batch: Batch, likelihood: Likelihood, collector: Collector) -> None:
        before = sum(collector.nonfinite.values())
        self.products, self.squares = torch.zeros(batch.count, dtype=torch.float64), 0.0
        super()._examples(outputs, batch, likelihood, collector)
        if sum(collector.nonfinite.values()) > before:
            self.sums[2] += batch.count
        else:
            self.sums[0] += self.squares
            self.sums[1] += batch.count

    def _backward(self, values: Tensor, column: Tensor | None, collector: Collector, *, last: bool) -> None:
        self.products.zero_()
        super()._backward(values, column, collector, last=last)
        self.squares += float(self.products.square().sum())

    def _add(self, observation: Observation) -> None:
        start = 0
        for pairs in observation.chunks():
            found = _inner(pairs, self.theta[observation.block.name])
            self.products[start : start + len(found)] += found.to(self.products)
            start += len(found)


def _inner(pairs: Pairs, weight: Tensor) -> Tensor:
    """Return <dW_n, W> of each example, [n]; ``weight`` is [K, o, i]."""
    left, right = pairs.left, pairs.right
    if isinstance(right, OneHot):
        left, right, weight = right, left, weight.transpose(1, 2)
    assert isinstance(right, Tensor)
    if isinstance(left, OneHot):
        valid = (left.index >= 0).unsqueeze(-1)
        through = (weight[0][left.index.clamp_min(0)] * valid).unsqueeze(0)  # [1, n, R, i]
    else:
        through = torch.einsum("knro,koi->knri", left, weight)
    return (through * right).sum((0, 2, 3))
