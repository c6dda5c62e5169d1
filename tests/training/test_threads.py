"""One or two threads: the probe leaves nothing behind."""

from __future__ import annotations

import time

import pytest
import torch

from kfe_fx.training import fastest_threads, threads


def test_the_faster_number_is_taken_and_put_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    before = torch.get_num_threads()
    for best in (1, 2):
        with fastest_threads(lambda best=best: time.sleep(0.001 if torch.get_num_threads() == best else 0.01)) as count:
            assert count == best == torch.get_num_threads()
        assert torch.get_num_threads() == before


def test_a_given_number_or_a_single_core_is_not_probed(monkeypatch: pytest.MonkeyPatch):
    def never() -> None:
        raise AssertionError

    with fastest_threads(never, 2) as count:
        assert count == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with fastest_threads(never) as count:
        assert count == 1
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: {0}, raising=False)
    with fastest_threads(never) as count:
        assert count == 1
