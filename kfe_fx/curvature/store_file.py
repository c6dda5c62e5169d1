"""The file of a store: one safetensors file whose metadata say what the tensors are, sealed by a checksum of both."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kfe_fx.curvature.store import FORMAT, READS, BlockStore, Store
from kfe_fx.errors import BadFile
from kfe_fx.format.atomic import replacing
from kfe_fx.format.fields import Malformed, distinct, dump, integer, items, parse, record, table, text, texts

_KEY = "kfe_fx_curvature"  # one key: safetensors writes several in any order
_LARGEST = 2**48  # entries of a side
_SUMS = {"A": "ii", "G": "oo", "A1": "ii", "G1": "oo", "S": "oi", "S_ra": "oi", "D": "oi", "lengths": ""}
_BASIS = {"U_A": "ii", "U_G": "oo", "lam_A": "i", "lam_G": "o"}
_COUNTS = ("rows", "examples", "S_examples", "D_examples", "batches")


def write(store: Store, path: Path) -> Path:
    """Write tensors ``block number/sums or basis/name`` and the rest as JSON behind a checksum.

    The file appears whole or not at all, and equal stores give equal files.

    Raises:
        BadFile: it cannot be written there.
    """
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    told = []
    for number, (name, block) in enumerate(store.blocks.items()):
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
    document = {"graph": store.graph, "weights": store.weights, "facts": store.facts, "blocks": told}
    words = dump(document).decode()
    data = save(tensors, {_KEY: f"{_checksum(words, tensors)} {words}"})
    with replacing(path) as handle:
        handle.write(data)
    return path


def read(path: Path) -> Store:
    """Read what ``write`` wrote.

    Raises:
        BadFile: it is no such file, or is damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise BadFile(f"{path}: {'this is no regular file' if path.exists() else 'there is no such file'}")
    try:
        with safe_open(str(path), "pt") as file:
            told = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()} if _KEY in told else {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadFile(f"{path}: this is no file of curvature statistics, or it is damaged ({reason})") from error
    if _KEY not in told:
        raise BadFile(f"{path}: this safetensors file holds no curvature statistics; write one with Store.save")
    try:
        checksum, _, words = told[_KEY].partition(" ")
        if checksum != _checksum(words, tensors):
            raise Malformed("their checksum differs")
        return _store(parse(words.encode(), "metadata"), tensors)
    except Malformed as error:
        raise BadFile(f"{path}: the curvature statistics are damaged ({error})") from error


def _checksum(words: str, tensors: dict[str, Tensor]) -> str:
    crc = zlib.crc32(words.encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        crc = zlib.crc32(f"{key} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def _store(document: Any, tensors: dict[str, Tensor]) -> Store:
    found = record(document, "metadata", ("graph", "weights", "facts", "blocks"))
    facts = table(found["facts"], "facts")
    if facts.get("format") not in READS:
        raise Malformed(f"format {facts.get('format')!r}, this version reads {FORMAT}")
    store = Store(text(found["graph"], "graph"), text(found["weights"], "weights"), {}, facts)
    told = [_block(value) for value in items(found["blocks"], "blocks")]
    distinct([name for name, _ in told], "blocks")
    for key, tensor in tensors.items():
        number, _, rest = key.partition("/")
        kind, _, name = rest.partition("/")
        if (
            not number.isdecimal()
            or int(number) >= len(told)
            or name not in {"sums": _SUMS, "basis": _BASIS}.get(kind, {})
        ):
            raise Malformed(f"the tensor {key[:80]!r} has no place there")
        block = told[int(number)][1]
        _check(key, name, tensor, block.shape)
        (block.sums if kind == "sums" else block.basis)[name] = tensor
    store.blocks = dict(told)
    return store


def _block(value: Any) -> tuple[str, BlockStore]:
    found = record(value, "blocks", ("name", "kind", "shape", "parameters", "counts", "fallback"))
    name = text(found["name"], "blocks")
    sizes = [integer(size, name, 0, _LARGEST) for size in items(found["shape"], name, 3)]
    kind = text(found["kind"], name)
    if len(sizes) != 3 or kind not in ("kronecker", "diagonal"):
        raise Malformed(f"{name}: a block has a kind and three sizes")
    made = BlockStore(kind, (sizes[0], sizes[1], sizes[2]), tuple(texts(found["parameters"], name)))
    for key, count in table(found["counts"], name).items():
        if key not in _COUNTS or not isinstance(count, int | float) or not count >= 0:
            raise Malformed(f"{name}: {key} is no count")
        made.counts[key] = float(count)
    made.fallback = text(found["fallback"], name)
    return name, made


def _check(key: str, name: str, tensor: Tensor, shape: tuple[int, int, int]) -> None:
    groups, high, wide = shape
    if name == "lengths":
        if tensor.dim() != 1 or tensor.dtype is not torch.float64 or not bool((tensor >= 0).all()):
            raise Malformed(f"the tensor {key} is no count of lengths")
        return
    sides = [{"o": high, "i": wide}[letter] for letter in (_SUMS | _BASIS)[name]]
    allowed = {(groups, *sides)}
    if name in "AG":
        allowed.add((groups, sides[0]))  # its diagonal
    if tuple(tensor.shape) not in allowed or not tensor.is_floating_point():
        raise Malformed(f"the tensor {key} is {list(tensor.shape)} of {tensor.dtype} in a block {list(shape)}")
