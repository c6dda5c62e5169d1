"""Tied weights stand in an ONNX model once; what runs, and what is quantised, is as before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from kfe_fx import capture, export
from kfe_fx.program import Program
from kfe_fx.runtime.inputs import feeds
from kfe_fx.runtime.onnx_file import onnx_bytes
from kfe_fx.runtime.parity import parity
from kfe_fx.runtime.quantise import int8
from kfe_fx.runtime.shared_weights import fold_transposes


class Tied(nn.Module):
    """An embedding that is the output layer too, a matrix used both ways round, and a plain one."""

    def __init__(self, sequence: bool) -> None:
        super().__init__()
        self.sequence = sequence
        self.table = nn.Embedding(11, 6)
        self.code, self.plain = nn.Parameter(torch.randn(4, 6)), nn.Linear(6, 6)
        self.out = nn.Linear(6, 11)
        self.out.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.plain(self.table(x)))
        h = h + torch.relu(nn.functional.linear(h, self.code)) @ self.code
        return self.out(h if self.sequence else h.mean(1))


@pytest.fixture(params=[True, False], ids=["tokens", "pooled"])
def program(request: pytest.FixtureRequest) -> Program:
    torch.manual_seed(0)
    return capture(Tied(request.param).eval(), torch.randint(0, 11, (2, 5)))


def stored(model: bytes) -> int:
    tensors = onnx.load_from_string(model).graph.initializer
    return sum(array.size for array in map(numpy_helper.to_array, tensors) if np.issubdtype(array.dtype, np.floating))


def test_tied_weights_are_stored_once(program: Program, tmp_path: Path):
    shared, apart = onnx_bytes(program), onnx_bytes(program, share=False)
    parameters = sum(value.numel() for value in program.module().parameters())
    assert stored(shared) == parameters < stored(apart)
    assert parity(program, shared).ok
    export(program, tmp_path / "model.onnx")
    assert stored((tmp_path / "model.onnx").read_bytes()) == parameters
    onnx.checker.check_model(onnx.load_from_string(shared), full_check=True)


def test_the_quantiser_finds_the_weights(program: Program):
    shared, apart = onnx_bytes(program), onnx_bytes(program, share=False)
    folded = onnx.load_from_string(shared)
    fold_transposes(folded)
    assert stored(folded.SerializeToString()) == stored(apart)
    assert parity(program, folded.SerializeToString()).ok
    each = [feeds(program, 2, seed) for seed in range(3)]
    kinds = []
    for model in (shared, apart):
        tensors = onnx.load_from_string(int8(model, each)).graph.initializer
        kinds.append(sorted(str(numpy_helper.to_array(tensor).dtype) for tensor in tensors))
    assert kinds[0] == kinds[1]
    assert kinds[0].count("int8") >= 3


def test_nothing_is_shared_where_nothing_is_tied():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()
    program = capture(net, torch.randn(2, 4))
    assert onnx_bytes(program) == onnx_bytes(program, share=False)
