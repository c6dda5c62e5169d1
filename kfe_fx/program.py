"""Program: a captured network as torch.fx graphs of ATen calls over one module of named parameters.

The graph is torch.export's training IR with the parameters read by ``get_attr`` under their original names, so
that one set of tensors serves the evaluation graph, the training graph and every pass.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import keyword
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from kfe_fx import taps
from kfe_fx.errors import UsageError
from kfe_fx.structure import flatten_like, pack

_BATCH_NAMES = tuple(re.compile(pattern, re.IGNORECASE) for pattern in (r"batch(_?size)?(_\d+)?", "b", "n"))
_TIME_NAMES = re.compile(r"(time|steps?|length|seq(uence)?(_?len(gth)?)?|t)(_\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Signature:
    """Say how a Program is called.

    ``input_names`` are the flat inputs in graph order; ``arg_names`` the top-level argument names (positional ones
    first, ``positional`` of them); ``inputs`` and ``outputs[mode]`` are templates: nested containers whose leaves are
    flat indices (see ``kfe_fx.structure``).
    """

    input_names: tuple[str, ...]
    arg_names: tuple[str, ...]
    positional: int
    inputs: Any
    outputs: dict[str, Any]

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Flatten a call's arguments into graph order; positional and keyword spellings are both taken.

        Raises:
            UsageError: an argument is missing, unknown or of another structure than the captured one.
        """
        bound = dict(zip(self.arg_names, args, strict=False))
        unknown = [name for name in kwargs if name not in self.arg_names or name in bound]
        if len(args) > len(self.arg_names) or unknown:
            got = f"{len(args)} positional and {sorted(kwargs)}"
            raise UsageError(f"this network takes the arguments {list(self.arg_names)}, got {got}")
        bound |= kwargs
        missing = [name for name in self.arg_names if name not in bound]
        if missing:
            raise UsageError(f"missing argument {missing[0]!r}: this network takes {list(self.arg_names)}")
        values = [bound[name] for name in self.arg_names]
        nested = (
            tuple(values[: self.positional]),
            dict(zip(self.arg_names[self.positional :], values[self.positional :], strict=True)),
        )
        return flatten_like(self.inputs, nested, "the inputs")


class ProgramModule(nn.Module):
    """Run a Program: parameters under their original names, ``train()`` and ``eval()`` pick the graph."""

    graphs: dict[str, fx.Graph]

    def __init__(self, graphs: dict[str, fx.Graph], signature: Signature) -> None:
        """Hold the graphs; tensors are added with ``put_tensor`` by whoever builds the module."""
        super().__init__()
        self.graphs = graphs
        self.signature = signature
        self._observer: taps.Observer | None = None
        self._observed: dict[str, fx.Graph] = {}
        self._compiled: dict[Any, Any] = {}

    def mode(self) -> str:
        """Return the name of the graph that runs now."""
        return "train" if self.training and "train" in self.graphs else "eval"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network as its source was called."""
        mode = self.mode()
        flat = self.signature.flatten(args, kwargs)
        return pack(self.signature.outputs[mode], self.run_flat(flat, mode))

    def run_flat(self, flat: list[Any], mode: str = "eval") -> tuple[Any, ...]:
        """Run graph ``mode`` on flat inputs and return the flat outputs."""
        observer = self._observer if torch.is_grad_enabled() else None  # else there is nothing to see
        if observer is not None and (begin := getattr(observer, "begin", None)) is not None:
            begin(flat, mode)
        key = mode, None if observer is None else id(observer)
        run = self._compiled.get(key)
        if run is None:
            graph = self.graphs[mode] if observer is None else self._observed.get(mode, self.graphs[mode])
            run = self._compiled[key] = _compile(self, graph, observer)
        return run(*flat)

    def recompile(self) -> None:
        """Forget the generated code after an edit of a graph."""
        self._compiled.clear()

    def observe(self, observer: taps.Observer | None, graphs: dict[str, fx.Graph] | None = None) -> None:
        """Let ``observer`` be called by the taps; with None they leave the code that runs.

        ``graphs`` are tapped copies to run instead of the module's own, for who observes a network without taps.
        """
        self._compiled = {key: run for key, run in self._compiled.items() if key[1] is None}
        self._observer, self._observed = observer, graphs or {}

    def __deepcopy__(self, memo: dict[int, Any]) -> ProgramModule:
        """Copy tensors and graphs; tied parameters stay tied."""
        twin = ProgramModule({mode: copy_graph(graph) for mode, graph in self.graphs.items()}, self.signature)
        memo[id(self)] = twin
        for name, child in self._modules.items():
            twin._modules[name] = copy.deepcopy(child, memo)
        for name, parameter in self._parameters.items():
            twin._parameters[name] = copy.deepcopy(parameter, memo)
        for name, buffer in self._buffers.items():
            twin._buffers[name] = copy.deepcopy(buffer, memo)
        twin._non_persistent_buffers_set = set(self._non_persistent_buffers_set)
        twin.training = self.training
        return twin


class _Attributes:
    """What generated code sees as ``self``: the tensors and submodules of a module, never its methods.

    So a network may have a submodule called ``mode`` or ``graphs``.
    """

    def __init__(self, module: nn.Module) -> None:
        self.__dict__["_held"] = (module._parameters, module._buffers, module._modules)

    def __getattr__(self, name: str) -> Any:
        for held in self.__dict__["_held"]:
            if name in held:
                return held[name]
        raise AttributeError(name)


class GraphInterpreter(fx.Interpreter):
    """Runs a graph of a Program node by node."""

    def fetch_attr(self, target: str) -> Any:
        """Read a tensor of the Program; a layer of the user's may be called as an attribute of its module is."""
        return get_tensor(self.module, target)  # type: ignore[arg-type]  # it is the Program's module


def _compile(module: nn.Module, graph: fx.Graph, observer: taps.Observer | None) -> Any:
    if taps.tapped(graph):
        graph = copy_graph(graph)
        if observer is None:
            taps.strip(graph)
        else:
            taps.observe(graph, observer)
    code = graph.python_code("self")
    inputs = {str(node.target) for node in graph.nodes if node.op == "placeholder"}
    others = {node.name for node in graph.nodes if node.op != "placeholder"}
    words = [part for node in graph.nodes if node.op == "get_attr" for part in str(node.target).split(".")]
    if inputs & (code.globals.keys() | others) or any(keyword.iskeyword(word) for word in words):
        # a name of the user's that Python code cannot hold (an input called "torch", a layer called "lambda"), or that
        # another node has already
        return lambda *flat: GraphInterpreter(module, graph=graph).run(*flat)
    scope = dict(code.globals)
    exec(compile(code.src, "<kfe-fx graph>", "exec"), scope)
    return functools.partial(scope["forward"], _Attributes(module))


def run_node(node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
    """Call the operation of a ``call_function`` node on the values of its arguments."""
    args, kwargs = map_arg((node.args, node.kwargs), value_of)
    return node.target(*args, **kwargs)  # type: ignore[operator]  # a name only for nodes of another kind


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """Return an argument that may be given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def copy_graph(graph: fx.Graph, names: dict[fx.Node, str] | None = None) -> fx.Graph:
    """Copy a graph with its order, meta and node names, or with other ``names``."""
    twin = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        args = map_arg(node.args, lambda arg: copies[arg])
        kwargs = map_arg(node.kwargs, lambda arg: copies[arg])
        name = node.name if names is None else names[node]
        made = copies[node] = twin.create_node(node.op, node.target, args, kwargs, name)  # type: ignore[arg-type]
        made.meta = dict(node.meta)
    return twin


@dataclass
class Program:
    """A captured network: graphs, tensors, how to call it, and the passes it went through."""

    _module: ProgramModule
    example_inputs: tuple[tuple[Any, ...], dict[str, Any]]
    axes: dict[str, dict[int, str]]
    lineage: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    extras: dict[str, Any] = field(default_factory=dict)

    @property
    def graphs(self) -> dict[str, fx.Graph]:
        """The graphs by mode: "eval" always, "train" where training behaves differently and could be captured."""
        return self._module.graphs

    @property
    def signature(self) -> Signature:
        """How the Program is called."""
        return self._module.signature

    def module(self) -> ProgramModule:
        """Return the live nn.Module: training it trains the Program; state-dict keys are the original names."""
        return self._module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network in its present mode."""
        return self._module(*args, **kwargs)

    def train(self, mode: bool = True) -> Program:
        """Switch to the training graph (or back, with ``mode=False``)."""
        self._module.train(mode)
        return self

    def eval(self) -> Program:
        """Switch to the evaluation graph."""
        return self.train(False)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the tensors by original name, as the source module does."""
        return self._module.state_dict()

    def copy(self) -> Program:
        """Return an independent copy: no tensor and no graph is shared."""
        return Program(
            copy.deepcopy(self._module), self.example_inputs, self.axes, self.lineage, self.notes, dict(self.extras)
        )

    def sharing(self) -> Program:
        """Return a Program with graphs of its own over the same tensors, for a pass that replaces the tensors."""
        held, lasting = self._module, self._module.state_dict().keys()
        module = ProgramModule({mode: copy_graph(graph) for mode, graph in held.graphs.items()}, held.signature)
        for name, value in named_tensors(held).items():
            put_tensor(module, name, value, persistent=name in lasting)
        module.train(held.training)
        return Program(module, self.example_inputs, self.axes, self.lineage, self.notes, dict(self.extras))

    def batch_axes(self) -> set[str]:
        """Return the names of the dynamic axes that count examples.

        Axes called "batch" ("batch_1", ...) do wherever they lie; else those called "b", else "n"; else those at dim 0
        of an input that are not called by a word for time.
        """
        names = {axis for dims in self.axes.values() for axis in dims.values()}
        for called in _BATCH_NAMES:
            if found := {name for name in names if called.fullmatch(name)}:
                return found
        return {dims[0] for dims in self.axes.values() if 0 in dims and not _TIME_NAMES.fullmatch(dims[0])}

    def example_dims(self) -> dict[str, int]:
        """Return by name of an input the dim that counts its examples; inputs that hold none are left out."""
        counting = self.batch_axes()
        dims = (
            (name, [dim for dim, axis in sorted(axes.items()) if axis in counting]) for name, axes in self.axes.items()
        )
        return {name: found[0] for name, found in dims if found}

    def flat_examples(self) -> list[Any]:
        """Return the example inputs in graph order."""
        return self.signature.flatten(*self.example_inputs)

    def tensor(self, name: str) -> torch.Tensor:
        """Return the parameter, buffer or constant called ``name``."""
        return get_tensor(self._module, name)

    def names_of(self, name: str) -> tuple[str, ...]:
        """Return every name of the tensor called ``name`` (more than one where parameters are tied)."""
        return tied_names(self._module).get(name, (name,))

    def hash(self) -> str:
        """Hash the graphs: operations, arguments and wiring, not names and not weights."""
        digest = hashlib.sha256()
        for mode in sorted(self.graphs):
            digest.update(f"{mode}\n{graph_text(self.graphs[mode])}".encode())
        return digest.hexdigest()


def graph_text(graph: fx.Graph) -> str:
    """Write a graph as text with nodes numbered in order, so that equal graphs give equal text."""
    number = {node: f"%{index}" for index, node in enumerate(graph.nodes)}
    lines = []
    for node in graph.nodes:
        arguments = map_arg((node.args, node.kwargs), lambda arg: number[arg])
        lines.append(f"{number[node]} {node.op} {node.target} {arguments!r}")
    return "\n".join(lines)


def get_tensor(module: nn.Module, name: str) -> torch.Tensor:
    """Return the tensor at a dotted name.

    Raises:
        KeyError: there is none.
    """
    *path, leaf = name.split(".")
    owner: nn.Module | None = module
    for part in path:
        owner = owner._modules.get(part) if owner is not None else None
    value = None if owner is None else owner._parameters.get(leaf, owner._buffers.get(leaf))
    if value is None:
        raise KeyError(name)
    return value


def get_module(module: nn.Module, path: str) -> nn.Module:
    """Return the module at a dotted path, "" being ``module`` itself.

    Unlike ``get_submodule`` it looks at modules alone: a layer of the user's may be called as a method is.

    Raises:
        KeyError: there is none.
    """
    for part in path.split(".") if path else ():
        child = module._modules.get(part)
        if child is None:
            raise KeyError(path)
        module = child
    return module


def put_tensor(module: nn.Module, name: str, value: torch.Tensor, *, persistent: bool = True) -> None:
    """Set a Parameter or a buffer at a dotted name, making plain modules on the way."""
    path, _, leaf = name.rpartition(".")
    owner = module
    for part in path.split(".") if path else ():
        child = owner._modules.get(part)
        if child is None:
            child = owner._modules[part] = nn.Module()
        owner = child
    if isinstance(value, nn.Parameter):
        owner._parameters[leaf] = value
    else:
        owner._buffers[leaf] = value
        (owner._non_persistent_buffers_set.discard if persistent else owner._non_persistent_buffers_set.add)(leaf)


def named_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and buffers under every name they have."""
    named = dict(module.named_parameters(remove_duplicate=False))
    return named | dict(module.named_buffers(remove_duplicate=False))


def tied_names(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """Map each name to all names of the same tensor object."""
    by_id: dict[int, list[str]] = {}
    for name, value in named_tensors(module).items():
        by_id.setdefault(id(value), []).append(name)
    return {name: tuple(names) for names in by_id.values() for name in names}
