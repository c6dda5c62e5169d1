"""Measure what a device is good at: small ONNX models, their times, and the constants of a cost model that follow.

This is one file, and needs nothing but the standard library, numpy and ONNX Runtime, so that it runs on devices that
have no more: kfe-fx uses it as ``kfe_fx.cost.probes``, and `kfe-fx calibrate --emit-bundle` copies it, as
``run_probes.py``, beside the models that it runs:

    python run_probes.py -o device.json [--threads N] [--precision int8]

All times are nanoseconds. Every model is a chain of equal kernels, so that a call's way in and out counts little.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

FORMAT = "kfe-fx device profile"
VERSION = 1
PROVIDER = "CPUExecutionProvider"
OPTIMIZATION = "all"
PRECISIONS = ("fp32", "int8")
MANIFEST = "probes.json"

DEFAULT_STEP = 16
# From coarse to fine: a step, and the two widths that differ by it. The wider one is a multiple of the step before.
STAIRS = ((16, 64, 48), (8, 48, 40), (4, 40, 36), (1, 36, 35))
STAIR_SHAPE = (1, 3, 16, 16)
_STAIR_ROUNDS = 24
# A step down saves about 2·step/width of the work when it is real; a quarter of that is a clear yes.
_CLEAR = 0.25

_ROUNDS = 20
_TURN = 5e5  # nanoseconds that a model runs before the next one has its turn
_QUANTILE = 20  # per cent; what neighbours take from the caches makes runs slower, never faster
_SIZES = ("cache", "reach")  # in bytes; every other constant is a time
_FARTHEST = 100.0  # a constant further than this from the built-in one is a disturbed measurement ...
_ASTRAY = 12.0  # ... and so is one that moved this much more or less than the constants on the whole


@dataclass(frozen=True)
class Probe:
    """A chain of ``links`` equal kernels of one ``kind`` on an input of ``shape`` [N, C, H, W], [rows, C] or [T, N, C].

    ``width``: channels, columns or hidden units of every link; ``taps``: the side of a convolution's kernel.
    """

    kind: str
    shape: tuple[int, ...]
    links: int
    width: int = 0
    taps: int = 1

    @property
    def elements(self) -> int:
        """The elements that one link writes."""
        return math.prod(self.shape[:1] + self.shape[2:]) * (self.width or self.shape[1])


_SIDE = (14, 14)
PROBES: dict[str, Probe] = {
    "call": Probe("elements", (1, 8), 2),
    "kernels": Probe("elements", (1, 8), 32),
    "conv-call": Probe("conv", (1, 16, 2, 2), 2, 16, 1),
    "conv-calls": Probe("conv", (1, 16, 2, 2), 16, 16, 1),
    "elements": Probe("elements", (1, 2**14), 2),
    "elements-more": Probe("elements", (1, 2**14), 8),
    "rows": Probe("rows", (512, 16), 2, 16),
    "rows-more": Probe("rows", (512, 16), 8, 16),
    "conv-8": Probe("conv", (1, 8, *_SIDE), 4, 8, 3),
    "conv-16": Probe("conv", (1, 16, *_SIDE), 3, 16, 3),
    "conv-24": Probe("conv", (1, 24, *_SIDE), 3, 24, 3),
    "conv-32": Probe("conv", (1, 32, *_SIDE), 3, 32, 3),
    "conv-48": Probe("conv", (1, 48, *_SIDE), 2, 48, 3),
    "conv-64": Probe("conv", (1, 64, *_SIDE), 2, 64, 3),
    "pointwise": Probe("conv", (1, 64, *_SIDE), 4, 64, 1),
    "narrow": Probe("conv", (1, 3, 28, 28), 1, 32, 3),
    "narrow-more": Probe("conv", (1, 3, 28, 28), 1, 32, 5),
    "depthwise": Probe("depthwise", (1, 64, *_SIDE), 4, 64, 3),
    "reorder": Probe("reorder", (1, 64, *_SIDE), 3, 64, 3),
    "plain": Probe("conv", (1, 63, *_SIDE), 2, 63, 3),
    "plain-pointwise": Probe("conv", (1, 63, *_SIDE), 3, 63, 1),
    "plain-depthwise": Probe("depthwise", (1, 63, *_SIDE), 2, 63, 3),
    "plain-depthwise-small": Probe("depthwise", (1, 63, 4, 4), 2, 63, 3),
    "transpose": Probe("transpose", (1, 64, 4, 32), 2),
    "transpose-more": Probe("transpose", (1, 64, 4, 32), 8),
    "gemm-64": Probe("gemm", (64, 64), 4, 64),
    "gemm-192": Probe("gemm", (64, 192), 2, 192),
    "weights-near": Probe("gemm", (1, 256), 2, 256),
    "weights-far": Probe("gemm", (1, 512), 3, 512),
    "misses": Probe("conv", (1, 256, 4, 4), 5, 256, 3),
    "misses-more": Probe("conv", (1, 256, 4, 4), 9, 256, 3),
    "steps-few": Probe("lstm", (8, 1, 16), 1, 64),
    "steps-64": Probe("lstm", (40, 1, 16), 1, 64),
    "steps-160": Probe("lstm", (40, 1, 16), 1, 160),
    "steps-256": Probe("lstm", (40, 1, 16), 1, 256),
}


# The kernels that int8 changes. Each chain has one of twice its links beside it: what is between them is kernels alone,
# without the ways into 8 bits and out of them.
_INT8_CHAINS: dict[str, Probe] = {
    "pointwise-32": Probe("conv", (1, 32, *_SIDE), 4, 32, 1),
    **{
        name: PROBES[name]
        for name in (
            "conv-32", "conv-64", "pointwise", "depthwise", "reorder", "plain", "plain-depthwise", "gemm-64",
            "gemm-192", "weights-near", "weights-far",
        )
    },
}  # fmt: skip
INT8_PROBES: dict[str, Probe] = {
    **{name: PROBES[name] for name in ("conv-call", "conv-calls", "narrow", "narrow-more")},
    **_INT8_CHAINS,
    **{f"{name}-long": replace(probe, links=2 * probe.links) for name, probe in _INT8_CHAINS.items()},
}
PROBES_OF = {"fp32": PROBES, "int8": INT8_PROBES}
# Constants of int8 alone, and what they and others are about, relative to the time of a MAC in float32.
INT8_CONSTANTS = ("tap", "requantise", "floats")
_INT8_BUILT_IN = {"tap": 60.0, "requantise": 6.0, "gemm_output": 30.0}
_QUARTER = 4  # weights of one byte: as many again stay near the core, or are read in the same time


@dataclass(frozen=True)
class Fingerprint:
    """What times depend on: the processor, the runtime, and how it is set up."""

    cpu: str
    flags: tuple[str, ...]
    onnxruntime: str
    optimization: str
    threads: int
    precision: str
    provider: str

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {**asdict(self), "flags": list(self.flags)}


def fingerprint(threads: int = 1, precision: str = "fp32") -> Fingerprint:
    """Describe this machine and its ONNX Runtime."""
    cpu, flags = _processor()
    return Fingerprint(cpu, flags, ort.__version__, OPTIMIZATION, threads, precision, PROVIDER)


def _processor() -> tuple[str, tuple[str, ...]]:
    """Return the model of the processor and its vector instructions."""
    fields: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                fields.setdefault(name.strip().lower(), value.strip())  # the first processor speaks for all
    except OSError:  # not Linux
        pass
    named = ("model name", "vendor_id", "cpu family", "model", "stepping")  # x86, where hypervisors shorten the name
    named += ("cpu implementer", "cpu architecture", "cpu variant", "cpu part", "hardware")  # ARM
    parts = [fields[name] for name in named if fields.get(name)] or [platform.processor()]
    words = (fields.get("flags") or fields.get("features") or "").split()
    kinds = ("avx", "sse", "ssse", "fma", "f16c", "amx", "asimd", "neon", "sve", "sme", "fp", "bf16", "i8mm", "rvv")
    flags = tuple(sorted({word for word in words if word.startswith(kinds)}))
    return " ".join([platform.machine(), *filter(None, parts)]).strip(), flags


# running ---------------------------------------------------------------------------------------------------------


def open_session(model: bytes | str, threads: int) -> ort.InferenceSession:
    """Open a model as kfe-fx does where it measures: quiet, sequential, without spinning between runs."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(model, options, providers=[PROVIDER])


def _clock(threads: int) -> Any:
    # the processor time of the calling thread is the wall time of an idle machine, whatever else runs on this one
    return time.thread_time_ns if threads == 1 else time.perf_counter_ns


def _feeds(shape: Sequence[int]) -> dict[str, np.ndarray]:
    return {"x": np.full(tuple(shape), 0.5, dtype=np.float32)}


def run_probes(models: Mapping[str, bytes | str], threads: int = 1, precision: str = "fp32") -> dict[str, float]:
    """Return the nanoseconds of a run of each probe: a lower quantile, by turns in which all take part."""
    clock, probes = _clock(threads), PROBES_OF[precision]
    runs = [(open_session(models[name], threads), _feeds(probe.shape)) for name, probe in probes.items()]
    counts = []
    for session, feeds in runs:
        session.run(None, feeds)
        before = clock()
        session.run(None, feeds)
        counts.append(int(min(40, max(2, _TURN / max(1, clock() - before)))))
    times: list[list[int]] = [[] for _ in runs]
    for _ in range(_ROUNDS):
        for index, (session, feeds) in enumerate(runs):
            session.run(None, feeds)  # brings the weights back into the caches
            for _ in range(counts[index]):
                before = clock()
                session.run(None, feeds)
                times[index].append(clock() - before)
    return {name: float(np.percentile(one, _QUANTILE)) for name, one in zip(probes, times, strict=True)}


def run_stairs(models: Mapping[int, bytes | str], threads: int = 1) -> dict[int, np.ndarray]:
    """Return the nanoseconds [rounds] of each network of the stairs, by its width."""
    clock, feeds = _clock(threads), _feeds(STAIR_SHAPE)
    sessions = {width: open_session(model, threads) for width, model in models.items()}
    times: dict[int, list[int]] = {width: [] for width in sessions}
    for session in sessions.values():
        session.run(None, feeds)
    for _ in range(_STAIR_ROUNDS):
        for width, session in sessions.items():
            best = math.inf
            for _ in range(2):
                before = clock()
                session.run(None, feeds)
                best = min(best, clock() - before)
            times[width].append(int(best))
    return {width: np.asarray(one, dtype=float) for width, one in times.items()}


def stair_widths() -> list[int]:
    """Return the widths of the networks of the stairs."""
    return sorted({width for _, wide, narrow in STAIRS for width in (wide, narrow)}, reverse=True)


def decide(by_width: Mapping[int, np.ndarray]) -> tuple[int, bool, dict[str, tuple[float, float, float]]]:
    """Return the step of widths, whether the measurements could tell, and the ratios looked at.

    ``by_width`` maps a width to its times [rounds], measured in turns. From the coarsest step down, a step is taken
    when the narrower network is clearly faster than the wider one; the first that is not ends the search. A ratio is
    (median, low, high), an order-statistic interval of at least 95 % from 24 rounds on.
    """
    step = 32
    ratios: dict[str, tuple[float, float, float]] = {}
    for candidate, wide, narrow in STAIRS:
        ordered = np.sort(np.asarray(by_width[narrow], dtype=float) / np.asarray(by_width[wide], dtype=float))
        low, high = (float(ordered[rank]) for rank in (len(ordered) // 4, -1 - len(ordered) // 4))
        ratios[f"{narrow}/{wide}"] = float(np.median(ordered)), low, high
        clear = 1 - _CLEAR * 2 * candidate / wide
        if high < clear:
            step = candidate
        elif low > clear:
            break
        else:
            return DEFAULT_STEP, False, ratios  # the machine was too busy to tell
    return step, True, ratios


# fitting -------------------------------------------------------------------------------------------------------------


def fit(
    times: Mapping[str, float], built_in: Mapping[str, Any], factors: Mapping[str, float], step: int = DEFAULT_STEP
) -> tuple[dict[str, Any], list[str]]:
    """Return the constants of a cost model that explain ``times`` (nanoseconds by probe), and those not believed.

    Each constant is what its probe takes less what is already known of it, per unit of work. Constants that come out
    implausible keep their ``built_in`` value, times how fast this machine is on the whole. ``factors`` are what the
    cost model charges for abs, hardsigmoid and the cell of an lstm relative to an element; ``step`` is the step of
    widths, from which the block of the convolutions follows.
    """
    block = min(step, 16)
    built_in = {**built_in, "block": block, "granule": min(built_in["granule"], block)}
    found = _Fit(times, built_in, factors).run()
    constants, doubted = _believed(found, built_in)
    constants["tail"] = _tail(_Fit(times, constants, factors), block)
    if not all(0.5 < part < 3 for part in constants["tail"]):
        constants["tail"] = list(built_in["tail"])
        doubted.append("tail")
    return constants, doubted


def fit_int8(
    times: Mapping[str, float], floats: Mapping[str, Any], factors: Mapping[str, float], step: int = DEFAULT_STEP
) -> tuple[dict[str, Any], list[str]]:
    """Return the constants of int8 kernels that explain ``times`` (nanoseconds by int8 probe), and those not believed.

    ``floats`` are the constants of float32 on the same device, which ``fit`` found: what int8 does not change keeps
    them. Outside the blocks int8 gathers no columns and pays for no group, and all remainders of blocks cost the same.
    """
    block = min(step, 16)
    own = {name: factor * floats["conv_mac"] for name, factor in _INT8_BUILT_IN.items()}
    here = {**floats, **own, "block": block, "granule": min(floats["granule"], block)}
    constants, doubted = _believed(_Int8Fit(times, here, factors).run(), here)
    constants |= {"column": 0.0, "group": 0.0, "tail": [1.0] * 4, "miss_byte": floats["miss_byte"] / _QUARTER}
    constants |= {name: floats[name] * _QUARTER for name in _SIZES}
    return constants, doubted


def _believed(found: Mapping[str, float], built_in: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the built-in constants with those found in place where they are plausible, and the names of the others."""
    ratios = {name: value / built_in[name] for name, value in found.items()}
    sound = [ratio for name, ratio in ratios.items() if name not in _SIZES and 1 / _FARTHEST < ratio < _FARTHEST]
    pace = {name: 1.0 if name in _SIZES or not sound else float(np.median(sound)) for name in ratios}
    doubted = [name for name, ratio in ratios.items() if not 1 / _ASTRAY < ratio / pace[name] < _ASTRAY]
    constants = {**built_in, **found}
    for name in doubted:
        constants[name] = built_in[name] * pace[name]
    return constants, doubted


class _Fit:
    """The constants in the order in which each needs only those before it; ``known`` holds the best guess so far."""

    def __init__(self, times: Mapping[str, float], built_in: Mapping[str, Any], factors: Mapping[str, float]) -> None:
        self.times = times
        self.known = dict(built_in)
        self.factors = factors
        self.found: dict[str, float] = {}

    def learn(self, name: str, value: float) -> None:
        self.found[name] = value
        if value > 0:
            self.known[name] = value

    def link(self, name: str, *, ends: bool = False) -> float:
        """Return the time of one kernel of a chain, without its overhead; ``ends``: the chain changes its layout."""
        probe, known = PROBES[name], self.known
        outside = known["call"]
        if ends:
            first = math.prod(probe.shape)
            outside += 2 * known["kernel"] + (first + probe.elements) * known["reorder"]
        overhead = known["conv_kernel" if probe.kind in ("conv", "depthwise") else "kernel"]
        return (self.times[name] - outside) / probe.links - overhead

    def between(self, name: str, longer: str) -> float:
        """Return what one link more takes, without the overhead of a kernel; ways in and out cancel."""
        links = PROBES[longer].links - PROBES[name].links
        return (self.times[longer] - self.times[name]) / links - self.known["kernel"]

    def run(self) -> dict[str, float]:
        times, known, learn = self.times, self.known, self.learn
        few, many = PROBES["call"], PROBES["kernels"]
        learn("kernel", (times["kernels"] - times["call"]) / (many.links - few.links))
        learn("call", times["call"] - few.links * known["kernel"])
        activation = (self.factors["abs"] + self.factors["hardsigmoid"]) / 2
        learn("element", self.between("elements", "elements-more") / (PROBES["elements"].elements * activation))
        added = self.factors["add"] * known["element"]
        learn("row", (self.between("rows", "rows-more") - PROBES["rows"].elements * added) / PROBES["rows"].shape[0])
        # each transpose is followed by a reshape, which moves nothing
        learn(
            "transpose", (self.between("transpose", "transpose-more") - known["kernel"]) / PROBES["transpose"].elements
        )
        self._convolutions()
        self._outside_the_blocks()
        self._misses()
        self._products()
        self._steps()
        return self.found

    def _convolutions(self) -> None:
        times, known, learn, link = self.times, self.known, self.learn, self.link
        calls = self.between("conv-call", "conv-calls") + known["kernel"]
        # what these kernels and the ways into and out of their layout take is known from each other: round and round
        for _ in range(6):
            learn("conv_kernel", calls - _macs("conv-call") * known["pointwise_mac"])
            learn("conv_mac", link("conv-64", ends=True) / _macs("conv-64"))
            learn("pointwise_mac", link("pointwise", ends=True) / _macs("pointwise"))
            learn("depthwise_mac", link("depthwise", ends=True) / _macs("depthwise"))
            probe = PROBES["reorder"]
            chain = times["reorder"] - known["call"] - probe.links * _macs("reorder") * known["depthwise_mac"]
            others = probe.links * known["conv_kernel"] + (3 * probe.links - 1) * known["kernel"]
            plain = (probe.links - 1) * probe.elements * self.factors["abs"] * known["element"]
            learn("reorder", (chain - others - plain) / (2 * probe.links * probe.elements))
        more = times["narrow-more"] - times["narrow"]
        learn("narrow_mac", more / (_macs("narrow-more") - _macs("narrow")))

    def _outside_the_blocks(self) -> None:
        known, learn, link = self.known, self.learn, self.link
        learn("plain_mac", link("plain-pointwise") / _macs("plain-pointwise"))
        probe = PROBES["plain"]
        columns = probe.elements * probe.taps**2
        learn("column", (link("plain") - _macs("plain") * known["plain_mac"]) / columns)
        # every channel of a depthwise convolution outside the blocks is a product of its own
        large, small = link("plain-depthwise"), link("plain-depthwise-small")
        macs = _macs("plain-depthwise") - _macs("plain-depthwise-small")
        learn("plain_depthwise_mac", (large - small) / macs)
        rest = small - _macs("plain-depthwise-small") * known["plain_depthwise_mac"]
        learn("group", rest / PROBES["plain-depthwise-small"].width)

    def _misses(self) -> None:
        times, known = self.times, self.known
        fewer, more = PROBES["misses"], PROBES["misses-more"]
        weights = 4 * fewer.width**2 * fewer.taps**2
        compute = _macs("misses") * known["conv_mac"] + known["conv_kernel"]
        # the kernels are the same: what the longer chain takes longer than computing is reading weights from afar
        slope = ((times["misses-more"] - times["misses"]) / (more.links - fewer.links) - compute) / weights
        if slope < 0.05 * compute / weights:
            self.learn("reach", float(weights * more.links))
            return
        self.learn("miss_byte", slope)
        extra = max(0.0, (self.link("misses", ends=True) + known["conv_kernel"] - compute) * fewer.links)
        self.learn("reach", max(0.05 * weights * fewer.links, weights * fewer.links - extra / slope))

    def _products(self) -> None:
        known, learn, link = self.known, self.learn, self.link
        # time per MAC = gemm_mac + gemm_output / inner size
        small, large = (link(name) / _macs(name) for name in ("gemm-64", "gemm-192"))
        inner = 1 / PROBES["gemm-64"].width - 1 / PROBES["gemm-192"].width
        learn("gemm_output", (small - large) / inner)
        learn("gemm_mac", large - known["gemm_output"] / PROBES["gemm-192"].width)
        for name, probe in (("near_byte", "weights-near"), ("weight_byte", "weights-far")):
            learn(name, link(probe) / (4 * PROBES[probe].width ** 2))

    def _steps(self) -> None:
        """Fit the overheads of a layer and a step, a byte of weights near the core, and how many bytes stay there."""
        known, learn = self.known, self.learn
        few, many = PROBES["steps-few"].shape[0], PROBES["steps-64"].shape[0]
        step = (self.times["steps-64"] - self.times["steps-few"]) / (many - few)
        learn("recurrent_kernel", self.times["steps-few"] - known["call"] - few * step)
        times, weights = [], []
        for name in ("steps-64", "steps-160", "steps-256"):
            probe = PROBES[name]
            gates, steps = 4 * probe.width, probe.shape[0]
            product = gates * (probe.shape[2] * known["gemm_mac"] + known["gemm_output"])
            cell = probe.width * self.factors["lstm"] * known["element"]
            times.append((self.times[name] - known["call"] - known["recurrent_kernel"]) / steps - product - cell)
            weights.append(4 * gates * probe.width)
        learn("core_byte", (times[1] - times[0]) / (weights[1] - weights[0]))
        learn("step", times[0] - weights[0] * known["core_byte"])
        near, far = known["core_byte"], known["weight_byte"]
        if far > 1.1 * near:  # else there is no cliff that could be found, nor one that matters
            byte = (times[2] - known["step"]) / weights[2]
            learn("cache", weights[2] / (1 + min(1.0, max(0.0, (byte - near) / (far - near)))))


class _Int8Fit(_Fit):
    """The constants of int8 kernels; ``known`` begins with those of float32 on the same device."""

    def link(self, name: str, *, ends: bool = False) -> float:
        """Return the time of one kernel without its overhead; of convolutions what goes with their MACs."""
        del ends  # they cancel
        known, probe, longer = self.known, INT8_PROBES[name], INT8_PROBES[f"{name}-long"]
        each = (self.times[f"{name}-long"] - self.times[name]) / (longer.links - probe.links)
        return each - (self._rest(probe) if probe.kind in ("conv", "depthwise") else known["kernel"])

    def _rest(self, probe: Probe) -> float:
        """Return what a convolution takes beside its MACs."""
        known, positions = self.known, probe.elements // probe.width
        addresses = positions * probe.taps**2 * known["tap"] if probe.taps > 1 else 0.0
        return known["conv_kernel"] + addresses + probe.elements * known["requantise"]

    def run(self) -> dict[str, float]:
        known, learn, link = self.known, self.learn, self.link
        self._convolutions()
        learn("depthwise_mac", link("depthwise") / _macs("depthwise"))
        probe = INT8_PROBES["reorder"]
        between = probe.elements * self.factors["abs"] * known["element"] + 2 * known["kernel"]
        convolution = self._rest(probe) + _macs("reorder") * known["depthwise_mac"]
        learn("reorder", (link("reorder") - convolution - between) / (2 * probe.elements))
        learn("plain_mac", link("plain") / _macs("plain"))
        learn("plain_depthwise_mac", link("plain-depthwise") / _macs("plain-depthwise"))
        self._products()
        return self.found

    def _convolutions(self) -> None:
        times, known, learn, link = self.times, self.known, self.learn, self.link
        few, many = INT8_PROBES["conv-call"], INT8_PROBES["conv-calls"]
        call = (times["conv-calls"] - times["conv-call"]) / (many.links - few.links)
        # the work of two widths: what goes with the square of the channels, with the channels, and with neither
        for _ in range(6):
            back = known["requantise"]
            learn("conv_kernel", call - _macs("conv-call") * known["pointwise_mac"] - few.elements * back)
            small, large = INT8_PROBES["pointwise-32"], INT8_PROBES["pointwise"]
            ratio = _macs("pointwise") / _macs("pointwise-32")
            lower, upper = link("pointwise-32") + small.elements * back, link("pointwise") + large.elements * back
            learn("requantise", (ratio * lower - upper) / (ratio * small.elements - large.elements))
            learn("pointwise_mac", link("pointwise") / _macs("pointwise"))
        more = link("conv-64") - link("conv-32")
        learn("conv_mac", more / (_macs("conv-64") - _macs("conv-32")))
        addresses = INT8_PROBES["conv-32"].elements / INT8_PROBES["conv-32"].width * INT8_PROBES["conv-32"].taps ** 2
        learn("tap", known["tap"] + (link("conv-32") - _macs("conv-32") * known["conv_mac"]) / addresses)
        more = times["narrow-more"] - times["narrow"]  # addresses included
        learn("narrow_mac", more / (_macs("narrow-more") - _macs("narrow")))


def _macs(name: str) -> int:
    """Return the multiply-accumulates of one link, as the cost model counts them."""
    probe = PROBES.get(name) or INT8_PROBES[name]
    if probe.kind == "gemm":
        return probe.shape[0] * probe.width**2
    inner = 1 if probe.kind in ("depthwise", "reorder") else probe.shape[1]
    return probe.elements * probe.taps**2 * inner


def _tail(fitted: _Fit, block: int) -> list[float]:
    """Return what a remainder of 0, 1, 2, 3 blocks of output costs per MAC relative to none."""
    known, tail = fitted.known, [1.0]
    for blocks in (1, 2, 3):
        name = f"conv-{block * blocks}"
        if name not in PROBES:  # no blocked kernels here
            return list(known["tail"])
        tail.append(fitted.link(name, ends=True) / (_macs(name) * known["conv_mac"]))
    return tail


# a device file ---------------------------------------------------------------------------------------------------


def measure_device(
    models: Mapping[str, tuple[Mapping[str, bytes | str], Mapping[int, bytes | str]]],
    built_in: Mapping[str, Any],
    factors: Mapping[str, float],
    *,
    threads: int = 1,
    precision: str = "fp32",
) -> dict[str, Any]:
    """Run everything on this machine and return what a device file holds.

    ``models`` are the probes and the stairs by precision; int8 needs those of fp32 too.
    """
    started = time.perf_counter()
    step, probed, ratios = decide(run_stairs(models["fp32"][1], threads))
    times = run_probes(models["fp32"][0], threads)
    profile, kept = fit(times, built_in, factors, step)
    if precision == "int8":
        step, probed, ratios = decide(run_stairs(models["int8"][1], threads))
        quantised = run_probes(models["int8"][0], threads, "int8")
        floats, inherited = {**profile, "name": "measured"}, kept
        profile, kept = fit_int8(quantised, profile, factors, step)
        kept += [name for name in inherited if profile.get(name) == floats[name]]
        profile["floats"] = floats
        times |= {f"int8 {name}": value for name, value in quantised.items()}
    measured = {
        "nanoseconds": times,
        "ratios": {name: list(ratio) for name, ratio in ratios.items()},
        "step_probed": probed,
        "seconds": time.perf_counter() - started,
    }
    return {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": fingerprint(threads, precision).to_json(),
        "step": step,
        "profile": {**profile, "name": "measured"},
        "kept": kept,
        "measured": measured,
    }


def main() -> None:
    """Run the probes that lie beside this file."""
    parser = argparse.ArgumentParser(description="Measure this device for kfe-fx; needs onnxruntime and numpy only.")
    parser.add_argument("-o", "--output", default="device.json", help="the file to write (device.json)")
    parser.add_argument("--threads", type=int, default=1, help="threads inside one operation (1)")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the networks to prune (fp32)")
    arguments = parser.parse_args()
    if arguments.threads < 1:
        parser.error(f"--threads must be at least 1, got {arguments.threads}")
    here = Path(__file__).resolve().parent
    manifest = json.loads((here / MANIFEST).read_text(encoding="utf-8"))
    models = {
        precision: (
            {name: str(here / file) for name, file in files["probes"].items()},
            {int(width): str(here / file) for width, file in files["stairs"].items()},
        )
        for precision, files in manifest["models"].items()
    }
    found = measure_device(
        models, manifest["built_in"], manifest["factors"], threads=arguments.threads, precision=arguments.precision
    )
    draft = Path(f"{arguments.output}.{os.getpid()}.tmp")
    draft.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(draft, arguments.output)
    option = "" if arguments.precision == "fp32" else f" --precision {arguments.precision}"
    command = f"kfe-fx prune ... --target {arguments.output}{option}"
    sys.stdout.write(f"wrote {arguments.output}; on the other machine: {command}\n")


if __name__ == "__main__":
    main()
