"""Code of the user's own: found by place and name, and its errors told as its own, in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from kfe_fx.data.factory import load_factory
from kfe_fx.errors import BadData, UsageError
from kfe_fx.user_code import load, load_function, running

TEXT = """
from helper import FACTOR

def double(x):
    return FACTOR * x

def fails(x=0):
    raise ValueError("first line\\nsecond line")

def leaves():
    raise SystemExit(3)

def late():
    import helper_of_its_own
    return helper_of_its_own.DATA

def batches():
    yield [[1.0]]
    raise OSError("the disk is gone")

number = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text("FACTOR = 2\n")
    (tmp_path / "helper_of_its_own.py").write_text("import numpy as np\nDATA = np.ones((3, 2), np.float32)\n")
    path = tmp_path / "own.py"
    path.write_text(TEXT)
    return path


def test_functions_run_with_what_lies_beside_them(file: Path):
    assert load_function(f"{file}:double")(4) == 8
    assert load(f"{file}:number") == 3
    assert load("math:tau") > 6
    assert len(load_factory(f"{file}:late")) == 3


@pytest.mark.parametrize(
    ("name", "raised"), [("fails", "ValueError: first line second line"), ("leaves", "SystemExit")]
)
def test_what_they_raise_is_told_with_its_line(file: Path, name: str, raised: str):
    with pytest.raises(UsageError, match=rf"own.py:{name}: raised {raised}.*own.py:\d+\)") as told:
        load_function(f"{file}:{name}")()
    assert "\n" not in str(told.value)
    assert told.value.__cause__ is not None
    with pytest.raises(BadData, match=f"raised {raised}"):
        load_factory(f"{file}:{name}")
    with pytest.raises(BadData, match=r"raised OSError: the disk is gone|a batch is a list|got a list|list, not a"):
        load_factory(f"{file}:batches")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("import missing_package", r"raised ModuleNotFoundError.*\(broken.py:1\)|raised ModuleNotFoundError"),
        ("x = undefined_name", r"raised NameError: .*undefined_name.*broken.py:1"),
        ("def f(:", r"raised SyntaxError.*broken.py:1"),
    ],
)
def test_files_that_fail_on_import(tmp_path: Path, text: str, told: str):
    path = tmp_path / "broken.py"
    path.write_text(text + "\n")
    for find in (load, load_function):
        with pytest.raises(UsageError, match=told):
            find(f"{path}:f")
    with pytest.raises(BadData, match=told):
        load_factory(f"{path}:f")


@pytest.mark.parametrize(
    ("reference", "told"),
    [
        ("own", "does not name a function"),
        ("own.py:", "does not name a function"),
        ("missing.py:f", "no such file missing.py"),
        ("no_such_module.inner:f", "there is no module 'no_such_module'"),
        ("math:nothing", "the module defines no 'nothing'"),
        ("math:tau", "float, not a function"),
    ],
)
def test_what_there_is_not(reference: str, told: str):
    with pytest.raises(UsageError, match=told):
        load_function(reference)


def test_our_own_errors_come_through():
    with pytest.raises(BadData, match=r"^as it is$"), running("told"):
        raise BadData("as it is")
