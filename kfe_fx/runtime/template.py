"""One export for many candidates: an ONNX model whose weights are replaced by those of a shrunk Program.

The exporter takes seconds, a loop that measures candidates would spend its time there. A candidate differs from its
source in weights, in the number of groups of a convolution and in the size of a recurrent layer; where nothing else
differs, filling its weights into the source's ONNX model gives the same model in milliseconds. Whether that was so is
checked by running it. The sizes that the model tells of its intermediate values decide what ONNX Runtime fuses (a sum
and a layer norm only where both operands have the same size, for one); so they are written anew, as a run shows them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import fx

from kfe_fx import taps
from kfe_fx.errors import KfeError
from kfe_fx.program import Program, argument, copy_graph, named_tensors
from kfe_fx.recurrent.norms import shared_rows
from kfe_fx.recurrent.op import RECURRENT, Arguments
from kfe_fx.runtime.inputs import draw_inputs, to_feeds
from kfe_fx.runtime.onnx_file import named_outputs, onnx_bytes
from kfe_fx.runtime.parity import TOLERANCE, compare_output
from kfe_fx.runtime.recurrent import lower_recurrent
from kfe_fx.runtime.recurrent_weights import Constants
from kfe_fx.runtime.session import make_session, run

aten = torch.ops.aten

# The dim of the weight that counts output channels; the seventh argument of all but linear is the number of groups.
_WEIGHTED: dict[Any, int] = {
    aten.linear.default: 0,
    aten.conv1d.default: 0,
    aten.conv1d.padding: 0,
    aten.conv2d.default: 0,
    aten.conv2d.padding: 0,
    aten.conv3d.default: 0,
    aten.conv3d.padding: 0,
    aten.conv_transpose1d.default: 1,
    aten.conv_transpose2d.input: 1,
    aten.conv_transpose3d.input: 1,
}


class Template:
    """The ONNX model of a Program, ready to take the weights of Programs shrunk from it."""

    def __init__(self, program: Program) -> None:
        """Export ``program`` once, with random weights so that each initializer shows where it comes from.

        Raises:
            UnsupportedModel: the graph has no ONNX form.
        """
        import onnx

        scrambled = _scrambled(program)
        self._model = onnx.load_from_string(onnx_bytes(scrambled, share=False))
        weights = {tensor.name for tensor in self._model.graph.initializer}  # they tell their sizes themselves
        self._told = [one for one in self._model.graph.value_info if one.name not in weights]
        del self._model.graph.value_info[:]
        self._sources = self._match(scrambled)

    def fill(self, program: Program) -> bytes | None:
        """Return the ONNX model of ``program``, or None where the graph needs an export of its own.

        The result has run on probe inputs at two batch sizes and agreed with the Program.
        """
        model = self._filled(program)
        if model is None or not self._tell_sizes(model, program):
            return None
        filled = model.SerializeToString(deterministic=True)
        return filled if _agrees(program, filled) else None

    def model(self, program: Program) -> bytes:
        """Return the ONNX model of ``program``: filled in where that is the same, else exported.

        Raises:
            UnsupportedModel: the graph has no ONNX form.
        """
        return self.fill(program) or onnx_bytes(program, share=False)

    def _match(self, program: Program) -> dict[str, str]:
        from onnx import numpy_helper

        candidates: dict[tuple[int, ...], list[tuple[str, np.ndarray]]] = {}
        for source, value in _values(program):
            candidates.setdefault(value.shape, []).append((source, value))
        made = _lowered(program).tensors
        found = {}
        for tensor in _initializers(self._model.graph):
            array = numpy_helper.to_array(tensor)
            if not np.issubdtype(array.dtype, np.floating):
                continue
            if tensor.name in made:  # written by lowering, which calls it alike at every width
                found[tensor.name] = tensor.name
                continue
            scale = float(np.abs(array).max(initial=0.0))
            for source, value in candidates.get(array.shape, []):
                if np.allclose(array, value, rtol=0, atol=1e-4 * scale) and array.size:
                    found[tensor.name] = source
                    break
        return found

    def _tell_sizes(self, model: Any, program: Program) -> bool:
        """Note the sizes of intermediate values in ``model``, those of the source with what a run of it finds."""
        import onnx

        probe = onnx.ModelProto()
        probe.CopyFrom(model)
        known = {output.name for output in model.graph.output}
        told = [one for one in self._told if one.name not in known and one.type.HasField("tensor_type")]
        for one in told:
            bare = probe.graph.output.add()
            bare.CopyFrom(one)
            bare.type.tensor_type.ClearField("shape")
        try:
            session = make_session(probe.SerializeToString(), optimization="none")
            arrays = run(session, to_feeds(program, draw_inputs(program)))
        except KfeError:
            return False
        for one, array in zip(told, arrays[len(arrays) - len(told) :], strict=True):
            written = model.graph.value_info.add()
            written.CopyFrom(one)
            for dim, size in zip(written.type.tensor_type.shape.dim, np.shape(array), strict=True):
                if dim.HasField("dim_value"):  # named axes stay as they are called
                    dim.dim_value = size
        return True

    def _filled(self, program: Program) -> Any:
        """Return the source's model with the weights of ``program``, None where they do not fit in."""
        import onnx
        from onnx import numpy_helper

        lowered = _lowered(program)
        values = dict(_values(program))
        values |= {name: one.cpu().numpy() for name, one in lowered.tensors.items() if one.dtype != torch.bfloat16}
        if not set(self._sources.values()) <= set(values):
            return None
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        for tensor in _initializers(model.graph):
            if tensor.name in self._sources:
                value = values[self._sources[tensor.name]]
                tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), tensor.name))
        groups = _groups(program)
        for node in model.graph.node:
            if node.op_type in ("LSTM", "GRU", "RNN"):
                recurrence = self._sources.get(node.input[2])
                if recurrence is None:
                    return None
                _set_attributes(node, values[recurrence].shape[2], lowered.scales.get(recurrence, []))
            if node.op_type not in ("Conv", "ConvTranspose"):
                continue
            weight = self._sources.get(node.input[1], "").partition("|")[0]
            for attribute in node.attribute:
                if attribute.name == "group" and weight in groups:
                    attribute.i = groups[weight]
                elif attribute.name == "kernel_shape" and weight not in groups:
                    return None
        for output in model.graph.output:
            output.type.tensor_type.ClearField("shape")  # its width may be another one
        return model


def _initializers(graph: Any) -> Iterator[Any]:
    """Yield the initializers of a graph and of the bodies in it."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _initializers(attribute.g)


def _set_attributes(node: Any, hidden: int, scales: list[float]) -> None:
    for attribute in node.attribute:
        if attribute.name == "hidden_size":
            attribute.i = hidden
        elif attribute.name == "activation_beta":
            attribute.floats[:] = scales


def _lowered(program: Program) -> Constants:
    """Return what lowering makes of the recurrent layers' tensors."""
    graph = copy_graph(program.graphs["eval"])
    taps.strip(graph)
    return lower_recurrent(graph, program)


def _scrambled(program: Program) -> Program:
    twin = program.copy()
    generator = torch.Generator().manual_seed(0)
    shared = _shared_statistics(twin)
    with torch.no_grad():
        for value in {id(value): value for value in named_tensors(twin.module()).values()}.values():
            if value.is_floating_point():
                # positive, since some are variances
                value.copy_(torch.rand(value.shape, generator=generator, dtype=torch.float64).add_(0.5))
                if id(value) in shared:
                    value.copy_(value[:1].expand_as(value))
    return twin


def _shared_statistics(program: Program) -> set[int]:
    """Return the running statistics of recurrent layers whose rows are equal: they fold away, and have to stay so."""
    held = set()
    for node in program.graphs["eval"].find_nodes(op="call_function", target=RECURRENT):
        call = Arguments.of(node)
        for table in (call.mean_ih, call.var_ih, call.mean_hh, call.var_hh, call.mean_c, call.var_c):
            if table is not None and table.op == "get_attr":
                value = program.tensor(str(table.target))
                if shared_rows(value):
                    held.add(id(value))
    return held


def _values(program: Program) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every array that an initializer may hold, under a name that outlives shrinking.

    ``name`` is a tensor of the Program, ``name|T`` its transpose, and ``name|bn`` and ``name|bias|bn`` the weight and
    bias that a layer has after the batch normalisation behind it was folded into it:
    W' = W·s, b' = (b - mean)·s + beta with s = gamma / sqrt(var + eps).
    """
    tensors = {
        name: value.detach().cpu().numpy()
        for name, value in named_tensors(program.module()).items()
        if value.is_floating_point() and value.dtype != torch.bfloat16
    }
    for node in program.graphs["eval"].find_nodes(op="call_function", target=aten.batch_norm.default):
        yield from _folded(node, tensors)
    for name, value in tensors.items():
        yield name, value
        if value.ndim == 2:
            yield f"{name}|T", value.T


def _folded(norm: fx.Node, tensors: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    layer = norm.args[0]
    if not isinstance(layer, fx.Node) or layer.target not in _WEIGHTED or len(norm.args) < 8:
        return
    gamma, beta, mean, variance = (_tensor(argument, tensors) for argument in norm.args[1:5])
    weight_node = layer.args[1]
    weight = _tensor(weight_node, tensors)
    bias = _tensor(layer.args[2], tensors) if len(layer.args) > 2 else None
    if weight is None or mean is None or variance is None or not isinstance(weight_node, fx.Node):
        return
    epsilon = float(norm.args[7])  # type: ignore[arg-type]
    scale = (1.0 if gamma is None else gamma.astype(np.float64)) / np.sqrt(variance.astype(np.float64) + epsilon)
    dim = _WEIGHTED[layer.target]
    if weight.shape[dim] != len(scale):
        return  # a grouped transposed convolution
    along = [1] * weight.ndim
    along[dim] = -1
    shift = (0.0 if bias is None else bias) - mean.astype(np.float64)
    yield f"{weight_node.target}|bn", (weight * scale.reshape(along)).astype(weight.dtype)
    yield f"{weight_node.target}|bias|bn", (shift * scale + (0.0 if beta is None else beta)).astype(weight.dtype)


def _tensor(argument: Any, tensors: dict[str, np.ndarray]) -> np.ndarray | None:
    return tensors.get(str(argument.target)) if isinstance(argument, fx.Node) and argument.op == "get_attr" else None


def _groups(program: Program) -> dict[str, int]:
    """Return the number of groups of each convolution by the name of its weight."""
    groups = {}
    for node in program.graphs["eval"].nodes:
        if node.op == "call_function" and node.target in _WEIGHTED and isinstance(node.args[1], fx.Node):
            groups[str(node.args[1].target)] = int(argument(node, 6, "groups", 1))
    return groups


def _agrees(program: Program, model: bytes) -> bool:
    leaves = named_outputs(program)
    try:
        session = make_session(model)
        pairs = []
        for seed, batch in enumerate((2, 3) if program.axes else (None, None)):
            flat = draw_inputs(program, batch, seed)
            with torch.no_grad():
                ours = program.module().run_flat(flat, "eval")
            pairs.append((ours, run(session, to_feeds(program, flat))))
    except KfeError:
        return False
    for place, (leaf, name) in enumerate(leaves):
        arrays = [(np.asarray(ours[leaf]), np.asarray(theirs[place])) for ours, theirs in pairs]
        if compare_output(name, arrays).error > TOLERANCE:
            return False
    return True
