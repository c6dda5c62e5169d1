"""Recurrent layers opened for taps: one node becomes ordinary products, whose pairs of rows the taps see.

The node ``output, h_n, c_n = recurrent(x, ...)`` becomes, in place (H the states before each step, M what goes into a
projection, ``sg`` without gradient):

    P = recurrent_product(x, W_ih, b_ih)
    H, M = sg(recurrent_states(x, ...))
    R = recurrent_product(H, W_hh, b_hh)
    Q = recurrent_product(M, W_hr)
    output, h_n, c_n = recurrent_opened(P, R, Q, ..., sg(W_hh), sg(b_hh), sg(W_hr), ...)

whose steps run with the constants W_hh, b_hh and W_hr, and add the zeros R_t - sg(R_t) and Q_t - sg(Q_t): the values
are those of the layer, the gradient by the earlier states comes through the constants, and the gradients of the
weights, dL/dW_hh = sum_t (dL/dR_t) H_t^T, through R and Q alone. What batch normalisation scales and shifts by goes in
once per example (``recurrent_rows``), so that the gradient by it is each example's own.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from kfe_fx.recurrent.loop import Opened, run_loop
from kfe_fx.recurrent.op import CELLS, RECURRENT, Arguments, recurrent
from kfe_fx.recurrent.run import check, initial
from kfe_fx.recurrent.sequences import Order, arrange

_FIRST, _, _REST = str(RECURRENT._schema).partition("(")[2].rpartition(" -> ")[0].partition("Tensor? h0")
_WEIGHT = "Tensor weight_ih, "

_LIBRARY = torch.library.Library("kfe_fx", "FRAGMENT")
_LIBRARY.define(f"recurrent_states({_FIRST}Tensor? h0{_REST} -> (Tensor, Tensor)")
_LIBRARY.define(
    "recurrent_opened(Tensor products, Tensor hidden, Tensor? projected, Tensor? h0"
    f"{_REST.replace(_WEIGHT, '')} -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "recurrent_product(Tensor input, Tensor weight, Tensor? bias=None, Tensor? lengths=None, *, "
    "bool reverse=False, bool batch_first=True, bool from_zero=False) -> Tensor"
)
_LIBRARY.define("recurrent_rows(Tensor value, Tensor input, *, bool batch_first=True) -> Tensor")

STATISTICS = ("mean_ih", "var_ih", "mean_hh", "var_hh", "mean_c", "var_c", "seen")


def recurrent_states(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Run a layer without gradients and return what goes into its recurrent products; see ``Arguments``.

    Running statistics stay as they are.

    Returns:
        The states before each step [N, T, P] (or [T, N, P]), and what goes into the projection at each step
        [N, T, H], empty where there is none.
    """
    call = Arguments(*args, **kwargs)
    with torch.no_grad():
        apart = {name: value.clone() for name in STATISTICS if (value := getattr(call, name)) is not None}
        call = replace(call, **apart)
        if call.weight_hr is None:
            given, options = call.call()
            output = recurrent(*given, **options)[0]
            return _before(call, output), output.new_empty(0)
        check(call)
        value, order = _arranged(call, call.input)
        kept: list[Tensor] = []
        output, _, _ = run_loop(call, value, order, _states(call, value, order), cells_out=kept)
        whole = torch.stack([F.pad(each, (0, 0, 0, value.shape[1] - len(each))) for each in kept])
        cells = F.pad(whole, (0, 0, 0, 0, 0, len(value) - len(whole)))
        return _before(call, _returned(call, output, order)), _returned(call, cells, order)


def _arranged(call: Arguments, value: Tensor) -> tuple[Tensor, Order]:
    """Bring [N, T, .] as they come into the order of the recurrence, [T, N, .]."""
    value = value.transpose(0, 1) if call.batch_first else value
    return arrange(value, call.lengths, reverse=call.reverse)


def _returned(call: Arguments, value: Tensor, order: Order) -> Tensor:
    """Undo ``_arranged``."""
    value = order.steps_back(value)
    return value.transpose(0, 1) if call.batch_first else value


def _states(call: Arguments, value: Tensor, order: Order) -> tuple[Tensor, Tensor | None]:
    h0, c0 = (order.rows(state) for state in initial(call, value))
    assert h0 is not None
    return h0, c0


def _before(call: Arguments, output: Tensor) -> Tensor:
    """Shift outputs by a step, [N, T, P] as they come, the first state in front."""
    dim = call.time_dim
    steps = output.shape[dim]
    first = torch.zeros_like(output.select(dim, 0)) if call.h0 is None else call.h0
    if not call.reverse:
        return torch.cat([first.unsqueeze(dim), output.narrow(dim, 0, steps - 1)], dim)
    before = torch.cat([output.narrow(dim, 1, steps - 1), first.unsqueeze(dim)], dim)
    if call.lengths is None or call.h0 is None:
        return before  # after the end of a sequence there are zeros
    last = (call.lengths.to(output.device) - 1).view((-1, 1, 1) if call.batch_first else (1, -1, 1))
    return before.scatter(dim, last.expand_as(first.unsqueeze(dim)), first.unsqueeze(dim))


def recurrent_opened(
    products: Tensor,
    hidden: Tensor,
    projected: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a layer on products from outside.

    Args:
        products: W_ih x + b_ih [N, T, g H] (or [T, N, g H]); without b_ih where they are normalised.
        hidden: W_hh h_{t-1} + b_hh of the states that the layer will have [N, T, g H]: its gradient counts alone.
        projected: W_hr m_t [N, T, P] likewise, or None.
        h0: see ``Arguments``, as what follows, from ``weight_hh`` on.
        c0: see ``Arguments``.
        args: further tensors; ``bias_ih`` is what is added to ``products``; what normalises, and the biases, may be one
            row per example, [N, g H].
        kwargs: options.

    Returns:
        What the operation ``recurrent`` does.
    """
    call = Arguments(products, h0, c0, None, *args, **kwargs)
    opened, zeros = None, hidden - hidden.detach()
    if call.cell != "gru" and call.gamma_ih is None and call.gamma_hh is None and projected is None:
        value, order = _arranged(call, products + zeros)  # both sides meet in a sum
    else:
        value, order = _arranged(call, products)
        more = None if projected is None else _arranged(call, projected - projected.detach())[0]
        opened = Opened(_arranged(call, zeros)[0], more)
    output, h_n, c_n = run_loop(call, value, order, _states(call, value, order), opened=opened, products=True)
    last = value.new_empty(0) if c_n is None else order.rows_back(c_n)
    return _returned(call, output, order), order.rows_back(h_n), last


def recurrent_product(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    reverse: bool = False,
    batch_first: bool = True,
    from_zero: bool = False,
) -> Tensor:
    """Return ``input weight^T + bias`` of all steps; the other arguments say which of them count.

    Args:
        input: [N, T, i], or [T, N, i] where not ``batch_first``.
        weight: [o, i].
        bias: [o] or None.
        lengths: [N], how many steps of each sequence are no padding.
        reverse: whether the last step is the first to run.
        batch_first: see ``input``.
        from_zero: whether the input of the first step is zero, so that there is nothing to learn from it.
    """
    return F.linear(input, weight, bias)


def recurrent_rows(value: Tensor, input: Tensor, *, batch_first: bool = True) -> Tensor:
    """Return ``value`` once for each sequence of ``input``, [N, *value.shape]."""
    return value.expand(input.shape[0 if batch_first else 1], *value.shape)


for _function in (recurrent_states, recurrent_opened, recurrent_product, recurrent_rows):
    _LIBRARY.impl(_function.__name__, _function, "CompositeImplicitAutograd")
STATES = torch.ops.kfe_fx.recurrent_states.default
OPENED = torch.ops.kfe_fx.recurrent_opened.default
PRODUCT = torch.ops.kfe_fx.recurrent_product.default
ROWS = torch.ops.kfe_fx.recurrent_rows.default


# shapes ---------------------------------------------------------------------------------------------------------------


def states_shapes(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Return empty tensors in the shapes of what ``recurrent_states`` returns."""
    call = Arguments(*args, **kwargs)
    width, hidden = call.weight_hh.shape[1], call.weight_hh.shape[0] // CELLS[call.cell]
    sides = tuple(call.input.shape[:2])
    cells = (0,) if call.weight_hr is None else (*sides, hidden)
    return call.input.new_empty((*sides, width)), call.input.new_empty(cells)


def opened_shapes(
    products: Tensor, hidden: Tensor, projected: Tensor | None, h0: Any, c0: Any, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty tensors in the shapes of what ``recurrent_opened`` returns."""
    call = Arguments(products, h0, c0, None, *args, **kwargs)
    width, size = call.weight_hh.shape[1], call.weight_hh.shape[0] // CELLS[call.cell]
    batch = products.shape[1 - call.time_dim]
    c_n = (batch, size) if call.cell == "lstm" else (0,)
    made = ((*products.shape[:2], width), (batch, width), c_n)
    output, h_n, c_n = (products.new_empty(shape) for shape in made)
    return output, h_n, c_n


# graphs ---------------------------------------------------------------------------------------------------------------


def open_layers(graph: fx.Graph, wanted: Collection[str] | None = None) -> int:
    """Open the recurrent layers of a graph, in place; return how many.

    A node keeps its name and place; what stands before it is named after it.

    Args:
        graph: one graph of a Program.
        wanted: names of nodes: layers are opened that get one of these, or where it is None, all.
    """
    count = 0
    for node in list(graph.find_nodes(op="call_function", target=RECURRENT)):
        parts = _open(graph, node)
        if wanted is None or any(part.name in wanted for part in (*parts, node, *node.users)):
            count += 1
        else:
            _close(graph, node)
    graph.lint()
    return count


def _open(graph: fx.Graph, node: fx.Node) -> list[fx.Node]:
    """Open one layer; return the nodes that now stand before it."""
    call = Arguments.of(node)
    parts: list[fx.Node] = []
    known = {"reverse": call.reverse, "batch_first": call.batch_first}

    def made(part: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
        found = graph.call_function(target, args, kwargs, name=f"{node.name}_{part}")
        found.meta = dict(node.meta)
        parts.append(found)
        return found

    def constant(value: fx.Node | None, part: str) -> fx.Node | None:
        return None if value is None else made(part, torch.ops.aten.detach.default, (value,))

    def rows(part: str) -> fx.Node | None:
        value = getattr(call, part)
        options = {"batch_first": call.batch_first}
        return None if value is None else made(part, ROWS, (value, call.input), options)

    with graph.inserting_before(node):
        states = made("states", STATES, node.args, dict(node.kwargs))
        shift = call.bias_ih if call.gamma_ih is None else None
        products = made("inputs", PRODUCT, (call.input, call.weight_ih, shift, call.lengths), known)
        before = made("before", operator.getitem, (states, 0))
        shift = call.bias_hh if call.gamma_hh is None else None
        from_zero = call.h0 is None and shift is None
        args = (before, call.weight_hh, shift, call.lengths)
        hidden = made("hidden", PRODUCT, args, {**known, "from_zero": from_zero})
        projected = None
        if call.weight_hr is not None:
            cells = made("cells", operator.getitem, (states, 1))
            projected = made("projected", PRODUCT, (cells, call.weight_hr, None, call.lengths), known)
        opened = replace(
            call,
            weight_hh=constant(call.weight_hh, "weight_hh"),
            weight_hr=constant(call.weight_hr, "weight_hr"),
            bias_ih=None if call.gamma_ih is None else rows("bias_ih"),
            bias_hh=constant(call.bias_hh, "bias_hh") if call.gamma_hh is None else rows("bias_hh"),
            **{part: rows(part) for part in ("gamma_ih", "gamma_hh", "gamma_c", "beta_c")},
        )
        (_, h0, c0, _, *rest), options = opened.call()
    node.target = OPENED
    node.args, node.kwargs = (products, hidden, projected, h0, c0, *rest), options
    return parts


def close_layers(graph: fx.Graph) -> int:
    """Undo ``open_layers``, in place; return how many layers were closed. Taps on what stands before go first."""
    found = list(graph.find_nodes(op="call_function", target=OPENED))
    for node in found:
        _close(graph, node)
    return len(found)


def _close(graph: fx.Graph, node: fx.Node) -> None:
    parts = [arg for arg in node.all_input_nodes if arg.target in (PRODUCT, ROWS, torch.ops.aten.detach.default)]
    held = [part.args[0] for part in parts if part.target is PRODUCT]
    picked = [one for one in held if isinstance(one, fx.Node) and one.target is operator.getitem]
    sources = [source for one in picked if isinstance(source := one.args[0], fx.Node)]
    states = next(source for source in sources if source.target is STATES)
    node.target = RECURRENT
    node.args, node.kwargs = states.args, dict(states.kwargs)
    for part in dict.fromkeys([*parts, *picked, states]):
        if not part.users:  # what the network reads itself stays
            graph.erase_node(part)


def is_opened(graph: fx.Graph) -> bool:
    """Tell whether a graph has opened layers."""
    return bool(graph.find_nodes(op="call_function", target=OPENED))
