"""The numbers of a random network: weights by fan-in, and nothing at 0, at 1 or at its default."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

CONTRACTIONS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)
GAINS = ("weight", "gain", "gamma")


def fan_in(module: nn.Module, name: str, p: Tensor) -> int | None:
    """Count the products behind one output number; None where the parameter is no contraction."""
    if isinstance(module, nn.modules.conv._ConvTransposeNd) and name == "weight":
        strides = math.prod(module.stride)
        return max(1, p.shape[0] // module.groups * math.prod(p.shape[2:]) // strides)
    if isinstance(module, nn.Bilinear) and name == "weight":
        return p.shape[1] * p.shape[2]
    if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and name == "weight":
        return math.prod(p.shape[1:])
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and p.dim() == 2:
        return p.shape[1]
    if isinstance(module, nn.MultiheadAttention) and p.dim() == 2:
        return p.shape[1]
    sizes = [n for n in p.shape if n > 1]
    if not isinstance(module, (nn.Embedding, nn.LayerNorm)) and name in ("w", "weight") and len(sizes) > 1:
        return math.isqrt(sizes[-1] * sizes[-2])
    return None


def fill(net: nn.Module, seed: int) -> None:
    """Fill the parameters and the statistics of a network from a seed."""
    g = torch.Generator().manual_seed(seed)

    def normal(like: Tensor, deviation: float) -> Tensor:
        return torch.randn(like.shape, generator=g, dtype=like.dtype) * deviation

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=g, dtype=like.dtype) * (high - low) + low

    seen: set[int] = set()
    with torch.no_grad():
        for module in net.modules():
            for name, p in module.named_parameters(recurse=False):
                if id(p) in seen:
                    continue
                seen.add(id(p))
                products = fan_in(module, name, p)
                if products is not None:
                    p.copy_(normal(p, 1.3 / math.sqrt(products)))
                elif isinstance(module, nn.Embedding) or name in ("token", "query", "table", "position"):
                    p.copy_(normal(p, 0.6))
                elif name in GAINS and not isinstance(module, nn.PReLU):
                    p.copy_(uniform(p, 0.5, 1.5))
                else:  # biases, shifts, slopes: away from 0, of both signs
                    p.copy_(uniform(p, 0.1, 0.5) * torch.sign(normal(p, 1.0)))
            for name, b in module.named_buffers(recurse=False):
                if name == "running_mean" or name == "shift":
                    b.copy_(normal(b, 0.3))
                elif name == "running_var" or name == "scale":
                    b.copy_(uniform(b, 0.5, 1.8))
                elif name == "num_batches_tracked":
                    b.fill_(7)
