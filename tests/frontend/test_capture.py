"""Capturing: the Program is the source, in evaluation, in training, and step by step in fine-tuning."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kfe_fx.errors import UnsupportedModel, UsageError
from kfe_fx.format import load, save
from kfe_fx.frontend.capture import capture


class Attention(nn.Module):
    """Attention whose dropout probability vanishes from an evaluation trace."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class StochasticDepth(nn.Module):
    """A branch that only training has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = F.relu(self.first(x))
        if self.training:
            keep = torch.empty(x.shape[0], 1, dtype=x.dtype).bernoulli_(0.5)
            branch = branch * keep / 0.5
        return self.second(x + branch)


class Norms(nn.Module):
    """A running norm, one without running statistics, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.stateless = nn.BatchNorm2d(4, track_running_stats=False)
        self.drop = nn.Dropout(0.4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.conv(x)), inplace=True)
        return self.head(self.drop(self.stateless(x)).mean([2, 3]))


CASES: list[tuple[type[nn.Module], tuple[int, ...]]] = [
    (Attention, (5, 8)),
    (StochasticDepth, (6,)),
    (Norms, (2, 6, 6)),
]


def make(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().double().eval()


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kind", "shape"), CASES)
@pytest.mark.parametrize("training", [False, True])
def test_modes_behave_as_the_source(kind: type[nn.Module], shape: tuple[int, ...], training: bool) -> None:
    module = make(kind)
    program = capture(module, torch.randn(1, *shape, dtype=torch.float64))
    module.train(training)
    program.train(training)
    for batch in (2, 7):
        x = torch.randn(batch, *shape, dtype=torch.float64)
        torch.manual_seed(1)
        expected = module(x)
        torch.manual_seed(1)
        close(program(x), expected)
    assert program.module().training is training


@pytest.mark.parametrize(("kind", "shape"), CASES)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_fine_tuning_equals_fine_tuning_the_source(
    kind: type[nn.Module], shape: tuple[int, ...], optimizer: str
) -> None:
    module = make(kind)
    program = capture(module, torch.randn(1, *shape, dtype=torch.float64))

    def train(network: Any) -> dict[str, torch.Tensor]:
        network.train()
        parameters = list(network.parameters())
        if optimizer == "sgd":
            steps: torch.optim.Optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        else:
            steps = torch.optim.AdamW(parameters, lr=0.01)
        torch.manual_seed(2)
        for _ in range(3):
            x = torch.randn(4, *shape, dtype=torch.float64)
            steps.zero_grad()
            F.cross_entropy(network(x), torch.tensor([0, 1, 2, 0])).backward()
            steps.step()
        return network.state_dict()

    theirs, ours = train(module), train(program.module())
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        close(ours[name], value)


def test_a_frozen_norm_stays_frozen() -> None:
    module = make(Norms).train()
    module.norm.eval()
    program = capture(module, torch.randn(2, 2, 6, 6, dtype=torch.float64))
    assert not module.norm.training
    assert module.training
    before = program.tensor("norm.running_mean").clone()
    program.train()
    program(torch.randn(4, 2, 6, 6, dtype=torch.float64))
    assert torch.equal(program.tensor("norm.running_mean"), before)


def test_counts_of_batches_advance_in_training_only() -> None:
    program = capture(make(Norms), torch.randn(2, 2, 6, 6, dtype=torch.float64))
    program(torch.randn(3, 2, 6, 6, dtype=torch.float64))
    assert int(program.tensor("norm.num_batches_tracked")) == 0
    program.train()
    program(torch.randn(3, 2, 6, 6, dtype=torch.float64))
    assert int(program.tensor("norm.num_batches_tracked")) == 1


def test_a_cumulative_norm_is_said_to_have_no_training_mode() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, momentum=None)).eval()
    program = capture(module, torch.randn(2, 1, 5, 5))
    assert "train" not in program.graphs
    assert any("momentum=None" in note for note in program.notes)


def test_capture_leaves_the_source_alone() -> None:
    module = make(Norms)
    state = copy.deepcopy(module.state_dict())
    program = capture(module, torch.randn(2, 2, 6, 6, dtype=torch.float64))
    with torch.no_grad():
        for parameter in program.module().parameters():
            parameter.add_(1)
    program.train()
    program(torch.randn(2, 2, 6, 6, dtype=torch.float64))
    assert not module.training
    for name, value in state.items():
        assert torch.equal(module.state_dict()[name], value)


class Calls(nn.Module):
    """Nested inputs, keywords, a constant argument and nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, pair: tuple[torch.Tensor, torch.Tensor], *, scale: float, extra: dict[str, torch.Tensor]) -> Any:
        total = self.layer(pair[0]) * scale + pair[1] + extra["shift"]
        return {"sum": total, "parts": (pair[0], [total * 2])}


def test_nested_calls() -> None:
    module = Calls()
    first, second, shift = (torch.randn(1, 3) for _ in range(3))
    program = capture(module, (((first, second),), {"scale": 2.0, "extra": {"shift": shift}}))
    assert program.axes == {name: {0: "batch"} for name in program.signature.input_names}
    x, y, z = (torch.randn(4, 3) for _ in range(3))
    expected = module((x, y), scale=2.0, extra={"shift": z})
    found = program((x, y), extra={"shift": z}, scale=2.0)
    assert found.keys() == expected.keys()
    close(found["sum"], expected["sum"])
    close(found["parts"][1][0], expected["parts"][1][0])
    with pytest.raises(UsageError, match="fixed in the graph"):
        program((x, y), extra={"shift": z}, scale=3.0)
    with pytest.raises(UsageError, match="missing argument 'scale'"):
        program((x, y), extra={"shift": z})


class InPlace(nn.Module):
    """Writes through views of activations, the input and a literal."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[:, 0] = 1.5
        y = self.layer(x)
        left, right = y[:, :3], y.narrow(1, 3, 3)
        left.mul_(2)
        right[:, 1:].add_(left[:, :2])
        view = y.view(-1, 2, 3).transpose(1, 2)
        view[:, 0].clamp_(min=0)
        y += torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=y.dtype)
        return y.relu_() + view.reshape(-1, 6)


def test_writes_through_views_become_pure() -> None:
    module = InPlace().double()
    program = capture(module, torch.randn(1, 4, dtype=torch.float64))
    mutating = [
        n for n in program.graphs["eval"].nodes if getattr(getattr(n.target, "_schema", None), "is_mutable", False)
    ]
    assert not mutating
    x = torch.randn(5, 4, dtype=torch.float64)
    close(program(x), module(x))


class Names(nn.Module):
    """Layers and inputs whose names generated code or a Program could trip over."""

    def __init__(self) -> None:
        super().__init__()
        self.mode, self.graphs = nn.Linear(3, 3), nn.Linear(3, 3)
        self.add_module("lambda", nn.Linear(3, 3))

    def forward(self, torch: torch.Tensor) -> torch.Tensor:
        return getattr(self, "lambda")(self.graphs(self.mode(torch)))


def test_any_name_is_fine() -> None:
    module = Names().double()
    program = capture(module, torch.randn(1, 3, dtype=torch.float64))
    x = torch.randn(2, 3, dtype=torch.float64)
    close(program(x), module(x))
    assert list(program.state_dict()) == list(module.state_dict())


def test_an_input_may_be_called_like_a_parameter(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x, self.mul = nn.Parameter(torch.randn(4)), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor, mul_weight: torch.Tensor) -> torch.Tensor:
            return self.mul(x * self.x) * mul_weight

    module, inputs = Scaled(), (torch.randn(3, 4), torch.randn(3, 2))
    program = capture(module, inputs)
    close(program(*inputs), module(*inputs))
    save(program, tmp_path / "model.pt")
    close(load(tmp_path / "model.pt")(*inputs), module(*inputs))


class Tied(nn.Module):
    """An embedding tied with its head, used functionally too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids))


def test_tied_parameters_stay_tied() -> None:
    program = capture(Tied(), torch.zeros(1, 3, dtype=torch.int64))
    assert program.tensor("table.weight") is program.tensor("head.weight")
    assert program.names_of("head.weight") == ("table.weight", "head.weight")
    twin = program.copy()
    assert twin.tensor("table.weight") is twin.tensor("head.weight")
    assert twin.tensor("table.weight") is not program.tensor("table.weight")
    assert twin.hash() == program.hash()


def test_a_pinned_batch_falls_back_and_says_so() -> None:
    class Pinned(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(1, 12) * 2

    program = capture(Pinned(), torch.randn(1, 3, 4))
    assert program.axes == {}
    assert any("pins" in note for note in program.notes)
    with pytest.raises(UnsupportedModel, match="cannot"):
        capture(Pinned(), torch.randn(1, 3, 4), dynamic_axes={"x": {0: "batch"}})


def test_two_named_axes_stay_dynamic() -> None:
    module = nn.Linear(4, 2)
    program = capture(module, torch.randn(2, 5, 4), dynamic_axes={"input": {0: "batch", 1: "time"}})
    assert program.axes == {"input": {0: "batch", 1: "time"}}
    assert program(torch.randn(3, 9, 4)).shape == (3, 9, 2)


def test_control_flow_on_values_names_the_line() -> None:
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.sum() > 0:
                return x
            return -x

    with pytest.raises(UnsupportedModel, match=r"test_capture\.py:\d+: .*values of a tensor") as caught:
        capture(Branch(), torch.randn(2, 3))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("inputs", "axes", "message"),
    [
        (3, None, "example inputs must be"),
        ((), None, "do not fit"),
        ({"y": torch.ones(1)}, None, "do not fit"),
        (torch.ones(1, 3), {"z": {0: "n"}}, "dynamic_axes names the input"),
        (torch.ones(1, 3), {"input": {5: "n"}}, "has 2 dims"),
    ],
)
def test_wrong_inputs_get_one_line(inputs: Any, axes: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        capture(nn.Linear(3, 2), inputs, axes)


def test_a_failing_capture_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if bool((x > 0).all()) else -x

    with pytest.raises(UnsupportedModel):
        capture(Branch(), torch.randn(2, 3))
    assert capfd.readouterr() == ("", "")


def test_one_of_several_outputs_may_be_written_to() -> None:
    class Router(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            best, chosen = x.topk(2, -1)
            best /= best.sum(-1, keepdim=True)  # fresh values, no view of x
            return best, chosen

    x = torch.rand(3, 5)
    for ours, theirs in zip(capture(Router(), x)(x), Router()(x), strict=True):
        assert torch.equal(ours, theirs)
