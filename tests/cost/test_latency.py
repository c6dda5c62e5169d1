"""The predictor: which kernels a graph becomes, and how their time depends on widths."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from kfe_fx.cost.calibrate import calibrated
from kfe_fx.cost.kernels import ConvKernel, ElementKernel, GemmKernel
from kfe_fx.cost.latency import RooflineLatency
from kfe_fx.cost.profile import Profile
from kfe_fx.cost.solver import select_budget
from kfe_fx.cost.widths import ONE, Product
from kfe_fx.errors import UsageError
from tests.cost.nets import Case, attention_case, conv_case, residual_case

PLAIN = Profile(kernel=0.0, weight_byte=0.0, tail=(1.0, 1.0, 1.0, 1.0))


def conv(inputs: int, outputs: int, per_group: int | None = None, taps: int = 9) -> float:
    per_group = inputs if per_group is None else per_group
    kernel = ConvKernel("c", PLAIN, 256, taps, Product(inputs), Product(per_group), Product(outputs), 16)
    return kernel.cost([])


def kinds(made: Case) -> Counter[str]:
    found: Counter[str] = Counter()
    for term in RooflineLatency(made.model).terms():
        node = next(node for node in made.model.graph.nodes if node.name == term.owner)
        found[f"{type(term).__name__} {str(node.target).removeprefix('aten.').split('.')[0]}"] += 1
    return found


def test_channels_are_padded_to_the_block():
    assert conv(64, 64) == pytest.approx(256 * 9 * 64 * 64 * PLAIN.conv_mac)
    assert conv(24, 64) == conv(32, 64)
    assert conv(64, 40) == conv(64, 48)


@pytest.mark.parametrize("width", [63, 65])
def test_odd_widths_are_slower_than_aligned_ones(width: int):
    assert 1.2 < conv(width, width) / conv(64, 64) < 2.5
    assert 6 < conv(width, width, 1) / conv(64, 64, 1) < 9


def test_a_depthwise_convolution_is_proportional_to_its_channels():
    assert conv(96, 96, 1) / conv(48, 48, 1) == pytest.approx(2)


def test_groups_that_split_a_block_leave_the_blocked_layout():
    assert conv(64, 64, 8) * 4 > conv(64, 64, 16)


def test_lone_blocks_of_output_cost_a_little_more():
    profile = Profile(kernel=0.0, weight_byte=0.0, tail=(1.0, 1.5, 1.2, 1.0))
    rate = [
        ConvKernel("c", profile, 100, 9, Product(64), Product(64), Product(c), 10).cost([]) / c
        for c in (64, 80, 96, 112)
    ]
    assert rate[1] / rate[0] == pytest.approx((4 + 1.5) / 5)
    assert rate[2] / rate[0] == pytest.approx((4 + 2 * 1.2) / 6)
    assert rate[3] == pytest.approx(rate[0])


def test_few_rows_are_bound_by_the_weights():
    one, four, many = (
        GemmKernel("g", Profile(kernel=0.0), ONE, Product(rows), Product(512), Product(512), True).cost([])
        for rows in (1, 4, 400)
    )
    assert one == four == 4 * 512 * 512 * Profile().weight_byte
    assert many == pytest.approx(400 * 512 * 512 * Profile().gemm_mac)


def test_leaving_the_blocked_layout_is_charged():
    aligned, crooked = (
        ElementKernel("e", PLAIN, Product(100), 1.0, Product(width), (Product(50), Product(50))).cost([])
        for width in (32, 33)
    )
    assert (aligned, crooked) == (100.0, pytest.approx(100.0 + 100 * PLAIN.reorder))


def test_norms_sums_and_activations_run_inside_the_convolution():
    found = kinds(residual_case())
    assert found["ConvKernel conv2d"] == 7
    assert not any("batch_norm" in kind or "relu" in kind for kind in found if "Conv" in kind)
    assert found["ElementKernel batch_norm"] == found["ElementKernel add"] == 0
    assert found["ElementKernel relu"] == 2  # before the mean: the way out of the blocked layout; after the linear


def test_attention_becomes_products_softmax_and_copies():
    found = kinds(attention_case())
    assert found["GemmKernel linear"] == 8
    assert found["GemmKernel matmul"] == 1
    assert found["ElementKernel softmax"] == 1
    assert found["ElementKernel transpose"] == 4


@pytest.mark.parametrize("made", [conv_case, attention_case, residual_case])
def test_blocks_removed_save_time(made):
    network = made()
    latency = RooflineLatency(network.model)
    chosen = select_budget(network.model, np.ones(len(network.analysis.units)), latency, 0.9)
    assert latency.predict(chosen.removed) < latency.predict(())
    assert sum(t.cost(network.model.widths.dense) for t in latency.terms()) == pytest.approx(latency.predict(()))


def test_ragged_removal_saves_nothing():
    made = residual_case()
    latency = RooflineLatency(made.model)
    ragged = [unit for name in ("stem", "blocks.0.0", "blocks.1.0") for unit in made.units_of(f"{name}.weight", 3)]
    assert latency.predict(ragged) > latency.predict(())


def test_calibration_changes_constants_within_reason():
    measured, default = calibrated(seconds=0.02), Profile()
    assert measured.name == "measured"
    assert measured.block == default.block
    for name in ("conv_mac", "depthwise_mac", "gemm_mac", "weight_byte", "element", "kernel"):
        assert 0.2 <= getattr(measured, name) / getattr(default, name) <= 5
    with pytest.raises(UsageError, match="needs time"):
        calibrated(seconds=0)
