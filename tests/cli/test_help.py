"""Help pages: complete, quick, and free of heavy imports."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from kfe_fx.cli.main import COMMANDS, cli

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "onnx", "onnxruntime", "onnxscript", "matplotlib", "scipy", "sklearn", "PIL", "numpy"}


def command(name: str) -> click.Command:
    found = cli.get_command(click.Context(cli), name)
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_imports_nothing_heavy(name: str):
    code = (
        "import json, sys\n"
        "from kfe_fx.cli.main import run\n"
        "code = run(sys.argv[1:])\n"
        "print(json.dumps([code, sorted({m.split('.')[0] for m in sys.modules})]))\n"
    )
    args = [name, "--help"] if name else ["--help"]
    out = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True, cwd=ROOT)
    *page, last = out.stdout.splitlines()
    exit_code, modules = json.loads(last)
    assert exit_code == 0
    assert page[0].startswith(f"Usage: kfe-fx {name}".rstrip())
    assert not HEAVY & set(modules)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_and_every_option_a_help(name: str):
    found = command(name)
    assert "\b\n" in (found.help or "")
    assert f"kfe-fx {name}" in (found.help or "")
    for param in found.params:
        if isinstance(param, click.Option) and not param.hidden:
            assert param.help or isinstance(param.type, click.Choice), f"{name} {param.opts}"


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_in_help_parse(name: str):
    """Each `kfe-fx ...` line of a help page is a command line that the parser takes."""
    lines = [line.strip() for line in (command(name).help or "").splitlines()]
    for line in lines:
        if "kfe-fx " not in line or not line.startswith(("kfe-fx ", "torchrun ")):
            continue
        _, sub, *args = line[line.index("kfe-fx ") :].split()
        with command(sub).make_context(sub, args):
            pass


def test_commands_match_their_files():
    files = {path.stem for path in (ROOT / "cli").glob("*.py") if is_command(path)}
    assert files == set(COMMANDS)


def is_command(path: Path) -> bool:
    body = ast.parse(path.read_text()).body
    return any(isinstance(node, ast.FunctionDef) and node.name == "command" for node in body)


def test_version():
    out = subprocess.run(
        [sys.executable, "-m", "kfe_fx.cli.main", "--version"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert out.stdout.startswith("kfe-fx 0.")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("pr", "plain,prune"),
        ("prune --me", "plain,--metric"),
        ("cu", "plain,curvature"),
        ("train --op", "plain,--optimizer"),
        ("prune --criterion kfe", "plain,kfe-product"),
        ("prune --criterion m", "file,m"),  # a file of one's own
        ("sparsify --criterion l", "plain,lm"),
        ("prune --data gl", "plain,glyphs:"),
        ("prune --data ex", "file,ex"),
        ("prune --loss cr", "plain,cross-entropy"),
    ],
)
def test_shell_completion(typed: str, offered: str):
    code = "from kfe_fx.cli.main import main; main()"
    env = {**os.environ, "_KFE_FX_COMPLETE": "bash_complete", "COMP_WORDS": f"kfe-fx {typed}"}
    env["COMP_CWORD"] = str(len(typed.split()))
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT, env=env)
    assert offered in out.stdout.splitlines()
