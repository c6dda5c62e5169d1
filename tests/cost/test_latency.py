"""The predictor: which kernels a graph becomes, and how their time depends on widths."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfe_fx.cost.device import Device
from kfe_fx.cost.kernels import UNHIDDEN, CallKernel, ConvKernel, ElementKernel, GemmKernel, RecurrentKernel
from kfe_fx.cost.latency import RooflineLatency
from kfe_fx.cost.probes import Fingerprint
from kfe_fx.cost.profile import ELEMENT_FACTORS, Profile
from kfe_fx.cost.solver import select_budget
from kfe_fx.cost.widths import ONE, Product
from kfe_fx.runtime.onnx_file import onnx_bytes
from tests.cost.nets import Case, attention_case, case, conv_case, residual_case

PLAIN = Profile(conv_kernel=0.0, kernel=0.0, near_byte=0.0, tail=(1.0, 1.0, 1.0, 1.0))


def conv(inputs: int, outputs: int, per_group: int | None = None, taps: int = 9) -> float:
    per_group = inputs if per_group is None else per_group
    kernel = ConvKernel("c", PLAIN, 256, taps, Product(inputs), Product(per_group), Product(outputs))
    return kernel.cost([])


def kinds(made: Case) -> Counter[str]:
    found: Counter[str] = Counter()
    for term in RooflineLatency(made.model).terms():
        if isinstance(term, CallKernel):
            continue
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
    assert 5 < conv(width, width, 1) / conv(64, 64, 1) < 9


def test_a_depthwise_convolution_is_proportional_to_its_channels():
    assert conv(96, 96, 1) / conv(48, 48, 1) == pytest.approx(2)


def test_groups_that_split_a_block_leave_the_blocked_layout():
    assert conv(64, 64, 8) * 4 > conv(64, 64, 16)


def test_only_input_channels_have_to_be_multiples_of_the_granule():
    assert conv(64, 63) == conv(64, 64)
    assert conv(63, 64) > conv(64, 64)


def test_kernels_of_one_element_have_a_rate_of_their_own():
    assert conv(64, 64, taps=1) == pytest.approx(256 * 64 * 64 * PLAIN.pointwise_mac)


def test_weights_that_no_cache_holds_are_read_from_afar():
    near, far = (ConvKernel("c", PLAIN, 4, 9, *[Product(64)] * 3, missed=missed).cost([]) for missed in (0.0, 0.5))
    assert far - near == pytest.approx(4 * 9 * 64 * 64 * 0.5 * PLAIN.miss_byte)
    near, far = (GemmKernel("g", PLAIN, ONE, *[Product(64)] * 3, missed=missed).cost([]) for missed in (0.0, 0.5))
    assert far - near == pytest.approx(4 * 64 * 64 * 0.5 * PLAIN.miss_byte * UNHIDDEN)
    few = GemmKernel("g", PLAIN, ONE, ONE, Product(64), Product(64), missed=0.5).cost([])
    computing = 64 * (64 * PLAIN.gemm_mac + PLAIN.gemm_output)
    assert few == pytest.approx(4 * 64 * 64 * 0.5 * PLAIN.miss_byte + UNHIDDEN * computing)


def test_weights_that_are_read_in_a_run_are_those_that_may_be_missed():
    table = nn.Sequential(nn.Embedding(1000, 16), nn.Linear(16, 16))
    made = case(table, torch.zeros(2, 3, dtype=torch.long))
    small, tight = Profile(), replace(Profile(), reach=4.0 * 16 * 17 / 2)
    missed = [
        term.missed
        for profile in (small, tight)
        for term in RooflineLatency(made.model, profile).terms()
        if isinstance(term, GemmKernel)
    ]
    assert missed == [0.0, 0.5]


def test_lone_blocks_of_output_cost_a_little_more():
    profile = replace(PLAIN, tail=(1.0, 1.5, 1.2, 1.0))
    rate = [
        ConvKernel("c", profile, 100, 9, Product(64), Product(64), Product(c)).cost([]) / c for c in (64, 80, 96, 112)
    ]
    assert rate[1] / rate[0] == pytest.approx((4 + 1.5) / 5)
    assert rate[2] / rate[0] == pytest.approx((4 + 2 * 1.2) / 6)
    assert rate[3] == pytest.approx(rate[0])


def test_few_rows_are_bound_by_the_weights():
    one, many = (
        GemmKernel("g", PLAIN, ONE, Product(rows), Product(512), Product(512), weight_byte=0.1).cost([])
        for rows in (1, 400)
    )
    assert one == pytest.approx(4 * 512 * 512 * 0.1)
    assert many == pytest.approx(400 * 512 * (512 * PLAIN.gemm_mac + PLAIN.gemm_output))


def test_rows_of_a_broadcast_are_charged():
    plain, rows = (ElementKernel("e", PLAIN, Product(100), 1.0, rows).cost([]) for rows in (None, Product(10)))
    assert rows - plain == pytest.approx(10 * PLAIN.row)


SIZE = Product(1, (0,))
FIXED = Product(32)


@pytest.mark.parametrize(
    "kernel",
    [
        ConvKernel("c", Profile(), 16, 9, SIZE, SIZE, FIXED),
        ConvKernel("c", Profile(), 16, 9, FIXED, FIXED, SIZE),
        ConvKernel("c", Profile(), 16, 9, SIZE, ONE, SIZE),
        GemmKernel("g", Profile(), ONE, FIXED, SIZE, FIXED, 1.0),
        GemmKernel("g", Profile(), ONE, FIXED, FIXED, SIZE, 1.0),
        GemmKernel("g", Profile(), SIZE, FIXED, FIXED, FIXED),
        ElementKernel("e", Profile(), SIZE, 1.0, FIXED, SIZE, (SIZE, FIXED)),
        RecurrentKernel("r", Profile(), FIXED, ONE, SIZE, SIZE, SIZE, None, 1.0, 1.0),
        RecurrentKernel("r", Profile(), FIXED, ONE, FIXED, SIZE, FIXED, None, 1.0, 1.0),
    ],
)
def test_what_is_gone_costs_nothing(kernel):
    assert kernel.cost([0]) == 0.0
    assert kernel.cost([32]) > 0.0


def test_leaving_the_blocked_layout_is_charged():
    aligned, crooked = (
        ElementKernel("e", PLAIN, Product(100), 1.0, None, Product(width), (Product(50), Product(50))).cost([])
        for width in (32, 33)
    )
    assert (aligned, crooked) == (100.0, pytest.approx(100.0 + 100 * PLAIN.reorder))


def test_norms_sums_and_activations_run_inside_the_convolution():
    found = kinds(residual_case())
    assert found["ConvKernel conv2d"] == 7
    assert not any("batch_norm" in kind or "relu" in kind for kind in found if "Conv" in kind)
    assert found["ElementKernel batch_norm"] == found["ElementKernel add"] == 0
    assert found["ElementKernel relu"] == 1  # before the mean: the way out of the blocked layout


def test_attention_becomes_products_softmax_and_copies():
    found = kinds(attention_case())
    assert found["GemmKernel linear"] == 8
    assert found["GemmKernel matmul"] == 1
    assert found["ElementKernel softmax"] == 1
    assert found["ElementKernel transpose"] == 4


class Norms(nn.Module):
    """Sums in front of norms: alone, with another reader, and not of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.last = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 16)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(3))
        self.shift = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](x + self.down(F.gelu(self.up(x))))
        y = x + self.last(x)
        y = y + torch.tanh(self.norms[1](y))
        return self.norms[2](y * y + self.shift)


class Padded(nn.Module):
    """Paddings that convolutions take over, that add nothing, and that stay."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(*size, 3) for size in ((3, 16), (16, 16), (16, 16)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.first(F.pad(x, (0, 1, 0, 1))))
        x = F.relu6(self.second(F.pad(x, (0, 0, 0, 0))))
        return self.third(F.pad(x, (1, 1, 1, 1), mode="reflect")).mean((2, 3))


def run_by_onnxruntime(made: Case, folder: Path) -> Counter[str]:
    """The kernels that are left of a network when ONNX Runtime has optimised it."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 3  # says that such a file is for this machine alone
    ort.InferenceSession(onnx_bytes(made.program), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node)


def test_a_norm_takes_the_sum_in_front_along_where_onnxruntime_does(tmp_path: Path):
    made = case(Norms(), torch.randn(2, 5, 16))
    norms = [term for term in RooflineLatency(made.model).terms() if term.owner.startswith("layer_norm")]
    each = {round(term.each / Profile().element, 6) for term in norms if isinstance(term, ElementKernel)}
    assert [norm.each > 1 for norm in norms] == [True, False, False]
    assert each == {ELEMENT_FACTORS["skip_layer_norm"], ELEMENT_FACTORS["layer_norm"]}
    found = run_by_onnxruntime(made, tmp_path)
    assert (found["SkipLayerNormalization"], found["LayerNormalization"]) == (1, 2)
    assert kinds(made)["ElementKernel add"] == 3  # of four sums


def test_a_padding_costs_what_onnxruntime_leaves_of_it(tmp_path: Path):
    made = case(Padded(), torch.randn(2, 3, 12, 12))
    rate = ELEMENT_FACTORS["pad"] * Profile().element
    pads = [term for term in RooflineLatency(made.model).terms() if getattr(term, "each", 0.0) == rate]
    assert len(pads) == run_by_onnxruntime(made, tmp_path)["Pad"] == 1
    assert kinds(made)["ElementKernel relu6"] == 1  # out of the blocked layout, for the padding that stays


class Normed(nn.Module):
    """A sum inside one layer norm."""

    def __init__(self, shape: tuple[int, ...], kind: str) -> None:
        super().__init__()
        self.last = nn.Linear(shape[-1], shape[-1])
        over = shape[-2:] if kind == "two dims" else shape[-1:]
        self.norm = nn.LayerNorm(over, elementwise_affine=kind != "bare", bias=kind != "unbiased")

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + torch.tanh(self.last(x)))


@pytest.mark.parametrize("kind", ["affine", "bare", "unbiased", "two dims"])
@pytest.mark.parametrize("shape", [(4, 16), (2, 5, 16), (2, 3, 5, 16)])
def test_sums_run_inside_norms_where_onnxruntime_fuses_them(kind: str, shape: tuple[int, ...], tmp_path: Path):
    made = case(Normed(shape, kind), torch.randn(shape))
    fused = run_by_onnxruntime(made, tmp_path)["SkipLayerNormalization"]
    assert kinds(made)["ElementKernel add"] == 1 - fused


class Pad(nn.Module):
    """A padding before one convolution or two that read the same."""

    def __init__(self, rank: int, pad: tuple[int, ...], value: float, readers: int) -> None:
        super().__init__()
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        self.padded = lambda x: F.pad(x, pad, value=value)
        wide = 3 + (sum(pad[2 * rank :]) if len(pad) > 2 * rank else 0)
        self.readers = nn.ModuleList(kind(wide, 16, 3) for _ in range(readers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.padded(x)
        return sum(reader(x) for reader in self.readers).flatten(2).mean(2)  # type: ignore[union-attr]  # never empty


@pytest.mark.parametrize(
    ("rank", "pad", "value", "readers"),
    [
        (1, (2, 1), 0.0, 1),
        (2, (0, 1, 0, 1), 0.0, 1),
        (3, (1, 1, 0, 2, 1, 0), 0.0, 1),
        (2, (1, 1, 1, 1, 0, 0), 0.0, 1),
        (2, (0, 0, 0, 0, 0, 2), 0.0, 1),
        (2, (1, 1), 0.0, 2),
        (2, (1, 1, 1, 1), 1.0, 1),
        (2, (-1, -1, 1, 1), 0.0, 1),
        (1, (0, 0, 1, 1), 0.0, 1),
    ],
)
def test_paddings_run_inside_convolutions_where_onnxruntime_folds_them(
    rank: int, pad: tuple[int, ...], value: float, readers: int, tmp_path: Path
):
    made = case(Pad(rank, pad, value, readers), torch.randn(2, 3, *([9] * rank)))
    left = sum(kinds(made)[f"ElementKernel {name}"] for name in ("pad", "constant_pad_nd"))
    assert left == run_by_onnxruntime(made, tmp_path)["Pad"]


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


def test_a_run_costs_something_whatever_is_removed():
    made = residual_case()
    with_call, without = (
        RooflineLatency(made.model, replace(Profile(), call=call)).predict(()) for call in (1000.0, 0.0)
    )
    assert with_call - without == pytest.approx(1000.0)


def test_devices_change_predictions():
    made = residual_case()
    removed = made.units_of("blocks.0.0.weight", 16)
    slow = replace(Profile(), conv_mac=10.0)
    waits = replace(Profile(), call=1e9)
    ratios = [
        RooflineLatency(made.model, one).predict(removed) / RooflineLatency(made.model, one).predict(())
        for one in (slow, device_with(slow), waits)
    ]
    assert ratios[0] == ratios[1] < 0.95
    assert ratios[2] == pytest.approx(1.0, abs=1e-3)
    assert RooflineLatency(made.model).name == "roofline"


def device_with(profile: Profile) -> Device:
    return Device(Fingerprint("cpu", (), "1.0", "all", 1, "fp32", "CPUExecutionProvider"), profile, 16)


@pytest.mark.parametrize(("taps", "channels", "looked_up"), [(9, 16, 9), (1, 16, 0), (9, 3, 0)])
def test_int8_convolutions_look_up_taps_and_bring_outputs_to_8_bits(taps: int, channels: int, looked_up: int):
    inputs, outputs = Product(channels), Product(32)
    plain, int8 = (
        ConvKernel("", profile, 100, taps, inputs, inputs, outputs).cost([])
        for profile in (Profile(), replace(Profile(), tap=2.0, requantise=0.5))
    )
    assert int8 - plain == pytest.approx(100 * 32 * 0.5 + 100 * looked_up * 2.0)
