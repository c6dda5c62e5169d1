"""What a device is good at: a handful of times per unit of work, from which kernels are predicted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """Times in nanoseconds, ONNX Runtime on a CPU, float32 or int8; ``kfe_fx.cost.probes`` measures them.

    The defaults are of one AVX-512 machine and one thread. Predictions are used as ratios only, so what matters is how
    these numbers relate to each other. Weights count as four bytes each, in an int8 network too.
    """

    name: str = "built-in"
    # the blocked convolutions: channels come in blocks, and at all only in multiples of ``granule``
    block: int = 16
    granule: int = 4
    conv_mac: float = 0.0165
    # output blocks are computed four at a time; what a remainder of 0, 1, 2, 3 blocks costs per MAC relative to none
    tail: tuple[float, float, float, float] = (1.0, 1.1, 1.02, 0.99)
    # kernels of one element read their inputs more often
    pointwise_mac: float = 0.0177
    # the first convolution reads its few channels from the plain layout
    narrow_mac: float = 0.018
    depthwise_mac: float = 0.0393
    # outside the blocked layout: columns are gathered and multiplied; a depthwise convolution is many tiny products,
    # and each group has an overhead
    plain_mac: float = 0.0207
    column: float = 0.25
    plain_depthwise_mac: float = 0.26
    group: float = 184.0
    # matrix products
    gemm_mac: float = 0.0172
    gemm_output: float = 0.07
    # weights that a product of few rows streams: from near the core, or from afar
    near_byte: float = 0.0105
    weight_byte: float = 0.0122
    # a step of a recurrent layer: bytes of weights that cost no more than computing where ONNX Runtime packs them (for
    # an LSTM it does), bytes that stay near the core from one step to the next, and what those cost
    inner: float = 3.2e4
    cache: float = 6.5e5
    core_byte: float = 0.0093
    # bytes of weights of convolutions in one run beyond which caches and address tables miss, and what that costs
    reach: float = 9e6
    miss_byte: float = 0.08
    # per element moved or computed, and per row of a broadcast or a norm
    element: float = 0.095
    row: float = 9.4
    reorder: float = 0.09
    transpose: float = 0.365
    # per run, per kernel whatever its size, per kernel of a recurrent layer and per step inside it
    call: float = 5500.0
    kernel: float = 190.0
    conv_kernel: float = 390.0
    recurrent_kernel: float = 2700.0
    step: float = 160.0
    # int8 only: the address of a tap of a larger kernel, looked up for every position; an output brought to 8 bits
    tap: float = 0.0
    requantise: float = 0.0
    # int8 only: the constants of what runs in float32 all the same
    floats: Profile | None = None


# Relative to ``Profile.element`` per output element; what is not here counts as 1 per tensor read or written.
# ONNX Runtime fuses a sum and the norm behind it into a kernel that is no vector loop ("skip_layer_norm").
ELEMENT_FACTORS: dict[str, float] = {
    "add": 1.3, "sub": 1.3, "mul": 1.3, "div": 1.5, "relu": 0.8, "relu6": 1.0, "hardtanh": 1.0, "clamp": 1.0,
    "leaky_relu": 1.0, "neg": 0.8, "abs": 0.8, "sqrt": 3.5, "rsqrt": 4.0, "pow": 4.0, "exp": 1.8, "log": 4.0,
    "sigmoid": 3.0, "hardsigmoid": 1.5, "tanh": 2.7, "silu": 3.5, "hardswish": 2.9, "gelu": 7.0, "elu": 3.0,
    "mish": 8.0, "softplus": 5.0, "erf": 5.2, "sin": 4.0, "cos": 4.0, "softmax": 3.6, "log_softmax": 3.5,
    "layer_norm": 4.8, "skip_layer_norm": 54.0, "rms_norm": 4.0, "group_norm": 4.0, "instance_norm": 4.0,
    "batch_norm": 1.8, "upsample_nearest2d": 2.0, "upsample_bilinear2d": 6.0, "embedding": 1.0,
    "cat": 1.5, "stack": 1.5, "pad": 1.5, "constant_pad_nd": 1.5,
}  # fmt: skip

# Relative to ``Profile.element`` per hidden unit and step: inside ONNX Runtime's kernel of a recurrent layer, and as
# nodes of their own inside a Scan; with the latter, how many nodes a step has.
CELL_FACTORS: dict[str, float] = {"lstm": 20.0, "gru": 40.0, "rnn_tanh": 60.0, "rnn_relu": 15.0}
SCAN_FACTORS: dict[str, float] = {"lstm": 200.0, "gru": 150.0, "rnn_tanh": 60.0, "rnn_relu": 40.0}
SCAN_NODES: dict[str, int] = {"lstm": 13, "gru": 13, "rnn_tanh": 4, "rnn_relu": 4}
