"""Factors take the place of a layer, in every graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, fx, nn

from kfe_fx import taps
from kfe_fx.errors import VerificationFailed
from kfe_fx.lowrank.layers import Layer, base_of, pointwise_target
from kfe_fx.program import Program, argument, named_tensors, put_tensor
from kfe_fx.shapes import propagate


@dataclass(frozen=True)
class Factors:
    """The weights that a layer is replaced by: ``before`` [c, C_in], ``core`` [r, c, *kernel], ``after`` [C_out, r].

    None: there is no such operation.
    """

    core: Tensor
    before: Tensor | None = None
    after: Tensor | None = None


def replace_layers(program: Program, changes: Mapping[str, tuple[Layer, Factors]]) -> Program:
    """Return a Program in which layers are replaced by factors; ``program`` stays as it was, taps are taken out.

    The weights of a layer called ``conv`` are then ``conv.0.weight``, ``conv.1.weight`` and ``conv.2.weight`` in the
    order in which they are applied, and the bias goes with the last; a parameter of another name than "weight" is a
    layer of its own ("attn.in_proj_weight.0.weight"), and its bias keeps its name.

    Raises:
        VerificationFailed: an output of the result has another shape.
    """
    twin = program.copy()
    for graph in twin.graphs.values():
        taps.strip(graph)
    for layer, factors in changes.values():
        if factors.before is None and factors.after is None:
            continue  # one operation is the layer itself
        _Replacement(twin, layer, factors).run()
    for graph in twin.graphs.values():
        graph.lint()
    twin.module().recompile()
    _check_shapes(program, twin)
    return twin


class _Replacement:
    def __init__(self, twin: Program, layer: Layer, factors: Factors) -> None:
        self.twin, self.layer = twin, layer
        given = {"before": factors.before, "core": factors.core, "after": factors.after}
        self.weights = {role: value for role, value in given.items() if value is not None}
        self.old = {name for op in layer.ops for name in twin.names_of(op.weight)}
        self.like = twin.tensor(layer.core.weight)
        base = self._base()
        self.names = {role: f"{base}.{place}.weight" for place, role in enumerate(self.weights)}

    def run(self) -> None:
        bias = self._own_bias()
        for mode, graph in self.twin.graphs.items():
            self._rewire(graph, mode)
        self._remove(self.old)  # their modules stay until the factors are there: they keep the place in the state dict
        for role, value in self.weights.items():
            made = self._shaped(role, value).detach().to(self.like.device, self.like.dtype).clone()
            put_tensor(self.twin.module(), self.names[role], nn.Parameter(made, self.like.requires_grad))
        if bias is not None:
            self._rename(bias, list(self.names.values())[-1].removesuffix("weight") + "bias")
        self._prune(self.old | ({bias} if bias is not None else set()))

    def _rename(self, name: str, wanted: str) -> None:
        held = self.twin.tensor(name)
        self._remove({name})
        put_tensor(self.twin.module(), wanted, held)
        for graph in self.twin.graphs.values():
            for node in graph.find_nodes(op="get_attr"):
                node.target = wanted if node.target == name else node.target

    # names ------------------------------------------------------------------------------------------------------------

    def _base(self) -> str:
        """Return the first name under which nothing else is called as the factors will be."""
        mine = {*self.old, f"{base_of(self.layer.ops[-1].weight)}.bias"}
        others = named_tensors(self.twin.module()).keys() - mine
        base = self.layer.name
        while any(f"{name}.".startswith(f"{base}.{place}.") for name in others for place in range(len(self.weights))):
            base += ".factors"
        return base

    def _own_bias(self) -> str | None:
        """Return the name of the layer's bias where it is called as one and nothing else reads it."""
        name = f"{base_of(self.layer.ops[-1].weight)}.bias"
        own = {(mode, each) for mode, names in self.layer.ops[-1].nodes.items() for each in names}
        tensors = named_tensors(self.twin.module())
        if name not in tensors or self.twin.names_of(name) != (name,):
            return None
        readers = {
            (mode, user.name)
            for mode, graph in self.twin.graphs.items()
            for node in graph.find_nodes(op="get_attr")
            if node.target == name
            for user in node.users
        }
        return name if readers and readers <= own else None

    def _remove(self, names: set[str]) -> None:
        for name in names:
            *path, leaf = name.split(".")
            owners = _owners(self.twin.module(), path)
            owners[-1]._parameters.pop(leaf)

    def _prune(self, names: set[str]) -> None:
        """Take out submodules of former tensors that hold nothing any more."""
        for name in names:
            *path, _ = name.split(".")
            owners = _owners(self.twin.module(), path)
            for owner, part in reversed(list(zip(owners, path, strict=False))):
                child = owner._modules.get(part)
                if child is not None and not (child._parameters or child._buffers or child._modules):
                    del owner._modules[part]

    # graphs -----------------------------------------------------------------------------------------------------------

    def _shaped(self, role: str, value: Tensor) -> Tensor:
        kernel = self.layer.kernel if role == "core" else (1,) * len(self.layer.kernel)
        return value.reshape(*value.shape[:2], *kernel)

    def _rewire(self, graph: fx.Graph, mode: str) -> None:
        uses = [op.nodes.get(mode, ()) for op in self.layer.ops]
        nodes = {node.name: node for node in graph.nodes}
        if not uses[0]:
            return
        first = nodes[uses[0][0]]
        with graph.inserting_before(first):
            read = {role: graph.get_attr(name) for role, name in self.names.items()}
        for names in zip(*uses, strict=True):
            self._chain(graph, [nodes[name] for name in names], read)
        for node in graph.find_nodes(op="get_attr"):
            if node.target in self.old and not node.users:
                graph.erase_node(node)

    def _chain(self, graph: fx.Graph, held: list[fx.Node], read: Mapping[str, fx.Node]) -> None:
        """Put one chain of operations in the place of another; the core keeps its node and how it is applied."""
        core = held[[op is self.layer.core for op in self.layer.ops].index(True)]
        source, last = held[0].args[0], held[-1]
        bias = argument(last, 2, "bias")
        roles = list(read)
        target = pointwise_target(self.layer.kernel)
        meta = {key: value for key, value in core.meta.items() if key in ("source", "module")}
        if "before" in read:
            with graph.inserting_before(core):
                source = graph.call_function(target, (source, read["before"]))
            source.meta = self._meta(meta, roles.index("before"))
        core.kwargs = {key: value for key, value in core.kwargs.items() if key != "bias"}
        tail = core.args[3:]
        core_bias = bias if roles[-1] == "core" else None
        core.args = (
            (source, read["core"], core_bias, *tail) if core_bias is not None or tail else (source, read["core"])
        )
        core.meta = {**core.meta, **self._meta(meta, roles.index("core"))}
        end = core
        if "after" in read:
            # behind what the last operation was, so that a bias that is computed comes first
            with graph.inserting_after(last):
                args = (core, read["after"]) if bias is None else (core, read["after"], bias)
                end = graph.call_function(target, args)
            end.meta = self._meta(meta, roles.index("after"))
        if end is not last:
            last.replace_all_uses_with(end, delete_user_cb=lambda user: user is not end)
        for node in reversed(held):
            if node is not core:
                graph.erase_node(node)

    def _meta(self, meta: Mapping[str, str], place: int) -> dict[str, str]:
        base = next(iter(self.names.values())).removesuffix(".0.weight")
        return {**meta, "module": f"{base}.{place}"}


def _owners(module: nn.Module, path: Iterable[str]) -> list[nn.Module]:
    """Return a module and its submodules along a path, as far as there are any."""
    found = [module]
    for part in path:  # not by attribute: a network may have a submodule called as a method of the Program's module
        child = found[-1]._modules.get(part)
        if child is None:
            break
        found.append(child)
    return found


def _check_shapes(before: Program, after: Program) -> None:
    for mode in before.graphs:
        shapes = []
        for program in (before, after):
            graph = program.graphs[mode]
            values = propagate(program, mode)
            outputs = [arg for node in graph.find_nodes(op="output") for arg in node.all_input_nodes]
            shapes.append([tuple(getattr(values[node], "shape", ())) for node in outputs])
        if shapes[0] != shapes[1]:
            wrong = f"{shapes[1]} instead of {shapes[0]} in the {mode} graph"
            raise VerificationFailed(f"the decomposed network gives {wrong}; please report it")
