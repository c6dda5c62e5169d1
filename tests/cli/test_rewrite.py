"""`kfe-fx rewrite`: passes as text, from a program file to a program file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import kfe_fx
from kfe_fx.cli.main import cli
from kfe_fx.recurrent.op import RECURRENT, Arguments


class Net(nn.Module):
    """A recurrent layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.LSTM(3, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x)[0][:, -1])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    sample = (torch.randn(32, 6, 3), torch.randint(2, (32,)))
    kfe_fx.save(kfe_fx.capture(Net(), sample[0][:2]), path=tmp_path / "net.pt", calibration=sample)
    return tmp_path / "net.pt"


def calls(path: Path) -> list[Arguments]:
    found = kfe_fx.load(path).graphs["eval"].find_nodes(op="call_function", target=RECURRENT)
    return [Arguments.of(node) for node in found]


def test_a_trained_network_is_normalised_pooled_and_folded_back(model: Path, tmp_path: Path) -> None:
    normal, plain = tmp_path / "normal.pt", tmp_path / "plain.pt"
    result = CliRunner().invoke(cli, ["rewrite", str(model), "batchnorm-recurrent{mode=full}", "-o", str(normal)])
    assert result.exit_code == 0, result.output
    assert "layer.l0" in result.output
    assert all(call.normalised for call in calls(normal))
    steps = "finalise-recurrent,fold-recurrent-batchnorm"
    result = CliRunner().invoke(cli, ["rewrite", str(normal), steps, "-o", str(plain), "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.output)
    assert told["passes"] == steps
    assert told["modified"]
    assert not any(call.normalised for call in calls(plain))
    x = torch.randn(4, 9, 3)
    with torch.no_grad():
        assert float((kfe_fx.load(plain)(x) - kfe_fx.load(model)(x)).abs().max()) <= 1e-6


@pytest.mark.parametrize(
    ("passes", "words"),
    [
        ("batchnorm", "there is no pass 'batchnorm'"),
        ("batchnorm-recurrent{mode=both}", "mode"),
        ("batchnorm-recurrent{mode=full", "cannot read the passes"),
    ],
)
def test_what_cannot_run_leaves_no_file(model: Path, tmp_path: Path, passes: str, words: str) -> None:
    target = tmp_path / "out.pt"
    result = CliRunner().invoke(cli, ["rewrite", str(model), passes, "-o", str(target)])
    assert isinstance(result.exception, kfe_fx.UsageError)
    assert words in str(result.exception)
    assert not target.exists()


def test_a_misspelt_pass_is_found_before_data_is_loaded(model: Path, tmp_path: Path) -> None:
    missing = ["--data", str(tmp_path / "none.npz"), "-o", str(tmp_path / "out.pt")]
    for passes, error in (("batchnorm-recurent", kfe_fx.UsageError), ("batchnorm-recurrent", kfe_fx.BadData)):
        assert isinstance(CliRunner().invoke(cli, ["rewrite", str(model), passes, *missing]).exception, error)


def test_examples_of_the_command_line_go_before_the_sample_of_the_file(model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "longer.npz", x=np.random.default_rng(0).normal(size=(16, 9, 3)).astype(np.float32))
    words = ["rewrite", str(model), "batchnorm-recurrent{mode=full}", "-o", str(tmp_path / "out.pt"), "--json"]
    result = CliRunner().invoke(cli, [*words, "--data", str(tmp_path / "longer.npz")])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["facts"]["batchnorm-recurrent"]["layers"] == {"layer.l0": 9}
