"""Pass ``drop-branches``: whole branches go, and what they are worth without their units stays as a constant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from kfe_fx.errors import PlanError, UsageError
from kfe_fx.labels.analysis import Analysis, analyze
from kfe_fx.labels.branches import Branch, Constant, examine, find_branches, needless, without
from kfe_fx.labels.joins import Join, operands
from kfe_fx.labels.relocate import Relocation
from kfe_fx.passes.base import Pass, PassResult
from kfe_fx.passes.shrink import check_shapes, shapes_after, slice_tensors
from kfe_fx.program import GraphInterpreter, Program, named_tensors, put_tensor
from kfe_fx.training.batches import Batches

aten = torch.ops.aten

Means = Mapping[str, Tensor]

_VIEWS = (aten.view.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class DropBranches(Pass):
    """Remove branches with all of their tensors; a Parameter takes their place where they joined.

    The result computes what the original computes with all units of the branches masked to zero, to rounding: the
    Parameter holds what is left of a branch then (its last bias, behind the norm that followed). Where that is zero
    and added, or one and multiplied, nothing takes its place. In training the same constant stands there, in place of
    batch statistics, dropout and stochastic depth.

    Attributes:
        names: of branches, from ``find_branches``.
        means: the constants to put there instead, by name of a branch, from ``measure_branch_means``.
        heads: as for ``analyze``.
        always: put a Parameter there even where it is zero (or one), to be filled or trained later.
    """

    name: ClassVar[str] = "drop-branches"
    keeps: ClassVar[str] = "trained"
    names: tuple[str, ...] = ()
    means: Means = field(default_factory=dict, repr=False, compare=False)
    heads: str = "auto"
    always: bool = False

    def run(self, program: Program) -> PassResult:
        """Return the Program without the branches; ``program`` stays as it was.

        Raises:
            PlanError: there is no such branch, or those named cannot go together.
            UsageError: a mean of another shape than its constant, or of a branch that is not named.
            VerificationFailed: a node of the result has another shape than before.
        """
        if not self.names:
            return PassResult(program, False, {"dropped": [], "parameters": 0, "constants": 0, "zero": 0})
        twin = program.sharing()
        analysis = analyze(twin, heads=self.heads)
        chosen = self._chosen(analysis)
        whole = examine(analysis, frozenset().union(*(branch.units for branch in chosen)))
        values = self._values(analysis, chosen, whole)
        before = _count(twin)
        trains = {each.source: _trains(twin, branch) for branch in chosen for each in branch.constants}
        constants = [
            None
            if not self.always and needless(analysis, whole.joins, place, value)
            else _place(twin.module(), constant, nn.Parameter(value.clone(), trains.get(constant.source, True)))
            for place, (constant, value) in enumerate(zip(whole.constants, values, strict=True))
        ]
        _remove_tensors(twin.module(), {*whole.parameters, *whole.buffers})
        for mode, graph in twin.graphs.items():
            _reshape_behind(graph, whole.joins[mode])
            _cut(graph, whole.joins[mode], constants)
            _erase(graph, whole.removed[mode])
        _shrink_rest(twin, analysis, whole)
        twin.lineage = (*program.lineage, self.name)
        kept = sum(name is not None for name in constants)
        facts = {
            "dropped": list(self.names),
            "parameters": before - _count(twin),
            "constants": kept,
            "zero": len(constants) - kept,
        }
        return PassResult(twin, True, facts)

    def _chosen(self, analysis: Analysis) -> list[Branch]:
        known = {branch.name: branch for branch in find_branches(analysis)}
        unknown = [name for name in self.names if name not in known]
        if unknown:
            names = ", ".join(known) or "none"
            raise PlanError(f"this network has no branch {unknown[0]!r} that can go; its branches are: {names}")
        strange = [name for name in self.means if name not in self.names]
        if strange:
            raise UsageError(f"drop-branches: there is a mean for {strange[0]!r}, which is not to be dropped")
        return [known[name] for name in dict.fromkeys(self.names)]

    def _values(self, analysis: Analysis, chosen: list[Branch], whole: Branch) -> list[Tensor]:
        """Return what takes the place of each constant: its value or a mean, without channels that go."""
        means = {}
        for branch in (branch for branch in chosen if branch.name in self.means and branch.constants):
            (constant,), mean = branch.constants, self.means[branch.name]
            if mean.shape != constant.value.shape:
                wrong = f"{list(mean.shape)}, the constant is {list(constant.value.shape)}"
                raise UsageError(f"drop-branches: the mean for {branch.name!r} is {wrong}")
            means[constant.source] = mean.detach().to(constant.value)
        values = [means.get(constant.source, constant.value) for constant in whole.constants]
        pairs = zip(whole.constants, values, strict=True)
        return [without(analysis, whole.units, constant, value) for constant, value in pairs]


def measure_branch_means(program: Program, branches: Iterable[Branch], data: Any, *, batch_size: int = 64) -> Means:
    """Measure, in evaluation mode, what each branch gives on the average, as ``DropBranches.means`` takes it.

    Args:
        program: the whole network, which ``branches`` were found in.
        branches: from ``find_branches``; those that leave nothing (an operand of a cat) have no mean.
        data: examples, in any form; targets are not looked at.
        batch_size: examples at a time.

    Returns:
        Name of a branch -> mean over examples and positions, in the shape of its constant ([C, 1, 1] or [C]).

    Raises:
        UsageError: there are no examples.
    """
    sources = {branch.constants[0].source: branch.constants[0] for branch in branches if branch.constants}
    runner = _Measure(program, sources)
    with torch.no_grad():
        for batch in Batches(program, data, batch_size):
            runner.run(*batch.inputs)
    if sources and not runner.counts:
        raise UsageError("drop-branches: the data yields no batches; give at least one example")
    means = {}
    for branch in (branch for branch in branches if branch.constants):
        constant = branch.constants[0]
        mean = runner.sums[constant.source] / runner.counts[constant.source]
        means[branch.name] = mean.reshape(constant.value.shape).to(constant.value)
    return means


class _Measure(GraphInterpreter):
    """Sum the values of nodes over examples and positions, [C, ...] in float64."""

    def __init__(self, program: Program, sources: Mapping[str, Constant]) -> None:
        super().__init__(program.module(), graph=program.graphs["eval"])
        self.sources = sources
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self.sources:
            over = [dim for dim in range(result.dim()) if dim not in self.sources[n.name].dims]
            total = result.detach().double().sum(over)
            self.sums[n.name] = self.sums.get(n.name, torch.zeros_like(total)) + total
            self.counts[n.name] = self.counts.get(n.name, 0) + result.numel() // max(total.numel(), 1)
        return result


def _count(program: Program) -> int:
    return sum(value.numel() for value in program.module().parameters())


def _trains(program: Program, branch: Branch) -> bool:
    return any(program.tensor(name).requires_grad for name in branch.parameters)


def _place(module: nn.Module, constant: Constant, value: nn.Parameter) -> str:
    """Add a Parameter beside the tensors of the module that joined the branch; return its name."""
    taken = {part for name in named_tensors(module) for part in _prefixes(name)}
    wanted = name = f"{constant.module}.constant".lstrip(".")
    number = 1
    while name in taken:
        name, number = f"{wanted}_{number}", number + 1
    put_tensor(module, name, value)
    return name


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _remove_tensors(module: nn.Module, names: set[str]) -> None:
    """Take tensors out of a module, and the submodules that hold nothing then."""
    for name in names:
        *path, leaf = name.split(".")
        owners = [module]
        for part in path:
            owners.append(owners[-1]._modules[part])  # type: ignore[arg-type]
        owners[-1]._parameters.pop(leaf, None)
        owners[-1]._buffers.pop(leaf, None)
        owners[-1]._non_persistent_buffers_set.discard(leaf)
        for owner, part in zip(reversed(owners[:-1]), reversed(path), strict=True):
            child = owner._modules[part]
            if child is not None and not (child._parameters or child._buffers or child._modules):
                del owner._modules[part]


def _reshape_behind(graph: fx.Graph, joins: Iterable[Join]) -> None:
    """Write views behind the joins as reshapes: without the branch a join may lie otherwise in memory."""
    names = {join.node for join in joins}
    reached: set[fx.Node] = set()
    for node in graph.nodes:
        if node.name in names or not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
            if node.target in _VIEWS:
                node.target = aten.reshape.default


def _cut(graph: fx.Graph, joins: Iterable[Join], constants: list[str | None]) -> None:
    """Put Parameters (by name) in the place of operands; where nothing takes it, the join goes with the operand."""
    nodes = {node.name: node for node in graph.nodes}
    lost: dict[str, set[int]] = {}
    for join in joins:
        node = nodes[join.node]
        name = None if join.constant is None else constants[join.constant]
        if join.constant is None:
            lost.setdefault(join.node, set()).add(join.position)
        elif name is None:
            node.replace_all_uses_with(node.args[1 - join.position])  # type: ignore[arg-type]
            graph.erase_node(node)
        else:
            with graph.inserting_before(node):
                node.update_arg(join.position, graph.get_attr(name))
    for name, positions in lost.items():
        nodes[name].update_arg(0, [arg for place, arg in enumerate(operands(nodes[name])) if place not in positions])


def _drop_cats(graph: fx.Graph, joins: Iterable[Join]) -> None:
    """Take out each cat that a single operand is left of; relocators looked at its dims until now."""
    nodes = {node.name: node for node in graph.nodes}
    for name in dict.fromkeys(join.node for join in joins if join.constant is None):
        node = nodes.get(name)
        if node is not None and len(operands(node)) == 1:
            node.replace_all_uses_with(operands(node)[0])
            graph.erase_node(node)


def _erase(graph: fx.Graph, names: frozenset[str]) -> None:
    for node in reversed(list(graph.nodes)):
        if node.name in names:
            graph.erase_node(node)


def _shrink_rest(twin: Program, analysis: Analysis, whole: Branch) -> None:
    """Cut what the units reach beyond the branches (the readers of a cat), and check the shapes of all that is left.

    Raises:
        VerificationFailed: a node has another shape than its labels say.
    """
    slice_tensors(twin, analysis, whole.units)
    gone = analysis.table.gone(whole.units)
    moves = {mode: Relocation(analysis.trackers[mode], graph, gone) for mode, graph in twin.graphs.items()}
    for mode, move in moves.items():
        for name, value in move.run().items():
            put_tensor(twin.module(), name, value, persistent=False)
        _drop_cats(twin.graphs[mode], whole.joins[mode])
        twin.graphs[mode].lint()
    twin.module().recompile()
    for mode, fakes in shapes_after(twin, analysis.trackers["eval"].sizes).items():
        check_shapes(moves[mode], fakes)
