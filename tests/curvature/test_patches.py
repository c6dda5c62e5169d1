"""Patches: a convolution is a product of its weight's matrix with them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from kfe_fx.curvature.patches import patches
from tests.curvature.nets import randn

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@pytest.mark.parametrize(
    ("rank", "kernel", "stride", "padding", "dilation", "groups"),
    [
        (1, (3,), (1,), (0,), (1,), 1),
        (1, (2,), (3,), (2,), (2,), 2),
        (2, (3, 2), (1, 2), (1, 0), (2, 1), 1),
        (2, (1, 1), (2, 2), (0, 0), (1, 1), 4),
        (3, (2, 1, 2), (1, 1, 2), (1, 0, 1), (1, 1, 1), 2),
    ],
)
def test_a_convolution_is_a_product_with_patches(
    rank: int, kernel: tuple, stride: tuple, padding: tuple, dilation: tuple, groups: int
) -> None:
    x = randn(2, 4, *(6, 7, 5)[:rank])
    weight = randn(8, 4 // groups, *kernel, seed=1)
    y = CONVOLUTIONS[rank](x, weight, None, stride, padding, dilation, groups)
    out = tuple(y.shape[2:])
    pads = tuple((amount, amount) for amount in padding)
    made = patches(x, kernel, stride, pads, dilation, out, groups)  # [K, i, M, R]
    product = torch.einsum("koi,kimr->mkor", weight.reshape(groups, 8 // groups, -1), made)
    torch.testing.assert_close(product.reshape(y.shape), y, rtol=1e-12, atol=1e-12)
    ones = patches(x, kernel, stride, pads, dilation, out, groups, ones=True)
    assert torch.equal(ones[:, :-1], made)
    assert (ones[:, -1] == 1).all()


def test_channels_last_and_uneven_padding() -> None:
    x = randn(2, 3, 5, 4).to(memory_format=torch.channels_last)
    weight = randn(2, 3, 2, 3, seed=1)
    y = F.conv2d(F.pad(x, (1, 0, 0, 2)), weight)
    made = patches(x, (2, 3), (1, 1), ((0, 2), (1, 0)), (1, 1), tuple(y.shape[2:]))
    product = torch.einsum("oi,imr->mor", weight.reshape(2, -1), made[0])
    torch.testing.assert_close(product.reshape(y.shape), y, rtol=1e-12, atol=1e-12)
