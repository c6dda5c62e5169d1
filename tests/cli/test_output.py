"""JSON that any parser takes, tables that lose nothing in a pipe, progress only where someone watches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kfe_fx.cli import output


def test_json_is_strict(capsys: pytest.CaptureFixture[str]):
    output.show_json(
        {
            "nan": float("nan"),
            "inf": [float("inf"), 1.5],
            "path": Path("a/b"),
            "set": {3, 1},
            "tuple": (1, None, True),
            "numpy": {"scalar": np.float32(0.5), "array": np.arange(3), "nan": np.float64("nan")},
            7: "γ",
        }
    )
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "nan": None,
        "inf": [None, 1.5],
        "path": "a/b",
        "set": [1, 3],
        "tuple": [1, None, True],
        "numpy": {"scalar": 0.5, "array": [0, 1, 2], "nan": None},
        "7": "γ",
    }


def test_tables_keep_long_and_bracketed_cells(capsys: pytest.CaptureFixture[str]):
    name = "layers.[bold]0." + "x" * 200
    output.show_table([(name, 1.5, None)], ("name", "value", "note"), numbers=(1,))
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "[bold]" in shown
    assert shown.count("x") == 200
    assert "1.5" in shown


def test_progress_is_for_terminals(capsys: pytest.CaptureFixture[str]):
    with output.progress() as report:
        assert report is None
    assert capsys.readouterr().err == ""


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with output.progress() as report:
        assert report is not None
        report("scoring")
        report("fine-tuning", 0.5)
    captured = capsys.readouterr()
    assert captured.out == ""
    with output.progress(quiet=True) as report:
        assert report is None
