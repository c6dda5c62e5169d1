"""Tied weights in an ONNX model: what the exporter transposed ahead of time is not stored a second time."""

from __future__ import annotations

from typing import Any

import numpy as np


def share_transposes(model: Any) -> int:
    """Replace every matrix that is the transpose of another one by a ``Transpose`` of that, and count them.

    The exporter folds the transpose of a matrix product's weight into a new initializer. Where the same weight is read
    elsewhere as it is (an embedding tied to the output layer), the model would hold both. ONNX Runtime folds the
    transpose again when it loads the model, so that nothing is computed more.

    Args:
        model: an ``onnx_ir.Model``, changed in place.
    """
    import onnx_ir as ir

    graph, shared = model.graph, 0
    stored: dict[tuple[Any, int, int], list[Any]] = {}
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or len(tensor.shape) != 2 or tensor.size < 2:
            continue
        rows, columns = (int(size) for size in tensor.shape)
        array = tensor.numpy()
        partner = next(
            (
                other
                for other in stored.get((tensor.dtype, columns, rows), [])
                if np.array_equal(other.const_value.numpy().T, array)
            ),
            None,
        )
        if partner is None:
            stored.setdefault((tensor.dtype, rows, columns), []).append(value)
            continue
        made = ir.Value(name=f"{partner.name}_transposed_{shared}", shape=value.shape, type=value.type)
        node = ir.Node("", "Transpose", [partner], [ir.AttrInt64s("perm", [1, 0])], outputs=[made])
        graph.insert_before(graph[0], node)
        value.replace_all_uses_with(made)
        del graph.initializers[value.name]
        shared += 1
    return shared


def fold_transposes(model: Any) -> None:
    """Store what ``share_transposes`` shares twice again, in an ``onnx.ModelProto``, in place.

    A quantiser takes the second operand of a product for a weight only where it is an initializer.
    """
    from onnx import numpy_helper

    graph = model.graph
    held = {tensor.name: tensor for tensor in graph.initializer}
    for node in [one for one in graph.node if one.op_type == "Transpose" and one.input[0] in held]:
        order = next((list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"), None)
        turned = np.ascontiguousarray(numpy_helper.to_array(held[node.input[0]]).transpose(order))
        graph.initializer.append(numpy_helper.from_array(turned, node.output[0]))
        graph.node.remove(node)
