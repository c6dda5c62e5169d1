"""What recurrent layers cost: multiplications against PyTorch's own counter, and how predicted time moves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kfe_fx.cost.kernels import RecurrentKernel
from kfe_fx.cost.latency import RooflineLatency
from kfe_fx.cost.profile import Profile
from kfe_fx.cost.solver import select_budget
from kfe_fx.cost.widths import Product
from tests.cost.nets import Case, case
from tests.runtime.recurrent_nets import normalised


class Tagger(nn.Module):
    """Layers of every kind in a row, in both orders of the dims; the widths are arguments."""

    def __init__(self, both: int = 16, middle: int = 12, last: int = 8, projection: int = 0) -> None:
        super().__init__()
        self.both = nn.LSTM(6, both, batch_first=True, bidirectional=True, proj_size=projection)
        self.middle = nn.GRU(2 * (projection or both), middle, batch_first=True)
        self.last = nn.RNN(middle, last)
        self.head = nn.Linear(last, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.middle(self.both(x)[0])
        return self.head(self.last(x.transpose(0, 1))[0].mean(0))


def macs_of(both: int, middle: int, last: int, steps: int, projection: int = 0) -> int:
    width = projection or both
    first = 2 * (4 * both * (6 + width) + projection * both)
    return steps * (first + 3 * middle * (2 * width + middle) + last * (middle + last)) + 3 * last


@pytest.fixture(scope="module")
def tagger() -> Case:
    return case(Tagger(), torch.randn(2, 7, 6))


def kernel(made: Case, name: str) -> RecurrentKernel:
    terms = (term for term in RooflineLatency(made.model).terms() if isinstance(term, RecurrentKernel))
    nodes = {node.name: node for node in made.model.graph.nodes}
    return next(term for term in terms if str(nodes[term.owner].args[4].target) == name)


@pytest.mark.parametrize("projection", [0, 5])
def test_multiplications_of_every_step(projection, tagger):
    made = case(Tagger(projection=projection), torch.randn(2, 7, 6)) if projection else tagger
    assert made.model.macs() == macs_of(16, 12, 8, 7, projection)
    assert made.model.parameters() == sum(value.numel() for value in made.module.parameters())
    assert made.model.memory() > 0


def test_removed_units_take_their_gates_along(tagger):
    removed = {*tagger.units_of("middle.weight_ih_l0", 5), *tagger.units_of("last.weight_ih_l0", 2)}
    built = Tagger(middle=7, last=6)
    assert tagger.model.macs(removed) == macs_of(16, 7, 6, 7)
    assert tagger.model.parameters(removed) == sum(value.numel() for value in built.parameters())


def test_each_direction_has_a_product_before_and_its_steps(tagger):
    terms = [term for term in RooflineLatency(tagger.model).terms() if "recurrent" in term.owner]
    kinds = [type(term).__name__ for term in terms]
    assert kinds == ["GemmKernel", "RecurrentKernel"] * 4
    dense = tagger.model.widths.dense
    steps = [
        (t.steps.at(dense), t.rows.at(dense), t.gates.at(dense), t.width.at(dense), t.hidden.at(dense))
        for t in terms
        if isinstance(t, RecurrentKernel)
    ]
    assert steps == [(7, 1, 64, 16, 16), (7, 1, 64, 16, 16), (7, 1, 36, 12, 12), (7, 1, 8, 8, 8)]


def test_fewer_units_are_predicted_faster():
    made = case(Tagger(128, 96, 64), torch.randn(2, 7, 6))
    latency = RooflineLatency(made.model)
    chosen = select_budget(made.model, np.ones(len(made.analysis.units)), latency, 0.6)
    assert chosen.feasible
    assert latency.predict(chosen.removed) == pytest.approx(0.6 * latency.predict(()), rel=0.1)


def of_size(hidden: int, rows: int = 1, steps: int = 100, **options: float) -> RecurrentKernel:
    profile = Profile(recurrent_kernel=0.0, core_byte=0.01, weight_byte=0.04, cache=1e6)
    sizes = [Product(size) for size in (steps, rows, 4 * hidden, hidden, hidden)]
    return replace(RecurrentKernel("r", profile, *sizes, None, 2.0, 200.0), **options)


def test_steps_follow_each_other():
    assert of_size(64, steps=100).cost([]) == pytest.approx(10 * of_size(64, steps=10).cost([]))


def test_one_sequence_reads_the_weights_many_compute():
    weights = 4 * 128 * 128
    assert of_size(128).cost([]) == pytest.approx(100 * (4 * weights * 0.01 + 128 * 2.0 + 200.0))
    many = of_size(128, rows=16).cost([])
    assert many == pytest.approx(100 * (16 * weights * Profile().gemm_mac + 16 * 128 * 2.0 + 200.0))


def test_weights_that_leave_the_cache_are_a_cliff():
    inside, outside = of_size(240, overhead=0.0, each=0.0), of_size(360, overhead=0.0, each=0.0)
    assert outside.cost([]) / inside.cost([]) == pytest.approx((360 / 240) ** 2 * 4, rel=0.1)


def test_a_projection_is_read_too():
    projected = of_size(64, projection=Product(64 * 32))
    assert projected.cost([]) - of_size(64).cost([]) == pytest.approx(100 * 4 * 64 * 32 * 0.01)
    made = case(Tagger(projection=5), torch.randn(2, 7, 6))
    found = kernel(made, "both.weight_hh_l0")
    dense = made.model.widths.dense
    assert (found.width.at(dense), found.hidden.at(dense)) == (5, 16)
    assert found.projection is not None
    assert found.projection.at(dense) == 5 * 16


def test_what_becomes_a_scan_costs_more():
    def kernel_of(rows: int, cell_norm: str = "") -> RecurrentKernel:
        made = case(nn.LSTM(4, 8), torch.randn(5, 2, 4))
        if rows:
            normalised(made.program, rows=rows, cell_norm=cell_norm)
        return kernel(made, "weight_hh_l0")

    plain, folded, scalar, stepped, channels = (
        kernel_of(*kind).cost([8, 8, 8, 8, 8, 8]) for kind in ((0,), (1,), (1, "scalar"), (3,), (1, "channel"))
    )
    assert plain == folded == scalar
    assert stepped > 2 * plain
    assert channels > 2 * plain


def test_multiplications_of_cells_at_each_step():
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.long, self.gated, self.plain = nn.LSTMCell(6, 8), nn.GRUCell(8, 5), nn.RNNCell(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            h, c, g, r = (x.new_zeros(x.shape[0], size) for size in (8, 8, 5, 4))
            for step in x.unbind(1):
                h, c = self.long(step, (h, c))
                g = self.gated(h, g)
                r = self.plain(g, r)
            return r

    made = case(Loop(), torch.randn(2, 3, 6))
    assert made.model.macs() == 3 * (4 * 8 * (6 + 8) + 3 * 5 * (8 + 5) + 4 * (5 + 4))


def test_recurrent_kernels_of_an_int8_network_run_in_float32(tagger):
    faster = replace(Profile(), gemm_mac=1e-4, gemm_output=1e-4, near_byte=1e-5, weight_byte=1e-5)
    dense = tagger.model.widths.dense
    floats, int8 = (
        [(term.owner, term.cost(dense)) for term in RooflineLatency(tagger.model, profile).terms()]
        for profile in (Profile(), replace(faster, floats=Profile()))
    )
    assert [one for one in int8 if "recurrent" in one[0]] == [one for one in floats if "recurrent" in one[0]]
    assert sum(cost for _, cost in int8) < sum(cost for _, cost in floats)  # the head is a product of int8
