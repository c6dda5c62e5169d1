"""Blocks: which entries of which parameters share one Kronecker structure, and what is left out.

Each parameter is claimed once: its entries belong to blocks with Kronecker factors, or to one with a diagonal, or it is
named as left out. Weights that are used several times (tied) have one block; a packed weight has one per part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from kfe_fx import taps
from kfe_fx.curvature import rules as _rules  # registers the pairings
from kfe_fx.curvature.layout import Layout
from kfe_fx.curvature.operands import Operand, Operands, canonical_names
from kfe_fx.curvature.pairings import PAIRINGS, Pairing
from kfe_fx.labels.analysis import BATCH, analysis_sizes, track
from kfe_fx.labels.examples import ExampleTracker, follow_examples
from kfe_fx.program import Program, copy_graph
from kfe_fx.shapes import propagate_all

__all__ = ["Block", "Blocks", "LeftOut", "Site", "Use", "find_blocks"]
assert _rules


@dataclass(frozen=True)
class Site:
    """One operation of one graph with parameters among its arguments.

    ``inputs`` are the tensors that its arguments are, or take a size from, where they depend on the examples: what its tap
    keeps. ``layouts`` say where each of them, and
    under the operation's own name the output, holds the examples.
    """

    node: fx.Node
    pairing: Pairing | None
    operands: tuple[Operand, ...]
    inputs: tuple[fx.Node, ...]
    layouts: dict[str, Layout | None]

    @property
    def name(self) -> str:
        """The name of the tapped node."""
        return self.node.name

    @property
    def batched(self) -> bool:
        """Whether the output tells its examples apart, and for pairs of rows the data too."""
        needed = [self.node.name, *([self.pairing.data.name] if self.pairing is not None else [])]
        return all(self.layouts[name] is not None for name in needed)


@dataclass(frozen=True)
class Use:
    """A block's part in one site. ``column``: see ``Pairing.pairs``; ``transposed``: the weight is used as its transpose."""

    site: Site
    operand: Operand
    column: bool | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Block:
    """Entries of parameters with one structure, as a matrix of [K, o, i] (K groups, each with factors of its own).

    ``kind`` is "kronecker", or "diagonal" for what has no pairs of rows: then K = o = 1. ``entries`` tells where the
    weight's part of the matrix lies in the parameter (None: all of it, in its order), ``bias_entries`` the last column.
    ``uses`` are by mode ("eval", "train").
    """

    name: str
    kind: str
    shape: tuple[int, int, int]
    weight: str
    bias: str | None = None
    uses: dict[str, tuple[Use, ...]] = field(default_factory=dict, repr=False)
    entries: Tensor | None = field(default=None, repr=False)
    bias_entries: Tensor | None = field(default=None, repr=False)
    pairing: Pairing | None = field(default=None, repr=False)
    weight_shape: tuple[int, ...] = ()

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters it holds entries of."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def batched(self) -> dict[str, bool]:
        """By mode, whether all uses tell the examples of a batch apart."""
        return {mode: all(use.site.batched for use in uses) for mode, uses in self.uses.items()}

    def matrix(self, values: dict[str, Tensor]) -> Tensor:
        """Gather [K, o, i] from tensors of the parameters' shapes, by name."""
        if self.kind == "diagonal":
            return values[self.weight].reshape(1, 1, -1)
        weight = values[self.weight]
        if self.entries is None:
            assert self.pairing is not None
            made = self.pairing.matrix(weight)
        else:
            made = weight.reshape(-1)[self.entries.to(weight.device)]
        if self.bias is None:
            return made
        given = values[self.bias].reshape(-1)
        column = (
            given.reshape(self.shape[:2]) if self.bias_entries is None else given[self.bias_entries.to(given.device)]
        )
        return torch.cat([made, column.unsqueeze(-1)], -1)

    def put(self, matrix: Tensor, values: dict[str, Tensor]) -> None:
        """Write [K, o, i] into tensors of the parameters' shapes, in place: undoes ``matrix``."""
        if self.kind == "diagonal":
            values[self.weight].copy_(matrix.reshape(values[self.weight].shape))
            return
        weight, target = matrix if self.bias is None else matrix[..., :-1], values[self.weight]
        if self.entries is None:
            assert self.pairing is not None
            target.copy_(self.pairing.tensor(weight, tuple(target.shape)))
        else:
            target.view(-1)[self.entries.reshape(-1).to(target.device)] = weight.reshape(-1)
        if self.bias is not None:
            column, target = matrix[..., -1], values[self.bias]
            if self.bias_entries is None:
                target.copy_(column.reshape(target.shape))
            else:
                target.view(-1)[self.bias_entries.reshape(-1).to(target.device)] = column.reshape(-1)


@dataclass(frozen=True)
class LeftOut:
    """A parameter that no statistics exist for, and why."""

    parameter: str
    reason: str


@dataclass(frozen=True)
class Blocks:
    """All blocks of a Program, the sites to tap by mode, and what is left out."""

    blocks: tuple[Block, ...]
    sites: dict[str, tuple[Site, ...]]
    left_out: tuple[LeftOut, ...]

    def taps(self, mode: str) -> list[tuple[str, list[str]]]:
        """Return what ``taps.insert`` takes."""
        return [(site.name, [node.name for node in site.inputs]) for site in self.sites.get(mode, ())]


class _Look:
    """What rules ask about one graph."""

    def __init__(self, program: Program, graph: fx.Graph, mode: str, trained: set[str]) -> None:
        sizes = analysis_sizes(program)
        twin = program.sharing()
        twin.module().graphs[mode] = graph
        fakes = propagate_all(twin, (mode,), sizes)[mode]
        self.operands = Operands(program, graph, trained)
        self.examples: ExampleTracker = follow_examples(twin, BATCH)
        track(self.examples, graph, fakes, sizes)
        self.graph = graph

    def fixed(self, node: fx.Node) -> bool:
        return self.operands.fixed(node)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return self.examples.shape(node)

    def is_tensor(self, node: Any) -> bool:
        return self.examples.is_tensor(node)

    def layout(self, node: fx.Node) -> Layout | None:
        dim, order = self.examples.layout(node)
        return None if dim is None or order is None else Layout(dim, order)

    def _behind(self, node: fx.Node) -> list[fx.Node]:
        """List the tensors that the arguments are, or take their sizes from, and that depend on the examples."""
        found: list[fx.Node] = []
        for arg in node.all_input_nodes:
            if not self.fixed(arg):
                found += [arg] if self.is_tensor(arg) else self._behind(arg)
        return found

    def sites(self, missing: Callable[[str, str], None]) -> list[Site]:
        """Find the operations where parameters meet what depends on the examples."""
        found = []
        for node in self.graph.nodes:
            if node.op not in ("call_function", "call_module") or self.fixed(node):
                continue
            operands = [operand for arg in node.all_input_nodes if (operand := self.operands.of(arg)) is not None]
            if not operands:
                continue
            if not self.is_tensor(node) or node.op == "call_module":
                for operand in operands:
                    for name in operand.names:
                        missing(name, f"goes into {str(node.target).removesuffix('.default')}, which has no rule")
                continue
            rule = PAIRINGS.get(node.target)
            pairing = rule(self, node) if rule is not None else None
            inputs = tuple(dict.fromkeys(self._behind(node)))
            layouts = {arg.name: self.layout(arg) for arg in (*inputs, node)}
            found.append(Site(node, pairing, tuple(operands), inputs, layouts))
        return found


def find_blocks(program: Program) -> Blocks:
    """Find the blocks of all floating-point parameters of a Program, with or without taps in its graphs."""
    canonical = canonical_names(program)
    named = dict(program.module().named_parameters(remove_duplicate=False))
    trained = {name for name, value in named.items() if value.is_floating_point() and canonical[name] == name}
    reasons: dict[str, str] = {}
    sites: dict[str, tuple[Site, ...]] = {}
    for mode in sorted(program.graphs):
        graph = copy_graph(program.graphs[mode])
        taps.strip(graph)
        sites[mode] = tuple(_Look(program, graph, mode, trained).sites(reasons.setdefault))
    claims = _Claims(program, sites, {name for name in trained if name not in reasons})
    blocks = claims.blocks()
    claimed = {name for block in blocks for name in block.parameters}
    for name in trained - claimed:
        reasons.setdefault(name, "never reaches an output")
    left = tuple(LeftOut(name, reasons[name]) for name in named if name in reasons)
    return Blocks(tuple(blocks), sites, left)


@dataclass
class _Group:
    """Uses of the same entries of one parameter."""

    entries: Tensor | None
    first: Site
    members: list[tuple[str, Site, Operand, bool]] = field(default_factory=list)  # mode, site, operand, transposed


class _Claims:
    """Sort the uses of each parameter into blocks."""

    def __init__(self, program: Program, sites: dict[str, tuple[Site, ...]], names: set[str]) -> None:
        self.program = program
        self.names = names
        self.uses: dict[str, list[tuple[str, Site, Operand]]] = {}
        for mode, found in sites.items():
            for site in found:
                for operand in site.operands:
                    for name in operand.names:
                        self.uses.setdefault(name, []).append((mode, site, operand))

    def blocks(self) -> list[Block]:
        groups = {name: made for name in self.names if (made := self._groups(name))}
        biases = self._biases(groups)
        blocks: list[Block] = []
        for name in dict(self.program.module().named_parameters()):
            if name in groups:
                blocks += self._kronecker(name, groups[name], biases)
            elif name in self.names and name in self.uses and not any(name == found[0] for found in biases.values()):
                blocks.append(self._diagonal(name))
        return blocks

    def _groups(self, name: str) -> list[_Group]:
        """Return the uses by the entries they take, or [] where some use has no pairs or entries overlap."""
        uses = self.uses.get(name, [])
        if not all(_is_weight(site, operand) for _, site, operand in uses):
            return []
        first = uses[0][1] if uses else None
        single = all(operand.plain and site.pairing == _like(site, first) for _, site, operand in uses)
        groups: list[_Group] = []
        for mode, site, operand in uses:
            assert site.pairing is not None
            if single:
                groups = groups or [_Group(None, site)]
                groups[0].members.append((mode, site, operand, False))
                continue
            entries = site.pairing.matrix(operand.index(self.program, {}))
            if len(entries.unique()) < entries.numel():
                return []
            home = next((group for group in groups if _same(group.entries, entries)), None)
            turned = entries.transpose(1, 2)
            other = next((group for group in groups if _same(group.entries, turned)), None) if home is None else None
            if home is None and other is None:
                if any(torch.isin(entries, group.entries).any() for group in groups if group.entries is not None):
                    return []
                home = _Group(entries, site)
                groups.append(home)
            (home or other).members.append((mode, site, operand, home is None))  # type: ignore[union-attr]
        return groups

    def _biases(self, groups: dict[str, list[_Group]]) -> dict[int, tuple[str, Tensor | None]]:
        """Return, by id of a group, the parameter and entries of the bias that is its homogeneous coordinate."""
        wanted: dict[int, tuple[str, Operand]] = {}
        refused: set[str] = set()
        taken: dict[str, list[int]] = {}
        for group in (group for made in groups.values() for group in made):
            found = [(_bias(site), turned) for _, site, _, turned in group.members]
            present = [operand for operand, _ in found if operand is not None]
            joint = present and all(turned is False for _, turned in found)
            same = present and all(_same_operand(present[0], operand) for operand in present)
            if joint and same and group.first.pairing is not None and group.first.pairing.has_column:
                wanted[id(group)] = (present[0].names[0], present[0])
                taken.setdefault(present[0].names[0], []).append(id(group))
            else:
                refused |= {name for operand in present for name in operand.names}
        inside = {
            id(group): {(mode, site.name) for mode, site, _, _ in group.members} for m in groups.values() for group in m
        }
        for name, ids in taken.items():
            places = set().union(*(inside[one] for one in ids))
            only = all((mode, site.name) in places and _bias(site) is not None for mode, site, _ in self.uses[name])
            clear = all(
                site.pairing is not None and operand.node is site.pairing.bias for _, site, operand in self.uses[name]
            )
            if (
                name not in self.names
                or not only
                or not clear
                or (len(ids) > 1 and not self._disjoint(name, wanted, ids))
            ):
                refused.add(name)
        made: dict[int, tuple[str, Tensor | None]] = {}
        for one, (name, operand) in wanted.items():
            if name not in refused:
                made[one] = (name, None if operand.plain else operand.index(self.program, {}))
        return made

    def _disjoint(self, name: str, wanted: dict[int, tuple[str, Operand]], ids: list[int]) -> bool:
        entries = torch.cat([wanted[one][1].index(self.program, {}).reshape(-1) for one in ids])
        return len(entries.unique()) == len(entries)

    def _kronecker(self, name: str, groups: list[_Group], biases: dict[int, tuple[str, Tensor | None]]) -> list[Block]:
        made = []
        value = self.program.tensor(name)
        for number, group in enumerate(groups):
            pairing = group.first.pairing
            assert pairing is not None
            like = pairing.matrix(torch.empty(value.shape, device="meta")) if group.entries is None else group.entries
            bias, bias_entries = biases.get(id(group), (None, None))
            uses: dict[str, list[Use]] = {}
            for mode, site, operand, turned in group.members:
                column = None if bias is None else _bias(site) is not None
                uses.setdefault(mode, []).append(Use(site, operand, column, turned))
            k, o, i = like.shape
            if bias_entries is not None:
                bias_entries = pairing.bias_matrix(bias_entries, k)
            made.append(
                Block(
                    name if len(groups) == 1 else f"{name}{_part(group.entries, value.shape, number)}",
                    "kronecker",
                    (k, o, i + (bias is not None)),
                    name,
                    bias,
                    {mode: tuple(found) for mode, found in uses.items()},
                    group.entries,
                    bias_entries,
                    pairing,
                    tuple(value.shape),
                )
            )
        return made

    def _diagonal(self, name: str) -> Block:
        uses: dict[str, list[Use]] = {}
        for mode, site, operand in self.uses[name]:
            uses.setdefault(mode, []).append(Use(site, operand))
        shape = tuple(self.program.tensor(name).shape)
        size = self.program.tensor(name).numel()
        return Block(
            name,
            "diagonal",
            (1, 1, size),
            name,
            uses={mode: tuple(found) for mode, found in uses.items()},
            weight_shape=shape,
        )


def _is_weight(site: Site, operand: Operand) -> bool:
    pairing = site.pairing
    if pairing is None or not operand.movement or operand.node is not pairing.weight:
        return False
    if any(step.op == "placeholder" for step in operand.steps) or pairing.bias is pairing.weight:
        return False
    # the layouts of data and output must both be known, or neither be needed
    return (site.layouts[pairing.data.name] is None) == (site.layouts[site.node.name] is None)


def _like(site: Site, first: Site | None) -> Pairing | None:
    """Return the pairing of ``site`` if it reads its weight as that of ``first`` does."""
    if first is None or site is first or site.pairing is None or first.pairing is None:
        return site.pairing
    same = type(site.pairing) is type(first.pairing)
    names = ("groups", "weight_letters", "data_letters", "out_letters")
    alike = same and all(getattr(site.pairing, x, 0) == getattr(first.pairing, x, 0) for x in names)
    return site.pairing if alike else None


def _bias(site: Site) -> Operand | None:
    """Return the bias of a site if it can be a homogeneous coordinate."""
    pairing = site.pairing
    if pairing is None or pairing.bias is None:
        return None
    operand = next((one for one in site.operands if one.node is pairing.bias), None)
    movable = operand is not None and operand.movement and not any(s.op == "placeholder" for s in operand.steps)
    return operand if movable else None


def _same_operand(one: Operand, other: Operand) -> bool:
    if one.names != other.names:
        return False
    return (one.plain and other.plain) or one.node is other.node


def _same(one: Tensor | None, other: Tensor) -> bool:
    return one is not None and one.shape == other.shape and bool((one == other).all())


def _part(entries: Tensor | None, shape: torch.Size, number: int) -> str:
    """Name a part of a packed weight by its rows where it is a run of them."""
    if entries is None:
        return ""
    per_row = max(1, shape[1:].numel())
    first, last = int(entries.min()) // per_row, int(entries.max()) // per_row + 1
    if (last - first) * per_row == entries.numel():
        return f"[{first}:{last}]"
    return f"#{number}"
