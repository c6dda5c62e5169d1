"""The set of files that pruning writes: whole or not at all, and told apart from an unfinished one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfe_fx.errors import BadFile, KfeError, VerificationFailed
from kfe_fx.format import load, save
from kfe_fx.format.atomic import replacing
from kfe_fx.plan import Plan
from kfe_fx.program import Program
from kfe_fx.runtime.parity import parity

FORMAT = "kfe-fx pruned"
VERSION = 1
SUFFIX = ".pruned.json"


def write_set(
    program: Program, onnx: bytes, document: Mapping[str, Any], folder: Path, stem: str, *, force: bool = False
) -> list[Path]:
    """Write ``stem.pruned.onnx``, ``stem.pruned.pt`` and, last, ``stem.pruned.json`` with the SHA-256 of the others.

    An old JSON file goes first, so that at no time a certificate stands beside files that are not its own.

    Raises:
        BadFile: a file is in the way (without ``force``) or cannot be written.
    """
    paths = [folder / f"{stem}.pruned{ending}" for ending in (".onnx", ".pt", ".json")]
    for path in paths:
        if path.exists() and not force:
            raise BadFile(f"{path} exists; remove it or say --force")
    model, checkpoint, certificate = paths
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if certificate.exists():
            certificate.unlink()
    except OSError as error:
        raise BadFile(f"{folder}: cannot be written ({error.strerror or error}); choose another place") from error
    fresh = [path for path in paths if not path.exists()]
    try:
        with replacing(model) as handle:
            handle.write(onnx)
        save(program, path=checkpoint)
        files = {path.name: _sha256(path) for path in (model, checkpoint)}
        text = json.dumps({"format": FORMAT, "version": VERSION, "files": files, **document}, indent=1, sort_keys=True)
        with replacing(certificate) as handle:
            handle.write(text.encode() + b"\n")
    except BaseException:
        for path in fresh:  # half a set helps nobody
            path.unlink(missing_ok=True)
        raise
    return paths


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class Verification:
    """What was checked of a set of files: rows (check, result, note)."""

    path: Path
    checks: tuple[tuple[str, str, str], ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        checks = [{"check": check, "result": result, "note": note} for check, result, note in self.checks]
        return {"certificate": str(self.path), "ok": True, "checks": checks}

    def table(self) -> list[tuple[str, str, str]]:
        """Return the rows."""
        return list(self.checks)


def verify(path: str | os.PathLike[str]) -> Verification:
    """Check a set that ``prune`` wrote: the files by their hashes, the ONNX model against the program file.

    ``path`` is the JSON file or the folder that holds exactly one.

    Raises:
        VerificationFailed: a file is missing, changed, or computes something else.
        BadFile: there is no certificate, or it cannot be read.
    """
    certificate = _find(Path(path))
    document = _read(certificate)
    checks = []
    files: dict[str, Path] = {}
    for name, wanted in document["files"].items():
        file = certificate.parent / name
        if not file.is_file():
            raise VerificationFailed(f"{file} is missing; the set of {certificate.name} is incomplete")
        if _sha256(file) != wanted:
            raise VerificationFailed(f"{file} is not the file that {certificate.name} certifies; prune again")
        checks.append((name, "unchanged", f"sha256 {wanted[:16]}..."))
        files[Path(name).suffix] = file
    program = load(files[".pt"])
    report = parity(program, files[".onnx"].read_bytes())
    if not report.ok:
        raise VerificationFailed(
            f"{files['.onnx']} differs from {files['.pt'].name} by {report.error:.1e} (allowed {report.tolerance:.0e})"
        )
    checks.append(("ONNX = network", "equal", f"error {report.error:.1e} over {report.probes} probes"))
    plan = Plan.from_json(document["plan"])
    checks.append(("plan", "read", f"{len(plan.actions)} units removed, {len(plan.kept)} tensors changed"))
    return Verification(certificate, tuple(checks))


def _find(path: Path) -> Path:
    if not path.is_dir():
        if not path.is_file():
            raise BadFile(f"{path} does not exist; name the {SUFFIX} file or its folder")
        return path
    found = sorted(path.glob(f"*{SUFFIX}"))
    unfinished = sorted(path.glob("*.pruned.onnx")) + sorted(path.glob("*.pruned.pt"))
    if not found and unfinished:
        raise VerificationFailed(f"{unfinished[0]} has no certificate beside it: it was never finished; prune again")
    if len(found) != 1:
        raise BadFile(f"{path} holds {len(found)} certificates (*{SUFFIX}); name one")
    return found[0]


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > 1 << 30:
            raise BadFile(f"{path} is too large for a certificate")
        document = json.loads(path.read_bytes())
        files = document["files"]
        known = document["format"] == FORMAT and isinstance(document["plan"], dict)
        named = {Path(name).suffix for name in files if Path(name).name == name and isinstance(files[name], str)}
    except KfeError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadFile(f"{path} is no certificate of kfe-fx ({type(error).__name__}); name a {SUFFIX} file") from error
    if not known or named != {".onnx", ".pt"}:
        raise BadFile(f"{path} is no certificate of kfe-fx; name a {SUFFIX} file")
    if document["version"] != VERSION:
        raise BadFile(f"{path} has version {document['version']!r}, this kfe-fx reads version {VERSION}")
    return document
