"""Pipelines: passes in order, as text that prints and parses back.

    batchnorm-recurrent{mode=full cell_norm=channel},finalise-recurrent

Names are those of the passes, options the fields of their dataclasses. Passes that need more than plain values (a plan,
an analysis) are for Python only.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import re
import types
import typing
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from kfe_fx.errors import UsageError, VerificationFailed
from kfe_fx.passes.base import Pass, PassResult
from kfe_fx.program import Program
from kfe_fx.runtime.inputs import draw_inputs
from kfe_fx.runtime.parity import compare_output

# what can be spelled as text: name -> (module, class)
PASSES = {
    "batchnorm-recurrent": ("batchnorm_recurrent", "BatchnormRecurrent"),
    "finalise-recurrent": ("finalise_recurrent", "FinaliseRecurrent"),
    "fold-recurrent-batchnorm": ("fold_recurrent_batchnorm", "FoldRecurrentBatchnorm"),
    "decompose-kfe": ("decompose_kfe", "DecomposeKfe"),
    "decompose-svd": ("decompose_svd", "DecomposeSvd"),
    "capture-curvature": ("capture_curvature", "CaptureCurvature"),
    "strip-curvature": ("strip_curvature", "StripCurvature"),
    "insert-gates": ("insert_gates", "InsertGates"),
    "finalise-gates": ("finalise_gates", "FinaliseGates"),
    "strip-gates": ("strip_gates", "StripGates"),
}
DATA = "data"  # the field of a pass that reads examples
_STEP = re.compile(r"\s*(?P<name>[a-z][a-z0-9-]*)\s*(\{(?P<options>[^{}]*)\})?\s*(?P<end>,|$)")
_OPTION = re.compile(r"\s*(?P<key>[a-z_][a-z0-9_]*)=(?P<value>[^\s,]+)\s*,?")
_WORDS = {"true": True, "false": False, "none": None}
_EXACT = {torch.float64: 1e-9, torch.float32: 1e-5}


@dataclass(frozen=True)
class Pipeline:
    """Passes that run one after the other."""

    passes: tuple[Pass, ...] = ()

    @classmethod
    def from_text(cls, text: str) -> Pipeline:
        """Read ``name{option=value ...},name,...``.

        Raises:
            UsageError: a pass, an option or a value that does not exist, or text of another form.
        """
        found: list[Pass] = []
        place = 0
        while place < len(text) or not found:
            step = _STEP.match(text, place)
            if step is None or (step["end"] == "," and step.end() == len(text)):
                raise UsageError(
                    f"cannot read the passes at {text[place:][:40]!r}; spell them name{{option=value}},name"
                )
            found.append(_build(step["name"], step["options"] or ""))
            place = step.end()
        return cls(tuple(found))

    def with_data(self, data: Any) -> Pipeline:
        """Return the pipeline with ``data`` for the passes that read examples."""
        return Pipeline(tuple(replace(step, **{DATA: data}) if _reads(step) else step for step in self.passes))

    def to_text(self) -> str:
        """Write the passes with the options that are not the default."""
        return ",".join(_spell(step) for step in self.passes)

    def run(self, program: Program, *, verify: bool = True) -> PassResult:
        """Run the passes in order; the given Program is never touched.

        With ``verify`` each graph is checked after each pass, and the outputs of a pass that says that it keeps the
        function are compared on drawn inputs. What it says of this run, as ``keeps`` among its facts, goes before what
        its class says. The facts are those of the passes by name; NAME#2 is the second pass of one name.

        Raises:
            VerificationFailed: a pass left a broken graph, or changed the function and says that it does not.
        """
        facts: dict[str, Any] = {}
        runs: Counter[str] = Counter()
        modified = False
        for step in self.passes:
            result = step.run(program)
            if verify and result.modified:
                _check(step, program, result)
            program, modified = result.program, modified or result.modified
            runs[step.name] += 1
            number = runs[step.name]
            facts[step.name if number == 1 else f"{step.name}#{number}"] = result.facts
        return PassResult(program, modified, facts)


def names() -> list[str]:
    """List the passes that can be spelled as text."""
    return sorted(PASSES)


def class_of(name: str) -> type[Pass]:
    """Return the class of a pass.

    Raises:
        UsageError: there is no such pass.
    """
    if name not in PASSES:
        raise UsageError(f"there is no pass {name!r}{_meant(name, PASSES)}; choose from {', '.join(names())}")
    module, kind = PASSES[name]
    return getattr(importlib.import_module(f"kfe_fx.passes.{module}"), kind)


def options_of(kind: type[Pass]) -> dict[str, Any]:
    """Return the options of a pass that can be spelled, with the types of their values."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind) if field.init and _kinds(hints[field.name])}


def _reads(step: Pass) -> bool:
    return DATA in {field.name for field in fields(step)}


def _build(name: str, text: str) -> Pass:
    kind = class_of(name)
    known = options_of(kind)
    given: dict[str, Any] = {}
    place = 0
    while place < len(text.rstrip()):
        option = _OPTION.match(text, place)
        if option is None:
            raise UsageError(f"{name}: cannot read the options at {text[place:][:40]!r}; spell them option=value")
        key = option["key"]
        if key not in known:
            raise UsageError(f"{name} has no option {key!r}{_meant(key, known)}; it has {', '.join(known) or 'none'}")
        given[key] = _value(name, key, option["value"], known[key])
        place = option.end()
    return kind(**given)


def _value(name: str, key: str, text: str, hint: Any) -> Any:
    kinds = _kinds(hint)
    value: Any
    if text.lower() in _WORDS and type(_WORDS[text.lower()]) in kinds:
        value = _WORDS[text.lower()]
    else:
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds and int not in kinds:
        value = float(value)
    if str in kinds and not isinstance(value, kinds) and value is not None:
        value = text
    if type(value) not in kinds:
        wanted = " or ".join(kind.__name__.replace("NoneType", "none") for kind in kinds)
        raise UsageError(f"{name}: {key} is {wanted}, got {text!r}")
    return value


def _kinds(hint: Any) -> tuple[type, ...]:
    """Return the plain types that a hint allows, or () where it wants anything else."""
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return tuple(parts) if all(part in (int, float, bool, str, types.NoneType) for part in parts) else ()


def _spell(step: Pass) -> str:
    known = options_of(type(step))
    told = [
        f"{field.name}={str(value).lower() if isinstance(value, bool | None) else value}"
        for field in fields(step)
        if field.name in known and (value := getattr(step, field.name)) != field.default
    ]
    return step.name + (f"{{{' '.join(told)}}}" if told else "")


def _meant(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, known, 1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _check(step: Pass, before: Program, result: PassResult) -> None:
    after = result.program
    for mode, graph in after.graphs.items():
        try:
            graph.lint()
        except RuntimeError as error:
            raise VerificationFailed(f"{step.name} left a broken {mode} graph ({error}); please report it") from error
    if result.facts.get("keeps", step.keeps) not in ("exact", "observes"):
        return
    flat = draw_inputs(before, None, 0)
    with torch.no_grad():
        pairs = zip(before.module().run_flat(flat), after.module().run_flat(flat), strict=True)
        for place, (wanted, found) in enumerate(pairs):
            if isinstance(wanted, Tensor):
                error = compare_output(str(place), [(wanted.numpy(), found.numpy())]).error
                if not error <= _EXACT.get(wanted.dtype, 1e-2):
                    raise VerificationFailed(
                        f"{step.name} keeps the function, but here changed it by {error:.1e}; please report the network"
                    )
