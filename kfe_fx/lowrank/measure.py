"""Measure what decompositions of chosen layers need, and nothing more: no eigenbases of whole patches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from kfe_fx.curvature.blocks import find_blocks
from kfe_fx.curvature.distributed import known_facts, sum_store
from kfe_fx.curvature.fit import Fitter
from kfe_fx.curvature.statistics import EXPAND, Factors, Moments
from kfe_fx.curvature.store import Store
from kfe_fx.errors import UsageError
from kfe_fx.lowrank.kfe import MOMENTS, PRODUCT, STATISTICS, moment_basis
from kfe_fx.lowrank.layers import Layer
from kfe_fx.program import Program
from kfe_fx.training.batches import Batches


def measure(
    program: Program,
    data: Any,
    layers: Iterable[Layer],
    statistics: str = PRODUCT,
    *,
    loss: Any = None,
    source: str = "auto",
    batch_size: int = 64,
    seed: int = 0,
) -> Store:
    """Measure the Kronecker factors of layers in evaluation mode, and for "moments" S* in their channels' eigenbases.

    ``S*_jkt = E_n[ (U_G^T dW_n,t U_A)_jk^2 ]`` with U_A of the C x C factor of the channels (``channel_factor``): the
    exact second moments for ``Kfe``, one more pass over the data. The arguments are those of ``curvature.fit``.

    Returns:
        A store with the blocks of these layers, which ``Kfe.of`` reads as well as one of ``curvature.fit``.

    Raises:
        UsageError: an argument has a value that means nothing.
        BadData: there is nothing to measure on.
    """
    if statistics not in STATISTICS:
        raise UsageError(f"there are the statistics {' and '.join(STATISTICS)}, not {statistics!r}")
    wanted = {layer.measured.weight: layer.measured for layer in layers}
    wanted |= {layer.core.weight: layer.core for layer in layers}
    names = {tied: op for weight, op in wanted.items() for tied in program.names_of(weight)}
    found = find_blocks(program)
    blocks = tuple(block for block in found.blocks if block.name in names and block.kind == "kronecker")
    chosen = replace(found, blocks=blocks)
    fitter = Fitter(program, chosen, Batches(program, data, batch_size), loss, source, 1, seed, None)
    store = Store.of(program, chosen, sharing=EXPAND)
    if not blocks:  # a pass over the data would see no example
        return store
    passes = 1 + (statistics == MOMENTS)
    factors = Factors(EXPAND)
    fitter.run([factors], 0, passes)
    store.add_factors(factors)
    sum_store(store)
    if statistics == MOMENTS:
        for block in blocks:
            held = store.blocks[block.name]
            if held.A is not None and held.A.dim() == 3 and held.G is not None and held.G.dim() == 3:
                held.basis = moment_basis(block, held, names[block.name])
        moments = Moments(store.bases())
        fitter.run([moments], 1, passes)
        store.add_moments(moments)
        sum_store(store, moments=True)
    store.describe(known_facts(fitter.facts))
    return store
