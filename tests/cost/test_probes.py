"""The fit: made-up devices are recovered from the times that the cost model says their probes take."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from kfe_fx.cost.calibrate import built_in_constants, factors
from kfe_fx.cost.kernels import ConvKernel, ElementKernel, GemmKernel, RecurrentKernel
from kfe_fx.cost.probe_models import probe_models, stair_models
from kfe_fx.cost.probes import (
    INT8_PROBES,
    PROBES,
    Probe,
    fingerprint,
    fit,
    fit_int8,
    open_session,
    run_stairs,
    stair_widths,
)
from kfe_fx.cost.profile import CELL_FACTORS, ELEMENT_FACTORS, Profile
from kfe_fx.cost.widths import ONE, Product
from kfe_fx.runtime.session import make_session

FASTER = replace(
    Profile(), conv_mac=0.008, tail=(1.0, 1.3, 1.1, 1.05), pointwise_mac=0.01, plain_mac=0.02, gemm_mac=0.01,
    gemm_output=0.05, near_byte=0.006, weight_byte=0.03, cache=7e5, core_byte=0.005, reach=7e6, miss_byte=0.05,
    call=2000.0, kernel=100.0, conv_kernel=150.0, step=90.0,
)  # fmt: skip
SLOWER = replace(
    Profile(), block=8, conv_mac=0.3, tail=(1.0, 1.2, 1.1, 1.0), pointwise_mac=0.35, narrow_mac=0.6, depthwise_mac=0.5,
    plain_mac=0.4, column=4.0, plain_depthwise_mac=5.0, group=2000.0, gemm_mac=0.35, gemm_output=1.0, near_byte=0.2,
    weight_byte=0.9, cache=8e5, core_byte=0.15, reach=5e6, miss_byte=2.0, element=1.5, row=120.0, reorder=2.0,
    transpose=7.0, call=9e4, kernel=3000.0, conv_kernel=7000.0, recurrent_kernel=4e4, step=3000.0,
)  # fmt: skip


def time_of(name: str, p: Profile) -> float:
    """Nanoseconds of a probe on a device that the cost model describes."""
    probe = PROBES[name]
    out = Product(probe.elements)
    each = KINDS[probe.kind](name, probe, p, out)
    return p.call + each


def elements(_: str, probe: Probe, p: Profile, out: Product) -> float:
    pair = (ELEMENT_FACTORS[kind] * p.element for kind in ("abs", "hardsigmoid"))
    return probe.links / 2 * sum(ElementKernel("", p, out, each).cost([]) for each in pair)


def rows(_: str, probe: Probe, p: Profile, out: Product) -> float:
    each = ELEMENT_FACTORS["add"] * p.element
    return probe.links * ElementKernel("", p, out, each, Product(probe.shape[0])).cost([])


def conv(name: str, probe: Probe, p: Profile, out: Product) -> float:
    inputs, width = Product(probe.shape[1]), Product(probe.width)
    positions = probe.shape[2] * probe.shape[3]
    kernel = ConvKernel("", p, positions, probe.taps**2, inputs, inputs, width)
    total = probe.links * kernel.cost([])
    if name.startswith("misses"):
        weights = probe.links * 4 * probe.width**2 * probe.taps**2
        total += max(0.0, weights - p.reach) * p.miss_byte
    moved = [] if "plain" in name else [out] if probe.shape[1] < p.block else [Product(math.prod(probe.shape)), out]
    return total + sum(ElementKernel("", p, one, p.reorder).cost([]) for one in moved)


def depthwise(name: str, probe: Probe, p: Profile, out: Product) -> float:
    width = Product(probe.width)
    kernel = ConvKernel("", p, probe.shape[2] * probe.shape[3], probe.taps**2, width, ONE, width)
    ends = 0 if "plain" in name else 2
    return probe.links * kernel.cost([]) + ends * ElementKernel("", p, out, p.reorder).cost([])


def reorders(_: str, probe: Probe, p: Profile, out: Product) -> float:
    ways = 2 * (probe.links - 1) * ElementKernel("", p, out, p.reorder).cost([])
    between = (probe.links - 1) * ElementKernel("", p, out, p.element * ELEMENT_FACTORS["abs"]).cost([])
    return depthwise("", probe, p, out) + ways + between


def transposes(_: str, probe: Probe, p: Profile, out: Product) -> float:
    return probe.links * (ElementKernel("", p, out, p.transpose).cost([]) + p.kernel)


def products(name: str, probe: Probe, p: Profile, _: Product) -> float:
    byte = {"weights-near": p.near_byte, "weights-far": p.weight_byte}.get(name, 0.0)
    size = Product(probe.width)
    return probe.links * GemmKernel("", p, ONE, Product(probe.shape[0]), size, size, byte).cost([])


def lstm(_: str, probe: Probe, p: Profile, __: Product) -> float:
    steps, gates, hidden = Product(probe.shape[0]), Product(4 * probe.width), Product(probe.width)
    each = CELL_FACTORS["lstm"] * p.element
    kernel = RecurrentKernel("", p, steps, ONE, gates, hidden, hidden, None, each, p.step)
    before = steps.at([]) * gates.at([]) * (probe.shape[2] * p.gemm_mac + p.gemm_output)
    return kernel.cost([]) + before


KINDS = {
    "elements": elements, "rows": rows, "conv": conv, "depthwise": depthwise, "reorder": reorders,
    "transpose": transposes, "gemm": products, "lstm": lstm,
}  # fmt: skip


def times_on(profile: Profile) -> dict[str, float]:
    return {name: time_of(name, profile) for name in PROBES}


@pytest.mark.parametrize("device", [Profile(), FASTER, SLOWER], ids=["built-in", "faster", "slower"])
def test_a_device_is_recovered_from_its_times(device: Profile):
    constants, kept = fit(times_on(device), built_in_constants(), factors(), step=device.block)
    assert kept == []
    found = Profile(**{**constants, "tail": tuple(constants["tail"])})
    assert (found.block, found.granule) == (device.block, device.granule)
    assert found.tail == pytest.approx(device.tail, rel=0.01)
    for name in built_in_constants().keys() - {"tail", "block", "granule", "inner"}:
        assert getattr(found, name) == pytest.approx(getattr(device, name), rel=0.03), name


INT8 = {
    "conv_mac": 0.004, "pointwise_mac": 0.005, "narrow_mac": 0.01, "depthwise_mac": 0.02, "plain_mac": 0.006,
    "plain_depthwise_mac": 0.1, "gemm_mac": 0.003, "gemm_output": 0.4, "near_byte": 0.005, "weight_byte": 0.006,
    "reorder": 0.2, "conv_kernel": 500.0, "tap": 0.9, "requantise": 0.12,
}  # fmt: skip
FROM_FLOATS = ("call", "kernel", "element", "row", "transpose", "recurrent_kernel", "step", "core_byte")


@pytest.mark.parametrize("pace", [1.0, 20.0])
def test_the_int8_kernels_of_a_device_are_recovered(pace: float):
    floats = {**built_in_constants(), "tail": (1.0, 1.1, 1.02, 0.99)}
    for name, value in floats.items():
        if name not in ("tail", "block", "granule", "inner", "cache", "reach"):
            floats[name] = pace * value
    device = replace(
        Profile(), **{**floats, "tail": (1.0,) * 4, "column": 0.0, "group": 0.0},
    )  # fmt: skip
    device = replace(device, **{name: pace * value for name, value in INT8.items()})
    times = {name: int8_time_of(probe, device) for name, probe in INT8_PROBES.items()}
    found, kept = fit_int8(times, floats, factors(), step=16)
    assert kept == []
    for name, value in INT8.items():
        assert found[name] == pytest.approx(pace * value, rel=0.05), name
    assert [found[name] for name in FROM_FLOATS] == [floats[name] for name in FROM_FLOATS]
    assert found["tail"] == [1.0] * 4
    assert (found["miss_byte"], found["cache"]) == (floats["miss_byte"] / 4, floats["cache"] * 4)  # a byte a weight


def int8_time_of(probe: Probe, p: Profile) -> float:
    """Nanoseconds of an int8 probe: kernels, and the ways into 8 bits and out of them, whatever these are."""
    out, ways = Product(probe.elements), 3e4
    if probe.kind == "gemm":
        name = {256: "weights-near", 512: "weights-far"}.get(probe.width, "")
        return ways + products_of(probe, p, p.near_byte if name == "weights-near" else p.weight_byte if name else 0.0)
    if probe.kind == "reorder":
        return (
            ways
            + probe.links / (probe.links - 1) * (reorders("", probe, p, out) - depthwise("", probe, p, out))
            + (depthwise("", probe, p, out) - 2 * ElementKernel("", p, out, p.reorder).cost([]))
        )
    kernel = conv_kernel_of(probe, p)
    return ways + probe.links * kernel.cost([])


def conv_kernel_of(probe: Probe, p: Profile) -> ConvKernel:
    inputs, width = Product(probe.shape[1]), Product(probe.width)
    per_group = ONE if probe.kind == "depthwise" else inputs
    return ConvKernel("", p, probe.shape[2] * probe.shape[3], probe.taps**2, inputs, per_group, width)


def products_of(probe: Probe, p: Profile, byte: float) -> float:
    size = Product(probe.width)
    return probe.links * GemmKernel("", p, ONE, Product(probe.shape[0]), size, size, byte).cost([])


def test_int8_probes_run_in_int8_kernels(tmp_path: Path):
    models = probe_models("int8")
    assert models.keys() == INT8_PROBES.keys()
    runs = {"conv-64": ("QLinearConv", 2), "depthwise-long": ("QLinearConv", 8), "gemm-64": ("QLinearMatMul", 4)}
    for name, (operator, links) in runs.items():
        assert kernels_of(models[name], tmp_path).count(operator) == links, name
    for model in stair_models("int8").values():
        assert kernels_of(model, tmp_path).count("QLinearConv") == 3
    for name, model in models.items():
        assert open_session(model, 1).get_inputs()[0].shape == list(INT8_PROBES[name].shape)


def kernels_of(model: bytes, folder: Path) -> list[str]:
    """The operators that ONNX Runtime runs."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node]


@pytest.mark.parametrize(
    ("probe", "constants"),
    [("gemm-192", {"gemm_mac"}), ("transpose-more", {"transpose"}), ("pointwise", {"pointwise_mac"})],
)
@pytest.mark.parametrize("disturbed", [0.0, 1e5])
def test_what_is_implausible_keeps_the_built_in_value_at_this_pace(probe, constants, disturbed):
    times = times_on(SLOWER) | {probe: disturbed * times_on(SLOWER)[probe]}
    found, kept = fit(times, built_in_constants(), factors(), step=8)
    assert constants <= set(kept)
    built_in = built_in_constants()
    pace = found[kept[0]] / built_in[kept[0]]
    assert 3 < pace < 40
    for name in set(kept) - {"tail"}:
        assert found[name] == pytest.approx(built_in[name] * pace)
    numbers = [value for value in found.values() if not isinstance(value, list | tuple)]
    assert all(math.isfinite(value) and value > 0 for value in numbers)


def test_times_of_nothing_give_the_built_in_profile():
    found, kept = fit(dict.fromkeys(PROBES, 0.0), built_in_constants(), factors())
    assert "conv_mac" in kept
    assert found["conv_mac"] == built_in_constants()["conv_mac"]


def test_every_probe_runs_and_is_small():
    models = probe_models()
    assert models.keys() == PROBES.keys()
    for name, model in models.items():
        assert len(model) < 4 * PROBES[name].width ** 2 * 4 * max(1, PROBES[name].links) + 2**17, name
        session = open_session(model, 1)
        assert session.get_inputs()[0].shape == list(PROBES[name].shape)
    (out,) = open_session(models["conv-8"], 1).run(None, {"x": np.ones((1, 8, 14, 14), np.float32)})
    assert out.shape == (1, 8, 14, 14)


def test_stairs_are_timed_in_turns():
    times = run_stairs(stair_models())
    assert list(times) == stair_widths()
    assert len({len(column) for column in times.values()}) == 1
    assert all((column > 0).all() for column in times.values())


def test_sessions_are_set_up_as_where_networks_are_measured():
    model = probe_models()["call"]
    ours, theirs = open_session(model, 2).get_session_options(), make_session(model, 2).get_session_options()
    for name in ("intra_op_num_threads", "inter_op_num_threads", "execution_mode", "graph_optimization_level"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_the_fingerprint_is_of_this_machine_and_of_its_settings():
    assert fingerprint() == fingerprint(1, "fp32")
    assert fingerprint(2) != fingerprint(1)
    assert fingerprint().cpu
    assert len(fingerprint().cpu) < 200
