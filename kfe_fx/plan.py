"""Plan: which slices go, as data that can be read, kept in a file and applied again."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kfe_fx.errors import BadFile, PlanError
from kfe_fx.labels.states import resizable
from kfe_fx.program import tied_names

if TYPE_CHECKING:
    from kfe_fx.labels.analysis import Analysis

VERSION = 1
_LARGEST = 1 << 30
_LITERAL = re.compile(r"lifted_tensor_\d+(_train)?")  # what torch.export calls a tensor written in forward
ACTIONS = ("remove",)  # later versions add decompose; an unknown action is refused, never skipped


@dataclass(frozen=True)
class Plan:
    """What a pruning run decided.

    ``kept[name] = [(dim, [indices kept]), ...]`` for every parameter, buffer and constant that changes, changed dims
    only, each name of tied parameters; the indices are those of the network without the branches ``dropped``, whose
    tensors are gone. ``actions`` say the same unit by unit, with the reason; ``heads`` is how the
    analysis took attention apart; ``decomposed`` says how many columns and rows of a layer's eigenbasis stay, before
    anything else (indices are then those of the network with these layers); ``resize_state`` whether states that are
    inputs or outputs may lose units.
    """

    kept: dict[str, list[tuple[int, list[int]]]] = field(default_factory=dict)
    actions: tuple[dict[str, Any], ...] = ()
    heads: str = "auto"
    resize_state: bool = False
    dropped: tuple[str, ...] = ()
    decomposed: dict[str, list[int]] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_units(cls, analysis: Analysis, removed: Iterable[int], scores: Any = None, heads: str = "auto") -> Plan:
        """Make the plan that removes the given units of an analysis."""
        gone = sorted(set(removed))
        aliases = tied_names(analysis.program.module())
        kept: dict[str, list[tuple[int, list[int]]]] = {}
        for name in analysis.params:
            if is_literal(name):
                continue  # it follows the units, but has no name that anyone knows
            changed = [
                (dim, [int(i) for i in indices])
                for dim, indices in enumerate(analysis.kept(name, set(gone)))
                if indices is not None
            ]
            if changed:
                for alias in aliases.get(name, (name,)):
                    kept[alias] = changed
        actions = tuple(
            {
                "action": "remove",
                "unit": unit,
                "group": analysis.groups[analysis.units[unit].group].name,
                **({} if scores is None else {"score": float(scores[unit])}),
            }
            for unit in gone
        )
        return cls(kept, actions, heads, resizable(analysis.program))

    def units(self, analysis: Analysis) -> frozenset[int]:
        """Find the units of ``analysis`` that this plan removes.

        Raises:
            PlanError: the plan cuts slices that are not whole units of this network.
        """
        removed: set[int] = set()
        aliases = tied_names(analysis.program.module())
        for name, changes in self.kept.items():
            canonical = aliases.get(name, (name,))[0]
            if canonical not in analysis.params:
                raise PlanError(f"the plan cuts {name!r}, which this network does not have or does not use")
            for dim, indices in changes:
                removed |= _gone(analysis, canonical, dim, indices)
        expected = Plan.of_units(analysis, removed).kept
        if {name: sorted(changes) for name, changes in expected.items()} != {
            name: sorted((dim, list(map(int, indices))) for dim, indices in changes)
            for name, changes in self.kept.items()
        }:
            wrong = sorted(set(expected) ^ set(self.kept)) or sorted(n for n in expected if expected[n] != self.kept[n])
            raise PlanError(f"the plan does not remove whole units of this network (first at {wrong[0]!r})")
        if any(floor <= removed for floor in analysis.floors):
            raise PlanError("the plan leaves nothing of a dim of this network; at least one index of each must stay")
        return frozenset(removed)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON-ready data."""
        return {
            "version": VERSION,
            "heads": self.heads,
            **({"resize_state": True} if self.resize_state else {}),
            **({"dropped": list(self.dropped)} if self.dropped else {}),
            **({"decomposed": self.decomposed} if self.decomposed else {}),
            "kept": {name: [[dim, indices] for dim, indices in changes] for name, changes in self.kept.items()},
            "actions": list(self.actions),
            "metadata": self.metadata,
        }

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        """Read a plan from JSON data or text.

        Raises:
            PlanError: not a plan, or one of a newer version.
        """
        try:
            data = json.loads(data) if isinstance(data, str | bytes) else data
            if data["version"] != VERSION:
                raise PlanError(f"this plan has version {data['version']!r}, this kfe-fx reads version {VERSION}")
            unknown = {action["action"] for action in data["actions"]} - set(ACTIONS)
            if unknown:
                raise PlanError(f"this plan uses the action {sorted(unknown)[0]!r}, which this kfe-fx does not know")
            kept = {
                str(name): [(int(dim), [int(i) for i in indices]) for dim, indices in changes]
                for name, changes in data["kept"].items()
            }
            dropped = data.get("dropped", [])
            if not isinstance(dropped, list) or not all(isinstance(name, str) for name in dropped):
                raise PlanError("this is not a plan: dropped is a list of names of branches")
            return cls(
                kept, tuple(data["actions"]), str(data.get("heads", "auto")), data.get("resize_state", False) is True,
                tuple(dropped), _ranks(data.get("decomposed", {})), dict(data.get("metadata", {})),
            )  # fmt: skip
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise PlanError(f"this is not a plan: {type(error).__name__} {error}") from None


def read_plan(path: str | os.PathLike[str], budget: str = "") -> Plan:
    """Read the plan in a file of ``prune`` or, of a file of ``pareto``, that of the point with this budget.

    ``budget`` is spelled as ``str(limit)`` does: "latency=0.5".

    Raises:
        BadFile: there is no such file, or it is no JSON.
        PlanError: there is no plan in it, or no point with this budget.
    """
    place = Path(path)
    try:
        if not place.is_file() or place.stat().st_size > _LARGEST:
            raise BadFile(f"{place}: no file that prune or pareto wrote; name a .pruned.json or .pareto.json")
        document = json.loads(place.read_bytes())
    except OSError as error:
        raise BadFile(f"{place}: cannot be read ({error.strerror}); give a file that prune or pareto wrote") from None
    except (ValueError, RecursionError):
        raise BadFile(f"{place}: not JSON; give a file that prune or pareto wrote") from None
    if not isinstance(document, dict):
        raise PlanError(f"{place}: no plan is in it")
    points = document.get("points")
    if isinstance(points, list):
        by_budget = {str(point.get("asked")): point for point in points if isinstance(point, dict)}
        if budget not in by_budget:
            raise PlanError(f"{place}: no point with the budget {budget}; it has {', '.join(by_budget) or 'none'}")
        document = by_budget[budget]
    return Plan.from_json(document.get("plan", document))


def _ranks(data: Any) -> dict[str, list[int]]:
    ranks = {str(name): [int(columns), int(rows)] for name, (columns, rows) in data.items()}
    if any(least < 1 for pair in ranks.values() for least in pair):
        raise PlanError("this is not a plan: a decomposed layer keeps at least one column and one row")
    return ranks


def is_literal(name: str) -> bool:
    """Tell whether a tensor is a literal of the source's code rather than a parameter or buffer of a module."""
    return _LITERAL.fullmatch(name) is not None


def _gone(analysis: Analysis, name: str, dim: int, indices: list[int]) -> set[int]:
    layers = analysis.params[name][dim] if 0 <= dim < len(analysis.params[name]) else ()
    size = analysis.program.tensor(name).shape[dim] if len(layers) else 0
    if not len(layers) or not all(0 <= index < size for index in indices):
        raise PlanError(f"the plan cuts dim {dim} of {name!r}, which cannot be cut so in this network")
    away = np.setdiff1d(np.arange(size), np.asarray(indices, dtype=np.int64))
    if len(layers) == 1:
        return set(layers[0][away].tolist()) - {-1}
    # two ways to remove an index: a unit goes when all of its indices go
    found: set[int] = set()
    for layer in layers:
        for unit in np.unique(layer[layer >= 0]).tolist():
            if np.isin(np.flatnonzero(layer == unit), away).all():
                found.add(unit)
    return found
