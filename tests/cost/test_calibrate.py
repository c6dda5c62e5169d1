"""Calibration for real: it ends, and gives a device that can be kept."""

from __future__ import annotations

import json

import pytest

from kfe_fx.cost.calibrate import calibrate
from kfe_fx.cost.device import device_of
from kfe_fx.cost.probes import INT8_PROBES, PROBES
from kfe_fx.errors import UsageError


def test_this_machine():
    device = calibrate()
    assert device.is_this_machine()
    assert device.profile.name == "measured"
    assert device.step in (1, 4, 8, 16, 32)
    assert device.measured["nanoseconds"].keys() == PROBES.keys()
    assert device_of(json.loads(json.dumps(device.to_json(), allow_nan=False))) == device


def test_what_cannot_be_measured():
    with pytest.raises(UsageError, match="at least 1"):
        calibrate(threads=0)
    with pytest.raises(UsageError, match="fp32, int8"):
        calibrate(precision="int4")


def test_int8_has_rates_of_its_own_and_float_recurrent_kernels():
    device = calibrate(precision="int8")
    assert device.fingerprint.precision == "int8"
    assert device.step in (1, 4, 8, 16, 32)
    int8 = {name for name in device.measured["nanoseconds"] if name.startswith("int8 ")}
    assert {name.removeprefix("int8 ") for name in int8} == INT8_PROBES.keys()
    assert device.profile.floats is not None
    assert device.profile.conv_mac != device.profile.floats.conv_mac
    assert device.profile.step == device.profile.floats.step
    assert device_of(json.loads(json.dumps(device.to_json(), allow_nan=False))) == device
