"""`kfe-fx calibrate`: what it writes and says; nothing is measured here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kfe_fx.cli.main import run
from kfe_fx.cost.device import Device, cache_path, forget, read_device
from kfe_fx.cost.probes import fingerprint
from kfe_fx.cost.profile import Profile

MEASURED = {"nanoseconds": {}, "ratios": {}, "step_probed": True, "seconds": 1.0}


@pytest.fixture(autouse=True)
def calibrations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    asked: list[int] = []

    def calibrate(threads: int, precision: str) -> Device:
        asked.append(threads)
        int8: dict[str, Any] = {"tap": 1.0, "requantise": 0.1, "floats": Profile("measured")}
        profile = Profile("measured", **(int8 if precision == "int8" else {}))
        return Device(fingerprint(threads, precision), profile, 16, ("row", "tail"), MEASURED)

    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("kfe_fx.cost.calibrate.calibrate", calibrate)
    forget()
    return asked


def test_a_table_of_what_was_found(calibrations: list[int], capsys: pytest.CaptureFixture[str]):
    assert run(["calibrate"]) == 0
    shown = capsys.readouterr().out
    assert "conv_mac" in shown
    assert "0.0165" in shown
    assert "steps of 16" in shown
    assert shown.count("not believed") >= 4  # row and the three of the tail
    assert f"cached in {cache_path(fingerprint())}" in shown.replace("\n", " ")
    assert list(Path().iterdir()) == []
    forget()
    assert run(["calibrate", "-q"]) == 0
    assert capsys.readouterr().out == ""
    assert calibrations == [1]
    assert run(["calibrate", "--force", "-q"]) == 0
    assert calibrations == [1, 1]


def test_a_file(calibrations: list[int], capsys: pytest.CaptureFixture[str]):
    assert run(["calibrate", "-o", "device.json", "--threads", "2"]) == 0
    assert "wrote device.json" in capsys.readouterr().out
    assert read_device("device.json").fingerprint.threads == 2
    assert run(["calibrate", "-o", "device.json"]) == 2
    assert "--force" in capsys.readouterr().err
    assert calibrations == [2]
    assert run(["calibrate", "-o", "device.json", "--force", "-q"]) == 0
    assert read_device("device.json").fingerprint.threads == 1


def test_a_precision(capsys: pytest.CaptureFixture[str]):
    assert run(["calibrate", "--precision", "int8", "-o", "int8.json"]) == 0
    assert read_device("int8.json").fingerprint.precision == "int8"
    assert str(cache_path(fingerprint(1, "int8"))) in capsys.readouterr().out.replace("\n", " ")
    assert run(["calibrate", "--precision", "int8"]) == 0
    shown = capsys.readouterr().out
    assert "int8, 1 thread" in shown
    assert "brought to 8 bits" in shown
    assert run(["calibrate"]) == 0
    assert "brought to 8 bits" not in capsys.readouterr().out


def test_json(capsys: pytest.CaptureFixture[str]):
    assert run(["calibrate", "--json", "-o", "device.json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["files"] == ["device.json"]
    assert Path(answer["cached"]).is_file()
    assert answer["profile"]["conv_mac"] == Profile().conv_mac
    stored = json.loads(Path("device.json").read_text())
    assert answer == {**stored, "cached": answer["cached"], "files": ["device.json"]}


def test_a_bundle_measures_nothing(calibrations: list[int], capsys: pytest.CaptureFixture[str]):
    assert run(["calibrate", "--emit-bundle", "probes"]) == 0
    assert "run_probes.py -o device.json" in capsys.readouterr().out
    assert {"run_probes.py", "probes.json", "probe-call.onnx"} <= {path.name for path in Path("probes").iterdir()}
    assert run(["calibrate", "--emit-bundle", "probes"]) == 2
    assert "--force" in capsys.readouterr().err
    assert run(["calibrate", "--emit-bundle", "probes", "--force", "--json"]) == 0
    assert "probes/run_probes.py" in json.loads(capsys.readouterr().out)["files"]
    assert calibrations == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--threads", "0"], "--threads"),
        (["-o", "gone/device.json"], "no such folder"),
        (["-o", "."], "a folder is in the way"),
        (["--emit-bundle", "probes", "-o", "device.json"], "leave -o"),
        (["--emit-bundle", "probes", "--precision", "int8"], "of every precision"),
        (["--precision", "int4"], "'int4' is not one of"),
        (["model.pt"], "unexpected extra argument"),
    ],
)
def test_options_that_mean_nothing(options: list[str], says: str, capsys: pytest.CaptureFixture[str]):
    assert run(["calibrate", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert err.count("\n") == 1
    assert list(Path().iterdir()) == []
