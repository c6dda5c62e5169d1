from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kfe_fx.format import save
from kfe_fx.frontend.capture import capture
from kfe_fx.passes.prune import prune
from kfe_fx.program import Program
from tests.format.nets import Attention, Convolutional, Streaming, Wide, examples

NETS = {"convolutional": Convolutional, "attention": Attention, "wide": Wide, "streaming": Streaming}


@pytest.fixture(scope="session")
def programs() -> dict[str, Program]:
    torch.manual_seed(0)
    nets = {name: make() for name, make in NETS.items()}
    axes = {"ids": {0: "batch", 1: "time"}}
    made = {name: capture(net, examples(net), axes if name == "attention" else None) for name, net in nets.items()}
    smaller = prune(made["streaming"], budget=0.5, metric="widths", criterion="magnitude", resize_state=True)
    return made | {"streaming": smaller.program}


@pytest.fixture(scope="session")
def saved(programs: dict[str, Program], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("saved")
    sample = (torch.randn(4, 3, 6, 6), torch.arange(4))
    return {
        name: save(program, folder / f"{name}.pt", calibration=sample if name == "convolutional" else None)
        for name, program in programs.items()
    }
