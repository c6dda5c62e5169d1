"""Budgets as people write them."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfe_fx.cost.budget import METRICS, Limit, read_limit, read_limits
from kfe_fx.errors import UsageError


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("0.5", Limit("latency", 0.5)),
        ("50%", Limit("latency", 0.5)),
        (".25", Limit("latency", 0.25)),
        ("1", Limit("latency", 1.0)),
        ("12ms", Limit("latency", 12.0, absolute=True)),
        ("800 us", Limit("latency", 0.8, absolute=True)),
        ("0.01s", Limit("latency", 10.0, absolute=True)),
        ("4MB", Limit("memory", 4e6, absolute=True)),
        ("512KiB", Limit("memory", 512 * 1024, absolute=True)),
        ("2M", Limit("params", 2e6, absolute=True)),
        ("300k", Limit("params", 3e5, absolute=True)),
        ("macs=0.5", Limit("macs", 0.5)),
        ("macs=300M", Limit("macs", 3e8, absolute=True)),
        ("memory = 4MB", Limit("memory", 4e6, absolute=True)),
        ("widths=0.5", Limit("widths", 0.5)),
    ],
)
def test_texts(text: str, limit: Limit):
    assert read_limit(text, "latency") == limit


def test_a_fraction_is_of_the_metric():
    assert read_limits(0.5, "macs") == (Limit("macs", 0.5),)
    assert read_limits("0.5", "memory") == (Limit("memory", 0.5),)


def test_several_latency_first():
    assert read_limits(["2M", 0.5]) == (Limit("latency", 0.5), Limit("params", 2e6, absolute=True))
    assert read_limits({"memory": "4MB", "latency": 0.7}) == (
        Limit("latency", 0.7),
        Limit("memory", 4e6, absolute=True),
    )


@pytest.mark.parametrize(
    "given",
    [
        *("", "abc", "0", "1.5", "-1", "nan", "inf", "12 parsecs", "5=", "=0.5", "flops=0.5", "12msx", "0ms", "1e-400"),
        *("latency=2M", "macs=12ms", "params=4MB", "1e999ms", "widths=2M", "memory=2M"),
        *(0, 2, -0.5, math.nan, math.inf, True, None, 1j, [], {}),
        *(["0.5", "12ms"], ["macs=1", "macs=2M"], ["widths=0.5", "2M"], {"flops": 0.5}, {"latency": "4MB"}),
    ],
)
def test_what_means_nothing(given: Any):
    with pytest.raises(UsageError) as caught:
        read_limits(given)
    assert "\n" not in str(caught.value)


def test_ratios():
    assert Limit("latency", 5.0, absolute=True).ratio(20.0) == 0.25
    assert Limit("latency", 50.0, absolute=True).ratio(20.0) == 1.0
    assert Limit("params", 0.3).ratio(1e9) == 0.3


@given(st.sampled_from(METRICS), st.floats(1e-3, 1.0), st.booleans())
def test_spelled_and_read_again(metric: str, value: float, absolute: bool):
    absolute = absolute and metric != "widths"
    limit = Limit(metric, value * (1e7 if absolute else 1), absolute)
    again = read_limit(str(limit), "latency")
    assert (again.metric, again.absolute) == (limit.metric, limit.absolute)
    assert again.value == pytest.approx(limit.value, rel=1e-11)
