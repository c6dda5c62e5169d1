"""Torch-Pruning's side of benchmarks/criteria.py: its importances, over all layers, per layer, or beside the stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

PEERS = tuple(
    f"{importance} {scope}"
    for importance in ("magnitude", "bn-scale", "lamp", "fpgm", "taylor", "hessian", "random")
    for scope in ("global", "local", "inner")
)
# what makes the residual stream, by how the names of the networks end or begin; ``inner`` leaves it as wide as it is
STREAM = ("stem.0", "conv2", "shortcut.0", "project.0", "patches.6", "attention.project", "mlp.2")


def pruned_by_peer(
    module: nn.Module, setting: str, ratio: float, seed: int, scored: tuple[Tensor, Tensor], step: int
) -> nn.Module:
    """Remove a share of all channels with Torch-Pruning, widths in multiples of ``step``; the classes stay."""
    import torch_pruning as tp

    kind, scope = setting.split()
    importances: dict[str, Callable[[], Any]] = {
        "magnitude": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "bn-scale": tp.importance.BNScaleImportance,
        "lamp": tp.importance.LAMPImportance,
        "fpgm": tp.importance.FPGMImportance,
        "taylor": tp.importance.GroupTaylorImportance,
        "hessian": tp.importance.GroupHessianImportance,
        "random": tp.importance.RandomImportance,
    }
    for child in module.modules():
        if hasattr(child, "qkv"):  # its author would write it so for the peer, which knows nothing of the sizes in code
            child.forward = MethodType(attend, child)
    torch.manual_seed(seed)
    importance = importances[kind]()
    images, labels = scored
    left = [child for child in module.modules() if isinstance(child, nn.Linear) and child.out_features == 36]
    if scope == "inner":
        left += [child for name, child in module.named_modules() if name.endswith(STREAM)]
    pruner = tp.pruner.BasePruner(
        module, images[:2], importance=importance, pruning_ratio=ratio, global_pruning=scope == "global",
        ignored_layers=left, round_to=step, max_pruning_ratio=1.0, num_heads=heads_of(module),
    )  # fmt: skip
    if kind == "taylor":
        module.zero_grad()
        nn.functional.cross_entropy(module(images), labels).backward()
    elif kind == "hessian":
        module.zero_grad()
        importance.zero_grad()
        for image, label in zip(images.split(1), labels.split(1), strict=True):
            module.zero_grad()
            nn.functional.cross_entropy(module(image), label).backward()
            importance.accumulate_grad(module)
    pruner.step()
    module.zero_grad()
    return module


def attend(self: Any, x: Tensor) -> Tensor:
    """Attend as models/glyphs_vit.py does, with heads as wide as the packed projection has become."""
    batch, tokens, _ = x.shape
    q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    y = nn.functional.scaled_dot_product_attention(q, k, v)
    return self.project(y.transpose(1, 2).reshape(batch, tokens, -1))


def heads_of(module: nn.Module) -> Mapping[Any, Any]:
    """Name the heads of packed projections, which the peer cannot find by itself."""
    return {child.qkv: child.heads for child in module.modules() if hasattr(child, "qkv") and hasattr(child, "heads")}
