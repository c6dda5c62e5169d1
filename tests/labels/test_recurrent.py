"""Hidden units of recurrent layers: what goes with each, and that removing them is masking inside the recurrence."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from kfe_fx.format import load, save
from kfe_fx.frontend.capture import capture
from kfe_fx.gates import gated, strip
from kfe_fx.labels.analysis import Analysis, analyze
from kfe_fx.labels.oracle import run_masked
from kfe_fx.labels.states import find_states, narrow_input, permit, resizable, resized, widths
from kfe_fx.passes.apply import apply
from kfe_fx.passes.batchnorm_recurrent import BatchnormRecurrent
from kfe_fx.passes.proof import masked_error
from kfe_fx.passes.prune import prune
from kfe_fx.passes.shrink import Shrink
from kfe_fx.plan import Plan
from kfe_fx.program import Program, graph_text
from tests.labels.removals import some

LAYERS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
GATES = {"lstm": 4, "gru": 3, "rnn": 1}


class Net(nn.Module):
    """A stack between two linear layers, read in one of several ways."""

    def __init__(self, kind: str, head: str, **options: Any) -> None:
        super().__init__()
        self.before = nn.Linear(3, 5)
        self.layer = LAYERS[kind](5, 6, batch_first=True, **options)
        width = (self.layer.proj_size or 6) * (2 if self.layer.bidirectional else 1)
        self.query, self.after = nn.Linear(width, width), nn.Linear(width, 4)
        self.reading = head

    def forward(self, x: Tensor) -> Tensor:
        steps, states = self.layer(torch.tanh(self.before(x)))
        last = states[0] if isinstance(states, tuple) else states
        if self.reading == "mean":
            read = steps.mean(1)
        elif self.reading == "state":
            read = torch.cat([last[-2], last[-1]], 1) if self.layer.bidirectional else last[-1]
        elif self.reading == "attention":
            weights = torch.softmax((self.query(steps) * steps).sum(-1), 1)
            read = (weights.unsqueeze(-1) * steps).sum(1)
        else:
            read = steps[:, -1]
        return self.after(read)


def net_of(kind: str, head: str = "last", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return Net(kind, head, **options).double().eval()


@pytest.mark.parametrize("kind", sorted(LAYERS))
def test_a_hidden_unit_is_its_gate_rows_its_column_and_what_reads_it(kind: str) -> None:
    analysis = analyze(capture(net_of(kind, num_layers=2), torch.randn(2, 5, 3).double()))
    rows = lambda k: tuple(k + 6 * gate for gate in range(GATES[kind]))
    for k in range(6):
        first: dict[str, Any] = {f"layer.{name}_l0": {0: rows(k)} for name in ("weight_ih", "bias_ih", "bias_hh")}
        first |= {"layer.weight_hh_l0": {0: rows(k), 1: (k,)}, "layer.weight_ih_l1": {1: (k,)}}
        second: dict[str, Any] = {f"layer.{name}_l1": {0: rows(k)} for name in ("weight_ih", "bias_ih", "bias_hh")}
        second |= {"layer.weight_hh_l1": {0: rows(k), 1: (k,)}, "after.weight": {1: (k,)}}
        slices = [unit.slices for unit in analysis.units]
        assert first in slices
        assert second in slices
    assert {unit.slices["before.weight"][0] for unit in analysis.units if "before.weight" in unit.slices} == {
        (k,) for k in range(5)
    }
    assert len(analysis.units) == 5 + 6 + 6


def test_directions_and_projections_have_units_of_their_own() -> None:
    net = net_of("lstm", bidirectional=True, proj_size=3)
    analysis = analyze(capture(net, torch.randn(2, 5, 3).double()))
    assert sorted(len(group.units) for group in analysis.groups) == [3, 3, 5, 6, 6]
    cell = next(unit for unit in analysis.units if unit.slices.get("layer.weight_hr_l0", {}).get(1) == (2,))
    assert cell.slices["layer.weight_ih_l0"] == {0: (2, 8, 14, 20)}
    assert cell.slices["layer.weight_hh_l0"] == {0: (2, 8, 14, 20)}
    out = next(unit for unit in analysis.units if unit.slices.get("layer.weight_hr_l0_reverse", {}).get(0) == (1,))
    assert out.slices == {
        "layer.weight_hr_l0_reverse": {0: (1,)},
        "layer.weight_hh_l0_reverse": {1: (1,)},
        "after.weight": {1: (3 + 1,)},
    }


def zeroed(net: nn.Module, analysis: Analysis, removed: frozenset[int]) -> nn.Module:
    """Return a copy of the source whose removed units have no rows and no biases: their h stays zero at every step."""
    twin = copy.deepcopy(net)
    tensors = dict(twin.named_parameters())
    with torch.no_grad():
        for unit in removed:
            for name, dims in analysis.units[unit].slices.items():
                rows = list(dims.get(0, ()))
                if rows:
                    tensors[name][rows] = 0.0
    return twin


@given(
    kind=st.sampled_from(sorted(LAYERS)),
    layers=st.integers(1, 3),
    both=st.booleans(),
    proj=st.sampled_from([0, 3]),
    head=st.sampled_from(["last", "mean", "state", "attention"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25)
def test_shrunk_is_the_source_with_silent_units(
    kind: str, layers: int, both: bool, proj: int, head: str, seed: int
) -> None:
    options: dict[str, Any] = {"num_layers": layers, "bidirectional": both}
    net = net_of(kind, head, **options, **({"proj_size": proj} if proj and kind == "lstm" else {}))
    program = capture(net, torch.randn(2, 5, 3).double())
    analysis = analyze(program)
    removed = some(analysis, seed)
    small = Shrink(Plan.of_units(analysis, removed)).run(program).program
    assert len(removed) > layers
    error, _ = masked_error(analysis, small, removed, seed)
    assert error <= 1e-12
    x = torch.randn(3, 8, 3).double()
    with torch.no_grad():  # an oracle that uses nothing of kfe-fx but the list of rows
        assert float((zeroed(net, analysis, removed)(x) - small(x)).abs().max()) <= 1e-12


NORMS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {"mode": "input", "statistics": "step"}) for kind in sorted(LAYERS)),
    *((kind, {"mode": "full"}) for kind in sorted(LAYERS)),
    ("lstm", {"mode": "full", "cell_norm": "channel"}),
    ("lstm", {"mode": "full", "cell_norm": "scalar", "statistics": "shared"}),
]


@pytest.mark.parametrize(("kind", "options"), NORMS)
def test_batch_normalised_layers_lose_every_row_of_their_statistics(kind: str, options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    program = capture(net_of(kind, "mean", num_layers=2, bidirectional=True), draw(2, 5, 3))
    normal = BatchnormRecurrent(data=(draw(20, 7, 3), None), **options).run(program).program.train()
    optimizer = torch.optim.SGD(normal.module().parameters(), 0.05)
    for _ in range(3):  # rows of their own
        optimizer.zero_grad()
        normal(draw(12, 7, 3)).square().mean().backward()
        optimizer.step()
    analysis = analyze(normal.eval())
    removed = some(analysis)
    small = Shrink(Plan.of_units(analysis, removed)).run(normal).program
    error, _ = masked_error(analysis, small, removed, 0)
    assert error <= 1e-12
    mean = small.tensor("layer.running_mean_ih_l0")
    assert mean.shape == (len(normal.tensor("layer.running_mean_ih_l0")), len(small.tensor("layer.weight_ih_l0")))
    small.train()(draw(12, 9, 3)).sum().backward()  # it still trains


@pytest.mark.parametrize(("kind", "options"), [("lstm", {}), ("lstm", {"proj_size": 3}), ("gru", {}), ("rnn", {})])
def test_gates_act_inside_the_recurrence_for_each_example(kind: str, options: dict[str, Any]) -> None:
    net = net_of(kind, "attention", num_layers=2, bidirectional=True, **options)
    program = capture(net, torch.randn(2, 5, 3).double())
    network = gated(program, analyze(program))
    assert network.per_example
    x = torch.randn(3, 6, 3).double()
    gates = network.ones(3, torch.float64)
    found = torch.autograd.grad(network.run([x], gates).square().sum(), gates)
    for group, gate in enumerate(gates):
        for example, unit in ((0, 0), (1, gate.shape[1] - 1), (2, gate.shape[1] // 2)):
            ends = []
            for step in (1e-5, -1e-5):
                moved = [one.detach().clone() for one in gates]
                moved[group][example, unit] += step
                ends.append(network.run([x], moved).square().sum().item())
            assert abs((ends[0] - ends[1]) / 2e-5 - found[group][example, unit].item()) <= 1e-8


def test_layers_whose_weights_are_all_computed_are_gated_and_stripped() -> None:
    net = net_of("lstm", bias=False)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        register_parametrization(net.layer, name, nn.Tanh())
    program = capture(net, torch.randn(2, 5, 3).double())
    analysis = analyze(program)
    network = gated(program, analysis)
    removed = some(analysis)
    gates = [torch.tensor([[float(unit not in removed) for unit in units]]).double() for units in network.units]
    x = torch.randn(3, 7, 3).double()
    with torch.no_grad():
        error = network.run([x], gates) - run_masked(analysis, removed, [x])[0]
    assert float(error.abs().max()) <= 1e-12
    graph = network.module.graphs["eval"]
    assert strip(graph, program.signature.input_names) > 0
    assert graph_text(graph) == graph_text(program.graphs["eval"])


def test_learned_first_states_lose_their_entries_and_are_masked_and_gated_too() -> None:
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(3, 6, num_layers=2, batch_first=True)
            self.h0, self.c0 = nn.Parameter(torch.randn(2, 1, 6)), nn.Parameter(torch.randn(2, 1, 6))
            self.after = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            states = self.h0.expand(-1, x.shape[0], -1).contiguous(), self.c0.repeat(1, x.shape[0], 1)
            return self.after(self.layer(x, states)[0][:, -1])

    torch.manual_seed(0)
    net = Learned().double().eval()
    program = capture(net, torch.randn(2, 5, 3).double())
    analysis = analyze(program)
    removed = some(analysis)
    small = Shrink(Plan.of_units(analysis, removed)).run(program).program
    assert small.tensor("h0").shape[-1] == 6 - len(removed)
    error, _ = masked_error(analysis, small, removed, 0)
    assert error <= 1e-12
    x = torch.randn(3, 7, 3).double()
    silent = zeroed(net, analysis, removed)
    with torch.no_grad():
        for unit in removed:
            for name in ("h0", "c0"):
                silent.get_parameter(name)[..., analysis.units[unit].slices[name][2]] = 0.0
        assert float((silent(x) - small(x)).abs().max()) <= 1e-12
        network = gated(program, analysis)
        gates = [torch.ones(1, 6, dtype=torch.float64)]
        gates[0][0, [network.units[0].index(unit) for unit in removed]] = 0.0
        assert float((network.run([x], gates) - small(x)).abs().max()) <= 1e-12


class Streaming(nn.Module):
    """A layer whose states come in and go out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(3, 6, num_layers=2, batch_first=True)
        self.after = nn.Linear(6, 2)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        steps, (h, c) = self.layer(x, (h, c))
        return self.after(steps), h, c


def streaming() -> tuple[nn.Module, Program]:
    torch.manual_seed(0)
    net = Streaming().double().eval()
    states = torch.randn(2, 2, 6).double(), torch.randn(2, 2, 6).double()
    return net, capture(net, (torch.randn(2, 5, 3).double(), *states))


def test_states_that_enter_or_leave_freeze_their_units_and_are_named() -> None:
    _, program = streaming()
    analysis = analyze(program)
    assert not analysis.units
    reasons = {frozen.reason for frozen in analysis.frozen if frozen.param == "layer.weight_hh_l1"}
    assert any("a state from outside (--resize-state" in reason for reason in reasons), reasons


def test_a_state_that_leaves_is_named() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(3, 6, batch_first=True)
            self.after = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            steps, h = self.layer(x)
            return self.after(steps), h

    program = capture(Last(), torch.randn(2, 5, 3))
    analysis = analyze(program)
    assert not analysis.units
    reasons = {frozen.reason for frozen in analysis.frozen if frozen.param == "layer.weight_hh_l0"}
    assert any("a state that leaves the network (--resize-state" in reason for reason in reasons), reasons
    assert len(analyze(permit(program, allowed=True)).units) == 6


def test_states_may_lose_units_when_asked_to() -> None:
    net, program = streaming()
    assert find_states(program.graphs["eval"]).inputs == {"h", "c"}
    free = permit(program, allowed=True)
    analysis = analyze(free)
    assert [len(group.units) for group in analysis.groups] == [6]  # states of both layers are one tensor
    removed = some(analysis)
    plan = Plan.from_json(Plan.of_units(analysis, removed).to_json())
    small = Shrink(plan).run(program).program  # the plan itself says that states were resized
    left = 6 - len(removed)
    assert [tuple(value.shape) for value in small.flat_examples()] == [(2, 5, 3), (2, 2, left), (2, 2, left)]
    assert len(widths(small)["inputs"]["h"]["kept"]) == left
    error, _ = masked_error(analysis, small, removed, 0)
    assert error <= 1e-12
    x, h, c = torch.randn(1, 4, 3).double(), torch.randn(2, 1, 6).double(), torch.randn(2, 1, 6).double()
    kept = widths(small)["inputs"]["h"]["kept"]
    with torch.no_grad():
        y, h_n, _ = small(x, narrow_input(small, "h", h), narrow_input(small, "c", c))
        h[..., [k for k in range(6) if k not in kept]] = 0.0
        expected = zeroed(net, analysis, removed)(x, h, c * torch.tensor([float(k in kept) for k in range(6)]))
    assert float((y - expected[0]).abs().max()) <= 1e-12
    assert float((h_n - expected[1][..., kept]).abs().max()) <= 1e-12


def test_states_may_lose_units_once_more() -> None:
    """The second cut takes the example inputs as the first one left them."""
    program = permit(streaming()[1], allowed=True)
    for left in (4, 3):
        analysis = analyze(program)
        program = Shrink(Plan.of_units(analysis, range(len(analysis.units) - left))).run(program).program
    assert widths(program)["inputs"]["h"]["kept"] == [3, 4, 5]
    assert [tuple(value.shape) for value in program.flat_examples()] == [(2, 5, 3), (2, 2, 3), (2, 2, 3)]


def test_the_record_of_states_outlasts_the_permission(tmp_path: Path) -> None:
    _, program = streaming()
    small = prune(program, budget=0.5, metric="widths", criterion="magnitude", resize_state=True).program
    assert resized(small).keys() == {"input h", "input c", "output 1", "output 2"}
    save(small, tmp_path / "small.pt")
    back = load(tmp_path / "small.pt")
    assert widths(back) == widths(small)
    assert not resizable(small)
    assert not analyze(back).units  # states are frozen again
    again = prune(back, budget=0.5, metric="widths", criterion="magnitude", resize_state=True).program
    kept, before = [made["inputs"]["h"]["kept"] for made in (widths(again), widths(small))]
    assert set(kept) < set(before)  # indices of the first original
    assert widths(again)["outputs"]["1"]["kept"] == kept
    x, h, c = program.flat_examples()
    with torch.no_grad():
        expected = again(x, h[..., kept], c[..., kept])
        found = again(x, narrow_input(again, "h", h), narrow_input(again, "c", c))
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_an_input_may_be_called_like_a_parameter() -> None:
    """What is kept of a node is not looked up among the parameters."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.h = nn.Parameter(torch.randn(4, 5))
            self.layer, self.after = nn.GRU(5, 6, batch_first=True), nn.Linear(6, 2)

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return self.after(self.layer(x @ self.h, h)[0])

    program = capture(Named(), (torch.randn(2, 3, 4), torch.randn(1, 2, 6)))
    analysis = analyze(permit(program, allowed=True))
    unit = next(group.units[0] for group in analysis.groups if len(group.units) == 6)
    small = Shrink(Plan.of_units(analysis, {unit})).run(program).program
    assert small.flat_examples()[1].shape == (1, 2, 5)


def test_a_plan_applies_to_the_module_where_its_layers_have_one_width() -> None:
    torch.manual_seed(0)
    net = Net("gru", "last").double().eval()
    x = torch.randn(2, 5, 3).double()
    program = capture(net, x)
    plan = Plan.of_units(analyze(program), some(analyze(program)))
    small = apply(plan, net, x)
    assert small.layer.hidden_size == small.layer.weight_hh_l0.shape[1] < 6
    with torch.no_grad():
        wider = torch.randn(3, 9, 3).double()
        assert float((small(wider) - apply(plan, program)(wider)).abs().max()) <= 1e-12
