"""What each kernel of ONNX files takes: ONNX Runtime's own trace of several runs, and the graph that really ran."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError

from kfe_fx.errors import BadFile, KfeError
from kfe_fx.runtime.session import ORT_ERRORS, make_session, run

RUNS = 30
# The first runs allocate and pack weights.
WARM_UP = 2
MIN_RUNS = 3
# How many kernels a trace may hold, at half a kilobyte each; a loop writes its whole body once a step.
MAX_EVENTS = 100_000
_SUFFIX = "_kernel_time"

Feeds = Mapping[str, Any]


@dataclass(frozen=True)
class Kernel:
    """One node of the graph that ran: where it ran, its median time in a run, in ms, and how many ran inside it."""

    name: str
    op: str
    provider: str
    ms: float
    inside: int = 0


@dataclass(frozen=True)
class Profile:
    """The kernels of one model over ``runs`` runs, and the optimised graph where ONNX Runtime can write it.

    Medians are those of the fastest third of the runs; ``run_ms`` is that of a whole traced run.
    """

    kernels: tuple[Kernel, ...]
    runs: int
    run_ms: float
    graph: onnx.GraphProto | None

    @property
    def kernels_on(self) -> dict[str, int]:
        """How many kernels ran on each provider, most first."""
        counts: dict[str, int] = {}
        for kernel in self.kernels:
            counts[kernel.provider] = counts.get(kernel.provider, 0) + 1
        return dict(sorted(counts.items(), key=lambda one: -one[1]))


def strays(provider: str, kernels_on: Mapping[str, int]) -> str:
    """Say how many kernels ran elsewhere than on ``provider``, as "of 5 kernels 2 on CPUExecutionProvider", or ""."""
    others = ", ".join(f"{count} on {name}" for name, count in kernels_on.items() if name != provider)
    return f"of {sum(kernels_on.values())} kernels {others}" if others else ""


def profile(
    paths: Sequence[str | os.PathLike[str]],
    feeds: Sequence[Feeds],
    *,
    threads: int = 1,
    provider: str = "CPUExecutionProvider",
    runs: int = RUNS,
    seconds: float = 10.0,
) -> list[Profile]:
    """Trace every kernel of ONNX files on one set of feeds each; the files take turns.

    ``runs`` are made of each after two that warm up, fewer once ``seconds`` have passed for all (but three at least)
    and where a trace would grow too long. Kernels in the body of a loop count in the loop. A provider that only
    starts its kernels, such as CUDA's, is timed at starting them. Everything is written to a temporary folder, which
    takes the weights of each file for a moment, and removed.

    Raises:
        BadFile: a path holds nothing that ONNX Runtime reads, or the trace cannot be written or read.
        UnsupportedModel: a file does not run on its feeds.
        UsageError: a provider this build lacks.
    """
    with tempfile.TemporaryDirectory(prefix="kfe_fx-profile-", ignore_cleanup_errors=True) as scratch:
        places = [Path(scratch) / str(index) for index in range(len(paths))]
        opened = [_open(path, place, threads, provider) for path, place in zip(paths, places, strict=True)]
        sessions = [session for session, _ in opened]
        wanted = [min(runs, _affordable(graph, one)) + WARM_UP for (_, graph), one in zip(opened, feeds, strict=True)]
        started = time.perf_counter()
        for turn in range(max(wanted, default=0)):
            if turn >= WARM_UP + MIN_RUNS and time.perf_counter() - started >= seconds:
                break
            for session, each, count in zip(sessions, feeds, wanted, strict=True):
                if turn < count:
                    run(session, dict(each))
        return [_read(path, session, graph) for path, (session, graph) in zip(paths, opened, strict=True)]


def _open(
    path: str | os.PathLike[str], place: Path, threads: int, provider: str
) -> tuple[ort.InferenceSession, onnx.GraphProto | None]:
    place.mkdir()
    written = place / "optimized.onnx"
    settings: dict[str, Any] = {"threads": threads, "provider": provider, "profile": str(place / "trace")}
    try:
        session = make_session(path, **settings, optimized=str(written))
    except KfeError:
        # A provider that compiles parts of a graph cannot write them, nor anyone to a full disk. What is wrong with
        # the model itself is wrong without it, too.
        return make_session(path, **settings), None
    finally:
        written.with_name(f"{written.name}.data").unlink(missing_ok=True)
    model = read_model(written)
    return session, model.graph if model is not None else None


def read_model(path: str | os.PathLike[str]) -> onnx.ModelProto | None:
    """Return what an ONNX file holds, without weights that stand beside it, or None where it is no ONNX.

    ONNX Runtime also reads files of a format of its own.
    """
    try:
        return onnx.load(os.fspath(path), load_external_data=False)
    except (DecodeError, OSError, ValueError):
        return None


def _affordable(graph: onnx.GraphProto | None, feeds: Feeds) -> int:
    if graph is None:
        return RUNS
    # a loop over a sequence has at most as many steps as an input is long
    steps = max((size for array in feeds.values() for size in array.shape), default=1)
    return max(MIN_RUNS, MAX_EVENTS // max(1, _events(graph, steps)))


def _events(graph: onnx.GraphProto, steps: int) -> int:
    bodies = (part.g for node in graph.node for part in node.attribute if part.HasField("g"))
    return len(graph.node) + steps * sum(_events(body, steps) for body in bodies)


def _read(path: str | os.PathLike[str], session: ort.InferenceSession, graph: onnx.GraphProto | None) -> Profile:
    try:
        events = json.loads(Path(session.end_profiling()).read_bytes())
    except (*ORT_ERRORS, OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BadFile(
            f"{os.fspath(path)}: ONNX Runtime wrote no trace that can be read; look for room in {tempfile.gettempdir()}"
        ) from error
    timed = list(_runs(events))[WARM_UP:]
    if not timed:
        raise BadFile(f"{os.fspath(path)}: the trace that ONNX Runtime wrote holds no whole run")
    # A trace has only the wall clock: what other work on the machine adds is least in the fastest runs.
    calm = sorted(timed, key=lambda one: one[0])[: max(MIN_RUNS, len(timed) // 3)]
    names = dict.fromkeys(name for _, kernels in calm for name in kernels)  # in the order in which they ran
    kernels = (_kernel(name, [one.get(name) for _, one in calm]) for name in names)
    return Profile(tuple(kernels), len(timed), median(ms for ms, _ in calm), graph)


@dataclass
class _Met:
    """What one run has of a kernel, which can come by several times; ``arguments`` are of the first time."""

    arguments: dict[str, Any]
    microseconds: int = 0
    inside: int = 0


def _kernel(name: str, met: Sequence[_Met | None]) -> Kernel:
    arguments = next(one.arguments for one in met if one is not None)
    return Kernel(
        name=name,
        op=str(arguments["op_name"]),
        provider=str(arguments.get("provider") or "unknown"),
        # a kernel in a branch that not every run takes has nothing in the others
        ms=median(one.microseconds if one is not None else 0 for one in met) / 1e3,
        inside=round(median(one.inside if one is not None else 0 for one in met)),
    )


def _runs(events: Any) -> Iterator[tuple[float, dict[str, _Met]]]:
    """Yield the time of each whole run, in ms, and its kernels by name, those inside another one counted there."""
    ended: list[dict[str, Any]] = []
    for event in events if isinstance(events, list) else ():
        if not isinstance(event, dict) or not isinstance(event.get("dur"), int) or not isinstance(event.get("ts"), int):
            continue
        arguments, name = event.get("args"), str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith(_SUFFIX) and isinstance(arguments, dict):
            if "op_name" in arguments:
                ended.append(event)
        elif name == "model_run":  # is noted when the run ends
            yield event["dur"] / 1e3, _outermost(ended)
            ended = []


def _outermost(events: list[dict[str, Any]]) -> dict[str, _Met]:
    found: dict[str, _Met] = {}
    end, outer = -1, None
    for event in sorted(events, key=lambda one: (one["ts"], -one["dur"])):
        if outer is not None and event["ts"] < end:  # a step of the loop that is running
            outer.inside += 1
            continue
        end = event["ts"] + event["dur"]
        outer = found.setdefault(event["name"].removesuffix(_SUFFIX), _Met(event["args"]))
        outer.microseconds += event["dur"]
    return found
