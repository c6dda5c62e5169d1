"""A second oracle that knows no labels: zeros written into the producers of the ORIGINAL module.

On networks with f(0) = 0 a channel is as good as gone when its producer's weights and bias are zero, so the module with
those zeros must give what the shrunk Program gives. Nothing of the analysis is used but the parameter dims where the
removed units are minted.
"""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from torch import nn

from kfe_fx.frontend.capture import capture
from kfe_fx.labels.analysis import Analysis, analyze
from kfe_fx.passes.shrink import Shrink
from kfe_fx.plan import Plan
from tests.labels.removals import some
from tests.random_nets import Case, nets, outputs, sample_net

TOLERANCE = 1e-10  # float64


def minted_places(analysis: Analysis, removed: frozenset[int]) -> list[tuple[str, int, list[int]]]:
    """List (parameter, dim, indices) of the removed units in the dims of their groups."""
    found = []
    for group in analysis.groups:
        units = [analysis.units[unit] for unit in group.units if unit in removed]
        for name, dim in group.dims:
            found.append((name, dim, [i for unit in units for i in unit.slices.get(name, {}).get(dim, ())]))
    return found


def silenced(module: nn.Module, places: list[tuple[str, int, list[int]]]) -> nn.Module:
    """Return a copy of the module whose producers give zero at ``places``: their weights there, and their biases."""
    twin = copy.deepcopy(module)
    tensors = dict(twin.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, dim, indices in places:
            weight = tensors[name]
            if indices:
                weight.index_fill_(dim, torch.tensor(indices), 0.0)
            for alias in [alias for alias, value in tensors.items() if value is weight and alias.endswith("weight")]:
                bias = tensors.get(f"{alias.removesuffix('weight')}bias")
                if bias is not None and bias.shape == (weight.shape[dim],):
                    bias[indices] = 0.0
    return twin


def check(case: Case) -> None:
    program = capture(case.module, case.inputs)
    analysis = analyze(program)
    removed = some(analysis, case.description["seed"])
    assert removed
    small = Shrink(Plan.of_units(analysis, removed)).run(program).program
    expected = silenced(case.module, minted_places(analysis, removed))
    inputs = case.make_inputs(3, seed=1) if program.axes else case.inputs
    with torch.no_grad():
        pairs = zip(outputs(expected(*inputs)), outputs(small(*inputs)), strict=True)
        for wanted, found in pairs:
            assert wanted.shape == found.shape
            assert float((wanted - found).abs().max()) <= TOLERANCE * max(1.0, float(wanted.abs().max()))


@given(case=nets(max_blocks=3, zero_preserving=True))
@settings(max_examples=30)
def test_zeroed_producers_equal_the_shrunk_network(case: Case) -> None:
    check(case)


def test_the_oracle_sees_a_unit_that_is_not_zeroed() -> None:
    """Without its zeros the original differs from the shrunk network: the comparison above can fail."""
    case = sample_net(3, zero_preserving=True)
    program = capture(case.module, case.inputs)
    analysis = analyze(program)
    small = Shrink(Plan.of_units(analysis, some(analysis, 0))).run(program).program
    with torch.no_grad():
        wanted, found = outputs(case.module(*case.inputs))[0], outputs(small(*case.inputs))[0]
    assert float((wanted - found).abs().max()) > 1e-3


@pytest.mark.thorough
@pytest.mark.parametrize("chunk", range(20))
def test_thousands(chunk: int) -> None:
    for seed in range(50 * chunk, 50 * (chunk + 1)):
        check(sample_net(seed, zero_preserving=True))
