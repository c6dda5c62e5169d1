"""Files with valid checksums and a hostile graph.json: refused with one line, or harmless."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kfe_fx.errors import BadFile
from kfe_fx.format import load
from kfe_fx.program import Program
from tests.format.nets import forge_graph, graph_of

THOROUGH = os.environ.get("KFE_FX_THOROUGH", "") not in ("", "0")
CASES = 4000 if THOROUGH else 240


def attempt(path: Path) -> str:
    """Load and run a file; return the line with which it was refused, or nothing."""
    try:
        program = load(path)
    except BadFile as error:
        refusal = str(error)
    else:
        _run(program)
        return ""
    assert "\n" not in refusal
    assert len(refusal) < 800
    return refusal


def _run(program: Program) -> None:
    args, kwargs = program.example_inputs
    program(*args, **kwargs)
    torch.manual_seed(0)
    program.train()(*args, **kwargs)
    program.hash()


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in pairs:
        yield from places(part, (*path, key))


STRANGE: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 7, 2**31, 2**62, 2**64, -(2**70), 0.5, 1e308, -0.0),
    *(
        "",
        "x",
        "self",
        "torch",
        "import os",
        "__class__",
        "a.b",
        "..",
        "a\nb",
        "a'b",
        'a"b',
        "\ud800",
        "\0",
        "é",
        "x" * 5000,
    ),
    *([], [[]], [0] * 70, {}, {"node": 0}, {"node": 10**9}, {"node": -1}, {"tuple": []}, {"dtype": "float32"}),
    *({"float": "nan"}, {"slice": [0, 1, 1]}, {"device": "cuda:0"}, {"leaf": 0}, {"leaf": 99}, {"constant": 1}),
]


def mutate(document: Any, rng: random.Random) -> tuple[Any, str]:
    """Change one place of a JSON document."""
    document = copy.deepcopy(document)
    path = rng.choice([place for place in places(document) if place])
    owner = document
    for key in path[:-1]:
        owner = owner[key]
    kind = rng.choice(["replace", "replace", "replace", "delete", "swap", "copy", "nest"])
    if kind == "replace":
        owner[path[-1]] = rng.choice(STRANGE)
    elif kind == "delete":
        del owner[path[-1]]
    elif kind == "swap":
        other = rng.choice(list(owner) if isinstance(owner, dict) else range(len(owner)))
        owner[path[-1]], owner[other] = owner[other], owner[path[-1]]
    elif kind == "copy":
        if isinstance(owner, list):
            owner.insert(path[-1], copy.deepcopy(owner[path[-1]]))
        else:
            owner[rng.choice(["extra", *owner])] = copy.deepcopy(owner[path[-1]])
    else:
        for _ in range(rng.choice([1, 40])):
            owner[path[-1]] = [owner[path[-1]]]
    return document, f"{kind} {path}"


@pytest.mark.parametrize("name", ["convolutional", "attention", "streaming"])
def test_any_change_is_refused_or_harmless(name: str, saved: dict[str, Path], tmp_path: Path):
    rng = random.Random(name)
    document = graph_of(saved[name])
    refusals = 0
    for case in range(CASES // 2):
        changed, what = mutate(document, rng)
        try:
            refusals += bool(attempt(forge_graph(tmp_path / "x.pt", saved[name], changed)))
        except Exception as error:
            raise AssertionError(f"case {case}: {what}") from error
    assert refusals > CASES // 4


def test_a_key_that_stands_twice(saved: dict[str, Path], tmp_path: Path):
    text = json.dumps(graph_of(saved["wide"]))
    for key in ("version", "names", "args", "dtype"):
        doubled = text.replace(f'"{key}":', f'"{key}": 1, "{key}":', 1).encode()
        assert "stands twice" in attempt(forge_graph(tmp_path / "x.pt", saved["wide"], doubled))


def test_numbers_that_json_should_not_spell(saved: dict[str, Path], tmp_path: Path):
    text = json.dumps(graph_of(saved["convolutional"]))
    assert ", 0.1, " in text
    for number in ("NaN", "-Infinity", "1e999", "9" * 5000):
        changed = text.replace(", 0.1, ", f", {number}, ").encode()
        assert attempt(forge_graph(tmp_path / "x.pt", saved["convolutional"], changed))


def nodes(document: Any, target: str) -> Any:
    return next(node for node in document["graphs"]["eval"] if node["target"].startswith(target))


def set_target(old: str, new: str, **fields: Any) -> Callable[[Any], None]:
    return lambda document: nodes(document, old).update({"target": new, **fields})


def set_argument(target: str, index: int, tensor: str) -> Callable[[Any], None]:
    """Give another tensor to an operation."""

    def change(document: Any) -> None:
        graph = document["graphs"]["eval"]
        place = graph.index(nodes(document, tensor))
        nodes(document, target)["args"][index] = {"node": place}

    return change


def insert(*made: dict[str, Any]) -> Callable[[Any], None]:
    """Put nodes before the output of the evaluation graph."""

    def change(document: Any) -> None:
        graph = document["graphs"]["eval"]
        for index, node in enumerate(made):
            graph.insert(len(graph) - 1, {"op": "call_function", "name": f"made_{index}", "args": [], **node})

    return change


def growing(document: Any) -> None:
    graph = document["graphs"]["eval"]
    made = [
        {"op": "call_function", "target": "aten.sym_size.int", "name": "size", "args": [{"node": len(graph) - 2}, 0]}
    ]
    for step in range(80):
        last = {"node": len(graph) - 2 + len(made)}
        made.append({"op": "call_function", "target": "operator.mul", "name": f"grow_{step}", "args": [last, last]})
    graph[-1:-1] = made


ATTACKS: dict[str, tuple[Callable[[Any], object], str]] = {
    "a function of os": (set_target("aten.relu", "os.system"), "is not one that"),
    "eval": (set_target("aten.relu", "builtins.eval"), "is not one that"),
    "an operator that calls": (set_target("aten.relu", "operator.methodcaller"), "is not one that"),
    "a file": (set_target("aten.relu", "aten.from_file.default", args=["/etc/passwd"]), "is not one that"),
    "TorchScript's save": (set_target("aten.relu", "aten.save.default"), "is not one that"),
    "a write": (set_target("aten.relu", "aten.relu_.default"), "is not one that"),
    "an out variant": (set_target("aten.relu", "aten.relu.out"), "is not one that"),
    "a write into an input": (
        insert({"target": "aten.copy_.default", "args": [{"node": 6}, {"node": 6}]}),
        "into a buffer only",
    ),
    "a write into a parameter": (
        insert({"target": "aten.copy_.default", "args": [{"node": 0}, {"node": 0}]}),
        "into a buffer only",
    ),
    "a write that does not fit": (
        lambda d: next(n for n in d["graphs"]["train"] if n["target"] == "aten.copy_.default")["args"].__setitem__(
            1,
            {"node": d["graphs"]["train"].index(next(n for n in d["graphs"]["train"] if n["target"] == "stem.weight"))},
        ),
        "is not|does not run",
    ),
    "TorchScript's string": (insert({"target": "aten.add.str", "args": ["a", "b"]}), "is not one that"),
    "TorchScript's list": (insert({"target": "aten.mul.left_t", "args": [[1, 2], 10**9]}), "is not one that"),
    "an unknown overload": (set_target("aten.relu", "aten.relu.nothing"), "not known"),
    "a private attribute": (set_target("aten.relu", "aten.__class__.default"), "is not one that"),
    "a long power": (insert({"target": "operator.pow", "args": [9, 10**9]}), "power of a size"),
    "a long list": (insert({"target": "operator.mul", "args": [[1], 10**9]}), "does not take such arguments"),
    "a long string": (insert({"target": "operator.mul", "args": ["a", 10**9]}), "does not take such arguments"),
    "a growing number": (growing, "never needed"),
    "too many arguments": (set_target("aten.relu", "aten.relu.default", args=[{"node": 0}] * 3), "does not take these"),
    "too few arguments": (set_target("aten.relu", "aten.relu.default", args=[]), "does not take these"),
    "an unknown keyword": (set_target("aten.relu", "aten.relu.default", kwargs={"x": 1}), "does not take these"),
    "a wrong argument": (set_target("aten.relu", "aten.relu.default", args=["x"]), "does not run on its examples"),
    "a shape that does not fit": (
        set_target("aten.relu", "aten.view.default", args=[{"node": 0}, [7]]),
        "does not run",
    ),
    "a statistic that does not fit": (set_argument("aten.batch_norm", 4, "scale"), "does not fit its input"),
    "a contraction that does not fit": (set_argument("aten.linear", 1, "stem.weight"), "does not run on its examples"),
    "a later node": (set_target("aten.relu", "aten.relu.default", args=[{"node": 999}]), "does not come before"),
    "code in a name": (lambda d: nodes(d, "aten.relu").update(name="x); import os; (y"), "is not a name"),
    "code in a keyword": (lambda d: nodes(d, "aten.relu").update(kwargs={"a=1)#": 1}), "is not a name"),
    "code in an input": (lambda d: d["signature"].update(inputs=["x): pass\nimport os\ndef g("]), "is not a name"),
    "an attribute that is no tensor": (lambda d: nodes(d, "stem.weight").update(target="__class__"), "no tensor"),
    "code in a tensor's name": (lambda d: d["tensors"][0].update(names=["a')+f('"]), "not the name of a tensor"),
    "a tensor over a method": (lambda d: d["tensors"][0].update(names=["stem.weight", "forward"]), "something else"),
    "a module over a method": (lambda d: d["modules"].insert(0, "forward"), "has no place"),
    "an unknown node": (lambda d: d["graphs"]["eval"][0].update(op="call_module"), "unknown node kind"),
    "an unknown feature": (lambda d: d.update(requires=["leaf:lstm"]), "needs the feature 'leaf:lstm'"),
    "a newer version": (lambda d: d.update(version=2), "needs version 2"),
    "a leaf": (lambda d: d.update(leaves={"lstm": {}}), "update kfe-fx"),
    "a huge tensor": (lambda d: d["tensors"][0].update(shape=[2**40, 2**40], stride=[2**40, 1]), "size|does not hold"),
    "a shared record": (lambda d: d["tensors"][1].update(record="data/0"), "does not hold this tensor alone"),
    "a record outside": (lambda d: d["tensors"][0].update(record="data.pkl"), "does not hold this tensor alone"),
    "overlapping strides": (lambda d: d["tensors"][0].update(stride=[0, 0, 0, 0]), "dense"),
    "an axis that does not exist": (lambda d: d["axes"].update(input=[[9, "batch"]]), "from 0 to 3"),
    "other byte order": (lambda d: d.update(byteorder="big"), "endian"),
    "gradients of integers": (
        lambda d: next(t for t in d["tensors"] if t["dtype"] == "int64").update(kind="parameter", requires_grad=True),
        "no gradient",
    ),
}


@pytest.mark.parametrize("what", ATTACKS)
def test_attacks(
    what: str,
    saved: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
):
    change, expected = ATTACKS[what]
    document = graph_of(saved["convolutional"])
    change(document)
    refusal = attempt(forge_graph(tmp_path / "x.pt", saved["convolutional"], document))
    assert any(part in refusal for part in expected.split("|")), refusal
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_truth_values_are_zero_or_one(saved: dict[str, Path], tmp_path: Path):
    document = graph_of(saved["wide"])
    entry = next(t for t in document["tensors"] if t["names"] == ["flags"])
    from tests.format.nets import forge, records

    root, held = records(saved["wide"])
    held[entry["record"]] = b"\x01\x00\x07\x01"
    assert "truth value" in attempt(forge(tmp_path / "x.pt", root, list(held.items())))


@pytest.mark.parametrize(
    "states",
    [
        *(7, [], {"inputs": {}}, {"h": {"width": 6, "kept": [0]}}, {"inputs": {"h": {"width": 6}}, "outputs": {}}),
        *(
            {"inputs": {"h": {"width": 6, "kept": kept}}, "outputs": {}}
            for kept in ([0, 1], [0, 1, 6], [1, 0, 2], "abc")
        ),
        {"inputs": {"x": {"width": 2**40, "kept": [0, 1, 2]}}, "outputs": {}},
        {"inputs": {"y": {"width": 6, "kept": [0, 1, 2]}}, "outputs": {}},
        {"inputs": {}, "outputs": {"last": {"width": 6, "kept": [0, 1, 2]}}},
    ],
)
def test_states_that_no_network_has(states: Any, saved: dict[str, Path], tmp_path: Path):
    document = graph_of(saved["streaming"])
    assert document["sections"]["states"]["inputs"]["h"]["width"] == 6
    document["sections"]["states"] = states
    assert "sections.states" in attempt(forge_graph(tmp_path / "x.pt", saved["streaming"], document))


def test_optional_sections_of_other_versions_are_kept(saved: dict[str, Path], tmp_path: Path):
    document = graph_of(saved["wide"])
    document["sections"] = {"from-the-future": [1, {"a": None}]}
    program = load(forge_graph(tmp_path / "x.pt", saved["wide"], document))
    assert program.extras["sections"] == {"from-the-future": [1, {"a": None}]}
