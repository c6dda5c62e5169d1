from __future__ import annotations

import pytest
import torch

from kfe_fx.errors import UsageError
from kfe_fx.frontend.specs import read_specs


def test_inputs_from_text():
    inputs, axes = read_specs(["x=float32[b,3,8,8]", " mask = bool[b, t] ", "ids=int64[b,t:16]", "s=float64[]"])
    assert {name: (value.dtype, tuple(value.shape)) for name, value in inputs.items()} == {
        "x": (torch.float32, (2, 3, 8, 8)),
        "mask": (torch.bool, (2, 16)),
        "ids": (torch.int64, (2, 16)),
        "s": (torch.float64, ()),
    }
    assert axes == {"x": {0: "b"}, "mask": {0: "b", 1: "t"}, "ids": {0: "b", 1: "t"}}


def test_inputs_are_the_same_each_time_and_harmless():
    (first, _), (second, _) = read_specs(["x=float32[4]", "i=int64[3]"]), read_specs(["x=float32[4]", "i=int64[3]"])
    assert torch.equal(first["x"], second["x"])
    assert first["x"].std() > 0
    assert first["i"].tolist() == [0, 0, 0]


def test_axes_have_different_sizes():
    inputs, _ = read_specs(["x=float32[b,c,h,w]", "y=float32[b,h]"])
    assert len(set(inputs["x"].shape)) == 4
    assert inputs["y"].shape == (inputs["x"].shape[0], inputs["x"].shape[2])


@pytest.mark.parametrize(
    ("specs", "expected"),
    [
        (["x"], "write NAME=TYPE"),
        (["x=float32"], "write NAME=TYPE"),
        (["x=[3]"], "write NAME=TYPE"),
        (["x=float31[3]"], "no type 'float31'"),
        (["x=float32[3,,4]"], "'' is no dim"),
        (["x=float32[-1]"], "'-1' is no dim"),
        (["x=float32[1.5]"], "is no dim"),
        (["x=float32[0]"], "0 elements"),
        (["x=float32[99999,99999]"], "elements"),
        (["x=float32[1]", "x=float32[1]"], "stands twice"),
        (["x=float32[b:2]", "y=float32[b:3]"], "two sizes"),
    ],
)
def test_what_is_no_input(specs: list[str], expected: str):
    with pytest.raises(UsageError, match=expected) as caught:
        read_specs(specs)
    assert "\n" not in str(caught.value)
