from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kfe_fx.data import ArrayData, check_finite, check_targets, validate_against
from kfe_fx.errors import BadData, UsageError


def counted(total: int, name: str = "some.npz") -> ArrayData:
    values = torch.arange(total)
    return ArrayData((values.float()[:, None],), values, name=name)


def images(*sizes: int, dtype: torch.dtype = torch.float32) -> ArrayData:
    return ArrayData((torch.zeros(*sizes, dtype=dtype),), name="some.npz")


def values(part: ArrayData) -> list[int]:
    assert part.targets is not None
    assert isinstance(part.inputs, tuple)
    assert part.inputs[0].flatten().tolist() == part.targets.tolist()
    return part.targets.tolist()


@given(
    total=st.integers(1, 40),
    size=st.integers(1, 12),
    seed=st.none() | st.integers(0, 5),
    drop_last=st.booleans(),
)
def test_batches_visit_each_example_once(total: int, size: int, seed: int | None, drop_last: bool):
    seen: list[int] = []
    for inputs, targets in counted(total).batches(size, seed, drop_last):
        assert isinstance(inputs, tuple)
        assert targets is not None
        assert inputs[0].flatten().tolist() == targets.tolist()
        assert len(targets) == size or not (drop_last and total >= size)
        seen += targets.tolist()
    dropped = total % size if drop_last and total >= size else 0
    assert len(set(seen)) == len(seen) == total - dropped
    if seed is None:
        assert seen == list(range(total - dropped))


def test_batches_repeat_by_seed():
    orders = [[t.tolist() for _, t in counted(20).batches(6, seed) if t is not None] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


@given(total=st.integers(2, 60), fraction=st.floats(0.01, 0.99), seed=st.integers(0, 9))
def test_split(total: int, fraction: float, seed: int):
    training, validation = counted(total).split(fraction, seed)
    assert sorted(values(training) + values(validation)) == list(range(total))
    assert len(validation) == min(max(round(fraction * total), 1), total - 1)
    assert values(counted(total).split(fraction, seed)[1]) == values(validation)
    assert f"{len(validation)} of {total}, seed {seed}]" in validation.name


def test_first_and_dict_inputs():
    data = ArrayData({"a": torch.arange(5), "b": torch.zeros(5, 2)}, torch.arange(5))
    part = data.first(3)
    assert isinstance(part.inputs, dict)
    assert {key: len(tensor) for key, tensor in part.inputs.items()} == {"a": 3, "b": 3}
    assert len(data.first(9)) == 5
    inputs, _ = next(data.batches(2, seed=0))
    assert isinstance(inputs, dict)


def test_describe():
    assert counted(1200).describe() == "some.npz: 1,200 examples, inputs float32[1], targets int64[]"
    assert images(1, 3, 4).describe() == "some.npz: 1 example, inputs float32[3,4]"


def test_refused():
    with pytest.raises(BadData, match="inputs has 2, targets has 3"):
        ArrayData((torch.zeros(2),), torch.zeros(3))
    with pytest.raises(BadData, match="no examples"):
        ArrayData((torch.zeros(0, 3),))
    with pytest.raises(BadData, match="no input array"):
        ArrayData(())
    with pytest.raises(BadData, match="one example cannot be split"):
        counted(1).split(0.5)
    with pytest.raises(UsageError, match="between 0 and 1"):
        counted(5).split(1.0)
    with pytest.raises(UsageError, match="batch of 0"):
        next(counted(5).batches(0))
    with pytest.raises(UsageError, match="first 0"):
        counted(5).first(0)


def test_not_finite():
    tensor = torch.zeros(10, 2, 3)
    tensor[4, 1, 2] = torch.nan
    tensor[4, 1, 1] = -torch.inf
    tensor[7, 0, 0] = torch.inf
    with pytest.raises(BadData, match=r"inputs holds 3 NaN or infinite values in 2 of 10 .* at \[4,1,1\]"):
        check_finite(ArrayData((tensor,)))
    with pytest.raises(BadData, match=r"targets holds 1 NaN or infinite value in 1 of 2"):
        check_finite(ArrayData((torch.zeros(2, 2),), torch.tensor([0.0, torch.nan])))
    huge = ArrayData((torch.full((4, 1), 3e38),))  # the sum overflows, the values do not
    assert check_finite(huge) is huge


def test_targets():
    check_targets(torch.tensor([0, 3, -100]), 4)
    check_targets(torch.tensor([[0, 3]], dtype=torch.uint8), 4)
    with pytest.raises(BadData, match=r"label 4 at \[1\] .* 4 classes, 0 to 3 \(they seem to count from 1\)"):
        check_targets(torch.tensor([1, 4, 2]), 4)
    with pytest.raises(BadData, match=r"label -1 at \[0,1\] is out of range.*; 2 such labels"):
        check_targets(torch.tensor([[0, -1], [-1, 0]]), 4)
    with pytest.raises(BadData, match="targets are float32, not class indices"):
        check_targets(torch.zeros(3), 4)


class TestAgainst:
    @pytest.mark.parametrize(
        "example",
        [
            torch.zeros(1, 3, 8, 8),
            (torch.zeros(1, 3, 8, 8),),
            {"x": torch.zeros(2, 3, 8, 8)},
            ((torch.zeros(1, 3, 8, 8),), {}),
            ((), {"x": torch.zeros(1, 3, 8, 8)}),
        ],
    )
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
    def test_floats_are_cast(self, example: object, dtype: torch.dtype):
        checked = validate_against(images(5, 3, 8, 8, dtype=dtype), example)
        assert checked.named_inputs()[0][1].dtype == torch.float32

    def test_names(self):
        data = ArrayData({"mask": torch.ones(4, 7), "ids": torch.zeros(4, 7, dtype=torch.int32)})
        example = (torch.zeros(1, 7, dtype=torch.int64), torch.zeros(1, 7))
        checked = validate_against(data, example, names=["ids", "mask"])
        assert isinstance(checked.inputs, dict)
        assert checked.inputs["ids"].dtype == torch.int64
        keywords = {"ids": example[0], "mask": example[1]}
        assert isinstance(validate_against(data, keywords).inputs, dict)
        with pytest.raises(BadData, match="no input 'mask'; name the arrays ids, attention"):
            validate_against(data, example, names=["ids", "attention"])

    def test_one_input_of_another_name(self):
        checked = validate_against(ArrayData({"pixels": torch.zeros(4, 7)}), torch.zeros(1, 7))
        assert checked.named_inputs()[0][0] == "inputs"

    def test_count(self):
        with pytest.raises(BadData, match="holds 1 input arrays, the network reads 2"):
            validate_against(images(4, 7), (torch.zeros(1, 7), torch.zeros(1, 7)))
        # numbers among the arguments are no data
        assert len(validate_against(images(4, 7), (torch.zeros(1, 7), 3))) == 4

    def test_shapes(self):
        with pytest.raises(BadData, match=r"inputs is \[N,3,8,9\], the network reads \[N,3,8,8\]; resize"):
            validate_against(images(5, 3, 8, 9), torch.zeros(1, 3, 8, 8))
        with pytest.raises(BadData, match="channels come last here"):
            validate_against(images(5, 6, 8, 3), torch.zeros(1, 3, 6, 8))
        with pytest.raises(BadData, match=r"x\[:, None\]"):
            validate_against(images(5, 8, 8), torch.zeros(1, 1, 8, 8))

    def test_free_axes(self):
        axes = {"x": {0: "batch", 2: "height"}}
        assert validate_against(images(5, 3, 9, 8), torch.zeros(1, 3, 8, 8), ["x"], axes)
        with pytest.raises(BadData, match=r"the network reads \[N,3,\*,8\]"):
            validate_against(images(5, 3, 9, 9), torch.zeros(1, 3, 8, 8), ["x"], axes)

    def test_bytes_are_not_scaled(self):
        with pytest.raises(BadData, match=r"uint8, the network reads float32.*\?scale=255"):
            validate_against(images(5, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, 3, 8, 8))

    def test_floats_are_no_indices(self):
        with pytest.raises(BadData, match="float32, the network reads int64; save"):
            validate_against(images(5, 7), torch.zeros(1, 7, dtype=torch.int64))
