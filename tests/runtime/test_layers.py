from __future__ import annotations

import json

import onnx
import pytest
from onnx import helper

from kfe_fx.runtime.layers import layer_times, side_by_side
from kfe_fx.runtime.origins import Origin, OriginalFile
from kfe_fx.runtime.profile import Kernel, Profile


def kernel(name: str, ms: float, *, op: str = "Add", inside: int = 0) -> Kernel:
    return Kernel(name, op, "CPUExecutionProvider", ms, inside)


def original(*names: str) -> OriginalFile:
    nodes = [
        helper.make_node("Add", [f"v{place}", f"v{place}"], [f"v{place + 1}"], name) for place, name in enumerate(names)
    ]
    return OriginalFile(helper.make_model(helper.make_graph(nodes, "g", [], [])))


def test_kernels_add_up_by_module_and_to_the_run():
    kernels = (
        kernel("a/Add", 1.0),
        kernel("b/Mul", 2.0, op="Mul"),
        kernel("a/Add_2", 3.0),
        kernel("?", 2.0, op="Cast"),
    )
    times = layer_times(Profile(kernels, 5, 9.0, None), original("a/Add", "b/Mul", "a/Add_2"), run_ms=4.0)
    assert [(layer.origin, layer.ms, layer.share, layer.kernels) for layer in times.layers] == [
        (Origin("module", "a"), 2.0, 0.5, 2),
        (Origin("module", "b"), 1.0, 0.25, 1),
        (Origin("unjoined"), 1.0, 0.25, 1),
    ]
    assert times.layers[0].operators == ("Add",)
    assert (times.kernels_ms, times.tracing_ms, times.scale, times.traced_ms, times.runs) == (8.0, 0.0, 0.5, 9.0, 5)
    plain = times.to_json()
    assert plain["layers"][0] == {
        "kind": "module",
        "name": "a",
        "ms": 2.0,
        "share": 0.5,
        "kernels": 2,
        "operators": ("Add",),
        "providers": ("CPUExecutionProvider",),
    }
    json.dumps(plain, allow_nan=False)


def test_tracing_inside_loops_is_taken_off():
    # 100 kernels traced make the run 10 ms longer: 0.1 ms each, 98 of them in the loop
    kernels = (kernel("loop/Scan", 10.8, op="Scan", inside=98), kernel("head/Add", 1.0))
    times = layer_times(Profile(kernels, 3, 12.0, None), original("loop/Scan", "head/Add"), run_ms=2.0)
    assert times.tracing_ms == pytest.approx(9.8)
    assert [layer.ms for layer in times.layers] == pytest.approx([1.0, 1.0])
    # a traced run that was not slower leaves them as they are
    assert layer_times(Profile(kernels, 3, 1.0, None), original("loop/Scan"), run_ms=2.0).tracing_ms == 0.0


def test_kernels_that_take_no_time():
    times = layer_times(Profile((kernel("a/Add", 0.0),), 3, 0.1, None), original("a/Add"), run_ms=0.05)
    assert [(layer.ms, layer.share) for layer in times.layers] == [(0.0, 0.0)]
    assert times.scale == 1.0
    assert layer_times(Profile((), 3, 0.0, None), OriginalFile(onnx.ModelProto()), run_ms=0.0).layers == ()


def layers(**times: float) -> dict[str, object]:
    rows = [{"kind": "module", "name": name, "ms": ms, "operators": ("Add",)} for name, ms in times.items()]
    return {"layers": rows}


def test_two_files_side_by_side():
    rows = side_by_side([layers(a=4.0, gone=3.0, zero=0.0), layers(a=1.0, new=5.0, zero=2.0)])
    assert [row["name"] for row in rows] == ["new", "a", "gone", "zero"]
    found = {row["name"]: (row["ms"], row["difference"], row["ratio"]) for row in rows}
    assert found == {
        "a": ([4.0, 1.0], -3.0, 0.25),
        "gone": ([3.0, None], -3.0, None),
        "new": ([None, 5.0], 5.0, None),
        "zero": ([0.0, 2.0], 2.0, None),
    }


def test_one_file_and_three():
    assert [(row["name"], row["ms"]) for row in side_by_side([layers(a=1.0, b=2.0)])] == [("b", [2.0]), ("a", [1.0])]
    three = side_by_side([layers(a=1.0), layers(a=2.0), layers(a=3.0)])
    assert three == [{"kind": "module", "name": "a", "ms": [1.0, 2.0, 3.0], "operators": ["Add"]}]
