"""Graphs as JSON and back: a list of nodes in order, each naming earlier ones by index."""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Collection
from typing import Any

from torch import fx
from torch._ops import OpOverload

from kfe_fx.errors import UnsupportedModel
from kfe_fx.format import opset
from kfe_fx.format.fields import Malformed, items, record, table, text
from kfe_fx.format.values import decode, encode

_META = ("source", "module")
_MOST_BITS = 4096  # of a size computed in the graph: what a hostile chain of products would pass


def encode_graph(graph: fx.Graph) -> list[dict[str, Any]]:
    """Return the JSON form of a graph.

    Raises:
        UnsupportedModel: an operation or argument that has no form in the file, with the source line.
    """
    index = {node: position for position, node in enumerate(graph.nodes)}
    return [_encode_node(node, index) for node in graph.nodes]


def _encode_node(node: fx.Node, index: dict[fx.Node, int]) -> dict[str, Any]:
    where = node.meta.get("source") or node.name
    target: str | None
    if node.op == "call_function":
        target = opset.name_of(node.target)
    else:
        target = str(node.target) if node.op in ("placeholder", "get_attr", "output") else None
    if target is None:
        raise UnsupportedModel(
            f"{where}: {node.op} of {node.target} has no form in a program file; replace the operation"
        )
    entry: dict[str, Any] = {"op": node.op, "target": target, "name": node.name}
    if node.args:
        entry["args"] = [encode(argument, index.__getitem__, where) for argument in node.args]
    if node.kwargs:
        entry["kwargs"] = {key: encode(value, index.__getitem__, where) for key, value in node.kwargs.items()}
    return entry | {key: node.meta[key] for key in _META if isinstance(node.meta.get(key), str)}


def decode_graph(value: Any, where: str, inputs: Collection[str], tensors: dict[str, str]) -> fx.Graph:
    """Return the graph that ``encode_graph`` wrote.

    ``inputs``: the names of the flat inputs in order; ``tensors``: the kind ("parameter", "buffer") of each name.

    Raises:
        Malformed: anything that is not such a graph; what is returned can be turned into code safely.
    """
    reader = _Reader(inputs, tensors)
    entries = items(value, where)
    for position, entry in enumerate(entries):
        place = f"{where}[{position}]"
        found = record(entry, place, ("op", "target", "name"), ("args", "kwargs", *_META))
        if (found["op"] == "output") != (position == len(entries) - 1):
            raise Malformed(f"{place}: a graph ends with its one output")
        reader.add(found, place)
    if not entries or reader.seen != list(inputs):
        raise Malformed(f"{where}: the inputs are not those of the signature")
    return reader.graph


class _Reader:
    def __init__(self, inputs: Collection[str], tensors: dict[str, str]) -> None:
        self.graph = fx.Graph()
        self.inputs = inputs
        self.tensors = tensors
        self.seen: list[str] = []
        self.nodes: list[fx.Node] = []
        self.bits: dict[fx.Node, int] = {}  # nodes that are Python numbers, and how large they may be

    def add(self, entry: dict[str, Any], where: str) -> None:
        """Append one node."""
        op, target, name = text(entry["op"], where), text(entry["target"], where), identifier(entry["name"], where)
        args = tuple(decode(part, self._node, where) for part in items(entry.get("args", []), where))
        raw = table(entry.get("kwargs", {}), where).items()
        kwargs = {identifier(key, where): decode(part, self._node, where) for key, part in raw}
        made: Any = target
        if op == "call_function":
            made = self._call(target, args, kwargs, where)
        else:
            self._check_other(op, target, args, kwargs, where)
        node = self.graph.create_node(op, made, args, kwargs, name=name)
        if node.name != name:
            raise Malformed(f"{where}: the name {name[:40]!r} is taken or not one of a node")
        node.meta = {key: text(entry[key], where) for key in _META if key in entry}
        self._measure(node, target, where)
        self.nodes.append(node)

    def _node(self, index: int) -> fx.Node:
        if index >= len(self.nodes):
            raise Malformed(f"node {len(self.nodes)} uses node {index}, which does not come before it")
        return self.nodes[index]

    def _check_other(self, op: str, target: str, args: tuple[Any, ...], kwargs: dict[str, Any], where: str) -> None:
        if op == "placeholder" and not args and not kwargs and target in self.inputs:
            self.seen.append(target)
        elif op == "get_attr" and not args and not kwargs:
            if target not in self.tensors:
                raise Malformed(f"{where}: there is no tensor {target[:80]!r}")
        elif op != "output" or target != "output" or kwargs or len(args) != 1 or not isinstance(args[0], tuple | list):
            known = op in ("placeholder", "get_attr", "output")
            raise Malformed(
                f"{where}: not a valid {op}" if known else f"{where}: unknown node kind {op[:40]!r}; update kfe-fx"
            )

    def _call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], where: str) -> Any:
        target = opset.resolve(name)
        if name in opset.FUNCTIONS:
            self._check_function(name, args, kwargs, where)
        else:
            _check_arguments(target, args, kwargs, where)
        if opset.writes(target):
            into = args[0] if args else None
            held = isinstance(into, fx.Node) and into.op == "get_attr" and self.tensors[str(into.target)] == "buffer"
            if not held:
                raise Malformed(f"{where}: {name} may write into a buffer only")
        return target

    def _check_function(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], where: str) -> None:
        arity = opset.FUNCTIONS[name][1]
        if kwargs or len(args) != arity:
            raise Malformed(f"{where}: {name} takes {arity} arguments")
        if name == "operator.getitem":
            fits = isinstance(args[0], fx.Node) and args[0] not in self.bits and type(args[1]) is int
        else:
            fits = all(arg in self.bits if isinstance(arg, fx.Node) else isinstance(arg, int | float) for arg in args)
        if not fits:
            raise Malformed(f"{where}: {name} does not take such arguments")

    def _measure(self, node: fx.Node, name: str, where: str) -> None:
        if node.op != "call_function":
            return
        if name in opset.NUMBERS:
            self.bits[node] = 64
        if name not in opset.FUNCTIONS or name == "operator.getitem":
            return
        sizes = [self.bits[arg] if isinstance(arg, fx.Node) else _bits(arg) for arg in node.args]
        if name == "operator.pow":
            exponent = node.args[1]
            if not isinstance(exponent, int | float) or not -64 <= exponent <= 64:
                raise Malformed(f"{where}: a power of a size is a literal from -64 to 64")
            total = sizes[0] * max(1, int(exponent))
        else:
            total = sum(sizes) if name == "operator.mul" else max(sizes) + 1
        if total > _MOST_BITS:
            raise Malformed(f"{where}: a size that large is never needed")
        self.bits[node] = total


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 64


def _check_arguments(target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], where: str) -> None:
    schema = target._schema.arguments
    positional = [argument.name for argument in schema if not argument.kwarg_only]
    given = {*positional[: len(args)], *kwargs}
    needed = {argument.name for argument in schema if not argument.has_default_value()}
    known = {argument.name for argument in schema}
    twice = given & {*positional[: len(args)]} & kwargs.keys()
    if len(args) > len(positional) or twice or not needed <= given <= known:
        raise Malformed(f"{where}: {target} does not take these arguments")


def identifier(value: Any, where: str) -> str:
    """Return ``value`` if it can stand in generated code as a name."""
    name = text(value, where)
    if not name.isascii() or not name.isidentifier() or keyword.iskeyword(name):
        raise Malformed(f"{where}: {name[:40]!r} is not a name")
    return name


def check_code(graph: fx.Graph, inputs: Collection[str], where: str) -> None:
    """Refuse a graph whose generated code would not compile, or whose inputs hide names that the code uses.

    Raises:
        Malformed: so it is.
    """
    code = graph.python_code("self")
    hidden = {*inputs, *(node.name for node in graph.nodes)} & {*code.globals, "torch", "self"}
    if hidden:
        raise Malformed(f"{where}: nothing in it can be called {min(hidden)!r}")
    try:
        tree = compile(code.src, "<graph>", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Malformed(f"{where}: no code can be made of it: {error}"[:200]) from None
    # one function and nothing else runs when the code is executed
    functions = [value for value in tree.co_consts if inspect.iscode(value)]
    if [function.co_name for function in functions] != ["forward"]:
        raise Malformed(f"{where}: no code can be made of it")
