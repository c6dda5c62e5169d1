"""Plans: what they say, that a file gives them back, and that a wrong one is refused in one line."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfe_fx.errors import PlanError
from kfe_fx.frontend.capture import capture
from kfe_fx.labels.analysis import Analysis, analyze
from kfe_fx.passes.shrink import Shrink
from kfe_fx.plan import VERSION, Plan


class Net(nn.Module):
    """A stem, one matrix under two names, a buffer along the channels, and a head."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.two.weight = self.one.weight
        self.head = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        self.register_buffer("scale", torch.arange(1.0, 5.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(torch.relu(self.one(self.stem(x)))) * self.scale)


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    torch.manual_seed(0)
    return analyze(capture(Net().eval(), torch.randn(2, 3)))


STREAM = {
    "stem.weight": [(0, [0, 2, 3])],
    "stem.bias": [(0, [0, 2, 3])],
    "one.weight": [(0, [0, 2, 3]), (1, [0, 2, 3])],
    "two.weight": [(0, [0, 2, 3]), (1, [0, 2, 3])],
    "scale": [(0, [0, 2, 3])],
    "head.0.weight": [(1, [0, 2, 3])],
}
HIDDEN = {
    "head.0.weight": [(0, [1, 2, 3, 4])],
    "head.0.bias": [(0, [1, 2, 3, 4])],
    "head.2.weight": [(1, [1, 2, 3, 4])],
}


def units_of(analysis: Analysis, name: str, *indices: int) -> set[int]:
    """Find the units at some indices of dim 0 of a parameter."""
    return {unit.id for unit in analysis.units for index in indices if index in unit.slices.get(name, {}).get(0, ())}


def test_kept_names_changed_dims_buffers_and_each_name_of_tied_parameters(analysis: Analysis) -> None:
    assert Plan.of_units(analysis, units_of(analysis, "stem.weight", 1)).kept == STREAM
    assert Plan.of_units(analysis, units_of(analysis, "head.0.weight", 0, 5)).kept == HIDDEN


def test_nothing_removed_is_an_empty_plan(analysis: Analysis) -> None:
    plan = Plan.of_units(analysis, [])
    assert (plan.kept, plan.actions) == ({}, ())
    assert plan.units(analysis) == frozenset()


def test_actions_say_unit_group_and_score(analysis: Analysis) -> None:
    removed = units_of(analysis, "head.0.weight", 0, 5)
    scores = [float(unit) / 2 for unit in range(len(analysis.units))]
    plan = Plan.of_units(analysis, removed, scores)
    assert plan.actions == tuple(
        {"action": "remove", "unit": unit, "group": "head.0", "score": unit / 2} for unit in sorted(removed)
    )


def test_a_plan_finds_its_units_again(analysis: Analysis) -> None:
    removed = units_of(analysis, "head.0.weight", 0, 5) | units_of(analysis, "stem.weight", 1)
    assert Plan.of_units(analysis, removed).units(analysis) == removed


def test_json_text_gives_the_same_plan(analysis: Analysis) -> None:
    plan = Plan.of_units(analysis, units_of(analysis, "stem.weight", 1), [0.5] * len(analysis.units), "positions")
    assert Plan.from_json(json.dumps(plan.to_json())) == plan
    assert Plan.from_json(json.dumps(plan.to_json()).encode()) == plan
    assert Plan.from_json(plan.to_json()) == plan


def one_line(raised: pytest.ExceptionInfo[PlanError]) -> str:
    text = str(raised.value)
    assert text
    assert "\n" not in text
    assert raised.value.exit_code == 2
    return text


GOOD: dict[str, Any] = {"version": VERSION, "heads": "auto", "kept": {}, "actions": [], "metadata": {}}


@pytest.mark.parametrize(
    "data",
    [
        "", "{", "null", "[]", "3", b"\xff\xfe", "{}",
        {**GOOD, "kept": []},
        {**GOOD, "kept": {"a": [[0]]}},
        {**GOOD, "kept": {"a": [["x", [1]]]}},
        {**GOOD, "kept": {"a": [[0, ["b"]]]}},
        {**GOOD, "kept": {"a": [[0, None]]}},
        '{"version": 1, "actions": [], "kept": {"a": [[Infinity, [0]]]}}',
        "[" * 100_000,
        {**GOOD, "actions": None},
        {**GOOD, "actions": [{}]},
        {**GOOD, "actions": ["remove"]},
        {**GOOD, "actions": [{"action": []}]},
        {**GOOD, "metadata": 3},
        {name: value for name, value in GOOD.items() if name != "kept"},
    ],
)  # fmt: skip
def test_what_is_no_plan_is_refused_in_one_line(data: Any) -> None:
    with pytest.raises(PlanError) as raised:
        Plan.from_json(data)
    assert "this is not a plan" in one_line(raised)


@pytest.mark.parametrize("version", [VERSION + 1, 0, None, str(VERSION)])
def test_another_version_is_refused(version: Any) -> None:
    with pytest.raises(PlanError, match=f"reads version {VERSION}") as raised:
        Plan.from_json({**GOOD, "version": version})
    assert repr(version) in one_line(raised)


def test_an_unknown_action_is_refused_not_skipped() -> None:
    with pytest.raises(PlanError, match="'decompose'") as raised:
        Plan.from_json({**GOOD, "actions": [{"action": "remove"}, {"action": "decompose"}]})
    one_line(raised)


def changed(**kept: Any) -> Plan:
    named = {name.replace("__", "."): value for name, value in kept.items()}
    return Plan({**HIDDEN, **named})


@pytest.mark.parametrize(
    ("plan", "names"),
    [
        (Plan({**HIDDEN, "head.7.weight": [(0, [0])]}), "head.7.weight"),  # no such parameter
        (Plan({"head.0.bias": [(0, [1, 2, 3, 4])]}), "head."),  # a slice of a unit, without the rest
        (changed(head__0__bias=[(0, [0, 1, 2, 3])]), "head."),  # other indices in one place
        (Plan({"head.2.weight": [(0, [0])]}), "head.2.weight"),  # an output of the network
        (Plan({"stem.weight": [(1, [0])]}), "stem.weight"),  # an input of the network
        (Plan({"head.0.weight": [(2, [0])]}), "head.0.weight"),  # no such dim
        (Plan({"head.0.weight": [(-1, [0])]}), "head.0.weight"),  # a dim counted from the end
        (Plan({"head.0.weight": [(0, [1, 2, 9])]}), "head.0.weight"),  # an index that does not exist
        (Plan({"head.0.weight": [(0, [10**30])]}), "head.0.weight"),  # an index that no integer type holds
        (Plan({"head.0.weight": [(0, [-1, 1, 2])]}), "head.0.weight"),  # an index from the end
        (Plan({"head.0.weight": [(0, [1, 1, 2, 3])]}), "head."),  # an index twice
        (Plan({"head.0.weight": [(0, [2, 1, 3, 4])]}), "head."),  # indices out of order
        (Plan({name: value for name, value in STREAM.items() if name != "two.weight"}), "two.weight"),  # half of a tie
    ],
)
def test_a_plan_that_does_not_fit_is_refused_in_one_line(analysis: Analysis, plan: Plan, names: str) -> None:
    with pytest.raises(PlanError) as raised:
        plan.units(analysis)
    assert names in one_line(raised)


def test_a_plan_that_leaves_nothing_of_a_dim_is_refused(analysis: Analysis) -> None:
    everything: Any = {"head.0.weight": [(0, [])], "head.0.bias": [(0, [])], "head.2.weight": [(1, [])]}
    with pytest.raises(PlanError) as raised:
        Shrink(Plan(everything)).run(analysis.program)
    one_line(raised)


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.stem(x))


def test_the_plan_of_another_network_is_refused(analysis: Analysis) -> None:
    other = capture(Other().eval(), torch.randn(2, 3))
    with pytest.raises(PlanError) as raised:
        Shrink(Plan.of_units(analysis, units_of(analysis, "stem.weight", 1))).run(other)
    assert "which this network does not have" in one_line(raised)
    # the same names with other company
    with pytest.raises(PlanError) as raised:
        Shrink(Plan({"stem.weight": [(0, [0, 2, 3])], "stem.bias": [(0, [0, 2, 3])]})).run(other)
    assert "'last.weight'" in one_line(raised)
