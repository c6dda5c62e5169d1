"""Claims: sort the uses of each parameter into blocks, so that every entry is claimed once."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kfe_fx.curvature.blocks import Block, Use
from kfe_fx.curvature.operands import Operand
from kfe_fx.curvature.pairings import Pairing, transposed
from kfe_fx.curvature.sites import Site
from kfe_fx.program import Program


@dataclass
class _Member:
    """A use of a weight; ``turned``: it reads the weight as the transpose of what its group does."""

    mode: str
    site: Site
    operand: Operand
    turned: bool = False

    @property
    def pairing(self) -> Pairing:
        assert self.site.pairing is not None
        return self.site.pairing

    def bias(self) -> Operand | None:
        """Return what is added, if it can be a homogeneous coordinate."""
        if self.turned or self.pairing.bias is None or not self.pairing.has_column:
            return None  # of a turned use the columns are rows
        found = next((one for one in self.site.operands if one.node is self.pairing.bias), None)
        return found if found is not None and found.movement and found.constant else None


@dataclass(eq=False)
class _Group:
    """Uses of the same entries of one parameter; ``entries`` [K, o, i] is None where they are all, in their order."""

    members: list[_Member]
    entries: Tensor | None = None
    bias: str | None = None
    bias_entries: Tensor | None = None
    columns: dict[int, Operand] = field(default_factory=dict)  # by place of a member, the bias that it has

    @property
    def pairing(self) -> Pairing:
        return self.members[0].pairing


@dataclass
class Claims:
    """All uses of the parameters ``names`` at the ``sites`` of each mode."""

    program: Program
    sites: dict[str, tuple[Site, ...]]
    names: list[str]
    _uses: dict[str, list[_Member]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for mode, found in self.sites.items():
            for site in found:
                for operand in site.operands:
                    for name in operand.names:
                        self._uses.setdefault(name, []).append(_Member(mode, site, operand))

    def blocks(self) -> list[Block]:
        """Return the blocks, in the order of the parameters."""
        groups = {name: made for name in self.names if (made := self._groups(name))}
        self._join_biases(groups)
        joined = {group.bias for made in groups.values() for group in made}
        blocks: list[Block] = []
        for name in self.names:
            if name in groups:
                blocks += self._kronecker(name, groups[name])
            elif name in self._uses and name not in joined:
                blocks.append(self._diagonal(name))
        return blocks

    # weights ----------------------------------------------------------------------------------------------------------

    def _groups(self, name: str) -> list[_Group]:
        """Return the uses by the entries they take, or [] where some use has no pairs or entries overlap."""
        uses = self._uses.get(name, [])
        if not uses or not all(_is_weight(use) for use in uses):
            return []
        if all(use.operand.plain for use in uses):
            shape = tuple(self.program.tensor(name).shape)
            readings = [use.pairing.reading(shape) for use in uses]
            if all(reading in (readings[0], transposed(readings[0])) for reading in readings):
                for use, reading in zip(uses, readings, strict=True):
                    use.turned = reading != readings[0]
                return [_Group(uses)]
        return self._parts(name, sorted(uses, key=lambda use: not use.operand.plain))

    def _parts(self, name: str, uses: list[_Member]) -> list[_Group]:
        groups: list[_Group] = []
        taken = torch.zeros(self.program.tensor(name).numel(), dtype=torch.bool)
        for use in uses:
            entries = use.pairing.matrix(use.operand.index(self.program)).cpu()
            for group in groups:
                if _equal(group.entries, entries) or _equal(group.entries, entries.transpose(1, 2)):
                    use.turned = not _equal(group.entries, entries)
                    group.members.append(use)
                    break
            else:
                fresh = torch.zeros_like(taken)
                fresh[entries.reshape(-1)] = True
                if int(fresh.sum()) < entries.numel() or bool((taken & fresh).any()):
                    return []
                taken |= fresh
                groups.append(_Group([use], entries))
        for group in groups:
            if group.members[0].operand.plain:
                group.entries = None
        return groups

    # biases -----------------------------------------------------------------------------------------------------------

    def _join_biases(self, groups: dict[str, list[_Group]]) -> None:
        """Give each group the bias that is its homogeneous coordinate, if all uses of that bias are such."""
        wanted: dict[str, list[_Group]] = {}
        for group in (group for made in groups.values() for group in made):
            group.columns = self._columns(group)
            for operand in group.columns.values():
                wanted.setdefault(operand.names[0], []).append(group)
                break
        for name, chosen in wanted.items():
            inside = {
                (group.members[place].mode, group.members[place].site.name): operand
                for group in chosen
                for place, operand in group.columns.items()
            }
            places = [(use.mode, use.site.name) for use in self._uses[name]]
            clear = all(use.operand is inside.get(place) for use, place in zip(self._uses[name], places, strict=True))
            if name not in self.names or not clear or len(places) != len(set(places)):
                continue
            operands = [next(iter(group.columns.values())) for group in chosen]
            entries = [None if operand.plain else operand.index(self.program).cpu() for operand in operands]
            if len(chosen) == 1 or _disjoint(entries):
                for group, index in zip(chosen, entries, strict=True):
                    group.bias, group.bias_entries = name, index

    def _columns(self, group: _Group) -> dict[int, Operand]:
        """Return the first bias that a use of a group has, by the places of the uses that have it, or {}."""
        found = {place: bias for place, use in enumerate(group.members) if (bias := use.bias()) is not None}
        first = next(iter(found.values()), None)
        if first is None or any(use.turned and use.pairing.sparse for use in group.members):
            return {}
        return {place: bias for place, bias in found.items() if bias is first or self._same(first, bias)}

    def _same(self, one: Operand, other: Operand) -> bool:
        if one.names != other.names:
            return False
        return (one.plain and other.plain) or _equal(one.index(self.program), other.index(self.program))

    # what comes out ---------------------------------------------------------------------------------------------------

    def _kronecker(self, name: str, groups: list[_Group]) -> list[Block]:
        shape = tuple(self.program.tensor(name).shape)
        made = []
        for number, group in enumerate(groups):
            like = group.pairing.matrix(torch.empty(shape, device="meta")) if group.entries is None else group.entries
            k, o, i = like.shape
            uses: dict[str, list[Use]] = {}
            for place, use in enumerate(group.members):
                column = None if group.bias is None else place in group.columns
                uses.setdefault(use.mode, []).append(Use(use.site, use.operand, column, use.turned))
            made.append(
                Block(
                    name if len(groups) == 1 else f"{name}{_part(group.entries, shape, number)}",
                    "kronecker",
                    (k, o, i + (group.bias is not None)),
                    name,
                    group.bias,
                    {mode: tuple(found) for mode, found in uses.items()},
                    group.entries,
                    None if group.bias_entries is None else group.bias_entries.reshape(k, o),
                    group.pairing,
                )
            )
        return made

    def _diagonal(self, name: str) -> Block:
        uses: dict[str, list[Use]] = {}
        for use in self._uses[name]:
            uses.setdefault(use.mode, []).append(Use(use.site, use.operand))
        value = self.program.tensor(name)
        found = {mode: tuple(each) for mode, each in uses.items()}
        return Block(name, "diagonal", (1, 1, value.numel()), name, uses=found)


def _is_weight(use: _Member) -> bool:
    pairing = use.site.pairing
    if pairing is None or use.operand.node is not pairing.weight or pairing.bias is pairing.weight:
        return False
    # the layouts of data and output must both be known, or neither be needed
    known = use.site.layouts[pairing.data.name] is None, use.site.layouts[use.site.name] is None
    return use.operand.movement and use.operand.constant and known[0] == known[1]


def _equal(one: Tensor | None, other: Tensor) -> bool:
    return one is not None and one.shape == other.shape and bool((one == other).all())


def _disjoint(indices: list[Tensor | None]) -> bool:
    known = [index.reshape(-1) for index in indices if index is not None]
    return len(known) == len(indices) and len(torch.cat(known).unique()) == sum(len(index) for index in known)


def _part(entries: Tensor | None, shape: tuple[int, ...], number: int) -> str:
    """Name a part of a packed weight by its rows where it is a run of them."""
    if entries is None:
        return ""
    per_row = max(1, torch.Size(shape[1:]).numel())
    first, last = int(entries.min()) // per_row, int(entries.max()) // per_row + 1
    if (last - first) * per_row == entries.numel():
        return f"[{first}:{last}]"
    return f"#{number}"
