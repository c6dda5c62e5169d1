"""Apply a plan again: to a Program, or to the nn.Module that it was made from."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import nn

from kfe_fx.errors import PlanError, UsageError
from kfe_fx.frontend.capture import capture
from kfe_fx.passes.shrink import Shrink
from kfe_fx.plan import Plan
from kfe_fx.program import Program, named_tensors, put_tensor, tied_names
from kfe_fx.structure import template_of

Target = TypeVar("Target", Program, nn.Module)

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def apply(plan: Plan, target: Target, example_inputs: Any = None) -> Target:
    """Return a smaller copy of ``target``: a Program, or the original nn.Module (with ``example_inputs``).

    Of a module the tensors are cut by name and the widths that torch's layers write down (``out_channels``,
    ``normalized_shape``, ...) follow; then it must give the outputs of the shrunk Program.

    Raises:
        PlanError: the plan does not fit, or the module's own code holds a width; its Program has none.
        UsageError: a module without example inputs.
    """
    if isinstance(target, Program):
        return Shrink(plan).run(target).program
    if not isinstance(target, nn.Module):
        raise UsageError(f"a plan applies to a Program or an nn.Module, got {type(target).__name__}")
    if example_inputs is None:
        raise UsageError("example_inputs are needed to apply a plan to a module: apply(plan, module, example_inputs)")
    small = Shrink(plan).run(capture(target, example_inputs)).program
    twin = copy.deepcopy(target)
    _cut(twin, small)
    _follow(twin, small)
    _compare(twin, small)
    return twin


def _cut(module: nn.Module, small: Program) -> None:
    cut = named_tensors(small.module())
    lasting = module.state_dict().keys()
    for names in set(tied_names(module).values()):
        old, new = named_tensors(module)[names[0]], cut[names[0]]
        if old.shape == new.shape:
            continue
        value = new.detach().clone()
        value = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
        for name in names:
            put_tensor(module, name, value, persistent=name in lasting)


def _follow(module: nn.Module, small: Program) -> None:
    groups = _groups(small)
    for path, layer in module.named_modules():
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, torch.Tensor):
            continue
        if isinstance(layer, nn.Linear):
            layer.out_features, layer.in_features = weight.shape
        elif isinstance(layer, nn.modules.conv._ConvNd):
            layer.groups = groups.get(f"{path}.weight" if path else "weight", layer.groups)
            wide, narrow = weight.shape[0], weight.shape[1] * layer.groups
            layer.in_channels, layer.out_channels = (wide, narrow) if layer.transposed else (narrow, wide)
        elif isinstance(layer, nn.modules.batchnorm._NormBase):
            layer.num_features = len(weight)
        elif isinstance(layer, nn.LayerNorm | nn.RMSNorm):
            layer.normalized_shape = tuple(weight.shape)
        elif isinstance(layer, nn.GroupNorm):
            layer.num_groups = layer.num_groups * len(weight) // layer.num_channels or 1
            layer.num_channels = len(weight)
        elif isinstance(layer, nn.Embedding):
            layer.num_embeddings, layer.embedding_dim = weight.shape


def _groups(small: Program) -> dict[str, int]:
    found = {}
    for node in small.graphs["eval"].nodes:
        if node.op == "call_function" and str(node.target).startswith("aten.conv"):
            weight = node.args[1]
            groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
            for name in small.names_of(str(weight.target)):
                found[name] = groups
    return found


def _compare(module: nn.Module, small: Program) -> None:
    args, kwargs = small.example_inputs
    was = module.training
    module.eval()
    try:
        with torch.no_grad():
            outputs = module(*args, **kwargs)
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        first = str(error).strip().splitlines()[0]
        raise PlanError(
            f"the module's own code holds a width ({first}); use result.module(), which holds none"
        ) from None
    finally:
        module.train(was)
    _, found = template_of(outputs, lambda item: isinstance(item, torch.Tensor))
    with torch.no_grad():
        expected = [v for v in small.module().run_flat(small.flat_examples()) if isinstance(v, torch.Tensor)]
    for ours, theirs in zip(found, expected, strict=True):
        allowed = _TOLERANCE.get(theirs.dtype, 1e-2) * max(1.0, float(theirs.abs().max()))
        if ours.shape != theirs.shape or not float((ours - theirs).abs().max()) <= allowed:
            raise PlanError("the module's own code holds a width and gives other outputs; use result.module()")
