"""Measure the statistics of a network on data: the one entry to everything that hangs on curvature."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kfe_fx.curvature.blocks import Blocks, find_blocks
from kfe_fx.curvature.collector import Collector
from kfe_fx.curvature.distributed import Group, known_facts, sum_store
from kfe_fx.curvature.observation import Observation
from kfe_fx.curvature.statistics import EXPAND, SHARINGS, Factors, Moments, Running, Statistic
from kfe_fx.curvature.store import Store
from kfe_fx.errors import BadData, UsageError
from kfe_fx.program import Program, ProgramModule, copy_graph, named_tensors, put_tensor
from kfe_fx.structure import pack
from kfe_fx.training.batches import Batch, Batches, pinned_batch
from kfe_fx.training.likelihood import Likelihood
from kfe_fx.training.losses import Loss, Settling, counted, cut, resolve_loss
from kfe_fx.weights import check_weights

SOURCES = ("empirical", "sampled", "exact")
STATISTICS = ("diagonal", "kfac", "ekfac", "ekfac-ra")
Progress = Callable[[str, float | None], None]
EXACT_OUTPUTS = 20


def fit(
    program: Program,
    data: Any,
    loss: Any = None,
    *,
    statistics: Iterable[str] | str = "ekfac",
    source: str = "auto",
    samples: int = 1,
    sharing: str = EXPAND,
    batch_size: int = 64,
    seed: int = 0,
    bases: Store | None = None,
    blocks: Blocks | None = None,
    progress: Progress | None = None,
) -> Store:
    """Measure second-moment statistics of the gradients of each example, in evaluation mode (the profile "score").

    ``F = E_n[vec(dW_n) vec(dW_n)^T]`` is approximated per block; see ``Store`` for what is kept of it.

    Args:
        program: the network; nothing of it is changed.
        data: examples in any form that ``Batches`` takes; with targets for the source "empirical".
        loss: see ``resolve_loss``. What is differentiated is each example's own loss: with a mean over N examples
            gradients are multiplied by N.
        statistics: any of "diagonal" (second moments of the parameters' gradients), "kfac" (factors and eigenbases),
            "ekfac" (those and S*) and "ekfac-ra" (those and the running-average variant, see ``Running``).
        source: "empirical" (labels of the data), "sampled" (labels drawn from the network), "exact" (the whole
            distribution of labels, one backward pass per output: type-II, the generalised Gauss-Newton matrix), or
            "auto": exact for up to 20 outputs, else sampled.
        samples: how many times "sampled" draws.
        sharing: how K-FAC counts positions that share weights: "expand" or "reduce" (``FactorSums``); or "rnn1" or
            "rnn2", which for recurrent layers model how the steps of a sequence are correlated
            (``kfe_fx.curvature.temporal``) and are "expand" for the rest.
        batch_size: examples at a time.
        seed: of what is drawn.
        bases: a store of the same network and weights in whose eigenbases "ekfac" measures S*, instead of in new ones,
            so that the S* of shards of the data add to it (``Store.merge``).
        blocks: those of ``find_blocks`` where they are known already.
        progress: called with ("curvature", share done).

    Returns:
        The store.

    Raises:
        UsageError: an argument has a value that means nothing, or the loss mixes the examples of a batch.
        BadData: there is nothing to measure on, or no gradient was finite.
    """
    wanted = {statistics} if isinstance(statistics, str) else set(statistics)
    if not wanted or not wanted <= set(STATISTICS):
        raise UsageError(
            f"there are the statistics {', '.join(STATISTICS)}, not {', '.join(sorted(wanted - set(STATISTICS)))}"
        )
    if source not in (*SOURCES, "auto"):
        raise UsageError(f"there is no source {source!r}; choose {', '.join(SOURCES)} or auto")
    if sharing not in SHARINGS:
        raise UsageError(f"there is no sharing {sharing!r}; choose {', '.join(SHARINGS)}")
    if samples < 1:
        raise UsageError("the source 'sampled' draws at least once")
    if bases is not None:
        if "kfac" in wanted or "ekfac" not in wanted:
            raise UsageError("bases are what 'ekfac' is measured in; leave them out, or take the statistics 'ekfac'")
        bases.check(program, weights=True)
    check_weights(program)
    found = find_blocks(program) if blocks is None else blocks
    if not found.blocks:
        raise BadData("this network has no parameters that statistics exist for")
    fitter = Fitter(program, found, Batches(program, data, batch_size), loss, source, samples, seed, progress)
    factors, diagonal = Factors(sharing), Moments()
    store = Store.of(program, found, sharing=sharing)
    first: list[Statistic] = []
    second = wanted & {"ekfac", "ekfac-ra"}
    factored = bool(second or "kfac" in wanted) and bases is None
    if factored:
        first.append(factors)
    if "diagonal" in wanted:
        first.append(diagonal)
    passes = bool(first) + bool(second)
    if first:
        fitter.run(first, 0, passes)
        store.add_factors(factors)
        store.add_diagonal(diagonal)
        sum_store(store)
    if factored:
        store.decompose(Group.current())
    if bases is not None:
        store.share_bases(bases)
    if second:
        moments, running = Moments(store.bases()), Running(store.bases())
        sinks: list[Statistic] = [moments] if "ekfac" in wanted else []
        fitter.run([*sinks, running] if "ekfac-ra" in wanted else sinks, passes - 1, passes)
        store.add_moments(moments)
        store.add_running(running)
        sum_store(store, moments=True)
    store.describe(known_facts(fitter.facts))
    if not any(block.examples for block in store.blocks.values()):
        raise BadData("no gradient was finite, so nothing was measured; check the data and the loss")
    return store


class Fitter:
    """Passes over the data with taps on a detached view of the network."""

    def __init__(
        self,
        program: Program,
        blocks: Blocks,
        batches: Batches,
        loss: Any,
        source: str,
        samples: int,
        seed: int,
        progress: Progress | None,
    ) -> None:
        self.batches = batches
        targets = batches.targets()
        self.loss: Loss | None = counted(resolve_loss(loss, targets), batches.labels())
        self.source, self.samples, self.seed = source, samples, seed
        if source == "empirical" and targets is None:
            raise BadData("the source 'empirical' needs targets, and the data has none; use sampled or exact")
        self.blocks = blocks
        self.view, self._plain = _detached(program), _detached(program)  # one is watched
        self.progress = progress
        self.facts: dict[str, Any] = {"profile": "score", "seed": seed, "nonfinite": {}}
        self.sinks: list[Statistic] = []
        self.first = True

    def run(self, sinks: list[Statistic], number: int, passes: int) -> None:
        """Go through the data once and add to ``sinks``; the same labels are drawn each time."""
        self.sinks = sinks
        mixed = [block for block in self.blocks.blocks if not block.batched.get("eval", True)]
        whole = [block for block in self.blocks.blocks if block not in mixed]
        count = len(self.batches)
        examples = 0
        group = Group.current()
        for chosen, split in ((whole, False), (mixed, True)):
            if not chosen:
                continue
            collector = Collector(self.view, self.blocks, chosen, self._sink)
            for index, seen in self.watched(collector, split=split):
                examples += seen if chosen is whole or not whole else 0
                if self.progress is not None and count:
                    self.progress("curvature", (number + (index + 1) / count) / passes)
            self.facts["nonfinite"] |= collector.nonfinite  # the same in every pass
        self.sinks = []  # the sums are the caller's
        self.facts["examples"] = examples
        if not group.sum_number(examples):
            raise BadData("the data yields no batches to measure on; give at least one example")

    def watched(self, collector: Collector, *, split: bool) -> Iterator[tuple[int, int]]:
        """Pass this rank's batches by a collector; yield the number of each and how many examples it had.

        With ``split`` each example is taken on its own.
        """
        likelihood = Likelihood(self.loss, self.seed)
        collector.forced = True
        # a network that pins its batch cannot take one example: the loss of each is taken out of the whole batch
        collector.alone = split and pinned_batch(self.view) is not None
        apart = split and not collector.alone
        group, settling = Group.current(), Settling(self._plain, self.loss)
        with collector.watching():
            for index, batch in enumerate(self.batches):
                self.loss = settling.see(batch)
                if index % group.size != group.rank:
                    continue
                likelihood.generator.manual_seed(self.seed * 1_000_003 + index)  # the same labels in every pass
                if apart:
                    self._hold(batch, likelihood)
                for piece in [batch.rows(i, i + 1) for i in range(batch.count)] if apart else [batch]:
                    self._batch(piece, likelihood, collector)
                yield index, batch.count

    def _hold(self, batch: Batch, likelihood: Likelihood) -> None:
        module = self._plain.module()
        likelihood.hold(lambda: pack(module.signature.outputs["eval"], module.run_flat(batch.inputs, "eval")), batch)

    def _batch(self, batch: Batch, likelihood: Likelihood, collector: Collector) -> None:
        module = self.view.module()
        with torch.enable_grad():
            outputs = pack(module.signature.outputs["eval"], module.run_flat(batch.inputs, "eval"))
            if collector.alone:
                count = batch.count
                likelihood.hold(lambda: outputs, batch)
                for i in range(count):
                    self._examples(cut(outputs, count, i, i + 1), batch.rows(i, i + 1), likelihood, collector)
            else:
                self._examples(outputs, batch, likelihood, collector)

    def _examples(self, outputs: Any, batch: Batch, likelihood: Likelihood, collector: Collector) -> None:
        source = self._source(outputs, likelihood, batch)
        totals = list(self._totals(source, outputs, likelihood, batch)) if source != "exact" else []
        self.first = True
        if source == "exact":
            drawn = likelihood.drawn_for(outputs, batch)
            if len(drawn) > 1:  # a column is of one output: what depends on the inputs alone is counted of all at once
                self._backward(0.0 * torch.stack([value.sum() for value in drawn]).sum(), None, collector, last=False)
            for values, column in likelihood.columns(outputs, batch):
                self._backward(values, column, collector, last=False)
            return
        for number, total in enumerate(totals):
            self._backward(total, None, collector, last=number == len(totals) - 1 and not collector.alone)

    def _backward(self, values: Tensor, column: Tensor | None, collector: Collector, *, last: bool) -> None:
        if values.requires_grad:
            torch.autograd.backward([values], None if column is None else [column], retain_graph=not last)
        collector.flush()
        for sink in self.sinks:
            sink.end(self.first)
        self.first = False

    def _totals(self, source: str, outputs: Any, likelihood: Likelihood, batch: Batch) -> Iterator[Tensor]:
        if source == "sampled":
            for _ in range(self.samples):
                yield likelihood.total(outputs, batch) / self.samples**0.5  # m samples count 1/m each
            return
        if batch.targets is None or self.loss is None:
            raise BadData("the source 'empirical' needs targets and a loss of them; use sampled or exact")
        if "loss" not in self.facts:
            self.facts |= {"loss": self.loss.name, "reduction": self.loss.reduction}
        yield self.loss.total(outputs, batch.targets, batch.count)

    def _source(self, outputs: Any, likelihood: Likelihood, batch: Batch) -> str:
        if self.source == "auto":
            self.source = self._automatic(outputs, batch)
        self.facts["source"] = self.source
        if self.source != "empirical":
            self.facts |= {"loss": "none" if self.loss is None else self.loss.name, "family": likelihood.family}
        return self.source

    def _automatic(self, outputs: Any, batch: Batch) -> str:
        try:
            size = Likelihood(self.loss, 0).size(outputs, batch)
        except BadData:
            return "empirical"
        return "exact" if size <= EXACT_OUTPUTS else "sampled"

    def _sink(self, observation: Observation) -> None:
        wanted = [sink for sink in self.sinks if sink.takes(observation.block)]
        for pairs in observation.chunks() if wanted else ():
            for sink in wanted:
                sink.add(observation.block, pairs, self.first)


def _detached(program: Program) -> Program:
    """Return a view of a Program whose parameters ask for no gradients: taps alone do, so no weight's is formed."""
    held = program.module()
    module = ProgramModule({"eval": copy_graph(held.graphs["eval"])}, held.signature)
    made: dict[int, Tensor] = {}
    for name, value in named_tensors(held).items():
        if id(value) not in made:
            plain = value.detach()
            made[id(value)] = nn.Parameter(plain, requires_grad=False) if isinstance(value, nn.Parameter) else value
        put_tensor(module, name, made[id(value)])
    module.eval()
    return Program(module, program.example_inputs, program.axes)
