"""The operation ``kfe_fx.recurrent``: one direction of one layer of an LSTM, GRU or RNN over a whole sequence.

It stands in graphs as one node that reads its weights by name, and computes with PyTorch's own kernels where they can
(``kfe_fx.recurrent.fused``), else step by step (``kfe_fx.recurrent.loop``). A layer of two directions is two nodes, a
stack of layers one node a layer and direction, so that each may have a width of its own.

torch.export would fix the length of the sequence to that of the example. While it traces, the twin operation
``kfe_fx.recurrent_layer`` stands for this one: the same arguments, and shapes that keep batch and length symbolic.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, fx

CELLS = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}  # and the number of gates
# single steps that a network calls by itself: (input, state or states, weight_ih, weight_hh, b_ih=None, b_hh=None)
CELL_OPS: dict[Any, str] = {
    torch.ops.aten.lstm_cell.default: "lstm",
    torch.ops.aten.gru_cell.default: "gru",
    torch.ops.aten.rnn_tanh_cell.default: "rnn_tanh",
    torch.ops.aten.rnn_relu_cell.default: "rnn_relu",
}

_ARGUMENTS = """(
    Tensor input, Tensor? h0, Tensor? c0, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih=None,
    Tensor? bias_hh=None, Tensor? weight_hr=None, Tensor? lengths=None, Tensor? gate=None, Tensor? cell_gate=None,
    Tensor? gamma_ih=None, Tensor? mean_ih=None, Tensor? var_ih=None,
    Tensor? gamma_hh=None, Tensor? mean_hh=None, Tensor? var_hh=None,
    Tensor? gamma_c=None, Tensor? beta_c=None, Tensor? mean_c=None, Tensor? var_c=None, Tensor? seen=None,
    *, str cell, bool reverse=False, bool batch_first=True,
    bool training=False, bool shared=False, float momentum=0.1, float eps=1e-5
) -> (Tensor, Tensor, Tensor)"""

_LIBRARY = torch.library.Library("kfe_fx", "FRAGMENT")
_LIBRARY.define("recurrent" + _ARGUMENTS)
_LIBRARY.define("recurrent_layer" + _ARGUMENTS)


@dataclass(frozen=True)
class Arguments:
    """What the operation takes, by name; tensors when it runs, nodes when a graph is read.

    With batch N, length T, input size I, hidden size H, projection P (= H without one) and g gates (4 i,f,g,o for an
    LSTM, 3 r,z,n for a GRU, 1 for an RNN):

    Attributes:
        input: [N, T, I], or [T, N, I] where not ``batch_first``.
        h0: [N, P] or None for zeros.
        c0: [N, H] or None; LSTM only.
        weight_ih: [g H, I].
        weight_hh: [g H, P].
        bias_ih: [g H] or None.
        bias_hh: [g H] or None.
        weight_hr: [P, H] or None: the projection of an LSTM.
        lengths: [N], 1 to T: how many steps of each sequence count; the rest is padding. None: all.
        gate: [N or 1, P], multiplies every h_t inside the recurrence; None for ones.
        cell_gate: [N or 1, H], multiplies what goes into the projection, inside the recurrence.
        gamma_ih: [g H]: batch normalisation of ``weight_ih x_t`` (without bias), which ``bias_ih`` then shifts.
        mean_ih: [rows, g H], running statistics; step t reads row min(t, rows - 1).
        var_ih: [rows, g H], biased.
        gamma_hh: as ``gamma_ih`` for ``weight_hh h_{t-1}``, shifted by ``bias_hh``; with it ``mean_hh``, ``var_hh``.
        gamma_c: [H], or [1] for one scale of all: batch normalisation of c_t on its way out; ``beta_c`` is None where
            there is one scale, which does not centre. With them ``mean_c`` (None there too) and ``var_c``, [rows, H or
            1].
        seen: [rows], how many batches each row of the statistics has seen: a step that some sequences do not reach
            counts as the share that do.
        cell: a key of ``CELLS``.
        reverse: run from the last step to the first.
        batch_first: see ``input``.
        training: normalise with the statistics of the batch and update the running ones.
        shared: statistics over all steps (one row) instead of one row a step.
        momentum: weight of the new statistics, as in PyTorch.
        eps: of all normalisations.
    """

    input: Any
    h0: Any
    c0: Any
    weight_ih: Any
    weight_hh: Any
    bias_ih: Any = None
    bias_hh: Any = None
    weight_hr: Any = None
    lengths: Any = None
    gate: Any = None
    cell_gate: Any = None
    gamma_ih: Any = None
    mean_ih: Any = None
    var_ih: Any = None
    gamma_hh: Any = None
    mean_hh: Any = None
    var_hh: Any = None
    gamma_c: Any = None
    beta_c: Any = None
    mean_c: Any = None
    var_c: Any = None
    seen: Any = None
    cell: str = "lstm"
    reverse: bool = False
    batch_first: bool = True
    training: bool = False
    shared: bool = False
    momentum: float = 0.1
    eps: float = 1e-5

    @classmethod
    def of(cls, node: fx.Node) -> Arguments:
        """Read the arguments of a node."""
        names = [field.name for field in fields(cls)]
        given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        return cls(**given)

    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return them as the operation takes them: tensors by position as far as they go, options by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        options = {name: values.pop(name) for name in _OPTIONS}
        defaults = {field.name: field.default for field in fields(self)}
        args = list(values.values())
        while args and args[-1] is None and len(args) > 5:
            args.pop()
        kept = {name: value for name, value in options.items() if name == "cell" or value != defaults[name]}
        return tuple(args), kept

    @property
    def normalised(self) -> bool:
        """Whether any batch normalisation is inside."""
        return any(gamma is not None for gamma in (self.gamma_ih, self.gamma_hh, self.gamma_c))

    @property
    def time_dim(self) -> int:
        """The dim of input and output that counts the steps."""
        return 1 if self.batch_first else 0


_OPTIONS = ("cell", "reverse", "batch_first", "training", "shared", "momentum", "eps")


def recurrent(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Run one direction of one layer; see ``Arguments``.

    Returns:
        Output [N, T, P] (or [T, N, P]), zero where there is padding; the last valid h [N, P]; the last c [N, H], or an
        empty tensor where the cell has none.

    Raises:
        UsageError: shapes that do not fit each other.
        BadData: lengths out of range, or too few sequences to normalise over.
    """
    from kfe_fx.recurrent.run import run  # it needs this module

    return run(Arguments(*args, **kwargs))


_LIBRARY.impl("recurrent", recurrent, "CompositeImplicitAutograd")
RECURRENT = torch.ops.kfe_fx.recurrent.default
OPAQUE = torch.ops.kfe_fx.recurrent_layer.default


def _shapes(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = Arguments(*args, **kwargs)
    value, hidden = call.input, call.weight_hh.shape[0] // CELLS[call.cell]
    width = call.weight_hh.shape[1]
    batch, length = value.shape[1 - call.time_dim], value.shape[call.time_dim]
    torch._check(value.shape[2] == call.weight_ih.shape[1])
    for state, size in ((call.h0, width), (call.c0, hidden)):
        if state is not None:
            torch._check(state.dim() == 2 and state.shape[0] == batch and state.shape[1] == size)
    if call.lengths is not None:
        torch._check(call.lengths.dim() == 1 and call.lengths.shape[0] == batch)
    output = value.new_empty((batch, length, width) if call.batch_first else (length, batch, width))
    c_n = value.new_empty((batch, hidden)) if call.cell == "lstm" else value.new_empty((0,))
    return output, value.new_empty((batch, width)), c_n


# it has no kernel: nothing but a trace calls it
torch.library.register_fake("kfe_fx::recurrent_layer", _shapes, lib=_LIBRARY)


def from_opaque(graph: fx.Graph) -> int:
    """Put the operation where its opaque twin stands in a traced graph, in place; return how many there were."""
    found = graph.find_nodes(op="call_function", target=OPAQUE)
    for node in found:
        node.target = RECURRENT
    return len(found)
