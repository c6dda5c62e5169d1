"""What a stranger installs: the wheel out of the sdist, and the source zip of the repository. No network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINKED = ("cli", "models", "passes")

pytestmark = pytest.mark.xdist_group("packaging")  # one worker builds


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        list(command), cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def install(source: Path, target: Path) -> None:
    """Install a wheel or a source tree into a folder of its own, offline and without its dependencies."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run(*pip, "--no-deps", "--no-index", "--no-build-isolation", "--target", target, source, cwd=target.parent)


def assert_installed_works(target: Path) -> None:
    """The command answers from the installed copy, and knows its sub-commands."""
    env = {"PYTHONPATH": str(target), "PYTHONSAFEPATH": "1"}
    shown = run(target / "bin/kfe-fx", "--help", cwd=target, env=env)
    assert "prune" in shown
    assert "--budget" in run(target / "bin/kfe-fx", "prune", "--help", cwd=target, env=env)
    code = "import kfe_fx.cli.main, kfe_fx.passes, kfe_fx.models as m; print(m.__file__)"
    assert Path(run(sys.executable, "-c", code, cwd=target, env=env).strip()).is_relative_to(target)
    tops = {p.name for p in target.iterdir() if not p.name.endswith(".dist-info")}
    assert tops == {"bin", "kfe_fx"}
    assert (target / "kfe_fx/py.typed").exists()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the working tree, so that a build leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp("source") / "kfe-fx"
    left_out = shutil.ignore_patterns(
        ".venv", ".git", "build", "dist", "demo", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
    )
    return shutil.copytree(ROOT, copy, symlinks=True, ignore=left_out)


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel built out of it."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=source)
    return out


def test_wheel_from_sdist(built: Path, tmp_path: Path):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert all(n.startswith("kfe_fx/") or ".dist-info/" in n for n in names)
    have = {n for n in names if n.startswith("kfe_fx/")}
    want = {p.relative_to(ROOT).as_posix() for p in (ROOT / "kfe_fx").rglob("*.py")}
    for top in LINKED:
        found = [*(ROOT / top).rglob("*.py"), *(ROOT / top).glob("*.pt"), *(ROOT / top).glob("*.json")]
        want |= {f"kfe_fx/{p.relative_to(ROOT).as_posix()}" for p in found}
    assert want | {"kfe_fx/py.typed"} == have
    install(wheel, tmp_path / "site")
    assert_installed_works(tmp_path / "site")


def test_sdist_holds_what_its_tests_need(built: Path):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    for needed in (
        "LICENSE",
        "Makefile",
        "constraints.txt",
        ".ci/run",
        "tests/house/test_packaging.py",
        "docs/decisions.md",
    ):
        assert needed in names
    assert "passes/__init__.py" in names


def test_zip_of_the_repository(tmp_path: Path):
    """As a forge hands it out, unpacked by something without symbolic links: they become text files."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    # What a commit of the working tree would hold, with an index and an object store outside the checkout.
    objects = run("git", "rev-parse", "--git-path", "objects", cwd=ROOT).strip()
    env = {
        "GIT_INDEX_FILE": str(tmp_path / "index"),
        "GIT_OBJECT_DIRECTORY": str(tmp_path / "objects"),
        "GIT_ALTERNATE_OBJECT_DIRECTORIES": str((ROOT / objects).resolve()),
    }
    (tmp_path / "objects").mkdir()
    run("git", "add", "--all", cwd=ROOT, env=env)
    tree = run("git", "write-tree", cwd=ROOT, env=env).strip()
    run("git", "archive", "--format=zip", f"--output={tmp_path / 'kfe-fx.zip'}", tree, cwd=ROOT, env=env)
    with zipfile.ZipFile(tmp_path / "kfe-fx.zip") as archive:
        archive.extractall(tmp_path / "unzipped")
    for top in LINKED:
        assert (tmp_path / "unzipped/kfe_fx" / top).is_file()  # the link, as its text
    install(tmp_path / "unzipped", tmp_path / "site")
    assert_installed_works(tmp_path / "site")
