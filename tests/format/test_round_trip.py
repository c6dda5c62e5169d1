from __future__ import annotations

import copy
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kfe_fx.errors import BadFile, UnsupportedModel, UsageError
from kfe_fx.format import load, save
from kfe_fx.frontend.capture import capture
from kfe_fx.program import Program, named_tensors, tied_names
from tests.format.nets import Attention, Convolutional, Wide, examples, graph_of, records

NAMES = ("convolutional", "attention", "wide")


def flat(value: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(value)


def assert_same(first: Any, second: Any) -> None:
    assert torch.utils._pytree.tree_structure(first) == torch.utils._pytree.tree_structure(second)
    for one, other in zip(flat(first), flat(second), strict=True):
        if isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
        else:
            assert one == other


@pytest.mark.parametrize("name", NAMES)
def test_everything_comes_back(name: str, programs: dict[str, Program], saved: dict[str, Path]):
    program, again = programs[name], load(saved[name])
    assert again.hash() == program.hash()
    assert again.graphs.keys() == program.graphs.keys()
    for mode, graph in program.graphs.items():
        assert [(n.name, n.meta) for n in graph.nodes] == [(n.name, n.meta) for n in again.graphs[mode].nodes]
    assert again.signature == program.signature
    assert (again.axes, again.lineage, again.notes) == (program.axes, program.lineage, program.notes)
    assert_same(again.example_inputs, program.example_inputs)
    assert not again.module().training


@pytest.mark.parametrize("name", NAMES)
def test_tensors_come_back(name: str, programs: dict[str, Program], saved: dict[str, Path]):
    ours, theirs = programs[name].module(), load(saved[name]).module()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert [n for n, _ in ours.named_buffers()] == [n for n, _ in theirs.named_buffers()]
    assert tied_names(ours) == tied_names(theirs)
    for (key, value), other in zip(named_tensors(ours).items(), named_tensors(theirs).values(), strict=True):
        assert type(value) is type(other), key
        assert (value.dtype, value.shape, value.stride()) == (other.dtype, other.shape, other.stride()), key
        assert value.requires_grad == other.requires_grad, key
        assert torch.equal(value, other), key


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_outputs_are_equal_to_the_bit(name: str, mode: str, programs: dict[str, Program], saved: dict[str, Path]):
    program, again = programs[name].copy(), load(saved[name])
    args, kwargs = program.example_inputs
    if name == "convolutional":
        args = (torch.randn(3, 3, 6, 6),)
    for each in (program, again):
        each.train(mode == "train")
    for _ in range(2):  # the second call sees the statistics that the first one wrote
        torch.manual_seed(5)
        expected = program(*args, **kwargs)
        torch.manual_seed(5)
        assert_same(again(*args, **kwargs), expected)
    assert_same(dict(again.state_dict()), dict(program.state_dict()))


def test_training_what_was_loaded_moves_tied_parameters_together(saved: dict[str, Path]):
    module = load(saved["attention"]).train().module()
    args, kwargs = load(saved["attention"]).example_inputs
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    before = module.get_parameter("head.weight").detach().clone()
    module(*args, **kwargs)[0].square().mean().backward()
    optimiser.step()
    assert module.get_parameter("head.weight") is module.get_parameter("embed.weight")
    assert not torch.equal(before, module.get_parameter("embed.weight"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mmap", [False, True])
def test_the_file_is_an_ordinary_checkpoint(name: str, mmap: bool, saved: dict[str, Path]):
    state = torch.load(saved[name], weights_only=True, mmap=mmap)
    net = {"convolutional": Convolutional, "attention": Attention, "wide": Wide}[name]()
    assert net.load_state_dict(state, strict=True)
    given = examples(net)
    args, kwargs = given if isinstance(given, tuple) else ((given,), {})
    program = load(saved[name])
    assert_same(program(*args, **kwargs), net.eval()(*args, **kwargs))
    if name == "attention":
        assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()


def test_loading_does_not_need_the_pickle(saved: dict[str, Path], tmp_path: Path):
    from tests.format.nets import forge

    root, held = records(saved["convolutional"])
    held["data.pkl"] = b"cos\nsystem\n(S'false'\ntR."
    again = load(forge(tmp_path / "x.pt", root, list(held.items())))
    assert again.hash() == load(saved["convolutional"]).hash()


def test_the_calibration_sample_comes_along(saved: dict[str, Path], tmp_path: Path):
    again = load(saved["convolutional"])
    inputs, targets = again.extras["calibration"]
    assert [value.shape for value in inputs] == [(4, 3, 6, 6)]
    assert targets.dtype == torch.int64
    assert targets.tolist() == [0, 1, 2, 3]
    twice = load(save(again, tmp_path / "x.pt"))
    assert torch.equal(twice.extras["calibration"][0][0], inputs[0])
    bare = load(save(again, tmp_path / "y.pt", calibration=inputs[0][:2]))
    assert bare.extras["calibration"][1] is None
    assert len(bare.extras["calibration"][0][0]) == 2


def test_sections_and_bounds_come_along(programs: dict[str, Program], tmp_path: Path):
    program = programs["attention"].copy()
    program.extras = {"sections": {"plan": {"kept": [1, 2]}}, "axis_bounds": {"time": (1, 512)}, "cache": object()}
    again = load(save(program, tmp_path / "x.pt"))
    assert again.extras == {"sections": {"plan": {"kept": [1, 2]}}, "axis_bounds": {"time": (1, 512)}}


def test_equal_programs_give_equal_bytes(programs: dict[str, Program], tmp_path: Path):
    program = programs["wide"]
    first, second = save(program, tmp_path / "a.pt"), save(program.copy(), tmp_path / "other name.bin")
    again = save(load(first), tmp_path / "c.pt")
    assert first.read_bytes() == second.read_bytes() == again.read_bytes()


def test_saving_leaves_the_program_and_its_memory_alone(programs: dict[str, Program], tmp_path: Path):
    program = programs["convolutional"].copy().train()
    before = copy.deepcopy(program.state_dict())
    save(program, tmp_path / "x.pt")
    assert_same(dict(program.state_dict()), dict(before))
    assert program.module().training
    assert "calibration" not in program.extras


def test_a_module_is_captured(tmp_path: Path):
    net = nn.Linear(3, 2)
    path = save(net, torch.ones(2, 3), tmp_path / "x.pt", dynamic_axes={"input": {0: "rows"}})
    again = load(path)
    assert again.axes == {"input": {0: "rows"}}
    x = torch.randn(7, 3)
    assert torch.equal(again(x), net(x))


def test_tensors_that_share_memory_or_have_gaps_are_stored_apart(programs: dict[str, Program], tmp_path: Path):
    program = programs["convolutional"].copy()
    module = program.module()
    block = torch.randn(2, 5, 16)
    module.get_submodule("head").weight = nn.Parameter(block[0, :, :8])  # a slice of a larger storage
    module.get_submodule("norm")._buffers["running_mean"] = block[1, 0, :8]
    again = load(save(program, tmp_path / "x.pt"))
    assert_same(dict(again.state_dict()), dict(program.state_dict()))
    assert (tmp_path / "x.pt").stat().st_size < 60_000
    state = torch.load(tmp_path / "x.pt", weights_only=True)
    assert state["head.weight"].untyped_storage().nbytes() == 5 * 8 * 4


def test_what_cannot_be_stored_is_named(programs: dict[str, Program], tmp_path: Path):
    program = programs["convolutional"].copy()
    node = next(n for n in program.graphs["eval"].nodes if n.op == "call_function")
    node.target = torch.ops.aten.from_file.default
    with pytest.raises(UnsupportedModel, match=r"aten\.from_file\.default has no form"):
        save(program, tmp_path / "x.pt")
    program = programs["convolutional"].copy()
    program.module().get_submodule("head").weight = nn.Parameter(torch.empty(5, 8, device="meta"))
    with pytest.raises(UnsupportedModel, match=r"head\.weight"):
        save(program, tmp_path / "x.pt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "options", "match"),
    [
        ((nn.Linear(2, 2), torch.ones(1, 2)), {}, "needs a path"),
        ((nn.Linear(2, 2),), {"path": "x.pt"}, "needs example inputs"),
        (("nothing",), {"path": "x.pt"}, "got str"),
        ((nn.Linear(2, 2), torch.ones(1, 2)), {"path": "x.pt", "calibration": "abc"}, "calibration is"),
        ((nn.Linear(2, 2), torch.ones(1, 2)), {"path": "x.pt", "calibration": ((), None)}, "calibration is"),
        (
            (nn.Linear(2, 2), torch.ones(1, 2)),
            {"path": "x.pt", "calibration": ((torch.ones(3, 2),) * 2, None)},
            "2 inputs",
        ),
        (
            (nn.Linear(2, 2), torch.ones(1, 2)),
            {"path": "x.pt", "calibration": (torch.ones(3, 2), torch.ones(4))},
            "3, 4",
        ),
    ],
)
def test_wrong_arguments(arguments: tuple[Any, ...], options: dict[str, Any], match: str, tmp_path: Path):
    if "path" in options:
        options = options | {"path": tmp_path / options["path"]}
    with pytest.raises(UsageError, match=match):
        save(*arguments, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    programs: dict[str, Program], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = save(programs["wide"], tmp_path / "x.pt")
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(BadFile, match="No space left"):
        save(programs["convolutional"], path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_fills_up(tmp_path: Path):
    program = capture(nn.Linear(300, 300), torch.ones(1, 300))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(BadFile) as caught:
            save(program, tmp_path / "x.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(caught.value)
    assert "x.pt: cannot be written" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(programs: dict[str, Program], tmp_path: Path):
    for place in (tmp_path, tmp_path / "none" / "x.pt", Path("/dev/null")):
        with pytest.raises(BadFile):
            save(programs["wide"], place)
    assert list(tmp_path.iterdir()) == []


def test_the_file_names_no_time_and_no_machine(saved: dict[str, Path]):
    document = graph_of(saved["wide"])
    assert document["written_by"].keys() == {"kfe_fx", "torch"}
