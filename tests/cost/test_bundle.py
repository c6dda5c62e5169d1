"""The bundle: it runs where nothing but onnxruntime and numpy can be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kfe_fx.cost import probes
from kfe_fx.cost.bundle import SCRIPT, write_bundle
from kfe_fx.cost.device import read_device
from kfe_fx.errors import BadFile

WITHOUT = """
import runpy, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("kfe_fx", "torch", "onnx", "onnxscript", "platformdirs", "click"):
            raise ImportError(f"no {name} on this device")

sys.meta_path.insert(0, Missing())
script, sys.argv = sys.argv[1], sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.parametrize("precision", probes.PRECISIONS)
def test_a_bundle_runs_on_its_own(precision: str, tmp_path: Path):
    files = write_bundle(tmp_path / "bundle")
    assert all(file.is_file() for file in files)
    assert sum(file.stat().st_size for file in files) < 10e6
    out = tmp_path / "device.json"
    command = [sys.executable, "-c", WITHOUT, str(tmp_path / "bundle" / SCRIPT), "-o", str(out)]
    command += [] if precision == "fp32" else ["--precision", precision]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--target" in done.stdout
    device = read_device(out)
    assert device.is_this_machine()
    assert device.fingerprint.precision == precision
    assert device.measured["nanoseconds"].keys() >= probes.PROBES.keys()
    assert ("--precision int8" in done.stdout) == (precision == "int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "device.json"]


def test_the_script_is_the_module(tmp_path: Path):
    write_bundle(tmp_path / "bundle")
    assert (tmp_path / "bundle" / SCRIPT).read_bytes() == Path(probes.__file__).read_bytes()


def test_threads_that_mean_nothing(tmp_path: Path):
    write_bundle(tmp_path / "bundle")
    command = [sys.executable, str(tmp_path / "bundle" / SCRIPT), "--threads", "0"]
    assert subprocess.run(command, capture_output=True, check=False, cwd=tmp_path).returncode == 2


def test_what_is_in_the_way(tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BadFile, match="a file is in the way"):
        write_bundle(tmp_path / "file", force=True)
    with pytest.raises(BadFile, match="--force"):
        write_bundle(tmp_path)
    write_bundle(tmp_path, force=True)
    assert (tmp_path / "file").read_text() == "mine"
