"""The store: all second-moment statistics of one network in one place, additive, in one safetensors file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kfe_fx import __version__, taps
from kfe_fx.curvature.blocks import Blocks
from kfe_fx.curvature.distributed import Group
from kfe_fx.curvature.eigen import eigenbasis
from kfe_fx.curvature.kernels import symmetric
from kfe_fx.curvature.statistics import Basis, Factors, Moments, Running, added_lengths
from kfe_fx.curvature.temporal import Lagged
from kfe_fx.errors import UsageError
from kfe_fx.program import Program

if TYPE_CHECKING:
    from kfe_fx.curvature.operators import Curvature

FORMAT = 2
READS = (1, FORMAT)  # files of version 1 have no statistics of neighbouring steps


@dataclass
class BlockStore:
    """What is known of one block; see ``Block`` for its shape [K, o, i].

    ``sums`` holds A [K, i, i] and G [K, o, o] (upper block triangles, or diagonals), S [K, o, i] (squares in the
    eigenbasis) and D [K, o, i] (squares of the parameters' gradients); ``counts`` what to divide them by; ``basis``
    U_A, U_G (columns are eigenvectors) with lam_A, lam_G. Where steps of sequences were looked at there are A1, G1 (as
    A, G, of each step and the one before) and lengths [L + 1], how many sequences have so many steps.
    """

    kind: str
    shape: tuple[int, int, int]
    parameters: tuple[str, ...]
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    basis: dict[str, Tensor] = field(default_factory=dict)
    fallback: str = ""
    like: Tensor = field(default_factory=lambda: torch.empty(0), repr=False, compare=False)  # type and device of sums

    @property
    def examples(self) -> float:
        """How many examples the statistics are of."""
        return max(
            (self.counts.get(key, 0.0) for key in ("examples", "S_examples", "D_examples", "batches")), default=0.0
        )

    def _mean(self, key: str, count: str) -> Tensor | None:
        total = self.sums.get(key)
        if total is None:
            return None
        return (symmetric(total) if key in "AG" and total.dim() == 3 else total) / max(self.counts.get(count, 0.0), 1.0)

    @property
    def A(self) -> Tensor | None:
        """Mean second moment of the right rows (inputs), [K, i, i] or its diagonal [K, i]."""
        return self._mean("A", "rows")

    @property
    def G(self) -> Tensor | None:
        """Second moment of the left rows (gradients) per example, [K, o, o] or its diagonal [K, o]."""
        return self._mean("G", "examples")

    @property
    def lagged(self) -> Lagged | None:
        """A and G with what neighbouring steps have in common, or None where that was not measured."""
        A, G, A1, G1 = self.A, self.G, self._mean("A1", "rows"), self._mean("G1", "examples")
        if A is None or G is None or A1 is None or G1 is None or "lengths" not in self.sums:
            return None
        return Lagged(A, G, A1, G1, self.sums["lengths"])

    @property
    def S(self) -> Tensor | None:
        """EKFAC second moments S* [K, o, i] in the eigenbasis."""
        return self._mean("S", "S_examples")

    @property
    def S_ra(self) -> Tensor | None:
        """EKFAC-ra's second moments [K, o, i] in the eigenbasis: B·(mean rotated gradient)², averaged over batches."""
        return self._mean("S_ra", "batches")

    @property
    def D(self) -> Tensor | None:
        """Diagonal of the gradient's second moment in the parameters themselves, [K, o, i]."""
        return self._mean("D", "D_examples")


@dataclass
class Store:
    """Statistics of a network's gradients per block, with what is needed to trust them.

    ``graph`` and ``weights`` are hashes of the network that they were measured on; ``facts`` record source, loss,
    reduction, sharing, profile, number of examples and of gradients that were not finite. Sums of shards and processes
    add (``merge``); bases are made of the sum (``decompose``).
    """

    graph: str
    weights: str
    blocks: dict[str, BlockStore] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, program: Program, blocks: Blocks, **facts: Any) -> Store:
        """Make an empty store of a Program's blocks."""
        known = {block.name: BlockStore(block.kind, block.shape, block.parameters) for block in blocks.blocks}
        for block in blocks.blocks:
            known[block.name].like = program.tensor(block.weight).detach().new_empty(0)
        return cls(
            graph_hash(program), weights_hash(program), known, {"format": FORMAT, "kfe_fx": __version__, **facts}
        )

    # filling ---------------------------------------------------------------------------------------------------------

    def add_factors(self, factors: Factors) -> None:
        """Add the sums of a pass."""
        for name, sums in factors.sums.items():
            block = self.blocks[name]
            _add(block.sums, "A", sums.A)
            _add(block.sums, "G", sums.G)
            if sums.A1 is not None and sums.G1 is not None and sums.lengths is not None:
                _add(block.sums, "A1", sums.A1)
                _add(block.sums, "G1", sums.G1)
                _add(block.sums, "lengths", sums.lengths)
            _count(block.counts, rows=sums.rows, examples=sums.examples)

    def add_diagonal(self, moments: Moments) -> None:
        """Add second moments that were taken in the parameters themselves."""
        for name, sums in moments.sums.items():
            _add(self.blocks[name].sums, "D", sums.S)
            _count(self.blocks[name].counts, D_examples=sums.examples)

    def add_moments(self, moments: Moments) -> None:
        """Add second moments that were taken in this store's bases."""
        for name, sums in moments.sums.items():
            _add(self.blocks[name].sums, "S", sums.S)
            _count(self.blocks[name].counts, S_examples=sums.examples)

    def add_running(self, running: Running) -> None:
        """Add the running-average variant that was taken in this store's bases."""
        for name, sums in running.sums.items():
            _add(self.blocks[name].sums, "S_ra", sums.S)
            _count(self.blocks[name].counts, batches=sums.batches)

    def describe(self, facts: dict[str, Any]) -> None:
        """Record where the statistics come from; counts are summed over the ranks of a process group."""
        group = Group.current()
        self.facts |= facts
        if group.size > 1:
            self.facts["examples"] = int(group.sum_number(float(facts.get("examples", 0))))
            skipped = facts.get("nonfinite", {})
            totals = {name: int(group.sum_number(float(skipped.get(name, 0)))) for name in self.blocks}
            self.facts["nonfinite"] = {name: times for name, times in totals.items() if times}

    def complete(self, *, moments: bool) -> None:
        """Make zero sums where this process has seen nothing of what others have, so that all can add."""
        keys = ("S", "S_ra") if moments else ("A", "G", "A1", "G1", "D", "lengths")
        mine = {
            (name, key): tuple(block.sums[key].shape)
            for name, block in self.blocks.items()
            for key in keys
            if key in block.sums
        }
        for theirs in Group.current().gather(mine):
            for (name, key), shape in theirs.items():
                held, like = self.blocks[name].sums, self.blocks[name].like
                if key == "lengths":
                    held[key] = added_lengths(held.get(key), like.new_zeros(shape, dtype=torch.float64))
                elif key not in held:
                    held[key] = like.new_zeros(shape)

    def decompose(self, group: Group | None = None) -> None:
        """Compute eigenbases of all factors, in float64, spread over the ranks of a process group."""
        group = group or Group.current()
        known = [block for block in self.blocks.values() if "A" in block.sums and "G" in block.sums]
        for block in known[group.rank :: group.size]:  # each rank its own first, so that all work at once
            block.fallback = ""
            for side, factor in (("A", block.A), ("G", block.G)):
                assert factor is not None
                found = eigenbasis(factor)
                block.basis[f"lam_{side}"] = found.values
                block.fallback = "; ".join(filter(None, (block.fallback, found.fallback)))
                if found.vectors is not None:
                    block.basis[f"U_{side}"] = found.vectors
        told = group.gather([block.fallback for block in known])
        for number, block in enumerate(known):
            owner = number % group.size
            block.fallback = told[owner][number]
            for side in "AG":
                total = block.sums[side]
                if group.rank != owner:
                    block.basis[f"lam_{side}"] = total.new_empty(total.shape[:2])
                    if total.dim() == 3:
                        block.basis[f"U_{side}"] = torch.empty_like(total)
                for key in (f"lam_{side}", f"U_{side}"):
                    if key in block.basis:
                        block.basis[key] = block.basis[key].contiguous()
                        group.share(block.basis[key], owner)
            # what was measured in another basis
            for key in ("S", "S_ra"):
                block.sums.pop(key, None)
            for key in ("S_examples", "batches"):
                block.counts.pop(key, None)

    def bases(self) -> dict[str, Basis]:
        """Return the eigenbases by block."""
        return {
            name: Basis(block.basis.get("U_A"), block.basis.get("U_G"))
            for name, block in self.blocks.items()
            if block.basis
        }

    def share_bases(self, other: Store) -> None:
        """Take the eigenbases of another store, for S* that adds to what that one holds.

        Raises:
            UsageError: it has none.
        """
        if not any(block.basis for block in other.blocks.values() if block.kind == "kronecker"):
            raise UsageError("this store holds no eigenbases; fit 'kfac', or call decompose() on merged factors")
        for name, block in self.blocks.items():
            block.basis, block.fallback = dict(other.blocks[name].basis), other.blocks[name].fallback

    def operator(self, program: Program, kind: str = "ekfac") -> Curvature:
        """Return the statistics as a linear operator on vectors {name: tensor of the parameter's shape}.

        Args:
            program: the network that they are of.
            kind: "diagonal", "kfac" or "ekfac".

        Raises:
            UsageError: they are of another network, or hold nothing of this kind.
        """
        from kfe_fx.curvature.operators import Curvature

        return Curvature(self, program, kind)

    # checking --------------------------------------------------------------------------------------------------------

    def check(self, program: Program, *, weights: bool = False) -> None:
        """Refuse a network that the statistics are not of; with ``weights`` also one that was trained since.

        Raises:
            UsageError: the hashes differ.
        """
        if graph_hash(program) != self.graph:
            raise UsageError(
                "these curvature statistics are of another network (its graph or shapes differ); fit them again"
            )
        if weights and weights_hash(program) != self.weights:
            raise UsageError("these curvature statistics are older than the weights; fit them again")

    def merge(self, other: Store) -> Store:
        """Return the sum of two stores of the same network, measured on different examples.

        S* adds only within one basis; where both have factors alone, call ``decompose`` on the result.

        Raises:
            UsageError: they are of different networks or sources, or hold S* in different bases.
        """
        for key, mine, theirs in (
            ("graph", self.graph, other.graph),
            ("weights", self.weights, other.weights),
            *((key, self.facts.get(key), other.facts.get(key)) for key in ("source", "sharing", "loss", "profile")),
        ):
            if mine != theirs:
                raise UsageError(f"these curvature statistics do not add: their {key} differs ({mine} and {theirs})")
        total = Store(self.graph, self.weights, {}, dict(self.facts))
        if self.blocks.keys() != other.blocks.keys():
            raise UsageError("these curvature statistics do not add: their blocks differ")
        for name, mine in self.blocks.items():
            total.blocks[name] = _merged(name, mine, other.blocks[name])
        # what both have measured is of different examples; else one may add S* to the factors of the same
        shared = any(mine.sums.keys() & other.blocks[name].sums.keys() for name, mine in self.blocks.items())
        add = sum if shared else max
        examples = [store.facts.get("examples", 0) for store in (self, other)]
        skipped = [store.facts.get("nonfinite", {}) for store in (self, other)]
        total.facts["examples"] = add(examples)
        total.facts["nonfinite"] = {
            name: add(one.get(name, 0) for one in skipped)
            for name in self.blocks
            if any(name in one for one in skipped)
        }
        return total

    # files -----------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file; it appears whole or not at all.

        Raises:
            BadFile: it cannot be written there.
        """
        from kfe_fx.curvature.store_file import write

        return write(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Store:
        """Read a store.

        Raises:
            BadFile: it is no such file, or is damaged.
        """
        from kfe_fx.curvature.store_file import read

        return read(Path(path))


def _add(held: dict[str, Tensor], key: str, value: Tensor) -> None:
    if key == "lengths":
        value = added_lengths(held.get(key), value)
    elif key in held:
        value = held[key] + value
    held[key] = value


def _count(counts: dict[str, float], **more: float) -> None:
    for key, value in more.items():
        counts[key] = counts.get(key, 0.0) + value


def _merged(name: str, mine: BlockStore, theirs: BlockStore) -> BlockStore:
    total = BlockStore(mine.kind, mine.shape, mine.parameters, fallback=mine.fallback)
    same = mine.basis.keys() == theirs.basis.keys() and all(
        torch.equal(mine.basis[key], theirs.basis[key]) for key in mine.basis
    )
    if {"S", "S_ra"} & (mine.sums.keys() | theirs.sums.keys()) and not same:
        raise UsageError(
            f"the second moments of {name} are in different eigenbases and do not add; merge stores of factors, then "
            "decompose and fit S* in the shared basis"
        )
    if same:
        total.basis = dict(mine.basis)
    for block in (mine, theirs):
        for key, value in block.sums.items():
            _add(total.sums, key, value)
    for key in mine.counts.keys() | theirs.counts.keys():
        total.counts[key] = mine.counts.get(key, 0.0) + theirs.counts.get(key, 0.0)
    return total


def graph_hash(program: Program) -> str:
    """Hash the graphs of a Program without its taps, and the shapes of its parameters."""
    if any(taps.tapped(graph) for graph in program.graphs.values()):
        program = program.sharing()
        for graph in program.graphs.values():
            taps.strip(graph)
    shapes = [f"{name} {list(value.shape)}" for name, value in program.module().named_parameters()]
    return hashlib.sha256("\n".join([program.hash(), *shapes]).encode()).hexdigest()


def weights_hash(program: Program) -> str:
    """Hash the parameters and buffers of a Program by name and value."""
    digest = hashlib.sha256()
    for name, value in sorted(program.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
