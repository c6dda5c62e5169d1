"""Who may import whom: cli -> passes -> the rest of kfe_fx, never the other way, and never by a bare name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINKED = ("cli", "models", "passes")
HEAVY = {
    "torch",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "matplotlib",
    "scipy",
    "sklearn",
    "PIL",
    "numpy",
    "rich",
}


def modules(folder: str) -> list[Path]:
    """The modules of a folder at the top; of kfe_fx only what is really there."""
    found = (ROOT / folder).rglob("*.py")
    return sorted(p for p in found if not (folder == "kfe_fx" and p.relative_to(ROOT).parts[1] in LINKED))


def package(path: Path) -> tuple[str, ...]:
    """The package that a module is in, as it is imported."""
    parts = path.relative_to(ROOT).parts[:-1]
    return ("kfe_fx", *parts) if parts[0] in LINKED else parts


def imported(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Dotted names that a module imports, a `from a import b` as a.b."""
    tree = ast.parse(path.read_text(), str(path))
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # a relative import starts at the package: `.x` in kfe_fx/labels/ops.py is kfe_fx.labels.x
            inside = package(path)[: len(package(path)) + 1 - node.level] if node.level else ()
            module = ".".join([*inside, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def assert_no_import(folder: str, *banned: str, exempt: tuple[Path, ...] = ()) -> None:
    for path in modules(folder):
        if path in exempt:
            continue
        wrong = [n for n in imported(path) if any(n == ban or n.startswith(ban + ".") for ban in banned)]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_core_imports_neither_passes_nor_cli():
    # the public face is the one exception: its lazy names may lead to a pass
    assert_no_import("kfe_fx", "kfe_fx.passes", "kfe_fx.cli", exempt=(ROOT / "kfe_fx/__init__.py",))
    assert_no_import("kfe_fx", "kfe_fx.models")


def test_passes_do_not_import_cli():
    assert_no_import("passes", "kfe_fx.cli", "kfe_fx.models")


def test_the_public_face_imports_nothing_heavy():
    init = ROOT / "kfe_fx/__init__.py"
    names = set(imported(init, top_level_only=True))
    assert all(name.split(".")[0] not in HEAVY for name in names)
    ours = {name for name in names if name.startswith("kfe_fx.")}
    assert all(name.startswith("kfe_fx.errors.") for name in ours)


@pytest.mark.parametrize("folder", ["kfe_fx", *LINKED, "tests"])
def test_no_bare_names(folder: str):
    assert_no_import(folder, *LINKED)


def test_cli_imports_heavy_packages_inside_functions():
    for path in modules("cli"):
        for name in imported(path, top_level_only=True):
            assert name.split(".")[0] not in HEAVY, f"{path.relative_to(ROOT)} imports {name} at the top"
            light = ("kfe_fx.cli", "kfe_fx.errors", "kfe_fx.__version__")
            assert not name.startswith("kfe_fx") or name.startswith(light), f"{path.relative_to(ROOT)}: {name}"
