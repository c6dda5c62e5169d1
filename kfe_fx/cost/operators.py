"""Which aten operations ONNX Runtime fuses, drops, or computes in its blocked layout, as the cost model needs it."""

from __future__ import annotations

import torch

aten = torch.ops.aten

# what ONNX Runtime computes inside a convolution's kernel
FUSED_ACTIVATIONS = {
    aten.relu.default,
    aten.relu6.default,
    aten.hardtanh.default,
    aten.clamp.default,
    aten.leaky_relu.default,
    aten.sigmoid.default,
    aten.tanh.default,
    aten.hardsigmoid.default,
    aten.hardswish.default,
}
# ... and of these what costs next to nothing there
FREE_ACTIVATIONS = {aten.relu.default, aten.leaky_relu.default}
# what moves no element
FREE = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.view_as.default,
    aten.reshape_as.default,
    aten.expand.default,
    aten.expand_as.default,
    aten.detach.default,
    aten.alias.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.to.dtype,
}
# ... but for the overhead of a kernel
RESHAPES = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
}
# shapes, slices and concatenations of shapes around an attention of a dynamic batch
ATTENTION_KERNELS = 10
TRANSPOSES = {aten.permute.default, aten.transpose.int, aten.t.default, aten.pixel_shuffle.default, aten.roll.default}
BINARY = {aten.add.Tensor, aten.mul.Tensor}
BROADCASTS = {*BINARY, aten.sub.Tensor, aten.div.Tensor}
ROWWISE = {aten.layer_norm.default, aten.softmax.int, aten._softmax.default, aten.log_softmax.int}
PADS = {aten.pad.default, aten.constant_pad_nd.default}
POOLS = {aten.max_pool2d.default, aten.avg_pool2d.default}
CONCATENATIONS = {aten.cat.default}
STAYS_BLOCKED = {*FUSED_ACTIVATIONS, aten.silu.default, aten.batch_norm.default, aten.upsample_nearest2d.vec}
