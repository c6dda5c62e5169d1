"""Curvature of recurrent layers against a loop over steps, one sequence at a time, whose rows autograd alone makes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import kfe_fx
from kfe_fx.curvature import Block, Store, find_blocks, fisher_rao_norm, fit
from kfe_fx.curvature.coverage import cover
from kfe_fx.optim import EKFAC, KFAC
from kfe_fx.program import Program, copy_graph, put_tensor
from kfe_fx.recurrent.op import CELLS, RECURRENT, Arguments
from tests.curvature.oracle import LOSS, assert_equal, check, measured, restored, square, summed, targets_of

N, T, WIDE, H, P = 3, 5, 3, 4, 2
LENGTHS = torch.tensor([2, 5, 3])
KINDS: dict[str, Any] = {
    "lstm": lambda **options: nn.LSTM(WIDE, H, **options),
    "projected": lambda **options: nn.LSTM(WIDE, H, proj_size=P, **options),
    "gru": lambda **options: nn.GRU(WIDE, H, **options),
    "rnn_tanh": lambda **options: nn.RNN(WIDE, H, **options),
    "rnn_relu": lambda **options: nn.RNN(WIDE, H, nonlinearity="relu", **options),
}


class Layer(nn.Module):
    """One recurrent layer, of whole sequences or packed ones, from given states or none."""

    def __init__(self, kind: str, *, packed: bool = False, **options: Any) -> None:
        super().__init__()
        self.layer = KINDS[kind](batch_first=True, **options)
        self.packed = packed
        self.double()

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        given = tuple(state.unsqueeze(0) for state in rest[self.packed :])
        hx = (given[0] if len(given) == 1 else given) if given else None
        if not self.packed:
            return self.layer(x, hx)[0]
        y, _ = self.layer(pack_padded_sequence(x, rest[0], batch_first=True, enforce_sorted=False), hx)
        return pad_packed_sequence(y, batch_first=True)[0]


@dataclass
class Rows:
    """What one sequence's loop meets at each step: inputs (ones appended where there is a bias) and products."""

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    products: dict[str, list[Tensor]] = field(default_factory=dict)

    def product(self, call: Arguments, side: str, value: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply by a weight, and keep both ends."""
        made = getattr(call, f"weight_{side}") @ value
        made = made if bias is None else made + bias
        row = value.detach() if bias is None else torch.cat([value.detach(), value.new_ones(1)])
        self.inputs.setdefault(side, []).append(row)
        self.products.setdefault(side, []).append(made)
        return made


def loop(call: Arguments, x: Tensor, h: Tensor | None, c: Tensor, length: int) -> tuple[Tensor, Rows]:
    """Run one sequence [T, I]; without a first state the hidden product of the first step has no row but a bias'."""
    rows, given = Rows(), h is not None
    h = x.new_zeros(call.weight_hh.shape[1]) if h is None else h
    outputs: list[Tensor] = [h] * len(x)
    steps = range(length - 1, -1, -1) if call.reverse else range(length)
    for count, t in enumerate(steps):
        p = rows.product(call, "ih", x[t], call.bias_ih if call.gamma_ih is None else None)
        p = normal(call, "ih", p, count)
        bias = call.bias_hh if call.gamma_hh is None else None
        if given or count or bias is not None:
            r = rows.product(call, "hh", h, bias)
        else:
            r = call.weight_hh.detach() @ h
        r = normal(call, "hh", r, count)
        if call.cell == "lstm":
            i, f, g, o = (p + r).chunk(4)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(normal(call, "c", c, count))
        elif call.cell == "gru":
            (pr, pz, pn), (rr, rz, rn) = p.chunk(3), r.chunk(3)
            n, z = torch.tanh(pn + torch.sigmoid(pr + rr) * rn), torch.sigmoid(pz + rz)
            h = (1 - z) * n + z * h
        else:
            h = (torch.tanh if call.cell == "rnn_tanh" else torch.relu)(p + r)
        if call.weight_hr is not None:
            h = rows.product(call, "hr", h, None)
        outputs[t] = h
    for t in range(length, len(x)):
        outputs[t] = torch.zeros_like(h)
    return torch.stack(outputs), rows


def normal(call: Arguments, side: str, value: Tensor, step: int) -> Tensor:
    """Normalise by the running row of a step and shift by the bias, where there is such a normalisation."""
    gamma = getattr(call, f"gamma_{side}")
    if gamma is None:
        return value
    mean, var = (getattr(call, f"{part}_{side}") for part in ("mean", "var"))
    row, bias = min(step, len(var) - 1), call.beta_c if side == "c" else getattr(call, f"bias_{side}")
    value = (value - mean[row]) / (var[row] + call.eps).sqrt() * gamma
    return value if bias is None else value + bias


@dataclass(frozen=True)
class Case:
    """A layer as a Program with data, and the truth: gradients and rows of every sequence, by side of the layer."""

    program: Program
    inputs: tuple[Tensor, ...]
    names: dict[str, str]
    truth: dict[str, Tensor]
    inside: dict[str, list[Tensor]]  # a [t, .] of each sequence
    behind: dict[str, list[Tensor]]  # g [t, .] of each sequence

    def block(self, side: str) -> Block:
        """The block of a weight."""
        return next(one for one in find_blocks(self.program).blocks if one.weight == self.names[f"weight_{side}"])


def case_of(program: Program, inputs: tuple[Tensor, ...], *, packed: bool, first: bool) -> Case:
    """Run the loop over every sequence of the one layer of a Program."""
    (node,) = program.graphs["eval"].find_nodes(op="call_function", target=RECURRENT)
    call = Arguments.of(node)
    names = {
        key: str(value.target) for key, value in vars(call).items() if getattr(value, "op", "") == "get_attr"
    }  # as the graph reads them
    held = {key: program.tensor(name) for key, name in names.items()}
    states = inputs[2 if packed else 1 :] if first else ()
    empty = dict.fromkeys(("input", "h0", "c0", "lengths"))
    call = replace(call, **held, **empty)
    parameters = {key: value for key, value in held.items() if isinstance(value, nn.Parameter)}
    truth: dict[str, list[Tensor]] = {}
    inside: dict[str, list[Tensor]] = {}
    behind: dict[str, list[Tensor]] = {}
    for n in range(N):
        h = states[0][n] if first else None
        c = states[1][n] if len(states) > 1 else torch.zeros(H, dtype=torch.float64)
        output, rows = loop(call, inputs[0][n], h, c, int(inputs[1][n]) if packed else T)
        value = square([output.unsqueeze(0)], targets_of(N)[n : n + 1]).sum()
        products = [product for side in rows.products.values() for product in side]
        found = torch.autograd.grad(value, [*parameters.values(), *products], materialize_grads=True)
        for key, grad in zip(parameters, found, strict=False):
            truth.setdefault(names[key], []).append(grad)
        rest = iter(found[len(parameters) :])
        for side in ("ih", "hh", "hr"):
            if side in rows.products or side == "hh":
                data = rows.inputs.get(side, [])
                inside.setdefault(side, []).append(torch.stack(data) if data else torch.zeros(0, 1))
        for side, made in rows.products.items():
            behind.setdefault(side, []).append(torch.stack([next(rest) for _ in made]))
    return Case(program, inputs, names, {key: torch.stack(value) for key, value in truth.items()}, inside, behind)


@lru_cache
def plain(kind: str, *, packed: bool = False, first: bool = False, bias: bool = True, reverse: bool = False) -> Case:
    """Make a case of a plain layer; ``reverse`` turns the one direction of it around."""
    generator = torch.Generator().manual_seed(len(kind))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = Layer(kind, packed=packed, bias=bias)
    x = torch.randn(N, T, WIDE, generator=generator, dtype=torch.float64)
    width = P if kind == "projected" else H
    sizes = ([width, H] if kind in ("lstm", "projected") else [width]) if first else []
    states = [torch.randn(N, size, generator=generator, dtype=torch.float64) for size in sizes]
    inputs: tuple[Any, ...] = (x, *([LENGTHS] if packed else []), *states)
    program = kfe_fx.capture(net, inputs)
    if reverse:
        for graph in program.graphs.values():
            for node in graph.find_nodes(op="call_function", target=RECURRENT):
                node.kwargs = {**node.kwargs, "reverse": True}
        program.module().recompile()
    return case_of(program, inputs, packed=packed, first=first)


def normalise(program: Program, sides: tuple[str, ...]) -> Program:
    """Batch-normalise the one layer of a Program in place, and give it a graph for training."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    graph = program.graphs["eval"]
    (node,) = graph.find_nodes(op="call_function", target=RECURRENT)
    call = Arguments.of(node)
    held: dict[str, Tensor] = {}
    for side in sides:
        size = H if side == "c" else CELLS[call.cell] * H
        held[f"gamma_{side}"] = nn.Parameter(draw(size) + 1)
        held |= {f"mean_{side}": 0.1 * draw(2, size), f"var_{side}": draw(2, size).square() + 0.3}
    if "c" in sides:
        held["beta_c"] = nn.Parameter(draw(H))
    for name, value in held.items():
        put_tensor(program.module(), f"layer.{name}", value)
    with graph.inserting_before(node):
        call = replace(call, **{name: graph.get_attr(f"layer.{name}") for name in held})
    node.args, node.kwargs = call.call()
    train = program.graphs["train"] = copy_graph(graph)
    (node,) = train.find_nodes(op="call_function", target=RECURRENT)
    node.kwargs = {**node.kwargs, "training": True}
    program.signature.outputs["train"] = program.signature.outputs["eval"]
    program.module().recompile()
    return program


# the statistics are those of the loop ---------------------------------------------------------------------------------

LAYERS = [
    *((kind, {}) for kind in KINDS),
    *((kind, {"packed": True, "first": True}) for kind in KINDS),
    ("lstm", {"packed": True, "reverse": True}),
    ("gru", {"first": True, "reverse": True}),
    ("projected", {"packed": True, "bias": False, "reverse": True}),
    ("gru", {"bias": False}),
]
layers = pytest.mark.parametrize(("kind", "options"), LAYERS)


def check_case(case: Case, kinds: dict[str, str]) -> None:
    """Compare D, S* and the factors of expand and reduce with the loop's gradients and rows."""
    blocks = find_blocks(case.program)
    assert not blocks.left_out
    assert {name: one.kind for one in blocks.blocks for name in one.parameters} == kinds
    assert all(all(one.batched.values()) for one in blocks.blocks)
    for sharing in ("expand", "reduce"):
        store = measured(case.program, case.inputs, targets_of(N), blocks=blocks, sharing=sharing)
        for block in blocks.blocks:
            rows = {name: case.truth[name] for name in block.parameters}
            made = torch.stack([block.matrix({name: rows[name][n] for name in rows}) for n in range(N)])
            held = store.blocks[block.name]
            assert_equal(held.D, made.square().mean(0), f"D of {block.name}")  # type: ignore[arg-type]
            if block.kind != "kronecker":
                continue
            turned = held.basis["U_G"].mT @ made @ held.basis["U_A"]
            assert held.S is not None
            assert_equal(held.S, turned.square().mean(0), f"S* of {block.name}")
            assert float(held.S.sum()) == pytest.approx(float(made.square().sum()) / N, rel=1e-10)
            check_factors(case, store, block, sharing)


def check_factors(case: Case, store: Store, block: Block, sharing: str) -> None:
    """expand: A = sum a a^T / rows, G = sum g g^T / N; reduce: of the mean of a and the sum of g of each sequence."""
    side = next(key for key, name in case.names.items() if name == block.weight).removeprefix("weight_")
    inside, behind = case.inside[side], case.behind[side]
    if sharing == "reduce":
        inside = [rows.mean(0, keepdim=True) for rows in inside if len(rows)]
        behind = [rows.sum(0, keepdim=True) for rows in behind]
    A, G = (sum(one.T @ one for one in rows) for rows in (inside, behind))
    held = store.blocks[block.name]
    assert isinstance(A, Tensor)
    assert isinstance(G, Tensor)
    assert held.counts["rows"] == (N if sharing == "reduce" else sum(map(len, inside)))
    assert_equal(held.A[0], A / held.counts["rows"], f"A of {block.name}")  # type: ignore[index]
    assert_equal(held.G[0], G / N, f"G of {block.name}")  # type: ignore[index]


@layers
def test_statistics_of_plain_layers(kind: str, options: dict[str, Any]) -> None:
    """Padding has no rows; the first step has one only where its bias or a given state does."""
    case = plain(kind, **options)
    check_case(case, dict.fromkeys(case.truth, "kronecker"))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sides", [("ih",), ("hh",), ("ih", "hh"), ("ih", "hh", "c")], ids="+".join)
def test_statistics_of_batch_normalised_layers(sides: tuple[str, ...], packed: bool) -> None:
    """The weights have factors, what normalisations scale and shift by a diagonal, and all of it is exact."""
    kind = "lstm" if "c" in sides or packed else "gru"
    made = plain(kind, packed=packed, first=packed)
    program = normalise(made.program.copy(), sides)
    case = case_of(program, made.inputs, packed=packed, first=packed)
    kinds = {name: "kronecker" if name.startswith("layer.weight") else "diagonal" for name in case.truth}
    joined = {f"layer.bias_{side}_l0" for side in ("ih", "hh") if side not in sides}
    check_case(case, kinds | dict.fromkeys(joined, "kronecker"))
    if "hh" in sides and not packed:
        assert len(case.inside["hh"][0]) == T - 1


@pytest.mark.parametrize("sides", [(), ("ih",), ("ih", "hh"), ("ih", "hh", "c")], ids="+".join)
def test_rows_of_a_training_batch_add_up_to_its_gradient(sides: tuple[str, ...]) -> None:
    """Batch norm couples the sequences: each row is the total derivative by that row."""
    made = plain("lstm", packed=True, first=True)
    program = normalise(made.program.copy(), sides)
    blocks = find_blocks(program)
    before = restored(program)
    found, truth = summed(program, blocks, list(made.inputs), "train")
    assert len(found) == len(blocks.blocks) == (2 if not sides else 2 + len(sides) * 2)
    for name, value in found.items():
        assert_equal(value, truth[name], name)
    moved = {name for name, value in before.items() if not torch.equal(value, program.tensor(name))}
    assert moved == {f"layer.{part}_{side}" for part in ("mean", "var") for side in sides}


# networks -------------------------------------------------------------------------------------------------------------


class Stacked(nn.Module):
    """Recurrent layers in ways that networks use them; ``how`` says which."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        if how == "both directions":
            self.layer: nn.Module = nn.LSTM(WIDE, H, num_layers=2, bidirectional=True, batch_first=True)
        else:
            self.layer = nn.GRU(WIDE, H, batch_first="time first" not in how)
        self.start = nn.Parameter(torch.randn(1, 1, H)) if how == "learned start" else None
        self.double()

    def forward(self, x: Tensor) -> Any:
        if self.how == "time first":
            return self.layer(x.transpose(0, 1))[0].transpose(0, 1)
        if self.how == "learned start":
            assert self.start is not None
            return self.layer(x, self.start.expand(1, x.shape[0], H))[0]
        if self.how == "folded":  # each example holds two sequences
            y, h = self.layer(x.reshape(-1, T // 2, WIDE))
            return y.reshape(x.shape[0], -1), h.reshape(x.shape[0], -1)
        if self.how == "twice":
            y, h = self.layer(x)
            return self.layer(x.flip(1), h)[0] + y
        if self.how == "last state":
            return self.layer(x)[1].transpose(0, 1)
        return self.layer(x)[0]


@pytest.mark.parametrize("how", ["both directions", "time first", "learned start", "folded", "twice", "last state"])
def test_statistics_of_networks(how: str) -> None:
    steps = T // 2 * 2 if how == "folded" else T
    x = torch.randn(N, steps, WIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Stacked(how)
    _, blocks, _ = check(net, x, N, {"x": {0: "batch"}})
    kinds = {block.weight: block.kind for block in blocks.blocks}
    assert kinds.pop("start", "diagonal") == "diagonal"
    assert set(kinds.values()) == {"kronecker"}
    assert not blocks.left_out


def test_coverage_lists_every_parameter_of_an_lstm() -> None:
    case = plain("projected", packed=True, first=True)
    coverage = cover(case.program)
    assert coverage.share == 1.0
    rows = {row.name: row for row in coverage.parameters}
    assert rows.keys() == dict(case.program.module().named_parameters()).keys()
    assert {row.status for row in rows.values()} == {"kronecker"}
    assert {name: block.positions for name, block in coverage.blocks.items()} == dict.fromkeys(coverage.blocks, T)
    assert coverage.blocks["layer.weight_hh_l0"].shape == (1, 4 * H, P + 1)
    assert all(block.pace() == "batched" for block in coverage.blocks.values())


def test_the_norm_of_fisher_and_rao_sees_recurrent_weights() -> None:
    case = plain("lstm", packed=True)
    truth = sum(
        (case.truth[name].flatten(1) * value.detach().flatten()).sum(1)
        for name, value in case.program.module().named_parameters()
    )
    found = fisher_rao_norm(case.program, [(case.inputs, targets_of(N))], LOSS, source="empirical")
    assert found.squared == pytest.approx(float(truth.square().mean()), rel=1e-9)  # type: ignore[union-attr]
    assert not found.missing


def test_every_source_measures_a_classifier() -> None:
    torch.manual_seed(0)
    program = classifier()
    x, y = sequences(12)
    traces = {}
    for source in ("empirical", "sampled", "exact"):
        store = fit(program, (x, y), source=source, batch_size=5, samples=3)
        assert all(block.S is not None for block in store.blocks.values())
        traces[source] = sum(float(block.S.sum()) for block in store.blocks.values() if block.S is not None)
    assert 0.3 < traces["sampled"] / traces["exact"] < 3


# training -------------------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(WIDE, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


def classifier() -> Program:
    torch.manual_seed(1)
    return kfe_fx.capture(Classifier().double(), (sequences(2)[0],))


def sequences(count: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, T, WIDE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return x, (x[:, :, 0].sum(1) > 0).long() + (x[:, -1, 1] > 0).long()


OPTIMIZERS = {
    "EKFAC": lambda program: EKFAC(program),
    "EKFAC reduce": lambda program: EKFAC(program, sharing="reduce"),
    "KFAC": lambda program: KFAC(program),
    "KFAC rnn1": lambda program: KFAC(program, sharing="rnn1", damping_kind="factored"),
    "KFAC rnn2": lambda program: KFAC(program, sharing="rnn2", damping_kind="factored"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_lower_the_loss_of_an_lstm(name: str) -> None:
    program = classifier().train()
    x, y = sequences(48)
    optimizer = OPTIMIZERS[name](program)
    assert not optimizer.left_out
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = F.cross_entropy(program.module()(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    optimizer.close()
    assert losses[-1] < 0.3 * losses[0]
    assert not optimizer.nonfinite


def test_a_step_of_ekfac_is_the_dense_one() -> None:
    """After the step (S* + eps)^{-1} in the eigenbasis of this batch, with S* = lam_G lam_A^T as at every new basis."""
    program = classifier().train()
    x, y = sequences(8)
    optimizer = EKFAC(program, lr=1.0, momentum=0.0, kl_clip=None, damping=0.1)
    store = fit(program, (x, y), statistics="kfac", source="empirical")
    before = restored(program)
    loss = F.cross_entropy(program.module()(x), y)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in program.module().named_parameters() if p.grad is not None}
    optimizer.step()
    eps = optimizer._eps * 0.1
    for block in optimizer.blocks:
        held = store.blocks[block.name]
        assert held.A is not None
        assert held.G is not None
        dense = torch.kron(held.G[0], held.A[0])
        dense = dense + eps * torch.eye(len(dense), dtype=dense.dtype)
        wanted = torch.linalg.solve(dense, block.matrix(grads).reshape(-1))
        moved = block.matrix({name: before[name] - program.tensor(name).detach() for name in block.parameters})
        assert_equal(moved.reshape(-1), wanted, block.name)
    optimizer.close()
