"""In-place operations become pure ones: functionalisation on the training IR, views included.

A mutation of a view is written back through the chain of views to its base (``select`` by ``select_scatter``, ``slice``
by ``slice_scatter``, reshapes by reshapes), and later reads of any alias are made again from the new base. Aliases
are known exactly: fake tensors share their storage as the real ones do. Mutated buffers get one ``copy_`` at the end.
"""

from __future__ import annotations

import operator
import sys
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from kfe_fx.errors import UnsupportedModel

aten = torch.ops.aten

_PURE_OVERLOADS: dict[Any, Any] = {
    aten.bernoulli_.float: aten.bernoulli.p,
    aten.bernoulli_.Tensor: aten.bernoulli.Tensor,
    aten.normal_.default: aten.normal_functional.default,
}
_RESHAPES = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.view_as.default,
    aten.reshape_as.default,
}
_IDENTITIES = {aten.detach.default, aten.alias.default, aten.contiguous.default, aten.to.dtype, aten.dropout.default}


def purify(graph: fx.Graph) -> None:
    """Rewrite every in-place operation of ``graph`` (with export's ``val`` metas) to pure ones.

    Raises:
        UnsupportedModel: a mutation through a view that cannot be written back, with the source line.
    """
    if any(_mutates(node) for node in graph.nodes):
        _Purifier(graph).run()


def _mutates(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return node.target._schema.is_mutable


def _with_defaults(node: fx.Node) -> tuple[Any, ...]:
    # a default of the in-place overload may be none of the pure one: bernoulli_(p=0.5) and bernoulli(p)
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    left_out = [arg for arg in schema[len(node.args) :] if not arg.kwarg_only and arg.name not in node.kwargs]
    return (*node.args, *(arg.default_value for arg in left_out if arg.has_default_value()))


def _storage(node: Any) -> int | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if isinstance(value, list | tuple) and value and isinstance(value[0], torch.Tensor):
        value = value[0]
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


class _Purifier:
    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.base: dict[int, fx.Node] = {}  # storage -> the node that made it
        self.parent: dict[fx.Node, fx.Node] = {}  # alias -> what it is a view of
        self.version: dict[int, int] = {}
        self.current: dict[fx.Node, tuple[int, fx.Node]] = {}  # node -> (version, its value now)

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.op == "output":
                self._write_back_buffers(node)
            storage = _storage(node)
            # of the arguments as they were written: what they are read as now are copies that nobody writes to
            aliased = [arg for arg in node.all_input_nodes if _storage(arg) == storage]
            first = node.args[0] if node.args else None
            self._read_current(node)
            if storage is None:
                continue
            fresh = node.target is operator.getitem and first not in self.parent  # one of several outputs, not a piece
            if aliased and not fresh:
                self.parent[node] = first if first in aliased else aliased[0]  # type: ignore[assignment]
            elif aliased:
                self.base[storage] = node
            else:
                self.base.setdefault(storage, node)
            if _mutates(node):
                self._mutate(node, storage)
        self.graph.lint()

    def _read_current(self, node: fx.Node) -> None:
        if not any(self.version.get(_storage(arg) or 0) for arg in node.all_input_nodes):
            return
        with self.graph.inserting_before(node):
            # The original arguments are kept: views are re-made from them when their base changes again.
            node.meta["original"] = (node.args, node.kwargs)
            node.args = map_arg(node.args, self._now)
            node.kwargs = map_arg(node.kwargs, self._now)

    def _now(self, node: fx.Node) -> fx.Node:
        storage = _storage(node)
        version = self.version.get(storage, 0) if storage is not None else 0
        if not version or storage is None:
            return node
        known = self.current.get(node)
        if known and known[0] == version:
            return known[1]
        if node not in self.parent:
            return known[1] if known else node
        parent = self.parent[node]
        args, kwargs = node.meta.get("original", (node.args, node.kwargs))
        fresh = self._now(parent)
        swap = lambda arg: fresh if arg is parent else arg
        made = self.graph.call_function(node.target, map_arg(args, swap), map_arg(kwargs, swap))  # type: ignore[arg-type]
        made.meta = {key: value for key, value in node.meta.items() if key != "original"}
        self.current[node] = (version, made)
        return made

    def _mutate(self, node: fx.Node, storage: int) -> None:
        target = node.args[0]
        if not isinstance(target, fx.Node):
            raise _refusal(node, "its target is not a tensor")
        original = node.meta.get("original", (node.args, node.kwargs))[0][0]
        with self.graph.inserting_before(node):
            value = self._pure(node)
            self._write(original, value, storage, node)
        # the in-place call returns its target: its readers read the target, and so the target's present value
        node.replace_all_uses_with(original)
        self.graph.erase_node(node)

    def _pure(self, node: fx.Node) -> fx.Node:
        schema_name = node.target._schema.name.split("::")  # type: ignore[union-attr]
        if schema_name[0] != "aten" or not schema_name[1].endswith("_") or any(k == "out" for k in node.kwargs):
            raise _refusal(node, "no pure form of it is known")
        name, overload = schema_name[1][:-1], node.target._overloadname  # type: ignore[union-attr]
        if name == "copy":
            return self._copy(node)
        if name in ("fill", "zero"):
            fill = node.args[1] if name == "fill" else 0
            if isinstance(fill, fx.Node):
                return self._made(aten.fill.Tensor, (node.args[0], fill), node)
            return self._made(aten.full_like.default, (node.args[0], fill), node)
        pure = _PURE_OVERLOADS.get(node.target)
        if pure is None:
            packet = getattr(aten, name, None)
            pure = getattr(packet, overload or "default", None) if packet is not None else None
        if pure is None:
            raise _refusal(node, "no pure form of it is known")
        made = self._made(pure, _with_defaults(node), node)
        made.kwargs = node.kwargs
        return made

    def _copy(self, node: fx.Node) -> fx.Node:
        target, source = node.args[:2]
        into, value = target.meta["val"], source.meta["val"]  # type: ignore[union-attr]
        made = source
        if value.dtype != into.dtype:
            made = self._made(aten.to.dtype, (made, into.dtype), node)
        if tuple(value.shape) != tuple(into.shape):
            made = self._made(aten.expand_as.default, (made, target), node)
        return made  # type: ignore[return-value]

    def _made(self, target: Any, args: Any, like: fx.Node) -> fx.Node:
        made = self.graph.call_function(target, tuple(args))
        made.meta = {key: value for key, value in like.meta.items() if key != "original"}
        return made

    def _write(self, node: fx.Node, value: fx.Node, storage: int, cause: fx.Node) -> None:
        parent = self.parent.get(node)
        if parent is not None:
            inside = self._into_parent(node, parent, value, cause)
            # a piece of a split is written into what was split, not into the tuple of pieces
            target = self.parent[parent] if node.target is operator.getitem else parent
            self._write(target, inside, storage, cause)
        else:
            self.version[storage] = self.version.get(storage, 0) + 1
        self.current[node] = (self.version[storage], value)

    def _into_parent(self, node: fx.Node, parent: fx.Node, value: fx.Node, cause: fx.Node) -> fx.Node:
        args = node.meta.get("original", (node.args, node.kwargs))[0]
        target = node.target
        if target is operator.getitem:
            return self._into_piece(parent, args[1], value, cause)
        whole = self._now(parent)
        shape = parent.meta["val"].shape if isinstance(parent.meta["val"], torch.Tensor) else None
        if target in _RESHAPES and shape is not None:
            return self._made(aten.reshape.default, (value, self._sizes(parent, shape)), parent)
        if target is aten.permute.default:
            order = [dim % len(args[1]) for dim in args[1]]
            return self._made(aten.permute.default, (value, [order.index(i) for i in range(len(order))]), parent)
        if target in (aten.transpose.int, aten.t.default):
            return self._made(target, (value, *args[1:]), parent)
        if target is aten.select.int:
            return self._put(parent, whole, value, args[1], args[2], select=True)
        if target is aten.narrow.default:
            return self._put(parent, whole, value, args[1], args[2], args[2] + args[3])
        if target is aten.slice.Tensor:
            return self._put_slice(parent, whole, value, *args[1:])
        if target in _IDENTITIES or _mutates(node):
            return value
        raise _refusal(cause, f"it changes a view made by {target}")

    def _into_piece(self, pieces: fx.Node, index: int, value: fx.Node, cause: fx.Node) -> fx.Node:
        args = pieces.meta.get("original", (pieces.args, pieces.kwargs))[0]
        source = self.parent[pieces]
        whole = self._now(source)
        rank = source.meta["val"].dim()
        if pieces.target is aten.unbind.int:
            dim = args[1] if len(args) > 1 else 0
            made = self._put(source, whole, value, dim, index, select=True)
        elif pieces.target in (aten.split.Tensor, aten.chunk.default, aten.split_with_sizes.default):
            dim = (args[2] if len(args) > 2 else 0) % rank
            sizes = [piece.shape[dim] for piece in pieces.meta["val"]]
            start = sum(sizes[:index])
            made = self._put(source, whole, value, dim, start, start + sizes[index])
        else:
            raise _refusal(cause, f"it changes a view made by {pieces.target}")
        return made

    def _put_slice(
        self,
        parent: fx.Node,
        whole: fx.Node,
        value: fx.Node,
        dim: int = 0,
        start: Any = None,
        end: Any = None,
        step: int = 1,
    ) -> fx.Node:
        size = parent.meta["val"].shape[dim]
        numbers = isinstance(size, int) and not isinstance(start, fx.Node) and not isinstance(end, fx.Node)
        if numbers and step == 1:
            first, last, _ = slice(start, end).indices(size)
            return self._put(parent, whole, value, dim, first, last)
        full = (start is None or start == 0) and (end is None or (isinstance(end, int) and end >= sys.maxsize))
        if full and step == 1:
            return value
        return self._made(aten.slice_scatter.default, (whole, value, dim, start, end, step), parent)

    def _put(
        self,
        parent: fx.Node,
        whole: fx.Node,
        value: fx.Node,
        dim: int,
        first: int,
        last: int = 0,
        *,
        select: bool = False,
    ) -> fx.Node:
        """Put ``value`` at ``first:last`` of a dim: before, value, after, as one concatenation."""
        size = parent.meta["val"].shape[dim]
        if not isinstance(size, int):
            target = aten.select_scatter.default if select else aten.slice_scatter.default
            return self._made(
                target, (whole, value, dim, first) if select else (whole, value, dim, first, last), parent
            )
        if select:
            first %= size
            last = first + 1
            value = self._made(aten.unsqueeze.default, (value, dim % parent.meta["val"].dim()), parent)
        pieces = [value]
        if first > 0:
            pieces.insert(0, self._made(aten.slice.Tensor, (whole, dim, 0, first), parent))
        if last < size:
            pieces.append(self._made(aten.slice.Tensor, (whole, dim, last, size), parent))
        return value if len(pieces) == 1 else self._made(aten.cat.default, (pieces, dim), parent)

    def _sizes(self, node: fx.Node, shape: torch.Size) -> list[Any]:
        return [
            size if isinstance(size, int) else self.graph.call_function(aten.sym_size.int, (node, dim))
            for dim, size in enumerate(shape)
        ]

    def _write_back_buffers(self, output: fx.Node) -> None:
        with self.graph.inserting_before(output):
            for storage, version in self.version.items():
                base = self.base[storage]
                if version and base.op == "get_attr":
                    self.graph.call_function(aten.copy_.default, (base, self._now(base)))


def _refusal(node: fx.Node, why: str) -> UnsupportedModel:
    where = node.meta.get("source", "")
    return UnsupportedModel(
        f"{where}: the in-place operation {node.target} cannot be made pure: {why}; write it out of place"
    )
