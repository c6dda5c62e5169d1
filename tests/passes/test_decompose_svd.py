"""Pass ``decompose-svd``: two factors a layer, in the graph and in the file, and what it refuses."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import kfe_fx
from kfe_fx.cost.device import Device
from kfe_fx.cost.probes import fingerprint
from kfe_fx.cost.profile import Profile
from kfe_fx.errors import UsageError
from kfe_fx.frontend.capture import capture
from kfe_fx.lowrank import apply, measure
from kfe_fx.lowrank.finding import find_layers
from kfe_fx.passes.decompose_svd import DecomposeSvd
from kfe_fx.passes.pipeline import Pipeline
from kfe_fx.program import Program
from kfe_fx.runtime.onnx_file import onnx_bytes
from kfe_fx.runtime.parity import parity

DEVICE = Device(fingerprint(1, "fp32"), Profile(block=4, conv_kernel=1.0, kernel=1.0, call=1.0), step=4)
RANK = 4


class Net(nn.Module):
    """A convolution and a linear layer of rank 4, one of full rank, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.full = nn.Conv2d(4, 16, 3, stride=2, padding=1), nn.Conv2d(16, 16, 3)
        self.hidden, self.head = nn.Linear(16, 16), nn.Linear(16, 3)
        with torch.no_grad():
            for layer in (self.low, self.hidden):
                flat = torch.randn(16, RANK) @ torch.randn(RANK, layer.weight[0].numel()) / 8
                layer.weight.copy_(flat.reshape(layer.weight.shape))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.full(torch.tanh(self.low(x))))
        return self.head(torch.relu(self.hidden(x.mean((2, 3)))))


@cache
def known() -> tuple[Program, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.randn(12, 4, 9, 9, dtype=torch.float64)
        return capture(Net().double().eval(), x[:2]), x


@pytest.mark.parametrize("of", ["weights", "outputs"])
def test_what_has_low_rank_becomes_two_factors_and_computes_the_same(of: str) -> None:
    program, x = known()
    result = DecomposeSvd(data=x, of=of, importance=1e-9, device=DEVICE).run(program)
    assert {name: told["operations"] for name, told in result.facts["layers"].items()} == {
        "low": [RANK, 16],
        "hidden": [RANK, 16],
    }
    assert "full" in result.facts["left"]
    assert result.facts["loss"] < 1e-12
    with torch.no_grad():
        assert float((result.program(x) - program(x)).abs().max()) <= 1e-7  # of outputs: a root of eps
    assert [name for name in result.program.state_dict() if name.startswith("low")] == [
        "low.0.weight", "low.1.weight", "low.1.bias",
    ]  # fmt: skip
    assert find_layers(result.program).layers[0].core.shape == (RANK, 4, 3, 3)


def test_the_file_computes_what_the_program_does(tmp_path: Path) -> None:
    program = capture(Net().eval(), torch.randn(2, 4, 9, 9))
    small = DecomposeSvd(ratio=0.6, metric="macs").run(program).program
    report = parity(small, onnx_bytes(small))
    assert report.ok, report
    kfe_fx.save(small, tmp_path / "small.pt")
    assert kfe_fx.load(tmp_path / "small.pt").hash() == small.hash()


def test_time_is_a_choice_among_ranks() -> None:
    program, _ = known()
    facts = DecomposeSvd(time=0.8, device=DEVICE).run(program).facts
    whole, left = facts["predicted_ms"]
    assert left <= 0.8 * whole
    assert facts["layers"]["low"]["ranks"][0] == 4  # all columns stay


def test_eigenbases_take_over_what_singular_directions_began() -> None:
    """A pair of a convolution and a matrix gets what it lacks, on the other side."""
    program, x = known()
    pair = DecomposeSvd(ratio=0.4, layers="full", metric="params").run(program).program
    layer = next(each for each in find_layers(pair).layers if each.name == "full")
    held = measure(pair, x, [layer], source="sampled")
    triple = apply(pair, held, {"full": (8, layer.rows - 2)})
    after = next(each for each in find_layers(triple).layers if each.name == "full")
    assert [op.weight for op in after.ops] == ["full.0.weight", "full.1.weight", "full.2.weight"]
    assert (after.columns, after.rows, after.kernel) == (8, layer.rows - 2, (3, 3))
    same = apply(pair, held, {"full": (layer.columns, layer.rows)}, whole=True)
    with torch.no_grad():
        assert float((same(x) - pair(x)).abs().max()) <= 1e-12


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("decompose-svd", "give one of ratio, importance and time, such as decompose-svd{ratio=0.5}"),
        ("decompose-svd{ratio=0.5 of=rows}", "of is weights or outputs, got 'rows'"),
        ("decompose-svd{ratio=0.5 layers=x}", "layers='x' matches no layer"),
        ("decompose-svd{ratio=0.5 of=outputs}", "there are no examples to measure on"),
        ("decompose-svd{ratio=7}", "ratio is between 0 and 1, got 7"),
    ],
)
def test_what_means_nothing_is_one_line(text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        Pipeline.from_text(text).run(known()[0])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
