"""Rows of layers: W times what is read is what is given, for every form of linear layer and convolution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kfe_fx.frontend.capture import capture
from kfe_fx.program import Program
from kfe_fx.repair.lines import Lines, live_bytes
from kfe_fx.repair.rows import Reader, reader_of, uses_of

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(5, 3), (4, 5)),
    "linear of tokens": (nn.Linear(5, 3, bias=False), (4, 6, 5)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (3, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(1, 2)), (3, 4, 8, 9)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, bias=False), (3, 4, 6, 6)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding=1), (3, 4, 6, 6)),
    "same": (nn.Conv2d(3, 4, 4, padding="same"), (3, 3, 7, 7)),
    "conv3d": (nn.Conv3d(2, 3, 2, dilation=2), (3, 2, 5, 4, 4)),
}


def readers_in(program: Program) -> list[Reader]:
    uses = uses_of(program)
    return [found for node in program.graphs["eval"].nodes if (found := reader_of(node, program, uses)) is not None]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("count", [7, 10_000])
def test_weights_times_rows_are_outputs(name: str, count: int):
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    x = torch.randn(shape, dtype=torch.float64)
    program = capture(nn.Sequential(layer.double()), x[:1])
    (reader,) = readers_in(program)
    given = layer(x)
    read, wanted = reader.rows(x, given, count, torch.Generator().manual_seed(0))
    weight = reader.pairing.matrix(layer.weight)
    made = read @ weight.mT
    if layer.bias is not None:
        made = made + layer.bias.reshape(len(weight), 1, -1)
    torch.testing.assert_close(made, wanted, rtol=1e-12, atol=1e-12)
    positions = given.numel() // len(layer.weight)  # type: ignore[arg-type]
    assert min(count, positions) <= read.shape[1] <= min(count + len(x), positions)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.shared = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        self.table = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)).relu().mean((2, 3))
        y = self.shared(self.shared(y).relu())
        return self.head(torch.nn.functional.linear(y, self.table * 2))


def test_what_may_be_fitted():
    program = capture(Net().eval(), torch.randn(2, 3, 6, 6))
    assert [(one.weight, one.bias, one.mean) for one in readers_in(program)] == [
        ("conv.weight", None, "norm.running_mean"),
        ("head.weight", "head.bias", None),
    ]


def test_lines_run_the_network_and_drop_what_is_not_needed():
    torch.manual_seed(0)
    program = capture(Net().double().eval(), torch.randn(2, 3, 6, 6).double())
    batches = [[torch.randn(3, 3, 6, 6).double()] for _ in range(2)]
    lines = Lines(program, batches)
    nodes = list(program.graphs["eval"].nodes)
    with torch.no_grad():
        held = lines.reach(nodes[-2].name)
        assert held is not None
        for value, batch in zip(held, batches, strict=True):
            torch.testing.assert_close(value, program(batch[0]), rtol=0, atol=0)
        assert lines.reach(nodes[0].name) is None  # nobody needs the input any more
        assert lines.reach("no such node") is None
        assert list(lines._held) == [nodes[-2]]


def test_live_bytes_count_what_lives_at_one_time():
    program = capture(nn.Sequential(nn.Linear(10, 100), nn.ReLU(), nn.Linear(100, 10)).eval(), torch.randn(2, 10))
    found = live_bytes(program, [torch.randn(8, 10)])
    assert 2 * 8 * 100 * 4 <= found <= 8 * (10 + 2 * 100) * 4
