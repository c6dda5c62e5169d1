"""Where a kernel comes from: the nodes of the graph that ONNX Runtime runs, joined with those of the file.

ONNX Runtime fuses and renames. Four things tell what a node of its graph was, in this order:

- its name, which most nodes keep; nodes without one are called after operator and place, as in ``Add_3``;
- a convolution in the blocked layout is called ``<value>_nchwc`` after what it computes, and loses its weight's name;
- the values it reads and writes: those that the file knows enclose the nodes it stands for;
- ``<name>/SomeFusion``, the name of what it replaced.

What is left, such as changes of layout, ONNX Runtime added by itself.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import onnx

from kfe_fx.runtime.modules import SEPARATOR, common, noted_module
from kfe_fx.runtime.profile import Kernel, Profile, read_model

# Into the blocked layout and back: the value is one of the file, the work is not.
_ADDED = ("ReorderInput", "ReorderOutput")
_BLOCKED = "_nchwc"


@dataclass(frozen=True, order=True)
class Origin:
    """A module of the source, by its dotted path, else an operator of the file, else nothing that is known."""

    kind: Literal["module", "operator", "unjoined"]
    name: str = ""


UNJOINED = Origin("unjoined")


class OriginalFile:
    """The nodes of an ONNX file and the module of each."""

    def __init__(self, model: onnx.ModelProto | None) -> None:
        """Read the modules of ``model``; None stands for a file that is no ONNX."""
        graph = model.graph if model is not None else onnx.GraphProto()
        # constants are no nodes to ONNX Runtime, which counts the others in the order of the file
        self.nodes = [node for node in graph.node if node.op_type != "Constant"]
        named = model is not None and model.producer_name == "kfe-fx"
        weights = {tensor.name for tensor in graph.initializer}
        self._weights = [common(name for name in node.input if name in weights) for node in self.nodes]
        self._modules = [_module(node, weight, named) for node, weight in zip(self.nodes, self._weights, strict=True)]
        self._names = {node.name or f"{node.op_type}_{place}": place for place, node in enumerate(self.nodes)}
        self._makers = {value: place for place, node in enumerate(self.nodes) for value in node.output if value}

    def origins(self, profile: Profile) -> list[Origin]:
        """Return where each kernel of a profile comes from."""
        if not self.nodes:
            return [Origin("operator", kernel.op) for kernel in profile.kernels]
        ran = {node.name: node for node in profile.graph.node if node.name} if profile.graph is not None else {}
        kept = {value for node in ran.values() for value in (*node.output, node.name.removesuffix(_BLOCKED)) if value}
        return [self._origin(kernel, ran.get(kernel.name), kept) for kernel in profile.kernels]

    def _origin(self, kernel: Kernel, node: onnx.NodeProto | None, kept: set[str]) -> Origin:
        place = self._names.get(kernel.name)
        if place is not None:
            return self._of([place])
        if kernel.op in _ADDED:
            return UNJOINED
        value = kernel.name.removesuffix(_BLOCKED)
        written = [*(node.output if node is not None else ()), *([value] if value != kernel.name else [])]
        region = self._region(written, set(node.input) if node is not None else set(), kept)
        if region:
            return self._fused(kernel.op, region)
        prefix = kernel.name
        while SEPARATOR in prefix:
            prefix = prefix.rpartition(SEPARATOR)[0]
            if prefix in self._names:
                return self._of([self._names[prefix]])
        return UNJOINED

    def _region(self, written: Sequence[str], read: set[str], kept: set[str]) -> list[int]:
        """Return the nodes that make ``written`` out of ``read`` and of what other kernels make, nearest first."""
        found: dict[int, None] = {}
        waiting = deque(self._makers[value] for value in written if value in self._makers)
        while waiting:
            place = waiting.popleft()
            if place not in found:
                found[place] = None
                inputs = (value for value in self.nodes[place].input if value in self._makers)
                made = (value for value in inputs if value not in read and (value not in kept or value in written))
                waiting.extend(self._makers[value] for value in made)
        return list(found)

    def _fused(self, op: str, region: Sequence[int]) -> Origin:
        """Return where a fused kernel belongs: to the node that gave it its name or, failing that, its weights."""
        same = [place for place in region if self.nodes[place].op_type == op]
        alike = same or [place for place in region if op.endswith(self.nodes[place].op_type)]  # as FusedMatMul
        if alike:
            return self._of(alike[:1])
        return self._of([place for place in region if self._weights[place]] or region[:1])

    def _of(self, places: Sequence[int]) -> Origin:
        modules = [module for module in (self._modules[place] for place in places) if module is not None]
        if not modules:
            return Origin("operator", self.nodes[places[0]].op_type)
        return Origin("module", _ancestor(modules))


def read_original(path: str | os.PathLike[str]) -> OriginalFile:
    """Read the nodes of an ONNX file; one in ONNX Runtime's own format tells none."""
    return OriginalFile(read_model(path))


def _module(node: onnx.NodeProto, weight: str | None, named: bool) -> str | None:
    path = path_of_name(node.name)
    if named and path is not None:
        return path
    noted = noted_module({note.key: note.value for note in node.metadata_props}, weight)
    return path if noted is None else noted


def path_of_name(name: str) -> str | None:
    """Read a module's path from the name of a node, or None where it has none.

    ``layer1.0.conv1/Conv`` is from here, ``/layer1/layer1.0/conv1/Conv`` from torch's older exporter, which gives the
    children of a Sequential the name of their parent.
    """
    parts = name.split(SEPARATOR)[:-1]
    if not parts:
        return None
    path: list[str] = []
    for part in parts:
        if path and part.startswith(f"{path[-1]}."):
            path.pop()
        if part:
            path.append(part)
    return ".".join(path)


def _ancestor(paths: Sequence[str]) -> str:
    """Return the path that all paths begin with: ``a.b`` for ``a.b.c`` and ``a.b.d``."""
    split = [path.split(".") for path in paths]
    shared = []
    for steps in zip(*split, strict=False):
        if len(set(steps)) > 1:
            break
        shared.append(steps[0])
    return ".".join(shared)
