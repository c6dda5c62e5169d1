"""Times of layers: the kernels of a profile, summed up by the module of the source that they come from.

Tracing takes time itself, a few microseconds a kernel. What it takes inside a loop, whose body is traced once a step,
is many times what the loop takes; so it is estimated, as the time that a traced run takes longer than a measured one
divided by the number of kernels traced, and subtracted from loops and branches for each kernel inside them.

What is left still is no run: it lacks what ONNX Runtime does between kernels. All times are therefore multiplied by
one factor, the measured median of a run over their sum: layers add up to the run, and their shares are the profile's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kfe_fx.runtime.origins import Origin, OriginalFile
from kfe_fx.runtime.profile import Kernel, Profile


@dataclass(frozen=True)
class Layer:
    """What one module takes: ``ms`` of a run, scaled; ``share`` of it; its kernels, their operators and providers."""

    origin: Origin
    ms: float
    share: float
    kernels: int
    operators: tuple[str, ...]
    providers: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        plain = asdict(self)
        return plain.pop("origin") | plain


@dataclass(frozen=True)
class LayerTimes:
    """The layers of one file, the slowest first.

    ``run_ms`` is the measured median of a run, ``traced_ms`` that of the fastest third of ``runs`` traced ones,
    ``kernels_ms`` the sum of the kernels' medians in these, and ``scale`` what their times are multiplied by.
    ``tracing_ms`` was subtracted from loops first.
    """

    layers: tuple[Layer, ...]
    run_ms: float
    traced_ms: float
    kernels_ms: float
    tracing_ms: float
    scale: float
    runs: int

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self) | {"layers": [layer.to_json() for layer in self.layers]}


def layer_times(profile: Profile, original: OriginalFile, run_ms: float) -> LayerTimes:
    """Sum up a profile by module; ``run_ms`` is the measured median of a run, in ms."""
    times = _without_tracing(profile, run_ms)
    total, traced = sum(times), sum(kernel.ms for kernel in profile.kernels)
    groups: dict[Origin, list[tuple[Kernel, float]]] = {}
    for kernel, ms, origin in zip(profile.kernels, times, original.origins(profile), strict=True):
        groups.setdefault(origin, []).append((kernel, ms))
    layers = []
    for origin, kernels in groups.items():
        share = sum(ms for _, ms in kernels) / total if total else 0.0
        layers.append(
            Layer(
                origin=origin,
                ms=share * run_ms,
                share=share,
                kernels=len(kernels),
                operators=tuple(dict.fromkeys(kernel.op for kernel, _ in kernels)),
                providers=tuple(dict.fromkeys(kernel.provider for kernel, _ in kernels)),
            )
        )
    layers.sort(key=lambda layer: (-layer.ms, layer.origin))
    return LayerTimes(
        layers=tuple(layers),
        run_ms=run_ms,
        traced_ms=profile.run_ms,
        kernels_ms=traced,
        tracing_ms=traced - total,
        scale=run_ms / total if total else 1.0,
        runs=profile.runs,
    )


def _without_tracing(profile: Profile, run_ms: float) -> list[float]:
    """Return the time of each kernel, in ms, less what tracing the kernels inside it took."""
    events = sum(1 + kernel.inside for kernel in profile.kernels)
    each = max(0.0, profile.run_ms - run_ms) / max(1, events)
    return [max(0.0, kernel.ms - kernel.inside * each) for kernel in profile.kernels]


def side_by_side(files: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Join the layers of several files, as ``LayerTimes.to_json`` gives them, by module; the slowest anywhere first.

    A row has ``kind`` and ``name``, ``ms`` with one time a file (None where a file lacks the layer), ``operators`` and,
    for two files, ``difference`` (second less first, in ms) and ``ratio`` (None where either is missing or nothing).
    """
    found: dict[tuple[str, str], list[Mapping[str, Any] | None]] = {}
    for index, one in enumerate(files):
        for layer in one["layers"]:
            found.setdefault((layer["kind"], layer["name"]), [None] * len(files))[index] = layer
    rows = []
    for (kind, name), layers in found.items():
        ms = [layer["ms"] if layer is not None else None for layer in layers]
        operators = dict.fromkeys(op for layer in layers if layer is not None for op in layer["operators"])
        row: dict[str, Any] = {"kind": kind, "name": name, "ms": ms, "operators": list(operators)}
        if len(files) == 2:
            first, second = ms
            row["difference"] = (second or 0.0) - (first or 0.0)
            row["ratio"] = second / first if first and second is not None else None
        rows.append(row)
    rows.sort(key=lambda row: (-max(one or 0.0 for one in row["ms"]), row["kind"], row["name"]))
    return rows
