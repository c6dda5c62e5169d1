"""The certificate as plain data and as a table."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from kfe_fx.certificate import Certificate

COUNTS: dict[str, Any] = {"parameters": 1234567, "macs": 1000, "peak_memory": 2048}
BARE = Certificate(
    0.5, "macs", "fisher", 0, before=COUNTS, after=COUNTS | {"parameters": 1000, "peak_memory": 3 * 2**20}
)


def table(certificate: Certificate) -> dict[str, tuple[str, str]]:
    return {what: (before, after) for what, before, after in certificate.table()}


def test_counts_are_told_before_and_after() -> None:
    assert table(BARE) == {
        "parameters": ("1,234,567", "1,000"),
        "multiply-accumulates": ("1,000", "1,000"),
        "peak activation memory": ("2.0 KiB", "3.0 MiB"),
    }


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (2**20, "1.0 MiB"), (3 * 2**29, "1.50 GiB")],
)  # fmt: skip
def test_memory_in_the_unit_that_fits(count: int, text: str) -> None:
    assert table(replace(BARE, before=COUNTS | {"peak_memory": count}))["peak activation memory"][0] == text


def test_the_worst_round_counts() -> None:
    assert BARE.masked_error == 0.0
    rounds = [
        {"removed": 3, "masked_error": 1e-8},
        {"removed": 2, "masked_error": 2e-7},
        {"removed": 1, "masked_error": 0.0},
    ]
    told = replace(BARE, rounds=rounds)
    assert told.masked_error == 2e-7
    assert table(told)["round 2: masked = shrunk"] == ("2 units out", "2.0e-07")


def test_qualities_that_were_measured_are_told() -> None:
    told = table(replace(BARE, quality={"metric": "accuracy", "before": 0.97, "right_after": 0.5, "after": 0.9612}))
    assert told["accuracy right after pruning"] == ("0.9700", "0.5000")
    assert told["accuracy after fine-tuning"] == ("0.9700", "0.9612")
    untrained = table(replace(BARE, quality={"metric": "accuracy", "before": 0.97, "right_after": 0.5}))
    assert "accuracy after fine-tuning" not in untrained


def test_latency_and_parity_are_told() -> None:
    latency = {
        "dense_ms": 2.0, "pruned_ms": 1.0, "ratio": 0.5, "interval": [0.49, 0.51], "threads": 2, "batch": 1,
    }  # fmt: skip
    told = table(replace(BARE, measured={"latency": latency}, parity={"error": 3e-7, "batches": [1, 2]}))
    assert told["latency, 2 threads, batch 1"] == ("2.000 ms", "1.000 ms")
    assert told["... of dense (measured anew, 95 %)"] == ("1", "0.500 (0.490-0.510)")
    assert told["ONNX = network, relative error"] == ("batches 1, 2", "3.0e-07")


@pytest.mark.parametrize(
    ("provider", "precision", "label"),
    [
        ("CPUExecutionProvider", "fp32", "latency, 1 thread, batch 4"),
        ("CUDAExecutionProvider", "fp32", "latency on CUDAExecutionProvider, 1 thread, batch 4"),
        ("CUDAExecutionProvider", "int8", "latency in int8 on CUDAExecutionProvider, 1 thread, batch 4"),
    ],
)
def test_a_provider_that_is_not_the_cpu_is_named(provider: str, precision: str, label: str) -> None:
    latency = {"dense_ms": 2.0, "pruned_ms": 1.0, "ratio": 0.5, "interval": [0.49, 0.51], "threads": 1, "batch": 4}
    told = table(replace(BARE, measured={"latency": latency | {"provider": provider, "precision": precision}}))
    assert label in told


def test_json_holds_every_field_and_what_depends_on_the_machine_apart() -> None:
    data = json.loads(json.dumps(BARE.to_json()))
    assert Certificate(**data) == BARE
    assert {name for name in data if "ms" in name or "latency" in name} == set()
    assert "measured" in data


def test_changes_of_function_and_notes_reach_the_reader() -> None:
    told = replace(BARE, statistics=["aten.layer_norm at blocks.0.norm"], notes=["the network pins its batch size"])
    lines = "\n".join([*told.remarks(), *(" ".join(row) for row in told.table())])
    assert "aten.layer_norm at blocks.0.norm" in lines
    assert "the network pins its batch size" in lines


def test_the_error_of_the_predictor_is_told() -> None:
    latency = {
        "dense_ms": 2.0, "pruned_ms": 1.0, "ratio": 0.5, "interval": [0.49, 0.51], "threads": 1, "batch": 1,
    }  # fmt: skip
    told = table(replace(BARE, measured={"latency": latency, "predictor": {"name": "roofline", "error": 0.0123}}))
    assert told["latency predicted by roofline, first shot"] == ("", "+1.2 %")
    assert not any("predicted" in name for name in table(replace(BARE, measured={"latency": latency})))
