"""One ONNX Scan for a recurrence that no ONNX operator computes: a projection, or normalisation inside.

Hoisted before it: the input's product of all steps with its bias or its scales and shifts, the reversal of each
sequence inside its own length, and the rows that the steps read from the tables, min(t, rows - 1). The body has the
recurrent weights as its own. With x what comes from the input, and s, b rows of tables where something is normalised,

    a = s_h (W_hh h) + b_h
    LSTM: i, f, g, o = x + a        c' = sigm(f) c + sigm(i) tanh(g)        h' = W_hr (sigm(o) tanh(s_c c' + b_c))
    GRU: r, z = sigm(x + a)         n = tanh(x + r a)                       h' = n + z (h - n)
    RNN: h' = tanh(x + a) or relu(x + a)

Where a sequence has ended the states stay and the output is zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kfe_fx.runtime.recurrent_onnx import DOMAIN, PARTS, SCAN

if TYPE_CHECKING:
    from onnxscript import ir

_TABLES = ("h_scale", "h_shift", "c_scale", "c_shift")


def expand(model: ir.Model) -> int:
    """Write out every node that stands for a Scan, in place; return how many there were."""
    found = [node for node in model.graph if node.domain == DOMAIN and node.op_type == SCAN]
    for node in found:
        _Expansion(model, node).run()
    model.opset_imports.pop(DOMAIN, None)
    return len(found)


class _Writer:
    """Nodes with names of their own: a body must not repeat a name of the graph around it."""

    def __init__(self, prefix: str, dtype: ir.DataType, opset: int) -> None:
        from onnxscript import ir

        self.ir, self.prefix, self.dtype, self.opset = ir, prefix, dtype, opset
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []
        self.count = 0

    def name(self, label: str) -> str:
        self.count += 1
        return f"{self.prefix}_{label}_{self.count}"

    def __call__(self, kind: str, *inputs: ir.Value | None, outputs: int = 1, **attributes: Any) -> Any:
        ir = self.ir
        values = [ir.Value(name=self.name(kind.lower())) for _ in range(outputs)]
        given = ir.convenience.convert_attributes(attributes)
        self.nodes.append(ir.Node("", kind, inputs, attributes=given, outputs=values, name=self.name(f"node_{kind}")))
        return values[0] if outputs == 1 else values

    def split(self, value: ir.Value, parts: int) -> list[ir.Value]:
        if parts == 1:
            return [value]
        # equal parts were counted by the outputs before there was an attribute for it
        attributes = {"num_outputs": parts} if self.opset >= 18 else {}
        return list(self("Split", value, outputs=parts, axis=1, **attributes))

    def input(self, label: str, dtype: ir.DataType | None = None) -> ir.Value:
        return self.ir.Value(name=self.name(label), type=self.ir.TensorType(dtype or self.dtype))

    def constant(self, label: str, numbers: Any, dtype: ir.DataType | None = None) -> ir.Value:
        return self.adopt(self.name(label), self.ir.tensor(numbers, dtype=dtype or self.ir.DataType.INT64))

    def adopt(self, name: str, tensor: Any) -> ir.Value:
        ir = self.ir
        made = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.initializers.append(made)
        return made


class _Expansion:
    def __init__(self, model: ir.Model, node: ir.Node) -> None:
        self.graph, self.node = model.graph, node
        held = [*node.inputs, *[None] * (4 + len(PARTS) - len(node.inputs))]
        self.value, self.lengths, self.h0, self.c0 = held[:4]
        self.parts: dict[str, ir.Value] = {p: v for p, v in zip(PARTS, held[4:], strict=True) if v is not None}
        self.cell = node.attributes["cell"].as_string()
        self.reverse = bool(node.attributes["reverse"].as_int())
        dtype = self.parts["recurrence"].dtype
        assert dtype is not None
        prefix, opset = str(node.name), model.opset_imports[""]
        self.outer, self.inner = _Writer(prefix, dtype, opset), _Writer(f"{prefix}_step", dtype, opset)
        # before the Scan: what is scanned besides the products, by name, and the step that each place of it is
        self.clock: Any = None
        self.running: Any = None
        self.rows: dict[tuple[int, bool], Any] = {}

    def run(self) -> None:
        op, ir = self.outer, self.outer.ir
        products = self._products()
        states = [self._first(self.h0, "h_zero", products)]
        if self.cell == "lstm":
            states.append(self._first(self.c0, "c_zero", products))
        scanned, directions = [products], [int(self._backwards)]
        alive = None
        if self.lengths is not None:
            clock = op("Reshape", self._clock(), op.constant("column", [-1, 1, 1]))
            ends = op("Reshape", self.lengths, op.constant("row", [-1, 1]))
            scanned.append(op("Less", clock, ends))  # [T, N, 1]
            directions.append(0)
        inputs = [self.inner.input("h"), *([self.inner.input("c")] if self.cell == "lstm" else [])]
        step = self.inner.input("x")
        carried = [*inputs, step]
        if self.lengths is not None:
            alive = self.inner.input("alive", ir.DataType.BOOL)
            carried.append(alive)
        tables = {}
        for name in _TABLES:
            if name not in self.parts:
                continue
            if self._row_count(name) == 1:
                tables[name] = self._own(name)
                continue
            scanned.append(op("Gather", self.parts[name], self._row(name, products=False), axis=0))  # [T, 1, ...]
            directions.append(0)
            tables[name] = self.inner.input(name)
            carried.append(tables[name])
        outputs = self._body(inputs, step, alive, tables)
        body = ir.Graph(
            carried,
            outputs,
            nodes=self.inner.nodes,
            initializers=self.inner.initializers,
            opset_imports=self.graph.opset_imports,
            name=f"{self.inner.prefix}s",
        )
        found = op(
            "Scan",
            *states,
            *scanned,
            outputs=len(outputs),
            body=body,
            num_scan_inputs=len(scanned),
            scan_input_directions=directions,
            scan_output_directions=[int(self._backwards)],
        )
        output = found[-1]
        if self.reverse and self.lengths is not None:
            output = op("ReverseSequence", output, self.lengths, batch_axis=1, time_axis=0)
        self._replace([output, *found[:-1]])

    @property
    def _backwards(self) -> bool:
        return self.reverse and self.lengths is None

    def _replace(self, made: list[ir.Value]) -> None:
        node, ir = self.node, self.outer.ir
        for value in self.outer.initializers:
            self.graph.register_initializer(value)
        ir.convenience.replace_nodes_and_values(
            self.graph, node, [node], self.outer.nodes, list(node.outputs[: len(made)]), made
        )
        for value in self.parts.values():
            if not value.uses() and not value.is_graph_output():
                self.graph.initializers.pop(str(value.name), None)

    # before the Scan -------------------------------------------------------------------------------------------------

    def _products(self) -> ir.Value:
        """Return what every step gets from the input, [T, N, g H]."""
        op, value = self.outer, self.value
        if self.reverse and self.lengths is not None:
            value = op("ReverseSequence", value, self.lengths, batch_axis=1, time_axis=0)
        value = op("MatMul", value, self.parts["weight"])
        for name, kind in (("x_scale", "Mul"), ("x_shift", "Add")):
            if name in self.parts:
                table = self.parts[name]
                if self._row_count(name) > 1:
                    table = op("Gather", table, self._row(name, products=True), axis=0)
                value = op(kind, value, table)
        return op("Add", value, self.parts["bias"]) if "bias" in self.parts else value

    def _first(self, given: ir.Value | None, zero: str, products: ir.Value) -> ir.Value:
        if given is not None:
            return given
        op = self.outer
        batch = op("Shape", products, start=1, end=2)
        return op("Expand", self.parts[zero], op("Concat", batch, op.constant("one", [1]), axis=0))

    def _row_count(self, name: str) -> int:
        shape = self.parts[name].shape
        assert shape is not None
        return int(shape[0]) if len(shape) == 3 else 1  # type: ignore[arg-type]

    def _row(self, name: str, *, products: bool) -> ir.Value:
        """Return min(t, rows - 1) of all steps; the products of a layer that runs backwards lie the other way."""
        key = self._row_count(name), products and self._backwards
        if key not in self.rows:
            op = self.outer
            step = self._clock()
            if key[1]:
                last = op("Sub", self._steps(), op.constant("one", 1))
                step = op("Sub", last, step)
            self.rows[key] = op("Min", step, op.constant("last_row", key[0] - 1))
        return self.rows[key]

    def _steps(self) -> ir.Value:
        op = self.outer
        if self.running is None:
            self.running = op("Squeeze", op("Shape", self.value, start=0, end=1))
        return self.running

    def _clock(self) -> ir.Value:
        op = self.outer
        if self.clock is None:
            self.clock = op("Range", op.constant("zero", 0), self._steps(), op.constant("one", 1))
        return self.clock

    # one step --------------------------------------------------------------------------------------------------------

    def _own(self, name: str) -> ir.Value:
        value = self.parts[name]
        assert value.const_value is not None
        return self.inner.adopt(str(value.name), value.const_value)

    def _body(
        self, states: list[ir.Value], x: ir.Value, alive: ir.Value | None, tables: dict[str, ir.Value]
    ) -> list[ir.Value]:
        op, h = self.inner, states[0]
        side = op("MatMul", h, self._own("recurrence"))
        for name, kind in (("h_scale", "Mul"), ("h_shift", "Add")):
            if name in tables:
                side = op(kind, side, tables[name])
        after = []
        if self.cell == "lstm":
            i, f, g, o = op.split(op("Add", x, side), 4)
            kept = op("Mul", op("Sigmoid", f), states[1])
            c = op("Add", kept, op("Mul", op("Sigmoid", i), op("Tanh", g)))
            shown = c
            for name, kind in (("c_scale", "Mul"), ("c_shift", "Add")):
                if name in tables:
                    shown = op(kind, shown, tables[name])
            new = op("Mul", op("Sigmoid", o), op("Tanh", shown))
            after.append(c)
        elif self.cell == "gru":
            (xr, xz, xn), (ar, az, an) = op.split(x, 3), op.split(side, 3)
            r, z = op("Sigmoid", op("Add", xr, ar)), op("Sigmoid", op("Add", xz, az))
            n = op("Tanh", op("Add", xn, op("Mul", r, an)))
            new = op("Add", n, op("Mul", z, op("Sub", h, n)))
        else:
            new = op("Tanh" if self.cell == "rnn_tanh" else "Relu", op("Add", x, side))
        if "projection" in self.parts:
            new = op("MatMul", new, self._own("projection"))
        after = [new, *after]
        if alive is None:
            return [*after, op("Identity", new)]
        zero = op.constant("zero", 0.0, op.dtype)
        shown = op("Where", alive, new, zero)
        return [*(op("Where", alive, one, old) for one, old in zip(after, states, strict=True)), shown]
