"""Decompositions of every layer as a choice: what each is predicted to lose and to save."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from kfe_fx.curvature.store import Store
from kfe_fx.errors import InfeasibleBudget, UsageError
from kfe_fx.lowrank.axes import Axes
from kfe_fx.lowrank.finding import find_layers
from kfe_fx.lowrank.kfe import PRODUCT, Kfe
from kfe_fx.lowrank.layers import Layer
from kfe_fx.lowrank.losses import with_fisher_losses
from kfe_fx.lowrank.prices import Prices
from kfe_fx.lowrank.ranks import Ranks, floors
from kfe_fx.lowrank.surgery import replace_layers
from kfe_fx.program import Program


@dataclass(frozen=True)
class Candidate:
    """A form of one layer: ``c`` columns and ``r`` rows stay.

    ``loss``: predicted increase of the loss in nats; ``saved_ms``: predicted milliseconds that it saves; ``weights``
    and ``macs``: saved too.
    """

    layer: str
    c: int
    r: int
    loss: float
    saved_ms: float
    weights: int
    macs: int


def candidates(
    program: Program,
    store: Store,
    prices: Prices,
    *,
    layers: str = "*",
    statistics: str = PRODUCT,
    step: int | None = None,
    cap: float | None = None,
    last: bool = False,
    data: Any = None,
    loss: Any = None,
    source: str = "auto",
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, list[Candidate]]:
    """Return, by layer, the decompositions that no other one beats, by time saved ascending; the network stays.

    Args:
        program: the network.
        store: its curvature: factors, and S* for "moments" (``curvature.fit`` or ``lowrank.measure``).
        prices: ``Prices.of(program, device)``.
        layers: glob of layers.
        statistics: "product" or "moments", see ``Kfe``.
        step: ranks are multiples of it, or all; None for what the device likes.
        cap: the share of columns or of rows that may go, see ``floors``.
        last: also of layers that make the outputs.
        data: examples to measure losses on (``with_fisher_losses``), so that they can be compared with those of removed
            channels; None for half the importances, which are much smaller in trained networks.
        loss: of the examples, as ``source``, ``batch_size`` and ``seed``: see ``curvature.fit``.
        source: of labels.
        batch_size: examples at a time.
        seed: of labels that are drawn.

    Returns:
        Name of a layer -> candidates with less weights than it, each losing less than the next one and saving less
        time; layers without any, or that the store says too little about, are left out.

    Raises:
        UsageError: the store is of another network or older than the weights, or the glob matches nothing.
    """
    store.check(program, weights=True)
    axes: dict[str, Kfe] = {}
    for layer in find_layers(program).matching(layers).layers:
        if layer.last and not last:
            continue
        with suppress(UsageError):
            axes[layer.name] = Kfe.of(program, store, layer, statistics)
    if data is not None and axes:
        axes = with_fisher_losses(program, data, axes, loss=loss, source=source, batch_size=batch_size, seed=seed)
    fronts = {name: pareto(one, prices, step or prices.step, cap) for name, one in axes.items()}
    return {name: front for name, front in fronts.items() if front}


def pareto(axes: Axes, prices: Prices, step: int, cap: float | None = None) -> list[Candidate]:
    """Return the decompositions of one layer that save time and weights, and that no other one beats."""
    layer = axes.layer
    columns, rows = layer.columns, layer.rows
    least = floors(layer, cap)
    widths = [*_grid(columns, least[0], step), columns] if len(axes.column_scores) else [columns]
    heights = [*_grid(rows, least[1], step), rows]
    forms = product(widths, heights)
    if layer.pointwise:  # the rank is the smaller of the two: the other side stays whole
        forms = [*((c, rows) for c in widths), *((columns, r) for r in heights)]
    now_ms, now_weights, now_macs = (
        prices.ms(layer, columns, rows),
        layer.weights(columns, rows),
        layer.macs(columns, rows),
    )
    found = []
    for c, r in forms:
        weights = now_weights - layer.weights(c, r)
        saved = now_ms - prices.ms(layer, c, r) if weights > 0 else 0.0
        if saved > 0:
            found.append(Candidate(layer.name, c, r, axes.loss(c, r), saved, weights, now_macs - layer.macs(c, r)))
    front: list[Candidate] = []
    for one in sorted(found, key=lambda each: (each.loss, -each.saved_ms)):
        if not front or one.saved_ms > front[-1].saved_ms:
            front.append(one)
    return front


def _grid(full: int, least: int, step: int) -> Iterable[int]:
    return [size for size in range(step, full, step) if size >= least]


def choose(fronts: Mapping[str, Sequence[Candidate]], needed_ms: float, whole_ms: float) -> list[Candidate]:
    """Return at most one candidate a layer that together save ``needed_ms`` and lose the least: an integer program.

    Raises:
        InfeasibleBudget: they do not save as much, whatever is chosen.
    """
    if needed_ms <= 0:
        return []
    from scipy.optimize import Bounds, LinearConstraint, milp

    every = [one for front in fronts.values() for one in front]
    most = sum(front[-1].saved_ms for front in fronts.values() if front)
    if most < needed_ms:
        best = (whole_ms - most) / whole_ms
        raise InfeasibleBudget(
            f"decompositions alone reach time={best:.3f} as predicted, not {1 - needed_ms / whole_ms:.3f}; "
            "ask for less, or remove channels as well"
        )
    saved = np.array([one.saved_ms for one in every])
    loss = np.array([one.loss for one in every])
    names = list(fronts)
    owner = np.array([[one.layer == name for one in every] for name in names], dtype=float)
    found = milp(
        loss / max(loss.max(), np.finfo(float).tiny),
        constraints=[LinearConstraint(owner, ub=1), LinearConstraint(saved / needed_ms, lb=1)],
        integrality=np.ones(len(every)),
        bounds=Bounds(0, 1),
    )
    if found.x is None:
        raise InfeasibleBudget(f"no decompositions save {needed_ms:.4g} ms ({found.message}); ask for less")
    return [one for one, taken in zip(every, found.x, strict=True) if taken > 0.5]


def apply(program: Program, store: Store, ranks: Ranks, *, statistics: str = PRODUCT, whole: bool = False) -> Program:
    """Return the network with layers decomposed in their eigenbases.

    Args:
        program: the network; it stays as it was.
        store: its curvature, as for ``candidates``.
        ranks: name of a layer -> (c, r), how many columns and rows stay.
        statistics: as for ``candidates``: they decide which stay.
        whole: all operations also where nothing goes from a side.

    Raises:
        UsageError: the store is of another network or older than the weights, there is no such layer, or no such ranks.
    """
    store.check(program, weights=True)
    known = {layer.name: layer for layer in find_layers(program).layers}
    axes: dict[str, Axes] = {}
    for name, (c, r) in ranks.items():
        layer = checked(known, name, c, r)
        axes[name] = Kfe.of(program, store, layer, statistics)
    return applied(program, axes, ranks, whole=whole)


def applied(program: Program, axes: Mapping[str, Axes], ranks: Ranks, *, whole: bool = False) -> Program:
    """Return the network with the layers of ``axes`` replaced by what ``ranks`` keep of them."""
    changes = {
        name: (axes[name].layer, axes[name].factors(program, c, r, whole=whole)) for name, (c, r) in ranks.items()
    }
    return replace_layers(program, changes)


def checked(known: Mapping[str, Layer], name: str, c: int, r: int) -> Layer:
    """Return a layer by name.

    Raises:
        UsageError: there is none, or it has not as many columns and rows.
    """
    layer = known.get(name)
    if layer is None:
        raise UsageError(
            f"this network has no layer {name!r} to decompose; its layers are: {', '.join(known) or 'none'}"
        )
    if not (1 <= c <= layer.columns and 1 <= r <= layer.rows):
        most = f"{layer.columns} columns and {layer.rows} rows"
        raise UsageError(f"{name} has {most}: {c} and {r} cannot stay")
    return layer
