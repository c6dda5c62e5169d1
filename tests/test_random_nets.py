"""The generator of random networks itself: what it draws runs, exports, rebuilds and is what it says it is."""

from __future__ import annotations

import ast
import os
from typing import Any

import pytest
import torch
from hypothesis import find, given, settings
from torch import nn

from tests.random_nets import FAMILIES, STEPS, Case, RandomNet, nets, outputs, sample_net

THOROUGH = os.environ.get("KFE_FX_THOROUGH", "") not in ("", "0")


@pytest.fixture(scope="module")
def sample() -> list[Case]:
    return [sample_net(seed) for seed in range(300 if THOROUGH else 60)]


def export(case: Case) -> Any:
    """Export with a dynamic batch, as a program is captured."""
    shapes = tuple({0: torch.export.Dim.DYNAMIC} for _ in case.inputs)
    return torch.export.export(case.module, case.inputs, dynamic_shapes=shapes, strict=False)


def check_export(case: Case) -> None:
    """Compare the exported graph with the network at another batch size."""
    inputs = case.make_inputs(3)
    exported = export(case).module(check_guards=False)
    with torch.no_grad():
        for a, b in zip(outputs(case.module(*inputs)), outputs(exported(*inputs)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def check_training(case: Case) -> None:
    """Run forward and backward in train mode; where there is time, export there too."""
    case.module.train()
    total = torch.stack([out.sum() for out in outputs(case.module(*case.make_inputs(3)))]).sum()
    total.backward()
    assert torch.isfinite(total)
    if THOROUGH:
        export(case)
    case.module.eval()


@settings(max_examples=1000 if THOROUGH else 60)
@given(case=nets())
def test_nets_run_at_other_batches_and_leave_their_inputs_alone(case: Case) -> None:
    for batch in (2, 3):
        inputs = case.make_inputs(batch)
        before = [x.clone() for x in inputs]
        with torch.no_grad():
            outs = outputs(case.module(*inputs))
        assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
        assert all(out.dtype == torch.float64 and out.shape[0] == batch for out in outs)
        assert all(torch.isfinite(out).all() for out in outs)
        alone = outputs(case.module(*(x[:1] for x in inputs)))
        # examples do not see each other, except through a batch norm without running statistics
        if all(
            m.running_mean is not None for m in case.module.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)
        ):
            for a, b in zip(alone, outs, strict=True):
                torch.testing.assert_close(a[0], b[0], rtol=0, atol=1e-9)


def test_a_description_printed_and_read_gives_the_same_network_to_the_bit(sample: list[Case]) -> None:
    for case in sample[:30]:
        printed = repr(case).removeprefix("RandomNet(").removesuffix(")")
        state = torch.random.get_rng_state()
        again = RandomNet(ast.literal_eval(printed))
        assert torch.equal(state, torch.random.get_rng_state())  # the global generator is not touched
        assert list(again.state_dict()) == list(case.module.state_dict())
        for a, b in zip(again.state_dict().values(), case.module.state_dict().values(), strict=True):
            assert torch.equal(a, b)
        with torch.no_grad():
            for a, b in zip(outputs(again(*case.inputs)), outputs(case.module(*case.inputs)), strict=True):
                assert torch.equal(a, b)


def test_a_seed_gives_the_same_network_each_time() -> None:
    assert repr(sample_net(5)) == repr(sample_net(5))
    assert len({repr(sample_net(seed)) for seed in range(20)}) == 20


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_drawn_runs_exports_and_trains(family: str) -> None:
    wanted = {family, "activation"} if STEPS[family].nests else {family}
    cases = (sample_net(seed, max_blocks=1, families=wanted) for seed in range(200))
    case = next(case for case in cases if family in case.families)
    assert case.module.healthy()
    check_export(case)
    check_training(case)


@pytest.mark.thorough
def test_nearly_every_net_exports_and_every_family_occurs() -> None:
    failures: list[str] = []
    families: set[str] = set()
    for seed in range(300):
        case = sample_net(10_000 + seed)
        families |= case.families
        try:
            check_export(case)
            check_training(case)
        except (RuntimeError, AssertionError, ValueError) as error:
            failures.append(f"{case!r}: {error}")
    assert len(failures) <= 3, failures
    assert not set(FAMILIES) - families


def test_outputs_are_neither_tiny_nor_huge_nor_the_same_for_all_examples(sample: list[Case]) -> None:
    sick = [case for case in sample if not case.module.healthy()]
    assert len(sick) <= len(sample) // 60, sick


def test_no_parameter_or_statistic_keeps_its_default(sample: list[Case]) -> None:
    for case in sample:
        for name, p in case.module.named_parameters():
            assert ((p != 0) & (p != 1)).all(), name
        for name, b in case.module.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                assert ((b != 0) & (b != 1)).all(), name


def test_what_is_called_removable_is_a_parameter_with_something_to_remove(sample: list[Case]) -> None:
    for case in sample:
        parameters = dict(case.module.named_parameters())
        assert case.removable
        assert all(parameters[name].shape[dim] > 1 for name, dim in case.removable)


@settings(max_examples=500 if THOROUGH else 40)
@given(case=nets(zero_preserving=True))
def test_zero_preserving_nets_map_zero_to_zero_when_no_contraction_has_a_bias(case: Case) -> None:
    """f(0) = 0 for the blocks: what a zeroed producer sends reaches its consumers as zeros."""
    module = case.module
    assert case.zero_preserving
    for owner in module.modules():
        if isinstance(owner, nn.MultiheadAttention | nn.Linear | nn.modules.conv._ConvNd):
            for name, p in owner.named_parameters(recurse=False):
                if "bias" in name:
                    nn.init.zeros_(p)
    if hasattr(module, "embedding"):
        nn.init.zeros_(module.embedding.weight)
    zeros = [x if x.dtype == torch.int64 else torch.zeros_like(x) for x in case.inputs]
    with torch.no_grad():
        assert all((out == 0).all() for out in outputs(module(*zeros)))


@pytest.mark.thorough
def test_failing_networks_shrink() -> None:
    case = find(nets(), lambda case: "glu" in case.families, settings=settings(max_examples=300))
    assert case.description["blocks"] == [[("glu", {"hidden": 2, "style": "glu"})]]


def test_only_the_wanted_families_are_drawn() -> None:
    for seed in range(20):
        case = sample_net(seed, families=("conv", "residual"))
        assert case.families & set(FAMILIES) <= {"conv", "residual"}
    with pytest.raises(ValueError, match="no such families: konv"):
        sample_net(0, families=["konv"])
