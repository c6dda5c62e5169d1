"""Where things stand: linked folders, the list of packages, names of modules, the public face."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import kfe_fx

ROOT = Path(__file__).resolve().parents[2]
LINKED = ("cli", "models", "passes")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def packages_on_disk() -> set[str]:
    """Every package under kfe_fx/, real or linked, without relying on the links."""
    found = set()
    for start, name in [(ROOT / "kfe_fx", "kfe_fx"), *((ROOT / top, f"kfe_fx.{top}") for top in LINKED)]:
        for init in start.rglob("__init__.py"):
            inner = init.parent.relative_to(start).parts
            if not (start.name == "kfe_fx" and inner and inner[0] in LINKED):
                found.add(".".join([name, *inner]))
    return found


def test_every_package_is_in_the_wheel():
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    assert listed == sorted(listed)
    assert set(listed) == packages_on_disk(), "[tool.setuptools] packages in pyproject.toml is out of date"


def test_every_folder_of_modules_is_a_package():
    for start in (ROOT / "kfe_fx", *(ROOT / top for top in LINKED)):
        for module in start.rglob("*.py"):
            assert (module.parent / "__init__.py").exists(), f"{module.parent} has no __init__.py"


@pytest.mark.parametrize("name", LINKED)
def test_links_are_relative(name: str):
    link = ROOT / "kfe_fx" / name
    if not link.is_symlink():
        pytest.skip("not a checkout with symbolic links")
    assert link.readlink() == Path("..") / name


def test_no_module_is_a_drawer():
    forbidden = {"utils", "util", "misc", "helpers", "helper", "common"}
    for start in (ROOT / "kfe_fx", *(ROOT / top for top in LINKED)):
        for module in start.rglob("*.py"):
            assert module.stem not in forbidden, module


def test_constraints_pin_every_dependency():
    project = PYPROJECT["project"]
    wanted = [
        *project["dependencies"],
        *(r for extra in project["optional-dependencies"].values() for r in extra),
    ]
    names = {re.split(r"[\[<>=~!]", requirement)[0] for requirement in wanted} - {"kfe-fx"}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0] for line in lines if "==" in line and not line.startswith("#")}
    assert names <= pinned
    assert "torch==2.13.0" in lines


def test_importing_kfe_fx_costs_no_torch():
    code = "import sys, kfe_fx; dir(kfe_fx); print(sorted({'torch', 'numpy', 'click'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("name", kfe_fx.__all__)
def test_public_names_load(name: str):
    assert getattr(kfe_fx, name) is not None
    assert name in dir(kfe_fx)


def test_public_names_are_not_modules():
    # a module of the same name would replace the function once it is imported
    for name in kfe_fx.__all__:
        assert importlib.util.find_spec(f"kfe_fx.{name}") is None, name


@pytest.mark.parametrize("name", ["curvature", "optim"])
def test_public_packages_are_there_without_an_import_of_theirs(name: str):
    code = f"import kfe_fx, sys; assert 'torch' not in sys.modules; assert {name!r} in dir(kfe_fx); kfe_fx.{name}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_unknown_public_name():
    with pytest.raises(AttributeError, match="no attribute 'prnue'"):
        kfe_fx.prnue  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_errors_are_one_tree_with_exit_codes():
    errors = importlib.import_module("kfe_fx.errors")
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, Exception)]
    assert all(issubclass(c, errors.KfeError) for c in classes)
    codes = {c.__name__: c.exit_code for c in classes}
    assert codes == {
        "KfeError": 1,
        "UsageError": 2,
        "BadFile": 2,
        "PlanError": 2,
        "UnsupportedModel": 3,
        "InfeasibleBudget": 4,
        "VerificationFailed": 5,
        "BadData": 6,
        "MissingDependency": 7,
    }
