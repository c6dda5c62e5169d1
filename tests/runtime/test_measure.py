from __future__ import annotations

import json

import pytest

from kfe_fx.errors import UsageError
from kfe_fx.runtime.inputs import feeds
from kfe_fx.runtime.measure import compare, measure
from kfe_fx.runtime.session import make_session


def test_compare_reports_every_session(conv_program, conv_model):
    sessions = [make_session(conv_model) for _ in range(3)]
    result = compare(sessions, feeds(conv_program, 1), seconds=0.05, min_rounds=2)
    assert result.clock == "processor"
    assert result.rounds >= 2
    assert len(result.latencies) == len(result.ratios) == len(result.wall_ms) == 3
    assert (result.ratios[0].value, result.ratios[0].low) == (1.0, 1.0)
    for latency, ratio in zip(result.latencies, result.ratios, strict=True):
        assert 0 < latency.p10 <= latency.p50 <= latency.p90
        assert ratio.low <= ratio.value <= ratio.high
    json.dumps(result.to_json(), allow_nan=False)


def test_several_threads_have_the_wall_clock(conv_program, conv_model):
    sessions = [make_session(conv_model), make_session(conv_model, threads=2)]
    each = [feeds(conv_program, 1), feeds(conv_program, 2)]
    assert compare(sessions, each, seconds=0.01, min_rounds=2).clock == "wall"


def test_measure_alone(conv_program, conv_model):
    assert measure(make_session(conv_model), feeds(conv_program), seconds=0.01, min_rounds=2).runs >= 8


def test_bad_arguments(conv_program, conv_model):
    session = make_session(conv_model)
    with pytest.raises(UsageError, match="got 0 and 0"):
        compare([], [])
    with pytest.raises(UsageError, match="got 1 and 2"):
        compare([session], [{}, {}])
    with pytest.raises(UsageError, match="needs time"):
        compare([session], feeds(conv_program), seconds=0)
