"""Programs: how they are called, copied and hashed, and what their names mean."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import kfe_fx
from kfe_fx.errors import UsageError
from kfe_fx.frontend.capture import capture
from kfe_fx.program import Program, get_tensor, graph_text, named_tensors, put_tensor, tied_names


class Net(nn.Module):
    """Ties, a buffer that is not saved, dropout, a list of inputs and a dict of outputs."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(7, 4), nn.BatchNorm1d(4)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 2.0, 1.0]), persistent=False)

    def forward(self, tokens: Tensor, shift: Tensor | None = None, flag: bool = True) -> dict[str, Tensor]:
        y = self.norm(self.table(tokens).mean(1) * self.mask)
        if shift is not None and flag:
            y = y + shift
        return {"scores": self.head(self.drop(y)), "inner": y}


TOKENS, SHIFT = torch.arange(6).reshape(2, 3), torch.tensor([[1.0], [2.0]])


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def program(net: Net) -> Program:
    return capture(net, {"tokens": TOKENS, "shift": SHIFT})


def same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_it_is_called_as_its_source(net: Net, program: Program) -> None:
    expected = net(TOKENS, SHIFT)
    for found in (
        program(TOKENS, SHIFT),
        program(TOKENS, shift=SHIFT),
        program(shift=SHIFT, tokens=TOKENS),
        program.module()(TOKENS, SHIFT),
    ):
        assert same(found, expected)


@pytest.mark.parametrize(
    ("args", "kwargs", "says"),
    [
        ((TOKENS,), {}, "missing argument 'shift'"),
        ((), {}, "missing argument 'tokens'"),
        ((TOKENS, SHIFT, TOKENS), {}, "takes the arguments ['tokens', 'shift']"),
        ((TOKENS, SHIFT), {"scale": SHIFT}, "takes the arguments"),
        ((TOKENS,), {"tokens": TOKENS, "shift": SHIFT}, "takes the arguments"),
    ],
)
def test_another_call_is_refused(program: Program, args: tuple[Any, ...], kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as raised:
        program(*args, **kwargs)
    assert says in str(raised.value)


def test_names_and_ties_are_those_of_the_source(net: Net, program: Program) -> None:
    assert program.state_dict().keys() == net.state_dict().keys()
    for name, value in net.state_dict().items():
        assert torch.equal(program.state_dict()[name], value), name
    assert {name for name, _ in program.module().named_parameters()} == {name for name, _ in net.named_parameters()}
    assert program.names_of("head.weight") == program.names_of("table.weight")
    assert set(program.names_of("head.weight")) == {"head.weight", "table.weight"}
    assert program.names_of("norm.bias") == ("norm.bias",)
    assert program.names_of("no such name") == ("no such name",)
    assert program.tensor("head.weight") is program.tensor("table.weight")
    assert torch.equal(program.tensor("mask"), net.mask)


@pytest.mark.parametrize("name", ["", "head", "head.bias", "nowhere.weight", "head.weight.grad"])
def test_a_name_that_is_none_raises(program: Program, name: str) -> None:
    with pytest.raises(KeyError):
        program.tensor(name)


def test_the_program_owns_its_tensors(net: Net, program: Program) -> None:
    before = program(TOKENS, SHIFT)["scores"].clone()
    with torch.no_grad():
        net.head.weight.zero_()
    assert torch.equal(program(TOKENS, SHIFT)["scores"], before)


def test_training_and_evaluation_pick_their_graph(program: Program) -> None:
    module = program.module()
    assert set(program.graphs) == {"eval", "train"}
    assert module.mode() == "eval"
    mean = program.tensor("norm.running_mean").clone()
    program(TOKENS, SHIFT)
    assert torch.equal(program.tensor("norm.running_mean"), mean)
    assert program.train() is program
    assert module.mode() == "train"
    program(TOKENS, SHIFT)
    assert not torch.equal(program.tensor("norm.running_mean"), mean)
    assert program.eval().module().mode() == "eval"


COPIES = {
    "Program.copy": lambda program: program.copy(),
    "copy.deepcopy": lambda program: Program(copy.deepcopy(program.module()), program.example_inputs, program.axes),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_equal_and_shares_nothing(program: Program, how: str) -> None:
    with torch.no_grad():
        program(TOKENS, SHIFT)  # the generated code exists by now
    program.train()
    assert COPIES[how](program).module().training
    program.eval()
    twin = COPIES[how](program)
    assert not twin.module().training
    assert twin.hash() == program.hash()
    assert same(twin.state_dict(), program.state_dict())
    assert same(twin(TOKENS, SHIFT), program(TOKENS, SHIFT))
    assert twin.names_of("head.weight") == program.names_of("head.weight")
    assert not set(map(id, named_tensors(twin.module()).values())) & set(
        map(id, named_tensors(program.module()).values())
    )
    assert {id(node) for graph in twin.graphs.values() for node in graph.nodes}.isdisjoint(
        id(node) for graph in program.graphs.values() for node in graph.nodes
    )
    assert "mask" not in twin.state_dict()

    before, text = program(TOKENS, SHIFT), program.hash()
    with torch.no_grad():
        for value in twin.module().parameters():
            value.add_(1)
        twin.tensor("mask").add_(1)
    relu = next(node for node in twin.graphs["eval"].nodes if node.op == "output")
    with twin.graphs["eval"].inserting_before(relu):
        twin.graphs["eval"].call_function(torch.ops.aten.relu.default, (relu.args[0][0],))
    assert same(program(TOKENS, SHIFT), before)
    assert program.hash() == text != twin.hash()


def test_a_copy_keeps_what_is_told_about_the_program(program: Program) -> None:
    program.lineage, program.notes, program.extras = ("shrink",), ("a note",), {"calibration": 1}
    twin = program.copy()
    assert (twin.lineage, twin.notes, twin.extras) == (("shrink",), ("a note",), {"calibration": 1})
    assert (twin.axes, twin.signature) == (program.axes, program.signature)
    twin.extras["more"] = 2
    assert "more" not in program.extras


def test_the_hash_is_of_the_graph_not_of_weights_or_names(net: Net, program: Program) -> None:
    text = program.hash()
    with torch.no_grad():
        for value in program.module().parameters():
            value.mul_(2)
    assert program.hash() == text
    assert capture(net, {"tokens": TOKENS, "shift": SHIFT}).hash() == text
    twin = program.copy()
    for graph in twin.graphs.values():
        for number, node in enumerate(graph.nodes):
            node._rename(f"renamed_{number}")
    assert twin.hash() == text
    assert capture(net, {"tokens": TOKENS}).hash() != text


def test_the_hash_sees_literals_and_wiring(program: Program) -> None:
    text = program.hash()
    for change in (literal, wiring, operation, lambda graph: None):
        twin = program.copy()
        change(twin.graphs["eval"])
        assert (twin.hash() == text) == (change not in (literal, wiring, operation))


def node_of(graph: Any, name: str) -> Any:
    return next(node for node in graph.nodes if node.op == "call_function" and name in str(node.target))


def literal(graph: Any) -> None:
    node_of(graph, "mean").update_arg(1, [2])


def wiring(graph: Any) -> None:
    node = node_of(graph, "add")
    node.args = (node.args[1], node.args[0])


def operation(graph: Any) -> None:
    node_of(graph, "add").target = torch.ops.aten.sub.Tensor


def test_graph_text_numbers_the_nodes_in_order(program: Program) -> None:
    lines = graph_text(program.graphs["eval"]).splitlines()
    assert [line.split()[0] for line in lines] == [f"%{number}" for number in range(len(lines))]
    assert len(lines) == len(program.graphs["eval"].nodes)


def test_tensors_are_put_by_dotted_names() -> None:
    module = nn.Module()
    weight, saved, unsaved = nn.Parameter(torch.ones(1)), torch.ones(2), torch.ones(3)
    put_tensor(module, "a.b.weight", weight)
    put_tensor(module, "a.saved", saved)
    put_tensor(module, "a.unsaved", unsaved, persistent=False)
    put_tensor(module, "tied", weight)
    assert get_tensor(module, "a.b.weight") is weight
    assert module.state_dict().keys() == {"a.b.weight", "a.saved", "tied"}
    assert named_tensors(module).keys() == {"a.b.weight", "a.saved", "a.unsaved", "tied"}
    assert set(tied_names(module)["tied"]) == {"tied", "a.b.weight"}
    put_tensor(module, "a.unsaved", unsaved)
    assert "a.unsaved" in module.state_dict()


class Awkward(nn.Module):
    """Names that generated code or nn.Module itself could trip over."""

    def __init__(self) -> None:
        super().__init__()
        self.graphs, self.mode, self.signature = nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 1)
        self.add_module("lambda", nn.Linear(1, 1))

    def forward(self, torch: Tensor) -> Tensor:
        return self._modules["lambda"](self.signature(self.mode(self.graphs(torch))))  # type: ignore[misc]


def test_awkward_names_are_kept() -> None:
    net, x = Awkward().eval(), torch.randn(2, 2)
    program = capture(net, x)
    assert program.state_dict().keys() == net.state_dict().keys()
    assert torch.equal(program(torch=x), net(x))
    assert torch.equal(program.copy()(x), net(x))


class Named(nn.Module):
    """Layers and parameters called as what a GraphModule, or our own module, has itself."""

    LAYERS = ("code", "graph", "meta", "mode", "graphs", "signature")
    MATRICES = ("recompile", "run_flat", "observe", "_graph", "print_readable")

    def __init__(self) -> None:
        super().__init__()
        for name in self.LAYERS:
            setattr(self, name, nn.Linear(4, 4))
        for name in self.MATRICES:
            setattr(self, name, nn.Parameter(torch.randn(4, 4)))
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.LAYERS:
            x = torch.tanh(getattr(self, name)(x))
        for name in self.MATRICES:
            x = torch.tanh(x @ getattr(self, name))
        return self.last(x)


def test_names_of_the_user_may_be_those_of_methods(tmp_path: Path):
    torch.manual_seed(0)
    module, x = Named().eval(), torch.randn(40, 4)
    program = kfe_fx.capture(module, x[:2])
    kfe_fx.save(program, tmp_path / "net.pt")
    program = kfe_fx.load(tmp_path / "net.pt")
    assert program.state_dict().keys() == module.state_dict().keys()
    assert torch.equal(program.copy()(x), module(x))
    kfe_fx.export(program, tmp_path / "net.onnx")
    stored = {tensor.name for tensor in onnx.load(tmp_path / "net.onnx").graph.initializer}
    assert {f"{name}.bias" for name in Named.LAYERS} <= stored
    assert set(Named.MATRICES) <= stored
    result = kfe_fx.prune(
        program, budget=0.6, metric="params", data=(x, torch.arange(40) % 3), criterion="kfe", epochs=1
    )
    assert result.certificate.feasible
    assert {path.suffix for path in result.write(tmp_path, "net")} == {".onnx", ".pt", ".json"}
