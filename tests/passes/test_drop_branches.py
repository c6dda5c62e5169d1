"""Pass ``drop-branches`` against source modules that were silenced by hand, and against the masked original."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import kfe_fx
from kfe_fx.errors import PlanError, UsageError
from kfe_fx.frontend.capture import capture
from kfe_fx.labels.analysis import analyze
from kfe_fx.labels.branches import examine, find_branches
from kfe_fx.labels.joins import NoBranch
from kfe_fx.labels.oracle import run_masked
from kfe_fx.passes.capture_curvature import CaptureCurvature
from kfe_fx.passes.drop_branches import DropBranches, measure_branch_means
from kfe_fx.passes.proof import check_masked
from kfe_fx.passes.shrink import Shrink
from kfe_fx.plan import Plan
from kfe_fx.program import Program
from kfe_fx.runtime.onnx_file import onnx_bytes
from kfe_fx.runtime.parity import parity
from tests.labels.removals import some
from tests.labels.test_masked_equals_shrunk import inputs_of
from tests.passes.branch_nets import (
    FAMILIES,
    IMAGE,
    SEQUENCE,
    WIDTH,
    Basic,
    Bottleneck,
    ConvNeXt,
    DenseBlock,
    Family,
    Images,
    Inverted,
    Paths,
    PreActivation,
    Sequences,
    filled,
    silent,
)
from tests.random_nets import FAMILIES as RANDOM
from tests.random_nets import Case, nets

TOLERANCE = 1e-12  # float64


def example(shape: tuple[int, ...], batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def captured(family: Family, network: nn.Module) -> Program:
    axes: Any = {"x": {0: "batch", 1: "time"}} if family.time else None
    return capture(network, example(family.shape), axes)


def inputs(family: Family) -> list[Tensor]:
    """Draw inputs of several batch sizes and, where that is dynamic, lengths."""
    shapes = [(1, family.shape), (2, family.shape), (5, family.shape)]
    if family.time:
        shapes += [(2, (3, *family.shape[1:])), (3, (9, *family.shape[1:]))]
    return [example(shape, batch, seed=batch) for batch, shape in shapes]


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= TOLERANCE * max(1.0, float(expected.abs().max()))


CASES = [(name, branch) for name, family in FAMILIES.items() for branch in family.branches]


@pytest.mark.parametrize(("name", "branch"), CASES)
def test_one_branch_against_the_silent_module(name: str, branch: str) -> None:
    family = FAMILIES[name]
    network = filled(family.make())
    program = captured(family, network)
    small = DropBranches((branch,)).run(program).program
    expected = silent(network, [family.branches[branch]])
    for x in inputs(family):
        with torch.no_grad():
            assert_equal(small(x), expected(x))
            assert float((expected(x) - network(x)).abs().max()) > 1e-6  # so that the comparison says something


@pytest.mark.parametrize("name", FAMILIES)
def test_all_branches_at_once(name: str) -> None:
    """Those inside others go with them."""
    family = FAMILIES[name]
    network = filled(family.make())
    program = captured(family, network)
    small = DropBranches(tuple(family.branches)).run(program).program
    expected = silent(network, family.branches.values())
    for x in inputs(family):
        with torch.no_grad():
            assert_equal(small(x), expected(x))
    assert not find_branches(analyze(small))


@pytest.mark.parametrize(("name", "branch"), CASES)
def test_it_equals_the_masked_original(name: str, branch: str) -> None:
    """The oracle of the pruner knows the result as it is: the same units, the same masks."""
    family = FAMILIES[name]
    program = captured(family, filled(family.make()))
    analysis = analyze(program)
    (found,) = [each for each in find_branches(analysis) if each.name == branch]
    result = DropBranches((branch,)).run(program)
    assert result.facts["parameters"] == found.saved
    assert check_masked(analysis, result.program, found.units, seed=0) <= TOLERANCE


BLOCKS = (Basic, Bottleneck, lambda: Bottleneck(gated=True), PreActivation, Inverted, ConvNeXt, Paths, DenseBlock)


@given(
    blocks=st.lists(st.sampled_from(range(len(BLOCKS))), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
    data=st.data(),
)
@settings(max_examples=10)
def test_drawn_residual_networks(blocks: list[int], seed: int, data: st.DataObject) -> None:
    """Any choice of branches; the silent module knows nothing but the names of layers."""
    hows = {0: ("basic", 0), 1: ("bottleneck", 0), 2: ("gated bottleneck", 0), 3: ("pre-activation", 0)}
    hows |= {4: ("inverted", 0), 5: ("convnext", 0), 6: ("paths", 0), 7: ("dense", 0)}
    network = filled(Images(*(BLOCKS[kind]() for kind in blocks)), seed)
    program = capture(network, example(IMAGE))
    known = {
        branch.replace("blocks.0", f"blocks.{place}", 1): (place, FAMILIES[hows[kind][0]].branches[branch])
        for place, kind in enumerate(blocks)
        for branch in FAMILIES[hows[kind][0]].branches
        if branch.startswith("blocks.0")
    }
    assert {branch.name for branch in find_branches(analyze(program))} == set(known)
    chosen = data.draw(st.lists(st.sampled_from(sorted(known)), min_size=1, unique=True))
    small = DropBranches(tuple(chosen)).run(program).program
    expected = copy.deepcopy(network)
    for name in chosen:
        place, silence = known[name]
        block = Images(network.get_submodule(f"blocks.{place}"))  # under the name that the silence knows
        twin = silent(block, [silence])
        merged = expected.get_submodule(f"blocks.{place}").state_dict()
        with torch.no_grad():
            for key, value in twin.get_submodule("blocks.0").state_dict().items():
                merged[key].mul_(value != 0)
    for batch in (1, 3):
        x = example(IMAGE, batch, seed)
        with torch.no_grad():
            assert_equal(small(x), expected(x))


RESIDUAL = {name for name in RANDOM if any(word in name for word in ("residual", "dense", "squeeze", "attention"))}
RESIDUAL |= {"linear", "layer-norm", "conv-bn-act", "mlp", "concat", "inverted-residual"} & set(RANDOM)


@pytest.mark.parametrize("families", [None, frozenset(RESIDUAL)], ids=["all", "residual"])
@given(case=nets(max_blocks=3))
@settings(max_examples=10)
def test_random_networks(families: frozenset[str] | None, case: Case) -> None:
    program = capture(case.module, case.inputs)
    analysis = analyze(program)
    found = find_branches(analysis)
    sets = [(branch.name,) for branch in found] + ([tuple(branch.name for branch in found)] if len(found) > 1 else [])
    units = {branch.name: branch.units for branch in found}
    for names in sets:
        try:
            small = DropBranches(names).run(program).program
        except NoBranch:
            assert len(names) > 1  # nothing would be left
            continue
        gone = examine(analysis, frozenset().union(*(units[name] for name in names))).units
        for batch in (1, 3):
            flat = inputs_of(program, batch, case.description["seed"])
            with torch.no_grad():
                pairs = zip(small.module().run_flat(flat), run_masked(analysis, gone, flat), strict=True)
            for ours, masked in pairs:
                assert_equal(ours, masked)


# what the result is --------------------------------------------------------------------------------------------------


@pytest.fixture
def network() -> nn.Module:
    return filled(FAMILIES["basic"].make())


@pytest.fixture
def program(network: nn.Module) -> Program:
    return capture(network, example(IMAGE))


def test_the_state_of_the_result(network: nn.Module, program: Program) -> None:
    result = DropBranches(("blocks.0.conv2",)).run(program)
    state, before = result.program.state_dict(), network.state_dict()
    gone = [name for name in before if name.startswith("blocks.0.")]
    assert state.keys() == before.keys() - set(gone) | {"blocks.0.constant"}
    for name in state.keys() - {"blocks.0.constant"}:
        assert torch.equal(state[name], before[name])
    named = dict(result.program.module().named_parameters())
    assert named["blocks.0.constant"].shape == (WIDTH, 1, 1)
    assert named["blocks.0.constant"].dtype == torch.float64
    assert named["blocks.0.constant"].requires_grad
    assert result.modified
    assert result.program.lineage == ("drop-branches",)
    assert result.program.notes == program.notes
    assert result.program.axes == program.axes
    saved = sum(network.state_dict()[name].numel() for name, _ in network.named_parameters() if name in gone) - WIDTH
    assert result.facts == {"dropped": ["blocks.0.conv2"], "parameters": saved, "constants": 1, "zero": 0}


def test_the_input_is_not_touched(program: Program) -> None:
    text, state = program.hash(), copy.deepcopy(program.state_dict())
    result = DropBranches(("blocks.0.conv2",)).run(program)
    with torch.no_grad():
        for value in result.program.module().parameters():
            value.fill_(0)
    assert program.hash() == text != result.program.hash()
    assert program.lineage == ()
    assert program.state_dict().keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(program.state_dict()[name], value), name


def test_nothing_to_drop(program: Program) -> None:
    result = DropBranches().run(program)
    assert not result.modified
    assert result.program is program


def test_a_name_that_is_none(program: Program) -> None:
    with pytest.raises(PlanError, match=r"no branch 'stem'.*blocks\.0\.conv2, blocks\.1\.conv2"):
        DropBranches(("stem",)).run(program)


def test_the_second_of_two_passes(network: nn.Module, program: Program) -> None:
    once = DropBranches(("blocks.0.conv2",)).run(program).program
    twice = DropBranches(("blocks.1.conv2",)).run(once).program
    both = DropBranches(("blocks.0.conv2", "blocks.1.conv2")).run(program).program
    assert twice.lineage == ("drop-branches", "drop-branches")
    assert twice.state_dict().keys() == both.state_dict().keys()
    x = example(IMAGE, 3)
    with torch.no_grad():
        assert_equal(twice(x), both(x))


@pytest.mark.parametrize("name", ["basic", "gated bottleneck", "dense", "packed attention", "encoder, norm last"])
def test_the_file_and_onnx(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    branch = list(family.branches)[-1]
    small = DropBranches((branch,)).run(captured(family, filled(family.make()))).program
    path = kfe_fx.save(small, tmp_path / "small.pt")
    again = kfe_fx.load(path)
    assert again.hash() == small.hash()
    assert again.lineage == small.lineage
    assert again.state_dict().keys() == small.state_dict().keys()
    x = example(family.shape, 3, seed=7)
    with torch.no_grad():
        assert torch.equal(again(x), small(x))
    single = small.copy()
    single.module().float()
    single.example_inputs = ((example(family.shape, dtype=torch.float32),), {})
    report = parity(single, onnx_bytes(single))
    assert report.ok
    assert len({size["batch"] for size in report.sizes}) > 1
    assert not report.untested


@pytest.mark.parametrize("name", ["basic", "stochastic depth", "dense", "packed attention", "encoder, norm first"])
def test_the_training_graph(name: str) -> None:
    """In training it is the network with the constant in place of the branch; the constant is trained too."""
    family = FAMILIES[name]
    branch = next(iter(family.branches))
    small = DropBranches((branch,)).run(captured(family, filled(family.make()))).program.train()
    assert ("train" in small.graphs) == (name != "packed attention")  # which trains as it evaluates
    constants = [name for name in small.state_dict() if name.rpartition(".")[2].startswith("constant")]
    assert len(constants) == (name != "dense")
    before = copy.deepcopy(small.state_dict())
    optimizer = torch.optim.SGD(small.module().parameters(), lr=0.1)
    small(example(family.shape, 6)).square().mean().backward()
    for parameter in small.module().parameters():
        assert parameter.grad is not None
    optimizer.step()
    for constant in constants:
        assert not torch.equal(small.state_dict()[constant], before[constant])


class WithConstant(nn.Module):
    """What a dropped block is, by hand."""

    def __init__(self, constant: Tensor) -> None:
        super().__init__()
        self.constant = nn.Parameter(constant)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.constant)


def test_a_training_step_of_a_network_built_by_hand(network: nn.Module, program: Program) -> None:
    small = DropBranches(("blocks.0.conv2",)).run(program).program.train()
    expected = copy.deepcopy(network)
    with torch.no_grad():
        constant = network.get_submodule("blocks.0.bn2")(torch.zeros(1, WIDTH, 1, 1, dtype=torch.float64))[0]
    blocks = expected.get_submodule("blocks")
    blocks._modules["0"] = WithConstant(constant)
    expected.train()
    for module in (small.module(), expected):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        module(example(IMAGE, 6)).square().mean().backward()
        optimizer.step()
    assert small.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], value, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["basic", "gated inverted", "dense", "paths", "packed attention", "recurrent"])
def test_the_result_is_shrunk_as_any_other(name: str) -> None:
    family = FAMILIES[name]
    program = captured(family, filled(family.make()))
    small = DropBranches((next(iter(family.branches)),)).run(program).program
    analysis = analyze(small)
    removed = some(analysis)
    assert removed
    smaller = Shrink(Plan.of_units(analysis, removed)).run(small).program
    assert check_masked(analysis, smaller, removed, seed=0) <= TOLERANCE
    cut = {name for name, value in smaller.state_dict().items() if value.shape != small.state_dict()[name].shape}
    if name == "basic":
        assert "blocks.0.constant" in cut  # it follows the width of the stream


def test_what_was_shrunk_before() -> None:
    family = FAMILIES["bottleneck"]
    program = captured(family, filled(family.make()))
    analysis = analyze(program)
    small = Shrink(Plan.of_units(analysis, some(analysis))).run(program).program
    (branch,) = find_branches(analyze(small))
    dropped = DropBranches((branch.name,)).run(small)
    assert check_masked(analyze(small), dropped.program, branch.units, seed=0) <= TOLERANCE
    assert dropped.program.lineage == ("shrink", "drop-branches")


def test_a_branch_that_leaves_nothing() -> None:
    """No bias: x + 0 is x."""
    family = FAMILIES["pre-activation"]
    result = DropBranches(("blocks.0.conv2",)).run(captured(family, filled(family.make())))
    assert result.facts["zero"] == 1
    assert not [name for name in result.program.state_dict() if name.startswith("blocks.0")]
    adds = [node for node in result.program.graphs["eval"].nodes if node.target is torch.ops.aten.add.Tensor]
    assert len(adds) == 1


class Scaled(nn.Module):
    """Subtract a branch, add another one scaled, divide by a third."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Sequential(nn.Linear(WIDTH, 4), nn.ReLU(), self.last(i)) for i in range(3))

    @staticmethod
    def last(which: int) -> nn.Module:
        return nn.Linear(4, WIDTH, bias=which != 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.one(x) - x, self.two(x), alpha=3) / (2 + self.three(x))


def test_every_kind_of_join() -> None:
    network = filled(Sequences(Scaled()))
    program = capture(network, example(SEQUENCE))
    names = ["blocks.0.one.2", "blocks.0.two.2", "blocks.0.three.2"]
    assert [branch.name for branch in find_branches(analyze(program))] == names
    for chosen in (*[(name,) for name in names], tuple(names)):
        small = DropBranches(chosen).run(program)
        twin = copy.deepcopy(network)
        with torch.no_grad():
            for name in chosen:
                for value in twin.get_submodule(name.replace(".2", ".0")).parameters():
                    value.zero_()
            assert_equal(small.program(example(SEQUENCE, 3)), twin(example(SEQUENCE, 3)))
        assert small.facts["zero"] == (names[1] in chosen and small.facts["constants"] < len(chosen))


class Viewed(nn.Module):
    """The sum is contiguous because the branch is; what is left is not, and a view follows."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.fc1, self.fc2, self.back = nn.Linear(4, 5), nn.Linear(5, 4, bias=bias), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        spread = x.mean(1)[:, :, None].expand(-1, -1, 6)
        y = self.fc2(F.relu(self.fc1(x.repeat(1, 2, 1)[:, :6]))).transpose(1, 2).contiguous() + spread
        return self.back(y.view(-1, 24))


@pytest.mark.parametrize("bias", [False, True])
def test_a_view_behind_the_join(bias: bool) -> None:
    network = filled(Viewed(bias))
    program = capture(network, example(SEQUENCE))
    small = DropBranches(("fc2",)).run(program).program
    twin = copy.deepcopy(network)
    with torch.no_grad():
        twin.get_parameter("fc1.weight").zero_()
        twin.get_parameter("fc1.bias").zero_()
        for batch in (1, 3):
            assert_equal(small(example(SEQUENCE, batch)), twin(example(SEQUENCE, batch)))


class Taken(nn.Module):
    """A block that has a parameter of the name that the constant would take."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4), nn.Linear(4, WIDTH)
        self.constant = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.constant + self.fc2(F.relu(self.fc1(x)))


def test_names_do_not_clash() -> None:
    network = filled(Sequences(Taken()))
    small = DropBranches(("blocks.0.fc2",)).run(capture(network, example(SEQUENCE))).program
    kept = {name for name in small.state_dict() if name.startswith("blocks")}
    assert kept == {"blocks.0.constant", "blocks.0.constant_1"}
    assert torch.equal(small.tensor("blocks.0.constant"), network.get_parameter("blocks.0.constant"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_type_is_kept(dtype: torch.dtype) -> None:
    network = filled(Images(Basic())).to(dtype)
    program = capture(network, example(IMAGE, dtype=dtype))
    small = DropBranches(("blocks.0.conv2",)).run(program).program
    assert small.tensor("blocks.0.constant").dtype == dtype
    with torch.no_grad():
        assert small(example(IMAGE, dtype=dtype)).dtype == dtype


def test_of_a_frozen_branch_the_constant_is_frozen(network: nn.Module) -> None:
    network.get_submodule("blocks.0").requires_grad_(False)
    small = DropBranches(("blocks.0.conv2", "blocks.1.conv2")).run(capture(network, example(IMAGE))).program
    assert small.tensor("blocks.1.constant").requires_grad
    assert not small.tensor("blocks.0.constant").requires_grad


def test_a_network_with_taps(program: Program) -> None:
    tapped = CaptureCurvature().run(program).program
    small = DropBranches(("blocks.0.conv2",)).run(tapped).program
    expected = DropBranches(("blocks.0.conv2",)).run(program).program
    x = example(IMAGE, 3)
    with torch.no_grad():
        assert torch.equal(small(x), expected(x))
    nodes = {node.name for graph in small.graphs.values() for node in graph.nodes}
    assert not [name for name in nodes if name.startswith("tap_conv2d_1")]
    assert [name for name in nodes if name.startswith("tap_")]


# means ---------------------------------------------------------------------------------------------------------------


def replaced(network: nn.Module, layer: str, mean: Tensor) -> nn.Module:
    """Return a copy whose layer gives ``mean`` whatever it is given."""
    twin = copy.deepcopy(network)
    twin.get_submodule(layer).register_forward_hook(lambda module, given, output: mean.expand_as(output).clone())
    return twin


def outputs_of(network: nn.Module, layer: str, data: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = network.get_submodule(layer).register_forward_hook(
        lambda module, given, output: seen.append(output.clone())
    )
    with torch.no_grad():
        network(data)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(
    ("name", "branch", "layer", "over"),
    [
        ("basic", "blocks.0.conv2", "blocks.0.bn2", (0, 2, 3)),
        ("gated bottleneck", "blocks.0.conv3", "blocks.0.gate", (0, 2, 3)),
        ("pre-activation", "blocks.0.conv2", "blocks.0.conv2", (0, 2, 3)),
        ("encoder, norm first", "blocks.0.linear2", "blocks.0.dropout2", (0, 1)),
        ("recurrent", "blocks.0.fc", "blocks.0.fc", (0, 1)),
    ],
)
def test_the_mean_in_place_of_the_branch(name: str, branch: str, layer: str, over: tuple[int, ...]) -> None:
    family = FAMILIES[name]
    network = filled(family.make())
    program = captured(family, network)
    data = example(family.shape, 11, seed=5)
    means = measure_branch_means(program, find_branches(analyze(program)), (data, None), batch_size=4)
    expected = outputs_of(network, layer, data).mean(over, keepdim=True)[0]
    torch.testing.assert_close(means[branch], expected.reshape(means[branch].shape), rtol=0, atol=1e-13)
    result = DropBranches((branch,), {branch: means[branch]}).run(program)
    assert result.facts["constants"] == 1
    twin = replaced(network, layer, expected)
    for batch in (1, 4):
        x = example(family.shape, batch, seed=9)
        with torch.no_grad():
            assert_equal(result.program(x), twin(x))


def test_a_branch_that_leaves_nothing_has_no_mean() -> None:
    family = FAMILIES["dense"]
    program = captured(family, filled(family.make()))
    assert measure_branch_means(program, find_branches(analyze(program)), example(IMAGE, 4)) == {}


def test_a_mean_of_another_shape_or_name(program: Program) -> None:
    name = "blocks.0.conv2"
    with pytest.raises(UsageError, match=r"\[6, 1, 1\]"):
        DropBranches((name,), {name: torch.zeros(WIDTH)}).run(program)
    with pytest.raises(UsageError, match="not to be dropped"):
        DropBranches((name,), {"blocks.1.conv2": torch.zeros(8, 1, 1)}).run(program)


def test_no_data_no_means(program: Program) -> None:
    with pytest.raises(UsageError, match="at least one example"):
        measure_branch_means(program, find_branches(analyze(program)), [])


def test_means_are_nearer_than_masks_on_the_average(network: nn.Module, program: Program) -> None:
    """The mean is what is nearest to a branch among constants: the join's mean stays what it was."""
    data = example(IMAGE, 32, seed=3)
    name = "blocks.0.conv2"
    means = measure_branch_means(program, find_branches(analyze(program)), data)
    given = outputs_of(network, "blocks.0.bn2", data)
    masked = DropBranches((name,)).run(program).program.state_dict()["blocks.0.constant"]
    mean = DropBranches((name,), {name: means[name]}).run(program).program.state_dict()["blocks.0.constant"]
    error = float((given - mean).square().mean())
    assert error < float((given - masked).square().mean())
    assert np.isclose(error, float(given.var((0, 2, 3), correction=0).mean()))
