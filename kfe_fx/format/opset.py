"""Which operations a program file may name. What is not listed is refused, at saving and at loading.

No listed operation runs code, opens a file, changes global state or reads memory it was not given. ATen also holds
operations that do (``from_file``, ``save``, ``set_``, packed weights that are pointers ...); hence a list of names, not
a rule. In addition an overload must be free of side effects and take and return nothing but tensors and plain values.
"""

from __future__ import annotations

import importlib
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

from kfe_fx.format.fields import Malformed

_ATEN = frozenset(
    name
    for line in """
    # contraction
    linear matmul mm bmm mv dot vdot inner outer ger addmm addmv addr addbmm baddbmm einsum tensordot bilinear
    kron chain_matmul linalg_multi_dot linalg_matmul linalg_vecdot _trilinear _grouped_mm conv1d conv2d conv3d
    conv_transpose1d conv_transpose2d conv_transpose3d convolution _convolution _convolution_mode conv_tbc
    scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention
    _scaled_dot_product_efficient_attention _scaled_dot_product_attention_math _native_multi_head_attention
    _transformer_encoder_layer_fwd _safe_softmax _weight_norm _weight_norm_interface norm_except_dim
    # recurrent
    lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell
    # normalisation, regularisation
    batch_norm native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training
    _native_batch_norm_legit_functional _batch_norm_with_update_functional layer_norm native_layer_norm
    group_norm native_group_norm instance_norm rms_norm _fused_rms_norm renorm cosine_similarity
    pairwise_distance pdist cdist dropout native_dropout feature_dropout alpha_dropout feature_alpha_dropout
    # pooling, resampling
    avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d max_pool1d_with_indices
    max_pool2d_with_indices max_pool3d_with_indices adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    max_unpool2d max_unpool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d
    _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d
    upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa grid_sampler grid_sampler_2d
    grid_sampler_3d affine_grid_generator pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle
    im2col col2im
    # activations
    relu relu6 leaky_relu prelu _prelu_kernel rrelu rrelu_with_noise_functional elu selu celu gelu silu mish glu
    sigmoid log_sigmoid log_sigmoid_forward hardsigmoid hardswish hardtanh hardshrink softshrink threshold
    softplus softmax _softmax log_softmax _log_softmax logit tanh special_expit special_softmax
    special_log_softmax
    # pointwise
    abs absolute acos acosh add addcdiv addcmul angle arccos arccosh arcsin arcsinh arctan arctan2 arctanh asin
    asinh atan atan2 atanh bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor
    __and__ __or__ __xor__ __lshift__ __rshift__ ceil clamp clamp_max clamp_min clip complex conj conj_physical
    _conj _conj_physical copysign cos cosh deg2rad digamma div divide eq erf erfc erfinv exp exp2 expm1 fix
    float_power floor floor_divide fmax fmin fmod frac frexp gcd ge greater greater_equal gt heaviside hypot i0
    igamma igammac imag isclose isfinite isin isinf isnan isneginf isposinf isreal lcm ldexp le lerp less
    less_equal lgamma log log10 log1p log2 logaddexp logaddexp2 logical_and logical_not logical_or logical_xor
    lt masked_fill maximum minimum mul multiply mvlgamma nan_to_num ne neg negative nextafter not_equal polar
    polygamma positive pow rad2deg real reciprocal remainder resolve_conj resolve_neg round rsqrt rsub sgn sign
    signbit sin sinc sinh special_digamma special_entr special_erf special_erfc special_erfcx special_erfinv
    special_exp2 special_expm1 special_gammainc special_gammaincc special_gammaln special_i0 special_i0e
    special_i1 special_i1e special_log1p special_log_ndtr special_logit special_multigammaln special_ndtr
    special_ndtri special_polygamma special_psi special_round special_sinc special_xlog1py special_xlogy
    special_zeta sqrt square sub subtract tan true_divide trunc where xlogy
    # reduction
    all allclose amax amin aminmax any argmax argmin bincount bucketize corrcoef count_nonzero cov cummax cummin
    cumprod cumsum cumulative_trapezoid diff dist equal histc kthvalue logcumsumexp logsumexp max mean median
    min mode nanmean nanmedian nanquantile nansum norm frobenius_norm nuclear_norm prod quantile searchsorted
    special_logsumexp std std_mean sum sum_to_size trace trapezoid trapz var var_mean
    # data movement
    adjoint alias alias_copy argsort argwhere as_strided as_strided_copy as_strided_scatter atleast_1d
    atleast_2d atleast_3d block_diag broadcast_tensors broadcast_to cartesian_prod cat chunk clone column_stack
    combinations concat concatenate constant_pad_nd contiguous copy detach detach_copy diag diag_embed diagflat
    diagonal diagonal_copy diagonal_scatter dsplit dstack expand expand_as expand_copy flatten flip fliplr
    flipud gather hsplit hstack index index_add index_copy index_fill index_put index_reduce index_select lift
    lift_fresh lift_fresh_copy mH mT masked_scatter masked_select matrix_H meshgrid moveaxis movedim msort
    narrow narrow_copy nonzero nonzero_numpy nonzero_static numpy_T one_hot pad pad_sequence _pad_circular
    _pad_enum permute permute_copy put ravel reflection_pad1d reflection_pad2d reflection_pad3d repeat
    repeat_interleave replication_pad1d replication_pad2d replication_pad3d reshape _reshape_alias _reshape_copy
    reshape_as roll rot90 row_stack scatter scatter_add scatter_reduce select select_copy select_scatter slice
    slice_copy slice_scatter sort split split_copy split_with_sizes split_with_sizes_copy squeeze squeeze_copy
    stack swapaxes swapdims t t_copy take take_along_dim tensor_split tile topk transpose transpose_copy tril
    triu unbind unbind_copy unflatten unfold unfold_copy unique_consecutive unique_dim _unique2 unsafe_chunk
    unsafe_split unsafe_split_with_sizes _unsafe_view unsqueeze unsqueeze_copy view view_as view_as_complex
    view_as_real view_copy vsplit vstack _shape_as_tensor
    # lookup
    embedding embedding_bag embedding_renorm
    # types, creation, random numbers
    _to_copy to type_as arange empty empty_like empty_permuted empty_strided eye fill full full_like linspace
    logspace new_empty new_empty_strided new_full new_ones new_zeros ones ones_like range scalar_tensor
    tril_indices triu_indices vander zeros zeros_like zero bartlett_window blackman_window hamming_window
    hann_window kaiser_window bernoulli binomial cauchy exponential geometric log_normal multinomial normal
    normal_functional poisson rand rand_like randint randint_like randn randn_like random randperm uniform
    # linear algebra, transforms
    cholesky cholesky_inverse cholesky_solve cross det inverse linalg_cholesky linalg_cholesky_ex linalg_cross
    linalg_det linalg_diagonal linalg_eigh linalg_eigvalsh linalg_householder_product linalg_inv linalg_inv_ex
    linalg_lstsq linalg_matrix_exp linalg_matrix_norm linalg_matrix_power linalg_norm linalg_pinv linalg_qr
    linalg_slogdet linalg_solve linalg_solve_ex linalg_solve_triangular linalg_svd linalg_svdvals
    linalg_vector_norm _linalg_svd _linalg_eigh _linalg_det _linalg_slogdet _linalg_solve_ex logdet matrix_exp
    matrix_power pinverse qr slogdet svd triangular_solve fft_fft fft_fft2 fft_fftfreq fft_fftn fft_fftshift
    fft_hfft fft_ifft fft_ifft2 fft_ifftn fft_ifftshift fft_ihfft fft_irfft fft_irfft2 fft_irfftn fft_rfft
    fft_rfft2 fft_rfftfreq fft_rfftn istft stft
    # losses inside networks
    binary_cross_entropy binary_cross_entropy_with_logits cosine_embedding_loss cross_entropy_loss
    hinge_embedding_loss huber_loss kl_div l1_loss margin_ranking_loss mse_loss nll_loss nll_loss2d
    nll_loss_forward nll_loss2d_forward nll_loss_nd poisson_nll_loss smooth_l1_loss soft_margin_loss
    triplet_margin_loss
    # simulated quantisation
    fake_quantize_per_tensor_affine fake_quantize_per_channel_affine
    # sizes and values
    sym_size sym_numel sym_stride sym_storage_offset item _local_scalar_dense is_nonzero
    """.splitlines()
    if not line.lstrip().startswith("#")
    for name in line.split()
)
_OTHERS = {
    "prims": frozenset({"convert_element_type", "broadcast_in_dim", "iota"}),
    "torchvision": frozenset({"nms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"}),
}
# Operations of this package that stand in graphs, and the module that registers each.
OWN: dict[str, str] = {
    "tap": "kfe_fx.taps",
    "gate": "kfe_fx.gates",
    "hard_concrete": "kfe_fx.hard_concrete",
    "recurrent": "kfe_fx.recurrent.op",
    **dict.fromkeys(
        ("recurrent_states", "recurrent_product", "recurrent_opened", "recurrent_rows"), "kfe_fx.recurrent.opened"
    ),
}

# The only writes: a graph ends with its buffers' new values.
_WRITES = frozenset({"aten.copy_.default", "aten.add_.Tensor"})

_PLAIN = frozenset({"Tensor", "int", "bool", "float", "number", "str", "Device", "Generator", "complex", "ScalarType"})
_RETURNED = frozenset({"Tensor", "int", "bool", "float", "number"})

# Python functions on sizes: name -> (function, number of arguments; None for any)
FUNCTIONS: dict[str, tuple[Callable[..., Any], int | None]] = {
    **{
        f"operator.{name}": (getattr(operator, name), 2)
        for name in (
            "add",
            "sub",
            "mul",
            "truediv",
            "floordiv",
            "mod",
            "pow",
            "eq",
            "ne",
            "lt",
            "le",
            "gt",
            "ge",
            "and_",
            "or_",
        )
    },
    "operator.getitem": (operator.getitem, 2),
    "operator.neg": (operator.neg, 1),
    "operator.not_": (operator.not_, 1),
    **{f"math.{name}": (getattr(math, name), 1) for name in ("ceil", "floor", "trunc", "sqrt")},
    **{f"torch.{name}": (getattr(torch, name), 1) for name in ("sym_float", "sym_int", "sym_not")},
    **{f"torch.{name}": (getattr(torch, name), 2) for name in ("sym_max", "sym_min")},
    "torch.sym_ite": (torch.sym_ite, 3),
}
_FUNCTION_NAMES = {function: name for name, (function, _) in FUNCTIONS.items()}
# ATen calls whose result is a Python number
NUMBERS = frozenset(
    f"aten.{name}"
    for name in (
        *("sym_size.int", "sym_numel.default", "sym_stride.int", "sym_storage_offset.default"),
        *("item.default", "_local_scalar_dense.default", "is_nonzero.default"),
    )
)


def name_of(target: Any) -> str | None:
    """Return the name that a call's target has in a file, or None where it may not stand in one."""
    if isinstance(target, OpOverload):
        name = str(target)
        try:
            return name if resolve(name) is target else None
        except Malformed:
            return None
    try:
        return _FUNCTION_NAMES.get(target)
    except TypeError:  # not hashable
        return None


def resolve(name: str) -> Any:
    """Return the target of a call by its name in a file.

    Raises:
        Malformed: it is not on the list, or not known to this version of torch.
    """
    if name in FUNCTIONS:
        return FUNCTIONS[name][0]
    parts = name.split(".")
    if len(parts) != 3 or not _listed(parts[0], parts[1]):
        raise Malformed(f"the operation {name[:80]!r} is not one that a program file may hold")
    space, base, overload = parts
    _register(space, base)
    packet = getattr(getattr(torch.ops, space), base, None)
    if packet is None or overload not in packet.overloads():
        raise Malformed(f"the operation {name[:80]!r} is not known to torch {torch.__version__}; update torch")
    found = getattr(packet, overload)
    if not _harmless(found, name):
        raise Malformed(f"the operation {name[:80]!r} is not one that a program file may hold")
    return found


def _listed(space: str, base: str) -> bool:
    if space == "aten":
        return base in _ATEN or f"aten.{base}" in ("aten.copy_", "aten.add_")
    return base in _OTHERS.get(space, ()) or (space == "kfe_fx" and base in OWN)


def _register(space: str, base: str) -> None:
    if space == "kfe_fx":
        importlib.import_module(OWN[base])
    elif space == "torchvision":
        try:
            importlib.import_module("torchvision")
        except ImportError:
            raise Malformed(f"the operation torchvision.{base} needs torchvision; install it") from None


def _harmless(op: OpOverload, name: str) -> bool:
    schema = op._schema
    if schema.is_mutable and name not in _WRITES:
        return False
    returned = [_element(str(value.type)) for value in schema.returns]
    taken = [_element(str(value.type)) for value in schema.arguments]
    numbers = any(kind != "Tensor" for kind in returned)
    return (
        bool(returned)
        and _RETURNED.issuperset(returned)
        and _PLAIN.issuperset(taken)
        and (not numbers or "Tensor" in taken)  # Python arithmetic that TorchScript keeps among ATen's names
    )


def _element(kind: str) -> str:
    while kind.startswith(("List[", "Optional[")) and kind.endswith("]"):
        kind = kind[kind.index("[") + 1 : -1]
    return kind


def writes(target: Any) -> bool:
    """Tell whether a call changes its first argument."""
    return isinstance(target, OpOverload) and target._schema.is_mutable
