"""Gates: per-example gradients are sum a * da (T7.1), over members, positions, heads, folded batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kfe_fx.errors import UsageError
from kfe_fx.frontend.capture import capture
from kfe_fx.gates import GATE, gated
from kfe_fx.labels.analysis import analyze
from kfe_fx.passes.insert_gates import InsertGates
from kfe_fx.passes.shrink import Shrink
from kfe_fx.plan import Plan
from tests.criteria.nets import NAMES, expected_gradients, program_of, randomise
from tests.random_nets import outputs as parts_of
from tests.random_nets import sample_net

TARGETS = torch.tensor([0, 2, 1])


def per_example(program, analysis, flat, loss) -> np.ndarray:
    """Gradients by gates, [N, units]: in one batch where the sites allow it, else one example at a time."""
    module = gated(program, analysis)
    count = len(flat[0])
    pieces = [flat] if module.per_example else [[value[n : n + 1] for value in flat] for n in range(count)]
    rows = []
    for start, piece in enumerate(pieces):
        gates = module.ones(len(piece[0]), torch.float64)
        outputs = module.run(piece, gates)
        total = sum(loss(outputs[i : i + 1], start + i) for i in range(len(piece[0])))
        found = torch.autograd.grad(total, gates, allow_unused=True)
        row = np.zeros((len(piece[0]), len(analysis.units)))
        for units, gate, grad in zip(module.units, gates, found, strict=True):
            row[:, list(units)] = torch.zeros_like(gate) if grad is None else grad
        rows.append(row)
    return np.concatenate(rows)


def cross_entropy(outputs, n: int) -> torch.Tensor:
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    return F.cross_entropy(logits, TARGETS[n : n + 1])


@pytest.mark.parametrize("name", NAMES)
def test_gradient_by_the_gate_is_the_sum_of_a_da_for_each_example(name: str):
    program, x = program_of(name)
    analysis = analyze(program)
    assert analysis.units
    expected = expected_gradients(program, analysis, [x], cross_entropy)
    found = per_example(program, analysis, [x], cross_entropy)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("name", "layout"), [("outer", "outer"), ("inner", "inner"), ("plain", "plain")])
def test_folded_batches_are_scored_in_one_run(name: str, layout: str):
    program, _ = program_of(name)
    analysis = analyze(program)
    assert {site.example_layout for site in analysis.gate_sites} == {layout}
    assert gated(program, analysis).per_example


def test_mixed_examples_are_found_and_refused_in_one_batch():
    program, x = program_of("windows")
    module = gated(program, analyze(program))
    assert not module.per_example
    with pytest.raises(UsageError, match="one at a time"):
        module.run([x], module.ones(len(x), torch.float64))


@pytest.mark.parametrize("seed", range(4))
def test_random_networks(seed: int):
    case = sample_net(seed)
    program = capture(case.module, case.inputs, case.dynamic_axes())
    analysis = analyze(program)
    module = gated(program, analysis)
    flat = list(case.make_inputs(2, seed=3))
    generator = torch.Generator().manual_seed(seed)
    weights: dict[int, torch.Tensor] = {}

    def loss(outputs, n: int) -> torch.Tensor:
        first = parts_of(outputs)[0]
        if n not in weights:
            weights[n] = torch.randn(first.shape[1:], dtype=first.dtype, generator=generator)
        return (first[0] * weights[n]).sum()

    expected = expected_gradients(program, analysis, flat, loss)
    if module.per_example:
        gates = module.ones(2, torch.float64)
        first = parts_of(module.run(flat, gates))[0]
        total = loss(first[0:1], 0) + loss(first[1:2], 1)
        grads = torch.autograd.grad(total, gates, allow_unused=True)
        found = np.zeros((2, len(analysis.units)))
        for units, grad in zip(module.units, grads, strict=True):
            found[:, list(units)] = 0 if grad is None else grad
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10 * max(1, np.abs(expected).max()))


def test_gate_behind_a_batch_norm_sees_its_scale_and_shift():
    """T7.2: sum_n d loss_n/d gate = gamma dgamma + beta dbeta."""
    program, x = program_of("residual")
    analysis = analyze(program)
    site = next(site for site in analysis.gate_sites if site.node == "batch_norm")
    norm = program.module().get_submodule("branch_norm")
    shared = [s for s in analysis.gate_sites if set(s.units.tolist()) == set(site.units.tolist()) and s.dim == 1]
    assert len(shared) == 2  # stem and branch are members of one stream
    logits = program(x)
    total = F.cross_entropy(logits, TARGETS, reduction="sum")
    stem = program.module().get_submodule("norm")
    grads = torch.autograd.grad(total, [stem.weight, stem.bias, norm.weight, norm.bias])
    expected = stem.weight * grads[0] + stem.bias * grads[1] + norm.weight * grads[2] + norm.bias * grads[3]
    by_unit = np.zeros(len(analysis.units))
    np.add.at(by_unit, site.units, expected.detach().numpy())
    found = per_example(program, analysis, [x], cross_entropy).sum(0)
    units = np.unique(site.units)
    np.testing.assert_allclose(found[units], by_unit[units], rtol=0, atol=1e-13)


def test_gates_can_be_differentiated_twice():
    program, x = program_of("residual")
    module = gated(program, analyze(program))
    gates = module.ones(1, torch.float64)
    total = F.cross_entropy(module.run([x], gates), TARGETS)
    first = torch.autograd.grad(total, gates, create_graph=True)
    second = torch.autograd.grad(sum(grad.square().sum() for grad in first), gates)
    assert all(bool(torch.isfinite(grad).all()) and bool((grad != 0).any()) for grad in second)


@pytest.mark.parametrize("name", NAMES)
def test_gates_left_out_change_nothing(name: str):
    program, x = program_of(name)
    before = program.hash()
    result = InsertGates().run(program)
    assert result.modified
    assert result.facts["missing"] == {}
    assert program.hash() == before != result.program.hash()
    assert torch.equal(result.program(x), program(x))
    counts = [sum(node.target is GATE for node in graph.nodes) for graph in result.program.graphs.values()]
    assert counts == [result.facts["sites"]] * len(program.graphs)


def test_the_training_graph_is_gated_too():
    program, x = program_of("residual")
    assert set(program.graphs) == {"eval", "train"}
    gates = InsertGates().run(program).program
    widths = [len(group.units) for group in analyze(program).groups]
    zeros = [torch.zeros(1, width, dtype=torch.float64) for width in widths]
    module = gates.train().module()
    assert not torch.equal(module.run_flat([x, *zeros], "train")[0], module.run_flat([x], "train")[0])


def test_a_network_without_units_is_left_alone():
    program = capture(nn.Linear(3, 2), torch.randn(1, 3))
    result = InsertGates().run(program)
    assert not result.modified
    assert result.program is program


class Plain(nn.Module):
    """Nothing moves zero behind a gate, so that a gate at zero is the removal (T7.4)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 6, 3, padding=1)
        self.branch, self.branch_norm = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8 + 6, 4)
        self.side = nn.Conv2d(3, 6, 1)

    def forward(self, x):
        y = F.relu(self.stem_norm(self.stem(x)))
        y = F.relu(y + self.branch_norm(self.branch(F.relu(self.inner(y)))))
        return self.head(torch.cat([y, F.silu(self.side(x))], 1).mean((2, 3)))


def test_gates_at_zero_equal_the_shrunk_network():
    torch.manual_seed(0)
    x = torch.randn(3, 3, 6, 6).double()
    program = capture(randomise(Plain()), x[:1])
    analysis = analyze(program)
    removed = {group.units[i] for group in analysis.groups for i in (0, 2, 3)}
    small = Shrink(Plan.of_units(analysis, removed)).run(program).program
    module = gated(program, analysis)
    gates = [
        torch.tensor([[0.0 if unit in removed else 1.0 for unit in units]], dtype=torch.float64)
        for units in module.units
    ]
    assert (module.run([x], gates) - small(x)).abs().max() < 1e-12
    assert (program(x) - small(x)).abs().max() > 1e-3
