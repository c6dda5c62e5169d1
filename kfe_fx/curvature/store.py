"""The store: all second-moment statistics of one network in one place, additive, in one safetensors file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kfe_fx import __version__, taps
from kfe_fx.curvature.blocks import Blocks
from kfe_fx.curvature.distributed import Group
from kfe_fx.curvature.eigen import eigenbasis
from kfe_fx.curvature.kernels import symmetric
from kfe_fx.curvature.statistics import MAX_DENSE, Basis, Factors, Moments
from kfe_fx.errors import BadFile, UsageError
from kfe_fx.program import Program

FORMAT = 1


@dataclass
class BlockStore:
    """What is known of one block; see ``Block`` for its shape [K, o, i].

    ``sums`` holds A [K, i, i] and G [K, o, o] (upper block triangles, or diagonals), S [K, o, i] (squares in the
    eigenbasis) and D [K, o, i] (squares of the parameters' gradients); ``counts`` what to divide them by; ``basis`` U_A,
    U_G (columns are eigenvectors) with lam_A, lam_G.
    """

    kind: str
    shape: tuple[int, int, int]
    parameters: tuple[str, ...]
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    basis: dict[str, Tensor] = field(default_factory=dict)
    fallback: str = ""

    @property
    def examples(self) -> float:
        """How many examples the statistics are of."""
        return max((self.counts.get(key, 0.0) for key in ("examples", "S_examples", "D_examples")), default=0.0)

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
    def S(self) -> Tensor | None:
        """EKFAC second moments S* [K, o, i] in the eigenbasis."""
        return self._mean("S", "S_examples")

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

    def describe(self, facts: dict[str, Any]) -> None:
        """Record where the statistics come from."""
        group = Group.current()
        self.facts |= facts
        if group.size > 1:
            self.facts["examples"] = int(group.sum_number(float(facts.get("examples", 0))))

    def complete(self, *, moments: bool) -> None:
        """Make zero sums where a process has seen nothing, so that all can add."""
        for block in self.blocks.values():
            groups, high, wide = block.shape
            if moments and "S" not in block.sums:
                block.sums["S"] = torch.zeros(block.shape)
            elif not moments and block.kind == "kronecker" and "A" not in block.sums:
                block.sums["A"] = torch.zeros((groups, wide, wide) if wide <= MAX_DENSE else (groups, wide))
                block.sums["G"] = torch.zeros((groups, high, high) if high <= MAX_DENSE else (groups, high))

    def decompose(self, group: Group | None = None) -> None:
        """Compute eigenbases of all factors, in float64, spread over the ranks of a process group."""
        group = group or Group.current()
        for number, block in enumerate(self.blocks.values()):
            A, G = block.A, block.G
            if A is None or G is None:
                continue
            owner = number % group.size
            for side, factor in (("A", A), ("G", G)):
                if group.rank == owner:
                    found = eigenbasis(factor)
                    values, vectors = found.values, found.vectors
                    block.fallback = "; ".join(filter(None, (block.fallback, found.fallback)))
                else:
                    values = factor.new_empty(factor.shape[:2])
                    vectors = torch.empty_like(factor) if factor.dim() == 3 else None
                group.share(values, owner)
                block.basis[f"lam_{side}"] = values
                if vectors is not None:
                    vectors = vectors.contiguous()
                    group.share(vectors, owner)
                    block.basis[f"U_{side}"] = vectors
            block.sums.pop("S", None)  # what was measured in another basis

    def bases(self) -> dict[str, Basis]:
        """Return the eigenbases by block."""
        return {
            name: Basis(block.basis.get("U_A"), block.basis.get("U_G"))
            for name, block in self.blocks.items()
            if block.basis
        }

    # checking --------------------------------------------------------------------------------------------------------

    def check(self, program: Program, *, weights: bool = False) -> None:
        """Refuse a network that the statistics are not of; with ``weights`` also one that was trained since.

        Raises:
            UsageError: the hashes differ.
        """
        if graph_hash(program) != self.graph:
            raise UsageError("these curvature statistics are of another network (its graph differs); fit them again")
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
        total.facts["examples"] = self.facts.get("examples", 0) + other.facts.get("examples", 0)
        for name, mine in self.blocks.items():
            total.blocks[name] = _merged(name, mine, other.blocks[name])
        return total

    # files -----------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file: tensors ``block/name``, metadata as JSON; the file appears whole or not at all."""
        from safetensors.torch import save

        from kfe_fx.format.atomic import replacing

        tensors: dict[str, Tensor] = {}
        told = []
        for number, (name, block) in enumerate(self.blocks.items()):
            for group, held in (("sums", block.sums), ("basis", block.basis)):
                for key, tensor in held.items():
                    tensors[f"{number}/{group}/{key}"] = tensor.detach().cpu().contiguous()
            told.append(
                {
                    "name": name,
                    "kind": block.kind,
                    "shape": list(block.shape),
                    "parameters": list(block.parameters),
                    "counts": block.counts,
                    "fallback": block.fallback,
                }
            )
        document = {"graph": self.graph, "weights": self.weights, "facts": self.facts, "blocks": told}
        data = save(tensors, {"kfe_fx_curvature": json.dumps(document, sort_keys=True)})
        target = Path(path)
        with replacing(target) as handle:
            handle.write(data)
        return target

    @classmethod
    def load(cls, path: str | Path) -> Store:
        """Read a store.

        Raises:
            BadFile: it is no such file, or is damaged.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                text = (file.metadata() or {}).get("kfe_fx_curvature")
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise BadFile(f"{path}: there is no such file") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise BadFile(f"{path}: this is no file of curvature statistics ({error})") from error
        if text is None:
            raise BadFile(f"{path}: this safetensors file holds no curvature statistics; write one with Store.save")
        try:
            return _read(json.loads(text), tensors)
        except (KeyError, TypeError, ValueError) as error:
            raise BadFile(f"{path}: the curvature statistics are damaged ({error!r})") from error


def _read(document: dict[str, Any], tensors: dict[str, Tensor]) -> Store:
    if document["facts"]["format"] != FORMAT:
        raise ValueError(f"format {document['facts']['format']}, this version reads {FORMAT}")
    store = Store(str(document["graph"]), str(document["weights"]), {}, dict(document["facts"]))
    for number, told in enumerate(document["blocks"]):
        groups, high, wide = (int(size) for size in told["shape"])
        block = BlockStore(str(told["kind"]), (groups, high, wide), tuple(told["parameters"]))
        block.counts = {str(key): float(value) for key, value in told["counts"].items()}
        block.fallback = str(told["fallback"])
        prefix = f"{number}/"
        for key, tensor in tensors.items():
            if key.startswith(prefix):
                _, kind, name = key.split("/")
                _check_shape(name, tensor, block.shape)
                {"sums": block.sums, "basis": block.basis}[kind][name] = tensor
        store.blocks[str(told["name"])] = block
    return store


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, int, int]) -> None:
    groups, high, wide = shape
    side = {"A": wide, "U_A": wide, "lam_A": wide, "G": high, "U_G": high, "lam_G": high}.get(name)
    allowed = {shape} if side is None else {(groups, side, side), (groups, side)}
    if tuple(tensor.shape) not in allowed:
        raise ValueError(f"{name} is {list(tensor.shape)} in a block {list(shape)}")


def _add(held: dict[str, Tensor], key: str, value: Tensor) -> None:
    held[key] = held[key] + value if key in held else value


def _count(counts: dict[str, float], **more: float) -> None:
    for key, value in more.items():
        counts[key] = counts.get(key, 0.0) + value


def _merged(name: str, mine: BlockStore, theirs: BlockStore) -> BlockStore:
    total = BlockStore(mine.kind, mine.shape, mine.parameters, fallback=mine.fallback)
    same = mine.basis.keys() == theirs.basis.keys() and all(
        torch.equal(mine.basis[key], theirs.basis[key]) for key in mine.basis
    )
    if ("S" in mine.sums or "S" in theirs.sums) and not same:
        raise UsageError(
            f"the second moments of {name} are in different eigenbases and do not add; merge stores of factors, then "
            "decompose and fit S* in the shared basis"
        )
    if same:
        total.basis = dict(mine.basis)
    for key in mine.sums.keys() | theirs.sums.keys():
        parts = [block.sums[key] for block in (mine, theirs) if key in block.sums]
        total.sums[key] = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    for key in mine.counts.keys() | theirs.counts.keys():
        total.counts[key] = mine.counts.get(key, 0.0) + theirs.counts.get(key, 0.0)
    return total


def graph_hash(program: Program) -> str:
    """Hash the graphs of a Program without its taps."""
    if not any(taps.tapped(graph) for graph in program.graphs.values()):
        return program.hash()
    twin = program.sharing()
    for graph in twin.graphs.values():
        taps.strip(graph)
    return twin.hash()


def weights_hash(program: Program) -> str:
    """Hash the parameters and buffers of a Program by name and value."""
    digest = hashlib.sha256()
    for name, value in sorted(program.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
