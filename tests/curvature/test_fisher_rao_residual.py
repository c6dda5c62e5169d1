"""The Fisher-Rao norm of a residual network with batch norms, against gradients of one example at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kfe_fx
from kfe_fx.data.dataset import ArrayData
from kfe_fx.program import Program

from .dense import columns, gradients


class Block(nn.Module):
    """Two convolutions around which the input is added; a projection where its shape changes."""

    def __init__(self, wide: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(wide, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        same = stride == 1 and wide == out
        self.short = nn.Identity() if same else nn.Sequential(nn.Conv2d(wide, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.short(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers = nn.Conv2d(1, 3, 3, padding=1), nn.Sequential(Block(3, 3, 1), Block(3, 4, 2))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def made() -> tuple[nn.Module, Program, Tensor, Tensor]:
    torch.manual_seed(0)
    module, x = ResNet().double(), torch.randn(5, 1, 6, 6).double()
    module(3 * torch.randn(20, 1, 6, 6).double() + 1)  # statistics that are not those of a fresh network
    return module.eval(), kfe_fx.capture(module, (x[:2],)), x, torch.tensor([0, 1, 2, 1, 0])


@pytest.mark.parametrize("source", ["exact", "empirical"])
def test_a_residual_network(made: tuple[nn.Module, Program, Tensor, Tensor], source: str) -> None:
    module, program, x, y = made
    before = {name: value.clone() for name, value in program.state_dict().items()}
    found = kfe_fx.curvature.fisher_rao_norm(program, ArrayData((x,), y), "cross-entropy", source=source, batch_size=2)
    rows = columns(module, x) if source == "exact" else gradients(module, x, y)
    theta = dict(module.named_parameters())
    inner = torch.stack([(rows[name] * theta[name].detach()).flatten(1).sum(1) for name in rows]).sum(0)
    assert set(rows) == set(theta)
    assert found.squared == pytest.approx(float(inner.square().sum()) / 5, rel=1e-10)
    assert (found.missing, found.skipped, found.examples, found.source) == ((), 0, 5, source)
    assert all(torch.equal(value, before[name]) for name, value in program.state_dict().items())
