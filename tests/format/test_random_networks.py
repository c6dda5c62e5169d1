from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from kfe_fx.format import load, save
from kfe_fx.frontend.capture import capture
from tests.random_nets import outputs, sample_net

NETS = 200 if os.environ.get("KFE_FX_THOROUGH", "") not in ("", "0") else 3


@pytest.mark.parametrize("seed", range(NETS))
def test_random_networks_come_back(seed: int, tmp_path: Path):
    case = sample_net(seed)
    program = capture(case.module, case.inputs)
    again = load(save(program, tmp_path / "x.pt"))
    assert again.hash() == program.hash()
    for mode in (False, True):
        torch.manual_seed(seed)
        expected = outputs(program.train(mode)(*case.inputs))
        torch.manual_seed(seed)
        for one, other in zip(outputs(again.train(mode)(*case.inputs)), expected, strict=True):
            assert torch.equal(one, other)
