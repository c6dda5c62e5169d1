"""Pipelines as text: they print, parse back, explain what they do not know, and check what passes claim."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from kfe_fx.errors import UsageError, VerificationFailed
from kfe_fx.frontend.capture import capture
from kfe_fx.passes.base import Pass, PassResult
from kfe_fx.passes.capture_curvature import CaptureCurvature
from kfe_fx.passes.pipeline import Pipeline, class_of, names, options_of
from kfe_fx.passes.strip_curvature import StripCurvature
from kfe_fx.program import Program


def program() -> Program:
    torch.manual_seed(0)
    return capture(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 3))


def test_passes_run_in_order_and_print_back() -> None:
    pipeline = Pipeline.from_text(" capture-curvature , strip-curvature")
    assert [type(step) for step in pipeline.passes] == [CaptureCurvature, StripCurvature]
    assert pipeline.to_text() == "capture-curvature,strip-curvature"
    before = program()
    after = pipeline.run(before).program
    assert after.hash() == before.hash()
    assert after.lineage == ("capture-curvature", "strip-curvature")


@pytest.mark.parametrize("name", names())
def test_every_pass_is_named_as_it_says_and_its_defaults_are_left_out(name: str) -> None:
    assert class_of(name).name == name
    assert Pipeline.from_text(name).to_text() == name


@pytest.mark.parametrize("name", names())
def test_every_option_prints_and_parses_back(name: str) -> None:
    examples = {int: 7, float: 0.25, bool: True, str: "full"}
    for key, hint in options_of(class_of(name)).items():
        kinds = [kind for kind in examples if kind in (getattr(hint, "__args__", None) or (hint,))]
        for kind in kinds:
            text = f"{name}{{{key}={str(examples[kind]).lower()}}}"
            pipeline = Pipeline.from_text(text)
            assert Pipeline.from_text(pipeline.to_text()) == pipeline


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("strip-curvatur", "did you mean 'strip-curvature'"),
        ("strip-curvature{a=1}", "has no option 'a'"),
        ("strip-curvature{a}", "cannot read the options at 'a'"),
        ("strip-curvature,", "cannot read the passes"),
        ("", "cannot read the passes"),
        ("strip-curvature}{", "cannot read the passes"),
        ("batchnorm-recurrent{t_max=x}", "t_max is int or none, got 'x'"),
        ("batchnorm-recurrent{mod=full}", "did you mean 'mode'"),
    ],
)
def test_what_cannot_be_read_is_one_line(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        Pipeline.from_text(text)
    assert "\n" not in str(caught.value)


@dataclass(frozen=True)
class Liar(Pass):
    """Change a weight and say that the function is the same."""

    name: ClassVar[str] = "liar"
    keeps: ClassVar[str] = "exact"
    told: str | None = None
    data: Any = None

    def run(self, program: Program) -> PassResult:
        twin = program.copy()
        with torch.no_grad():
            twin.tensor("0.weight").mul_(1.01)
        return PassResult(twin, True, {} if self.told is None else {"keeps": self.told})


class Admits(Liar):
    """Say as a class that the function is another one."""

    keeps: ClassVar[str] = "trained"


def test_a_pass_that_changes_the_function_and_says_that_it_does_not_is_caught() -> None:
    with pytest.raises(VerificationFailed, match="liar keeps the function"):
        Pipeline((Liar(),)).run(program())
    assert Pipeline((Liar(),)).run(program(), verify=False).modified


def test_what_a_run_says_of_itself_goes_before_what_the_class_says() -> None:
    assert Pipeline((Admits(), Liar("trained"))).run(program()).modified
    with pytest.raises(VerificationFailed, match="liar keeps the function"):
        Pipeline((Admits("exact"),)).run(program())


def test_facts_of_every_pass_are_kept() -> None:
    steps = (Admits(), CaptureCurvature(), Liar("trained"), Liar("observes"))
    facts = Pipeline(steps).run(program(), verify=False).facts
    assert list(facts) == ["liar", "capture-curvature", "liar#2", "liar#3"]
    assert [facts[name] for name in ("liar", "liar#2", "liar#3")] == [{}, {"keeps": "trained"}, {"keeps": "observes"}]


def test_data_goes_to_the_passes_that_read_it() -> None:
    pipeline = Pipeline((Liar("exact"), StripCurvature()))
    assert pipeline.with_data([1]).passes == (Liar("exact", data=[1]), StripCurvature())
    assert pipeline.passes == (Liar("exact"), StripCurvature())


def test_a_word_is_text_where_the_option_is_text() -> None:
    text = "batchnorm-recurrent{mode=full cell_norm=none}"
    assert Pipeline.from_text(text).passes[0].cell_norm == "none"  # pyright: ignore[reportAttributeAccessIssue]
    assert Pipeline.from_text("batchnorm-recurrent{trained=none t_max=none}").to_text() == "batchnorm-recurrent"
