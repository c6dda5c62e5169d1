"""The ONNX models that ``kfe_fx.cost.probes`` runs.

Weights of convolutions are made on loading, which keeps them small. Those of products are in the file: ONNX Runtime
packs only what it finds there, and what is not packed takes up to a third longer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kfe_fx.cost.probes import PROBES_OF, STAIR_SHAPE, Probe, stair_widths

# old enough for the ONNX Runtime of a device that is seldom updated
_OPSET, _IR_VERSION = 13, 7


def probe_models(precision: str = "fp32") -> dict[str, bytes]:
    """Return every probe of a precision as an ONNX model, by name."""
    found = PROBES_OF[precision].items()
    return {name: _KINDS[probe.kind](_CHAINS[precision](probe.shape), probe).payload() for name, probe in found}


def stair_models(precision: str = "fp32") -> dict[int, bytes]:
    """Return the networks that find the step of widths, by width."""
    return {width: _stair(_CHAINS[precision](STAIR_SHAPE), width) for width in stair_widths()}


class _Chain:
    """Nodes one after the other, from the input ``x`` [shape] on."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.last = "x"
        self.nodes: list[Any] = []
        self.values: dict[str, np.ndarray] = {}
        self._count = 0

    def add(self, operator: str, *others: str, **attributes: Any) -> None:
        """Append a node that reads the last value and ``others``."""
        from onnx import helper

        self._count += 1
        name = f"v{self._count}"
        self.nodes.append(helper.make_node(operator, [self.last, *others], [name], **attributes))
        self.last = name

    def constant(self, values: list[int]) -> str:
        """Add a vector of integers."""
        return self._keep(np.asarray(values, dtype=np.int64))

    def matrix(self, *shape: int) -> str:
        """Add weights that are in the file."""
        return self._keep(np.full(shape, 1 / shape[-1], dtype=np.float32))

    def _keep(self, value: np.ndarray) -> str:
        name = f"k{len(self.values)}"
        self.values[name] = value
        return name

    def weights(self, *shape: int) -> str:
        """Add weights that ONNX Runtime fills in when it folds constants."""
        from onnx import helper, numpy_helper

        name = f"w{len(self.values)}"
        # no two alike: equal constants would share their memory
        value = np.asarray([0.01 + 1e-5 * len(self.values)], dtype=np.float32)
        size = self.constant(list(shape))
        self.nodes.append(helper.make_node("ConstantOfShape", [size], [name], value=numpy_helper.from_array(value)))
        return name

    def convolution(self, inputs: int, outputs: int, taps: int, groups: int = 1) -> None:
        """Append a square convolution that keeps the size of the image."""
        weights = self.weights(outputs, inputs // groups, taps, taps)
        self.add("Conv", weights, kernel_shape=[taps, taps], pads=[taps // 2] * 4, group=groups)

    def product(self, width: int) -> None:
        """Append a product with a square matrix."""
        self.add("MatMul", self.matrix(width, width))

    def activation(self, operator: str) -> None:
        """Append an operation on single elements."""
        self.add(operator)

    def rectify(self) -> None:
        """Append a ReLU."""
        self.add("Relu")

    def payload(self) -> bytes:
        """Return the model; its output is the last value."""
        from onnx import TensorProto, helper, numpy_helper

        graph = helper.make_graph(
            self.nodes,
            "probe",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)],
            [helper.make_tensor_value_info(self.last, TensorProto.FLOAT, None)],
            [numpy_helper.from_array(value, name) for name, value in self.values.items()],
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)
        return made.SerializeToString()


class _Int8Chain(_Chain):
    """The same in the form that ONNX Runtime's quantiser makes (see ``kfe_fx.runtime.quantise``): u8s8, QDQ.

    Inputs and outputs are float32.
    """

    def convolution(self, inputs: int, outputs: int, taps: int, groups: int = 1) -> None:
        """Append a square convolution between 8-bit tensors."""
        self._start()
        super().convolution(inputs, outputs, taps, groups)
        self._quantise()

    def product(self, width: int) -> None:
        """Append a product of 8-bit matrices."""
        self._start()
        # no two alike: equal constants would share their memory
        stored = self._keep(np.full((width, width), 1 + len(self.values) % 100, dtype=np.int8))
        self.add("MatMul", self._dequantised(stored, width, 1))
        self._quantise()

    def activation(self, operator: str) -> None:
        """Append an operation that runs in float32."""
        super().activation(operator)
        self._quantise()

    def rectify(self) -> None:
        """Append nothing: the quantiser cuts at zero where it rounds."""

    def weights(self, *shape: int) -> str:
        """Add int8 weights, with a scale for each channel, that ONNX Runtime fills in when it folds constants."""
        from onnx import helper, numpy_helper

        name = f"w{len(self.values)}"
        value = np.asarray([1 + len(self.values) % 100], dtype=np.int8)
        size = self.constant(list(shape))
        self.nodes.append(helper.make_node("ConstantOfShape", [size], [name], value=numpy_helper.from_array(value)))
        return self._dequantised(name, shape[0], 0)

    def _dequantised(self, name: str, channels: int, axis: int) -> str:
        from onnx import helper

        scale = self._keep(np.full(channels, 0.01, dtype=np.float32))
        zero = self._keep(np.zeros(channels, dtype=np.int8))
        self.nodes.append(helper.make_node("DequantizeLinear", [name, scale, zero], [f"{name}f"], axis=axis))
        return f"{name}f"

    def _start(self) -> None:
        if self.last == "x":
            self._quantise()

    def _quantise(self) -> None:
        scale, zero = self._keep(np.asarray(0.05, dtype=np.float32)), self._keep(np.asarray(0, dtype=np.uint8))
        self.add("QuantizeLinear", scale, zero)
        self.add("DequantizeLinear", scale, zero)


_CHAINS: dict[str, type[_Chain]] = {"fp32": _Chain, "int8": _Int8Chain}


def _elements(chain: _Chain, probe: Probe) -> _Chain:
    for link in range(probe.links):
        chain.add("HardSigmoid" if link % 2 else "Abs")  # in turn, so that none cancels its neighbour
    return chain


def _convolutions(chain: _Chain, probe: Probe) -> _Chain:
    inputs = probe.shape[1]
    for _ in range(probe.links):
        chain.convolution(inputs, probe.width, probe.taps)
        inputs = probe.width
    return chain


def _depthwise(chain: _Chain, probe: Probe) -> _Chain:
    for _ in range(probe.links):
        chain.convolution(probe.width, probe.width, probe.taps, probe.width)
    return chain


def _reorders(chain: _Chain, probe: Probe) -> _Chain:
    for link in range(probe.links):
        if link:
            chain.activation("Abs")  # knows no blocked layout: out of it and back again
        chain.convolution(probe.width, probe.width, probe.taps, probe.width)
    return chain


def _rows(chain: _Chain, probe: Probe) -> _Chain:
    for _ in range(probe.links):
        chain.add("Add", chain.matrix(probe.width))
    return chain


def _transposes(chain: _Chain, probe: Probe) -> _Chain:
    size = chain.constant(list(probe.shape))
    for _ in range(probe.links):
        chain.add("Transpose", perm=[0, 2, 1, 3])
        chain.add("Reshape", size)  # neither cancels nor moves the transpose
    return chain


def _products(chain: _Chain, probe: Probe) -> _Chain:
    for _ in range(probe.links):
        chain.product(probe.width)
    return chain


def _lstm(chain: _Chain, probe: Probe) -> _Chain:
    gates, inputs = 4 * probe.width, probe.shape[2]
    weights, recurrence = chain.matrix(1, gates, inputs), chain.matrix(1, gates, probe.width)
    chain.add("LSTM", weights, recurrence, chain.matrix(1, 2 * gates), hidden_size=probe.width)
    return chain


_KINDS: dict[str, Callable[[_Chain, Probe], _Chain]] = {
    "elements": _elements,
    "conv": _convolutions,
    "depthwise": _depthwise,
    "reorder": _reorders,
    "rows": _rows,
    "transpose": _transposes,
    "gemm": _products,
    "lstm": _lstm,
}


def _stair(chain: _Chain, width: int) -> bytes:
    """Return 3 → width, depthwise, width → width, all 3x3 and followed by ReLU."""
    for inputs, groups in ((3, 1), (width, width), (width, 1)):
        chain.convolution(inputs, width, 3, groups)
        chain.rectify()
    return chain.payload()
