"""The recurrent layers of a Program: the nodes of one layer and direction in all graphs, and their tensors by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn

from kfe_fx.program import Program, get_module, named_tensors, put_tensor, tied_names
from kfe_fx.recurrent.op import RECURRENT, Arguments

WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


@dataclass(frozen=True)
class Layer:
    """One direction of one layer, wherever it runs: a layer that is called twice has two nodes in each graph.

    ``name`` is that of the module and the suffix of its weights ("encoder.l0_reverse"); ``nodes`` are by graph.
    """

    name: str
    nodes: Mapping[str, tuple[fx.Node, ...]]

    def calls(self) -> Iterator[Arguments]:
        """Yield the arguments of every node, as nodes of its graph."""
        for nodes in self.nodes.values():
            for node in nodes:
                yield Arguments.of(node)

    @property
    def call(self) -> Arguments:
        """The arguments of the first node."""
        return next(self.calls())

    @property
    def trains(self) -> bool:
        """Whether statistics move in training."""
        return any(call.normalised and call.training for call in self.calls())

    @property
    def from_zero(self) -> bool:
        """Whether every run begins with the state zero."""
        return all(call.h0 is None for call in self.calls())

    def tensor_name(self, argument: str) -> str | None:
        """Return the name of the parameter or buffer that an argument reads, or None: not given, or computed."""
        return _target(getattr(self.call, argument))

    def name_of(self, part: str) -> str:
        """Return a name for a tensor of the layer beside its weights: "lstm.gamma_ih_l0" for "gamma_ih"."""
        weight = self.tensor_name("weight_ih") or ""
        path, _, leaf = weight.rpartition(".")
        if not leaf.startswith("weight_ih"):
            return f"{next(iter(self.nodes.values()))[0].name}.{part}"
        leaf = part + leaf.removeprefix("weight_ih")
        return f"{path}.{leaf}" if path else leaf

    def tensors(self, program: Program) -> Arguments:
        """Return the arguments with the tensors that they read; what is computed is None."""
        names = {name: _target(value) for name, value in vars(self.call).items() if isinstance(value, fx.Node)}
        return replace(self.call, **{k: name if name is None else program.tensor(name) for k, name in names.items()})

    def rewrite(self, program: Program, changes: Mapping[str, Any], mode: str | None = None) -> None:
        """Change arguments of the nodes, in place: a string is the name of a tensor, anything else itself."""
        for each, nodes in self.nodes.items():
            if mode not in (None, each) or not nodes:
                continue
            graph = program.graphs[each]
            held: dict[str, fx.Node] = {}
            for change in changes.values():
                if isinstance(change, str) and change not in held:
                    with graph.inserting_before(nodes[0]):
                        held[change] = graph.create_node("get_attr", change)
                    held[change].meta = dict(nodes[0].meta)
            for node in nodes:
                given = {k: held[v] if isinstance(v, str) else v for k, v in changes.items()}
                node.args, node.kwargs = replace(Arguments.of(node), **given).call()


def find_layers(program: Program) -> list[Layer]:
    """List the recurrent layers of a Program; nodes with the same weights are one layer."""
    canonical = {name: names[0] for name, names in tied_names(program.module()).items()}
    found: dict[tuple[Any, ...], dict[str, list[fx.Node]]] = {}
    for mode, graph in program.graphs.items():
        for node in graph.find_nodes(op="call_function", target=RECURRENT):
            call = Arguments.of(node)
            key = tuple(_key(getattr(call, argument), canonical) for argument in WEIGHTS)
            found.setdefault(key, {}).setdefault(mode, []).append(node)
    layers = []
    for nodes in found.values():
        held = {mode: tuple(some) for mode, some in nodes.items()}
        layer = Layer("", held)
        path, _, leaf = layer.name_of("").rpartition(".")
        layers.append(Layer(f"{path}.{leaf.removeprefix('_')}".strip(".") or "recurrent", held))
    return layers


def _key(value: Any, canonical: Mapping[str, str]) -> str:
    name = _target(value)
    return str(value) if name is None else canonical[name]


def _target(value: Any) -> str | None:
    return str(value.target) if isinstance(value, fx.Node) and value.op == "get_attr" else None


def read_by_others(program: Program, layer: Layer, argument: str) -> str | None:
    """Return the name of a node beside this argument of this layer that reads the same tensor, or None.

    It may not be changed for the layer alone then.
    """
    name = layer.tensor_name(argument)
    if name is None:
        return None
    same = set(program.names_of(name))
    for mode, graph in program.graphs.items():
        for held in graph.find_nodes(op="get_attr"):
            if held.target not in same:
                continue
            for user in held.users:
                if user not in layer.nodes.get(mode, ()):
                    return user.name
                call = Arguments.of(user)
                if [value for value in vars(call).values() if value is held] != [getattr(call, argument)]:
                    return user.name
    return None


def set_tensor(program: Program, name: str, value: Tensor, like: Tensor, *, learned: bool) -> None:
    """Put a tensor of the type of ``like`` into a module, over the one of that name: a Parameter, or a buffer."""
    value = value.detach().to(like.device, like.dtype).clone()
    put_tensor(program.module(), name, nn.Parameter(value, like.requires_grad) if learned else value)


def rows_of(call: Arguments, program: Program) -> int:
    """Return how many rows the running statistics of a normalised layer have."""
    read = (getattr(call, name) for name in ("var_ih", "var_hh", "var_c"))
    return max(len(program.tensor(str(value.target))) for value in read if value is not None)


def free_name(program: Program, name: str) -> str:
    """Return ``name``, with a number where a tensor is called so."""
    held, wanted, count = named_tensors(program.module()), name, 0
    while wanted in held:
        count += 1
        wanted = f"{name}_{count}"
    return wanted


def drop_unread(program: Program, names: Iterable[str]) -> None:
    """Take tensors that no graph uses any more out of the module, of those called ``names`` (and tied to these)."""
    module = program.module()
    every = {tied for name in names for tied in program.names_of(name)}
    reads = [(graph, node) for graph in program.graphs.values() for node in graph.find_nodes(op="get_attr")]
    for _, node in reads:
        if node.target in every and node.users:
            every -= set(program.names_of(str(node.target)))
    for graph, node in reads:
        if node.target in every:
            graph.erase_node(node)
    for name in every:
        path, _, leaf = name.rpartition(".")
        owner = get_module(module, path)
        (owner._parameters if leaf in owner._parameters else owner._buffers).pop(leaf)
